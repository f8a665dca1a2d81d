"""The protocol without any I/O: IDs, keys, text, and the cursor under every split, repeat and loss."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmstream_nb.protocol.events import Ended, Failed, Gap, Restarted, Started, text_of
from llmstream_nb.protocol.follow import Cursor
from llmstream_nb.protocol.wire import (
    BadAnswerId,
    BadEntryID,
    BadQuestion,
    Entry,
    EntryID,
    Joiner,
    Names,
    check_answer_id,
    check_question,
    clean,
)

from .model import raw


def attempt(number: int, texts: list[str], end: str | None = "end") -> list[Entry]:
    """The entries of one attempt."""
    made = [Entry(EntryID(number, 0), "start", "{}", 0)]
    made += [Entry(EntryID(number, n), "text", text, n) for n, text in enumerate(texts, 1)]
    if end:
        data = {"reason": "stop"} if end == "end" else {"error": "Boom", "message": "it broke"}
        made.append(Entry(EntryID(number, len(made)), end, json.dumps(data), len(made)))
    return made


@st.composite
def answers(draw: st.DrawFn) -> list[Entry]:
    """A stream of one to three attempts, the last of them closed by its producer, from outside, or not at all."""
    count = draw(st.integers(1, 3))
    texts = [draw(st.lists(st.text(min_size=1, max_size=5), max_size=8)) for _ in range(count)]
    entries = [entry for n, t in enumerate(texts[:-1], 1) for entry in attempt(n, t, end=None)]
    end = draw(st.sampled_from(["end", "error", None, "outside"]))
    entries += attempt(count, texts[-1], end=None if end == "outside" else end)
    if end == "outside":
        data = {"reason": "cancelled", "closes": str(entries[-1].id)}
        entries.append(Entry(EntryID(count + 1, 0), "end", json.dumps(data), 0))
    return entries


def final_text(entries: list[Entry]) -> str:
    """What a viewer must end with, told in another way than the cursor's: the last attempt that had a start."""
    last = max(entry.id.attempt for entry in entries if entry.kind == "start")
    return "".join(entry.text for entry in entries if entry.kind == "text" and entry.id.attempt == last)


@given(answers(), st.data())
def test_any_split_into_reads_with_repeats_gives_the_text_once(entries: list[Entry], data: st.DataObject) -> None:
    cursor, events = Cursor(), []
    while cursor.after < entries[-1].id:
        upto = data.draw(st.integers(1, len(entries)))
        back = data.draw(st.integers(0, 4))  # a read repeated after a lost reply begins further back
        first = max(0, next(i for i, e in enumerate(entries) if e.id > cursor.after) - back)
        events += cursor.feed(raw(entries[first : first + back + upto]))
    assert text_of(events) == final_text(entries)
    assert not [event for event in events if isinstance(event, Gap)]
    assert sum(isinstance(event, (Ended, Failed)) for event in events) == int(entries[-1].final)
    assert sum(isinstance(event, Started) for event in events) == 1
    starts = sum(entry.kind == "start" for entry in entries)
    assert sum(isinstance(event, Restarted) for event in events) == starts - 1


@given(answers(), st.data())
def test_from_any_cursor_the_rest_follows_exactly(entries: list[Entry], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(entries)))
    whole = Cursor().feed(raw(entries))
    first = Cursor()
    before = first.feed(raw(entries[:at]))
    events = Cursor(first.after).feed(raw(entries))
    kinds = {Started: Restarted}  # to a reader that comes from an older attempt, a start is a restart
    assert before + events == whole or [kinds.get(type(e), type(e)) for e in before + events] == [
        kinds.get(type(e), type(e)) for e in whole
    ]
    assert text_of(events, text_of(before)) == final_text(entries)


@given(answers(), st.data())
def test_every_missing_entry_of_the_last_attempt_is_reported(entries: list[Entry], data: st.DataObject) -> None:
    lost = data.draw(st.sets(st.integers(0, len(entries) - 1)))
    kept = [entry for n, entry in enumerate(entries) if n not in lost]
    events = Cursor().feed(raw(kept))
    if not kept:
        assert events == []
        return
    # What an earlier attempt lost does not matter once a newer one has begun.
    last = max(entry.id.attempt for entry in entries if entry.kind == "start")
    known = max(entry.id for entry in kept)
    outside = entries[-1].final and entries[-1].id.seq == 0 and entries[-1] in kept
    missing = sum(
        1 for n, entry in enumerate(entries) if n in lost and entry.id.attempt == last and (entry.id < known or outside)
    )
    tail = 0
    for event in events:
        if isinstance(event, Restarted):
            tail = 0
        elif isinstance(event, Gap):
            tail += event.missing
    if known.attempt >= last:
        assert tail == missing


# ---------------------------------------------------------------------------------------- IDs, keys, entries


@pytest.mark.parametrize("bad", ["", "a b", "{x}", "-x", "x" * 65, "é", "a/b", "a\n", "*", "a:b", None, 7])
def test_odd_answer_ids_are_refused(bad: object) -> None:
    with pytest.raises(BadAnswerId):
        check_answer_id(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad", ["", "$", "+", "1", "1-", "-1-2", "1-2-3", "0x1-2", "1-18446744073709551616", "١-٢", None]
)
def test_odd_entry_ids_are_refused(bad: object) -> None:
    with pytest.raises(BadEntryID):
        EntryID.parse(bad)  # type: ignore[arg-type]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_entry_ids_survive_the_round_trip(attempt_number: int, seq: int) -> None:
    assert EntryID.parse(f"{attempt_number}-{seq}") == (attempt_number, seq)


@pytest.mark.parametrize("bad", ["", "   \n\t", "x" * 20_001, None])
def test_bad_questions_are_refused(bad: object) -> None:
    with pytest.raises(BadQuestion):
        check_question(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", ["a{b", "a*", "", "a b", "a?"])
def test_odd_prefixes_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="prefix"):
        Names(bad)


def test_all_keys_of_an_answer_share_one_hash_tag() -> None:
    keys = Names("p").answer("x1")
    assert {key.split("{")[1].split("}")[0] for key in (*keys[:3], keys.lease(2))} == {"x1"}


# -------------------------------------------------------------------------------------------------- text


@given(st.text(st.characters(), max_size=20), st.data())
def test_however_utf16_text_is_split_the_joiner_mends_it(text: str, data: st.DataObject) -> None:
    units = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    halves = [chr(int.from_bytes(units.encode("utf-16-le", "surrogatepass")[i : i + 2], "little"))
              for i in range(0, len(units.encode("utf-16-le", "surrogatepass")), 2)]  # fmt: skip
    joiner, made, at = Joiner(), "", 0
    while at < len(halves):
        step = data.draw(st.integers(1, 4))
        made += joiner.push("".join(halves[at : at + step]))
        at += step
    made += joiner.flush()
    made.encode()  # no surrogate is left
    assert made == clean(text)


@pytest.mark.parametrize(
    ("dirty", "expected"), [("a\ud83d\ude00b", "a😀b"), ("\ud83dx", "\ufffdx"), ("x\ude00", "x\ufffd"), ("é\0", "é\0")]
)
def test_surrogates_are_paired_or_replaced(dirty: str, expected: str) -> None:
    assert clean(dirty) == expected
