"""An id that is used again, and streams that outsiders spoil: nothing old comes into the new, and all are told."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import threading
import time
import uuid
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import redis

from llmstream_nb import tables
from llmstream_nb.answers import ask as ask_module
from llmstream_nb.answers import attempt as attempt_module
from llmstream_nb.answers import record as record_module
from llmstream_nb.answers.ask import Answer, ask, clear, stop_answer
from llmstream_nb.answers.attempt import Attempt
from llmstream_nb.answers.connection import connect, names_of
from llmstream_nb.answers.produce import Producer
from llmstream_nb.answers.read import aread_answer, look, read_answer
from llmstream_nb.answers.record import new_record, register
from llmstream_nb.faults import servers
from llmstream_nb.pool.groups import GroupGone, create_group, read_answer_group
from llmstream_nb.pool.queue import enqueue
from llmstream_nb.pool.worker import Worker
from llmstream_nb.protocol.events import Ended, Failed, Gap, Interrupted, Restarted, Started, Text, text_of
from llmstream_nb.protocol.follow import Follower
from llmstream_nb.protocol.round import Patience, StillWaiting
from llmstream_nb.protocol.wire import (
    AnswerExists,
    AnswerNotFound,
    Deleted,
    Fenced,
    NotAnAnswer,
    Timing,
)
from llmstream_nb.web import WebServer
from llmstream_nb.widgets.answer_view import AnswerView
from llmstream_nb.widgets.monitor import Monitor

from .conftest import BACKENDS
from .model import Model, record_of, start, stream_of, text_in, wait_for
from .network import Proxy
from .web import TOKEN, Watcher, call

QUICK = Timing(lease=0.4, tick=0.04, ttl=600.0, give_up=30.0, patience=4.0)


def dead(client, *texts: str, timing: Timing = QUICK) -> Attempt:
    """A producer that has said so much and is killed; its object may wake up again."""
    record = new_record("tour", "old?", None, "test", "test")
    register(client, record, timing)
    attempt = Attempt(client, record, timing)
    attempt.open(lambda top: ("start", {}))
    attempt.entries += [("text", text, 1) for text in texts]
    attempt.flush()
    return attempt


def ask_anew(client, *texts: str) -> Producer:
    """Clear it, and have the same id answered with another text, to its end."""
    clear("tour", client=client, timing=QUICK)
    producer = start(client, Model(*texts, end=True), QUICK, "tour")
    wait_for(producer.done.is_set)
    assert producer.error is None
    return producer


class Follow(threading.Thread):
    """Runs an iterator of events or batches, and keeps what it gave and raised."""

    def __init__(self, made) -> None:
        super().__init__(daemon=True)
        self.made, self.events, self.error = made, [], None
        self.start()

    def run(self) -> None:
        try:
            for event in self.made:
                self.events.append(event)
        except Exception as error:
            self.error = error

    def ended(self):
        self.join(60)
        assert not self.is_alive(), f"it waits: {self.events[-3:]}"
        return self.events


def asynchronous(made, events: list) -> threading.Thread:
    async def run() -> None:
        async for event in made:
            events.append(event)  # noqa: PERF401 - what came before an error counts, too

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    return thread


def after_restart(events: list) -> list:
    """What follows the newest Restarted, which must be there."""
    places = [number for number, event in enumerate(events) if isinstance(event, Restarted)]
    assert places, f"nobody said that it began anew: {events}"
    return events[places[-1] + 1 :]


@pytest.fixture
def web(client) -> Iterator[WebServer]:
    made = WebServer(client=client, token=TOKEN, timing=QUICK).start()
    yield made
    made.stop()


# ------------------------------------------------------------------------------------- (a) who watches sees the new

NEW = [("two ", "three"), ("2",), tuple(f"{n} " for n in range(40))]


@pytest.mark.slow
@pytest.mark.parametrize("texts", NEW, ids=["new", "shorter", "longer"])
def test_readers_of_a_dead_answer_see_the_next_one_of_its_id(client, texts) -> None:
    dead(client, *(f"old{n} " for n in range(9)))
    options = {"client": client, "timing": QUICK}
    reader, events = Follow(read_answer("tour", **options)), []
    thread = asynchronous(aread_answer("tour", **options), events)
    wait_for(lambda: len(reader.events) == 10 == len(events))
    ask_anew(client, *texts)
    thread.join(60)
    for seen in (reader.ended(), events):
        if isinstance(seen[-1], Failed):  # it looked in between: that is told, too
            assert seen[-1].error == "Deleted"
            continue
        assert text_of(after_restart(seen)) == "".join(texts) and isinstance(seen[-1], Ended)


@pytest.mark.slow
@pytest.mark.parametrize("texts", NEW, ids=["new", "shorter", "longer"])
@pytest.mark.parametrize("left", ["entries", "record"])
def test_who_comes_back_with_an_id_of_the_old_answer_gets_the_new_one(client, web, texts, left) -> None:
    dead(client, *(f"old{n} " for n in range(9)))
    ask_anew(client, *texts)
    if left == "record":
        client.delete(names_of(client).answer("tour").chunks)
    options = {"client": client, "timing": QUICK}
    for place in ("1-9", "1-4", "1-0") if left == "entries" else ("1-4",):
        events = list(read_answer("tour", place, **options))
        assert text_of(after_restart(events)) == "".join(texts) and isinstance(events[-1], Ended)
        assert not [event for event in events if isinstance(event, Gap)]
        again = []
        asynchronous(aread_answer("tour", place, **options), again).join(60)
        assert again == events
        watcher = Watcher(web, "tour", last_id=place, text="old")
        asyncio.run(watcher.run())
        assert watcher.text == "".join(texts) and watcher.end[0] == "end"
        assert [name for name, _ in watcher.events if name == "start"]


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True], ids=["view", "plain"])
@pytest.mark.parametrize("group", [None, "g"], ids=["alone", "group"])
def test_a_view_of_a_dead_answer_shows_the_next_one(client, plain, group) -> None:
    dead(client, "old ", "text")
    view = AnswerView("tour", client=client, plain=plain, group=group)
    wait_for(lambda: view.transcript.text == "old text")
    producer = ask_anew(client, "new")
    wait_for(lambda: view.settled)
    if view.transcript.state == "failed":  # it saw the answer go, or its group
        assert "eleted" in view.transcript.note
    else:
        assert (view.transcript.text, view.transcript.state) == ("new", "ended") and producer.ended
    view.close()


@pytest.mark.slow
def test_the_pages_stream_goes_on_with_the_next_answer(client, web) -> None:
    dead(client, *(f"old{n} " for n in range(9)))
    watcher, done = Watcher(web, "tour"), threading.Event()
    thread = threading.Thread(target=lambda: (asyncio.run(watcher.run()), done.set()), daemon=True)
    thread.start()
    wait_for(lambda: watcher.text.endswith("old8 "))
    ask_anew(client, "new ", "text")
    wait_for(done.is_set)
    assert watcher.end == ("failed", {"error": "Deleted", "message": "This answer was deleted."}) or (
        watcher.text == "new text" and watcher.end[0] == "end"
    )


@pytest.mark.slow
def test_a_group_reader_is_told_that_its_group_is_gone(client) -> None:
    dead(client, "old ", "text")
    reader = Follow(read_answer_group("tour", "g", "c", client=client, timing=QUICK))
    wait_for(lambda: len(reader.events) == 1)
    ask_anew(client, "new")
    reader.ended()
    assert isinstance(reader.error, GroupGone)
    again = Follow(read_answer_group("tour", "g", "c", client=client, timing=QUICK)).ended()
    assert "".join(entry.text for batch in again for entry in batch if entry.kind == "text") == "new"


@pytest.mark.slow
def test_a_reader_in_the_moment_between_waits_for_the_new_question(client) -> None:
    """It is asked, and nobody has begun: neither deleted nor dead."""
    dead(client, "old ", "text")
    clear("tour", client=client, timing=QUICK)
    register(client, record := new_record("tour", "new?", None, "test", "test"), QUICK)
    reader = Follow(read_answer("tour", "1-2", client=client, timing=QUICK))
    time.sleep(2 * QUICK.lease)
    assert reader.events == [] and reader.is_alive()
    Producer(client, record, Model("new", end=True), QUICK).run()
    assert [type(event) for event in reader.ended()] == [Restarted, Text, Ended]


# ----------------------------------------------------------------------------------------- (b) bytes that come late


@pytest.fixture(scope="module")
def machine(program) -> Iterator[tuple[servers.RedisServer, Proxy]]:
    with servers.RedisServer(program) as server, Proxy("127.0.0.1", server.port) as proxy:
        yield server, proxy


@pytest.fixture
def late(machine) -> Iterator[tuple[redis.Redis, redis.Redis, Proxy]]:
    """A server seen directly, and through the proxy."""
    server, proxy = machine
    prefix = f"t{uuid.uuid4().hex[:8]}"
    direct = connect(server.url, prefix=prefix)
    proxied = connect(proxy.url, prefix=prefix, socket_timeout=0.3)
    yield direct, proxied, proxy
    proxy.heal()
    direct.close()
    proxied.close()


def arrived(proxy: Proxy, before: int) -> None:
    """All that fell into the blackhole has come to the server."""
    wait_for(lambda: proxy.bytes_up > before)


def suppressed(function) -> None:
    """What a process does that nobody hears of any more."""
    with contextlib.suppress(Exception):
        function()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["opening", "text", "end"])
@pytest.mark.parametrize("when", ["cleared", "asked", "a group waits", "begun", "ended"])
def test_a_dead_producers_bytes_that_come_late_are_in_no_answer(late, what, when) -> None:
    direct, proxied, proxy = late
    record = new_record("tour", "old?", None, "test", "test")
    register(direct, record, QUICK)
    attempt = Attempt(proxied, record, QUICK)
    if what == "opening":
        hold, send = threading.Event(), attempt._queue_xadd

        def held(*args, **options):
            proxy.blackhole()  # WATCH has come to the server; MULTI … EXEC will be late
            hold.set()
            send(*args, **options)

        attempt._queue_xadd = held

        attempt._opening = lambda top: ("start", {})
        killed = threading.Thread(target=suppressed, args=(attempt.synchronise,), daemon=True)
        killed.start()
        hold.wait(60)
    else:
        attempt.open(lambda top: ("start", {}))
        attempt.entries += [("text", "old ", 1)]
        attempt.flush()
        attempt.entries += [("text", "late ", 1), ("text", "late ", 1)] if what == "text" else []
        attempt.entries += [("end", '{"reason": "stop"}', 1)] if what == "end" else []
        proxy.blackhole()
        if what == "end":
            attempt._whole = False  # without the look before the end: only the bytes are of interest
        killed = threading.Thread(target=suppressed, args=(attempt.flush,), daemon=True)
        killed.start()
    killed.join(60)
    before = proxy.bytes_up
    clear("tour", client=direct, timing=QUICK)
    if when == "cleared":
        proxy.heal(late=True)
        arrived(proxy, before)
    newer = new_record("tour", "new?", None, "test", "test")
    register(direct, newer, QUICK)
    if when == "a group waits":
        create_group(direct, "tour", "g", QUICK)
    if when in ("asked", "a group waits"):
        proxy.heal(late=True)
        arrived(proxy, before)
        time.sleep(0.05)
    says = Model("new ")
    producer = Producer(direct, newer, says, QUICK)
    producer.start()
    reader = Follow(read_answer("tour", client=direct, timing=QUICK))
    wait_for(lambda: text_in(direct, "tour") == "new " or producer.done.is_set())
    if when == "begun":
        proxy.heal(late=True)
        arrived(proxy, before)
        time.sleep(0.05)
    says.say("text")
    says.end()
    wait_for(producer.done.is_set)
    assert producer.error is None and producer.ended
    if when == "ended":
        proxy.heal(late=True)
        arrived(proxy, before)
        time.sleep(0.05)
    assert text_in(direct, "tour") == "new text" == look("tour", direct).record["text"]
    assert {entry.id.attempt for entry in stream_of(direct, "tour")} == {producer.attempt.number}
    assert [type(event) for event in reader.ended()][-1] is Ended and text_of(reader.events) == "new text"
    assert not [event for event in reader.events if isinstance(event, Text) and "late" in event.text]


# ------------------------------------------------------------------------------------------- (c) a producer asleep


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("begun", [True, False], ids=["new one begun", "new one waits"])
@pytest.mark.parametrize("asleep", ["before its opening", "between two flushes", "in its flush", "before its record"])
def test_a_producer_that_slept_while_its_id_was_asked_anew_writes_nothing(client, times, begun, asleep) -> None:
    record = new_record("tour", "old?", None, "test", "test")
    register(client, record, QUICK)
    attempt = Attempt(client, record, QUICK)
    attempt._opening = lambda top: ("start", {})
    if asleep != "before its opening":
        attempt.synchronise()
        attempt.entries += [("text", "old ", 1)]
        attempt.flush()
        attempt.entries += [("text", "old ", 1)]
    if asleep == "before its record":
        attempt.entries += [("end", '{"reason": "stop"}', 1)]
        attempt.flush()
        client.delete(attempt.keys.lease(1))
    for _ in range(times):
        clear("tour", client=client, timing=QUICK)
        newer = new_record("tour", "new?", None, "test", "test")
        register(client, newer, QUICK)
    says = Model("new ")
    producer = Producer(client, newer, says, QUICK)
    if begun:
        producer.start()
        wait_for(lambda: text_in(client, "tour") == "new ")
    if asleep == "before its record":
        attempt.finish()
    else:
        if asleep == "in its flush":
            attempt._leased = time.monotonic()  # it has just looked
        with pytest.raises((Deleted, Fenced)):
            attempt.insist(attempt.flush if asleep != "before its opening" else attempt.synchronise)
    if not begun:
        producer.start()
    says.say("text")
    says.end()
    wait_for(producer.done.is_set)
    assert producer.error is None
    assert {entry.id.attempt for entry in stream_of(client, "tour")} == {1 + times}
    assert look("tour", client).text == "new text" == look("tour", client).record["text"]


# ------------------------------------------------------------------------------------------- (d) two asks at once


@pytest.mark.parametrize("frozen", [False, True])
def test_of_two_who_ask_for_one_id_at_once_exactly_one_wins(client, monkeypatch, no_leftovers, frozen) -> None:
    if frozen:
        monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)
    for round_number in range(8):
        together, won, lost = threading.Barrier(3), [], []

        def ask_it(name: str, together=together, won=won, lost=lost, answer_id=f"a{round_number}") -> None:
            together.wait()
            try:
                won.append(ask(name, id=answer_id, source=lambda *_: [name], client=client, timing=QUICK))
            except AnswerExists:
                lost.append(name)

        threads = [threading.Thread(target=ask_it, args=(name,)) for name in "ABC"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert (len(won), len(lost)) == (1, 2)
        now = won[0].wait(60).look()
        assert now.text == now.record["text"] == now.record["question"] and now.text not in lost


def test_an_asker_that_is_held_up_does_not_touch_a_newer_question(client, monkeypatch) -> None:
    """Its question was cleared and asked anew between any two of its commands."""
    pexpired, add = threading.Event(), record_module.add_to_index

    def held(given, record):
        if record["question"] == "old?" and not pexpired.is_set():
            pexpired.set()
            clear("tour", client=client, timing=QUICK)
            register(client, newer, QUICK)
            client.set(names_of(client).answer("tour").cancel, "stop")
        add(given, record)

    newer = new_record("tour", "new?", None, "test", "test")
    monkeypatch.setattr(record_module, "add_to_index", held)
    register(client, old := new_record("tour", "old?", None, "test", "test"), QUICK)
    assert record_of(client, "tour") == newer and client.exists(names_of(client).answer("tour").cancel)
    producer = Producer(client, old, Model("old", end=True), QUICK)
    producer.run()
    assert isinstance(producer.error, (Deleted, Fenced)) and stream_of(client, "tour") == []


# ------------------------------------------------------------------------------------------- (e) Stop and Clear


def test_stop_after_clear_and_clear_after_stop(client) -> None:
    calm = dataclasses.replace(QUICK, lease=10.0)  # for two of them, Stop and Clear wait for a producer that lives
    for first in ("stop", "clear"):
        producer = start(client, Model("one "), calm, "tour")
        wait_for(lambda: text_in(client, "tour") == "one ")
        if first == "stop":
            assert stop_answer("tour", client=client, timing=calm) == "ended"
        assert clear("tour", client=client, timing=calm) == 1
        wait_for(producer.done.is_set)
        with pytest.raises(AnswerNotFound):
            stop_answer("tour", client=client, timing=QUICK)
        assert not client.exists(*names_of(client).answer("tour")[:3])


@pytest.mark.slow
@pytest.mark.parametrize("pooled", [False, True])
def test_a_late_stop_does_not_meet_the_next_question_of_the_id(client, monkeypatch, pooled) -> None:
    """It has looked, and is held up until the id is asked anew."""
    dead(client, "old ")
    looked, says = [], Model("new ")

    def look_and_sleep(answer_id, given):
        found = look(answer_id, given)
        if not looked:
            looked.append(found)
            clear("tour", client=client, timing=QUICK)
            if pooled:
                enqueue("new?", id="tour", source="scripted", client=client, timing=QUICK)
            else:
                looked.append(start(client, says, QUICK, "tour"))
                wait_for(lambda: text_in(client, "tour") == "new ")
        return found

    monkeypatch.setattr(ask_module, "look", look_and_sleep)
    stop_answer("tour", client=client, timing=QUICK)
    monkeypatch.undo()
    assert not client.exists(names_of(client).answer("tour").cancel)
    if pooled:
        assert look("tour", client).status == "queued"
        return
    says.say("text")
    says.end()
    wait_for(looked[1].done.is_set)
    assert look("tour", client).text == "new text" and look("tour", client).record["reason"] == "stop"


def test_a_repair_that_comes_late_does_not_end_the_next_question(client, monkeypatch) -> None:
    old = dead(client, "old ")
    old.entries.append(("end", '{"reason": "stop"}', 2))
    old.flush()
    client.delete(old.keys.lease(1))

    def look_late(answer_id, given):
        monkeypatch.undo()
        clear("tour", client=client, timing=QUICK)
        register(client, newer, QUICK)
        return look(answer_id, given)

    newer = new_record("tour", "new?", None, "test", "test")
    monkeypatch.setattr(attempt_module, "look", look_late)
    Producer(client, old.record, Model("else", end=True), QUICK).run()
    assert record_of(client, "tour") == newer


# ------------------------------------------------------------------------------------------- (f) outsiders that trim


def spoil(client, how: str) -> None:
    key = names_of(client).answer("tour").chunks
    if how == "XTRIM":
        client.xtrim(key, maxlen=0, approximate=False)
    else:
        client.xdel(key, *[entry_id for entry_id, _ in client.xrange(key)])
    assert client.xlen(key) == 0


@pytest.mark.parametrize("how", ["XTRIM", "XDEL"])
def test_a_producer_whose_entries_are_all_removed_goes_on_at_once(client, how) -> None:
    says = Model("one ", "two ")
    producer = start(client, says, QUICK, "tour")
    wait_for(lambda: text_in(client, "tour") == "one two ")
    spoil(client, how)
    reader = Follow(read_answer("tour", client=client, timing=QUICK))
    says.say("three ")
    wait_for(lambda: text_in(client, "tour") == "three ")
    spoil(client, how)
    time.sleep(2 * QUICK.tick)  # a tick meets it
    says.say("four")
    says.end()
    wait_for(producer.done.is_set)
    assert producer.error is None and producer.attempt.number == 1
    assert look("tour", client).text == "one two three four" == look("tour", client).record["text"]
    assert look("tour", client).missing == 0
    told = sum(event.missing for event in reader.ended() if isinstance(event, Gap))
    seen = [event for event in reader.events if isinstance(event, (Text, Started, Ended))]
    assert told + len(seen) == len(producer.attempt.entries) and isinstance(seen[-1], Ended)


def test_a_producer_whose_newest_entries_are_deleted_goes_on_at_once(client) -> None:
    """Redis gives no number twice: what is sent again under one of theirs is refused."""
    says = Model("one ", "two ", "three ")
    producer = start(client, says, QUICK, "tour")
    wait_for(lambda: text_in(client, "tour") == "one two three ")
    client.xdel(names_of(client).answer("tour").chunks, "1-2", "1-3")
    producer.attempt._leased, looked = float("-inf"), time.monotonic()  # as after any error, it looks what Redis has
    wait_for(lambda: producer.attempt._ticked > looked + QUICK.tick)
    says.say("four")
    says.end()
    wait_for(producer.done.is_set)
    assert producer.error is None and text_in(client, "tour") == "one four"
    assert look("tour", client).text == "one two three four"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["XTRIM", "XDEL"])
def test_a_worker_takes_over_an_answer_without_entries(client, monkeypatch, how) -> None:
    answer = enqueue("why?", id="tour", client=client, timing=QUICK)
    record = record_of(client, "tour")
    attempt = Attempt(client, record, QUICK)
    attempt.open(lambda top: ("start", {}))
    attempt.entries += [("text", "old ", 1)]
    attempt.flush()
    spoil(client, how)
    wait_for(lambda: not client.exists(attempt.keys.lease(1)))
    worker = Worker(client=client, timing=QUICK, source=lambda *_: ["new ", "text"]).start()
    try:
        assert answer.wait(60).text == "new text"
        assert {entry.id.attempt for entry in stream_of(client, "tour")} == {2}
    finally:
        worker.stop(0)


# --------------------------------------------------------------------------- (g) outsiders that delete, two producers

DELETED = {
    "DEL stream": lambda client, keys: client.delete(keys.chunks),
    "DEL both": lambda client, keys: client.delete(keys.chunks, keys.question),
    "DEL all": lambda client, keys: client.delete(*keys[:4], keys.lease(1), keys.lease(2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ["1 then 2", "2 then 1", "1, end of 2", "1, text of 2, 1, end of 2", "end of 2, 1"])
@pytest.mark.parametrize("how", DELETED)
@pytest.mark.parametrize("ticks", [True, False], ids=["ticks", "no tick"])
def test_two_producers_of_a_deleted_stream_end_it_once_and_whole(client, how, order, ticks) -> None:
    sleeper = dead(client, "old ", "old ")
    wait_for(lambda: not client.exists(sleeper.keys.lease(1)))
    heir = Attempt(client, sleeper.record, QUICK)
    heir.open(lambda top: ("start", {}))
    heir.entries += [("text", f"{n} ", 1) for n in range(4)]
    heir.flush()
    assert heir.number == 2
    DELETED[how](client, heir.keys)
    parties, ended = {"1": sleeper, "2": heir}, []

    def wake(attempt: Attempt, *entries) -> None:
        if attempt in ended:
            return
        attempt.entries += entries
        attempt._ticked = float("-inf") if ticks else time.monotonic() + 60
        try:
            while attempt.sent < len(attempt.entries):
                attempt.insist(attempt.flush)
            if entries and entries[-1][0] == "end":
                attempt.insist(attempt.finish)
                ended.append(attempt)
        except Fenced:
            ended.append(attempt)

    for part in order.replace(" then ", ", ").split(", "):
        attempt = parties[part[-1]]
        if attempt is sleeper:
            attempt._leased = float("-inf")
        wake(attempt, ("end", '{"reason": "stop"}', 2) if "end" in part else ("text", "more ", 2))
    for attempt in (sleeper, heir):
        attempt._leased = float("-inf") if attempt is sleeper else attempt._leased
        if attempt not in ended:
            wake(attempt, ("end", '{"reason": "stop"}', 2))
    entries = stream_of(client, "tour")
    assert [entry.final for entry in entries] == [False] * (len(entries) - 1) + [True]
    last = entries[-1].id.attempt
    assert [entry.id.seq for entry in entries if entry.id.attempt == last] == list(range(entries[-1].id.seq + 1))
    text = "".join(entry.text for entry in entries if entry.kind == "text" and entry.id.attempt == last)
    assert look("tour", client).record["text"] == text == look("tour", client).text
    assert look("tour", client).record["end"] == str(entries[-1].id)
    for attempt in (sleeper, heir):
        attempt.close()


@pytest.mark.slow
def test_flushall_while_one_sleeps_and_one_writes(machine) -> None:
    client = connect(machine[0].url, prefix=f"t{uuid.uuid4().hex[:8]}")
    for first in ("sleeper", "heir"):
        client.flushall()
        sleeper = dead(client, "old ")
        wait_for(lambda: not client.exists(sleeper.keys.lease(1)))
        says = Model("new ")
        heir = Producer(client, sleeper.record, says, QUICK)
        heir.start()
        wait_for(lambda: text_in(client, "tour", 2) == "new ")
        with heir._changed if first == "sleeper" else threading.Lock():
            client.flushall()
            if first == "sleeper":
                sleeper.entries.append(("text", "old ", 2))
                try:
                    sleeper.insist(sleeper.flush)
                except Fenced:
                    pass  # the heir was faster
        says.say("text")
        says.end()
        wait_for(heir.done.is_set)
        entries = stream_of(client, "tour")
        assert heir.error is None and heir.ended
        assert [entry.final for entry in entries] == [False] * (len(entries) - 1) + [True]
        assert text_in(client, "tour", entries[-1].id.attempt) == "new text" == look("tour", client).text
        with pytest.raises(Fenced):
            sleeper._leased = float("-inf")
            sleeper.entries.append(("text", "old ", 3))
            sleeper.insist(sleeper.flush)
        sleeper.close()
    client.close()


# --------------------------------------------------------------------------------------------------- (h) the index


def listed(client) -> list[str]:
    return client.zrange(names_of(client).answers, 0, -1)


@pytest.mark.slow
def test_clear_of_many_forgets_nothing_else(client) -> None:
    """Also not what is asked, under one of these ids, while the others are being deleted."""
    many = 1_500
    names = names_of(client)
    with client.pipeline(transaction=False) as pipe:
        for n in range(many):
            record = new_record(f"a{n}", "?", None, "test", "test")
            pipe.set(names.answer(f"a{n}").question, json.dumps(record))
            pipe.zadd(names.answers, {f"a{n}": n})
        pipe.execute()
    register(client, new_record("other", "?", None, "test", "test"), QUICK)
    done = threading.Event()
    thread = threading.Thread(
        target=lambda: (clear(*(f"a{n}" for n in range(many)), client=client, timing=QUICK), done.set()), daemon=True
    )
    thread.start()
    wait_for(lambda: not client.exists(names.answer("a0").question))
    register(client, new_record("a0", "anew?", None, "test", "test"), QUICK)
    done.wait(60)
    assert done.is_set() and sorted(listed(client)) == ["a0", "other"]
    assert look("a0", client).record["first"] == 2


def test_a_clear_of_all_leaves_what_is_asked_meanwhile(client, monkeypatch) -> None:
    register(client, new_record("old", "?", None, "test", "test"), QUICK)
    client.zadd(names_of(client).answers, {"no id!": 1})
    delete = ask_module._delete

    def slow(*args) -> None:
        delete(*args)
        for name in ("old", "new"):
            enqueue("anew?", id=name, source="scripted", client=client, timing=QUICK)

    monkeypatch.setattr(ask_module, "_delete", slow)
    assert clear(client=client, timing=QUICK) == 1
    assert sorted(listed(client)) == ["new", "old"]  # asked in one millisecond, perhaps
    assert client.xlen(names_of(client).questions) == 2


def test_who_lives_long_stays_in_the_index(client) -> None:
    week = Timing(lease=0.4, ttl=7 * 86_400)
    register(client, new_record("week", "?", None, "test", "test"), week)
    for n in range(60):
        register(client, new_record(f"day{n}", "?", None, "test", "test"), Timing())
    client.delete(*(names_of(client).answer(f"day{n}").question for n in range(60)))
    for n in range(60):
        register(client, new_record(f"later{n}", "?", None, "test", "test"), Timing())
    assert "week" in listed(client)
    assert {f"later{n}" for n in range(60)} <= set(listed(client))
    assert len(listed(client)) < 100  # what has expired goes, little by little


# A fake one in this process has the clock that is patched.
@pytest.mark.parametrize("backend", [name for name in BACKENDS if not name.startswith("fake")], indirect=True)
def test_a_clock_that_is_a_day_ahead_does_not_reorder_the_index(client, monkeypatch, no_leftovers) -> None:
    for number, ahead in enumerate((0, 86_400, -86_400, 0)):
        with monkeypatch.context() as patch:
            now = time.time() + ahead
            # Not everybody's clock: that of a fakeredis is this process's own.
            patch.setattr(record_module, "time", SimpleNamespace(time=lambda now=now: now))
            ask("?", id=f"a{number}", source=lambda *_: ["x"], client=client, timing=QUICK).wait(60)
        time.sleep(0.002)
    assert listed(client) == ["a0", "a1", "a2", "a3"]
    assert list(tables.answers(client=client)["id"]) == ["a0", "a1", "a2", "a3"]


# --------------------------------------------------------------------------------------------- (i) a timeout of zero


@pytest.mark.parametrize("count", [3, 499, 998, 1_200])
@pytest.mark.parametrize("left", ["entries", "record"])
def test_with_a_timeout_of_zero_an_ended_answer_is_given_whole(client, count, left) -> None:
    producer = start(client, Model(*(f"{n} " for n in range(count)), end=True), QUICK, "tour")
    wait_for(producer.done.is_set)
    if left == "record":
        client.delete(names_of(client).answer("tour").chunks)
    events = list(read_answer("tour", timeout=0, client=client, timing=QUICK))
    assert text_of(events) == "".join(f"{n} " for n in range(count)) and isinstance(events[-1], Ended)


def test_with_a_timeout_of_zero_nobody_waits(client) -> None:
    with pytest.raises(AnswerNotFound):
        list(read_answer("nosuch", timeout=0, client=client, timing=QUICK))
    says = Model("one ")
    producer = start(client, says, QUICK, "tour")
    wait_for(lambda: text_in(client, "tour") == "one ")
    for place in ("0-0", "1-1"):
        seen = []
        with pytest.raises(StillWaiting):
            for event in read_answer("tour", place, timeout=0, client=client, timing=QUICK):
                seen.append(event)  # noqa: PERF402
        assert text_of(seen) == ("one " if place == "0-0" else "")
    assert Patience(Follower("tour"), 0, time.monotonic).pause() == 0
    says.end()
    wait_for(producer.done.is_set)


# ------------------------------------------------------------------------------------------------ (j) a short lease


@pytest.mark.slow
def test_a_short_lease_does_not_flap(client) -> None:
    short = Timing(lease=1.0)
    says = Model("one ")
    producer = start(client, says, short, "tour")
    readers = [Follow(read_answer("tour", client=client, timing=short)) for _ in range(3)]
    for n in range(20):  # two leases
        time.sleep(0.1)
        says.say(f"{n} ") if n % 5 == 0 else None
    says.end()
    wait_for(producer.done.is_set)
    for reader in readers:
        assert not [event for event in reader.ended() if isinstance(event, (Interrupted, Restarted))]
        assert isinstance(reader.events[-1], Ended)


# ----------------------------------------------------------------------------------- (k) what outsiders may write

DEEP = "[" * 100_000 + "]" * 100_000
ENDS = {
    "deep": f'{{"reason": {DEEP}}}',
    "deep object": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "not a number": '{"reason": "stop", "total_ms": NaN, "first_token_ms": Infinity, "chunks": -Infinity}',
    "half": '{"reason": "\\ud83d half", "usage": {"\\ud83d": "\\udc00"}}',
    "long": json.dumps({"reason": "x" * 10_000_000}),
    "400 levels": '{"reason": "stop", "usage": ' + '{"a":' * 400 + "1" + "}" * 400 + "}",
    "types": '{"reason": ["a"], "total_ms": "soon", "first_token_ms": [1], "chunks": "many", "usage": 7}',
    "odd error": '{"error": {"a": 1}, "message": [1], "total_ms": true, "first_token_ms": {}, "chunks": 1e999}',
    "closes": '{"reason": "stop", "closes": ["1-1"]}',
    "digits": '{"reason": "stop", "total_ms": ' + "9" * 3_000 + "}",
    "no object": "[]",
}
STARTS = {"at text": '{"at": "noon"}', "at list": '{"at": [1], "model": {"a": 1}, "worker": [2]}', "deep": DEEP}
RECORDS = {
    "text": '"noon"', "null": "null", "not a number": "NaN", "endless": "1e400", "list": "[1]", "huge": "9" * 4000,
    "truth": "true", "object": '{"a": 1}',
}  # fmt: skip
MS = {"digits": "9" * 4_000, "negative": "-5", "negative digits": "-" + "9" * 4_000, "more digits": "9" * 5_000}


def write(client, answer_id: str, *entries: tuple[str, str, str], record: str | None = None) -> None:
    """An answer that somebody else wrote, in Redis."""
    keys = names_of(client).answer(answer_id)
    for seq, (kind, text, ms) in enumerate(entries):
        client.xadd(keys.chunks, {"kind": kind, "text": text, "ms": ms}, f"1-{seq}")
    client.set(keys.question, record or json.dumps(new_record(answer_id, "?", None, "test", "test")))
    client.zadd(names_of(client).answers, {answer_id: time.time()})


def odd_answers(client) -> list[str]:
    ids = []
    for number, end in enumerate(ENDS.values()):
        write(client, f"end{number}", ("start", "{}", "0"), ("text", "one", "1"), ("end", end, "2"))
        write(client, f"err{number}", ("start", "{}", "0"), ("text", "one", "1"), ("error", end, "2"))
        ids += [f"end{number}", f"err{number}"]
    for number, begin in enumerate(STARTS.values()):
        write(client, f"start{number}", ("start", begin, "0"), ("text", "one", "1"), ("end", '{"reason": "stop"}', "2"))
        write(client, f"open{number}", ("start", begin, "0"), ("text", "one", "1"))
        ids += [f"start{number}", f"open{number}"]
    for number, asked in enumerate(RECORDS.values()):
        record = f'{{"id": "rec{number}", "question": "?", "topic": "", "source": "scripted", "model": "", "asked": {asked}}}'
        write(client, f"rec{number}", ("start", "{}", "0"), ("text", "one", "1"), ("end", "{}", "2"), record=record)
        ids.append(f"rec{number}")
    odd = '{"question": [1], "source": {}, "model": 5, "asked": "x", "first": "no", "attempt": [2], "nonce": {}, '
    write(
        client,
        "whole",
        record=odd + '"reason": [1], "end": "1-5", "text": ["t"], "chunks": "x", "first_token_ms": "y"}',
    )
    write(client, "noend", record=odd + '"reason": "stop", "end": ["1-5"], "text": "t"}')
    for number, ms in enumerate(MS.values()):
        write(client, f"ms{number}", ("start", "{}", ms), ("text", "one", ms), ("text", "two", ms), ("end", "{}", ms))
        ids.append(f"ms{number}")
    client.set(names_of(client).answer("ms0").cleared, "9" * 5_000)
    client.set(names_of(client).answer("ms1").cleared, "٣")
    return [*ids, "whole", "noend"]


def reads_or_refuses(client, name: str) -> None:
    """What a reader is told is fit to show; or it is told that this is no answer."""
    reader = Follow(read_answer(name, client=client, timing=Timing(lease=0.1, patience=0.2)))
    for event in reader.ended():
        if isinstance(event, Ended):
            assert isinstance(event.reason, str) and len(event.reason) <= 200
        if isinstance(event, Failed):
            assert len(event.error) <= 200 and len(event.message) <= 2_000
        if isinstance(event, Text):
            assert abs(event.ms) <= 2**53
    assert reader.error is None or (
        isinstance(reader.error, (NotAnAnswer, ValueError)) and len(str(reader.error)) < 300
    )


@pytest.mark.slow
def test_whatever_outsiders_write_spoils_its_own_answer_at_most(client, web) -> None:
    ids = odd_answers(client)
    start(client, Model("fine", end=True), QUICK, "fine").done.wait(60)
    monitor = Monitor(client=client, limit=200)
    views = {name: (AnswerView(name, client=client), AnswerView(name, client=client, plain=True)) for name in ids}
    fine = AnswerView("fine", client=client)
    frame = tables.answers(client=client)
    assert set(frame["id"]) == {*ids, "fine"}
    frame.to_html()
    for name in ids:
        reads_or_refuses(client, name)
        for path in (f"answers/{name}", f"answers/{name}/events"):
            if path.endswith("events") and name.startswith("open"):
                continue  # it waits for more, as it should
            reply = call(web, "GET", path)
            assert reply.status < 500, (name, reply.status, reply.body[:200])
            if not path.endswith("events") or reply.status != 200:
                json.loads(reply.body, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    wait_for(
        lambda: (
            fine.transcript.state == "ended"
            and all(v.transcript.text or v.settled for both in views.values() for v in both)
        )
    )
    wait_for(lambda: {row["id"] for row in monitor.answers} == {*ids, "fine"})
    json.dumps(monitor.answers, allow_nan=False)
    wait_for(lambda: not any(view.unseen and not view.closed for both in views.values() for view in both))
    for name, both in views.items():
        for view in both:
            assert not view.closed, f"{name}: its view broke down"
            json.dumps(view.get_state(), allow_nan=False, default=str).encode()
            view.close()
    fine.close()
    monitor.close()


@pytest.mark.slow
def test_whatever_outsiders_write_ends_no_worker(client) -> None:
    ids = odd_answers(client)
    for name in ids:
        client.xadd(names_of(client).questions, {"answer": name})
    fine = enqueue("why?", id="fine", client=client, timing=QUICK)
    worker = Worker(client=client, timing=QUICK, source=lambda *_: ["fine"], slots=8).start()
    try:
        assert fine.wait(60).text == "fine"
        wait_for(lambda: client.xlen(names_of(client).questions) == 0)
        assert worker.error is None and worker._thread.is_alive()
        assert clear(*ids, client=client, timing=QUICK) == len(ids)
        assert all(Answer(name, client=client).status == "missing" for name in ids)
    finally:
        worker.stop(0)


@pytest.mark.slow
def test_a_question_asked_anew_does_not_answer_for_the_workers_that_an_older_one_has_killed(client) -> None:
    enqueue("old?", id="tour", client=client, timing=QUICK)
    key = names_of(client).questions
    client.xgroup_create(key, "llm-workers", "0")
    ((entry, _),) = client.xreadgroup("llm-workers", "dead", {key: ">"})[0][1]
    client.xclaim(key, "llm-workers", "dead", 0, [entry], retrycount=5, idle=60_000)
    clear("tour", client=client, timing=QUICK)
    time.sleep(0.01)
    answer = enqueue("new?", id="tour", client=client, timing=QUICK)
    worker = Worker(client=client, timing=QUICK, source=lambda *_: ["new"]).start()
    try:
        assert answer.wait(60).status == "ended" and answer.text == "new"
        wait_for(lambda: client.xlen(key) == 0)
        assert client.llen(names_of(client).failures) == 0
    finally:
        worker.stop(0)


def slow(question: str, topic: str | None) -> Iterator[str]:
    """A source that never comes to an end by itself."""
    while True:
        yield f"{question} "
        time.sleep(0.01)


def test_replace_stops_and_counts_on(client) -> None:
    old = ask("old", source=slow, id="tour", timing=QUICK)
    wait_for(lambda: "old" in old.text)
    reader = read_answer("tour", client=client, timing=QUICK)
    assert isinstance(next(reader), Started)
    new = ask("new", source=lambda question, topic: "all new", id="tour", replace=True, timing=QUICK).wait(8)
    assert old._producer.done.wait(8), "the old one writes on"
    assert new.look().top.attempt == 2
    assert (new.text, new.record["question"]) == ("all new", "new")
    assert text_of(reader) == "all new"
    with pytest.raises(AnswerExists, match="replace=True"):
        ask("once more", source="scripted", id="tour")


def test_replace_by_several_at_once_leaves_one(client) -> None:
    ask("first", source=slow, id="tour", timing=QUICK)
    asked = []

    def again(number: int) -> None:
        asked.append(ask(f"q{number}", source=lambda question, topic: question, id="tour", replace=True, timing=QUICK))

    threads = [threading.Thread(target=again, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(asked) == 4, "one of them failed"
    wait_for(lambda: Answer("tour", client=client).status == "ended")
    last = Answer("tour", client=client)
    assert last.text == last.record["question"]


def test_replace_in_the_queue(client) -> None:
    enqueue("old", source="scripted", model="scripted:pace=0", id="tour", timing=QUICK)
    new = enqueue("What is XADD?", source="scripted", model="scripted:pace=0", id="tour", replace=True, timing=QUICK)
    worker = Worker(client=client, timing=QUICK).start()
    try:
        assert new.wait(60).record["question"] == "What is XADD?"
        wait_for(lambda: not client.xlen(names_of(client).questions))
    finally:
        worker.stop()
    assert new.status == "ended"


@pytest.mark.parametrize("deleted", [("1-3",), ("1-2", "1-3"), ("1-0", "1-1", "1-2", "1-3")])
def test_who_stops_the_dead_tells_what_was_deleted_at_the_end(client, deleted) -> None:
    """Those who had read it, those who had read a part, and those who come late."""
    attempt = dead(client, "a ", "b ", "c ")
    parts = {after: read_answer("tour", after, client=client, timing=QUICK) for after in ("0-0", "1-1", "1-3")}
    client.xdel(names_of(client).answer("tour").chunks, *deleted)
    attempt.release()
    assert stop_answer("tour", client=client, timing=QUICK) == "ended"
    events = {after: list(part) for after, part in parts.items()}
    told = {after: sum(event.missing for event in heard if isinstance(event, Gap)) for after, heard in events.items()}
    assert told == {"0-0": len(deleted), "1-1": len(set(deleted) - {"1-0", "1-1"}), "1-3": 0}
    assert not any(isinstance(event, Restarted) for heard in events.values() for event in heard)
    assert all(isinstance(heard[-1], Ended) for heard in events.values())
    assert record_of(client, "tour")["missing"] == len(deleted)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ask", "enqueue"])
@pytest.mark.parametrize("replace", [True, False])
def test_what_the_queue_holds_of_an_old_question_answers_no_other(client, how: str, replace: bool) -> None:
    """A worker comes late to a queue where an entry stands whose id was asked anew, by `ask` or into the queue."""
    enqueue("old", source="scripted", model="scripted:pace=0", id="tour", client=client, timing=QUICK)
    stale = client.xrange(names_of(client).questions)[0][0]
    if not replace:
        client.delete(*names_of(client).answer("tour")[:2])  # it has expired, say
    if how == "ask":
        new = ask("new", source=slow, id="tour", replace=replace, client=client, timing=QUICK)
        wait_for(lambda: "new" in new.text)
    else:
        options = {"id": "tour", "replace": replace, "client": client, "timing": QUICK}
        new = enqueue("What is XADD?", source="scripted", model="scripted:pace=0", **options)
    worker = Worker(client=client, timing=QUICK, name="late").start()
    try:
        wait_for(lambda: not client.xlen(names_of(client).questions))
        if how == "ask":
            before = len(new.text)
            wait_for(lambda: len(new.text) > before)
            assert new.status == "streaming"
            new.stop()
        else:
            assert new.wait(60).status == "ended"
        starts = [entry.data for entry in stream_of(client, "tour") if entry.kind == "start"]
        assert [start.get("worker") for start in starts] == ([None] if how == "ask" else ["late"])
        assert stale not in [start.get("job") for start in starts]
    finally:
        worker.stop()
