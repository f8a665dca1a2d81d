"""Read an answer in asyncio: the cursor and the judgement of `read.py`, over redis.asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import redis
import redis.asyncio as aredis
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException, RedisError
from redis.retry import Retry

from llmstream_nb.answers.connection import current, environment_of, is_passing, names_of, unusable
from llmstream_nb.answers.read import BLOCK, COUNT, Backoff, StillWaiting, blocking, queue_look, take_look
from llmstream_nb.protocol.events import Event
from llmstream_nb.protocol.follow import Follower
from llmstream_nb.protocol.wire import AnswerKeys, EntryID, Timing

LOST = (RedisError, RedisClusterException, OSError, AttributeError)  # the last: how fakeredis meets a wrong type


async def aread_answer(
    answer_id: str,
    after: str = "0-0",
    *,
    client: redis.Redis | None = None,
    timing: Timing | None = None,
    timeout: float | None = None,
) -> AsyncIterator[Event]:
    """Yield an answer's events from entry `after` on, and wait for more until it ends: `read_answer` for asyncio.

    `async for event in aread_answer("tour"): …` reads without holding up the other tasks of the event loop.

    `client` is one of `connect`; this reader opens a connection of its own to the same Redis, and closes it at the
    end. Arguments, events and errors are those of `read_answer`.
    """
    client, timing = client or current(), timing or Timing()
    keys = names_of(client).answer(answer_id)
    follower, retry = Follower(answer_id, EntryID.parse(after), timing), Backoff(timing)
    line = async_client(client, 1)
    began = alive = time.monotonic()
    try:
        while not follower.done:
            if timeout is not None and time.monotonic() - began > timeout:
                raise StillWaiting(f"{answer_id!r} has not ended within {timeout:g} s; it goes on")
            doubt = follower.suspect and follower.state != "interrupted"
            block = 0.05 if doubt else min(BLOCK, timeout or BLOCK)
            try:
                events = await read_once(line, keys, follower, blocking(client, block))
            except LOST as error:
                error, pauses = as_redis_error(error), list[float]()
                if not is_passing(error) or not retry.sleep(pauses.append):
                    raise unusable(error, client) from None
                await asyncio.sleep(*pauses)
                follower.reconnected(time.monotonic())
                continue
            retry.reset()
            if events or follower.state == "streaming":
                alive = time.monotonic()
            for event in events:
                yield event
            if time.monotonic() - alive > timing.patience and not (timeout and follower.state == "queued"):
                if follower.state == "queued":
                    raise StillWaiting(f"nobody began to answer {answer_id!r} within {timing.patience:g} s")
                return
    finally:
        await line.aclose()


async def read_once(
    line: Any, keys: AnswerKeys, follower: Follower, block: int | None = None, count: int = COUNT
) -> list[Event]:
    """One read for a follower, and a look where it brings nothing; `block` in milliseconds. Redis errors pass."""
    reply = await line.xread({keys.chunks: str(follower.cursor.after)}, count=count, block=block)
    if reply and reply[0][1]:
        return follower.feed(reply[0][1])
    pipe = line.pipeline(transaction=False)
    queue_look(pipe, keys, follower)
    return take_look(await pipe.execute(), follower)


def async_client(client: redis.Redis, connections: int) -> Any:
    """A redis.asyncio client of the server that `client` talks to, with at most so many connections; no retries.

    Every loss surfaces as an error, so that a reader knows when it has to wait before it declares anyone dead.
    """
    cluster = isinstance(client, redis.RedisCluster)
    given = client.nodes_manager.connection_kwargs if cluster else client.connection_pool.connection_kwargs
    kept = {name: value for name, value in given.items() if name.startswith("ssl_") or name in _KEPT}
    settings = kept | {"decode_responses": True, "encoding_errors": "backslashreplace", "protocol": 2}
    url = environment_of(client)["REDIS_URL"]
    if cluster:
        return aredis.RedisCluster.from_url(url, max_connections=connections, **settings)
    pool = aredis.BlockingConnectionPool.from_url(
        url, max_connections=connections, timeout=30, retry=Retry(NoBackoff(), 0), **settings
    )
    return aredis.Redis.from_pool(pool)


_KEPT = {"socket_timeout", "socket_connect_timeout", "username", "password"}


def as_redis_error(error: Exception) -> Exception:
    """The error as other clients raise it: a cluster's own is no RedisError."""
    return redis.ConnectionError(str(error)) if isinstance(error, RedisClusterException) else error
