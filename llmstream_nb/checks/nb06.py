"""What the exercises of notebook 06 check: what a viewer knows and does when something breaks."""

from collections.abc import Callable

from llmstream_nb.checks.case import LIFETIME, Case, Noting
from llmstream_nb.checks.running import exercise
from llmstream_nb.checks.verdict import require, show


@exercise
def resume(case: Case, function: Callable[..., str]) -> str:
    """Exercise of notebook 06: `resume(client, stream, after, text)`, an answer of the kit from a saved ID on.

    The viewer holds `text`, all up to the entry `after`. It reads on from there, waits for what is to come, begins
    anew at a `start`, stops at an `end` or `error`, and returns the whole text.
    """
    first = [("1-0", "start", "{}"), *((f"1-{n}", "text", f"{n} ") for n in range(1, 12))]
    stop, end = ("1-12", "end", '{"reason": "stop"}'), ("2-4", "end", '{"reason": "stop"}')
    second = [("2-0", "start", "{}"), ("2-1", "text", "anew "), ("2-2", "text", "it "), ("2-3", "text", "goes")]
    words = [("1-0", "start", "{}"), ("1-1", "text", "say "), ("1-2", "text", "end"), ("1-3", "text", "start")]
    words, dead = [*words, ("1-4", "end", "{}")], [*first, ("2-0", "end", '{"closes": "1-11"}')]
    whole, half = "".join(text for _, _, text in first[1:]), "".join(text for _, _, text in first[1:10])
    coming = first[6:], second[:1], [*second[1:], end]
    for entries, later, after, text, right, about in case.each(
        ([*first, stop], (), "0-0", "", whole, "when it begins at the beginning"),
        ([*first, stop], (), "1-9", half, whole, "when it goes on after 1-9"),
        ([*first, stop], (), "1-11", whole, whole, "when only the end is still to come"),
        ([*first, ("1-12", "error", "{}")], (), "1-9", half, whole, "when the answer ends in an error"),
        (words, (), "1-1", "say ", "say endstart", "when the text speaks of the end"),
        ([*first, *second, end], (), "1-9", half, "anew it goes", "when a second attempt begins"),
        ([*first, *second, end], (), "2-1", "anew ", "anew it goes", "when it goes on after 2-1"),
        (dead, (), "1-9", half, whole, "when the producer dies and someone presses Stop"),
        (first[:6], coming, "1-3", "1 2 3 ", "anew it goes", "when the entries come while it reads"),
    ):
        case.write(entries)
        before = case.entries()
        case.trickle(*later, add=case.write)
        noting = Noting(case.client)
        result = case.call(function, about, noting, case.stream, after, text)
        case.require_form("the whole text", "one string")
        case.require(case.entries()[: len(before)] == before, "changes the stream: reading takes nothing away.")
        rest = bool(text) and right == text + result
        require(not rest, f"{case.got}, the rest alone: put it after what the viewer has, {show(text)}.")
        case.require_result(right)
        case.require(not noting.again, "reads the same entries again: remember the ID of each, of whatever kind.")
    return "the whole text, once, wherever it goes on."


@exercise
def state(case: Case, function: Callable[..., str]) -> str:
    """Optional exercise of notebook 06: `state(client, answer)`, an answer's state from its newest entry and its lease.

    `answer` is what the answer's keys begin with. The states: queued, streaming, interrupted, ended, failed.
    """
    chunks, *leases = [case.other(name) for name in ("chunks", "lease:1", "lease:10")]
    first = [("1-0", "start", "{}"), ("1-1", "text", "the end")]
    anew = [*first, ("10-0", "start", "{}")]
    for entries, lease, right, about in case.each(
        ([], None, "queued", "without an entry"),
        (first, leases[0], "streaming", "with text, and the lease of attempt 1"),
        (first, None, "interrupted", "with text, and without a lease"),
        ([*first, ("1-2", "end", "{}")], leases[0], "ended", "with an `end`, while the lease runs on"),
        ([*first, ("1-2", "error", "{}")], None, "failed", "with an `error`"),
        (anew, leases[1], "streaming", "in its tenth attempt, with the lease of attempt 10"),
        (anew, leases[0], "interrupted", "in its tenth attempt, with the lease of attempt 1 alone"),
        ([*first, ("10-0", "end", "{}")], None, "ended", "that was interrupted, and stopped"),
    ):
        case.write(entries, chunks)
        if lease:
            case.client.set(lease, "alive", ex=LIFETIME)
        case.call(function, f"asked for an answer {about}", case.client, case.stream)
        case.require_result(right)
    return "the newest entry and its attempt's lease tell the state."


@exercise
def missing(case: Case, function: Callable[[list[str]], list[str]]) -> str:
    """Optional exercise of notebook 06: `missing(ids)`, the IDs that are missing between those that a reader saw."""
    for ids, right in (
        (["1-0", "1-1", "1-2"], []),
        (["1-0", "1-1", "1-4"], ["1-2", "1-3"]),
        (["1-8", "1-9", "1-12", "1-13", "1-15"], ["1-10", "1-11", "1-14"]),
        (["1-0", "1-1", "2-0", "2-1"], []),
        (["1-0", "1-7", "2-2"], ["1-1", "1-2", "1-3", "1-4", "1-5", "1-6", "2-0", "2-1"]),
        ([], []),
    ):
        case.call(function, f"given {ids}", list(ids))
        case.require_form("the list of what is missing", "a list of IDs", list, str)
        case.require_result(right)
    return "every hole is found, and a new attempt is none."
