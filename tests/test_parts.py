"""Answers of parts: what is written is read, live, late, from the record, and as the version before wrote it."""

from __future__ import annotations

import itertools
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmstream_nb.answers.ask import Answer, ask
from llmstream_nb.answers.connection import names_of
from llmstream_nb.answers.produce import Writing
from llmstream_nb.answers.read import read_answer
from llmstream_nb.protocol.events import Ended, Event, Gap, Restarted, Started, parts_of, text_of
from llmstream_nb.protocol.follow import Cursor, Follower
from llmstream_nb.protocol.parts import (
    MAX_PART,
    Part,
    Reasoning,
    Refusal,
    Text,
    ToolCall,
    ToolResult,
    Unknown,
    joined,
    parts_of_record,
    written,
)
from llmstream_nb.protocol.wire import EntryID

from .conftest import FAST
from .model import wait_for

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
PARTS = st.lists(
    st.one_of(
        st.builds(Text, TEXTS),
        st.builds(Reasoning, TEXTS),
        st.builds(Refusal, TEXTS),
        st.builds(ToolCall, TEXTS, st.just("xlen"), TEXTS),
        st.builds(ToolResult, TEXTS, TEXTS),
        st.builds(lambda words: ToolResult("c", error=words), TEXTS),
    ),
    max_size=12,
)
SAID = [Reasoning("Let me "), Reasoning("see."), ToolCall("c1", "xlen", '{"key": "a"}'), ToolResult("c1", "42"), "It is ", "42."]  # fmt: skip


def bare(parts: list[Part]) -> list[tuple[str, str]]:
    """Kind and text of parts, deltas of a kind joined: what must be the same on all ways."""
    return [(kind, text) for kind, text, _ in joined((part.kind, part.text, 0) for part in parts)]


def spoken(said: list) -> list[tuple[str, str]]:
    return [(kind, text) for kind, text, _ in joined((*written(part), 0) for part in said)]


def entries_of(parts: list[Part]) -> list[tuple[str, dict[str, str]]]:
    written_ = [("start", "{}"), *map(written, parts), ("end", '{"reason": "stop"}')]
    return [(f"1-{n}", {"kind": kind, "text": text, "ms": str(n)}) for n, (kind, text) in enumerate(written_)]


@given(PARTS, st.data())
def test_however_the_entries_are_cut_into_reads_the_parts_are_the_same(parts, data) -> None:
    cursor, raw, events = Cursor(), entries_of(parts), list[Event]()
    while raw:
        count = data.draw(st.integers(1, len(raw)))
        events += cursor.feed(raw[:count])
        raw = raw[count:]
    assert bare(parts_of(events)) == spoken(parts)
    assert text_of(events) == "".join(part.text for part in parts if isinstance(part, Text))
    assert isinstance(events[-1], Ended)


@given(PARTS, st.data())
def test_what_is_missing_is_told_whatever_its_kind(parts, data) -> None:
    raw = entries_of(parts)
    lost = data.draw(st.sets(st.integers(1, len(raw) - 2)) if parts else st.just(set()))
    events = Cursor().feed([entry for number, entry in enumerate(raw) if number not in lost])
    assert sum(event.missing for event in events if isinstance(event, Gap)) == len(lost)
    assert bare(parts_of(events)) == spoken([part for number, part in enumerate(parts, 1) if number not in lost])


def test_an_answer_of_parts(client) -> None:
    """Live, at one moment, from the record alone: the same parts, and the text is the text alone."""
    answer = ask("?", source=lambda q, t: iter(SAID), client=client, timing=FAST)
    live = parts_of(read_answer(answer.id, client=client, timing=FAST))
    answer.wait(60)
    assert bare(live) == bare(answer.parts) == spoken(SAID)
    assert answer.text == answer.record["text"] == "It is 42."
    client.delete(names_of(client).answer(answer.id).chunks)
    events = list(read_answer(answer.id, client=client, timing=FAST))
    assert bare(parts_of(events)) == bare(answer.parts) == spoken(SAID)
    assert [part.ms for part in parts_of(events)] == sorted(part.ms for part in parts_of(events))


def test_who_stops_a_dead_answer_keeps_its_parts(client) -> None:
    """From outside, the record has what the stream has."""

    def thinks(question, topic):
        yield from SAID[:4]
        while True:
            time.sleep(0.01)
            yield None

    answer = ask("?", source=thinks, client=client, timing=FAST)
    while len(answer.parts) < 3:
        time.sleep(0.01)
    answer._producer.leave()  # as a process that dies, but for its lease
    answer._producer.done.wait(60)
    assert Answer(answer.id, client=client, timing=FAST).stop() == "ended"
    client.delete(names_of(client).answer(answer.id).chunks)
    assert bare(answer.parts) == spoken(SAID[:4])


