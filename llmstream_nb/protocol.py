"""What an answer looks like in Redis: its keys, entry IDs, entries, events and the cursor. No I/O happens here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MAX_QUESTION = 20_000  # characters; a longer one is refused before it costs anything


# ------------------------------------------------------------------------------------------------ errors


class LLMStreamError(Exception):
    """Anything the kit reports; its text says what happened and what to do, and holds no secret."""


class BadAnswerId(LLMStreamError, ValueError):
    """An answer id with characters that have a meaning in Redis, in a URL or in a shell."""


class BadQuestion(LLMStreamError, ValueError):
    """A question that is empty, blank or too long."""


class AnswerNotFound(LLMStreamError, LookupError):
    """No answer of this id is in Redis: never asked, cleared, or expired."""


class AnswerExists(LLMStreamError):
    """An answer of this id is already there."""


class NotAnAnswer(LLMStreamError):
    """The key holds something that the kit did not write: another type, or entries of other fields."""


class BadEntryID(LLMStreamError, ValueError):
    """Text that does not look like `1-42`."""


class Fenced(LLMStreamError):
    """A newer attempt stands in the stream, so this producer must not write any more."""


class Deleted(LLMStreamError):
    """The answer was cleared while it was being produced."""


# ------------------------------------------------------------------------------------------------ timing


@dataclass(frozen=True)
class Timing:
    """Every time span of the protocol, in seconds, so that a test can run in fractions of one."""

    lease: float = 5.0  # a producer silent for this long counts as dead
    tick: float = 0.5  # how often a producer renews its lease and looks for a cancel; well below the lease
    ttl: float = 86_400.0  # how long an answer stays in Redis after it was last written
    give_up: float = 60.0  # how long a producer or a reader goes on trying to reach a lost Redis
    patience: float = 60.0  # how long a reader waits without any sign of life


# -------------------------------------------------------------------------------------------------- keys


def check_prefix(prefix: str) -> str:
    """Return `prefix`, or raise ValueError: braces would move the hash tag, the rest are glob characters."""
    if not prefix or set(prefix) & set("{}*?[]\\ \t\r\n"):
        raise ValueError(f"the key prefix {prefix!r} must not be empty or hold spaces, braces or any of * ? [ ] \\")
    return prefix


def check_answer_id(answer_id: str) -> str:
    """Return `answer_id`, or raise BadAnswerId."""
    if not isinstance(answer_id, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._~-]{0,63}", answer_id):
        raise BadAnswerId(
            f"{str(answer_id)[:80]!r} can't be an answer's id: use 1 to 64 letters, digits, '.', '_', '~' or '-', "
            "beginning with a letter or digit"
        )
    return answer_id


def check_question(question: str) -> str:
    """Return the question without outer white space, or raise BadQuestion."""
    if not isinstance(question, str) or not question.strip():
        raise BadQuestion("the question is empty: type one")
    if len(question) > MAX_QUESTION:
        raise BadQuestion(f"the question has {len(question):,} characters; at most {MAX_QUESTION:,} are taken")
    return clean(question.strip())


class AnswerKeys(NamedTuple):
    """The keys of one answer. The braces are a hash tag: Redis Cluster keeps all four on one node."""

    chunks: str  # stream: the answer
    question: str  # string: the JSON record
    cancel: str  # string: Stop, from anyone
    lease_prefix: str

    def lease(self, attempt: int) -> str:
        """The key that lives only as long as that attempt's producer does."""
        return f"{self.lease_prefix}{attempt}"


@dataclass(frozen=True)
class Names:
    """All keys under one prefix."""

    prefix: str = "llmstream"

    def __post_init__(self) -> None:
        check_prefix(self.prefix)

    def answer(self, answer_id: str) -> AnswerKeys:
        """The keys of one answer; raises BadAnswerId."""
        base = f"{self.prefix}:{{{check_answer_id(answer_id)}}}"
        return AnswerKeys(f"{base}:chunks", f"{base}:question", f"{base}:cancel", f"{base}:lease:")

    @property
    def answers(self) -> str:
        """Sorted set: answer ids by the time they were asked (Unix seconds)."""
        return f"{self.prefix}:answers"

    @property
    def questions(self) -> str:
        """Stream: the pool's queue; an entry has the field `answer`, an id, and is deleted once that has ended."""
        return f"{self.prefix}:questions"

    @property
    def failures(self) -> str:
        """List: the questions that the pool gave up, newest first, each a small JSON object."""
        return f"{self.prefix}:failures"


POOL = "llm-workers"  # the consumer group on the queue

# ----------------------------------------------------------------------------------------------- entries


class EntryID(NamedTuple):
    """`<attempt>-<seq>`: compares as Redis compares, because it is two integers there too."""

    attempt: int
    seq: int

    def __str__(self) -> str:
        return f"{self.attempt}-{self.seq}"

    @classmethod
    def parse(cls, text: str) -> EntryID:
        """Read `12-3`; raises BadEntryID for anything else, `$` and `+` included."""
        match = re.fullmatch("([0-9]{1,20})-([0-9]{1,20})", text) if isinstance(text, str) else None
        numbers = [int(n) for n in match.groups()] if match else [-1]
        if not 0 <= min(numbers) <= max(numbers) < 2**64:
            raise BadEntryID(f"{str(text)[:80]!r} is no entry ID: it must look like 1-42")
        return cls(*numbers)


