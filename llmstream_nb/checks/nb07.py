"""What the exercises of notebook 07 check: how much can be kept, and how far behind a reader is."""

from collections.abc import Callable

from llmstream_nb.checks.case import Case
from llmstream_nb.checks.running import exercise
from llmstream_nb.checks.verdict import is_whole, require, show


@exercise
def budget(
    _: Case,
    maxlen: int | None,
    ttl: float,
    *,
    answers_an_hour: int,
    entries: int,
    entry_bytes: float,
    record_bytes: float,
    memory: float,
    behind: int,
    back_within: float,
) -> str:
    """Exercise of notebook 07: MAXLEN, and a time to live in seconds, for which the memory suffices.

    `entries` is the length of an answer, `behind` how many of them a viewer may be late, `back_within` after how
    many seconds somebody may still ask for it, `memory` what there is, in bytes.
    """
    whole = maxlen is None or (is_whole(maxlen) and maxlen > 0)
    require(whole, f"`maxlen` is a whole number of entries, 1 or more; this is {show(maxlen)}.")
    seconds = isinstance(ttl, (int, float)) and not isinstance(ttl, bool) and ttl > 0
    require(seconds, f"`ttl` is a number of seconds, more than 0; this is {show(ttl)}.")
    kept = min(maxlen or entries, entries)
    alive, each = answers_an_hour * ttl / 3600, kept * entry_bytes + record_bytes
    late = f"a viewer {behind} entries behind finds {behind - kept} of them trimmed: `maxlen` is too small."
    require(kept >= min(behind, entries), late)
    gone = f"who comes back after {back_within:g} s finds nothing: after {ttl:g} s the answer has expired."
    require(ttl >= back_within, gone)
    need = f"{alive:,.0f} answers alive, each with {kept} entries: {alive * each / 1e6:,.1f} MB"
    require(alive * each <= memory, f"{need}, and there are {memory / 1e6:,.1f} MB.")
    return f"{need} of {memory / 1e6:,.1f} MB."


@exercise
def lag(case: Case, function: Callable[..., int]) -> str:
    """Optional exercise of notebook 07: `lag(client, stream, group)`, how many entries the group was not given yet."""
    for length, given, deleted, about in case.each(
        (5, 0, [], "when the group was given nothing of 5 entries"),
        (12, 9, [], "when the group was given 9 of 12 entries"),
        (5, 5, [], "when the group was given all 5 entries"),
        (9, 3, [2, 6], "when entries were deleted, one before the group's place and one after it"),
        (10, 2, [1, 2, 3, 4, 5], "when the stream was trimmed beyond the group's place"),
    ):
        case.put((f"1-{number}", {"text": f"text {number}"}) for number in range(1, length + 1))
        for group, count in (("others", 4), ("workers", given)):
            case.client.xgroup_create(case.stream, group, "0")
            if count:
                case.client.xreadgroup(group, "worker-1", {case.stream: ">"}, count=count)
        case.client.xack(case.stream, "workers", "1-1")
        if deleted:
            case.client.xdel(case.stream, *(f"1-{number}" for number in deleted))
        before = case.groups()
        result = case.call(function, about, case.client, case.stream, "workers")
        same = case.groups()["workers"]["last-delivered-id"] == before["workers"]["last-delivered-id"]
        case.require(same, "reads in the group's name: that moves its place. Only look.")
        require(is_whole(result), f"{case.got}: return a whole number.")
        case.require_result(len({*range(given + 1, length + 1)} - {*deleted}))
    return "as many as come after the group's place."
