"""Answers under seeded random schedules of faults; broken variants, found out; and the protocol as a state machine.

LLMSTREAM_SCHEDULES sets how many schedules are run (200), LLMSTREAM_SEED the seed of the first (0); a failing schedule
tells its seed and its steps. LLMSTREAM_SOAK=10 runs schedules for ten minutes instead.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from llmstream_nb.answers import connection
from llmstream_nb.answers.ask import clear
from llmstream_nb.answers.attempt import Attempt, last_entry
from llmstream_nb.answers.connection import connect, names_of
from llmstream_nb.answers.produce import Producer, Writing
from llmstream_nb.answers.read import look
from llmstream_nb.answers.record import new_record, register
from llmstream_nb.pool.queue import enqueue
from llmstream_nb.pool.worker import Worker
from llmstream_nb.protocol.events import Continued, Ended, Event, Failed, Gap, Interrupted, Restarted, text_of
from llmstream_nb.protocol.follow import Cursor, Follower
from llmstream_nb.protocol.wire import ORIGIN, Entry, EntryID, Fenced, Signs, Timing

from . import schedules
from .model import Model, raw, text_in, wait_for
from .schedules import BOUND, SHORT, TIMING, Lab, Reader, Run, Schedule, audit, drawn, in_order, step

SCHEDULES = int(os.environ.get("LLMSTREAM_SCHEDULES", "200"))
SEED = int(os.environ.get("LLMSTREAM_SEED", "0"))
SOAK = float(os.environ.get("LLMSTREAM_SOAK", "0")) * 60  # seconds
BATCH = 25  # schedules in one test
SEEDS = [itertools.count(SEED)] if SOAK else [range(n, min(n + BATCH, SEED + SCHEDULES))
                                              for n in range(SEED, SEED + SCHEDULES, BATCH)]  # fmt: skip


@pytest.fixture(scope="module")
def lab(drawn_server) -> Iterator[Lab]:
    with Lab(drawn_server) as made:
        yield made


# -------------------------------------------------------------------------------------------- random schedules


@pytest.mark.parametrize("seeds", SEEDS, ids=str)
def test_nothing_is_lost_and_nothing_hangs(lab: Lab, seeds) -> None:
    began = time.monotonic()
    if SOAK:
        faulthandler.cancel_dump_traceback_later()  # which pytest sets for tests that hang
    for seed in seeds:
        schedule = drawn(seed)
        try:
            Run(lab, schedule).play()
        except Exception as error:
            error.add_note(f"again: {lab.again} LLMSTREAM_SEED={seed} LLMSTREAM_SCHEDULES=1\n{schedule}")
            raise
        if SOAK and time.monotonic() - began > SOAK:
            return


def test_a_pool_does_not_answer_again_what_is_being_answered_when_redis_comes_back_older(lab: Lab) -> None:
    """The question is new in the older queue, and its answer is not there: only its producer knows better."""
    timing, says = replace(TIMING, lease=1.5), {name: Model(f"{name}0 ") for name in "AB"}
    with contextlib.ExitStack() as stack:
        prefix = f"t{uuid.uuid4().hex[:8]}"
        direct = stack.enter_context(contextlib.closing(connect(lab.server.url, prefix=prefix)))
        proxied = stack.enter_context(contextlib.closing(connect(lab.proxy.url, prefix=prefix)))
        enqueue("why?", id="a", client=direct, timing=timing)
        lab.server.snapshot()
        for name, client in (("A", proxied), ("B", direct)):
            worker = Worker(name=name, client=client, timing=timing, source=lambda *_, name=name: says[name])
            stack.callback(worker.start().stop, 0)
            wait_for(lambda: text_in(direct) == "A0 ")
        reader = Reader(direct, ORIGIN, timing)
        wait_for(lambda: text_of(reader.events) == "A0 ")
        lab.proxy.refuse()
        lab.server.restore_snapshot()
        time.sleep(0.3)  # the other worker is back first
        lab.proxy.heal()
        for name in "AB":
            says[name].say(f"{name}1")
            says[name].end()
        reader.join(BOUND)
        wait_for(lambda: look("a", direct).record.get("end"))
        assert text_of(reader.events) == "A0 A1" == look("a", direct).record["text"]


@pytest.mark.parametrize("point", ["_queue_xadd", "finish"], ids=["opens", "finishes"])
def test_an_answer_that_is_deleted_while_its_producer_is_held_up_stays_deleted(lab: Lab, point: str) -> None:
    """It has looked whether the answer is deleted, or has written its end, and does not see what happens then."""
    with contextlib.closing(connect(lab.server.url, prefix=f"t{uuid.uuid4().hex[:8]}")) as client:
        record = new_record("a", "why?", None, "test", "test")
        register(client, record, TIMING)
        producer = Producer(client, record, Model("one", end=True), TIMING)
        there, gate = threading.Event(), threading.Event()
        method = getattr(producer.attempt, point)

        def held(*args, **options) -> None:
            there.set()
            gate.wait()
            method(*args, **options)

        setattr(producer.attempt, point, held)
        producer.start()
        there.wait()
        clear("a", client=client, timing=TIMING)
        gate.set()
        wait_for(producer.done.is_set)
        assert not client.exists(*names_of(client).answer("a")[:2])


def test_who_completes_a_record_tries_again_when_its_look_is_lost(lab: Lab) -> None:
    """Its producer has ended the answer, and died before the record said so."""
    lost = step("drop_request", 1, "XREAD")
    Run(lab, Schedule((*SPOKEN, step("freeze", "ended"), step("lapse"), lost, step("take_over", True)))).play()


def test_a_repair_that_comes_late_does_not_spoil_the_record(lab: Lab, monkeypatch) -> None:
    """Of a trimmed stream, only the answer's own producer knows the whole text."""
    with contextlib.closing(connect(lab.server.url, prefix=f"t{uuid.uuid4().hex[:8]}")) as client:
        record = new_record("a", "why?", None, "test", "test")
        register(client, record, TIMING)
        first = Producer(client, record, [f"{n} " for n in range(20)], TIMING, Writing(maxlen=5))
        ends, looked, told = threading.Event(), threading.Event(), threading.Event()
        finish, save = first.attempt.finish, Attempt._save

        def finish_late(*args) -> None:
            ends.set()
            looked.wait()
            finish(*args)
            told.set()

        def save_late(self, *args, **options) -> None:
            if self is not first.attempt:
                looked.set()
                told.wait()
            save(self, *args, **options)

        first.attempt.finish = finish_late
        monkeypatch.setattr(Attempt, "_save", save_late)
        first.start()
        ends.wait()
        Producer(client, record, ["else"], TIMING).run()
        assert look("a", client).record["text"] == "".join(f"{n} " for n in range(20))


