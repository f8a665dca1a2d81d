"""The cases of conformance.json: the kit's own reader, the recipe's, and for each rule a reader that does without it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import llmstream_nb
from llmstream_nb.protocol import follow
from llmstream_nb.protocol.events import Ended, Event, Failed, Gap
from llmstream_nb.protocol.follow import Cursor, Follower
from llmstream_nb.protocol.parts import Reasoning, Refusal, Text, ToolCall, ToolResult, Unknown
from llmstream_nb.protocol.wire import Entry, EntryID, Joiner, LLMStreamError, NotAnAnswer, Signs, Timing, parse_entries

from .test_recipe import recipe

FOLDER = Path(llmstream_nb.__file__).parent
CASES = json.loads((FOLDER / "conformance.json").read_text("utf-8"))["cases"]
READING = [case for case in CASES if "steps" in case]
PROTOCOL = (FOLDER / "PROTOCOL.md").read_text("utf-8")
RULES = re.findall(r"^\*\*(R\d+)", PROTOCOL, re.MULTILINE)
READERS = [
    rule for rule in RULES if f"**{rule}**" in PROTOCOL.partition("## A reader")[2].partition("## A producer")[0]
]


def named(cases: list[dict[str, Any]]) -> Any:
    """One test for each case, under its name."""
    return pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in cases])


def brief(event: Event) -> list[Any]:
    """An event as the data tell it."""
    told = [type(event).__name__.lower(), str(event.id)]
    match event:
        case Text(text=text) | Reasoning(text=text) | Refusal(text=text):
            return [*told, text]
        case ToolCall():
            return [*told, event.call_id, event.name, event.arguments]
        case ToolResult():
            return [*told, event.call_id, event.content, event.error]
        case Unknown(kind=kind):
            return [*told, kind]
        case Gap(missing=missing):
            return [*told, missing]
        case Ended(reason=reason):
            return [*told, reason]
        case Failed(error=error, message=message):
            return [*told, error, message]
    return told


def follower_of(case: dict[str, Any]) -> Follower:
    """A reader at the case's beginning."""
    timing = Timing(lease=case.get("lease", Timing.lease))
    return Follower("x", EntryID.parse(case.get("after", "0-0")), timing)


def take(follower: Follower, step: dict[str, Any]) -> list[Event]:
    """Give a reader one step of a case."""
    if "read" in step:
        return follower.feed([tuple(entry) for entry in step["read"]])
    if "reconnected" in step:
        follower.reconnected(step["reconnected"])
        return []
    look = step["look"]
    top = look["top"] and Entry.parse(*look["top"])
    return follower.silence(Signs(**look | {"top": top}), step.get("now", 0.0))


def check(case: dict[str, Any]) -> None:
    """The kit's reader does in each step what the case says."""
    follower = follower_of(case)
    for step in case["steps"]:
        if "error" in step:
            with pytest.raises(LLMStreamError) as raised:
                take(follower, step)
            assert type(raised.value).__name__ == step["error"]
        else:
            assert [brief(event) for event in take(follower, step)] == step.get("events", [])
            assert follower.state == step.get("state", follower.state)


@named(READING)
def test_the_reader(case) -> None:
    check(case)


@named([case for case in CASES if "deltas" in case])
def test_the_writer(case) -> None:
    joiner = Joiner()
    assert "".join(map(joiner.push, case["deltas"])) + joiner.flush() == case["text"]


@named([case for case in READING if case.get("recipe")])
def test_the_recipe(case) -> None:
    """Of one attempt it tells the same, but it stops at a gap."""
    entries = [(entry, fields) for step in case["steps"] for entry, fields in step["read"]]

    class Stub:
        def xread(self, streams: dict[str, str], **options: int) -> Any:
            after = EntryID.parse(streams["x"])
            found = [each for each in entries if EntryID.parse(each[0]) > after]
            return [["x", found]] if found else []

        def xrevrange(self, key: str, count: int) -> Any:
            return [("1-0", {"kind": "text", "text": ""})]  # as the stream was when the reader came

    told, end = [], ""
    try:
        for entry, kind, text in recipe.read(Stub(), "x", case["after"], patience=0.01):
            told.append([kind, entry, text])
    except (LookupError, TimeoutError) as error:
        end = type(error).__name__
    events = [event for step in case["steps"] for event in step["events"]]
    gap = next((number for number, event in enumerate(events) if event[0] == "gap"), None)
    assert [each for each in told if each[0] == "text"] == [event for event in events[:gap] if event[0] == "text"]
    assert [each[1] for each in told] == [event[1] for event in events[:gap]]
    ended = gap is None and events[-1][0] in ("ended", "failed")
    assert end == ("LookupError" if gap is not None else "" if ended else "TimeoutError")


# --------------------------------------------------------------------------------------- readers without a rule


def r1_ids_are_compared_as_text(patch) -> None:
    patch.setattr(EntryID, "__le__", lambda self, other: str(self) <= str(other))


