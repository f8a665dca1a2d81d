"""The web server: exact for every viewer and every cursor, on few connections, whatever clients and Redis do."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import re
import socket
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmstream_nb.answers import connection
from llmstream_nb.answers.ask import Answer, clear
from llmstream_nb.faults import servers
from llmstream_nb.pool.worker import Worker
from llmstream_nb.protocol.events import Ended, Failed, Gap, Interrupted, Restarted, Started, Text
from llmstream_nb.protocol.follow import Follower
from llmstream_nb.protocol.round import Round
from llmstream_nb.protocol.wire import ORIGIN, EntryID, Names, Timing, clean
from llmstream_nb.viewing import broken as last_resort
from llmstream_nb.viewing.transcript import LABELS, NOTES
from llmstream_nb.web import Limits, NotServed, WebServer, admission, app, hub, sse
from llmstream_nb.web.hub import View

from . import model
from .conftest import FAST
from .model import Model, stream_of, wait_for
from .versions import SERVERS
from .web import TOKEN, Parser, Slow, Watcher, Writer, call, head, held, raw, until

ALL = pytest.mark.parametrize("backend", ["fake", *SERVERS], indirect=True)
ODD = ["Hi ", "line\n", "\r\n\r", "\u2028\u2029\x85", "id: 9-9\n\n", "\0", "👋🏽", "data: x", "", " end ", "\ufeff"]


@pytest.fixture
def backend(request) -> str:
    """The fake, unless a test asks for more."""
    return getattr(request, "param", "fake")


@pytest.fixture
def serve(client):
    """Start servers that are stopped at the end."""
    started = []

    def start(**options) -> WebServer:
        started.append(WebServer(**{"client": client, "token": TOKEN, "timing": FAST} | options).start())
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def says(monkeypatch):
    """What answers questions instead of a model: a list of Models, in the order in which they were asked."""
    asked: list[Model] = []

    def complete(question, *, source=None, **options):
        made = Model()
        made.source, made.model, made.options, made.question = source or "test", "test", options, question
        asked.append(made)
        return made

    monkeypatch.setattr("llmstream_nb.llm.sources.complete", complete)
    yield asked
    for made in asked:
        made.close()


def hub_of(server: WebServer) -> hub.Hub:
    return server._server.config.app.state.hub


def channels_of(server: WebServer) -> list[hub.Channel]:
    return list(hub_of(server)._channels.values())


def tasks_of(server: WebServer) -> set[asyncio.Task]:
    return asyncio.all_tasks(server._server.servers[0].get_loop())


def follow(*watchers: Watcher) -> None:
    """Let them all watch to the end."""

    async def main() -> None:
        await asyncio.gather(*(one.run() for one in watchers))

    asyncio.run(main())


def problem(reply, status: int) -> str:
    """Check that it is an error as described; returns its name."""
    assert reply.status == status, reply
    assert set(reply.json) == {"error", "message"} and reply.json["message"], reply
    return reply.json["error"]


# ------------------------------------------------------------------------------------------------- frames


def sent(data: bytes, cut: int = 1 << 30) -> list:
    parser, events = Parser(), []
    for at in range(0, len(data), cut):
        events += parser.feed(data[at : at + cut])
    return events


@given(st.lists(st.text() | st.sampled_from(ODD), max_size=8), st.integers(1, 9))
def test_any_text_comes_out_of_the_frames_as_it_went_in(texts, cut):
    texts = [clean(text) for text in texts]
    events = [Text(text, EntryID(1, seq), seq) for seq, text in enumerate(texts, 1)]
    data = sse.HELLO + b"".join(made.data for made in sse.frames(events))
    got = sent(data, cut)
    assert [json.loads(event.data) for event in got] == [{"text": t, "ms": n} for n, t in enumerate(texts, 1)]
    assert [event.id for event in got] == [f"1-{seq}" for seq in range(1, len(texts) + 1)]
    assert {event.name for event in got} <= {"text"}


def test_the_parser_of_these_tests_reads_the_examples_of_the_standard():
    assert sent("\ufeffdata: a\r\rdata:b\r\ndata\r\n\r\n:note\nid: 1\ndata: \n\ndata: lost".encode(), 1) == [
        ("message", "a", "", False),
        ("message", "b\n", "", False),
        ("message", "", "1", True),
    ]


def test_only_the_last_event_of_an_entry_carries_its_id():
    one, two, end = EntryID(1, 3), EntryID(2, 2), EntryID(3, 0)
    events = [Text("a", one), Interrupted(one), Restarted(two), Gap(two, 2), Text("b", two), Ended(end, "cancelled")]
    made = list(sse.frames(events))
    assert [(event.name, event.id if event.own else "") for event in sent(b"".join(one.data for one in made))] == [
        ("text", "1-3"),
        ("start", ""),
        ("gap", ""),
        ("text", "2-2"),
        ("end", "3-0"),
    ]
    assert [one.final for one in made] == [False] * 4 + [True]


def test_what_an_event_tells():
    figures = {"first_token_ms": 5, "total_ms": 9, "chunks": 1, "usage": None, "nonce": "x", "worker": "w"}
    started = Started(EntryID(2, 0), {"model": "m", "source": "s", "at": 1.5, "nonce": "x"})
    assert sse.describe(started) == ("start", {"attempt": 2, "model": "m", "source": "s", "at": 1.5})
    shown = {"first_token_ms": 5, "total_ms": 9, "chunks": 1, "usage": None}
    assert sse.describe(Ended(EntryID(1, 1), "stop", figures)) == ("end", {"reason": "stop"} | shown)
    failed = Failed(EntryID(1, 1), "Refused", "no", figures)
    assert sse.describe(failed) == ("failed", {"error": "Refused", "message": "no"} | shown)
    assert next(sse.frames([Failed(ORIGIN, "x", "y")])).data.startswith(b"event: failed\n")


# ------------------------------------------------------------------------------------------------ cursors


def odd_answer(client) -> Writer:
    """An answer in two attempts, of texts that could break an event stream."""
    writer = Writer(client, "a").say("thrown ", "away")
    writer.begin().say(*ODD)
    return writer


@pytest.mark.slow
@ALL
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("ended", [True, False])
def test_every_cursor_resumes_exactly(client, serve, ended, header):
    server, writer = serve(), odd_answer(client)
    if ended:
        writer.say("more").end()
    entries = stream_of(client)
    watchers = {
        cut: Watcher(server, "a", str(entries[cut - 1].id) if cut else "", held(entries[:cut]), header)
        for cut in range(len(entries) + 1)
    }

    async def main() -> None:
        running = [asyncio.create_task(one.run()) for one in watchers.values()]
        if not ended:
            await until(lambda: all(one.states for one in watchers.values()))
            assert {state for one in watchers.values() for state in one.states} == {"streaming"}
            writer.say("more").end()
        await asyncio.gather(*running)

    asyncio.run(main())
    whole = stream_of(client)
    for cut, one in watchers.items():
        if cut == len(whole):
            assert one.statuses == [204] and not one.events
            continue
        assert one.text == held(whole) == "".join(ODD) + "more"
        assert one.ids == [entry.id for entry in whole[cut:]] and one.statuses == [200] and one.clean
        assert one.end[0] == "end" and one.end[1]["reason"] == "stop"
    assert ended == any(one.statuses == [204] for one in watchers.values())


@pytest.mark.parametrize("cursor", ["x", "1", "1-", "-1", "1-1-1", "$", "+", "1-99999999999999999999", "0x1-0", "²-1"])
@pytest.mark.parametrize("header", [True, False])
def test_a_malformed_cursor_is_refused(client, serve, cursor, header):
    server = serve()
    Writer(client, "a").say("x")
    reply = raw(server.port, Watcher(server, "a", cursor, header=header).request())
    assert problem(reply, 400) == "BadEntryID"


@pytest.mark.parametrize("header", [True, False])
def test_a_foreign_cursor_is_refused(client, serve, header):
    server, growing = serve(), Writer(client, "b").say("x")
    Writer(client, "a").say("x").end()
    for answer_id, cursor in [("a", "1-3"), ("a", "2-0"), ("a", "1718000000000-0"), ("b", "1718000000000-0")]:
        reply = raw(server.port, Watcher(server, answer_id, cursor, header=header).request())
        assert problem(reply, 409) == "ForeignID", (answer_id, cursor)
    growing.end()


def test_a_cursor_of_a_late_attempt_is_true(client, serve):
    """The numbers of attempts count on over every clear, so that a large one says nothing."""
    server, writer = serve(), Writer(client, "a", first=5_000).say("a", "b")
    one = Watcher(server, "a", "5000-1", "a")

    async def main() -> None:
        running = asyncio.create_task(one.run())
        await until(lambda: one.text == "ab" or one.statuses != [200])
        writer.end()
        await running

    asyncio.run(main())
    assert one.statuses == [200] and one.text == "ab" and one.end[0] == "end"


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("expired", [True, False])
def test_an_id_that_is_used_again_begins_anew_for_those_who_saw_the_old_answer(client, serve, begun, expired):
    server = serve(timing=Timing(lease=1, tick=0.05, patience=0.5), limits=Limits(keep_alive=0.2))
    old = Writer(client, "a").say("old ", "text").end()
    seen = f"1-{old.seq + 5}"  # beyond all that the new answer will have
    clear("a", client=client, timing=FAST)
    new = Writer(client, "a", first=2, begin=False)
    one, beside = Watcher(server, "a", seen, "old text"), Watcher(server, "a")

    def answer() -> None:
        new.begin().say("new").end()
        if expired:
            client.delete(new.keys.chunks)

    async def main() -> None:
        if begun:
            answer()
        running = [asyncio.create_task(one.run()), asyncio.create_task(beside.run())]
        if not begun:
            await until(lambda: "queued" in one.states and "queued" in beside.states)
            await asyncio.sleep(0.7)  # longer than one waits for what Redis has lost
            answer()
        await asyncio.gather(*running)

    asyncio.run(main())
    assert one.text == beside.text == "new" and one.end[0] == beside.end[0] == "end"
    assert [name for name, _ in one.events if name != "state"] == ["start", "text", "end"]
    assert one.statuses == [200] and one.ids[0].attempt == 2


def test_after_the_end_nothing_and_of_an_unknown_answer_neither(client, serve):
    server = serve()
    Writer(client, "a").say("x").end()
    Writer(client, "f").say("x").end(error="Refused", message="no")
    for answer_id in "af":
        assert call(server, "GET", f"answers/{answer_id}/events", last_event_id="1-2")[::2] == (204, b"")
    for method, path in [("GET", "answers/zzz/events"), ("GET", "answers/zzz"), ("DELETE", "answers/zzz")]:
        assert problem(call(server, method, path), 404) == "AnswerNotFound"
    assert problem(call(server, "GET", "answers/zzz/events", last_event_id="1-2"), 404) == "AnswerNotFound"


@ALL
def test_a_cursor_ahead_of_the_stream_waits_until_redis_has_been_given_again_what_it_lost(client, serve):
    server, writer = serve(timing=Timing(lease=1, tick=0.05, patience=30)), Writer(client, "a").say("a", "b", "c")
    ahead, beside = Watcher(server, "a", "1-5", "abcde"), Watcher(server, "a")

    async def main() -> None:
        running = [asyncio.create_task(one.run()) for one in (ahead, beside)]
        await until(lambda: ahead.states and beside.states)
        writer.say("d")
        await until(lambda: beside.text == "abcd")
        writer.say("e", "f", "g").end()
        await asyncio.gather(*running)

    asyncio.run(main())
    assert ahead.text == beside.text == "abcdefg" and [str(one) for one in ahead.ids] == ["1-6", "1-7", "1-8"]


def test_a_cursor_ahead_does_not_wait_for_ever(client, serve):
    timing, limits = Timing(lease=1, tick=0.05, patience=0.5), Limits(keep_alive=0.5)
    server, writer = serve(timing=timing, limits=limits), Writer(client, "a").say("a", "b")
    ahead, ended, beside = Watcher(server, "a", "1-5"), Watcher(server, "a", "1-4"), Watcher(server, "a")

    async def main() -> None:
        running = [asyncio.create_task(one.run()) for one in (ahead, beside)]
        await running[0]
        last = asyncio.create_task(ended.run())
        await until(lambda: ended.states)
        writer.end()  # at 1-3: what it has seen will never come
        await asyncio.gather(last, *running)

    asyncio.run(main())
    for one in (ahead, ended):
        assert (
            one.end[1]["error"] == "Ahead"
            and one.end[1]["server"]
            and not one.ids
            and one.statuses == [200]
            and one.clean
        )
    assert beside.text == "ab" and beside.end[0] == "end"


# -------------------------------------------------------------------------------------------- many viewers


def own_server_client(server: servers.RedisServer, name: str):
    """A client whose connections can be told from the web server's."""
    return connection.connect(server.url, prefix="web", client_name=name)


