"""What the exercises of notebook 01 check: the commands that read a stream."""

import time
from collections.abc import Callable, Iterable
from typing import Any

from llmstream_nb.checks.case import Case, Noting
from llmstream_nb.checks.running import exercise
from llmstream_nb.checks.verdict import require, show


@exercise
def get_last_id(case: Case, function: Callable[..., str]) -> str:
    """Exercise of notebook 01: `get_last_id(client, stream)`, the newest entry's ID, or "0-0" without one."""
    for ids, right, about in case.each(
        (["5-0"], "5-0", "of a stream with one entry"),
        (["9-0", "10-0", "10-1"], "10-1", "of a stream with the entries 9-0, 10-0 and 10-1"),
        ([], "0-0", "of a stream that does not exist"),
    ):
        case.put((entry_id, {"questionId": "a", "chunkOutput": "Hi"}) for entry_id in ids)
        result = case.call(function, f"asked for the last ID {about}", case.client, case.stream)
        require(not isinstance(result, bytes), f"{case.got}: these are bytes, so decode them.")
        require(not (isinstance(result, (list, tuple, dict)) and bool(result)), f"{case.got}: that is more than an ID.")
        case.require_result(right)
    return "the newest ID, and 0-0 where there is none."


@exercise
def pages(case: Case, function: Callable[..., Any]) -> str:
    """Optional exercise of notebook 01: `pages(client, stream, size)`, all entries, in lists of at most `size`."""
    for count, size, about in case.each(
        (7, 3, "of 7 entries, 3 a page"),
        (6, 3, "of 6 entries, 3 a page"),
        (3, 1, "of 3 entries, 1 a page"),
        (0, 3, "of a stream that does not exist"),
    ):
        ids = [f"{9 + number // 3}-{number % 3}" for number in range(count)]
        lay, noting = [(entry_id, {"word": entry_id}) for entry_id in ids], Noting(case.client)
        case.put(lay)
        result = case.call(lambda *args: list(function(*args)), about, noting, case.stream, size)
        most = max((len(entries) for _, entries in noting.calls), default=0)
        case.require(most <= size, f"fetches {most} entries at once: ask for {size}.")
        right = [lay[at : at + size] for at in range(0, count, size)]
        pairs = all(isinstance(entry, tuple) and len(entry) == 2 for page in result for entry in page)
        form = f"{about}, your pages are {show(result)}: each is a list of pairs of an ID and fields, as XRANGE gives."
        require(pairs, form)
        got = [[entry_id for entry_id, _ in page] for page in result]
        wanted = [[entry_id for entry_id, _ in page] for page in right]
        require(got == wanted, f"{about}, the pages hold {show(got)}, not {show(wanted)}.")
        require(result == right, form)
    return "every entry once, a page at a time."


@exercise
def collect(case: Case, function: Callable[..., list[str]]) -> str:
    """Optional exercise of notebook 01: `collect(client, stream, last_id, wanted, seconds)`, a reader that gives up.

    It returns the field `word` of the next `wanted` entries after `last_id`, as soon as they are there; and after
    `seconds` those that have come.
    """
    alphabet = "abcdefghijklmnopqrstuvwxyz"

    def write(words: Iterable[str]) -> None:
        case.put((f"1-{alphabet.index(word) + 1}", {"word": word}) for word in words)

    for there, later, last_id, wanted, seconds, least, about in case.each(
        ("abcde", "", "1-1", 3, 2.0, "bcd", "when more lies there than is wanted"),
        ("a", "bc", "0-0", 3, 5.0, "abc", "when words come while it reads"),
        ("a", "", "0-0", 2, 0.3, "a", "when too few words come"),
        ("", "", "0-0", 2, 0.0, "", "when nothing is there and `seconds` is 0"),
        ("ab", alphabet[2:], "0-0", 99, 1.0, "ab", "when words keep coming, but too few in time"),
    ):
        write(there)
        case.trickle(*later, add=write)
        began = time.monotonic()
        result = case.call(function, about, case.client, case.stream, last_id, wanted, seconds)
        took = time.monotonic() - began
        whole = [*there, *later][int(last_id[2:]) :][:wanted]
        right = isinstance(result, list) and result[: len(least)] == [*least] and result == whole[: len(result)]
        require(right, f"{case.got}, not {[*least]}.")
        late = f"takes {took:.0f} s; `seconds` is {seconds:g}, for all of its reads together."
        if len(result) == wanted:
            late = f"takes {took:.0f} s, and all that was wanted was there sooner: return then."
        case.require(took < min(3, seconds + 1.5), late)
    return "what was wanted, or what came in time."
