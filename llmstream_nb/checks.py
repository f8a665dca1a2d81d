"""What the exercises check, with hints that grow more concrete from try to try."""

from __future__ import annotations

import ast
import ctypes
import html
import inspect
import json
import reprlib
import secrets
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from llmstream_nb import tables
from llmstream_nb.answer import Answer, ask, clear
from llmstream_nb.connection import current, names_of
from llmstream_nb.protocol import LLMStreamError
from llmstream_nb.read import look

if TYPE_CHECKING:
    import redis

TIMEOUT = 6.0  # seconds that a check waits for the learner's code

HINTS = {
    "count_entries": (
        "The key holds the prefix, the answer's id in braces, and `chunks`; `tables.keys(answer)` lists it.",
        "XLEN counts entries: not only those with text, but also the start and the end.",
        "`count = client.xlen(key)`",
    ),
    "stopped": (
        "`ask` returns at once, while the answer is still written: `half.text` grows, and `half.stop()` ends it.",
        "Give the model time to begin: look at `half.text` again and again, with pauses, until there is something.",
        "`while len(half.text) < 100: time.sleep(0.05)`, and then `half.stop()`",
    ),
    "get_last_id": (
        "XREVRANGE reads a stream backwards, from `+` to `-`; with COUNT 1 it gives only the newest entry.",
        "`client.xrevrange(stream, count=1)` is a list: empty, or with one pair of an ID and a dictionary.",
        '`return entries[0][0] if entries else "0-0"`',
    ),
    "pages": (
        "XRANGE with `count=size` gives one page. The next one begins after the last ID of this one, not with it.",
        "A `(` before an ID leaves that entry out: `(1-3` is everything after 1-3. An empty page is the end.",
        "`while page := redis.xrange(key, after, '+', count=size):` append it, then `after = '(' + page[-1][0]`",
    ),
    "collect": (
        "Note when it has to be over before the first read: `time.monotonic() + seconds`. Each read has only the rest.",
        "`block=0` waits for ever: at least 1. And `count` is what is still wanted, so that you never get too many.",
        "`left = deadline - time.monotonic()`, `block=max(1, int(left * 1000))`; the end is when `left` is 0 or less.",
    ),
    "produce": (
        "One XADD for each chunk, inside the loop; and one more after the loop, for the end.",
        "Each entry has the fields `questionId` and `chunkOutput`; at the end that is `;END:` plus the id.",
        "`try:` the loop, `finally:` the end. What stands under `finally` also runs when the loop raises.",
    ),
    "rebuild": (
        "GET gives the record as JSON text; `json.loads` makes a dictionary of it, which says where the answer lies.",
        "XRANGE from the record's start to its end. Others have written in between: look at each `questionId`.",
        "`redis.xrange(record['streamName'], record['streamStartMessageId'], record['streamEndMessageId'])[1:-1]`",
    ),
    "read": (
        "Look at every entry once: go on from the ID of the last one you saw, whoever it belongs to.",
        "Skip what has another `questionId`; stop at yours whose `chunkOutput` is the end, and nothing else.",
        "`while True:` XREAD `{stream: last_id}`, `block=1000`; at each entry `last_id = entry_id` first.",
    ),
    "read_many": (
        "XREAD takes a dictionary: for each stream the last ID that you saw there. All of them go into one call.",
        "Begin with `0-0` for each. The reply names the stream of each list of entries: note the ID under that name.",
        "`while last_ids: for key, entries in redis.xread(last_ids, block=1000):` and at an end `del last_ids[key]`",
    ),
    "claim": (
        "XAUTOCLAIM gives `consumer` what is pending in its group; XACK takes an entry off the pending list.",
        "XAUTOCLAIM claims 100 entries a call: go on from the cursor that it returns, until that is `0-0`.",
        "Loop: `cursor, entries, *_ = client.xautoclaim(stream, group, consumer, 0, cursor)`, XACK, keep the texts.",
    ),
    "source": (
        "`question.upper().split()` gives the words; `yield` each of them, one after another.",
        "A function with `yield` in its body is a generator: it returns at once, and is run piece by piece.",
        "`for n, word in enumerate(question.upper().split()):` and in it `yield f' {word}' if n else word`.",
    ),
    "poll": (
        "XRANGE with `(` before the first ID begins after it: `redis.xrange(key, f'({last}')`.",
        "Only text is added; any other `kind` ends the answer. Where nothing is new, `last` stays as it was.",
        "`for last, entry in client.xrange(key, f'({last}'):` add the text or set `over`; return all three.",
    ),
    "work": (
        "Two reads by XREADGROUP: `0` gives what is pending with `consumer`, `>` what nobody was given yet.",
        "For each entry first `do(fields['text'])`, then XACK: if `do` raises, the XACK is never reached.",
        "`for begin in ('0', '>'):` and in it `client.xreadgroup(group, consumer, {stream: begin})`.",
    ),
    "resume": (
        "XREAD gives what comes after an ID: begin with `after`, then go on from the ID of each entry you saw.",
        "Look at the field `kind`: `text` is added, `start` empties the text, `end` and `error` return it.",
        "`while True:` XREAD `{stream: after}`, `block=1000`; `for after, entry in entries:` and then by `kind`.",
    ),
    "state": (
        "Two questions: what kind is the newest entry, and if that is no end, does its attempt still have a lease?",
        "XREVRANGE with `count=1` gives the newest entry; the attempt is its ID's part before the hyphen.",
        "`redis.exists(f'{answer}:lease:{attempt}')` is 1 while that attempt's producer lives.",
    ),
    "missing": (
        "Go through the IDs, and remember at each which number is due next.",
        "The two parts are numbers: `attempt, seq = map(int, entry_id.split('-'))`. A new attempt is due at 0.",
        "Between what is due and `seq`: `gaps += [f'{attempt}-{n}' for n in range(due, seq)]`, then `due = seq + 1`.",
    ),
    "budget": (
        "Alive at a time are the answers of one `ttl`; each takes `maxlen` entries and a record.",
        "Begin with the least that both promises need: what can be kept beyond that depends on the memory.",
        "`maxlen = behind`, `ttl = back_within`: the least of both. Is there room for more?",
    ),
    "lag": (
        "XINFO GROUPS tells each group's place, its `last-delivered-id`. What comes after it was not given yet.",
        "A round bracket before an ID leaves that entry out: `(1-3` is everything after 1-3.",
        "`len(redis.xrange(stream, min=f'({place}'))`, where `place` is the `last-delivered-id` of this group.",
    ),
    "last_event_id": (
        "Only `end` and `failed` are the end. When the events stop without one, come back with the last `id` you saw.",
        "Keep `headers` outside of your loop, and set them anew at each event that has an `id`; some have none.",
        "`while True:` and in it `for event in get(headers):`, with `headers = {'Last-Event-ID': event['id']}`.",
    ),
    "parse": (
        "Keep what the event so far has: its `event`, its list of `data`. An empty line ends it and begins the next.",
        "`line.partition(':')` gives name and value; one space before the value is not part of it.",
        "At an empty line: `if data: events.append({'id': last_id, 'event': event, 'data': '\\n'.join(data)})`.",
    ),
}  # by the check's name: three each, from a pointer to the essential line

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_tries: Counter[str] = Counter()  # failed tries of each exercise, since it was last solved