def connections(admin) -> int:
    """Connections to Redis without a name: the web server's."""
    return sum(not one["name"] for one in admin.client_list())


@pytest.fixture
def redis_server(program):
    with servers.RedisServer(program, appendfsync="always") as server:
        yield server


@pytest.mark.slow
def test_300_viewers_of_growing_answers_are_all_exact_on_few_connections(redis_server, serve):
    serving, writing = own_server_client(redis_server, ""), own_server_client(redis_server, "writer")
    server, dice = serve(client=serving), random.Random(5)
    writers = [Writer(writing, f"a{n}") for n in range(6)]
    most = [connections(writing)]

    async def main() -> list[Watcher]:
        alone = Watcher(server, "a0")
        watchers, running = [alone], [asyncio.create_task(alone.run())]
        await until(lambda: alone.states)
        most[0] = connections(writing)
        for n in range(60):
            for writer in writers:
                writer.say(*(f"{writer.id}.{n}.{m} 👋\n" for m in range(2)))
            for m in range(5 * (n < 59) + 4 * (n == 59)):
                chosen = writers[(5 * n + m) % 6]
                entries = stream_of(writing, chosen.id)
                cut = dice.choice([0, 0, dice.randrange(len(entries) + 1)])
                last = str(entries[cut - 1].id) if cut else ""
                watchers.append(Watcher(server, chosen.id, last, held(entries[:cut]), header=bool(m % 2)))
                running.append(asyncio.create_task(watchers[-1].run()))
            await asyncio.sleep(0.01)
            most.append(connections(writing))
        await until(lambda: hub_of(server).viewers == 300)
        for writer in writers:
            writer.say("last").end()
        await asyncio.gather(*running)
        most.append(connections(writing))
        return watchers

    watchers = asyncio.run(main())
    assert len(watchers) == 300
    for one in watchers:
        writer = next(writer for writer in writers if writer.id == one.answer_id)
        assert one.text == writer.text and one.statuses == [200] and not one.missing
        first = EntryID(1, writer.seq - len(one.ids))
        assert one.ids == [EntryID(1, seq) for seq in range(first.seq, writer.seq)]
    assert max(most) <= 8, most
    wait_for(lambda: hub_of(server).viewers == 0 and not hub_of(server)._channels)
    server.stop()
    serving.close()
    wait_for(lambda: connections(writing) == 0)


@pytest.mark.slow
@ALL
def test_one_who_does_not_read_delays_nobody_and_costs_little(client, serve):
    server, writer = serve(), Writer(client, "a")
    slow, quick = Slow(server, "a"), Watcher(server, "a")
    kept, buffered = [], []

    async def main() -> None:
        running = asyncio.create_task(quick.run())
        await until(lambda: hub_of(server).viewers == 2 and channels_of(server))
        for n in range(150):
            writer.say(*(f"{n}.{m} ".ljust(4_000, "x") for m in range(10)))  # 6 MB in all
            await asyncio.sleep(0)
            channel = channels_of(server)[0]
            kept.append(sum(len(one.data) for one in list(channel._frames)))
            buffered.append(
                max(one.transport.get_write_buffer_size() for one in server._server.server_state.connections)
            )
        writer.end()
        await running

    asyncio.run(main())
    assert quick.text == writer.text and quick.statuses == [200]
    assert max(kept) <= hub.WINDOW + 500 * 4_200  # one read of the stream more than the window
    assert max(buffered) <= 2 * (hub.PAGE + 5_000) + 65_536
    wait_for(lambda: hub_of(server).viewers == 1)  # the other has gone a moment after its last byte
    while not slow.done:
        slow.read()
    late = slow.watcher
    assert late.text == writer.text and late.end and [one.seq for one in late.ids] == list(range(writer.seq))
    wait_for(lambda: hub_of(server).viewers == 0 and not hub_of(server)._channels)


@pytest.mark.slow
def test_one_who_is_behind_when_redis_goes_away_at_the_end_gets_everything(redis_server, serve):
    client = own_server_client(redis_server, "")
    server, writer = serve(client=client), Writer(client, "a")
    slow, quick = Slow(server, "a"), Watcher(server, "a")

    async def main() -> None:
        running = asyncio.create_task(quick.run())
        await until(lambda: hub_of(server).viewers == 2)
        for n in range(150):
            writer.say(*(f"{n}.{m} ".ljust(4_000, "x") for m in range(10)))
        writer.end()
        await running

    asyncio.run(main())
    redis_server.kill()
    while slow.watcher.states[-1:] != ["away"]:
        slow.read()
    assert not slow.watcher.end
    redis_server.start()
    while not slow.done:
        slow.read()
    assert slow.watcher.text == writer.text == quick.text and slow.watcher.end[0] == "end"
    assert set(slow.watcher.states) <= {"streaming", "away"}


