"""A reader's judgement of an answer: where it stands, what is missing, and what silence means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llmstream_nb.protocol.events import Ended, Event, Failed, Gap, Interrupted, Restarted, Started, Text, closing_event
from llmstream_nb.protocol.wire import ORIGIN, AnswerNotFound, Entry, EntryID, RawEntry, Timing, parse_entries


class Cursor:
    """One reader's place in an answer: feed it entries in stream order, as redis-py gives them, get events.

    Because IDs are `<attempt>-<seq>` without holes, the cursor knows what comes next: a repeated entry is
    passed over, a missing one is reported, and a newer attempt replaces the text of the older one.
    """

    def __init__(self, after: EntryID = ORIGIN) -> None:
        self.after = after  # read on from here: XREAD … STREAMS <key> <after>
        self.closed = False  # an end or error entry was seen: nothing more will come

    def feed(self, raw: Iterable[RawEntry]) -> list[Event]:
        """Take entries as XREAD gave them and return what they mean for the reader; raises NotAnAnswer."""
        events: list[Event] = []
        for raw_id, fields in raw:
            attempt, seq = self.after
            try:  # the next text, and so nearly every entry: to make an Entry of each takes three times as long
                if raw_id == f"{attempt}-{seq + 1}" and fields["kind"] == "text" and not self.closed:  # type: ignore[index]
                    events.append(Text(EntryID(attempt, seq + 1), fields["text"], int(fields["ms"])))  # type: ignore[index]
                    self.after = events[-1].id
                    continue
            except (KeyError, ValueError, TypeError):
                pass  # parse_entries says what is wrong with it
            for entry in parse_entries([(raw_id, fields)]):
                if not self.closed and entry.id > self.after:
                    self._take(entry, events)
        return events

    def _take(self, entry: Entry, events: list[Event]) -> None:
        """Add what a new entry of any kind means."""
        self._notice_gap(entry, events)
        self.after = entry.id
        if entry.kind == "text":
            events.append(Text(entry.id, entry.text, entry.ms))
        elif entry.final:
            events.append(closing_event(entry.id, entry.data))
            self.closed = True
        # A newer attempt's start has become a Restarted in _notice_gap.
        elif not (events and isinstance(events[-1], Restarted) and events[-1].id == entry.id):
            events.append(Started(entry.id, entry.data))

    def _notice_gap(self, entry: Entry, events: list[Event]) -> None:
        """Compare an entry with the one that was due; add Restarted and Gap where they differ."""
        seen, due = self.after, EntryID(entry.id.attempt, entry.id.seq - 1)
        if entry.final and entry.id.seq == 0:
            # Someone closed a dead attempt from outside and said which entry was its last.
            closes = entry.data.get("closes")
            due = EntryID.parse(closes) if closes else seen
        if due <= seen:
            return
        if due.attempt > seen.attempt > 0:
            events.append(Restarted(entry.id, entry.data if entry.kind == "start" else {}))
        missing = due.seq - seen.seq if due.attempt == seen.attempt else due.seq + 1
        if missing > 0:
            events.append(Gap(entry.id, missing))


class Follower:
    """A viewer's whole judgement: the cursor, and what silence means. It never waits and never reads.

    Call `feed` with entries. After a read that brought none, call `silence` with what Redis says about the
    answer; `state` is then one of queued, streaming, interrupted, ended, failed.
    """

    def __init__(self, answer_id: str, after: EntryID = ORIGIN, timing: Timing | None = None) -> None:
        self.answer_id = answer_id
        self.cursor = Cursor(after)
        self.timing = timing or Timing()
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

    def feed(self, raw: Iterable[RawEntry]) -> list[Event]:
        """Take entries as redis-py gives them and return the events they bring; raises NotAnAnswer."""
        events = self.cursor.feed(raw)
        if events:
            self.suspect, last = False, events[-1]
            self.state = {Ended: "ended", Failed: "failed"}.get(type(last), "streaming")
        return events

    def silence(
        self, top: Entry | None, leased: bool, record: Mapping[str, Any] | None, cancelled: bool, now: float
    ) -> list[Event]:
        """Judge a read that brought nothing.

        `top` is the stream's last entry, `leased` whether the lease of this cursor's attempt lives, `record` the
        question's JSON, `cancelled` whether the cancel key stands, `now` monotonic seconds.
        Raises AnswerNotFound when there is nothing under this id, also at a second look.
        """
        after = self.cursor.after
        if self.done or (top and top.id > after):
            return []  # there is more to read: not silent at all
        if top and top.final and top.id == after:
            return self._close(closing_event(top.id, top.data))  # joined exactly at the end
        if top is None and record and (record.get("reason") or record.get("error")):
            return self.from_record(record)  # the chunks have expired, the record has not
        waiting = top is None and after == ORIGIN and record and record.get("pooled")
        if leased or waiting:
            self.suspect = False
            self.state = "queued" if after == ORIGIN else "streaming"
            return []
        if top is None and cancelled and after != ORIGIN:
            return self._close(Failed(after, "Deleted", "This answer was deleted."))
        if not self.suspect or now < self._judge_from:
            self.suspect = True  # its end may have come between the read and the look: read once more
            return []
        if top is None and record is None and after == ORIGIN:
            raise AnswerNotFound(f"there is no answer {self.answer_id!r}: never asked, cleared, or expired")
        was, self.state = self.state, "interrupted"
        return [] if was == "interrupted" else [Interrupted(after)]

    def glance(self, top: Entry | None, *signs: Any) -> list[Event]:
        """Judge an answer whose entries this follower does not read, from its last entry and its signs of life.

        The arguments are those of `silence`. When the stream has grown, that is sign enough.
        """
        if self.done or top is None or top.id <= self.cursor.after:
            return self.silence(top, *signs)
        self.cursor.after, self.suspect, self.state = top.id, top.final, "streaming"
        return []

    def from_record(self, record: Mapping[str, Any]) -> list[Event]:
        """The events of an ended answer, from its record alone: the text comes in one piece."""
        after = self.cursor.after
        end = EntryID.parse(record["end"]) if record.get("end") else after
        if after >= end > ORIGIN:
            return self._close(closing_event(after, record))
        again: list[Event] = [Restarted(end)] if after != ORIGIN else [Started(end, dict(record))]
        whole = record.get("text")
        text: list[Event] = [Text(end, whole)] if whole and isinstance(whole, str) else []
        return [*again, *text, *self._close(closing_event(end, record))]

    def _close(self, event: Ended | Failed) -> list[Event]:
        self.cursor.after, self.cursor.closed = event.id, True
        self.state = "ended" if isinstance(event, Ended) else "failed"
        return [event]