def test_text_alone_is_recorded_once(client) -> None:
    answer = ask("?", source=lambda q, t: iter(["a", "b"]), client=client, timing=FAST).wait(60)
    assert "parts" not in answer.record
    assert bare(answer.parts) == [("text", "ab")]


def test_what_is_held_back_is_of_one_kind(client) -> None:
    """Coalescing joins deltas of a kind, holds no call back, and changes no order."""
    said = ["a", "b", Reasoning("c"), Reasoning("d"), ToolCall("1", "x"), ToolCall("2", "y"), "e", "f", Refusal("g")]
    writing = Writing(coalesce_ms=60_000)
    answer = ask("?", source=lambda q, t: iter(said), client=client, timing=FAST, writing=writing).wait(60)
    assert bare(answer.parts) == spoken(said)
    raw = client.xrange(names_of(client).answer(answer.id).chunks)
    kinds = [fields["kind"] for _, fields in raw]
    assert [kind for kind, _ in itertools.groupby(kinds)] == ["start", "text", "reasoning", "call", "text", "refusal", "end"]  # fmt: skip
    assert kinds.count("call") == 2


def test_the_first_sign_of_life_and_the_first_text_are_two_figures(client) -> None:
    def thinks(question, topic):
        yield Reasoning("hm")
        time.sleep(0.05)
        yield "So"

    record = ask("?", source=thinks, client=client, timing=FAST).wait(60).record
    assert record["first_part_ms"] < record["first_token_ms"]
    only = ask("?", source=lambda q, t: iter([Reasoning("hm")]), client=client, timing=FAST).wait(60).record
    assert only["first_part_ms"] is not None
    assert only["first_token_ms"] is None


def test_half_an_emoji_of_one_kind_does_not_meet_the_other_half_of_another(client) -> None:
    said = ["a\ud83d", Reasoning("\ude00b"), Reasoning("c\ud83d"), Reasoning("\ude00")]
    answer = ask("?", source=lambda q, t: iter(said), client=client, timing=FAST).wait(60)
    assert bare(answer.parts) == [("text", "a\ufffd"), ("reasoning", "\ufffdbc\U0001f600")]


@pytest.mark.parametrize("size", [MAX_PART, MAX_PART + 7, 5_000_000])
def test_a_huge_result_is_cut_and_says_so(client, size) -> None:
    said = [ToolCall("c", "all", "{}"), ToolResult("c", "x" * size)]
    [_, result] = ask("?", source=lambda q, t: iter(said), client=client, timing=FAST).wait(60).parts
    assert (len(result.content), result.cut) == (min(size, MAX_PART), max(0, size - MAX_PART))


def test_a_thousand_calls(client) -> None:
    said = [
        part for n in range(1000) for part in (ToolCall(f"c{n}", "xlen", '{"key": "a"}'), ToolResult(f"c{n}", str(n)))
    ]
    answer = ask("?", source=lambda q, t: iter(said), client=client, timing=FAST).wait(60)
    assert bare(answer.parts) == spoken(said)


@pytest.mark.parametrize("yielded", [7, b"x", Unknown("image", "?"), Started(EntryID(1, 0)), ["a"]])
def test_what_is_no_part_ends_the_answer_with_an_error(client, yielded) -> None:
    answer = ask("?", source=lambda q, t: iter(["a", yielded]), client=client, timing=FAST).wait(60)
    assert (answer.status, answer.text, answer.record["error"]) == ("failed", "a", "TypeError")


def test_a_call_of_other_types_is_made_text(client) -> None:
    """As people write it, with a dict; None and numbers don't break a reader either."""
    said = [ToolCall("c", "x", {"key": "a"}), ToolResult("c", 42), ToolResult(None, error=ValueError("bad"))]
    answer = ask("?", source=lambda q, t: iter(said), client=client, timing=FAST).wait(60)
    [call, number, error] = answer.parts
    assert json.loads(call.arguments) == {"key": "a"}
    assert (number.content, error.error) == ("42", "bad")


# ------------------------------------------------------------------------------------- what others have written