def test_one_who_is_behind_is_told_when_what_it_lacks_is_gone(client, serve):
    timing = Timing(lease=1, tick=0.05, patience=0.5)
    server, writer = serve(timing=timing, limits=Limits(keep_alive=0.5)), Writer(client, "a")
    slow, quick = Slow(server, "a"), Watcher(server, "a")

    async def main() -> None:
        running = asyncio.create_task(quick.run())
        await until(lambda: hub_of(server).viewers == 2)
        for n in range(150):
            writer.say(*(f"{n}.{m} ".ljust(4_000, "x") for m in range(10)))
        writer.end()
        await running
        client.delete(writer.keys.chunks, writer.keys.question)

    asyncio.run(main())
    while not slow.done:
        slow.read()
    assert slow.watcher.end[1]["error"] == "Ahead" and quick.text == writer.text


def test_one_who_is_behind_gets_past_an_attempt_that_goes_on(client):
    """Where entries are large it reads few of them at once, and the first makes no frame without the one behind it."""
    writer, large = Writer(client, "a").say(*(str(n) * 100_000 for n in range(3))), "x" * hub.WINDOW
    pieces, whole = [], writer.text

    async def main() -> None:
        shared = hub.Hub(client, Timing(lease=1, tick=0.05, patience=2), 15.0, lambda: asyncio.sleep(0))
        slow, quick = (shared.stream(View("a"), ORIGIN, EntryID(1, 3)) for _ in range(2))
        while b"\nid: 1-3\n" not in b"\n".join(pieces):
            pieces.append(await anext(slow))
        running = asyncio.create_task(drained(quick))
        await until(lambda: [one.viewers for one in shared._channels.values()] == [2])
        writer.begin(continues="1-3").say(whole, *[large] * 3).end()
        await running
        pieces.append(await drained(slow))
        await shared.close()

    async def drained(stream) -> bytes:
        return b"".join([piece async for piece in stream])

    asyncio.run(main())
    events = Parser().feed(b"".join(pieces))
    assert [event.id for event in events if event.own] == [f"1-{n}" for n in range(4)] + [f"2-{n}" for n in range(1, 6)]
    assert events[-1].name == "end"


def test_what_viewers_have_in_common_is_no_more_than_the_window():
    channel = hub.Channel(Round(Names().answer("a"), Follower("a", ORIGIN, FAST)), sse.Wire("a", {}))
    for n in range(1, 200):
        channel.take([Gap(EntryID(1, n), 1), Text("x" * 5_000, EntryID(1, n))])
        assert sum(len(one.data) for one in channel._frames) == channel._size <= hub.WINDOW
    assert channel.after(ORIGIN) is None
    kept = channel.after(channel._base)
    assert b"event: gap" in kept[0].data  # an entry's frames go together
    assert kept[0].id == EntryID(1, channel._base.seq + 1)
    channel.take([Text("x" * 2 * hub.WINDOW, EntryID(1, 200))])
    assert not channel._frames and channel._size == 0 and channel.after(EntryID(1, 199)) is None
    assert channel.after(EntryID(1, 200)) == []


@pytest.mark.slow
@ALL
def test_clients_that_vanish_leave_nothing_behind(client, serve):
    server = serve(limits=Limits(viewers=150))
    big, small = Writer(client, "big").say(*["x" * 20_000] * 400), Writer(client, "small").say("a", "b")
    Writer(client, "left").say("it goes on, and nobody watches")
    faithful = [Watcher(server, "big"), Watcher(server, "small")]
    before = len(tasks_of(server))

    def vanish(answer_id: str, patient: bool) -> None:
        slow = Slow(server, answer_id)
        if patient:
            slow.read()
        slow.vanish()

    async def main() -> None:
        running = [asyncio.create_task(one.run()) for one in faithful]
        for n in range(60):
            await asyncio.to_thread(vanish, ("big", "small", "left")[n % 3], n % 2 > 0)
            small.say(f"{n} ")
            if n % 10 == 0:
                big.say(f"{n} ")
        for one in (big, small):
            one.say("last").end()
        await asyncio.gather(*running)

    asyncio.run(main())
    assert [one.text for one in faithful] == [big.text, small.text]
    desk = hub_of(server)
    wait_for(lambda: desk.viewers == 0 and not desk._channels and (desk._task is None or desk._task.done()))
    wait_for(lambda: len(tasks_of(server)) <= before)
    wait_for(lambda: not server._server.server_state.connections)
    assert desk._turn._value == hub.CATCH_UP
    # Nobody's connection to Redis is lost to the others
    assert len(desk._pool.connection_pool._in_use_connections) == 0
    again = Watcher(server, "big")
    follow(again)
    assert again.text == big.text


def test_those_who_come_all_at_once_are_no_more_than_the_limit(client, serve):
    server, writer = serve(limits=Limits(viewers=5)), Writer(client, "a").say("x")
    watchers = [Watcher(server, "a") for _ in range(40)]

    async def main() -> None:
        running = [asyncio.create_task(one.connect()) for one in watchers]
        await until(lambda: all(one.statuses for one in watchers))
        assert sum(one.statuses == [200] for one in watchers) == 5
        assert {tuple(one.statuses) for one in watchers} == {(200,), (503,)}
        writer.end()
        await asyncio.gather(*running)

    asyncio.run(main())
    wait_for(lambda: hub_of(server).viewers == 0)
    follow(again := Watcher(server, "a"))
    assert again.text == "x"


@pytest.mark.slow
@pytest.mark.parametrize("lossy", [False, True])
def test_redis_restarts_while_50_watch(no_leftovers, redis_server, serve, lossy):
    client = own_server_client(redis_server, "")
    server, dice = serve(client=client), random.Random(3)
    models = [Model("one ", "two ") for _ in range(3)]
    producers = [model.start(client, says, FAST, f"a{n}") for n, says in enumerate(models)]
    watchers = [Watcher(server, f"a{n % 3}") for n in range(50)]

    def say(n: int) -> None:
        for says in models:
            says.say(*(f"{n}.{m} " for m in range(dice.randrange(1, 9))))

    async def main() -> None:
        running = [asyncio.create_task(one.run()) for one in watchers]
        await until(lambda: all("streaming" in one.states for one in watchers))
        for n in range(2):
            say(2 * n)
            redis_server.kill()
            say(2 * n + 1)
            await until(lambda: all(one.states[-1] == "away" for one in watchers))
            await asyncio.to_thread(redis_server.wipe if lossy else redis_server.start)
            await until(lambda: all(one.states[-1] == "streaming" for one in watchers))
        for says in models:
            says.end()
        await asyncio.gather(*running)

    asyncio.run(main())
    for one in watchers:
        assert one.text == producers[int(one.answer_id[1])].attempt.text and not one.missing
        assert one.statuses == [200] and one.end[0] == "end"
        assert one.states.count("away") == 2 and set(one.states) <= {"queued", "streaming", "away", "interrupted"}


@pytest.mark.slow
def test_a_server_that_was_idle_while_redis_restarted_answers_at_once(redis_server, serve):
    client = own_server_client(redis_server, "")
    server, writer = serve(client=client), Writer(client, "a").say("x").end()
    follow(Watcher(server, "a"))
    redis_server.kill()
    assert problem(call(server, "GET", "answers/a/events"), 503) == "RedisUnusable"
    assert problem(call(server, "GET", "answers/a"), 503) == "RedisUnusable"
    redis_server.start()
    follow(again := Watcher(server, "a"))
    assert again.text == writer.text and again.statuses == [200]
    redis_server.kill()
    redis_server.start()
    follow(again := Watcher(server, "a"))
    assert again.text == writer.text and again.statuses == [200]


# ------------------------------------------------------------------------------------ holes, deaths, expiry


def test_expired_chunks_come_from_the_record(client, serve):
    server, writer = serve(), Writer(client, "a").say("all ", "of it").end()
    client.delete(writer.keys.chunks)
    fresh, half = Watcher(server, "a"), Watcher(server, "a", "1-1", "all ")
    follow(fresh, half)
    assert fresh.text == half.text == "all of it" and fresh.last_id == half.last_id == "1-3"
    assert call(server, "GET", "answers/a/events", last_event_id="1-3").status == 204
    assert problem(call(server, "GET", "answers/a/events", last_event_id="1-4"), 409) == "ForeignID"


def test_chunks_that_expire_under_a_viewer(client, serve):
    server, writer = serve(), Writer(client, "a").say("all ", "of it")
    one = Watcher(server, "a")

    async def main() -> None:
        running = asyncio.create_task(one.run())
        await until(lambda: one.text == "all of it")
        with client.pipeline(transaction=True) as pipe:
            pipe.set(
                writer.keys.question, json.dumps(writer.record | {"reason": "stop", "end": "1-4", "text": "It all"})
            )
            pipe.delete(writer.keys.chunks, writer.keys.lease(1))
            pipe.execute()
        await running

    asyncio.run(main())
    assert one.text == "It all" and one.end[0] == "end" and one.last_id == "1-4"


