"""Read an answer: entry by entry as it grows, or as a whole at one moment."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import redis
from redis.exceptions import RedisError

from llmstream_nb.answers.connection import Line, current, is_passing, names_of, unusable
from llmstream_nb.answers.record import parse_record
from llmstream_nb.protocol.events import Event, Gap, text_of
from llmstream_nb.protocol.follow import Follower, Signs
from llmstream_nb.protocol.wire import AnswerKeys, AnswerNotFound, EntryID, LLMStreamError, Timing, parse_entries

COUNT = 500  # entries a read: one round trip for many tokens, still small in memory
BLOCK = 1.0  # seconds a read may block: well below redis-py's socket timeout of 5 s


class StillWaiting(LLMStreamError, TimeoutError):
    """The answer did not begin, or did not end, in the time that the reader had."""


def read_answer(
    answer_id: str,
    after: str = "0-0",
    *,
    timeout: float | None = None,
    client: redis.Redis | None = None,
    timing: Timing | None = None,
) -> Iterator[Event]:
    """Yield the events of an answer from the entry after `after` on, waiting for new ones, until its end.

    `for event in read_answer("tour"): print(event)` shows `Started`, a `Text` for each piece, and `Ended`. Each has
    an `id`, and the last one you saw is the `after` with which to go on later. `Restarted` says that another attempt
    begins, so the text so far is void; `Gap` says how many entries are missing.

    Reads with XREAD … BLOCK on a connection of its own. The last event tells how it went: `Ended`, `Failed`, or
    `Interrupted` if the producer died and nobody took over within `timing.patience` seconds.

    Raises:
        AnswerNotFound: there is no such answer.
        StillWaiting: it has not ended after `timeout` seconds; without that, nobody began to answer within
            `timing.patience` seconds.
        RedisUnusable: Redis stayed away for `timing.give_up` seconds, or refused.
        NotAnAnswer, BadAnswerId, BadEntryID: the stream, the id or `after` is not the kit's.
    """
    client, timing = client or current(), timing or Timing()
    keys = names_of(client).answer(answer_id)
    follower = Follower(answer_id, EntryID.parse(after), timing)
    line, retry = Line(client, keys.chunks), Backoff(timing)
    began = alive = time.monotonic()
    try:
        while not follower.done:
            if timeout is not None and time.monotonic() - began > timeout:
                raise StillWaiting(f"{answer_id!r} has not ended within {timeout:g} s; it goes on")
            try:
                doubt = follower.suspect and follower.state != "interrupted"
                events = read_once(line.redis, keys, follower, block=0.05 if doubt else min(BLOCK, timeout or BLOCK))
            except (RedisError, OSError, AttributeError) as error:
                if not is_passing(error) or not retry.sleep():
                    raise unusable(error, client) from None
                line.reopen()
                follower.reconnected(time.monotonic())
                continue
            retry.reset()
            if events or follower.state == "streaming":
                alive = time.monotonic()
            yield from events
            # Whoever named a time may wait that long for a busy pool.
            if time.monotonic() - alive > timing.patience and not (timeout and follower.state == "queued"):
                if follower.state == "queued":
                    raise StillWaiting(f"nobody began to answer {answer_id!r} within {timing.patience:g} s")
                return
    finally:
        line.close()


def read_once(client: redis.Redis, keys: AnswerKeys, follower: Follower, block: float | None = None) -> list[Event]:
    """One read for a follower: XREAD, and if it brings nothing a look at the signs of life. Redis errors pass."""
    wait = None if block is None else blocking(client, block)
    reply: Any = client.xread({keys.chunks: str(follower.cursor.after)}, count=COUNT, block=wait)
    if reply and reply[0][1]:
        return follower.feed(reply[0][1])
    with client.pipeline(transaction=False) as pipe:
        queue_look(pipe, keys, follower)
        return take_look(pipe.execute(), follower)


def blocking(client: redis.Redis, seconds: float) -> int:
    """Milliseconds for BLOCK: well below the client's socket timeout, and never 0, which waits for ever."""
    limit = client.connection_pool.connection_kwargs.get("socket_timeout") or 2 * BLOCK
    return max(1, int(min(seconds, limit / 2) * 1000))


def queue_look(pipe: Any, keys: AnswerKeys, follower: Follower) -> None:
    """Queue the four commands that tell whether a silent answer lives."""
    pipe.xrevrange(keys.chunks, count=1)
    pipe.exists(keys.lease(max(1, follower.cursor.after.attempt)))
    pipe.get(keys.question)
    pipe.exists(keys.cancel)


def take_look(replies: list[Any], follower: Follower, glance: bool = False) -> list[Event]:
    """Judge the replies to `queue_look`; with `glance`, for a follower that does not read the entries itself."""
    top, leased, record, cancelled = replies
    entries = parse_entries(top)
    signs = Signs(entries[0] if entries else None, bool(leased), parse_record(record), bool(cancelled))
    judge = follower.glance if glance else follower.silence
    return judge(signs, time.monotonic())


class Look(NamedTuple):
    """An answer at one moment."""

    status: str  # queued, streaming, interrupted, ended, failed; missing where there is none
    text: str  # the text so far
    record: dict[str, Any]  # the question's JSON record; {} where there is none
    top: EntryID  # the last entry read
    missing: int  # entries that are gone from the stream and could not be had from the record


def look(answer_id: str, client: redis.Redis | None = None) -> Look:
    """Read all of an answer without waiting. Raises RedisUnusable, NotAnAnswer or BadAnswerId."""
    client = client or current()
    keys = names_of(client).answer(answer_id)
    follower = Follower(answer_id)
    text, missing, silent = "", 0, 0
    try:
        while not follower.done and silent < 2:  # silent twice: one more read decides whether it is interrupted
            events = read_once(client, keys, follower)
            text = text_of(events, text)
            missing += sum(event.missing for event in events if isinstance(event, Gap))
            silent = 0 if events else silent + 1
        record = parse_record(client.get(keys.question)) or {}  # type: ignore[arg-type]
    except AnswerNotFound:
        return Look("missing", "", {}, follower.cursor.after, 0)
    except (RedisError, OSError, AttributeError) as error:
        raise unusable(error, client) from None
    whole = record.get("text")
    if missing and follower.done and isinstance(whole, str) and len(whole) > len(text):  # else it has the same hole
        text, missing = whole, 0
    return Look(follower.state, text, record, follower.cursor.after, missing)


class Backoff:
    """Growing, jittered pauses between tries, until `give_up` seconds have passed since the first failure.

    They stay well below the lease: who comes back must show it before others count him as dead.
    """

    def __init__(self, timing: Timing) -> None:
        self._give_up, self._longest = timing.give_up, min(1.0, timing.lease / 4)
        self.reset()

    def reset(self) -> None:
        """A try succeeded."""
        self._delay, self._deadline = 0.0, 0.0

    def sleep(self, wait: Callable[[float], object] = time.sleep) -> bool:
        """Pause before the next try (`wait` is given the seconds); False when it is time to give up."""
        now = time.monotonic()
        self._deadline = self._deadline or now + self._give_up
        if now >= self._deadline:
            return False
        wait(min(random.uniform(self._delay / 2, self._delay), self._deadline - now))
        self._delay = min(max(0.02, 2 * self._delay), self._longest)
        return True
