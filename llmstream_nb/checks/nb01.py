"""What the exercises of notebooks 00 and 01 check: where an answer lies, and the commands that read a stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from llmstream_nb import tables
from llmstream_nb.answers.ask import Answer
from llmstream_nb.answers.connection import names_of
from llmstream_nb.answers.read import look
from llmstream_nb.checks.case import Case, Noting
from llmstream_nb.checks.judging import is_whole, require, show
from llmstream_nb.checks.running import check

if TYPE_CHECKING:
    import redis

    from llmstream_nb.checks.verdict import Verdict


def count_entries(answer: Answer, key: str, count: int, *, client: redis.Redis | None = None) -> Verdict:
    """Exercise of notebook 00: the key of the answer's stream, and how many entries lie there."""

    def examine(_: Case) -> str:
        given = isinstance(answer, Answer)
        require(given, f"the first argument is what `ask` gave you; this is {show(answer)}.")
        right = names_of(answer.client).answer(answer.id).chunks
        filled = isinstance(key, str) and repr(answer) in key
        require(not filled, f"the braces belong to the key: write the text without `f`; this is {show(key)}.")
        found = isinstance(key, str) and key == right
        require(found, f"this answer's stream does not lie under {show(key)}.")
        ended = look(answer.id, answer.client).status in ("ended", "failed")
        require(ended, "the answer still grows: wait for its end with `answer.wait()`, then count again.")
        require(is_whole(count), f"the count is a whole number; this is {show(count)}.")
        kinds = tables.entries(answer)["kind"]
        require(count != sum(kinds == "text"), f"{count} is only the text: the start and the end count too.")
        require(count == len(kinds), f"there are not {count} entries under that key.")
        return f"{count} entries under that key."

    return check("count_entries", (key, count), examine, client)


def stopped(answer: Answer, *, client: redis.Redis | None = None) -> Verdict:
    """Optional exercise of notebook 00: an answer that was stopped when part of it was there."""

    def examine(_: Case) -> str:
        given = isinstance(answer, Answer)
        require(given, f"the argument is what `ask` gave you; this is {show(answer)}.")
        now, named = look(answer.id, answer.client), show(answer.id)
        require(now.status not in ("queued", "streaming"), f"{named} is still being written: stop it.")
        require(now.status == "ended", f"{named} is {now.status}, not ended.")
        reason = now.record.get("reason")
        cut = reason == "cancelled"
        require(cut, f"{named} ended with the reason {show(reason)}, not 'cancelled': stop it earlier.")
        require(bool(now.text), "it was stopped before the first piece: wait until there is some text.")
        return f"stopped after {len(now.text)} characters, and they are kept."

    return check("stopped", answer, examine, client)


def get_last_id(function: Callable[[redis.Redis, str], str], *, client: redis.Redis | None = None) -> Verdict:
    """Exercise of notebook 01: `get_last_id(client, stream)`, the newest entry's ID, or "0-0" without one."""

    def examine(case: Case) -> str:
        for ids, right, about in (
            (["5-0"], "5-0", "of a stream with one entry"),
            (["9-0", "10-0", "10-1"], "10-1", "of a stream with the entries 9-0, 10-0 and 10-1"),
            ([], "0-0", "of a stream that does not exist"),
        ):
            case.clear()
            case.put((entry_id, {"questionId": "a", "chunkOutput": "Hi"}) for entry_id in ids)
            result = case.call(function, f"asked for the last ID {about}", case.client, case.stream)
            require(not isinstance(result, bytes), f"{case.got}: these are bytes, so decode them.")
            more = isinstance(result, (list, tuple, dict)) and bool(result)
            require(not more, f"{case.got}: that is more than an ID.")
            case.require_result(right)
        return "the newest ID, and 0-0 where there is none."

    return check("get_last_id", function, examine, client)


def pages(function: Callable[..., Any], *, client: redis.Redis | None = None) -> Verdict:
    """Optional exercise of notebook 01: `pages(client, stream, size)`, all entries, in lists of at most `size`."""

    def examine(case: Case) -> str:
        for count, size, about in (
            (7, 3, "of 7 entries, 3 a page"),
            (6, 3, "of 6 entries, 3 a page"),
            (3, 1, "of 3 entries, 1 a page"),
            (0, 3, "of a stream that does not exist"),
        ):
            ids = [f"{9 + number // 3}-{number % 3}" for number in range(count)]
            lay, noting = [(entry_id, {"word": entry_id}) for entry_id in ids], Noting(case.client)
            case.clear()
            case.put(lay)
            result = case.call(lambda *args: list(function(*args)), about, noting, case.stream, size)
            most = max((len(reply) for name, _, reply in noting.calls if name != "xread"), default=0)
            require(most <= size, f"{about}, your function fetches {most} entries at once: ask for {size}.")
            right = [lay[at : at + size] for at in range(0, count, size)]
            got = [[entry[0] for entry in page] for page in result]
            wanted = [[entry_id for entry_id, _ in page] for page in right]
            require(got == wanted, f"{about}, the pages hold {show(got)}, not {show(wanted)}.")
            pairs = result == right
            require(pairs, f"{about}, the pages hold no entries: pairs of an ID and fields, as XRANGE gives.")
        return "every entry once, a page at a time."

    return check("pages", function, examine, client)


def collect(function: Callable[..., list[str]], *, client: redis.Redis | None = None) -> Verdict:
    """Optional exercise of notebook 01: `collect(client, stream, last_id, wanted, seconds)`, a reader that gives up.

    It returns the field `word` of the next `wanted` entries after `last_id`, as soon as they are there; and after
    `seconds` those that have come.
    """

    def examine(case: Case) -> str:
        alphabet = "abcdefghijklmnopqrstuvwxyz"

        def write(words: Iterable[str]) -> None:
            case.put((f"1-{alphabet.index(word) + 1}", {"word": word}) for word in words)

        for there, later, last_id, wanted, seconds, least, about in (
            ("abcde", "", "1-1", 3, 2.0, "bcd", "when more lies there than is wanted"),
            ("a", "bc", "0-0", 3, 5.0, "abc", "when words come while it reads"),
            ("a", "", "0-0", 2, 0.3, "a", "when too few words come"),
            ("", "", "0-0", 2, 0.0, "", "when nothing is there and `seconds` is 0"),
            ("ab", alphabet[2:], "0-0", 99, 0.3, "ab", "when words keep coming, but too few in time"),
        ):
            case.clear()
            write(there)
            case.trickle(*later, add=write)
            began = time.monotonic()
            result = case.call(function, about, case.client, case.stream, last_id, wanted, seconds)
            took = time.monotonic() - began
            whole = [*there, *later][int(last_id[2:]) :][:wanted]
            right = isinstance(result, list) and result[: len(least)] == [*least] and result == whole[: len(result)]
            require(right, f"{case.got}, not {[*least]}.")
            late = f"your function takes {took:.0f} s; `seconds` is {seconds:g}, for all of its reads together."
            require(took < min(3, seconds + 1.5), f"{about}, {late}")
        return "what was wanted, or what came in time."

    return check("collect", function, examine, client)