def test_a_trimmed_stream_says_how_much_is_missing_and_the_record_heals_it(client, serve):
    server, writer = serve(), Writer(client, "a").say(*(f"{n} " for n in range(20)))
    client.xtrim(writer.keys.chunks, maxlen=5, approximate=False)
    writer.say("end").end()
    one = Watcher(server, "a")
    follow(one)
    assert one.missing == 16 and one.text == "15 16 17 18 19 end"
    shown = call(server, "GET", "answers/a").json
    assert shown["text"] == writer.text and shown["missing"] == 0 and shown["html"]


@pytest.mark.parametrize("size", [*range(hub.PAGE - 90, hub.PAGE - 20, 12), 30_000])
@pytest.mark.parametrize("late", [True, False])
def test_a_gap_and_the_text_after_it_go_together_where_a_piece_is_full(client, serve, size, late):
    """What is written to a viewer at once may be full after the gap: the text of the same entry must not be lost."""
    server, writer = serve(), Writer(client, "a").say("x" * size, "gone", "here", "x" * size, "gone too", "there")
    client.xdel(writer.keys.chunks, "1-2", "1-5")
    one = Watcher(server, "a")
    if late:
        writer.end()
        follow(one)
    else:

        async def main() -> None:
            running = asyncio.create_task(one.run())
            await until(lambda: one.states)
            writer.say("x" * size, "gone again", "everywhere")
            client.xdel(writer.keys.chunks, "1-8")
            writer.end()
            await running

        asyncio.run(main())
    assert one.text.replace("x", "").replace("gone again", "") == "herethere" + "everywhere" * (not late)
    assert one.missing >= 2


def test_an_interrupted_answer_is_said_to_be_and_ends_after_a_while(client, serve):
    server = serve(timing=Timing(lease=0.5, tick=0.05, patience=0.8))
    writer = Writer(client, "a").say("half")
    client.delete(writer.keys.lease(1))
    one = Watcher(server, "a")
    follow(one)
    assert one.text == "half" and one.states[-1] == "interrupted"
    assert one.end[0] == "failed" and one.end[1]["error"] == "Interrupted" and one.end[1]["server"]
    assert one.last_id == "1-1" and one.clean


@pytest.mark.parametrize("error", ["Ahead", "Interrupted"])
def test_an_answers_own_error_is_not_taken_for_the_servers(client, serve, error):
    """Whatever its name: the page would read such an answer anew, for ever."""
    Writer(client, "a").say("half").end(error=error, message="told", server=True)
    one = Watcher(serve(), "a")
    follow(one)
    assert one.end == ("failed", {"error": error, "message": "told"}) and one.text == "half"


def test_an_interrupted_answer_that_is_taken_over_goes_on(client, serve):
    server, writer = serve(), Writer(client, "a").say("half")
    one = Watcher(server, "a")

    async def main() -> None:
        running = asyncio.create_task(one.run())
        await until(lambda: one.states)
        client.delete(writer.keys.lease(1))
        await until(lambda: one.states[-1] == "interrupted")
        writer.begin().say("whole")
        await until(lambda: one.text == "whole")
        await until(lambda: one.states[-1] == "streaming")
        writer.end()
        await running

    asyncio.run(main())
    assert one.text == "whole" and [data["attempt"] for name, data in one.events if name == "start"] == [1, 2]


def test_an_answer_that_is_deleted_under_a_viewer(client, serve):
    server, writer = serve(), Writer(client, "a").say("half")
    one, never = Watcher(server, "a"), Watcher(server, "a", pause=0)

    async def main() -> None:
        running = asyncio.create_task(one.run())
        await until(lambda: one.states)
        client.delete(writer.keys.lease(1))
        await asyncio.to_thread(clear, "a", client=client, timing=FAST)
        await running
        await never.run()

    asyncio.run(main())
    assert one.end[1]["error"] == "Deleted" and never.statuses == [404]


def test_a_foreign_key_under_an_answers_name_harms_only_those_who_ask_for_it(client, serve):
    server, writer = serve(), Writer(client, "a").say("x")
    names = connection.names_of(client)
    client.set(names.answer("s").chunks, "a string")
    client.xadd(names.answer("f").chunks, {"foreign": "fields"}, "1-0")
    client.set(names.answer("j").question, "no JSON")
    client.set(names.answer("e").question, json.dumps({"end": ["1-1"], "reason": 5}))
    one = Watcher(server, "a")

    async def main() -> None:
        running = asyncio.create_task(one.run())
        await until(lambda: one.states)
        for answer_id in "sfje":
            for method, path in [("GET", ""), ("GET", "/events"), ("DELETE", "")]:
                reply = await asyncio.to_thread(call, server, method, f"answers/{answer_id}{path}")
                assert reply.status in (200, 404, 409, 422, 503), (answer_id, method, path, reply)
        writer.say("y").end()
        await running

    asyncio.run(main())
    assert one.text == "xy" and one.states == ["streaming"]


# ------------------------------------------------------------------------------- whatever an entry holds

DEEP, HUGE = '{"a":' * 400 + "1" + "}" * 400, "x" * 2_000_000
ODD_ENDS = {
    "deep": "[" * 100_000 + "]" * 100_000,
    "deeper": '{"a":' * 100_000,
    "levels": '{"reason": "stop", "usage": ' + DEEP + "}",
    "nan": '{"reason": "stop", "total_ms": NaN, "chunks": Infinity, "usage": {"a": -Infinity, "b": 1e400}}',
    "half": '{"reason": "\\ud83d", "usage": {"\\udc4b": 1}}',
    "huge": json.dumps({"reason": HUGE, "usage": {HUGE: 1}, HUGE: HUGE, "more": HUGE}),
    "error": json.dumps({"error": HUGE, "message": HUGE}),
    "types": json.dumps({"reason": ["x"], "usage": [1], "first_token_ms": "5", "total_ms": {}, "chunks": True}),
    "object": json.dumps({"error": {"message": "m"}, "message": [HUGE], "closes": 5}),
    "many": json.dumps(
        {"reason": "stop", "usage": {f"n{n}": n for n in range(100_000)}} | dict.fromkeys("ab", 10**300)
    ),
}


def strictly(text: str | bytes):
    """The JSON as a browser reads it."""

    def no(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=no)


@pytest.mark.parametrize("in_record", [False, True])
@pytest.mark.parametrize("name", ODD_ENDS)
def test_an_end_that_holds_anything_ends_its_own_answer_alone(client, serve, name, in_record):
    server = serve(timing=replace(FAST, patience=2.0))
    beside, odd = Writer(client, "b").say("x"), Writer(client, "a").say("x")
    fresh, late, other = Watcher(server, "a"), Watcher(server, "a"), Watcher(server, "b")

    def end() -> None:
        if in_record:
            text = ODD_ENDS[name].replace("{", '{"end": "1-9", "text": "x", "question": ["?"], ', 1)
            client.set(odd.keys.question, text)
            client.delete(odd.keys.chunks)
        else:
            odd._add("error" if "error" in ODD_ENDS[name][:9] else "end", ODD_ENDS[name])
        client.delete(odd.keys.lease(1))

    async def main() -> None:
        running = [asyncio.create_task(one.run()) for one in (fresh, other)]
        await until(lambda: fresh.text == other.text == "x")
        end()
        running.append(asyncio.create_task(late.run()))
        await until(lambda: fresh.end and late.statuses and (late.end or late.statuses[-1] != 200))
        beside.say("y").end()
        await asyncio.gather(*running)

    asyncio.run(main())
    assert other.text == "xy" and other.end[0] == "end" and other.statuses == [200]
    assert fresh.statuses == [200] and fresh.end[0] in ("end", "failed")
    for one in (fresh, late):
        for event in one.events:
            assert len(strictly(json.dumps(event))[1].get("reason", "")) <= 200 and len(json.dumps(event)) < 10_000
    shown = call(server, "GET", "answers/a")
    assert shown.status in (200, 404, 409) and len(shown.body) < 10_000
    if shown.status == 200:
        record = strictly(shown.body)["record"]
        figures = [record.get(name) for name in ("first_token_ms", "total_ms", "chunks")]
        assert all(figure is None or type(figure) in (int, float) for figure in figures)
        assert isinstance(record.get("reason", ""), str) and isinstance(record.get("usage") or {}, dict)
        assert all(type(number) in (int, float) for number in (record.get("usage") or {}).values())


def breaking(monkeypatch, error: Exception) -> list[str]:
    """Let followers of the answers in the list raise an error that nobody expected."""
    bad, feed = list[str](), Follower.feed

    def broken(self, raw):
        if self.answer_id in bad:
            raise error
        return feed(self, raw)

    monkeypatch.setattr(Follower, "feed", broken)
    last_resort._note.cache_clear()
    return bad


