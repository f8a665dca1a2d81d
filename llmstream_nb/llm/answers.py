"""The scripted model's prepared answers, found by close wording."""

from __future__ import annotations

import math
import re
from collections import Counter
from difflib import get_close_matches
from functools import cache
from pathlib import Path

ENOUGH = 0.62  # of 1: how alike two wordings must be; tests hold it between paraphrases and strangers

# Words that say nothing about the subject of a question.
_IDLE = frozenset(
    "a an and any are as at be been being but by can could did do does explain for from get give had has have how i "
    "if in into is it its kindly let me my of on one or our please shall should so tell than that the their them "
    "then there these they this those to us use used using was we were what whats when where which while who why "
    "will with would you your about".split()
)


@cache
def _prepared() -> dict[str, tuple[list[str], str]]:
    """Question: (its wordings, the answer), from answers.md, where it is `## Question`, then `<!-- also: … -->`."""
    text = Path(__file__).with_name("answers.md").read_text(encoding="utf-8")
    _, *parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    prepared = {}
    for question, part in zip(parts[::2], parts[1::2], strict=True):
        also = re.search(r"<!-- also: (.*?) -->", part, flags=re.DOTALL)
        wordings = [question, *(also[1].split("|") if also else [])]
        prepared[question] = (wordings, re.sub(r"<!--.*?-->", "", part, flags=re.DOTALL).strip())
    return prepared


def questions() -> list[str]:
    """The questions that have a prepared answer, as written in answers.md."""
    return list(_prepared())


def _words(text: str) -> frozenset[str]:
    """The words that carry a question's meaning, without plural and verb endings."""
    found = re.findall(r"[a-z0-9$]+", re.sub(r"['’]", "", text.lower()).replace("pub/sub", "pubsub"))
    return frozenset(re.sub(r"(?<=\w{3})(ing|ed|es|s|e)$", "", word) for word in found if word not in _IDLE)


@cache
def _index() -> tuple[list[tuple[str, frozenset[str]]], Counter[str]]:
    """Every wording as (its question, its words), and in how many questions each word occurs."""
    wordings = [(question, _words(wording)) for question, (all_, _) in _prepared().items() for wording in all_]
    spread = {(question, word) for question, words in wordings for word in words}
    return wordings, Counter(word for _, word in spread)


def find(question: str) -> str | None:
    """The prepared question that asks the same, or None.

    Likeness is twice the weight of the common words over the weight of all words of both; the fewer questions
    have a word, the more it weighs. A misspelt word counts as the known word it is closest to.
    """
    wordings, spread = _index()
    asked = {word if word in spread else (get_close_matches(word, spread, 1, 0.8) or [word])[0]
             for word in sorted(_words(question[:1000]))}

    def weight(words: set[str] | frozenset[str]) -> float:
        return sum(math.log(1 + len(_prepared()) / spread.get(word, 1)) for word in sorted(words))

    def likeness(words: frozenset[str]) -> float:
        return 2 * weight(asked & words) / ((weight(asked) + weight(words)) or 1)

    best, question = max((likeness(words), question) for question, words in wordings)
    return question if best >= ENOUGH else None


def reply(question: str) -> str:
    """The prepared answer, or else an honest one that says what can be asked."""
    found = find(question)
    if found is not None:
        return _prepared()[found][1]
    listed = "\n".join(f"- {prepared}" for prepared in questions())
    return (
        "I am the **scripted source**: a small server with prepared answers, not a language model, and I have none "
        f"for this question. I can answer these:\n\n{listed}\n\n"
        "For questions of your own, choose a real model: the source `local` (small, runs on this machine, invents "
        "facts) or `openai` (needs a key), in the panel, with the argument `source=`, or with the environment "
        "variable `LLMSTREAM_LLM`."
    )