ORIGIN = EntryID(0, 0)  # before every entry: attempts count from 1
KINDS = ("start", "text", "end", "error")


class Entry(NamedTuple):
    """One entry of an answer's stream.

    All entries have the same three fields: Redis stores the names once per node of the stream,
    which halves the memory of entries as small as tokens.
    """

    id: EntryID
    kind: str  # one of KINDS
    text: str  # the delta; for the other kinds a small JSON object
    ms: int  # milliseconds since the attempt's start

    @property
    def final(self) -> bool:
        """Whether this entry ends the answer."""
        return self.kind in ("end", "error")

    @property
    def data(self) -> dict[str, Any]:
        """The JSON object of a start, end or error entry; raises NotAnAnswer."""
        try:
            data = json.loads(self.text)
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise NotAnAnswer(f"entry {self.id} of kind {self.kind!r} holds no JSON object")
        return data

    @classmethod
    def parse(cls, raw_id: str, fields: Mapping[str, str]) -> Entry:
        """Read an entry as redis-py returns it; raises NotAnAnswer."""
        try:
            entry = cls(EntryID.parse(raw_id), fields["kind"], fields["text"], int(fields["ms"]))
        except (KeyError, ValueError, TypeError):
            raise NotAnAnswer(f"entry {raw_id} is not the kit's: it needs the fields kind, text and ms") from None
        if entry.kind not in KINDS:
            raise NotAnAnswer(f"entry {raw_id} has the unknown kind {entry.kind[:40]!r}")
        return entry


RawEntry = tuple[str, Mapping[str, str] | None]  # ID and fields, as redis-py gives them


def parse_entries(raw: Iterable[RawEntry]) -> list[Entry]:
    """Read the entries of an XRANGE, XREVRANGE or XREAD reply; deleted ones (null fields) are left out."""
    return [Entry.parse(raw_id, fields) for raw_id, fields in raw or () if fields]


def clean(text: str) -> str:
    """Join surrogate pairs and turn unpaired surrogates into U+FFFD, since UTF-8 can't hold them."""
    if text.isascii():
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        # The UTF-16 decoder pairs surrogates; what it can't pair comes through surrogatepass as it was.
        paired = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        return re.sub("[\ud800-\udfff]", "\ufffd", paired)


class Joiner:
    """Join an emoji whose two surrogates came in two deltas: JSON's \\u escapes allow that split."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, delta: str) -> str:
        """Return the text that can be written now; a leading half is held back until its other half comes."""
        text, self._held = self._held + delta, ""
        if text and "\ud800" <= text[-1] <= "\udbff":
            text, self._held = text[:-1], text[-1]
        return clean(text)

    def flush(self) -> str:
        """Return what is still held, once no more deltas come."""
        text, self._held = clean(self._held), ""
        return text


# ------------------------------------------------------------------------------------------------ events


@dataclass(frozen=True, slots=True)
class Started:
    """The first attempt has begun; `data` tells model, source and wall-clock time."""

    id: EntryID
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Restarted:
    """A newer attempt has begun: throw away the text so far."""

    id: EntryID
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)  # frozen, each would take twice as long to make, and there is one for every token
class Text:
    """The next piece of the text; `ms` since the attempt's start."""

    id: EntryID
    text: str
    ms: int = 0


@dataclass(frozen=True, slots=True)
class Gap:
    """`missing` entries before `id` are gone from the stream: trimmed, or lost by Redis."""

    id: EntryID
    missing: int


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The producer is dead and nobody has taken over yet; the text so far stands, and may still go on."""

    id: EntryID


@dataclass(frozen=True, slots=True)
class Ended:
    """The answer is complete: `reason` is the model's finish reason (stop, length, …) or `cancelled`."""

    id: EntryID
    reason: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failed:
    """The answer ended in an error; `message` is fit to show."""

    id: EntryID
    error: str
    message: str
    data: dict[str, Any] = field(default_factory=dict)


Event = Started | Restarted | Text | Gap | Interrupted | Ended | Failed


def closing_event(entry_id: EntryID, data: Mapping[str, Any]) -> Ended | Failed:
    """The event of an end or error entry's data, or of the record of an ended answer."""
    if data.get("error"):
        return Failed(entry_id, str(data["error"]), str(data.get("message") or ""), dict(data))
    return Ended(entry_id, str(data.get("reason") or "stop"), dict(data))


# ------------------------------------------------------------------------------------------------ cursor


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


def text_of(events: Iterable[Event], text: str = "") -> str:
    """The text a viewer holds after these events."""
    pieces = [text]
    for event in events:
        if isinstance(event, Text):
            pieces.append(event.text)
        elif isinstance(event, Restarted):
            pieces.clear()
    return "".join(pieces)
