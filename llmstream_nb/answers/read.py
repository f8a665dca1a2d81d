"""Read an answer: event by event as it grows, in a thread or in asyncio, or as a whole at one moment."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import redis

from llmstream_nb.answers.connection import LOST, Line, async_client, current, is_passing, names_of, unusable
from llmstream_nb.protocol.events import Event, Gap, parts_of, text_of
from llmstream_nb.protocol.follow import Follower
from llmstream_nb.protocol.parts import parts_of_record
from llmstream_nb.protocol.round import BLOCK, Command, Lost, Patience, Round, Send, rounds
from llmstream_nb.protocol.wire import AnswerNotFound, EntryID, Timing, parse_record


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
    one = _round(answer_id, after, client, timing)
    steps, line, retry = (
        rounds(one, Patience(one.follower, timeout, time.monotonic), longest_block(client)),
        Line(client, one.keys.chunks),
        Backoff(timing),
    )
    try:
        step = next(steps)
        while True:
            if not isinstance(step, Send):
                yield from step
                step = next(steps)
                continue
            try:
                replies = send(line.redis, step.commands)
            except LOST as error:
                if not is_passing(error, line.worked) or not retry.sleep():
                    raise unusable(error, client) from None
                line.reopen()
                step = steps.throw(Lost())
            else:
                retry.reset()
                step = steps.send(replies)
    except StopIteration:
        return
    finally:
        line.close()


async def aread_answer(
    answer_id: str,
    after: str = "0-0",
    *,
    timeout: float | None = None,
    client: redis.Redis | None = None,
    timing: Timing | None = None,
) -> AsyncIterator[Event]:
    """Yield an answer's events from entry `after` on, and wait for more until it ends: `read_answer` for asyncio.

    `async for event in aread_answer("tour"): …` reads without holding up the other tasks of the event loop.

    `client` is one of `connect`; this reader opens a connection of its own to the same Redis, and closes it at the
    end. Arguments, events and errors are those of `read_answer`.
    """
    client, timing = client or current(), timing or Timing()
    one = _round(answer_id, after, client, timing)
    steps, line, retry = (
        rounds(one, Patience(one.follower, timeout, time.monotonic), longest_block(client)),
        async_client(client, 1),
        Backoff(timing),
    )
    task = asyncio.current_task()
    cancelled = task.cancelling() if task else 0
    worked = False
    try:
        step = next(steps)
        while True:
            if not isinstance(step, Send):
                for event in step:
                    yield event
                step = next(steps)
                continue
            try:
                replies = await asend(line, step.commands)
            except LOST as error:
                pauses: list[float] = []
                if not is_passing(error, worked) or not retry.sleep(pauses.append):
                    raise unusable(error, client) from None
                await asyncio.sleep(*pauses)
                step = steps.throw(Lost())
            else:
                retry.reset()
                worked, step = True, steps.send(replies)
            if task and task.cancelling() > cancelled:
                raise asyncio.CancelledError  # redis-py swallows one that meets it while it connects
    except StopIteration:
        return
    finally:
        await line.aclose()


def _round(answer_id: str, after: str, client: redis.Redis, timing: Timing) -> Round:
    return Round(names_of(client).answer(answer_id), Follower(answer_id, EntryID.parse(after), timing))


def send(client: redis.Redis, commands: Sequence[Command]) -> list[Any]:
    """The replies to these commands, sent in one go. Redis errors pass."""
    if len(commands) == 1:
        return [client.execute_command(*commands[0])]
    with client.pipeline(transaction=False) as pipe:
        for command in commands:
            pipe.execute_command(*command)
        return pipe.execute()


async def asend(client: Any, commands: Sequence[Command]) -> list[Any]:
    """`send` for a client of redis.asyncio."""
    if len(commands) == 1:
        return [await client.execute_command(*commands[0])]
    pipe = client.pipeline(transaction=False)
    for command in commands:
        pipe.execute_command(*command)
    return list(await pipe.execute())


def send_all(client: redis.Redis, asked: Sequence[Sequence[Command]]) -> list[list[Any]]:
    """The replies to the commands of many, sent in one go; errors are among them, but one that may pass is raised."""
    with client.pipeline(transaction=False) as pipe:
        for command in chain.from_iterable(asked):
            pipe.execute_command(*command)
        return _deal(asked, pipe.execute(raise_on_error=False))


async def asend_all(client: Any, asked: Sequence[Sequence[Command]]) -> list[list[Any]]:
    """`send_all` for a client of redis.asyncio."""
    pipe = client.pipeline(transaction=False)
    for command in chain.from_iterable(asked):
        pipe.execute_command(*command)
    return _deal(asked, await pipe.execute(raise_on_error=False))


def _deal(asked: Sequence[Sequence[Command]], replies: list[Any]) -> list[list[Any]]:
    rest = iter(passing_raised(replies))
    return [list(islice(rest, len(commands))) for commands in asked]


def passing_raised(replies: list[Any]) -> list[Any]:
    """The replies of a pipeline, errors among them; but one that may pass by itself is raised."""
    for reply in replies:
        if isinstance(reply, Exception) and is_passing(reply):
            raise reply
    return replies


def longest_block(client: redis.Redis) -> float:
    """Seconds that a read may block on this client: well below its socket timeout."""
    limit = client.get_connection_kwargs().get("socket_timeout") or 2 * BLOCK
    return min(BLOCK, limit / 2)


class Look(NamedTuple):
    """An answer at one moment."""

    status: str  # queued, streaming, interrupted, ended, failed; missing where there is none
    text: str  # the text so far
    record: dict[str, Any]  # the question's JSON record; {} where there is none
    top: EntryID  # the last entry read
    missing: int  # entries that are gone from the stream and could not be had from the record


def look(answer_id: str, client: redis.Redis | None = None) -> Look:
    """Read all of an answer without waiting. Raises RedisUnusable, NotAnAnswer or BadAnswerId."""
    return look_and_events(answer_id, client or current())[0]


def look_and_events(answer_id: str, client: redis.Redis) -> tuple[Look, list[Event]]:
    """`look`, and the events that tell it."""
    one = _round(answer_id, "0-0", client, Timing())
    follower, events, silent = one.follower, list[Event](), 0
    try:
        while not follower.done and silent < 2:  # silent twice: one more read decides whether it is interrupted
            replies = send(client, [one.read()])
            if not one.entries(replies[0]):
                replies += send(client, one.look())
            news = one.hear(replies, time.monotonic())
            events += news
            silent = 0 if news else silent + 1
        record = parse_record(client.get(one.keys.question)) or {}  # type: ignore[arg-type]
    except AnswerNotFound:
        return Look("missing", "", {}, follower.cursor.after, 0), []
    except LOST as error:
        raise unusable(error, client) from None
    text, whole, top = text_of(events), record.get("text"), follower.cursor.after
    missing = sum(event.missing for event in events if isinstance(event, Gap))
    if missing and follower.done and isinstance(whole, str):
        recorded, held = parts_of_record(record, top), parts_of(events)
        if sum(len(part.text) for part in recorded) > sum(len(part.text) for part in held):  # else it has the same hole
            text, missing = whole, 0
    return Look(follower.state, text, record, top, missing), events


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