def test_a_producer_that_wakes_late_leaves_the_record_of_a_newer_question_alone(lab: Lab) -> None:
    with contextlib.closing(connect(lab.server.url, prefix=f"t{uuid.uuid4().hex[:8]}")) as client:
        record = new_record("a", "why?", None, "test", "test")
        register(client, record, TIMING)
        old = Producer(client, record, ["old"], TIMING)
        ends, gate, finish = threading.Event(), threading.Event(), old.attempt.finish

        def finish_late() -> None:
            ends.set()
            gate.wait()
            finish()

        old.attempt.finish = finish_late
        old.start()
        ends.wait()
        clear("a", client=client, timing=TIMING)
        time.sleep(0.002)  # `asked` is in milliseconds
        register(client, newer := new_record("a", "why not?", None, "test", "test"), TIMING)
        gate.set()
        wait_for(old.done.is_set)
        assert look("a", client).record == newer


# --------------------------------------------------------------------------------------------- broken variants


def no_look_at_what_redis_has(patch) -> None:
    """After an error the producer goes on where it thinks it was; an ID counts what was sent, not what was said."""

    def xadd(self, pipe, seq, create=False):  # Redis numbers by itself within an attempt (`1-*`) since 7.0 only
        kind, text, ms = self.entries[seq]
        self.told = getattr(self, "told", -1) + 1
        entry_id = f"{self.number}-{self.told}"
        pipe.execute_command("XADD", self.keys.chunks, entry_id, "kind", kind, "text", text, "ms", ms)

    opened = Attempt.synchronise
    patch.setattr(Attempt, "_queue_xadd", xadd)
    patch.setattr(Attempt, "synchronise", lambda self: None if self.number else opened(self))


