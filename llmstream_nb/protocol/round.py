"""One round of reading an answer: read; if that brings nothing, look for signs of life; judge. No I/O happens here.

A round names the commands, and is handed their replies. Who sends them is the driver's business: one reader in a
thread, one in asyncio, or one pipeline for many answers at once.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

from llmstream_nb.protocol.events import Event
from llmstream_nb.protocol.follow import Follower
from llmstream_nb.protocol.wire import ORIGIN, AnswerKeys, LLMStreamError, RawEntry, Signs, parse_record

COUNT = 500  # entries a read: one round trip for many tokens, still small in memory
BLOCK = 1.0  # seconds a read may block: well below redis-py's socket timeout of 5 s
SOON = 0.05  # seconds that it may block where the next read decides whether a producer is dead
LOOK = 0.25  # seconds between two looks, for those who read without blocking

Command = tuple[Any, ...]  # its name and its arguments


class StillWaiting(LLMStreamError, TimeoutError):
    """The answer did not begin, or did not end, in the time that the reader had."""


class Lost(Exception):
    """The connection broke; the driver throws this into `rounds` once it has a new one."""


class Round:
    """A reader's rounds on one answer, one after the other: what to send, and what the replies mean."""

    def __init__(self, keys: AnswerKeys, follower: Follower, count: int = COUNT, at_once: bool = False) -> None:
        self.keys, self.follower, self.count = keys, follower, count
        self.at_once = at_once  # an ended answer is taken from its record, however many entries it has
        self.signs = Signs(None, False, None)  # as of the last look
        self.look_at = 0.0  # monotonic time from which on `ask` looks again

    def read(self, block: float | None = None) -> Command:
        """XREAD from the cursor on, waiting up to `block` seconds; never 0, which is for ever."""
        wait = () if block is None else ("BLOCK", max(1, int(block * 1000)))
        return ("XREAD", *wait, "COUNT", self.count, "STREAMS", self.keys.chunks, str(self.follower.cursor.after))

    def look(self) -> list[Command]:
        """What tells whether a silent answer lives: its last entry, its lease, its record, if it was deleted."""
        chunks, question, _, cleared, _ = self.keys
        lease = self.keys.lease(self.follower.cursor.after.attempt)
        return [("XREVRANGE", chunks, "+", "-", "COUNT", 1), ("EXISTS", lease), ("GET", question), ("GET", cleared)]

    def ask(self, now: float) -> list[Command]:
        """Both at once, for those who don't wait: the read, and the look if one is due at `now` (monotonic seconds)."""
        if now < self.look_at:
            return [self.read()]
        self.look_at = now + LOOK
        return [self.read(), *self.look()]

    def entries(self, reply: Any) -> list[RawEntry]:
        """The entries in the reply to `read`, as redis-py gives them."""
        return reply[0][1] if reply else []

    def hear(self, replies: Sequence[Any], now: float) -> list[Event]:
        """What the reply to `read`, and behind it those to `look` if one was sent, mean for the reader.

        A reply that is an error is raised; so is AnswerNotFound, and NotAnAnswer for entries that are not the kit's.
        """
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        found, *signs = replies
        raw = self.entries(found)
        if signs and self.at_once and self.follower.cursor.after == ORIGIN:
            record = parse_record(signs[2]) or {}
            if _is_whole(record):
                return self.follower.from_record(record)
        if raw:
            return self.follower.feed(raw)
        return self.judge(signs, now) if signs else []

    def judge(self, signs: Sequence[Any], now: float, glance: bool = False) -> list[Event]:
        """What the replies to `look` mean; with `glance`, for a follower that doesn't read the entries itself."""
        self.signs = Signs.parse(signs)
        judge = self.follower.glance if glance else self.follower.silence
        return judge(self.signs, now)


def _is_whole(record: dict[str, Any]) -> bool:
    """Whether a record has all of an ended answer."""
    return bool(record.get("end") and isinstance(record.get("text"), str) and not record.get("missing"))


class Send(NamedTuple):
    """Commands of one round trip; the driver sends back the list of their replies."""

    commands: list[Command]


class Patience:
    """How long a reader waits: for the end, for somebody to begin, for somebody to take over. `clock`: seconds."""

    def __init__(self, follower: Follower, timeout: float | None, clock: Callable[[], float]) -> None:
        self._follower, self._timeout, self.clock = follower, timeout, clock
        self._began = self._alive = clock()

    @property
    def doubt(self) -> bool:
        """Whether the next read decides if the producer is dead."""
        return self._follower.suspect and self._follower.state != "interrupted"

    def pause(self, longest: float = BLOCK) -> float:
        """Seconds that the next read may wait."""
        return SOON if self.doubt else min(longest, longest if self._timeout is None else self._timeout)

    def heard(self, anything: bool) -> None:
        """A read, and the look after it, brought something or nothing."""
        if anything or self._follower.state == "streaming":
            self._alive = self.clock()

    def lost(self) -> None:
        """The connection broke, and there is a new one; raises StillWaiting when it is time to."""
        self._alive = self.clock()
        self._follower.reconnected(self._alive)
        self.check()

    def check(self) -> None:
        """Raise StillWaiting when the caller's time is over."""
        if self._timeout is not None and self.clock() - self._began > self._timeout:
            raise StillWaiting(f"{self._follower.answer_id!r} has not ended within {self._timeout:g} s; it goes on")

    def is_over(self) -> bool:
        """Whether a producer has been dead for too long; raises StillWaiting where nobody has begun for as long."""
        patience, queued = self._follower.timing.patience, self._follower.state == "queued"
        # Whoever named a time may wait that long for a busy pool.
        if self.clock() - self._alive <= patience or (self._timeout and queued):
            return False
        if queued:
            raise StillWaiting(f"nobody began to answer {self._follower.answer_id!r} within {patience:g} s")
        return True


def rounds(one: Round, patience: Patience, block: float = BLOCK) -> Generator[Send | list[Event], list[Any], None]:
    """Read, look and judge until the answer has ended, or patience has.

    Yields what the driver is to send, and lists of events for the caller; `block` is the longest that a read may
    wait, in seconds. Raises StillWaiting, AnswerNotFound or NotAnAnswer; Lost may be thrown in.
    """
    follower, clock, silent = one.follower, patience.clock, 0  # silent: rounds without an event, lately
    while not follower.done:
        try:
            replies = yield Send([one.read(patience.pause(block))])
            if not (raw := one.entries(replies[0])):
                replies = replies + (yield Send(one.look()))
        except Lost:
            patience.lost()
            continue
        events = one.hear(replies, clock())
        silent = 0 if events else silent + 1
        patience.heard(bool(events))
        yield events
        # What lies there is read to its end first; and where the next read decides, it may.
        if not follower.done and len(raw) < one.count and (events or silent > 1 or not patience.doubt):
            patience.check()
        if patience.is_over():
            return
