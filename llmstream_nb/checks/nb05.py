"""What the exercises of notebook 05 check: a source of answers, and one look at an answer, without waiting."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from llmstream_nb import tables
from llmstream_nb.answers.ask import ask, clear
from llmstream_nb.checks.case import Case, Noting
from llmstream_nb.checks.running import TIMEOUT, exercise
from llmstream_nb.checks.verdict import require, show


@exercise
def source(case: Case, function: Callable[..., Iterator[str]]) -> str:
    """Exercise of notebook 05: `shout(question, topic)`, a source that yields the question's words in capitals.

    The pieces, joined, are the question in capitals with one space between words; each holds one word.
    """
    for question in ("Why streams?", "Who is “Ada”, then?", "Go!"):
        about, words = f"asked {show(question)}", question.upper().split()
        made = case.call(function, about, question, None)
        require(not isinstance(made, str), "your function returns a whole text: `yield` it word by word.")
        require(isinstance(made, Iterable), f"{case.got}, and nothing can be taken from that: use `yield`.")
        pieces = case.call(lambda made=made: list(islice(made, 100)), about)
        got = f"{about}, your function yields {show(pieces)}"
        require(all(isinstance(piece, str) for piece in pieces), f"{got}: only text can be streamed.")
        require("".join("".join(pieces).split()) == "".join(words), f"{got}, not the words {show(words)}.")
        require("".join(pieces) == " ".join(words), f"{got}: one space between two words, and no other.")
        require(len(pieces) == len(words), f"{got}: that is not a word at a time.")
    answer = ask("so be it", source=function, client=case.client)
    try:
        require(answer.wait(TIMEOUT / 2).text == "SO BE IT", f"through `ask`, its text is {show(answer.text)}.")
        return f"{sum(tables.entries(answer)['kind'] == 'text')} words in the stream, an entry each."
    finally:
        clear(answer.id, client=case.client)


@exercise
def poll(case: Case, function: Callable[..., tuple[str, str, bool]]) -> str:
    """Optional exercise of notebook 05: `poll(client, stream, last)`: new text, last ID, and whether it is over."""
    words = [(f"1-{n}", "text", word) for n, word in enumerate(["One", "two", "end", "error"], 1)]
    for entries, last, right, about in case.each(
        ([], "0-0", ("", "0-0", False), "where the stream does not exist yet"),
        (words[:2], "0-0", ("Onetwo", "1-2", False), "at the first look"),
        (words[:2], "1-2", ("", "1-2", False), "where nothing is new"),
        (words, "1-1", ("twoenderror", "1-4", False), "in the middle, after 1-1"),
        ([*words, ("1-5", "end", "stop")], "1-3", ("error", "1-5", True), "at the end, with one word of the model's"),
        ([*words[:1], ("1-2", "error", "Stalled")], "0-0", ("One", "1-2", True), "where the model failed"),
        ([*words, ("1-5", "end", "stop")], "1-5", ("", "1-5", False), "after the end, where nothing is new"),
        ([(f"1-{n}", "text", "x") for n in range(1, 1_201)], "0-0", ("x" * 1_200, "1-1200", False), "far behind"),
    ):
        case.write(entries)
        noting = Noting(case.client)
        result = case.call(function, about, noting, case.stream, last)
        require(isinstance(result, (tuple, list)) and len(result) == 3, f"{case.got}: return three things.")
        for name, one, wanted in zip(("the text", "the last ID", "whether it is over"), result, right, strict=True):
            require(one == wanted, f"{case.got}: {name} should be {show(wanted)}.")
        case.require(not noting.blocks, "waits for entries to come: look once, without `block`.")
    return "new text, once, and where to go on from."