def silent_reconnects(patch) -> None:
    """What redis-py does by default."""
    patch.setattr(connection.Line, "_on_connect", lambda self, link: link.on_connect())


def what_got_no_reply_is_taken_for_sent(patch) -> None:
    flush = Attempt.flush

    def hopeful(self):
        try:
            flush(self)
        except OSError:
            pass
        except connection.RedisError as error:
            if not connection.is_passing(error):
                raise
            self.sent = len(self.entries)
            self._line.reopen()

    patch.setattr(Attempt, "flush", hopeful)


def any_entry_may_create_the_stream(patch) -> None:
    queue = Attempt._queue_xadd
    patch.setattr(Attempt, "_queue_xadd", lambda self, pipe, seq, create=False: queue(self, pipe, seq, True))


def deleted_without_a_mark(patch) -> None:
    def forgetful(answer_id, client, timing):
        clear(answer_id, client=client, timing=timing)
        client.delete(names_of(client).answer(answer_id).cleared)

    patch.setattr(schedules, "clear", forgetful)


def a_number_is_given_twice(patch) -> None:
    """The next question of an id begins with 1 again."""
    deleted_without_a_mark(patch)


def restarts_are_passed_over(patch) -> None:
    patch.setattr(Cursor, "_restarts", lambda self, before: False)


def no_fence(patch) -> None:
    """Who has been replaced goes on after its heir's last entry."""
    opened = Attempt.synchronise

    def careless(self):
        try:
            opened(self)
        except Fenced:
            entry_id = self._line.redis.xrevrange(self.keys.chunks, count=1)[0][0]
            self.number, self.sent = EntryID.parse(entry_id)
            self.sent += 1

    patch.setattr(Attempt, "synchronise", careless)


def the_end_is_written_twice(patch) -> None:
    close = Producer._close

    def twice(self, kind, **data):
        close(self, kind, **data)
        self.attempt.entries.append(self.attempt.entries[-1])

    patch.setattr(Producer, "_close", twice)


def gaps_are_passed_over(patch) -> None:
    feed = Cursor.feed
    patch.setattr(Cursor, "feed", lambda self, entries: [e for e in feed(self, entries) if not isinstance(e, Gap)])


def readers_start_over(patch) -> None:
    patch.setattr(Follower, "reconnected", lambda self, now: setattr(self.cursor, "after", ORIGIN))


def readers_trust_a_lost_reply(patch) -> None:
    """The place moves with the request, as with XREADGROUP and NOACK: what its reply held is lost."""
    reconnected = Follower.reconnected

    def moved(self, now):
        attempt, seq = self.cursor.after
        self.cursor.after = EntryID(max(1, attempt), seq + 1)
        reconnected(self, now)

    patch.setattr(Follower, "reconnected", moved)


def readers_are_one_off(patch) -> None:
    init = Cursor.__init__

    def at(self, after=ORIGIN):
        init(self, EntryID(after.attempt, max(0, after.seq - 1)))

    patch.setattr(Cursor, "__init__", at)


def nobody_is_declared_dead(patch) -> None:
    silence = Follower.silence
    patch.setattr(Follower, "silence", lambda self, signs, now: silence(self, signs._replace(leased=True), now))


def the_model_is_left_alone(patch) -> None:
    patch.setattr(Producer, "_close_model", lambda self: None)