@dataclass(frozen=True, repr=False)
class Verdict:
    """What a check found; Jupyter shows it."""

    passed: bool | None  # None: not started
    text: str
    hint: str = ""

    def __bool__(self) -> bool:
        return bool(self.passed)

    def __repr__(self) -> str:
        head = {True: "✓ Right:", False: "✗ Not yet:", None: "○"}[self.passed]
        return "\n  ".join([f"{head} {self.text}", *self.hint.splitlines()])

    def _repr_html_(self) -> str:
        lines = "<br>".join(html.escape(line) for line in repr(self).splitlines())
        return f'<p class="tex2jax_ignore mathjax_ignore">{lines}</p>'  # $…$ is not to be typeset


class _BrokenModelError(Exception):
    """What a check's model raises when it breaks off."""


class _WrongError(Exception):
    """What is wrong, in a sentence for the learner."""


class _Interrupted(SystemExit):
    """Raised inside the learner's function when its time is up; a thread may end with it silently."""


# ----------------------------------------------------------------------------------------------- exercises


def count_entries(answer: Answer, key: str, count: int, *, client: redis.Redis | None = None) -> Verdict:
    """Exercise of notebook 00: the key of the answer's stream, and how many entries lie there."""

    def examine(_: _Case) -> str:
        given = isinstance(answer, Answer)
        _require(given, f"the first argument is what `ask` gave you; this is {_show(answer)}.")
        right = names_of(answer.client).answer(answer.id).chunks
        found = isinstance(key, str) and key == right
        _require(found, f"this answer's stream does not lie under {_show(key)}.")
        ended = look(answer.id, answer.client).status in ("ended", "failed")
        _require(ended, "the answer still grows: wait for its end with `answer.wait()`, then count again.")
        whole = isinstance(count, int) and not isinstance(count, bool)
        _require(whole, f"the count is a whole number; this is {_show(count)}.")
        kinds = tables.entries(answer)["kind"]
        _require(count != sum(kinds == "text"), f"{count} is only the text: the start and the end count too.")
        _require(count == len(kinds), f"there are not {count} entries under that key.")
        return f"{count} entries under that key."

    return _check("count_entries", (key, count), examine, client)


def stopped(answer: Answer, *, client: redis.Redis | None = None) -> Verdict:
    """Optional exercise of notebook 00: an answer that was stopped when part of it was there."""

    def examine(_: _Case) -> str:
        given = isinstance(answer, Answer)
        _require(given, f"the argument is what `ask` gave you; this is {_show(answer)}.")
        now = look(answer.id, answer.client)
        _require(now.status not in ("queued", "streaming"), f"{_show(answer.id)} is still being written: stop it.")
        _require(now.status == "ended", f"{_show(answer.id)} is {now.status}, not ended.")
        reason = now.record.get("reason")
        cut = reason == "cancelled"
        _require(cut, f"{_show(answer.id)} ended with the reason {_show(reason)}, not 'cancelled': stop it earlier.")
        _require(bool(now.text), "it was stopped before the first piece: wait until there is some text.")
        return f"stopped after {len(now.text)} characters, and they are kept."

    return _check("stopped", answer, examine, client)


def get_last_id(function: Callable[[redis.Redis, str], str], *, client: redis.Redis | None = None) -> Verdict:
    """Exercise of notebook 01: `get_last_id(client, stream)`, the newest entry's ID, or "0-0" without one."""

    def examine(case: _Case) -> str:
        for ids, right, about in (
            (["5-0"], "5-0", "of a stream with one entry"),
            (["9-0", "10-0", "10-1"], "10-1", "of a stream with the entries 9-0, 10-0 and 10-1"),
            ([], "0-0", "of a stream that does not exist"),
        ):
            case.client.delete(case.stream)
            for entry_id in ids:
                case.client.xadd(case.stream, {"questionId": "a", "chunkOutput": "Hi"}, id=entry_id)
            asked = f"asked for the last ID {about}"
            result = case.call(function, asked, case.client, case.stream)
            got = f"{asked}, your function returns {_show(result)}"
            _require(not isinstance(result, bytes), f"{got}: these are bytes, so decode them.")
            _require(not (isinstance(result, (list, tuple, dict)) and result), f"{got}: that is more than an ID.")
            _require(isinstance(result, str) and result == right, f"{got}, not '{right}'.")
        return "the newest ID, and 0-0 where there is none."

    return _check("get_last_id", function, examine, client)


def pages(function: Callable[..., Any], *, client: redis.Redis | None = None) -> Verdict:
    """Optional exercise of notebook 01: `pages(client, stream, size)`, all entries, in lists of at most `size`."""

    def examine(case: _Case) -> str:
        for count, size, about in (
            (7, 3, "of 7 entries, 3 a page"),
            (6, 3, "of 6 entries, 3 a page"),
            (3, 1, "of 3 entries, 1 a page"),
            (0, 3, "of a stream that does not exist"),
        ):
            case.client.delete(case.stream)
            ids = [f"{9 + number // 3}-{number % 3}" for number in range(count)]
            for entry_id in ids:
                case.client.xadd(case.stream, {"word": entry_id}, id=entry_id)
            lay, noting = case.entries(), _Noting(case.client)
            result = case.call(lambda *args: list(function(*args)), about, noting, case.stream, size)
            most = max((len(reply) for name, _, reply in noting.calls if name != "xread"), default=0)
            _require(most <= size, f"{about}, your function fetches {most} entries at once: ask for {size}.")
            right = [lay[at : at + size] for at in range(0, count, size)]
            got = [[entry[0] for entry in page] for page in result]
            wanted = [[entry_id for entry_id, _ in page] for page in right]
            _require(got == wanted, f"{about}, the pages hold {_show(got)}, not {_show(wanted)}.")
            _require(
                result == right, f"{about}, the pages hold no entries: pairs of an ID and fields, as XRANGE gives."
            )
        return "every entry once, a page at a time."

    return _check("pages", function, examine, client)


def collect(function: Callable[..., list[str]], *, client: redis.Redis | None = None) -> Verdict:
    """Optional exercise of notebook 01: `collect(client, stream, last_id, wanted, seconds)`, a reader that gives up.

    It returns the field `word` of the next `wanted` entries after `last_id`, as soon as they are there; and after
    `seconds` those that have come.
    """

    def examine(case: _Case) -> str:
        alphabet = "abcdefghijklmnopqrstuvwxyz"
        for there, later, last_id, wanted, seconds, least, about in (
            ("abcde", "", "1-1", 3, 2.0, "bcd", "when more lies there than is wanted"),
            ("a", "bc", "0-0", 3, 5.0, "abc", "when words come while it reads"),
            ("a", "", "0-0", 2, 0.3, "a", "when too few words come"),
            ("", "", "0-0", 2, 0.0, "", "when nothing is there and `seconds` is 0"),
            ("ab", alphabet[2:], "0-0", 99, 0.3, "ab", "when words keep coming, but too few in time"),
        ):
            case.client.delete(case.stream)
            case.words(there)
            case.trickle(*later, add=lambda word: case.words(word, alphabet.index(word)))
            began = time.monotonic()
            result = case.call(function, about, case.client, case.stream, last_id, wanted, seconds)
            took = time.monotonic() - began
            whole = [*there, *later][int(last_id[2:]) :][:wanted]
            right = isinstance(result, list) and result[: len(least)] == [*least] and result == whole[: len(result)]
            _require(right, f"{about}, your function returns {_show(result)}, not {[*least]}.")
            late = (
                f"{about}, your function takes {took:.0f} s; `seconds` is {seconds:g}, for all of its reads together."
            )
            _require(took < min(3, seconds + 1.5), late)
        return "what was wanted, or what came in time."

    return _check("collect", function, examine, client)


