"""One round of reading an answer: read; if that brings nothing, look for signs of life; judge. No I/O happens here.

A round names the commands, and is handed their replies. Who sends them is the driver's business: one reader in a
thread, one in asyncio, or one pipeline for many answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

from llmstream_nb.protocol.events import Event
from llmstream_nb.protocol.follow import Follower
from llmstream_nb.protocol.wire import (
    ORIGIN,
    AnswerKeys,
    LLMStreamError,
    RawEntry,
    cleared_attempt,
    parse_entries,
    parse_record,
)

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
        self.record: dict[str, Any] | None = None  # as of the last look
        self.leased = False
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
        if signs and self.at_once and self.follower.cursor.after == ORIGIN and _is_whole(parse_record(signs[2])):
            return self.follower.from_record(parse_record(signs[2]) or {})
        if raw:
            return self.follower.feed(raw)
        return self.judge(signs, now) if signs else []

    def judge(self, signs: Sequence[Any], now: float, glance: bool = False) -> list[Event]:
        """What the replies to `look` mean; with `glance`, for a follower that doesn't read the entries itself."""
        entries, self.leased, self.record = parse_entries(signs[0]), bool(signs[1]), parse_record(signs[2])
        judge = self.follower.glance if glance else self.follower.silence
        deleted = cleared_attempt(signs[3]) >= self.follower.cursor.after.attempt
        return judge(entries[0] if entries else None, self.leased, self.record, deleted, now)


def _is_whole(record: dict[str, Any] | None) -> bool:
    """Whether a record has all of an ended answer."""
    return bool(record and record.get("end") and isinstance(record.get("text"), str) and not record.get("missing"))


class Send(NamedTuple):
    """Commands of one round trip; the driver sends back the list of their replies."""

    commands: list[Command]


def rounds(
    one: Round, timeout: float | None, clock: Callable[[], float], block: float = BLOCK
) -> Generator[Send | list[Event], list[Any], None]:
    """Read, look and judge until the answer has ended, or patience has.

    Yields what the driver is to send, and lists of events for the caller; `block` is the longest that a read may
    wait, `clock` tells monotonic seconds. Raises StillWaiting, AnswerNotFound or NotAnAnswer; Lost may be thrown in.
    """
    follower, patience, name = one.follower, one.follower.timing.patience, repr(one.follower.answer_id)
    began = alive = clock()
    silent = 0  # rounds without an event, lately
    while not follower.done:
        doubt = follower.suspect and follower.state != "interrupted"
        try:
            replies = yield Send([one.read(SOON if doubt else min(block, timeout or block))])
            if not (raw := one.entries(replies[0])):
                replies = replies + (yield Send(one.look()))
        except Lost:
            follower.reconnected(clock())
            continue
        events = one.hear(replies, clock())
        silent = 0 if events else silent + 1
        if events or follower.state == "streaming":
            alive = clock()
        yield events
        # What lies there is read to its end first; and where the next read decides, it may.
        settled = len(raw) < one.count and (bool(events) or silent > 1 or not follower.suspect)
        if timeout is not None and clock() - began > timeout and settled and not follower.done:
            raise StillWaiting(f"{name} has not ended within {timeout:g} s; it goes on")
        # Whoever named a time may wait that long for a busy pool.
        if clock() - alive > patience and not (timeout and follower.state == "queued"):
            if follower.state == "queued":
                raise StillWaiting(f"nobody began to answer {name} within {patience:g} s")
            return