def connections_stay_open(patch) -> None:
    kept: list[object] = []
    patch.setattr(Attempt, "close", lambda self: kept.append(self._line))


def one_entry_less_is_kept(patch) -> None:
    standing = Attempt._standing
    patch.setattr(
        Attempt, "_standing", lambda self, pipe, last: standing(self, pipe, EntryID(last.attempt, max(0, last.seq - 1)))
    )


def it_goes_on_from_one_entry_less(patch) -> None:
    """Text and number of the entry before the last one: nobody who has read all keeps what they have."""
    one_entry_less_is_kept(patch)
    begin = Attempt._begin

    def earlier(self, pipe):
        kind, text, ms = self.entries[0]
        said = json.loads(text)
        if "continues" in said:
            attempt, seq = EntryID.parse(said["continues"])
            self.entries[0] = (kind, json.dumps(said | {"continues": f"{attempt}-{seq - 1}"}), ms)
        begin(self, pipe)

    patch.setattr(Attempt, "_begin", earlier)


def kept_before_the_watch(patch) -> None:
    """What is kept was read a moment before it is watched that nobody adds to it."""
    synchronise, standing = Attempt.synchronise, Attempt._standing

    def slow(self):
        if not self.number:
            kept = standing(self, self.client, last_entry(self.client, self.keys.chunks)[1])
            time.sleep(0.3)
            self._standing = lambda *_: kept
        synchronise(self)

    patch.setattr(Attempt, "synchronise", slow)


LEASELESS = Timing(lease=30.0, tick=5.0, ttl=600.0, give_up=8.0, patience=8.0)  # no tick while the server is away
SAY, END, HEIR, ANEW = step("say", 4, 0), step("end"), step("take_over", False), step("ask_anew", False)
SPOKEN = (SAY, step("settle"))
ZOMBIE = (
    *SPOKEN,
    step("freeze", "checked"),
    step("lapse"),
    HEIR,
    step("settle"),
    step("thaw"),
    step("rest", 100),
    SAY,
    END,
)

LATE = (step("rest", 80), step("thaw"), step("rest", 400))  # a batch of who is given up comes in
HEIR_GOES_ON = Schedule(
    (step("join", 0.0, True, 0), *SPOKEN, step("leave"), step("lapse"), HEIR, SAY, END), models="go on"
)