def produce(function: Callable[..., object], *, client: redis.Redis | None = None) -> Verdict:
    """Exercise of notebook 02: `produce(client, stream, question_id, chunks)`, a loop from chunks to entries.

    It adds an entry with the fields `questionId` and `chunkOutput` for each chunk, then one for the end,
    `;END:<question_id>`, also when the chunks break off with an error, which it lets pass. An entry
    `START:<question_id>;` before the first chunk is welcome.
    """

    def examine(case: _Case) -> str:
        for chunks in (["Redis ", "streams ", "keep ", "keep ", "order."], []):
            case.client.delete(case.stream)
            case.client.xadd(case.stream, {"questionId": "b", "chunkOutput": "another's"}, id="1-0")
            late: list[str] = []

            def model(chunks: list[str] = chunks, late: list[str] = late) -> Iterator[str]:
                for number, chunk in enumerate(chunks, 2):
                    yield chunk
                    # The next chunk is wanted: by now this one should be there.
                    if len(case.entries()) < number:
                        late.append(chunk)

            case.call(function, f"given {len(chunks) or 'no'} chunks", case.client, case.stream, "a", model())
            _judge_produced(case.entries(), chunks)
            _require(not late, "your function collects before it writes: add each chunk as soon as it comes.")
        _judge_break(case, function)
        return "an entry for each chunk, as soon as it comes, and the end after the last."

    return _check("produce", function, examine, client)


def _judge_break(case: _Case, function: Callable[..., object]) -> None:
    """What becomes of an answer whose model breaks off."""

    def model() -> Iterator[str]:
        yield "half "
        raise _BrokenModelError

    case.client.delete(case.stream)
    case.about = "when the model breaks off in mid-answer"
    passed_on = False
    try:
        function(case.client, case.stream, "a", model())
    except _BrokenModelError:
        passed_on = True
    texts = [fields.get("chunkOutput") for _, fields in case.entries()]
    ended = texts[-2:] == ["half ", ";END:a"]
    _require(ended, f"{case.about}, the end must be written all the same: else readers wait for ever.")
    _require(passed_on, f"{case.about}, your function hides the error: let it pass on, after the end.")


def _judge_produced(entries: list[tuple[str, dict[str, str]]], chunks: list[str]) -> None:
    kept = bool(entries) and entries.pop(0)[0] == "1-0"
    _require(kept, "what another asker had written into the stream is gone: only add to it.")
    _require(bool(entries), "your function adds nothing to the stream that it is given.")
    for _, fields in entries:
        names = sorted(fields)
        wanted = names == ["chunkOutput", "questionId"]
        _require(wanted, f"an entry has the fields {_show(names)}, not `questionId` and `chunkOutput`.")
        mine = fields["questionId"]
        _require(mine == "a", f"given the question id 'a', an entry has the `questionId` {_show(mine)}.")
    texts = [fields["chunkOutput"] for _, fields in entries]
    last = texts[-1]
    if texts[0] == "START:a;":
        texts.pop(0)
    _require(";END:a" in texts, f"no entry holds the end, ';END:a' for the id 'a'; the last: {_show(last)}.")
    once = texts.index(";END:a") == len(texts) - 1
    _require(once, "the end stands before the last chunk: it comes once, after the loop.")
    _require(texts[:-1] == chunks, f"given the chunks {_show(chunks)}, the entries hold {_show(texts[:-1])}.")


def rebuild(function: Callable[[redis.Redis, str], str], *, client: redis.Redis | None = None) -> Verdict:
    """Optional exercise of notebook 02: `rebuild(client, key)`, an answer's text by the question record under `key`."""

    def examine(case: _Case) -> str:
        before, between = [("a", "START:a;"), ("a", "an older try"), ("b", "START:b;")], [("b", "another's")]
        for pieces, about in (
            (["Redis ", "keeps ", "order."], "of an answer of three chunks, with another's between them"),
            (["START:", "b; and ", ";END:b"], "of an answer that speaks of START and END"),
            ([], "of an answer without a chunk"),
        ):
            case.client.delete(case.stream)
            case.add(before)
            start = case.add([("a", "START:a;")])
            for piece in pieces:
                case.add([*between, ("a", piece)])
            end = case.add([*between, ("a", ";END:a")])
            case.add([*between, ("a", "a later one")])
            record = {"topic": "Redis", "topicQuestion": "What is Redis?", "questionId": "a", "streamName": case.stream}
            record |= {"streamStartMessageId": start, "streamEndMessageId": end}
            case.client.set(case.other("record"), json.dumps(record))
            result = case.call(function, about, case.client, case.other("record"))
            _require(result is not None, "your function returns None: return the text.")
            right = "".join(pieces)
            _require(result == right, f"{about}, your function returns {_show(result)}, not {_show(right)}.")
        return "the text, by nothing but its record."

    return _check("rebuild", function, examine, client)


def read(function: Callable[..., str], *, client: redis.Redis | None = None) -> Verdict:
    """Exercise of notebook 03: `read(client, stream, last_id, question_id)`, one answer's text among others.

    It reads on from `last_id`, takes only entries with its own `questionId`, waits for those to come, stops
    at `;END:<question_id>`, and returns the text without START and END.
    """

    def examine(case: _Case) -> str:
        a, b = "a", "b"
        opening, end = [(a, "START:a;"), (a, "Hi "), (a, "there")], (a, ";END:a")
        mixed = [(b, "START:b;"), *opening, (b, "blue"), (a, " you"), (b, ";END:b"), (a, " all"), end]
        words = [*opening, (a, " at END:"), (a, ";END:b"), (a, ";END:a is"), (a, " the end"), end]
        for before, entries, right, about in (
            ([], [*opening, end], "Hi there", "when the answer lies there complete"),
            ([(a, "old"), (b, "old")], [*opening, end], "Hi there", "when there are entries up to `last_id`"),
            ([], mixed, "Hi there you all", "when another asker's entries lie between yours"),
            (
                [],
                words,
                "Hi there at END:;END:b;END:a is the end",
                "when the answer itself speaks of the end",
            ),
            ([], [*opening, end, (a, "after"), (b, "after")], "Hi there", "when more entries follow the end"),
        ):
            case.client.delete(case.stream)
            last_id = case.add(before)
            case.add(entries)
            _judge_read(case, function, last_id, right, about)
        case.client.delete(case.stream)
        case.add(opening)
        case.trickle([(b, "blue"), (a, " you"), (a, " all")], [(b, "seas"), (a, " and")], [(a, " me"), end])
        _judge_read(case, function, "0-0", "Hi there you all and me", "when the entries come while it reads")
        return "your words, all of them, and nobody else's."

    return _check("read", function, examine, client)