@pytest.mark.parametrize("error", [RecursionError("the model's words"), KeyError("hunter2"), AttributeError("hunter2")])
def test_an_error_that_nobody_expected_ends_that_answers_streams_alone(client, serve, monkeypatch, caplog, error):
    bad = breaking(monkeypatch, error)
    server, writers = serve(), [Writer(client, name).say("x") for name in ("a1", "a2")]
    first, second, again = Watcher(server, "a1"), Watcher(server, "a2"), Watcher(server, "a1")

    async def main() -> None:
        running = [asyncio.create_task(one.run()) for one in (first, second)]
        await until(lambda: first.states and second.states)
        bad.append("a1")
        for writer in writers:
            writer.say("y")
        await until(lambda: first.end and second.text == "xy")
        await again.run()  # reads for itself, and meets the same
        shown = await asyncio.to_thread(call, server, "GET", "answers/a1")
        assert problem(shown, 500 if not isinstance(error, AttributeError) else 503)
        bad.clear()
        writers[1].end()
        await asyncio.gather(*running)

    asyncio.run(main())
    for one in (first, again):
        assert one.end[1]["error"] == "Broken" and type(error).__name__ in one.end[1]["message"]
    assert second.text == "xy" and second.end[0] == "end" and second.statuses == [200]
    assert f"a1: reading it raised {type(error).__name__}" in caplog.text
    assert "hunter2" not in caplog.text and "words" not in caplog.text
    follow_on = Watcher(server, "a1")
    writers[0].end()
    follow(follow_on)
    assert follow_on.text == "xy" and follow_on.end[0] == "end"


def test_a_hub_that_dies_says_so_and_starts_anew_at_the_next_viewer(client, serve, monkeypatch, caplog):
    server, writer = serve(), Writer(client, "a").say("x")
    one, again = Watcher(server, "a"), Watcher(server, "a")
    round_of = hub_of(server)._round
    last_resort._note.cache_clear()

    async def broken() -> bool:
        raise ZeroDivisionError("hunter2")

    async def main() -> None:
        running = asyncio.create_task(one.run())
        await until(lambda: one.states)
        monkeypatch.setattr(hub_of(server), "_round", broken)
        await running
        monkeypatch.setattr(hub_of(server), "_round", round_of)
        running = asyncio.create_task(again.run())
        await until(lambda: again.states)
        writer.say("y").end()
        await running

    asyncio.run(main())
    assert one.end[1]["error"] == "Broken" and one.statuses == [200]
    assert again.text == "xy" and again.end[0] == "end"
    assert "ZeroDivisionError" in caplog.text and "hunter2" not in caplog.text


# ------------------------------------------------------------------------------------- asking and stopping


def test_ask_watch_show(no_leftovers, client, serve, says):
    server = serve(models={"scripted": ["m"]})
    reply = call(server, "POST", "answers", {"question": "why?", "topic": "sky", "model": "m"})
    answer_id = reply.json["id"]
    place = f"answers/{answer_id}"
    assert reply.status == 201 and reply.json == {"id": answer_id, "answer": place, "events": f"{place}/events"}
    assert reply.headers["location"] == place
    assert says[0].question == "why?" and says[0].options["topic"] == "sky" and says[0].options["stream"] is True
    one = Watcher(server, answer_id)

    async def main() -> None:
        running = asyncio.create_task(one.run())
        says[0].say("It *is*", " so")
        await until(lambda: one.text == "It *is* so")
        shown = (await asyncio.to_thread(call, server, "GET", place)).json
        assert shown["status"] == "streaming" and shown["text"] == "It *is* so" and not shown["html"]
        says[0].end("length")
        await running

    asyncio.run(main())
    assert one.events[0][0] == "start" and one.end[1]["reason"] == "length" and one.end[1]["chunks"] == 2
    wait_for(lambda: call(server, "GET", place).json["record"].get("end"))
    shown = call(server, "GET", place).json
    assert shown["status"] == "ended" and "<em>is</em>" in shown["html"] and shown["record"]["topic"] == "sky"
    assert "text" not in shown["record"]


def test_a_question_with_the_scripted_source(no_leftovers, client, serve):
    server = serve(models={"scripted": ["scripted:pace=500"]})
    listed = call(server, "GET", "sources").json
    assert listed["default"] == "scripted" and listed["prepared"]
    question = listed["prepared"][0]
    asked_for = {"question": question, "source": "scripted", "model": "scripted:pace=500"}
    asked = call(server, "POST", "answers", asked_for)
    one = Watcher(server, asked.json["id"])
    follow(one)
    whole = call(server, "POST", "answers", {**asked_for, "stream": False})
    assert whole.status == 200 and one.text == whole.json["text"] and whole.json["status"] == "ended"


SCRIPTS = ["scripted:long=999999999999", "scripted:piece=400000000", "scripted", "scripted:pace=1", "", "x" * 200]


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("model", SCRIPTS)
def test_a_model_that_the_host_does_not_offer_is_refused(client, serve, says, model, pool):
    server = serve(pool=pool, models={"openai": ["dear"]})
    for source in ({}, {"source": "scripted"}, {"source": "openai"}):
        reply = call(server, "POST", "answers", {"question": "why?", "model": model} | source)
        assert problem(reply, 422) == "NotOffered" and ("dear" in reply.json["message"]) == (
            "openai" in source.values()
        )
    assert not says and not client.zcard(connection.names_of(client).answers)


def test_a_model_that_the_host_offers_is_asked_and_listed(no_leftovers, client, serve, says):
    server = serve(models={"openai": ["dear", "cheap"]})
    listed = {one["name"]: one["models"] for one in call(server, "GET", "sources").json["sources"]}
    assert listed == {"scripted": [], "local": [], "openai": ["dear", "cheap"]}
    for asked in ({"source": "openai", "model": "cheap"}, {"source": "openai"}, {}):
        assert call(server, "POST", "answers", {"question": "why?"} | asked).status == 201
    assert [made.options["model"] for made in says] == ["cheap", None, None]
    for asked in ({"source": "nonsense"}, {"source": ""}, {"source": "own"}, {"model": "cheap"}):
        reply = call(server, "POST", "answers", {"question": "why?"} | asked)
        assert reply.status == (201 if asked == {"source": ""} else 422)


def test_the_hosts_timeouts_are_the_sources(no_leftovers, client, serve, says):
    server = serve(timeout=3.0, first_timeout=7.0)
    call(server, "POST", "answers", {"question": "why?"})
    assert (says[0].options["timeout"], says[0].options["first_timeout"]) == (3.0, 7.0)


def test_markdown_is_made_once_and_one_at_a_time(client, serve, monkeypatch):
    made, busy, go = [], [], threading.Event()

    def slowly(text: str) -> str:
        busy.append(text)
        made.append((text, len(busy)))
        go.wait(60)
        busy.remove(text)
        return f"<p>{text}</p>"

    monkeypatch.setattr(app, "to_html", slowly)
    server = serve()
    for name in "ab":
        Writer(client, name).say(name).end()

    async def main() -> list:
        asked = [asyncio.create_task(asyncio.to_thread(call, server, "GET", f"answers/{name}")) for name in "abab"]
        await until(lambda: made)
        listed = await asyncio.to_thread(call, server, "GET", "sources")  # others' requests go on meanwhile
        assert listed.status == 200 and len(made) == 1
        go.set()
        return await asyncio.gather(*asked)

    replies = asyncio.run(main())
    assert sorted(made) == [("a", 1), ("b", 1)]
    assert {reply.json["html"] for reply in replies} == {"<p>a</p>", "<p>b</p>"}
    clear("a", client=client, timing=FAST)
    Writer(client, "a", first=2).say("c").end()
    assert call(server, "GET", "answers/a").json["html"] == "<p>c</p>"


def test_a_whole_answer_in_one_piece(no_leftovers, client, serve, says):
    server = serve()
    threading.Timer(0.3, lambda: (says[0].say("all of it"), says[0].end())).start()
    reply = call(server, "POST", "answers", {"question": "why?", "stream": False})
    assert reply.status == 200 and reply.json["text"] == "all of it" and reply.json["html"] == "<p>all of it</p>\n"
    assert says[0].options["stream"] is False


def test_an_asker_who_goes_away_stops_the_whole_answer(no_leftovers, client, serve, says):
    server = serve()
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(head(server, "POST", "answers", {"question": "why?", "stream": False}))
        wait_for(lambda: says)
        says[0].say("half")
    wait_for(lambda: says[0].closed)
    (answer_id,) = connection.names_of(client) and client.zrange(connection.names_of(client).answers, 0, -1)
    wait_for(lambda: Answer(answer_id, client=client).record.get("reason") == "cancelled")
    assert Answer(answer_id, client=client).text == "half"


@pytest.mark.slow
def test_a_whole_answer_outlives_a_restart_of_redis(no_leftovers, redis_server, serve, says):
    server, asks = serve(client=own_server_client(redis_server, "")), []
    place = hub_of(server).place
    hub_of(server).place = lambda answer_id, seen: asks.append(answer_id) or place(answer_id, seen)

    async def main():
        asked = {"question": "why?", "stream": False}
        whole = asyncio.create_task(asyncio.to_thread(call, server, "POST", "answers", asked))
        await until(lambda: asks)
        redis_server.kill()
        says[0].say("all ", "of it")
        says[0].end()
        asks.clear()
        await until(lambda: len(asks) > 1)  # in vain
        await asyncio.to_thread(redis_server.start)
        return await whole

    reply = asyncio.run(main())
    assert reply.status == 200 and reply.json["text"] == "all of it" and reply.json["status"] == "ended"