# Each with a schedule in which it is found out, and what is said then.
VARIANTS: dict[Callable, tuple[Schedule, str]] = {
    no_look_at_what_redis_has: (
        Schedule((*SPOKEN, step("drop_reply", 1, "XADD", True), SAY, END)),
        "is another's|its end is not",
    ),
    silent_reconnects: (
        Schedule((*SPOKEN, step("snapshot"), *SPOKEN, step("older"), SAY, END), timing=LEASELESS),
        "holes in attempt 1",
    ),
    what_got_no_reply_is_taken_for_sent: (
        Schedule((*SPOKEN, step("drop_request", 1, "XADD"), SAY, step("rest", 50), SAY, END)),
        "holes in attempt 1",
    ),
    any_entry_may_create_the_stream: (
        Schedule((*SPOKEN, step("blackhole"), SAY, step("rest", 80), step("clear"), step("heal", True), SAY, END)),
        "a deleted answer is back|waits 2 s after the end",
    ),
    deleted_without_a_mark: (
        Schedule((*SPOKEN, step("blackhole"), SAY, step("clear"), step("heal", False), SAY, END)),
        "a deleted answer is back",
    ),
    a_number_is_given_twice: (
        Schedule((step("join", 0.0, True, 0), *SPOKEN, step("freeze", "sent"), ANEW, SAY, step("thaw"), SAY, END)),
        "never written|again, after|holes in|is another's",
    ),
    restarts_are_passed_over: (
        Schedule((step("join", 0.0, True, 0), *SPOKEN, step("rest", 50), step("freeze", "sent"), ANEW, SAY, END)),
        "shows",
    ),
    no_fence: (Schedule(ZOMBIE), "its end is not the last entry|is another's|holes in attempt 2"),
    the_end_is_written_twice: (
        Schedule((*SPOKEN, END)),
        "an end, and entries after it",
    ),
    gaps_are_passed_over: (Schedule((*SPOKEN, step("trim", 2), END)), "entries lie between .* told 0"),
    readers_start_over: (
        Schedule((step("join", 0.0, True, 0), *SPOKEN, step("rest", 50), step("cut"), SAY, END)),
        "again, after",
    ),
    readers_trust_a_lost_reply: (
        Schedule((step("join", 0.0, True, 0), *SPOKEN, step("rest", 50), step("cut"), SAY, END)),
        "lie between|lacks entries|never written|was not told of the end",
    ),
    readers_are_one_off: (
        Schedule((step("join", 0.0, True, 0), *SPOKEN, step("rest", 50), step("join", 1.0, True, 0), SAY, END)),
        "again, after",
    ),
    nobody_is_declared_dead: (
        Schedule(
            (*SPOKEN, step("join", 0.0, True, 0), step("leave"), step("lapse")), timing=replace(TIMING, patience=SHORT)
        ),
        "after the end",
    ),
    the_model_is_left_alone: (Schedule((*SPOKEN, step("stop", "elsewhere"))), "threads of the kit"),
    one_entry_less_is_kept: (HEIR_GOES_ON, "where .* stood"),
    it_goes_on_from_one_entry_less: (HEIR_GOES_ON, "comes after"),
    kept_before_the_watch: (
        Schedule(
            (*SPOKEN, step("freeze", "checked"), step("leave"), step("lapse"), HEIR, *LATE, SAY, END),
            models="go on",
        ),
        "where .* stood",
    ),
    connections_stay_open: (Schedule((*SPOKEN, END)), "connections are left over"),
}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.__name__)
def test_a_broken_variant_is_found_out(lab: Lab, monkeypatch, variant) -> None:
    schedule, said = VARIANTS[variant]
    Run(lab, schedule).play()  # as the code is, all is well
    with monkeypatch.context() as patch:
        variant(patch)
        with pytest.raises(AssertionError, match=said):
            for _ in range(5):  # some are a matter of who comes first
                run = Run(lab, schedule, bound=2.0)
                run.play()
    lab.clean_up(run)


@pytest.mark.parametrize(("models", "told"), [("go on", Continued), ("disagree", Restarted), ("begin anew", Restarted)])
def test_a_reader_keeps_what_it_has_where_the_heir_goes_on(lab: Lab, models, told) -> None:
    run = Run(lab, replace(HEIR_GOES_ON, models=models))
    run.play()
    first = run.readers[0].events
    assert told in map(type, first)
    assert (Continued in map(type, first)) == (models != "begin anew")  # who disagrees finds out when it has begun
    assert in_order(text_of(first)) == (models != "begin anew") and len(run.written) == 2 + (models == "disagree")
    late = next(reader for reader in run.readers if reader.after == ORIGIN and reader is not run.readers[0])
    assert text_of(late.events) == text_of(first)


def test_a_process_that_is_left_is_found(lab: Lab) -> None:
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as child:
        with pytest.raises(AssertionError, match="a process is left over"):
            Run(lab, Schedule((SAY, END))).play()
        child.communicate()


# ---------------------------------------------------------------------------------------------- state machine


class Viewer:
    """A follower, where it began, and what it was told."""

    def __init__(self, number: int, after: EntryID) -> None:
        self.name, self.after = f"viewer {number}", after
        self.follower = Follower("a", after, Timing(lease=1.0))
        self.events: list[Event] = []
        self.silent = 0  # looks in a row that brought nothing and no sign of life
        self.judges_from = 0.0

    @property
    def place(self) -> EntryID:
        return self.follower.cursor.after

    def told(self, events: list[Event]) -> None:
        self.events += events
        if events:
            self.silent = 0


