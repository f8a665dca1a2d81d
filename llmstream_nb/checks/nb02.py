"""What the exercises of notebooks 02 and 03 check: an answer is written into a stream, and read from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from llmstream_nb.checks.case import BrokenModelError, Case, Noting
from llmstream_nb.checks.judging import require, show
from llmstream_nb.checks.running import check

if TYPE_CHECKING:
    import redis

    from llmstream_nb.checks.verdict import Verdict


def produce(function: Callable[..., object], *, client: redis.Redis | None = None) -> Verdict:
    """Exercise of notebook 02: `produce(client, stream, question_id, chunks)`, a loop from chunks to entries.

    It adds an entry with the fields `questionId` and `chunkOutput` for each chunk, then one for the end,
    `;END:<question_id>`, also when the chunks break off with an error, which it lets pass. An entry
    `START:<question_id>;` before the first chunk is welcome.
    """

    def examine(case: Case) -> str:
        for chunks in (["Redis ", "streams ", "keep ", "keep ", "order."], []):
            case.clear()
            case.put([("1-0", {"questionId": "b", "chunkOutput": "another's"})])
            late: list[str] = []

            def model(chunks: list[str] = chunks, late: list[str] = late) -> Iterator[str]:
                for number, chunk in enumerate(chunks, 2):
                    yield chunk
                    # The next chunk is wanted: by now this one should be there.
                    if len(case.entries()) < number:
                        late.append(chunk)

            case.call(function, f"given {len(chunks) or 'no'} chunks", case.client, case.stream, "a", model())
            _judge_produced(case.entries(), chunks)
            require(not late, "your function collects before it writes: add each chunk as soon as it comes.")
        _judge_break(case, function)
        return "an entry for each chunk, as soon as it comes, and the end after the last."

    return check("produce", function, examine, client)


def _judge_produced(entries: list[tuple[str, dict[str, str]]], chunks: list[str]) -> None:
    kept = bool(entries) and entries.pop(0)[0] == "1-0"
    require(kept, "what another asker had written into the stream is gone: only add to it.")
    require(bool(entries), "your function adds nothing to the stream that it is given.")
    for _, fields in entries:
        names = sorted(fields)
        wanted = names == ["chunkOutput", "questionId"]
        require(wanted, f"an entry has the fields {show(names)}, not `questionId` and `chunkOutput`.")
        mine = fields["questionId"]
        require(mine == "a", f"given the question id 'a', an entry has the `questionId` {show(mine)}.")
    texts = [fields["chunkOutput"] for _, fields in entries]
    last = texts[-1]
    if texts[0] == "START:a;":
        texts.pop(0)
    require(";END:a" in texts, f"no entry holds the end, ';END:a' for the id 'a'; the last: {show(last)}.")
    once = texts.index(";END:a") == len(texts) - 1
    require(once, "the end stands before the last chunk: it comes once, after the loop.")
    require(texts[:-1] == chunks, f"given the chunks {show(chunks)}, the entries hold {show(texts[:-1])}.")


def _judge_break(case: Case, function: Callable[..., object]) -> None:
    """What becomes of an answer whose model breaks off."""

    def model() -> Iterator[str]:
        yield "half "
        raise BrokenModelError

    about = "when the model breaks off in mid-answer"
    case.clear()
    passed_on = case.breaks(function, about, case.client, case.stream, "a", model())
    texts = [fields.get("chunkOutput") for _, fields in case.entries()]
    ended = texts[-2:] == ["half ", ";END:a"]
    require(ended, f"{about}, the end must be written all the same: else readers wait for ever.")
    require(passed_on, f"{about}, your function hides the error: let it pass on, after the end.")


def rebuild(function: Callable[[redis.Redis, str], str], *, client: redis.Redis | None = None) -> Verdict:
    """Optional exercise of notebook 02: `rebuild(client, key)`, an answer's text by the question record under `key`."""

    def examine(case: Case) -> str:
        before, between = [("a", "START:a;"), ("a", "an older try"), ("b", "START:b;")], [("b", "another's")]
        for pieces, about in (
            (["Redis ", "keeps ", "order."], "of an answer of three chunks, with another's between them"),
            (["START:", "b; and ", ";END:b"], "of an answer that speaks of START and END"),
            ([], "of an answer without a chunk"),
        ):
            case.clear()
            case.add(before)
            start = case.add([("a", "START:a;")])
            for piece in pieces:
                case.add([*between, ("a", piece)])
            end = case.add([*between, ("a", ";END:a")])
            case.add([*between, ("a", "a later one")])
            record = {"topic": "Redis", "topicQuestion": "What is Redis?", "questionId": "a", "streamName": case.stream}
            record |= {"streamStartMessageId": start, "streamEndMessageId": end}
            case.client.set(case.other("record"), json.dumps(record))
            case.call(function, about, case.client, case.other("record"))
            case.require_form("the text", "the text as one string")
            case.require_result("".join(pieces))
        return "the text, by nothing but its record."

    return check("rebuild", function, examine, client)