def test_a_whole_answer_that_nobody_writes_names_its_id(client, serve):
    server = serve(pool=True, timing=Timing(lease=1, tick=0.05, patience=0.4))
    reply = call(server, "POST", "answers", {"question": "why?", "stream": False})
    assert problem(reply, 504) == "StillWaiting"
    answer_id = reply.json["message"].partition(" ")[0]
    assert call(server, "GET", f"answers/{answer_id}").json["status"] == "queued"
    assert call(server, "DELETE", f"answers/{answer_id}").json["status"] == "ended"


def test_a_whole_answer_is_waited_for_as_long_as_its_producer_lives(client, serve, says):
    server = serve(timing=Timing(lease=1.0, tick=0.05, patience=0.2))
    looks, place = [], hub_of(server).place
    hub_of(server).place = lambda *args: looks.append(time.monotonic()) or place(*args)

    async def main():
        asked = {"question": "why?", "stream": False}
        whole = asyncio.create_task(asyncio.to_thread(call, server, "POST", "answers", asked))
        await until(lambda: looks and looks[-1] - looks[0] > 1.5)  # a silent model, far beyond all patience
        says[0].say("at last")
        says[0].end()
        return await whole

    reply = asyncio.run(main())
    assert (reply.status, reply.json["text"], reply.json["record"]["reason"]) == (200, "at last", "stop")


@ALL
@pytest.mark.parametrize("own", [True, False])
def test_stop_keeps_the_text(no_leftovers, client, serve, says, own):
    server = serve()
    if own:
        answer_id = call(server, "POST", "answers", {"question": "why?"}).json["id"]
        says[0].say("half")
    else:
        answer_id = "a"
        made = Model("half")
        model.start(client, made, FAST, "a")
    one = Watcher(server, answer_id)

    async def main() -> None:
        running = asyncio.create_task(one.run())
        await until(lambda: one.text == "half")
        reply = await asyncio.to_thread(call, server, "DELETE", f"answers/{answer_id}")
        assert reply.status == 200 and reply.json == {"id": answer_id, "status": "ended"}
        await running

    asyncio.run(main())
    assert one.text == "half" and one.end[1]["reason"] == "cancelled"
    assert call(server, "DELETE", f"answers/{answer_id}").json["status"] == "ended"  # once more does no harm
    clear(answer_id, client=client, timing=FAST)
    assert problem(call(server, "DELETE", f"answers/{answer_id}"), 404) == "AnswerNotFound"


def test_many_stops_of_an_answer_that_hangs_delay_no_other(no_leftovers, client, serve):
    server = serve(timing=Timing(lease=20, tick=0.5))
    hangs, lives = Writer(client, "a").say("x"), Model("half")
    model.start(client, lives, FAST, "b")
    wait_for(lambda: len(stream_of(client, "b")) == 2)

    async def main() -> None:
        stuck = [asyncio.create_task(asyncio.to_thread(call, server, "DELETE", "answers/a")) for _ in range(24)]
        await until(lambda: client.exists(hangs.keys.cancel))
        await until(lambda: len(server._server.server_state.connections) == 24)
        reply = await asyncio.to_thread(call, server, "DELETE", "answers/b")
        assert reply.json == {"id": "b", "status": "ended"}
        assert not [one for one in stuck if one.done()]
        hangs.end()
        assert {(await one).json["status"] for one in stuck} == {"ended"}

    loop = asyncio.new_event_loop()
    loop.set_default_executor(ThreadPoolExecutor(40))
    loop.run_until_complete(main())
    loop.close()


def test_stop_what_the_pool_has_not_begun(client, serve):
    server = serve(pool=True)
    answer_id = call(server, "POST", "answers", {"question": "why?"}).json["id"]
    one = Watcher(server, answer_id)

    async def main() -> None:
        running = asyncio.create_task(one.run())
        await until(lambda: one.states == ["queued"])
        reply = await asyncio.to_thread(call, server, "DELETE", f"answers/{answer_id}")
        assert reply.json["status"] == "ended"
        await running

    asyncio.run(main())
    assert one.end[1]["reason"] == "cancelled" and not one.text


@ALL
def test_a_pool_answers(no_leftovers, client, serve):
    server = serve(pool=True, limits=Limits(queue=3))
    ids = [call(server, "POST", "answers", {"question": f"q{n}"}).json["id"] for n in range(3)]
    refused = call(server, "POST", "answers", {"question": "q"})
    assert problem(refused, 429) == "Busy" and int(refused.headers["retry-after"]) > 0
    watchers = [Watcher(server, answer_id) for answer_id in ids]
    go = threading.Event()

    async def main() -> None:
        running = [asyncio.create_task(one.run()) for one in watchers]
        await until(lambda: all(one.states == ["queued"] for one in watchers))
        go.set()
        await asyncio.gather(*running)

    def source(question, topic):
        go.wait(60)
        yield from [question, " has ", "an answer"]

    worker = Worker(source=source, client=client, timing=FAST)
    thread = threading.Thread(target=lambda: go.wait(60) and worker.start())
    thread.start()
    try:
        asyncio.run(main())
    finally:
        go.set()
        thread.join()
        worker.stop()
    assert [one.text for one in watchers] == [f"q{n} has an answer" for n in range(3)]


# ---------------------------------------------------------------------------------------------------- limits


def test_a_body_that_is_too_large_is_refused(client, serve, says):
    server = serve(limits=Limits(body=1_000))
    body = json.dumps({"question": "why?", "topic": "t" * 1_100}).encode()
    assert problem(call(server, "POST", "answers", body), 413) == "TooLarge"
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:600], body[600:])) + b"0\r\n\r\n"
    start = head(server, "POST", "answers", transfer_encoding="chunked", content_type="application/json")
    assert problem(raw(server.port, start + chunks), 413) == "TooLarge"
    assert problem(call(server, "GET", "sources", b"x" * 1_100), 413) == "TooLarge"
    assert not says


def test_a_question_that_is_too_long_or_empty_is_refused(client, serve, says):
    server = serve(limits=Limits(question=50))
    assert problem(call(server, "POST", "answers", {"question": "x" * 51}), 422) == "TooLong"
    for question in ("", "  \n", None, 5, ["x"]):
        problem(call(server, "POST", "answers", {"question": question}), 422)
    assert call(server, "POST", "answers", {"question": "x" * 50}).status == 201 and len(says) == 1


def test_too_many_answers_at_once_are_refused(no_leftovers, client, serve, says):
    server = serve(limits=Limits(answers=3))

    async def main() -> list:
        return await asyncio.gather(
            *(asyncio.to_thread(call, server, "POST", "answers", {"question": "why?"}) for _ in range(12))
        )

    replies = asyncio.run(main())
    assert sorted(reply.status for reply in replies) == [201] * 3 + [429] * 9 and len(says) == 3
    refused = next(reply for reply in replies if reply.status == 429)
    assert problem(refused, 429) == "Busy" and int(refused.headers["retry-after"]) > 0
    says[0].end()
    wait_for(lambda: call(server, "POST", "answers", {"question": "why?"}).status == 201)


def test_too_many_viewers_are_refused(client, serve):
    server, writer = serve(limits=Limits(viewers=2)), Writer(client, "a").say("x")
    first = [Slow(server, "a") for _ in range(2)]
    wait_for(lambda: hub_of(server).viewers == 2)
    refused = call(server, "GET", "answers/a/events")
    assert problem(refused, 503) == "Full" and int(refused.headers["retry-after"]) > 0
    for one in first:
        one.sock.close()
    wait_for(lambda: hub_of(server).viewers == 0)
    writer.end()
    assert call(server, "GET", "answers/a/events").status == 200


# --------------------------------------------------------------------------------------------------- admission

EVERYWHERE = [
    ("GET", ""),
    ("GET", "index.html"),
    ("GET", "openapi.json"),
    ("GET", "sources"),
    ("GET", "answers/a"),
    ("GET", "answers/a/events"),
    ("GET", "nothing/here"),
    ("DELETE", "answers/a"),
    ("POST", "answers"),
    ("HEAD", ""),
    ("OPTIONS", "answers"),
    ("PUT", "answers/a"),
]
SECURITY = {"content-security-policy", "referrer-policy", "x-content-type-options", "cross-origin-resource-policy"}


@pytest.fixture(scope="module")
def standing():
    """One server for many small questions, with an ended answer `a`."""
    client = connection.connect(prefix=f"t{uuid.uuid4().hex[:10]}")
    Writer(client, "a").say("x").end()
    with WebServer(client=client, token=TOKEN, timing=FAST, models={"scripted": ["scripted:pace=0"]}) as server:
        yield server


