"""Rules of PROTOCOL.md under real faults, and for each a broken variant of the code that its test catches.

A scenario asserts one rule. It runs once against the code as it is, and once for each variant, in which one thing
is broken on purpose: there it must fail.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import redis

from llmstream_nb.answers import connection
from llmstream_nb.answers.ask import clear, stop_answer
from llmstream_nb.answers.attempt import Attempt
from llmstream_nb.answers.connection import connect, names_of
from llmstream_nb.answers.produce import Producer
from llmstream_nb.answers.read import look, read_answer
from llmstream_nb.answers.record import new_record
from llmstream_nb.protocol.follow import Follower
from llmstream_nb.protocol.wire import Entry, EntryID, Fenced, Timing

from . import model
from .model import Model, assert_whole, start, stream_of, text_in, wait_for
from .network import Proxy
from .schedules import Restorable

FAST = Timing(lease=0.6, tick=0.05, ttl=600, give_up=30.0, patience=1.5)


@dataclass
class Lab:
    """A redis-server to break, seen directly and through the proxy."""

    server: Restorable
    proxy: Proxy
    direct: redis.Redis  # the test's own view
    client: redis.Redis  # the producer's, through the proxy


@pytest.fixture(scope="module")
def machine(program) -> Iterator[tuple[Restorable, Proxy]]:
    with Restorable(program, appendfsync="always") as server, Proxy("127.0.0.1", server.port) as proxy:
        yield server, proxy


@pytest.fixture
def lab(machine) -> Iterator[Lab]:
    server, proxy = machine
    proxy.heal()
    prefix = f"t{uuid.uuid4().hex[:8]}"
    made = Lab(server, proxy, connect(server.url, prefix=prefix), connect(proxy.url, prefix=prefix, socket_timeout=1))
    yield made
    proxy.heal()
    made.direct.close()
    made.client.close()


def attempt_at(client: redis.Redis, number: int, *texts: str, record: dict | None = None) -> Attempt:
    """An attempt that someone else has opened and left open."""
    other = Attempt(client, record or model.record_of(client), FAST)
    other.open(lambda top: ("start", {}))
    assert other.number == number
    other.entries += [("text", text, 1) for text in texts]
    other.flush()
    return other


# ---------------------------------------------------------------------------------------------- losses: R18, R22 to R25


def a_lost_reply_neither_doubles_nor_loses(lab: Lab) -> None:
    says = Model("one ", "two ")
    producer = start(lab.client, says, FAST)
    wait_for(lambda: text_in(lab.direct) == "one two ")
    lab.proxy.drop_reply(when=b"three")
    says.say("three ")
    lab.proxy.wait_dropped()
    says.say("four")
    says.end()
    wait_for(producer.done.is_set)
    assert_whole(lab.direct, ["one ", "two ", "three ", "four"])
    assert producer.error is None


def a_lost_tail_is_written_again(lab: Lab) -> None:
    says = Model("one ")
    producer = start(lab.client, says, FAST)
    wait_for(lambda: text_in(lab.direct) == "one ")
    lab.server.snapshot()
    says.say("two ", "three ")
    wait_for(lambda: text_in(lab.direct) == "one two three ")
    lab.server.restore_snapshot()  # an older state: what came after "one " is gone
    says.say("four")
    says.end()
    wait_for(producer.done.is_set)
    assert_whole(lab.direct, ["one ", "two ", "three ", "four"])


def an_empty_redis_gets_the_whole_answer_again(lab: Lab) -> None:
    says = Model("one ", "two ")
    producer = start(lab.client, says, FAST)
    wait_for(lambda: text_in(lab.direct) == "one two ")
    lab.server.wipe()
    says.say("three")
    says.end()
    wait_for(producer.done.is_set)
    assert_whole(lab.direct, ["one ", "two ", "three"])
    record = look("a", lab.direct).record
    assert record["question"] == "why?" and record["text"] == "one two three"
    assert lab.direct.zrange(names_of(lab.direct).answers, 0, -1) == ["a"]


def a_full_memory_leaves_no_half_batch(lab: Lab) -> None:
    says = Model("one ")
    producer = start(lab.client, says, FAST)
    wait_for(lambda: text_in(lab.direct) == "one ")
    used = int(lab.direct.info("memory")["used_memory"])
    lab.direct.config_set("maxmemory", used + 200_000)
    try:
        with producer._changed:  # one batch, of which about half would fit
            producer.attempt.entries += [("text", "x" * 5_000, 1) for _ in range(100)]
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            assert len(stream_of(lab.direct)) in (2, 102)  # all of the batch or nothing
            time.sleep(0.02)
    finally:
        lab.direct.config_set("maxmemory", 0)
    says.end()
    wait_for(producer.done.is_set)
    assert_whole(lab.direct, ["one ", *["x" * 5_000] * 100])


# ------------------------------------------------------------------------------------------ opening: R19, R20, R29, R33


def a_lost_reply_to_the_opening_opens_once(lab: Lab) -> None:
    attempt_at(lab.direct, 1, "dead").release()
    record = model.record_of(lab.direct)
    producer = Producer(lab.client, record, Model("one", end=True), FAST)
    lab.proxy.drop_reply(when=b"2-0")
    producer.start()
    wait_for(producer.done.is_set)
    lab.proxy.wait_dropped()
    assert producer.error is None
    assert_whole(lab.direct, ["one"], attempt=2)
    assert {e.id.attempt for e in stream_of(lab.direct)} == {1, 2}


def two_producers_at_once_never_mix(lab: Lab) -> None:
    for round_number in range(5):
        answer_id = f"a{round_number}"
        record = new_record(answer_id, "why?", None, "test", "test")
        models = [Model(), Model()]
        both = [Producer(lab.direct, record, says, FAST) for says in models]
        for producer in both:
            producer.start()
        wait_for(lambda: all(producer.attempt.number or producer.done.is_set() for producer in both))
        for _ in range(20):
            for says, name in zip(models, "AB", strict=True):
                says.say(name)
            time.sleep(0.002)
        for says, producer in zip(models, both, strict=True):
            says.end()
            wait_for(producer.done.is_set)
        for attempt in {e.id.attempt for e in stream_of(lab.direct, answer_id)}:
            assert len(set(text_in(lab.direct, answer_id, attempt))) <= 1, "two producers wrote one attempt"
        text = look(answer_id, lab.direct).text
        assert text in ("A" * 20, "B" * 20)


def a_rival_with_the_same_attempt_fences(lab: Lab) -> None:
    """Redis lost our opening, and another producer opened the same attempt: its nonce differs, so we are out."""
    says = Model()
    producer = start(lab.client, says, FAST)
    wait_for(lambda: len(stream_of(lab.direct)) == 1)
    lab.proxy.refuse()
    lab.direct.flushall()
    lab.proxy.cut()
    theirs = attempt_at(lab.direct, 1, record=producer.attempt.record)
    lab.proxy.heal()
    says.say("ours")
    says.end()
    wait_for(producer.done.is_set)
    assert isinstance(producer.error, Fenced)
    theirs.entries.append(("text", "theirs", 1))
    theirs.flush()
    assert text_in(lab.direct) == "theirs"


def a_cleared_answer_stays_away(lab: Lab) -> None:
    says = Model("one ")
    producer = start(lab.client, says, FAST)
    wait_for(lambda: text_in(lab.direct) == "one ")
    lab.proxy.blackhole()  # a producer that hears nothing of all this
    assert clear("a", client=lab.direct, timing=FAST) == 1
    lab.proxy.heal()
    says.say("two")
    wait_for(producer.done.is_set)
    assert not lab.direct.exists(*names_of(lab.direct).answer("a")[:2])


def an_ended_answer_is_only_repaired(lab: Lab) -> None:
    start(lab.direct, Model("done", end=True), FAST).done.wait(60)
    before, key = stream_of(lab.direct), names_of(lab.direct).answer("a").question
    record = look("a", lab.direct).record
    names = ("id", "question", "topic", "source", "model", "asked", "nonce", "first")
    asked = {name: record[name] for name in names if name in record}
    lab.direct.set(key, json.dumps(asked))  # as if its producer had died right after the end
    again = Producer(lab.direct, asked, Model("again", end=True), FAST)
    again.start()
    wait_for(again.done.is_set)
    assert stream_of(lab.direct) == before
    assert json.loads(lab.direct.get(key)) == record


# ------------------------------------------------------------------------------------------------------ ticks: R21, R27


def a_silent_model_keeps_its_lease(lab: Lab) -> None:
    says, timing = Model("one "), replace(FAST, lease=1.5)  # ticks of a busy machine come late
    producer = start(lab.client, says, timing)
    wait_for(lambda: text_in(lab.direct) == "one ")
    lease = names_of(lab.direct).answer("a").lease(1)
    until = time.monotonic() + 1.5 * timing.lease
    while time.monotonic() < until:
        assert lab.direct.exists(lease), "the lease ran out although the producer lives"
        time.sleep(0.02)
    says.end()
    wait_for(producer.done.is_set)


def stop_reaches_a_silent_model(lab: Lab) -> None:
    says, timing = Model("one "), replace(FAST, lease=2.0)  # for two of them a stop waits
    producer = start(lab.client, says, timing)
    wait_for(lambda: text_in(lab.direct) == "one ")
    assert stop_answer("a", client=lab.direct, timing=timing) == "ended"
    wait_for(lambda: says.closed and producer.done.is_set())
    assert look("a", lab.direct).record["reason"] == "cancelled"
    assert look("a", lab.direct).record["text"] == "one "


def stop_ends_the_models_request_though_redis_is_away(lab: Lab) -> None:
    says = Model("one ")
    producer = start(lab.client, says, FAST)
    wait_for(lambda: text_in(lab.direct) == "one ")
    lab.proxy.refuse()
    lab.proxy.cut()
    says.say("two ")
    wait_for(lambda: producer.attempt._line._again)  # it tries to get through, and does nothing else
    producer.stop()
    wait_for(lambda: says.closed)
    assert not producer.done.is_set()  # the end is not written yet …
    lab.proxy.heal()
    wait_for(producer.done.is_set)  # … and is, once Redis is back
    assert_whole(lab.direct, ["one ", "two "])


# ----------------------------------------------------------------------------------------------- the end: R26, R28, R32


def no_record_before_the_end_is_confirmed(lab: Lab) -> None:
    says = Model("one ")
    producer = start(lab.client, says, FAST)
    wait_for(lambda: text_in(lab.direct) == "one ")
    lab.proxy.drop_request(n=3, when=b'"total_ms"')  # the end entry does not arrive …
    says.end()
    while not producer.done.is_set():
        record = look("a", lab.direct).record
        ended = stream_of(lab.direct)[-1].final
        assert ended or "reason" not in record, "the record says ended, the stream does not"
        time.sleep(0.002)
    assert_whole(lab.direct, ["one "])


def a_dead_answer_is_closed_and_its_zombie_fenced(lab: Lab) -> None:
    zombie = attempt_at(lab.client, 1, "so ", "far")
    wait_for(lambda: look("a", lab.direct).status == "interrupted")
    assert stop_answer("a", client=lab.direct, timing=FAST) == "ended"
    assert look("a", lab.direct).text == "so far" == look("a", lab.direct).record["text"]
    zombie.entries.append(("text", " and on", 2))
    with pytest.raises(Fenced):
        zombie.insist(zombie.flush)
    assert look("a", lab.direct).text == "so far" and len(stream_of(lab.direct)) == 4


def a_sleeper_finds_its_answer_asked_anew(lab: Lab) -> None:
    """It slept beyond its lease; meanwhile Redis lost everything, and somebody asked again under the same id."""
    sleeper = attempt_at(lab.client, 1, "old ")
    wait_for(lambda: not lab.direct.exists(sleeper.keys.lease(1)))
    lab.direct.flushall()
    says = Model("new ")
    producer = start(lab.direct, says, FAST)
    wait_for(lambda: text_in(lab.direct) == "new ")
    sleeper.entries.append(("text", "old", 2))
    sleeper.sent = 2  # the ID after "new ": Redis itself would take it
    with pytest.raises(Fenced):
        sleeper.insist(sleeper.flush)
    says.say("text")
    says.end()
    wait_for(producer.done.is_set)
    assert text_in(lab.direct) == "new text"


# ----------------------------------------------------------------------------------- readers, time to live: R1, R2, R31


def a_reader_survives_everything_exactly(lab: Lab) -> None:
    """Every entry of the answer is yielded once, in order, through cuts, lost replies and a restarted server."""
    says, events, timing = Model("0 "), [], replace(FAST, lease=5.0, patience=30.0)  # nobody dies here
    producer = start(lab.direct, says, timing)
    reader = threading.Thread(target=lambda: events.extend(read_answer("a", client=lab.client, timing=timing)))
    reader.start()
    for n in range(1, 30):
        if n % 7 == 0:
            lab.proxy.drop_reply(when=b"XREAD")
        if n % 10 == 0:
            lab.proxy.cut()
        if n == 15:
            lab.server.kill()
            lab.server.start()
        says.say(f"{n} ")
        time.sleep(0.02)
    says.end()
    wait_for(producer.done.is_set)
    reader.join(60)
    assert not reader.is_alive(), "the reader did not end"
    assert [e.text for e in events if type(e).__name__ == "Text"] == [f"{n} " for n in range(30)]
    assert [type(e).__name__ for e in events if type(e).__name__ != "Text"] == ["Started", "Ended"]


def everything_of_an_answer_expires(lab: Lab) -> None:
    says = Model("one ")
    producer = start(lab.direct, says, FAST)
    wait_for(lambda: text_in(lab.direct) == "one ")
    ours = list(lab.direct.scan_iter(f"{names_of(lab.direct).prefix}:{{a}}:*"))
    assert len(ours) == 3  # chunks, question, lease
    assert all(0 < lab.direct.pttl(key) <= FAST.ttl * 1000 for key in ours)
    says.end()
    wait_for(producer.done.is_set)
    ours = list(lab.direct.scan_iter(f"{names_of(lab.direct).prefix}:{{a}}:*"))
    assert len(ours) == 2 and all(lab.direct.pttl(key) > 0 for key in ours)


# ------------------------------------------------------------------------------------------ broken variants


def no_recovery(patch) -> None:
    """A naive producer: it numbers what it sends, not what was said, and what got no reply is sent again."""

    def xadd(self, pipe, seq, create=False):
        kind, text, ms = self.entries[seq]
        self.told = getattr(self, "told", -1) + 1
        entry_id = f"{self.number}-{self.told}"
        pipe.execute_command("XADD", self.keys.chunks, entry_id, "kind", kind, "text", text, "ms", ms)

    opened = Attempt.synchronise
    patch.setattr(Attempt, "_queue_xadd", xadd)
    patch.setattr(Attempt, "synchronise", lambda self: None if self.number else opened(self))


def silent_reconnects(patch) -> None:
    """What redis-py does by default; no tick meets the server while it is down, so nothing is noticed."""
    patch.setitem(globals(), "FAST", replace(FAST, lease=30.0, tick=5.0))
    patch.setattr(connection.Line, "_on_connect", lambda self, link: link.on_connect())


def silent_reconnects_that_create(patch) -> None:
    silent_reconnects(patch)
    queue = Attempt._queue_xadd
    patch.setattr(Attempt, "_queue_xadd", lambda self, pipe, seq, create=False: queue(self, pipe, seq, True))


def no_transactions(patch) -> None:
    pipeline = redis.Redis.pipeline
    patch.setattr(redis.Redis, "pipeline", lambda self, transaction=True: pipeline(self, transaction=False))


def a_nonce_that_changes(patch) -> None:
    patch.setattr(Attempt, "nonce", property(lambda self: uuid.uuid4().hex, lambda self, value: None), raising=False)


def a_nonce_for_all(patch) -> None:
    patch.setattr(Producer, "_opening", lambda self, _: ("start", {}))  # what else tells them apart is chance
    patch.setattr(Attempt, "nonce", property(lambda self: "same", lambda self, value: None), raising=False)
    # … and no WATCH: the commands after it still run at once, as they would
    patch.setattr(redis.client.Pipeline, "watch", lambda self, *names: setattr(self, "watching", True))


def a_nonce_for_all_who_open_at_once(patch) -> None:
    """… and the two do choose the same attempt, before either has written it."""
    a_nonce_for_all(patch)
    patch.setattr(Attempt, "_is_own", lambda self, pipe, top, last: last.seq < len(self.entries))  # nor the last entry
    both, opening = threading.Barrier(2), Producer._opening

    def together(self, top):
        both.wait(60)
        return opening(self, top)

    patch.setattr(Producer, "_opening", together)


def clear_without_a_mark(patch) -> None:
    def forgetful(*ids, client, timing):
        count = clear_as_it_is(*ids, client=client, timing=timing)
        client.delete(*(names_of(client).answer(i).cleared for i in ids))
        return count

    clear_as_it_is = clear
    patch.setitem(globals(), "clear", forgetful)


def nothing_is_final(patch) -> None:
    patch.setattr(Entry, "final", property(lambda self: False))


def ticks_only_with_chunks(patch) -> None:
    patch.setattr(Attempt, "tick_in", property(lambda self: 3.0))


def the_model_is_closed_last(patch) -> None:
    close = Producer._close_model
    patch.setattr(Producer, "_close_model", lambda self: self.attempt.sent == len(self.attempt.entries) and close(self))


def nobody_looks_for_a_cancel(patch) -> None:
    patch.setattr(Attempt, "cancelled", property(lambda self: False, lambda self, value: None), raising=False)


def unconfirmed_counts_as_sent(patch) -> None:
    flush = Attempt.flush

    def hopeful(self):
        try:
            flush(self)
        except (redis.ConnectionError, redis.WatchError):  # the latter where the connection was watching
            self.sent = len(self.entries)

    def finish(self, text=None):
        end = EntryID(self.number, len(self.entries) - 1)
        self._save(self.record, json.loads(self.entries[-1][1]), end, self.text if text is None else text)

    patch.setattr(Attempt, "flush", hopeful)
    patch.setattr(Attempt, "finish", finish)  # which would look again


def ids_by_the_clock(patch) -> None:
    def xadd(self, pipe, seq, create=False):
        kind, text, ms = self.entries[seq]
        entry_id = f"{self.number}-0" if create else "*"
        pipe.execute_command("XADD", self.keys.chunks, entry_id, "kind", kind, "text", text, "ms", ms)

    patch.setattr(Attempt, "_queue_xadd", xadd)


def no_doubt_after_sleep(patch) -> None:
    awake = property(lambda self: time.monotonic(), lambda self, value: self.__dict__.update(_leased=value))
    patch.setattr(Attempt, "_leased", awake, raising=False)


def readers_start_over(patch) -> None:
    patch.setattr(Follower, "reconnected", lambda self, now: setattr(self.cursor, "after", EntryID(0, 0)))


def nothing_expires(patch) -> None:
    patch.setattr(redis.client.Pipeline, "pexpire", lambda self, *args, **options: self.ping())


SCENARIOS = {
    a_lost_reply_neither_doubles_nor_loses: no_recovery,
    a_lost_tail_is_written_again: silent_reconnects,
    an_empty_redis_gets_the_whole_answer_again: silent_reconnects_that_create,
    a_full_memory_leaves_no_half_batch: no_transactions,
    a_lost_reply_to_the_opening_opens_once: a_nonce_that_changes,
    two_producers_at_once_never_mix: a_nonce_for_all_who_open_at_once,
    a_rival_with_the_same_attempt_fences: a_nonce_for_all,
    a_cleared_answer_stays_away: clear_without_a_mark,
    an_ended_answer_is_only_repaired: nothing_is_final,
    a_silent_model_keeps_its_lease: ticks_only_with_chunks,
    stop_reaches_a_silent_model: nobody_looks_for_a_cancel,
    stop_ends_the_models_request_though_redis_is_away: the_model_is_closed_last,
    no_record_before_the_end_is_confirmed: unconfirmed_counts_as_sent,
    a_dead_answer_is_closed_and_its_zombie_fenced: ids_by_the_clock,
    a_sleeper_finds_its_answer_asked_anew: no_doubt_after_sleep,
    a_reader_survives_everything_exactly: readers_start_over,
    everything_of_an_answer_expires: nothing_expires,
}


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_rule(scenario, lab: Lab) -> None:
    scenario(lab)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: f"{s.__name__}-{SCENARIOS[s].__name__}")
def test_broken_variant_is_caught(scenario, lab: Lab, monkeypatch) -> None:
    monkeypatch.setattr(model, "PATIENCE", 1.5)
    SCENARIOS[scenario](monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        scenario(lab)
