"""A reader's judgement of an answer: where it stands, what is missing, and what silence means."""

from collections.abc import Iterable, Mapping
from typing import Any

from llmstream_nb.protocol import wire
from llmstream_nb.protocol.events import (
    Continued,
    Ended,
    Event,
    Failed,
    Gap,
    Interrupted,
    Restarted,
    closing_event,
    opening_event,
    told,
)
from llmstream_nb.protocol.parts import DELTAS, part_of, parts_of_record


class Cursor:
    """One reader's place in an answer: feed it entries in stream order, as redis-py gives them, get events.

    Because IDs are `<attempt>-<seq>` without holes, the cursor knows what comes next: a repeated entry is
    passed over, a missing one is reported, and a newer attempt replaces the text of the older one.
    """

    def __init__(self, after: wire.EntryID = wire.ORIGIN) -> None:
        self.after = after  # read on from here: XREAD … STREAMS <key> <after>
        self.closed = False  # an end or error entry was seen: nothing more will come
        self._goes_on: wire.Entry | None = None  # an opening that goes on from here: its next entry has what is known

    def feed(self, raw: Iterable[tuple[str, Any]]) -> list[Event]:
        """Take entries as XREAD gave them and return what they mean for the reader; raises NotAnAnswer."""
        events: list[Event] = []
        for raw_id, fields in raw:
            attempt, seq = self.after
            try:  # the next delta, and so nearly every entry: to make an Entry of each takes three times as long
                if raw_id == f"{attempt}-{seq + 1}" and not (self.closed or self._goes_on):
                    delta, entry_id = DELTAS[fields["kind"]], wire.EntryID(attempt, seq + 1)
                    events.append(delta(fields["text"], entry_id, wire.parse_ms(fields["ms"])))
                    self.after = entry_id
                    continue
            except (KeyError, ValueError, TypeError):
                pass  # parse_entries says what is wrong with it
            try:
                for entry in wire.parse_entries([(raw_id, fields)]):
                    if not (self.closed or self._is_repeated(entry)):
                        self._take(entry, events)
            except wire.NotAnAnswer:
                if events:
                    break  # what came before is told first: the next read begins with this one
                raise
        return events

    def _take(self, entry: wire.Entry, events: list[Event]) -> None:
        """Add what a new entry of any kind means."""
        if entry.kind == "start" and self.after.seq and entry.data.get("continues") == str(self.after):
            self.after, self._goes_on = entry.id, entry
            return
        if opening := self._goes_on:  # R44
            self._goes_on = None
            if entry.kind == "text" and entry.id == (opening.id.attempt, 1):
                self.after = entry.id
                events.append(Continued(entry.id, told(opening.data)))
                return
            events.append(Restarted(opening.id, told(opening.data)))
        before = self._before(entry)
        restarts, missing = self._restarts(before), self._missing(before)
        self.after = entry.id
        if restarts or entry.kind == "start":
            events.append(opening_event(entry.id, entry.data if entry.kind == "start" else {}, restarts))
        if missing:
            events.append(Gap(entry.id, missing))
        if entry.final:
            events.append(closing_event(entry.id, entry.data, entry.kind))
            self.closed = True
        elif entry.kind != "start":
            events.append(part_of(entry))

    def _is_repeated(self, entry: wire.Entry) -> bool:
        """R2: whether it was seen before, as when a read is done again after a lost reply."""
        return entry.id <= self.after

    def _before(self, entry: wire.Entry) -> wire.EntryID:
        """R5: the entry that must have come right before; who closes an attempt from outside names its last.

        Without a name the stream was empty then: what was read before is no part of this answer.
        """
        if entry.final and entry.id.seq == 0 and (closes := entry.data.get("closes")):
            return max(self.after, _written_id(closes))
        return wire.EntryID(entry.id.attempt, entry.id.seq - 1)

    def _missing(self, before: wire.EntryID) -> int:
        """R3: how many entries, up to the one before, are neither seen nor there."""
        return before.seq - (self.after.seq if before.attempt == self.after.attempt else -1)

    def _restarts(self, before: wire.EntryID) -> bool:
        """R4: whether another attempt than the one that was seen has begun."""
        return before.attempt > self.after.attempt > 0