class ProtocolMachine(RuleBasedStateMachine):
    """A stream that grows, is trimmed, loses its tail and gets it again, and viewers who read it in any manner."""

    def __init__(self) -> None:
        super().__init__()
        self.stream: list[Entry] = []
        self.lost: list[Entry] = []  # to be written again
        self.written: dict[int, list[tuple[str, str]]] = {}  # what each attempt has ever written
        self.viewers: list[Viewer] = []
        self.alive = self.closed = self.trimmed = False
        self.now = 0.0

    @property
    def number(self) -> int:
        return max(self.written, default=0)

    def add(self, kind: str, text: str) -> None:
        own = self.written[self.number]
        own.append((kind, text))
        self.stream.append(Entry(EntryID(self.number, len(own) - 1), kind, text, 0))

    def whole(self) -> bool:
        return not self.lost and not self.closed

    def goes_on(self) -> bool:
        return self.whole() and self.alive

    # The stream

    @initialize()
    def is_asked(self) -> None:
        self.joins(0.0)

    @precondition(lambda self: self.whole() and self.number < 4)
    @rule()
    def begins(self) -> None:
        self.written[self.number + 1] = []
        self.alive = True
        self.add("start", json.dumps({"nonce": str(self.number)}))

    @precondition(goes_on)
    @rule(texts=st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=5))
    def writes(self, texts: list[str]) -> None:
        for text in texts:
            self.add("text", text)

    @precondition(goes_on)
    @rule(count=st.integers(1, 5))
    def loses_its_tail(self, count: int) -> None:
        gone = [entry for entry in self.stream[-count:] if entry.id.attempt == self.number]
        self.lost = gone
        self.stream = self.stream[: len(self.stream) - len(gone)]

    @precondition(lambda self: self.lost)
    @rule()
    def gets_it_again(self) -> None:
        self.stream += self.lost
        self.lost = []

    @precondition(lambda self: len(self.stream) > 1)
    @rule(count=st.integers(1, 4))
    def is_trimmed(self, count: int) -> None:
        self.stream = self.stream[min(count, len(self.stream) - 1) :]
        self.trimmed = True

    @precondition(goes_on)
    @rule(error=st.booleans())
    def ends(self, error: bool) -> None:
        self.add(*(("error", '{"error": "Boom", "message": "m"}') if error else ("end", '{"reason": "stop"}')))
        self.alive, self.closed = False, True

    @precondition(lambda self: self.stream and self.whole())
    @rule()
    def is_closed_from_outside(self) -> None:
        closes = self.stream[-1].id
        data = json.dumps({"reason": "cancelled", "closes": str(closes)})
        self.stream.append(Entry(EntryID(closes.attempt + 1, 0), "end", data, 0))
        self.alive, self.closed = False, True

    @rule(alive=st.booleans())
    def producer_dies_or_comes_back(self, alive: bool) -> None:
        self.alive = alive and bool(self.written) and not self.closed

    @rule(seconds=st.floats(0.0, 1.5))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    # The viewers

    @rule(part=st.sampled_from([0.0, 0.0, 0.3, 0.7, 1.0, 1.0]))
    def joins(self, part: float) -> None:
        """From the beginning, or from any entry that was ever written."""
        self.viewers.append(Viewer(len(self.viewers), self.places()[int(part * (len(self.places()) - 1))]))

    def places(self) -> list[EntryID]:
        return [ORIGIN, *(EntryID(n, seq) for n, own in self.written.items() for seq in range(len(own)))]

    def a_viewer(self, which: int) -> Viewer:
        return self.viewers[which % len(self.viewers)]

    @rule(which=st.integers(0, 9), count=st.integers(1, 6), back=st.integers(0, 4))
    def reads(self, which: int, count: int, back: int) -> None:
        """What follows its place, and some of what it has read already."""
        viewer = self.a_viewer(which)
        first = sum(entry.id <= viewer.place for entry in self.stream)
        viewer.told(viewer.follower.feed(raw(self.stream[max(0, first - back) : first + count])))

    @rule(which=st.integers(0, 9), count=st.integers(1, 3))
    def hears_two_replies_in_the_wrong_order(self, which: int, count: int) -> None:
        viewer = self.a_viewer(which)
        first = sum(entry.id <= viewer.place for entry in self.stream)
        early, late = self.stream[first : first + count], self.stream[first + count : first + 2 * count]
        viewer.told(viewer.follower.feed(raw(late)) + viewer.follower.feed(raw(early)))
        self.trimmed |= bool(late)  # for this one it is as if

    @rule(which=st.integers(0, 9))
    def reconnects(self, which: int) -> None:
        viewer = self.a_viewer(which)
        viewer.follower.reconnected(self.now)
        viewer.silent, viewer.judges_from = 0, self.now + 1.0

    @rule(which=st.integers(0, 9))
    def reads_nothing(self, which: int) -> None:
        """Look at the signs of life, where there is nothing to read."""
        viewer = self.a_viewer(which)
        if any(entry.id > viewer.place for entry in self.stream):
            return
        top = self.stream[-1] if self.stream else None
        leased = self.alive and max(1, viewer.place.attempt) == self.number
        follower, was = viewer.follower, viewer.follower.state
        events = follower.silence(Signs(top, leased, {}), self.now)
        viewer.events += events
        if was in ("ended", "failed"):
            assert not events
        elif top and top.final and top.id == viewer.place:
            assert follower.done and len(events) == 1
        elif leased:
            viewer.silent = 0
            assert not events and follower.state == ("queued" if viewer.place == ORIGIN else "streaming")
        else:
            dead = viewer.silent > 0 and self.now >= viewer.judges_from
            viewer.silent += 1
            assert [type(event) for event in events] == ([Interrupted] if dead and was != "interrupted" else [])

    # What holds at the end, from whatever state

    def teardown(self) -> None:
        if self.lost:
            self.gets_it_again()
        for viewer in [*self.viewers, *(Viewer(-1, place) for place in self.places())]:
            follower = viewer.follower
            viewer.events += follower.feed(raw(self.stream))
            for _ in range(2):
                if self.stream and viewer.place >= self.stream[-1].id:
                    viewer.events += follower.silence(Signs(self.stream[-1], False, {}), self.now)
            seen = audit(viewer.name, viewer.after, viewer.events, self.written)
            ends = [event for event in viewer.events if isinstance(event, (Ended, Failed))]
            assert len(ends) == self.closed == follower.done
            assert ends == viewer.events[len(viewer.events) - len(ends) :]
            texts = {EntryID(self.number, seq): text for seq, (kind, text) in enumerate(self.written.get(self.number, ()))
                     if kind == "text"}  # fmt: skip
            assert text_of(viewer.events) == "".join(texts[place] for place in seen if place in texts)
            if not self.trimmed:
                assert not [event for event in viewer.events if isinstance(event, Gap)]
                assert [place for place in seen if place in texts] == [place for place in texts if place > viewer.after]


TestProtocol = ProtocolMachine.TestCase
TestProtocol.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, derandomize=bool(os.environ.get("CI"))
)


def death_is_declared_at_the_first_look(patch) -> None:
    patch.setattr(Follower, "suspect", property(lambda self: True, lambda self, value: None), raising=False)


@pytest.mark.parametrize(
    "variant",
    [
        gaps_are_passed_over,
        restarts_are_passed_over,
        readers_are_one_off,
        nobody_is_declared_dead,
        death_is_declared_at_the_first_look,
    ],
    ids=lambda variant: variant.__name__,
)
def test_the_state_machine_finds_a_broken_variant(monkeypatch, variant) -> None:
    variant(monkeypatch)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            ProtocolMachine,
            settings=settings(
                TestProtocol.settings,
                max_examples=1500,  # a bound: the first one that fails is enough
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                report_multiple_bugs=False,
            ),
        )
