"""aread_answer: what read_answer tells, in asyncio, whatever Redis does, and without leaving anything behind."""

from __future__ import annotations

import asyncio

import pytest

from llmstream_nb.answers.connection import RedisUnusable, connect, names_of
from llmstream_nb.answers.read import aread_answer, read_answer
from llmstream_nb.faults import servers
from llmstream_nb.protocol.events import Ended, Interrupted, Restarted, Started, Text, text_of
from llmstream_nb.protocol.round import StillWaiting
from llmstream_nb.protocol.wire import AnswerNotFound, BadAnswerId, BadEntryID, EntryID, NotAnAnswer, Timing

from . import model
from .conftest import FAST
from .model import Model, stream_of
from .versions import SERVERS
from .web import Writer, until


@pytest.fixture(params=["fake", *SERVERS])
def backend(request) -> str:
    """This reader always goes through TCP: `fake-tcp` would be the same again."""
    return request.param


async def gather(answer_id: str, after: str = "0-0", **options) -> list:
    return [event async for event in aread_answer(answer_id, after, **{"timing": FAST} | options)]


def everything(answer_id: str, after: str = "0-0", **options) -> list:
    return asyncio.run(asyncio.wait_for(gather(answer_id, after, **options), 60))


@pytest.mark.slow
def test_the_same_events_as_read_answer_from_every_cursor(client):
    writer = Writer(client, "a").say("thrown ", "away")
    writer.begin().say("\n", "👋", "\0", "", "gone", "x").end()
    client.xdel(writer.keys.chunks, "2-5")
    Writer(client, "f").say("half").end(error="Refused", message="no")
    cursors = [(i, c) for i in "af" for c in ("0-0", *(str(entry.id) for entry in stream_of(client, i)))]

    async def main() -> list[list]:
        read = [asyncio.to_thread(lambda *a: list(read_answer(*a, timing=FAST)), *cursor) for cursor in cursors]
        return await asyncio.gather(*read, *(gather(*cursor) for cursor in cursors))

    found = asyncio.run(main())
    assert found[: len(cursors)] == found[len(cursors) :] and all(found)
    assert text_of(found[0]) == "\n👋\0x"
    client.delete(*(names_of(client).answer(i).chunks for i in "af"))  # now from the record
    again = asyncio.run(main())
    assert again[: len(cursors)] == again[len(cursors) :] and all(again)
    assert text_of(again[0]) == "\n👋\0gonex"


def test_events_come_while_the_answer_is_written(client, no_leftovers):
    says = Model("a")
    model.start(client, says, FAST)
    seen = []

    async def main() -> None:
        async for event in aread_answer("a", timing=FAST):
            seen.append(event)
            if event == Text("a", EntryID(1, 1), getattr(event, "ms", 0)):
                says.say("b")
            elif isinstance(event, Text):
                says.end()

    asyncio.run(main())
    assert [type(event) for event in seen] == [Started, Text, Text, Ended] and text_of(seen) == "ab"


@pytest.mark.slow
def test_a_new_attempt_is_told(client):
    writer, seen = Writer(client, "a").say("half"), []

    async def main() -> None:
        async for event in aread_answer("a", timing=FAST):
            seen.append(event)
            if isinstance(event, Text) and event.text == "half":
                client.delete(writer.keys.lease(1))
            if isinstance(event, Interrupted):
                writer.begin().say("whole").end()

    asyncio.run(main())
    assert [type(event) for event in seen] == [Started, Text, Interrupted, Restarted, Text, Ended]
    assert text_of(seen) == "whole"


@pytest.mark.slow
def test_a_dead_producer_is_waited_for_a_while(client):
    writer = Writer(client, "a").say("half")
    client.delete(writer.keys.lease(1))
    events = everything("a", timing=Timing(lease=0.3, tick=0.05, patience=0.4))
    assert isinstance(events[-1], Interrupted) and text_of(events) == "half"


def test_a_timeout(client):
    Writer(client, "a").say("half")
    with pytest.raises(StillWaiting, match=r"has not ended within 0\.3 s"):
        everything("a", timeout=0.3)


@pytest.mark.slow
def test_an_answer_that_nobody_begins(client):
    client.set(names_of(client).answer("a").question, '{"id": "a", "pooled": true}')
    with pytest.raises(StillWaiting, match="nobody began"):
        everything("a", timing=Timing(lease=0.3, tick=0.05, patience=0.4))