def test_what_the_version_before_wrote_is_read_as_before() -> None:
    """A stream and a record of it, as they stand in somebody's Redis."""
    stream = [
        ("1-0", {"kind": "start", "text": '{"model": "scripted", "source": "scripted", "at": 1795766840.758, "nonce": "7a10"}', "ms": "0"}),
        ("1-1", {"kind": "text", "text": "Hi", "ms": "3"}),
        ("2-0", {"kind": "start", "text": '{"model": "scripted", "source": "scripted", "at": 1795766842.1, "nonce": "9b"}', "ms": "0"}),
        ("2-1", {"kind": "text", "text": "Hi ", "ms": "2"}),
        ("2-2", {"kind": "text", "text": "you", "ms": "4"}),
        ("2-3", {"kind": "end", "text": '{"reason": "stop", "first_token_ms": 2, "total_ms": 5, "chunks": 2, "usage": null}', "ms": "5"}),
    ]  # fmt: skip
    events = Cursor().feed(stream)
    assert [type(event) for event in events] == [Started, Text, Restarted, Text, Text, Ended]
    assert text_of(events) == "Hi you"
    record = {
        "id": "x",
        "question": "?",
        "reason": "stop",
        "attempt": 2,
        "start": "2-0",
        "end": "2-3",
        "text": "Hi you",
    }
    events = Follower("x").from_record(record)
    assert [type(event) for event in events] == [Started, Text, Ended]
    assert text_of(events) == "Hi you"


@pytest.mark.parametrize(
    "parts",
    [
        "text",
        7,
        {"a": 1},
        [7],
        [["text"]],
        [["text", "a"]],
        [["text", 1, 2]],
        [["text", "a", "b"]],
        [["", "", 0]],
        [None],
    ],
)
def test_parts_that_somebody_wrote_into_a_record_break_nothing(parts) -> None:
    record = {"id": "x", "reason": "stop", "end": "1-3", "text": "Hi", "parts": parts}
    events = Follower("x").from_record(record)
    assert isinstance(events[-1], Ended)


@pytest.mark.parametrize("data", ["{}", '{"id": 1, "name": null, "arguments": {"a": [1]}}', '{"id": [], "cut": -1}', '{"cut": true}'])  # fmt: skip
@pytest.mark.parametrize("kind", ["call", "result"])
def test_a_call_that_somebody_wrote_is_made_text(kind, data) -> None:
    [event] = Cursor(EntryID(1, 0)).feed([("1-1", {"kind": kind, "text": data, "ms": "1"})])
    told = [
        getattr(event, name) for name in ("call_id", "name", "arguments", "content", "error") if hasattr(event, name)
    ]
    assert all(isinstance(value, str) for value in told)
    assert getattr(event, "cut", 0) == 0


# ------------------------------------------------------------------------------------------- what anybody may write


@pytest.mark.parametrize(
    "kind", ["text ", " reasoning", "refusal\u200b\x00", "call\x01", "result\n", " end", "\x00", ""]
)
def test_a_kind_that_only_looks_like_one_that_is_known_stays_unknown(kind: str) -> None:
    [part] = Cursor(EntryID(1, 0)).feed([("1-1", {"kind": kind, "text": "hidden", "ms": "0"})])
    assert isinstance(part, Unknown) and part.kind not in ("", "text", "reasoning", "refusal", "call", "result", "end")
    assert text_of([part]) == "" and [type(each) for each in parts_of([part])] == [Unknown]


def test_an_error_without_words_is_told_by_its_class() -> None:
    assert json.loads(written(ToolResult("c", error=KeyError()))[1]) == {"id": "c", "error": "KeyError"}


def test_none_is_no_word_and_an_object_is_json() -> None:
    assert json.loads(ToolCall(None, None, None).text) == {"id": "", "name": "", "arguments": ""}
    assert json.loads(ToolResult(1, {"n": [2]}).text) == {"id": "1", "content": '{"n": [2]}'}
    assert json.loads(ToolResult("c", None).text)["content"] == ""
    for wrong in (Text(None), Reasoning(5), Refusal(b"no")):
        with pytest.raises(TypeError, match="a source yields text or parts"):
            written(wrong)


def test_an_empty_part_comes_between_nothing(client) -> None:
    def halves(question, topic):
        yield from ("\ud83d", Reasoning(""), Text(""), Refusal(""), "\ude00")

    answer = ask("?", source=halves).wait(20)
    assert bare(answer.parts) == [("text", "\U0001f600")]


def test_a_record_with_all_parts_misses_nothing(client) -> None:
    def agent(question, topic):
        for number in range(40):
            yield ToolCall(f"c{number}", "count", "{}")
            yield ToolResult(f"c{number}", "1")
        yield "Done."

    answer = ask("?", source=agent, writing=Writing(maxlen=5)).wait(20)
    wait_for(lambda: answer.record.get("end"))
    assert client.xlen(names_of(client).answer(answer.id).chunks) < 80
    assert answer.look().missing == 0 and len(answer.parts) == 81


@pytest.mark.parametrize(
    "parts", ["none", [], [["text"]], [[1, 2, 3]], {"a": 1}, [["text", "", 0]], [["reasoning", 5, 0]]]
)
def test_parts_that_are_none_do_not_hide_the_text(parts: object) -> None:
    told = parts_of_record({"parts": parts, "text": "all of it"}, EntryID(1, 3))
    assert bare(told) == [("text", "all of it")]