def _judge_read(case: _Case, function: Any, last_id: str, right: str, about: str) -> None:
    result = case.call(function, about, case.client, case.stream, last_id, "a")
    _require(result is not None, "your function returns None: return the text that it has read.")
    text = isinstance(result, str)
    _require(text, f"{about}, your function returns {_show(result)}: return the text as one string.")
    marked = "START:a;" in result or result.endswith(";END:a")
    _require(not marked, "your text holds START or END: they only mark where an answer lies; leave them out.")
    _require(result == right, f"{about}, your function returns {_show(result)}, not {_show(right)}.")


def read_many(function: Callable[..., dict[str, str]], *, client: redis.Redis | None = None) -> Verdict:
    """Optional exercise of notebook 03: `read_many(client, keys)`, several answers of the kit by one XREAD at a time.

    It reads the streams under `keys` from their beginnings until each has its entry of the kind `end`, and returns
    a dictionary: for each key the text.
    """

    def examine(case: _Case) -> str:
        names = ["one", "two", "three"]
        texts = {"one": ["red ", "green "], "two": ["end", " it"], "three": [" "]}
        keys = {name: case.other(name) for name in names}

        def write(entries: list[tuple[str, int, str, str]]) -> None:
            for name, number, kind, text in entries:
                case.client.xadd(keys[name], {"kind": kind, "text": text, "ms": 0}, id=f"1-{number}")

        begin, rest = [(name, 0, "start", '{"model": "m"}') for name in names], []
        for name in ["two", "three", "one"]:
            rest.append([(name, number, "text", text) for number, text in enumerate(texts[name], 1)])
            rest.append([(name, len(texts[name]) + 1, "end", '{"reason": "stop"}')])
        for later, about in ((False, "when three answers lie there"), (True, "when three answers are being written")):
            case.client.delete(*keys.values())
            write(begin)
            if later:
                case.trickle(*rest, add=write)
            else:
                write([entry for burst in rest for entry in burst])
            noting = _Noting(case.client)
            result = case.call(function, about, noting, list(keys.values()))
            together = any(name == "xread" and len(streams) == 3 for name, streams, _ in noting.calls)
            _require(isinstance(result, dict), f"{about}, your function returns {_show(result)}: return a dictionary.")
            named = {name: result.get(key) for name, key in keys.items()}
            right = {name: "".join(texts[name]) for name in names}
            _require(named == right, f"{about}, the texts of your function are {_show(named)}, not {_show(right)}.")
            _require(together, f"{about}, your function reads one stream at a time: give all of them to one XREAD.")
        return "all of them, with one read at a time."

    return _check("read_many", function, examine, client)


def claim(function: Callable[..., list[str]], *, client: redis.Redis | None = None) -> Verdict:
    """Exercise of notebook 04: `take_over(client, stream, group, consumer)`, the work that a dead consumer left.

    It claims for `consumer` whatever is pending in the group, however short its idle time, acknowledges it, and
    returns the texts (field `text`) in the order of their IDs. It touches nothing else.
    """

    def examine(case: _Case) -> str:
        for pending, about in (
            ([2, 3, 5, 9, 10], "when five entries are pending"),
            ([], "when nothing is pending"),
            ([*range(2, 152)], "when 150 entries are pending"),
        ):
            case.leave_pending(pending)
            lay, before = case.entries(), case.groups()
            result = case.call(function, about, case.client, case.stream, "workers", "worker-2")
            kept = case.entries() == lay
            _require(kept, f"{about}, your function changes the stream: XACK, and leave the entries where they are.")
            _judge_groups(case, before)
            _judge_claimed(result, [f"text {number}" for number in pending], about)
            left = case.groups()["workers"]["pending"]
            _require(not left, f"{about}, {left} of them still are after your function: acknowledge each with XACK.")
            owners: Any = case.client.xinfo_consumers(case.stream, "workers")
            mine = not pending or "worker-2" in [owner["name"] for owner in owners]
            _require(mine, f"{about}, your function claims nothing for the consumer that it is given.")
        return "what the dead consumer left, in order, and acknowledged; the rest as it was."

    return _check("claim", function, examine, client)


def _judge_groups(case: _Case, before: dict[str, Any]) -> None:
    """What the learner's function may not touch: the group's place in the stream, and the other group."""
    after = case.groups()
    _require(set(after) == set(before), f"{case.about}, your function makes or destroys a group: only claim.")
    same = after["readers"] == before["readers"]
    _require(same, f"{case.about}, your function changes another group: claim only in `group`.")
    same = after["workers"]["last-delivered-id"] == before["workers"]["last-delivered-id"]
    _require(same, f"{case.about}, your function takes new entries too: claim, don't read with `>`.")


def _judge_claimed(result: Any, right: list[str], about: str) -> None:
    _require(result is not None, "your function returns None: return the list of texts.")
    texts = isinstance(result, list) and all(isinstance(text, str) for text in result)
    got = f"{about}, your function returns {_show(result)}"
    _require(texts, f"{got}: return a list of the texts alone, `fields['text']` of each entry.")
    found = bool(result) or not right
    _require(found, f"{got}: is the minimum idle time 0, and does each text go into the list?")
    _require(result == right or sorted(result) != sorted(right), f"{got}: return them in the order of their IDs.")
    some = set(result) < set(right)
    _require(not some, f"{about}, your function returns {len(result)} texts: go on until nothing is left.")
    done = any(text.startswith("done") for text in result)
    _require(not done, f"{got}: some of these had been acknowledged; take only what is pending.")
    _require(result == right, f"{got}, not {_show(right)}.")


def source(function: Callable[..., Iterator[str]], *, client: redis.Redis | None = None) -> Verdict:
    """Exercise of notebook 05: `shout(question, topic)`, a source that yields the question's words in capitals.

    The pieces, joined, are the question in capitals with one space between words; each holds one word.
    """

    def examine(case: _Case) -> str:
        for question in ("Why streams?", "Who is “Ada”, then?", "Go!"):
            about, words = f"asked {_show(question)}", question.upper().split()
            made = case.call(function, about, question, None)
            _require(not isinstance(made, str), "your function returns a whole text: `yield` it word by word.")
            given = isinstance(made, Iterable)
            _require(given, f"your function returns {_show(made)}, and nothing can be taken from that: use `yield`.")
            pieces = case.call(lambda made=made: list(islice(made, 100)), about)
            got = f"{about}, your function yields {_show(pieces)}"
            _require(all(isinstance(piece, str) for piece in pieces), f"{got}: only text can be streamed.")
            _require("".join("".join(pieces).split()) == "".join(words), f"{got}, not the words {_show(words)}.")
            _require("".join(pieces) == " ".join(words), f"{got}: one space between two words, and no other.")
            _require(len(pieces) == len(words), f"{got}: that is not a word at a time.")
        answer = ask("so be it", source=function, client=case.client)
        try:
            _require(answer.wait(TIMEOUT / 2).text == "SO BE IT", f"through `ask`, its text is {_show(answer.text)}.")
            return f"{sum(tables.entries(answer)['kind'] == 'text')} words in the stream, an entry each."
        finally:
            clear(answer.id, client=case.client)

    return _check("source", function, examine, client)


