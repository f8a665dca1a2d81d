"""The scripted model's prepared answers, found by close wording; and those of an agent, which call tools."""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any

ENOUGH = 0.63  # how alike two wordings must be, of 1; tests keep paraphrases above and strangers below

# Words that say nothing about the subject of a question.
IDLE = frozenset(
    """a an and any are as at be been being but by can command could did do does exactly explain for
    from get give had happen happens has have how i if in into is it its kindly let me mean means
    much my need needs of on or our please rather really s say shall should so take takes tell than
    that the their them then there these they this to us use used using want was we were what whats
    when where which while who why will with work works would you your about""".split()  # noqa: SIM905 - a list of 90 strings reads worse
)


@cache
def _prepared() -> dict[str, tuple[list[str], str]]:
    """Question: (its wordings, the answer), from prepared.md, where the wordings are a comment."""
    text = Path(__file__).with_name("prepared.md").read_text(encoding="utf-8")
    parts = re.findall(r"^## (.+)\n<!-- also: (.+) -->\n([^\0]+?)(?=^## |\Z)", text, flags=re.MULTILINE)
    return {question: ([question, *also.split(" | ")], answer.strip()) for question, also, answer in parts}


def questions() -> list[str]:
    """The questions that have a prepared answer, as prepared.md words them."""
    return list(_prepared())


def _words(text: str) -> set[str]:
    """The words that carry a question's meaning, without their endings."""
    words = re.findall(r"[a-z0-9]+|\$", text.lower().replace("'", "").replace("pub/sub", "pubsub"))
    return {re.sub(r"(?<=\w{3})(ing|ed|es|s|e)$", "", word) for word in words if word not in IDLE}


@cache
def _index() -> tuple[list[tuple[set[str], str]], Counter[str]]:
    """Every wording as (its words, its question), and in how many questions each word occurs."""
    wordings = [(_words(one), question) for question, (also, _) in _prepared().items() for one in also]
    spread = {(word, question) for words, question in wordings for word in words}
    return wordings, Counter(word for word, _ in spread)


def find(question: str) -> str | None:
    """The prepared question that asks the same, or None.

    Likeness is twice the weight of the words in common over the weight of all words of both (Dice's measure).
    A word weighs the more, the fewer questions have it, and much more if none has it, since it speaks of
    something else. A misspelt word counts as the known one that is closest.
    """
    wordings, spread = _index()

    def known(word: str) -> str:
        alike = [other for other in spread if other[0] == word[0]]
        return (get_close_matches(word, alike, 1, 0.8) or [word])[0]

    def weight(words: set[str]) -> float:
        rarity = [len(_prepared()) / spread.get(word, 0.1) for word in words]
        return math.fsum(math.log(1 + times) for times in rarity)

    asked = {known(word) for word in _words(question[:1000])}
    best, found = max((2 * weight(asked & words) / (weight(asked) + weight(words)), match) for words, match in wordings)
    return found if best >= ENOUGH else None


def reply(question: str) -> str:
    """The prepared answer, or else an honest one that says what can be asked."""
    found = find(question)
    if found is not None:
        return _prepared()[found][1]
    listed = "\n".join(f"- {prepared}" for prepared in questions())
    return (
        "I am the **scripted source**: a small server with prepared answers, not a language model. I have "
        f"none for this question. I can answer these:\n\n{listed}\n\n"
        "For questions of your own choose a real model, in the panel, with `source=` or with the environment "
        "variable `LLMSTREAM_LLM`: `local` is small, runs on this machine and invents facts; `openai` needs "
        "a key or an endpoint of yours."
    )


# ------------------------------------------------------------------------------------------- more than text


@dataclass(frozen=True)
class Turn:
    """What a model says before it waits again: it reasons, and then calls a tool or writes a text."""

    reasoning: str
    text: str
    call: str = ""  # the tool's name, and
    arguments: str = ""  # JSON
    number: int = 0  # of the call


@cache
def _agent() -> Any:
    """What agent.json holds: reasoning, a refusal, and an agent's answers, a step for each turn."""
    return json.loads(Path(__file__).with_name("agent.json").read_text(encoding="utf-8"))


def agent_questions() -> list[str]:
    """The questions that are answered with the help of tools, where a request offers them."""
    return list(_agent()["questions"])


def reasoning(words: int) -> str:
    """So many words of reasoning that would suit any question; once more from the beginning, if they run out."""
    return " ".join(islice(cycle(_agent()["reasoning"].split()), words))


def refusal() -> str:
    """The words in which a model refuses."""
    return str(_agent()["refusal"])


def turn(messages: list[dict[str, Any]], tools: list[str]) -> Turn | None:
    """What comes next in a chat that ends with these messages, if these tools are offered; None where none is needed.

    It tells what the tools gave back, word by word; a result that begins with `error: ` ends the matter.
    """
    at = max(n for n, message in enumerate(messages) if message["role"] == "user")
    asked = messages[at]["content"]  # a text, or a list of parts, of which none is known here
    if not tools or not isinstance(asked, str):
        return None
    found = get_close_matches(asked, agent_questions(), 1, 0.95)  # one that asks for another number is another question
    if not found:
        listed = "\n".join(f"- {question}" for question in agent_questions())
        return None if find(asked) else Turn("", _agent()["unknown"].format(listed))
    results = [str(message["content"]) for message in messages[at:] if message["role"] == "tool"]
    if results and results[-1].startswith("error: "):
        return Turn("That did not work.", _agent()["failed"].format(results[-1].removeprefix("error: ")))
    steps = _agent()["questions"][found[0]]
    step = steps[min(len(results), len(steps) - 1)]
    reasons, call = step["reasoning"].format(*results), step.get("call", "")
    if call and call not in tools:
        return Turn(reasons, _agent()["missing"].format(call))
    text = step.get("text", "").format(*results)
    return Turn(reasons, text, call, json.dumps(step.get("arguments")), len(results) + 1)
