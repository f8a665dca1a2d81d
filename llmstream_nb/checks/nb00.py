"""What the exercises of notebook 00 check: where an answer lies, and what becomes of one that is stopped."""

from llmstream_nb import tables
from llmstream_nb.answers.ask import Answer
from llmstream_nb.answers.connection import names_of
from llmstream_nb.answers.read import look
from llmstream_nb.checks.case import Case
from llmstream_nb.checks.running import exercise
from llmstream_nb.checks.verdict import is_whole, require, show


@exercise
def count_entries(_: Case, answer: Answer, key: str, count: int) -> str:
    """Exercise of notebook 00: the key of the answer's stream, and how many entries lie there."""
    require(isinstance(answer, Answer), f"the first argument is what `ask` gave you; this is {show(answer)}.")
    right = names_of(answer.client).answer(answer.id).chunks
    filled = isinstance(key, str) and repr(answer) in key
    require(not filled, f"the braces belong to the key: write the text without `f`; this is {show(key)}.")
    require(isinstance(key, str) and key == right, f"this answer's stream does not lie under {show(key)}.")
    ended = look(answer.id, answer.client).status in ("ended", "failed")
    require(ended, "the answer still grows: wait for its end with `answer.wait()`, then count again.")
    require(is_whole(count), f"the count is a whole number; this is {show(count)}.")
    kinds = tables.entries(answer)["kind"]
    require(count != sum(kinds == "text"), f"{count} is only the text: the start and the end count too.")
    require(count == len(kinds), f"there are not {count} entries under that key.")
    return f"{count} entries under that key."


@exercise
def stopped(_: Case, answer: Answer) -> str:
    """Optional exercise of notebook 00: an answer that was stopped when part of it was there."""
    require(isinstance(answer, Answer), f"the argument is what `ask` gave you; this is {show(answer)}.")
    now, named = look(answer.id, answer.client), f"your answer (id {show(answer.id)})"
    require(now.status not in ("queued", "streaming"), f"{named} is still being written: stop it.")
    require(now.status == "ended", f"{named} is {now.status}, not ended.")
    reason = now.record.get("reason")
    require(reason == "cancelled", f"{named} ended with the reason {show(reason)}, not 'cancelled': stop it earlier.")
    require(bool(now.text), "it was stopped before the first piece: wait until there is some text.")
    return f"stopped after {len(now.text)} characters, and they are kept."