def poll(
    function: Callable[[redis.Redis, str, str], tuple[str, str, bool]], *, client: redis.Redis | None = None
) -> Verdict:
    """Exercise of notebook 05: `poll(client, stream, last)`: new text, last ID and whether it is over, at once."""

    def examine(case: _Case) -> str:
        words = [(f"1-{n}", "text", word) for n, word in enumerate(["One", "two", "end", "error"], 1)]
        for entries, last, right, about in (
            ([], "0-0", ("", "0-0", False), "where the stream does not exist yet"),
            (words[:2], "0-0", ("Onetwo", "1-2", False), "at the first look"),
            (words[:2], "1-2", ("", "1-2", False), "where nothing is new"),
            (words, "1-1", ("twoenderror", "1-4", False), "in the middle, after 1-1"),
            ([*words, ("1-5", "end", "stop")], "1-3", ("error", "1-5", True), "at the end, after 1-3"),
            ([*words[:1], ("1-2", "error", "Stalled")], "0-0", ("One", "1-2", True), "where the model failed"),
            ([*words, ("1-5", "end", "stop")], "1-5", ("", "1-5", False), "after the end, where nothing is new"),
            ([(f"1-{n}", "text", "x") for n in range(1, 1_201)], "0-0", ("x" * 1_200, "1-1200", False), "far behind"),
        ):
            case.client.delete(case.stream)
            case.write(entries)
            result = case.call(function, about, case.client, case.stream, last)
            got = f"{about}, your function returns {_show(result)}"
            _require(isinstance(result, (tuple, list)) and len(result) == 3, f"{got}: return three things.")
            for name, one, wanted in zip(("the text", "the last ID", "whether it is over"), result, right, strict=True):
                _require(one == wanted, f"{got}: {name} is {_show(wanted)}.")
        return "new text, once, and where to go on from."

    return _check("poll", function, examine, client)


def work(function: Callable[..., object], *, client: redis.Redis | None = None) -> Verdict:
    """Exercise of notebook 04: `work(client, stream, group, consumer, do)`, acknowledged after the work.

    It takes what is pending with `consumer`, then what is new, calls `do(text)` for each entry, and acknowledges
    that entry once `do` has returned. What `do` raises passes, and its entry stays pending.
    """

    def examine(case: _Case) -> str:
        for left, new, about in (
            (0, 3, "when three entries are new"),
            (2, 2, "when two entries are left over, and two are new"),
            (2, 0, "when two entries are left over"),
            (0, 0, "when there is nothing to do"),
        ):
            case.hand_out(left, new)
            _judge_work(case, function, [f"left {n}" for n in range(left)] + [f"new {n}" for n in range(new)], about)
        case.hand_out(1, 3)
        first, again = ["left 0", "new 0", "new 1"], ["new 1", "new 2"]
        _judge_work(case, function, first, "when `do` raises at the third of four entries", breaks_at="new 1")
        _judge_work(case, function, again, "when it is called again, after `do` had raised")
        return "each entry is done, and acknowledged after that; what broke off comes again."

    return _check("work", function, examine, client)


def _judge_work(case: _Case, function: Any, right: list[str], about: str, breaks_at: str = "") -> None:
    did: list[str] = []
    early: list[str] = []
    raised = False

    def do(text: str) -> None:
        did.append(text)
        if text not in case.pending("worker-1"):
            early.append(text)
        if text == breaks_at:
            raise _BrokenModelError

    def call(*args: Any) -> Any:
        nonlocal raised
        try:
            return function(*args)
        except _BrokenModelError:
            raised = True

    _require(callable(function), f"give the function itself, without calling it; this is {_show(function)}.")
    case.call(call, about, case.client, case.stream, "workers", "worker-1", do)
    foreign = case.pending("worker-2") == ["theirs"] and "theirs" not in did
    _require(foreign, f"{about}, your function takes what another consumer is busy with: read, don't claim.")
    _require(did == right, f"{about}, your function does {_show(did)}, not {_show(right)}.")
    _require(not early, f"{about}, {_show(early[:1])} is acknowledged before `do` has returned: a crash would lose it.")
    left = case.pending("worker-1")
    if breaks_at:
        kept = breaks_at in left
        _require(kept, f"{about}, that entry is acknowledged all the same: it would never be done.")
        _require(raised, f"{about}, your function hides the error: let it pass.")
    _require(not set(left) & set(did) - {breaks_at}, f"{about}, these are done and still pending: {_show(left)}.")


def resume(function: Callable[..., str], *, client: redis.Redis | None = None) -> Verdict:
    """Exercise of notebook 06: `resume(client, stream, after, text)`, an answer of the kit from a saved ID on.

    The viewer holds `text`, all up to the entry `after`. It reads on from there, waits for what is to come, begins
    anew at a `start`, stops at an `end` or `error`, and returns the whole text.
    """

    def examine(case: _Case) -> str:
        first = [("1-0", "start", "{}"), *((f"1-{n}", "text", f"{n} ") for n in range(1, 12))]
        stop, end = ("1-12", "end", '{"reason": "stop"}'), ("2-4", "end", '{"reason": "stop"}')
        second = [("2-0", "start", "{}"), ("2-1", "text", "anew "), ("2-2", "text", "it "), ("2-3", "text", "goes")]
        words = [("1-0", "start", "{}"), ("1-1", "text", "say "), ("1-2", "text", "end"), ("1-3", "text", "start")]
        words, dead = [*words, ("1-4", "end", "{}")], [*first, ("2-0", "end", '{"closes": "1-11"}')]
        whole, half = "".join(text for _, _, text in first[1:]), "".join(text for _, _, text in first[1:10])
        for entries, after, text, right, about in (
            ([*first, stop], "0-0", "", whole, "when it begins at the beginning"),
            ([*first, stop], "1-9", half, whole, "when it goes on after 1-9"),
            ([*first, stop], "1-11", whole, whole, "when only the end is still to come"),
            ([*first, ("1-12", "error", "{}")], "1-9", half, whole, "when the answer ends in an error"),
            (words, "1-1", "say ", "say endstart", "when the text speaks of the end"),
            ([*first, *second, end], "1-9", half, "anew it goes", "when a second attempt begins"),
            ([*first, *second, end], "2-1", "anew ", "anew it goes", "when it goes on after 2-1"),
            (dead, "1-9", half, whole, "when the producer dies and someone presses Stop"),
        ):
            case.client.delete(case.stream)
            case.write(entries)
            _judge_resumed(case, function, after, text, right, about)
        case.client.delete(case.stream)
        case.write(first[:6])
        case.trickle(first[6:], second[:2], [*second[2:], end], add=case.write)
        _judge_resumed(case, function, "1-3", "1 2 3 ", "anew it goes", "when the entries come while it reads")
        return "the whole text, once, wherever it goes on."

    return _check("resume", function, examine, client)


def _judge_resumed(case: _Case, function: Any, after: str, text: str, right: str, about: str) -> None:
    before = case.entries()
    result = case.call(function, about, case.client, case.stream, after, text)
    _require(result is not None, "your function returns None: return the whole text.")
    _require(isinstance(result, str), f"{about}, your function returns {_show(result)}: return one string.")
    kept = case.entries()[: len(before)] == before
    _require(kept, f"{about}, your function changes the stream: reading takes nothing away.")
    got = f"{about}, your function returns {_show(result)}"
    rest = bool(text) and right == text + result
    _require(not rest, f"{got}, the rest alone: put it after what the viewer has, {_show(text)}.")
    _require(result == right, f"{got}, not {_show(right)}.")