class Follower:
    """A viewer's whole judgement: the cursor, and what silence means. It never waits and never reads.

    Call `feed` with entries. After a read that brought none, call `silence` with what Redis says about the
    answer; `state` is then one of queued, streaming, interrupted, ended, failed.
    """

    def __init__(self, answer_id: str, after: wire.EntryID = wire.ORIGIN, timing: wire.Timing | None = None) -> None:
        self.answer_id = answer_id
        self.cursor = Cursor(after)
        self.timing = timing or wire.Timing()
        self.state = "queued"
        self.suspect = False  # no sign of life at the last look: read once more, soon
        self._judge_from = 0.0  # monotonic time before which nobody is declared dead

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ("ended", "failed")

    def reconnected(self, now: float) -> None:
        """Redis was away (`now` in monotonic seconds): producers need one lease to show that they live."""
        self.suspect, self._judge_from = False, now + self.timing.lease

    def feed(self, raw: Iterable[tuple[str, Any]]) -> list[Event]:
        """Take entries as redis-py gives them and return the events they bring; raises NotAnAnswer."""
        return self._told(self.cursor.feed(raw))

    def silence(self, signs: wire.Signs, now: float) -> list[Event]:
        """Judge a read that brought nothing, by what Redis told after it; `now` in monotonic seconds.

        Raises AnswerNotFound when there is nothing under this id, also at a second look.
        """
        (top, leased, record, cleared), after = signs, self.cursor.after
        gone, unread, known = top is None, after == wire.ORIGIN, record or {}
        if self.done or (top and top.id > after):
            return []  # R9: there is more to read, so this is no silence
        if top and top.final and top.id == after:
            return self._told([closing_event(top.id, top.data, top.kind)])  # R10: joined exactly at the end
        if top and top.final and top.id < after:  # a cursor of another answer, or of one that Redis has lost
            raise wire.BadEntryID(
                f"{self.answer_id!r} has nothing at {after}: it ended at {top.id}, so read it from 0-0"
            )
        if gone and (known.get("reason") or known.get("error")):
            return self.from_record(known)  # R11: the entries have expired, the record has not
        anew = gone and not unread and signs.first > after.attempt  # the same id, another question
        if leased or anew or (gone and unread and known.get("pooled")):
            # R12: at work, or in the queue
            self.suspect, self.state = False, "queued" if unread or anew else "streaming"
            return []
        if gone and record is None and cleared >= after.attempt > 0:
            return self._told([Failed(after, "Deleted", "This answer was deleted.")])  # R13
        if not self.suspect or now < self._judge_from:
            self.suspect = True  # R14, R15: its end may have come between the read and the look, so read once more
            return []
        if gone and unread and record is None:  # R16
            raise wire.AnswerNotFound(f"there is no answer {self.answer_id!r}: never asked, cleared, or expired")
        was, self.state = self.state, "interrupted"  # R17
        return [] if was == "interrupted" else [Interrupted(after)]

    def glance(self, signs: wire.Signs, now: float) -> list[Event]:
        """`silence` for a follower that does not read the entries: it goes by the last one, and the signs of life."""
        top = signs.top
        if self.done or top is None or top.id <= self.cursor.after:
            return self.silence(signs, now)
        self.cursor.after, self.suspect, self.state = top.id, top.final, "streaming"
        return []

    def from_record(self, record: Mapping[str, Any]) -> list[Event]:
        """The events of an ended answer, from its record alone: each part comes in one piece."""
        after = self.cursor.after
        end = _written_id(record["end"]) if record.get("end") else after
        first = opening_event(end, record if after == wire.ORIGIN else {}, again=after != wire.ORIGIN)
        missing = record.get("missing")
        gap = [Gap(end, missing)] if type(missing) is int and missing > 0 else []
        unseen = [] if after >= end > wire.ORIGIN else [first, *gap, *parts_of_record(record, end)]
        return self._told([*unseen, closing_event(end, record)])

    def _told(self, events: list[Event]) -> list[Event]:
        """Note where these events bring the viewer, and return them."""
        if events:
            last, self.suspect = events[-1], False
            self.state = {Ended: "ended", Failed: "failed"}.get(type(last), "streaming")
            self.cursor.after, self.cursor.closed = last.id, self.done
        return events


def _written_id(text: str) -> wire.EntryID:
    """An ID that stands in an entry or a record, where anybody may have written it; raises NotAnAnswer."""
    try:
        return wire.EntryID.parse(text)
    except wire.BadEntryID:
        raise wire.NotAnAnswer(f"{str(text)[:80]!r} stands where an entry's ID should: this is not the kit's") from None
