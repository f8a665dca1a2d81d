"""What an answer looks like in Redis: its keys, entry IDs and entries."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

DEEPEST = 4  # levels of the JSON that entries and records hold
LARGEST = 2**53  # numbers beyond it lose digits in JSON readers, JavaScript's among them
MAX_QUESTION = 20_000  # characters; a longer one is refused before it costs anything


# ------------------------------------------------------------------------------------------------ errors


class LLMStreamError(Exception):
    """Anything the kit reports; its text says what happened and what to do, and holds no secret."""


class BadAnswerId(LLMStreamError, ValueError):
    """An answer id with characters that have a meaning in Redis, in a URL or in a shell."""


class BadPrefix(LLMStreamError, ValueError):
    """A prefix of keys with characters that have a meaning in Redis."""


class BadQuestion(LLMStreamError, ValueError):
    """A question that is empty, blank or too long; messages or parameters that can't be sent."""


class BrokenChain(LLMStreamError, ValueError):
    """What a question follows can't be told to the model: gone, asked anew, without end or text, too long, a loop."""


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
    tick: float = 0.0  # how often a producer renews its lease and looks for a cancel; 0: as the lease needs it
    ttl: float = 86_400.0  # how long an answer stays in Redis after it was last written
    give_up: float = 60.0  # how long a producer or a reader goes on trying to reach a lost Redis
    patience: float = 60.0  # how long a reader waits without any sign of life

    def __post_init__(self) -> None:
        if not self.tick:
            object.__setattr__(self, "tick", min(0.5, self.lease / 10))
        finite = all(0 < each < LARGEST for each in (self.lease, self.tick, self.ttl))
        if not (finite and self.give_up >= 0 and self.patience >= 0):  # so NaN is refused, too
            raise ValueError(f"{self}: these are seconds, and lease, tick and ttl are more than 0")


# -------------------------------------------------------------------------------------------------- keys


def is_answer_id(answer_id: Any) -> bool:
    """Whether this can be an answer's id."""
    return isinstance(answer_id, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._~-]{0,63}", answer_id) is not None


def check_answer_id(answer_id: str) -> str:
    """Return `answer_id`, or raise BadAnswerId."""
    if not is_answer_id(answer_id):
        rule = "use 1 to 64 letters, digits, '.', '_', '~' or '-', beginning with a letter or digit"
        raise BadAnswerId(f"{str(answer_id)[:80]!r} can't be an answer's id: {rule}")
    return answer_id


def check_question(question: str) -> str:
    """Return the question without outer white space, or raise BadQuestion."""
    if not isinstance(question, str) or not question.strip():
        raise BadQuestion("the question is empty: type one")
    if len(question) > MAX_QUESTION:
        raise BadQuestion(f"the question has {len(question):,} characters; at most {MAX_QUESTION:,} are taken")
    return clean(question.strip())


class AnswerKeys(NamedTuple):
    """The keys of one answer. The braces are a hash tag: Redis Cluster keeps all of them on one node."""

    chunks: str  # stream: the answer
    question: str  # string: the JSON record
    cancel: str  # string: Stop, from anyone
    cleared: str  # string: the last attempt of an answer that was deleted; the next one of this id counts on from it
    lease_prefix: str

    def lease(self, attempt: int) -> str:
        """The key that lives only as long as that attempt's producer does; of attempt 0, as long as who asks."""
        return f"{self.lease_prefix}{attempt}"


@dataclass(frozen=True)
class Names:
    """All keys under one prefix; raises BadPrefix for one that can't be used."""

    prefix: str = "llmstream"

    def __post_init__(self) -> None:
        # Braces would move the hash tag, the rest are glob characters.
        if not self.prefix or set(self.prefix) & set("{}*?[]\\ \t\r\n"):
            rule = "must not be empty or hold spaces, braces or any of * ? [ ] \\"
            raise BadPrefix(f"the key prefix {self.prefix!r} {rule}: set LLMSTREAM_PREFIX, or `prefix`, anew")

    def answer(self, answer_id: str) -> AnswerKeys:
        """The keys of one answer; raises BadAnswerId."""
        base = f"{self.prefix}:{{{check_answer_id(answer_id)}}}"
        return AnswerKeys(*(f"{base}:{name}" for name in ("chunks", "question", "cancel", "cleared", "lease:")))

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

    def worker(self, name: str) -> str:
        """String: the sign of life of one worker of the pool, its lease in milliseconds, or that it is to end."""
        return f"{self.prefix}:{{{self.questions}}}:worker:{name}"


POOL = "llm-workers"  # the consumer group on the queue
DAY = 86_400  # seconds by which a worker's sign of life outlives its lease, to tell the dead from strangers

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