def state(function: Callable[..., str], *, client: redis.Redis | None = None) -> Verdict:
    """Exercise of notebook 06: `state(client, answer)`, an answer's state from its newest entry and its lease.

    `answer` is what the answer's keys begin with. The states: queued, streaming, interrupted, ended, failed.
    """

    def examine(case: _Case) -> str:
        chunks, *leases = [case.other(name) for name in ("chunks", "lease:1", "lease:10")]
        first = [("1-0", "start", "{}"), ("1-1", "text", "the end")]
        anew = [*first, ("10-0", "start", "{}")]
        for entries, lease, right, about in (
            ([], None, "queued", "without an entry"),
            (first, leases[0], "streaming", "with text, and the lease of attempt 1"),
            (first, None, "interrupted", "with text, and without a lease"),
            ([*first, ("1-2", "end", "{}")], leases[0], "ended", "with an `end`, while the lease runs on"),
            ([*first, ("1-2", "error", "{}")], None, "failed", "with an `error`"),
            (anew, leases[1], "streaming", "in its tenth attempt, with the lease of attempt 10"),
            (anew, leases[0], "interrupted", "in its tenth attempt, with the lease of attempt 1 alone"),
            ([*first, ("10-0", "end", "{}")], None, "ended", "that was interrupted, and stopped"),
        ):
            case.client.delete(chunks, *leases)
            case.write(entries, chunks)
            if lease:
                case.client.set(lease, "alive")
            result = case.call(function, f"asked for an answer {about}", case.client, case.stream)
            right_one = isinstance(result, str) and result == right
            _require(right_one, f"{case.about}, your function returns {_show(result)}, not '{right}'.")
        return "the newest entry and its attempt's lease tell the state."

    return _check("state", function, examine, client)


def missing(function: Callable[[list[str]], list[str]], *, client: redis.Redis | None = None) -> Verdict:
    """Exercise of notebook 06: `missing(ids)`, the IDs that are missing between those that a reader saw."""

    def examine(case: _Case) -> str:
        for ids, right in (
            (["1-0", "1-1", "1-2"], []),
            (["1-0", "1-1", "1-4"], ["1-2", "1-3"]),
            (["1-8", "1-9", "1-12", "1-13", "1-15"], ["1-10", "1-11", "1-14"]),
            (["1-0", "1-1", "2-0", "2-1"], []),
            (["1-0", "1-7", "2-2"], ["1-1", "1-2", "1-3", "1-4", "1-5", "1-6", "2-0", "2-1"]),
            ([], []),
        ):
            result = case.call(function, f"given {ids}", list(ids))
            _require(result is not None, "your function returns None: return the list of what is missing.")
            listed = isinstance(result, list) and all(isinstance(entry_id, str) for entry_id in result)
            _require(listed, f"{case.about}, your function returns {_show(result)}: return a list of IDs.")
            _require(result == right, f"{case.about}, your function returns {_show(result)}, not {_show(right)}.")
        return "every hole is found, and a new attempt is none."

    return _check("missing", function, examine, client)


def budget(
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
    client: redis.Redis | None = None,
) -> Verdict:
    """Exercise of notebook 07: MAXLEN, and a time to live in seconds, for which the memory suffices.

    `entries` is the length of an answer, `behind` how many of them a viewer may be late, `back_within` after how
    many seconds somebody may still ask for it, `memory` what there is, in bytes.
    """

    def examine(_: _Case) -> str:
        whole = maxlen is None or (isinstance(maxlen, int) and not isinstance(maxlen, bool) and maxlen > 0)
        _require(whole, f"`maxlen` is a whole number of entries, 1 or more; this is {_show(maxlen)}.")
        seconds = isinstance(ttl, (int, float)) and not isinstance(ttl, bool) and ttl > 0
        _require(seconds, f"`ttl` is a number of seconds, more than 0; this is {_show(ttl)}.")
        kept = min(maxlen or entries, entries)
        alive, each = answers_an_hour * ttl / 3600, kept * entry_bytes + record_bytes
        late = f"a viewer {behind} entries behind finds {behind - kept} of them trimmed: `maxlen` is too small."
        _require(kept >= min(behind, entries), late)
        gone = f"who comes back after {back_within:g} s finds nothing: after {ttl:g} s the answer has expired."
        _require(ttl >= back_within, gone)
        need = f"{alive:,.0f} answers alive, each with {kept} entries: {alive * each / 1e6:,.1f} MB"
        _require(alive * each <= memory, f"{need}, and there are {memory / 1e6:,.1f} MB.")
        return f"{need} of {memory / 1e6:,.1f} MB."

    return _check("budget", (maxlen, ttl), examine, client)


def lag(function: Callable[..., int], *, client: redis.Redis | None = None) -> Verdict:
    """Exercise of notebook 07: `lag(client, stream, group)`, how many entries the group was not given yet."""

    def examine(case: _Case) -> str:
        for length, given, deleted, about in (
            (5, 0, [], "when the group was given nothing of 5 entries"),
            (12, 9, [], "when the group was given 9 of 12 entries"),
            (5, 5, [], "when the group was given all 5 entries"),
            (9, 3, [2, 6], "when entries were deleted, one before the group's place and one after it"),
            (10, 2, [1, 2, 3, 4, 5], "when the stream was trimmed beyond the group's place"),
        ):
            with case.client.pipeline() as pipe:
                pipe.delete(case.stream)
                for number in range(1, length + 1):
                    pipe.xadd(case.stream, {"text": f"text {number}"}, id=f"1-{number}")
                for group, count in (("others", 4), ("workers", given)):
                    pipe.xgroup_create(case.stream, group, "0")
                    if count:
                        pipe.xreadgroup(group, "worker-1", {case.stream: ">"}, count=count)
                if given:
                    pipe.xack(case.stream, "workers", "1-1")
                if deleted:
                    pipe.xdel(case.stream, *(f"1-{number}" for number in deleted))
                pipe.execute()
            right = len({*range(given + 1, length + 1)} - {*deleted})
            before = case.groups()
            result = case.call(function, about, case.client, case.stream, "workers")
            same = case.groups()["workers"]["last-delivered-id"] == before["workers"]["last-delivered-id"]
            _require(same, f"{about}, your function reads in the group's name: that moves its place. Only look.")
            got = f"{about}, your function returns {_show(result)}"
            _require(isinstance(result, int) and not isinstance(result, bool), f"{got}: return a whole number.")
            _require(result == right, f"{got}, not {right}.")
        return "as many as come after the group's place."

    return _check("lag", function, examine, client)


def last_event_id(function: Callable[..., str], *, client: redis.Redis | None = None) -> Verdict:
    """Exercise of notebook 08: `watch(get)`, an answer's text over a connection that breaks.

    `get(headers)` connects, and yields events, dictionaries with `event`, `data` and mostly an `id`, until the
    connection ends. As long as no `end` or `failed` has come, `watch` comes back with the last `id` in the header
    `Last-Event-ID`. It returns the text, which begins anew at a `start`.
    """

    def examine(case: _Case) -> str:
        first = [("1-0", "start", ""), *((f"1-{n}", "text", word) for n, word in enumerate("One “two”\nthree.", 1))]
        whole, end = "One “two”\nthree.", ("1-18", "end", "")
        second = [("2-0", "start", ""), ("2-1", "text", "a"), ("2-2", "text", "new"), ("2-3", "end", "")]
        words = [("1-0", "start", ""), ("1-1", "text", "end"), ("1-2", "text", "failed"), ("1-3", "end", "")]
        for entries, cuts, right, about in (
            ([*first, end], [], whole, "when nothing breaks"),
            ([*first, end], [5], whole, "when the connection breaks after 1-4"),
            ([*first, end], [2, 0, 9], whole, "when the connection breaks three times"),
            ([*first, end], [17], whole, "when only the end is still to come"),
            ([*first, ("1-18", "failed", "")], [5], whole, "when the answer fails"),
            ([*first[:6], *second], [5], "anew", "when a second attempt begins after the break"),
            (words, [2], "endfailed", "when the text speaks of the end"),
        ):
            _judge_watched(case, function, _Wire(entries, cuts), right, about)
        return "the whole text, once, however often the connection breaks."

    return _check("last_event_id", function, examine, client)