def r2_repeats_are_taken(patch) -> None:
    patch.setattr(Cursor, "_is_repeated", lambda self, entry: False)


def r3_gaps_are_not_noticed(patch) -> None:
    patch.setattr(Cursor, "_missing", lambda self, before: 0)


def r4_attempts_are_one_text(patch) -> None:
    patch.setattr(Cursor, "_restarts", lambda self, before: False)


def r5_who_closes_begins_anew(patch) -> None:
    patch.setattr(Cursor, "_before", lambda self, entry: EntryID(entry.id.attempt, entry.id.seq - 1))


def r6_the_end_is_an_entry_like_any_other(patch) -> None:
    patch.setattr(Cursor, "closed", property(lambda self: False, lambda self, value: None), raising=False)


def r7_the_text_is_looked_at(patch) -> None:
    feed = Cursor.feed
    plain = ("START", "<", "{")
    patch.setattr(
        Cursor, "feed", lambda self, raw: [e for e in feed(self, raw) if not getattr(e, "text", "").startswith(plain)]
    )


def r7_empty_pieces_are_left_out(patch) -> None:
    feed = Cursor.feed
    patch.setattr(Cursor, "feed", lambda self, raw: [e for e in feed(self, raw) if getattr(e, "text", "some")])


def r8_what_is_unknown_is_passed_over(patch) -> None:
    def lenient(raw):
        try:
            return parse_entries(raw)
        except NotAnAnswer:
            return []

    patch.setattr(follow.wire, "parse_entries", lenient)


def looking(patch, see) -> None:
    """A reader that judges by other signs than it was given: `see` makes them, of the signs and the cursor's place."""
    silence = Follower.silence
    patch.setattr(Follower, "silence", lambda self, signs, now: silence(self, see(signs, self.cursor.after), now))


def r9_a_look_counts_though_there_is_more(patch) -> None:
    looking(patch, lambda signs, after: signs._replace(top=signs.top and signs.top._replace(id=after)))


def r10_the_end_must_be_read(patch) -> None:
    looking(patch, lambda signs, after: signs._replace(top=signs.top and signs.top._replace(kind="text")))


def r11_the_record_tells_no_end(patch) -> None:
    def see(signs, after):
        return signs._replace(record=signs.record and {**signs.record, "reason": "", "error": ""})

    looking(patch, see)


def r12_silence_is_death(patch) -> None:
    looking(patch, lambda signs, after: signs._replace(leased=False, record={}))


def r12_the_queue_is_death(patch) -> None:
    looking(patch, lambda signs, after: signs._replace(record=signs.record and {**signs.record, "pooled": False}))


def r13_nobody_looks_for_a_deletion(patch) -> None:
    looking(patch, lambda signs, after: signs._replace(cleared=0))


def r14_one_look_is_enough(patch) -> None:
    patch.setattr(Follower, "suspect", property(lambda self: True, lambda self, value: None), raising=False)


def r15_an_absence_of_redis_counts_as_silence(patch) -> None:
    patch.setattr(Follower, "reconnected", lambda self, now: None)


def r16_what_is_not_there_may_still_come(patch) -> None:
    looking(patch, lambda signs, after: signs._replace(record=signs.record or {}))


def r17_nobody_is_declared_dead(patch) -> None:
    endless = property(lambda self: float("inf"), lambda self, value: None)
    patch.setattr(Follower, "_judge_from", endless, raising=False)


def r44_whoever_goes_on_begins_anew(patch) -> None:
    take = Cursor._take
    data = lambda entry: json.dumps({name: value for name, value in entry.data.items() if name != "continues"})  # noqa: E731
    strip = lambda entry: entry._replace(text=data(entry)) if entry.kind == "start" else entry  # noqa: E731
    patch.setattr(Cursor, "_take", lambda self, entry, events: take(self, strip(entry), events))


WITHOUT = [value for name, value in list(globals().items()) if re.match(r"r\d+_", name)]


def rule_of(without: Any) -> str:
    return without.__name__.partition("_")[0].upper()


@pytest.mark.parametrize("without", WITHOUT, ids=lambda without: without.__name__)
def test_a_reader_without_the_rule_fails_a_case_of_it(monkeypatch, without) -> None:
    without(monkeypatch)
    failed = []
    for case in READING:
        if rule_of(without) in case["rules"]:
            try:
                check(case)
            except (AssertionError, pytest.fail.Exception, LLMStreamError):
                failed.append(case["name"])
    assert failed


def test_every_rule_of_a_reader_has_a_case_and_a_reader_without_it() -> None:
    shown = {rule for case in READING for rule in case["rules"]}
    assert shown == {rule_of(without) for without in WITHOUT} == {*READERS}
    assert [int(rule[1:]) for rule in RULES if rule in READERS] == [*range(1, 18), 44]
    assert {rule for case in CASES for rule in case["rules"]} <= set(RULES)
    assert sorted(RULES, key=lambda rule: int(rule[1:])) == [f"R{number}" for number in range(1, len(RULES) + 1)]
    assert len({case["name"] for case in CASES}) == len(CASES)