@pytest.mark.slow
def test_errors_are_those_of_read_answer(client):
    client.set(names_of(client).answer("s").chunks, "a string")
    client.xadd(names_of(client).answer("f").chunks, {"foreign": "fields"}, "1-0")
    for args, error in [
        (("zzz",), AnswerNotFound),
        (("f",), NotAnAnswer),
        (("a b",), BadAnswerId),
        (("zzz", "1"), BadEntryID),
    ]:
        with pytest.raises(error) as told:
            everything(*args)
        with pytest.raises(error) as told_too:
            list(read_answer(*args, timing=FAST))
        assert str(told.value) == str(told_too.value)
    with pytest.raises(RedisUnusable):
        everything("s", timing=Timing(lease=0.3, tick=0.05, give_up=0.5))


@pytest.fixture
def redis_server(program):
    with servers.RedisServer(program, appendfsync="always") as server:
        yield server


def named(redis_server, **options):
    """A client whose connections can be told from those of readers."""
    return connect(redis_server.url, client_name="test", **options)


def readers(client) -> int:
    return sum(not one["name"] for one in client.client_list())


@pytest.mark.parametrize("lossy", [False, True])
def test_redis_restarts_in_the_middle(redis_server, lossy, no_leftovers):
    client, says = named(redis_server), Model("one ", "two ")
    producer = model.start(client, says, FAST)
    seen = []

    async def read() -> None:
        async for event in aread_answer("a", client=client, timing=FAST):
            seen.append(event)  # noqa: PERF401 - one by one

    async def main() -> None:
        reading = asyncio.create_task(read())
        for n in range(3):
            await until(lambda: text_of(seen) == producer.attempt.text != "")
            redis_server.kill()
            says.say(f"{n} ")
            await asyncio.to_thread(redis_server.wipe if lossy else redis_server.start)
        says.end()
        await reading

    asyncio.run(main())
    assert text_of(seen) == producer.attempt.text == "one two 0 1 2 "
    ids = [event.id for event in seen if not isinstance(event, Interrupted)]
    assert ids == [EntryID(1, seq) for seq in range(len(ids))]  # each once


def test_a_redis_that_stays_away_is_said(redis_server):
    client = named(redis_server)
    Writer(client, "a").say("half")
    seen = []

    async def main() -> None:
        async for event in aread_answer("a", client=client, timing=Timing(lease=1, tick=0.05, give_up=0.6)):
            seen.append(event)
            if isinstance(event, Text):
                redis_server.kill()

    with pytest.raises(RedisUnusable):
        asyncio.run(main())
    assert text_of(seen) == "half"


@pytest.mark.slow
def test_a_reader_closes_its_connection_however_it_ends(redis_server):
    client = named(redis_server)
    Writer(client, "a").say("half")
    Writer(client, "e").say("whole").end()

    async def main() -> None:
        assert readers(client) == 0
        await gather("e", client=client)
        await until(lambda: readers(client) == 0)
        closed = aread_answer("a", client=client, timing=FAST)
        await anext(closed)
        assert readers(client) == 1
        await closed.aclose()
        await until(lambda: readers(client) == 0)
        cancelled = asyncio.create_task(gather("a", client=client))
        await until(lambda: readers(client) == 1)
        await asyncio.sleep(0)  # somewhere in its read
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        await until(lambda: readers(client) == 0)
        with pytest.raises(AnswerNotFound):
            await gather("zzz", client=client)
        await until(lambda: readers(client) == 0)

    asyncio.run(main())


def test_100_at_once_read_exactly_on_one_connection_each(redis_server):
    client = named(redis_server)
    writers, most = [Writer(client, f"a{n}") for n in range(10)], []

    async def main() -> list[list]:
        reading = [asyncio.create_task(gather(f"a{n % 10}", client=client)) for n in range(100)]
        for n in range(20):
            for writer in writers:
                writer.say(f"{writer.id}.{n} ")
            await asyncio.sleep(0)
            most.append(readers(client))
        await until(lambda: readers(client) == 100)
        for writer in writers:
            writer.end()
        return await asyncio.gather(*reading)

    for n, events in enumerate(asyncio.run(main())):
        assert text_of(events) == writers[n % 10].text and len(events) == 22
    assert max(most) <= 100


def test_an_event_loop_is_never_held_up(client):
    """Waiting is awaiting: while a reader waits for Redis, others go on."""
    writer = Writer(client, "a").say("half")
    turns = 0

    async def main() -> None:
        nonlocal turns
        reading = asyncio.create_task(gather("a"))
        while not reading.done():
            turns += 1
            if turns == 200:
                await asyncio.to_thread(writer.end)
            await asyncio.sleep(0.001)
        await reading

    asyncio.run(asyncio.wait_for(main(), 60))
    assert turns >= 200