def _judge_watched(case: _Case, function: Any, wire: _Wire, right: str, about: str) -> None:
    try:
        result = case.call(function, about, wire.get)
    except _Interrupted:
        _require(not wire.wrong, f"{about}, your function {wire.wrong}")
        raise
    _require(not wire.wrong, f"{about}, your function {wire.wrong}")
    _require(result is not None, "your function returns None: return the whole text.")
    got = f"{about}, your function returns {_show(result)}"
    _require(isinstance(result, str), f"{got}: return one string.")
    early = not wire.over and right.startswith(result)
    _require(not early, f"{got}, and neither `end` nor `failed` has come: the answer goes on.")
    _require(result == right, f"{got}, not {_show(right)}.")


def parse(function: Callable[[list[str]], list[dict[str, str]]], *, client: redis.Redis | None = None) -> Verdict:
    """Exercise of notebook 08: `parse(lines)`, the server-sent events in these lines, as the standard reads them.

    Each event is a dictionary with `id` (the last one that came, also with an earlier event; "" before), `event`
    ("message" without one) and `data`. Source: HTML standard, section 9.2.6.
    """

    def examine(case: _Case) -> str:
        one = ["id: 1-0", "event: text", "data: Hi", ""]
        hi = {"id": "1-0", "event": "text", "data": "Hi"}
        for lines, right, about in (
            (one, [hi], "one event"),
            (
                [*one, "id: 1-1", "event: end", "data: {}", ""],
                [hi, hi | {"id": "1-1", "event": "end", "data": "{}"}],
                "two",
            ),
            (["data: Hi", ""], [{"id": "", "event": "message", "data": "Hi"}], "an event of `data` alone"),
            (
                [*one, "data: there", ""],
                [hi, hi | {"event": "message", "data": "there"}],
                "an `id` only at the first event",
            ),
            (
                ["event: text", "data: a", "data:", "data: b", "id: 1-0", ""],
                [hi | {"data": "a\n\nb"}],
                "three lines of data",
            ),
            ([": still here", "", *one], [hi], "a comment"),
            (["id:1-0", "event:text", "data:  a: b", ""], [hi | {"data": " a: b"}], "spaces and colons"),
            (["retry: 1000", "", "event: state", "", *one], [hi], "lines without data"),
            ([*one, "id: 1-1", "event: text", "data: cut o"], [hi], "an event that was cut off"),
        ):
            result = case.call(function, f"given {about}", list(lines))
            _require(result is not None, "your function returns None: return the list of events.")
            listed = isinstance(result, list) and all(isinstance(event, dict) for event in result)
            _require(listed, f"{case.about}, your function returns {_show(result)}: return a list of dictionaries.")
            got = f"{case.about}, {_show(lines)}, your function returns"
            _require(len(result) == len(right), f"{got} {len(result)} events, not {len(right)}.")
            for event, wanted in zip(result, right, strict=True):
                _require(event == wanted, f"{got} {_show(event, repr)}, not {wanted}.")
        return "events, and nothing else."

    return _check("parse", function, examine, client)


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise _WrongError(otherwise)


# ------------------------------------------------------------------------------------- the learner's code


class _Case:
    """A stream of the check's own, and calls of the learner's function on it."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.stream = f"{names_of(client).prefix}:check:{secrets.token_hex(6)}"
        self.about = "here"  # what the learner's function is busy with
        self._others: set[str] = set()
        self._closed = threading.Event()
        self._writer = threading.Thread()

    def call(self, function: Any, about: str, *args: Any) -> Any:
        """Call the learner's function; what it raises becomes a sentence."""
        self.about = about
        _require(callable(function), f"give the function itself, without calling it; this is {_show(function)}.")
        try:
            result = function(*args)
        except Exception as error:  # noqa: BLE001 - whatever the learner's code raises
            said = _show(error, lambda error: str(error).replace(self.stream, "…"))  # its key differs at every check
            raise _WrongError(f"{about}, your function raises {type(error).__name__}: {said}") from None
        if inspect.iscoroutine(result):
            result.close()
            raise _WrongError("your function is asynchronous: write `def`, not `async def`.")
        return result

    def other(self, name: str) -> str:
        """One more key of the check's own."""
        key = f"{self.stream}:{name}"
        self._others.add(key)
        return key

    def entries(self) -> list[tuple[str, dict[str, str]]]:
        """What lies in the stream."""
        return self.client.xrange(self.stream)  # type: ignore[return-value]

    def add(self, entries: list[tuple[str, str]]) -> str:
        """Add entries of (question id, text) at once; return the last one's ID."""
        with self.client.pipeline() as pipe:
            for question_id, text in entries:
                pipe.xadd(self.stream, {"questionId": question_id, "chunkOutput": text})
            return (pipe.execute() or ["0-0"])[-1]

    def write(self, entries: list[tuple[str, str, str]], stream: str = "") -> None:
        """Add entries of (id, kind, text) at once, as an answer of the kit has them."""
        with self.client.pipeline() as pipe:
            for entry_id, kind, text in entries:
                pipe.xadd(stream or self.stream, {"kind": kind, "text": text, "ms": 0}, id=entry_id)
            pipe.execute()

    def words(self, words: Iterable[str], before: int = 0) -> None:
        """Add entries with the field `word`, under the IDs 1-1, 1-2, … or from behind `before` of them on."""
        for number, word in enumerate(words, before + 1):
            self.client.xadd(self.stream, {"word": word}, id=f"1-{number}")

    def leave_pending(self, pending: list[int]) -> None:
        """Make a stream whose entries of these numbers a dead consumer of the group `workers` left pending.

        It acknowledged the others; two came after its death. Another group has pending entries of its own.
        """
        last = max(pending, default=3) + 1
        numbers = range(1, last + 1)
        with self.client.pipeline() as pipe:
            pipe.delete(self.stream)
            for number in [*numbers, last + 1, last + 2]:
                state = "text" if number in pending else "done" if number in numbers else "new"
                pipe.xadd(self.stream, {"text": f"{state} {number}"}, id=f"{number}-0")
            for group, count in (("workers", last), ("readers", 3)):
                pipe.xgroup_create(self.stream, group, "0")
                pipe.xreadgroup(group, "worker-1", {self.stream: ">"}, count=count)
            pipe.xack(self.stream, "workers", *(f"{number}-0" for number in numbers if number not in pending))
            pipe.execute()

    def hand_out(self, left: int, new: int) -> None:
        """Make a stream with so many entries pending with `worker-1`, one with `worker-2`, and so many new ones."""
        with self.client.pipeline() as pipe:
            pipe.delete(self.stream)
            texts = [*(f"left {n}" for n in range(left)), "theirs", *(f"new {n}" for n in range(new))]
            for number, text in enumerate(texts, 1):
                pipe.xadd(self.stream, {"text": text}, id=f"{number}-0")
            pipe.xgroup_create(self.stream, "workers", "0")
            if left:
                pipe.xreadgroup("workers", "worker-1", {self.stream: ">"}, count=left)
            pipe.xreadgroup("workers", "worker-2", {self.stream: ">"}, count=1)
            pipe.execute()

    def pending(self, consumer: str) -> list[str]:
        """The texts of the entries that are pending with this consumer of the group `workers`."""
        ids = self.client.xpending_range(self.stream, "workers", "-", "+", 100, consumername=consumer)
        texts = {entry_id: fields["text"] for entry_id, fields in self.entries()}
        return [texts.get(entry["message_id"], "") for entry in ids]  # type: ignore[union-attr]

    def groups(self) -> dict[str, Any]:
        """The stream's groups, by name."""
        return {group["name"]: group for group in self.client.xinfo_groups(self.stream)}  # type: ignore[union-attr]

    def trickle(self, *bursts: list[Any], add: Callable[[list[Any]], object] | None = None) -> None:
        """Add these entries from another thread, with pauses, by `add` or else by `self.add`."""

        def write() -> None:
            for burst in bursts:
                if not self._closed.wait(0.1):
                    (add or self.add)(burst)

        self._writer = threading.Thread(target=write, name="llmstream check", daemon=True)
        self._writer.start()

    def close(self) -> None:
        """Delete the stream, and what else was used."""
        self._closed.set()
        if self._writer.ident:
            self._writer.join()
        self.client.delete(self.stream, *self._others)