def test_without_the_token_nothing(standing):
    for method, path in EVERYWHERE:
        body = {"question": "why?"} if method == "POST" else None
        for token, headers in [(None, {}), ("wrong", {}), (TOKEN[:-1], {}), (TOKEN, {"authorization": "Bearer wrong"})]:
            reply = call(standing, method, path, body, token=token, **headers)
            assert reply.status == 401, (method, path, token)
            assert method == "HEAD" or problem(reply, 401) == "NoToken"
        assert call(standing, method, path, body, token=None, authorization="Bearer ").status == 401
        assert call(standing, method, path, body, token=None, authorization=f"bearer {TOKEN}").status != 401
    for path in ("page.js/", "//page.js", "page.js%2f..%2findex.html", "./page.js/../", "answers/page.js"):
        assert call(standing, "GET", path, token=None).status == 401, path


def test_the_pages_own_files_are_open(standing):
    page = call(standing, "GET", "").body.decode()
    scripts, styles = re.findall(r'src="(\w+\.js)"', page), re.findall(r'href="(\w+\.css)"', page)
    assert scripts == ["page.js"] and len(styles) > 1
    for path in scripts:  # grows meanwhile
        reply = call(standing, "GET", path, token=None)
        assert reply.status == 200, path
        scripts += set(re.findall(r'from "\./(\w+\.js)"', reply.body.decode())) - {*scripts}
    assert "paper.js" in scripts
    for path in styles:
        assert call(standing, "GET", path, token=None).status == 200, path


def test_the_page_says_what_the_notebook_says():
    """It gets events, not words, so that it has words of its own."""
    script = (Path(app.PAGE) / "answer.js").read_text("utf-8")
    labels, _, rest = script.partition("const NOTES = {")
    found = [dict(re.findall(r'(\w+): "([^"]*)"', part)) for part in (labels, rest.partition("};")[0])]
    assert found == [LABELS, NOTES]


def test_another_sites_page_may_not_change_anything(standing):
    own = f"127.0.0.1:{standing.port}"
    asked = {"question": "why?", "stream": False, "model": "scripted:pace=0"}
    for origin in (
        "https://evil.example",
        "null",
        f"http://{own}.evil.example",
        "http://127.0.0.1",
        "http://[",
        "x",
        "http://",
    ):
        for method, path, body in [("POST", "answers", asked), ("DELETE", "answers/a", None)]:
            assert problem(call(standing, method, path, body, origin=origin), 403) == "ForeignOrigin", origin
    for origin in (f"http://{own}", f"https://{own}"):  # TLS may end before it gets here
        assert call(standing, "DELETE", "answers/a", origin=origin).status == 200
        assert call(standing, "POST", "answers", asked, origin=origin).status == 200
    assert call(standing, "GET", "answers/a", origin="https://evil.example").status == 200  # it can't read the reply


def test_every_reply_carries_the_security_headers(standing, says):
    replies = [call(standing, method, path) for method, path in EVERYWHERE]
    replies += [call(standing, method, path, token=None) for method, path in EVERYWHERE]
    replies += [call(standing, "POST", "answers", b"{"), call(standing, "POST", "answers", b"x" * 70_000)]
    replies += [call(standing, "GET", "answers/a/events", last_event_id=one) for one in ("x", "9-9", "1-2")]
    assert {reply.status for reply in replies} >= {200, 204, 400, 401, 404, 405, 409, 413, 422}
    for reply in replies:
        assert set(reply.headers) >= SECURITY, reply
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors" in policy and "unsafe" not in policy
        assert reply.headers["cache-control"] == "no-store" and "server" not in reply.headers
        assert "access-control-allow-origin" not in reply.headers


def test_the_token_stands_in_no_log_reply_or_repr(client, serve, caplog, capfd, says):
    caplog.set_level(logging.DEBUG)
    server = serve()
    replies = [call(server, method, path) for method, path in EVERYWHERE]
    replies += [call(server, "POST", "answers", b"{"), call(server, "POST", "answers", {TOKEN[:5]: 1})]
    replies += [call(server, "GET", "answers/..%2f"), call(server, "GET", "%00"), call(server, "GET", "a//../..//")]
    for bad in (
        b"GET /?token=%s\r\n\r\n",
        b"GET /?token=%s HTTP/9.9\r\n\r\n",
        b"GET /?token=%s HTTP/1.1\r\nHost\r\n\r\n",
    ):
        replies.append(raw(server.port, bad % TOKEN.encode()))
    upgrade = {"connection": "upgrade", "upgrade": "websocket"}
    replies.append(call(server, "GET", "", **upgrade))
    server.stop()
    shown = caplog.text + repr(server) + "".join(capfd.readouterr())
    shown += "".join(f"{reply.headers} {reply.body!r}" for reply in replies)
    assert TOKEN not in shown
    assert TOKEN in server.link()


# ------------------------------------------------------------------------------------------ running, ending


def test_a_silent_stream_is_kept_alive(client, serve):
    server, writer = serve(limits=Limits(keep_alive=0.2)), Writer(client, "a").say("x")
    one = Watcher(server, "a")

    async def main() -> None:
        running = asyncio.create_task(one.run())
        await until(lambda: one.alive >= 3)
        writer.end()
        await running

    asyncio.run(main())
    assert one.text == "x" and one.states == ["streaming"]


@pytest.mark.slow
@ALL
def test_stopping_the_server_ends_everything(client, serve, says):
    before = set(threading.enumerate())
    server = serve()
    answer_id = call(server, "POST", "answers", {"question": "why?"}).json["id"]
    says[0].say("half")
    watchers = [Watcher(server, answer_id) for _ in range(20)]
    stuck = Slow(server, answer_id)

    async def main() -> None:
        running = [asyncio.create_task(one.connect()) for one in watchers]
        await until(lambda: all(one.text for one in watchers))
        whole = asyncio.create_task(
            asyncio.to_thread(call, server, "POST", "answers", {"question": "b", "stream": False})
        )
        await until(lambda: len(says) == 2)
        await asyncio.wait_for(asyncio.to_thread(server.stop), 60)
        assert problem(await whole, 504) == "StillWaiting"
        await asyncio.gather(*running)

    asyncio.run(main())
    for one in watchers:
        assert one.statuses == [200] and one.clean and one.text == "half" and not one.end
    stuck.sock.close()
    shown = Answer(answer_id, client=client).look()
    assert shown.status == "ended" and shown.text == "half" and shown.record["reason"] == "cancelled"
    ours = ("llmstream web", "AnyIO", "llmstream write", "llmstream model")
    wait_for(lambda: not [t for t in set(threading.enumerate()) - before if t.name.startswith(ours)])
    server.stop()  # once more does no harm
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", server.port), timeout=2)


@pytest.mark.slow
def test_stopping_the_server_without_redis(redis_server, says):
    client = own_server_client(redis_server, "")
    server = WebServer(client=client, token=TOKEN, timing=Timing(lease=1, tick=0.05, give_up=30)).start()
    for n in range(10):
        assert call(server, "POST", "answers", {"question": f"q{n}"}).status == 201
    redis_server.kill()
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    wait_for(lambda: not stopping.is_alive())  # a few leases, not as many as there are answers


def test_a_server_of_the_same_name_takes_the_place_of_the_one_before(client, serve):
    name = f"page-{TOKEN}"
    first = serve(name=name, token=None)
    other = serve(token=None)
    second = serve(name=name, token=None)
    assert not first._thread.is_alive()
    assert (second.port, second.token) == (first.port, first.token)
    assert call(second, "GET", "sources", token=first.token).status == 200
    assert call(other, "GET", "sources", token=other.token).status == 200  # one without a name goes on
    second.stop()
    assert serve(name=name, token=None).link() == first.link()  # after a stop, too: open pages find it again


def test_a_port_that_is_taken(client, serve):
    with pytest.raises(NotServed, match="choose another"):
        WebServer(serve().port, client=client)
    with pytest.raises(NotServed, match="choose another"):
        WebServer(70_000, client=client)


# -------------------------------------------------------------------------------------------- rubbish