class Entry(NamedTuple):
    """One entry of an answer's stream.

    All entries have the same three fields: Redis stores the names once per node of the stream,
    which halves the memory of entries as small as tokens.
    """

    id: EntryID
    kind: str  # start, end, error, or that of a part: text, reasoning, refusal, call, result; later ones may follow
    text: str  # the delta; for start, end, error, call and result a JSON object
    ms: int  # milliseconds since the attempt's start

    @property
    def final(self) -> bool:
        """Whether this entry ends the answer."""
        return self.kind in ("end", "error")

    @property
    def data(self) -> dict[str, Any]:
        """The JSON object of an entry that holds one; raises NotAnAnswer."""
        data = _tidy_object(self.text)
        if data is None:
            raise NotAnAnswer(f"entry {self.id} of kind {self.kind!r} holds no JSON object")
        return data

    @classmethod
    def parse(cls, raw_id: str, fields: Mapping[str, str]) -> Entry:
        """Read an entry as redis-py returns it; raises NotAnAnswer."""
        try:
            return cls(EntryID.parse(raw_id), fields["kind"], fields["text"], parse_ms(fields["ms"]))
        except (KeyError, ValueError, TypeError):
            raise NotAnAnswer(f"entry {raw_id} is not the kit's: it needs the fields kind, text and ms") from None


def parse_ms(text: str) -> int:
    """The milliseconds of an entry, not larger than a number in JSON may be; raises ValueError or TypeError."""
    number = int(text)
    if -LARGEST <= number <= LARGEST:
        return number
    return LARGEST if number > 0 else -LARGEST


RawEntry = tuple[str, Mapping[str, str] | None]  # ID and fields, as redis-py gives them


def parse_entries(raw: Iterable[RawEntry]) -> list[Entry]:
    """Read the entries of an XRANGE, XREVRANGE or XREAD reply; deleted ones (null fields) are left out."""
    return [Entry.parse(raw_id, fields) for raw_id, fields in raw or () if fields]


def parse_record(text: str | None) -> dict[str, Any] | None:
    """The question's JSON record; None where there is none or where it is no JSON object."""
    return _tidy_object(text) if text else None


def same_question(record: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records are of one question: an id may be used again, once its answer was deleted."""
    return all(record.get(name) == other.get(name) for name in ("nonce", "asked"))


def first_attempt(record: Mapping[str, Any]) -> int:
    """The number that a question's attempts begin with: 1, or more where the id was used before."""
    first = record.get("first")
    return first if isinstance(first, int) and first > 0 else 1


def newest_attempt(record: Mapping[str, Any]) -> int:
    """The highest attempt that a record tells of, by its opening or by its end; 0 where it tells of none."""
    attempt, end = record.get("attempt"), str(record.get("end") or "").partition("-")[0]
    return max(attempt if isinstance(attempt, int) else 0, int(end) if end.isdecimal() and len(end) < 20 else 0)


def cleared_attempt(value: Any) -> int:
    """The number that `clear` left behind: attempts up to it are void. 0 where it left none."""
    return int(value) if isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value) else 0


class Signs(NamedTuple):
    """What one look at Redis tells of an answer."""

    top: Entry | None  # the stream's last entry
    leased: bool  # whether the lease of the attempt that the reader has come to lives
    record: Mapping[str, Any] | None  # the question's JSON
    cleared: int = 0  # the attempt up to which `clear` has deleted them; 0: none

    @classmethod
    def parse(cls, replies: Sequence[Any]) -> Signs:
        """Read the replies to `Round.look`; raises NotAnAnswer."""
        newest, leased, record, cleared = replies
        top = parse_entries(newest)
        return cls(top[0] if top else None, bool(leased), parse_record(record), cleared_attempt(cleared))

    @property
    def first(self) -> int:
        """The number that the question's attempts begin with: 1, or more where the id was used before."""
        return first_attempt(self.record or {})


def _tidy_object(text: str) -> dict[str, Any] | None:
    """The JSON object in a text that anybody may have written; None for anything else.

    What could break whoever passes it on is made harmless: numbers that are none become None, halves of surrogate pairs
    U+FFFD, and what is nested deeper than any entry or record of the kit is dropped.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return _tidy(data, DEEPEST) if isinstance(data, dict) else None


def _tidy(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean(name): _tidy(item, depth - 1) for name, item in value.items()} if depth else None
    if isinstance(value, list):
        return [_tidy(item, depth - 1) for item in value] if depth else None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not abs(value) < LARGEST:
        return None  # also NaN
    return value


def clean(text: str) -> str:
    """Join surrogate pairs and turn unpaired surrogates into U+FFFD, since UTF-8 can't hold them."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        # The UTF-16 decoder pairs surrogates; what it can't pair comes through surrogatepass as it was.
        paired = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        return re.sub("[\ud800-\udfff]", "\ufffd", paired)


def printable(text: str) -> str:
    """`text` in one line, without control characters and halves of surrogate pairs."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


# Found here, not where it is used: that is a thread, and an interrupt during an import in a notebook may leave Python's
# lock on imports taken, so that no other thread can import any more.
UTF16 = codecs.getincrementaldecoder("utf-16-le")


class Joiner:
    """Join an emoji whose two surrogates came in two deltas: JSON's \\u escapes allow that split."""

    def __init__(self) -> None:
        self._decoder = UTF16("surrogatepass")

    def push(self, delta: str, last: bool = False) -> str:
        """Return the text that can be written now; a leading half is held back until its other half comes."""
        return clean(self._decoder.decode(delta.encode("utf-16-le", "surrogatepass"), last))

    def flush(self) -> str:
        """Return what is still held, once no more deltas come."""
        return self.push("", last=True)