class _Noting:
    """A Redis client that notes what the learner's function reads."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self.calls: list[tuple[str, Any, Any]] = []  # command, first argument, reply

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if name not in ("xread", "xrange", "xrevrange"):
            return method

        def call(*args: Any, **options: Any) -> Any:
            first = args[0] if args else options.get("streams")
            first = dict(first) if isinstance(first, dict) else first  # which the loop goes on changing
            reply = method(*args, **options)
            self.calls.append((name, first, reply))
            return reply

        return call


class _Wire:
    """A web server as a viewer meets it: sends events by `get`, and cuts the connections after so many entries each."""

    def __init__(self, entries: list[tuple[str, str, str]], cuts: list[int]) -> None:
        self.entries, self.cuts = entries, list(cuts)
        self.wrong = ""  # what the viewer has done wrong
        self.over = False  # the end was sent
        self._sent = ""  # the ID of the last entry that was sent

    def get(self, headers: dict[str, str] = {}) -> Iterator[dict[str, str]]:  # noqa: B006 - nobody changes it
        """The events of one connection."""
        self.wrong = self._judge(headers)
        if self.wrong:
            raise _Interrupted
        ids = [entry_id for entry_id, _, _ in self.entries]
        rest = self.entries[ids.index(self._sent) + 1 if self._sent else 0 :]
        yield {"event": "state", "data": '{"state": "streaming"}'}
        for entry_id, kind, text in rest[: self.cuts.pop(0)] if self.cuts else rest:
            self._sent, self.over = entry_id, kind in ("end", "failed")
            yield {"id": entry_id, "event": kind, "data": json.dumps({"text": text} if text else {"attempt": 1})}
        yield {"event": "state", "data": '{"state": "away"}'}

    def _judge(self, headers: Any) -> str:
        if not isinstance(headers, dict):
            return f"gives `get` {_show(headers)}: give it a dictionary of headers."
        if self.over:
            return "comes back after the end: return the text."
        given = {str(name).lower(): value for name, value in headers.items()}.get("last-event-id")
        if given == self._sent or (not self._sent and given in (None, "0-0")):
            return ""
        seen = f"has seen {self._sent or 'nothing'}."
        if given is None:
            return f"comes back without the header Last-Event-ID, and {seen}"
        return f"comes with Last-Event-ID {_show(given)}, and {seen}"


def _check(name: str, mine: Any, examine: Callable[[_Case], str], client: redis.Redis | None) -> Verdict:
    """Examine in a thread of its own: what the learner wrote may raise, or never return."""
    try:
        case = _Case(client or current())
    except (LLMStreamError, RedisError, ValueError) as error:
        return Verdict(False, f"this can't be checked now: {error}")
    verdicts: list[Verdict] = []
    work = threading.Thread(target=_examine, args=(name, mine, examine, case, verdicts), daemon=True)
    work.start()
    work.join(TIMEOUT)
    if work.is_alive():
        verdicts.insert(0, _failed(name, f"{case.about}, your function does not return: does its loop end?"))
        _interrupt(work, case)
    with suppress(RedisError):
        case.close()
    return verdicts[0]


def _examine(name: str, mine: Any, examine: Callable[[_Case], str], case: _Case, verdicts: list[Verdict]) -> None:
    try:
        if any(_untouched(part) for part in (mine if isinstance(mine, tuple) else (mine,))):
            verdicts.append(Verdict(None, "Not started yet: replace the `...`"))
        else:
            verdicts.append(Verdict(True, examine(case)))
            _tries.pop(name, None)
    except _WrongError as wrong:
        verdicts.append(_failed(name, str(wrong)))
    except _Interrupted:
        pass
    except (LLMStreamError, RedisError) as error:
        verdicts.append(Verdict(False, f"this can't be checked now: {error}"))
    except BaseException as error:  # noqa: BLE001 - even SystemExit must not pass without a word
        verdicts.append(_failed(name, f"{case.about}, your code raises {type(error).__name__}."))


def _interrupt(work: threading.Thread, case: _Case) -> None:
    """End the learner's loop, which else would go on in the kernel until that is restarted."""
    stop = ctypes.pythonapi.PyThreadState_SetAsyncExc
    for _ in range(10):
        if work.is_alive():
            stop(ctypes.c_ulong(work.ident or 0), ctypes.py_object(_Interrupted))
            with suppress(RedisError):
                case.add([("a", ";END:a")])  # wakes a read that blocks without a limit
            work.join(0.1)


def _untouched(thing: Any) -> bool:
    """Whether the placeholder `...` is still there, as the value or in a function's body."""
    if thing is ...:
        return True
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    except Exception:  # noqa: BLE001 - no source, or no function at all
        return False
    body = (
        tree.body if isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)) else [tree]
    )  # annotations may hold `...`
    return any(isinstance(n, ast.Constant) and n.value is ... for part in body for n in ast.walk(part))


def _failed(name: str, text: str) -> Verdict:
    hints = HINTS[name]
    step = min(_tries[name], len(hints) - 1)
    _tries[name] += 1
    more = "\nThe whole of it stands below, under Solution." if step == len(hints) - 1 else ""
    return Verdict(False, text, f"Hint {step + 1} of {len(hints)}: {hints[step]}{more}")


def _show(value: Any, how: Callable[[Any], str] = _short.repr) -> str:
    """A value as text of bearable length, whatever its own methods do."""
    try:
        return how(value)[:200]
    except Exception:  # noqa: BLE001 - it is the learner's object
        return f"a {type(value).__name__}"