def read(function: Callable[..., str], *, client: redis.Redis | None = None) -> Verdict:
    """Exercise of notebook 03: `read(client, stream, last_id, question_id)`, one answer's text among others.

    It reads on from `last_id`, takes only entries with its own `questionId`, waits for those to come, stops
    at `;END:<question_id>`, and returns the text without START and END.
    """

    def examine(case: Case) -> str:
        a, b = "a", "b"
        opening, end = [(a, "START:a;"), (a, "Hi "), (a, "there")], (a, ";END:a")
        mixed = [(b, "START:b;"), *opening, (b, "blue"), (a, " you"), (b, ";END:b"), (a, " all"), end]
        words = [*opening, (a, " at END:"), (a, ";END:b"), (a, ";END:a is"), (a, " the end"), end]
        said = "Hi there at END:;END:b;END:a is the end"
        for before, entries, right, about in (
            ([], [*opening, end], "Hi there", "when the answer lies there complete"),
            ([(a, "old"), (b, "old")], [*opening, end], "Hi there", "when there are entries up to `last_id`"),
            ([], mixed, "Hi there you all", "when another asker's entries lie between yours"),
            ([], words, said, "when the answer itself speaks of the end"),
            ([], [*opening, end, (a, "after"), (b, "after")], "Hi there", "when more entries follow the end"),
        ):
            case.clear()
            last_id = case.add(before)
            case.add(entries)
            _judge_read(case, function, last_id, right, about)
        case.clear()
        case.add(opening)
        later = [(b, "blue"), (a, " you"), (a, " all")], [(b, "seas"), (a, " and")], [(a, " me"), end]
        case.trickle(*later, add=case.add)
        _judge_read(case, function, "0-0", "Hi there you all and me", "when the entries come while it reads")
        return "your words, all of them, and nobody else's."

    return check("read", function, examine, client)


def _judge_read(case: Case, function: Any, last_id: str, right: str, about: str) -> None:
    result = case.call(function, about, case.client, case.stream, last_id, "a")
    case.require_form("the text that it has read", "the text as one string")
    marked = "START:a;" in result or result.endswith(";END:a")
    require(not marked, "your text holds START or END: they only mark where an answer lies; leave them out.")
    case.require_result(right)


def read_many(function: Callable[..., dict[str, str]], *, client: redis.Redis | None = None) -> Verdict:
    """Optional exercise of notebook 03: `read_many(client, keys)`, several answers of the kit by one XREAD at a time.

    It reads the streams under `keys` from their beginnings until each has its entry of the kind `end`, and returns
    a dictionary: for each key the text.
    """

    def examine(case: Case) -> str:
        texts = {"two": ["end", " it"], "three": [" "], "one": ["red ", "green "]}  # in the order of their ends
        right = {name: "".join(texts[name]) for name in ("one", "two", "three")}
        keys = {name: case.other(name) for name in right}
        entries = []
        for name, pieces in texts.items():
            entries += [(name, (f"1-{number}", "text", piece)) for number, piece in enumerate(pieces, 1)]
            entries.append((name, (f"1-{len(pieces) + 1}", "end", '{"reason": "stop"}')))

        def write(entry: tuple[str, tuple[str, str, str]]) -> None:
            case.write([entry[1]], keys[entry[0]])

        for later, about in ((False, "when three answers lie there"), (True, "when three answers are being written")):
            case.clear()
            for name in keys:
                write((name, ("1-0", "start", '{"model": "m"}')))
            if later:
                case.trickle(*entries, add=write)
            else:
                for entry in entries:
                    write(entry)
            noting = Noting(case.client)
            result = case.call(function, about, noting, list(keys.values()))
            require(isinstance(result, dict), f"{case.got}: return a dictionary.")
            named = {name: result.get(key) for name, key in keys.items()}
            require(named == right, f"{about}, the texts of your function are {show(named)}, not {show(right)}.")
            together = any(name == "xread" and len(streams) == 3 for name, streams, _ in noting.calls)
            require(together, f"{about}, your function reads one stream at a time: give all of them to one XREAD.")
        return "all of them, with one read at a time."

    return check("read_many", function, examine, client)