def test_requests_that_are_no_requests(standing):
    host = f"Host: 127.0.0.1:{standing.port}\r\nConnection: close\r\n"
    query = f"?token={TOKEN}"
    for bad, statuses in [
        (f"HEAD /{query} HTTP/1.1\r\n{host}\r\n", {200, 404}),
        (f"GET /answers/%61{query} HTTP/1.1\r\n{host}\r\n", {200}),
        (f"GET /answers/a%2f..{query} HTTP/1.1\r\n{host}\r\n", {404}),
        (f"GET /answers/%ff%fe{query} HTTP/1.1\r\n{host}\r\n", {422}),
        (f"GET /../../../../etc/passwd{query} HTTP/1.1\r\n{host}\r\n", {404}),
        (f"GET /%2e%2e/%2e%2e/app.py{query} HTTP/1.1\r\n{host}\r\n", {404}),
        (f"GET /..%5c..%5capp.py{query} HTTP/1.1\r\n{host}\r\n", {404}),
        (f"GET //etc/passwd{query} HTTP/1.1\r\n{host}\r\n", {404}),
        (f"GET /%00{query} HTTP/1.1\r\n{host}\r\n", {404}),
        (f"GET /{'a' * 5000}{query} HTTP/1.1\r\n{host}\r\n", {404}),
        (f"GET http://evil.example/sources{query} HTTP/1.1\r\n{host}\r\n", {200, 400, 404}),
        (f"GET /sources{query} HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n", {200}),
        (f"GET /sources{query} HTTP/1.1\r\nConnection: close\r\n\r\n", {400}),
        (f"OPTIONS * HTTP/1.1\r\n{host}\r\n", {401}),
        (f"POST /answers{query} HTTP/1.1\r\n{host}Content-Length: x\r\n\r\n", {400}),
        (f"POST /answers{query} HTTP/1.1\r\n{host}Content-Length: 99999999999999999999999\r\n\r\n", {400, 413}),
        (f"POST /answers{query} HTTP/1.1\r\n{host}Content-Length: -5\r\n\r\n", {400}),
        ("\x16\x03\x01 not HTTP at all\r\n\r\n", {400}),
    ]:
        reply = raw(standing.port, bad.encode("latin-1"))
        assert reply.status in statuses, (bad, reply)


def test_requests_in_a_row_on_one_connection(standing):
    get = head(standing, "GET", "answers/a", connection="keep-alive")
    events = head(standing, "GET", "answers/a/events", connection="keep-alive")
    last = head(standing, "GET", "answers/zzz")
    with socket.create_connection(("127.0.0.1", standing.port), timeout=60) as sock:
        sock.sendall(get + events + last)
        got = b""
        while data := sock.recv(65_536):
            got += data
    assert re.findall(rb"HTTP/1.1 (\d+)", got) == [b"200", b"200", b"404"] and got.count(b"event: end") == 1


def test_who_sends_byte_by_byte_holds_up_nobody(standing):
    slow = [socket.create_connection(("127.0.0.1", standing.port)) for _ in range(50)]
    for sock in slow:
        sock.sendall(b"POST /answers?token=" + TOKEN.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n")
    follow(one := Watcher(standing, "a"))
    assert one.text == "x"
    for sock in slow:
        sock.close()
    wait_for(lambda: not standing._server.server_state.connections)


NAUGHTY = [
    "",
    "\0",
    "\ud800",
    "\u2028",
    "x" * 300,
    "-1",
    "1e999",
    "NaN",
    "../..",
    "💥",
    " ",
    "a",
    "%",
    "null",
    "1-1",
    "scripted",
]
TEXTS = st.sampled_from(NAUGHTY) | st.text(st.characters(codec=None), max_size=30)
JSONS = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.just(10**400) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
RIGHT = {
    "question": st.sampled_from(["why?", "x" * 8_000, "x" * 9_000, "\0", " 💥"]),
    "topic": st.none() | st.text(max_size=20),
    "source": st.sampled_from(["scripted", "local", "openai", None]),
    "model": st.sampled_from([None, None, "scripted:pace=0", "scripted:long=9"]) | st.text(max_size=20),
    "stream": st.booleans(),
}
ANY = st.fixed_dictionaries({}, optional=dict.fromkeys([*RIGHT, "id"], JSONS))
NEARLY = st.builds(
    lambda right, other, use: right | {name: other[name] for name in use & other.keys()},
    st.fixed_dictionaries(RIGHT),
    ANY,
    st.sets(st.sampled_from([*RIGHT, "id"]), max_size=2),
)
BODIES = (
    (NEARLY | ANY | JSONS).map(lambda made: json.dumps(made).encode())
    | st.binary(max_size=60)
    | st.sampled_from(
        [
            b"[" * 20_000,
            b'{"question":' * 5_000,
            b"1" * 5_000,
            b'{"question": "\xff"}',
            b'{"a\\ud800": 1}',
            b"\xef\xbb\xbf{}",
        ]
    )
)
TYPES = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x", "a/json; charset=utf-7", ""]
IDS = st.sampled_from(["a"] * 9 + ["zzz", "", "..", "%00", "%ff", "a%2fb", "~", "x" * 65, "$", "a%20b"]) | st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="#?/"), max_size=10
)
CURSORS = st.sampled_from(["0-0", "1-1", "1-2", "1-3", "9-9", "1718000000000-0", "x", ""]) | st.text(
    st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=20
).map(str.strip)


@pytest.fixture(scope="module")
def described(standing):
    return call(standing, "GET", "openapi.json").json


@pytest.fixture(scope="module")
def instant():
    """Models that have said all at once, or refuse; also those of a source that would cost something."""
    with pytest.MonkeyPatch.context() as patch:

        def complete(question, *, source=None, **options):
            made = Model("word", end=True)
            made.source, made.model = source or "test", "test"
            return made

        patch.setattr("llmstream_nb.llm.sources.complete", complete)
        yield


@pytest.mark.filterwarnings("ignore:Do not use the `random` module")  # the server's threads do, while one is drawn
@settings(
    max_examples=400, deadline=None, derandomize=bool(os.environ.get("CI")), suppress_health_check=list(HealthCheck)
)
@given(data=st.data())
def test_no_request_makes_the_server_fail_or_say_what_it_has_not_described(standing, described, instant, data):
    paths = sorted(described["paths"].items())
    path, operations = data.draw(st.sampled_from([paths[0], *paths]))  # /answers, where most can go wrong, more often
    method = data.draw(st.sampled_from([*operations, *operations, *operations, "put", "post", "patch", "options"]))
    query = data.draw(st.sampled_from(["", "&after=" + "%41"])) if data.draw(st.booleans()) else ""
    place = path[1:].replace("{answer_id}", data.draw(IDS))
    body = data.draw(st.none() | BODIES) if method in ("post", "put", "delete") else None
    headers = {}
    if body is not None:
        headers["content_type"] = data.draw(st.sampled_from(["application/json"] * 9 + TYPES))
    if data.draw(st.booleans()):
        headers["last_event_id"] = data.draw(CURSORS)
    reply = call(standing, method.upper(), place + ("?" + query if query else ""), body, **headers)
    status = str(reply.status)
    operation = operations.get(method)
    # A path parameter may make another path of it, for which nothing is described
    if (
        operation is None
        or not re.fullmatch(path[1:].replace("{answer_id}", "[^/]+"), place.replace("%2f", "/"))
        or ".." in place
    ):
        assert reply.status < 500
        return
    assert status in operation["responses"], (method, place, reply)
    content = operation["responses"][status].get("content", {})
    if "application/json" in content:
        assert reply.headers["content-type"] == "application/json"
        schema = content["application/json"]["schema"] | {"components": described["components"]}
        jsonschema.validate(reply.json, schema)
    assert reply.status < 500 or reply.status in (503, 504)


def test_what_is_described_is_what_there_is(described):
    assert {(method, path) for path, operations in described["paths"].items() for method in operations} == {
        ("post", "/answers"),
        ("get", "/answers/{answer_id}"),
        ("delete", "/answers/{answer_id}"),
        ("get", "/answers/{answer_id}/events"),
        ("get", "/sources"),
    }


# ------------------------------------------------------------------------------- broken on purpose


def test_an_id_on_every_event_of_an_entry_would_lose_text(monkeypatch, client, serve):
    """The rule that a cut between a gap and its text must not lose the text, and the test that would find it out."""
    events = [Gap(EntryID(1, 3), 2), Text("kept", EntryID(1, 3))]

    def resumed(made) -> str:
        """The text of one whose connection is cut after the first event, and who resumes at its ID."""
        parser = Parser()
        place = ORIGIN
        for event in parser.feed(made[0].data):
            place = EntryID.parse(event.id) if event.own else place
        return "kept" if place < EntryID(1, 3) else ""

    assert resumed(list(sse.frames(events))) == "kept"
    broken = [sse.Frame(e.id, sse.frame(*sse.describe(e), e.id)) for e in events]
    assert resumed(broken) == ""


def test_a_hub_without_a_window_would_be_found_out(monkeypatch):
    monkeypatch.setattr(hub, "WINDOW", 1 << 40)
    limit = 256_000
    channel = hub.Channel(Round(Names().answer("a"), Follower("a", ORIGIN, FAST)), sse.Wire("a", {}))
    channel.take([Text("x" * 5_000, EntryID(1, n)) for n in range(1, 100)])
    assert channel._size > limit


def test_a_guard_without_the_origin_rule_would_be_found_out(monkeypatch, standing):
    rule = admission.Admission._check

    def blind(self, scope, headers):
        return rule(self, scope, {name: value for name, value in headers.items() if name != "origin"})

    monkeypatch.setattr(admission.Admission, "_check", blind)
    with pytest.raises(AssertionError):
        test_another_sites_page_may_not_change_anything(standing)
