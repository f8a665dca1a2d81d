"""The pool as real processes, killed and frozen at random points of seeded schedules; and broken ones, found out.

LLMSTREAM_SCHEDULES sets how many schedules of a kind are run (50), LLMSTREAM_SEED the first one's seed (0): a failing
schedule says its seed.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import pytest
import redis

from llmstream_nb.answers.connection import connect, names_of
from llmstream_nb.answers.read import look, read_answer
from llmstream_nb.faults.servers import RedisServer
from llmstream_nb.pool.queue import enqueue
from llmstream_nb.pool.worker import MAX_TAKEOVERS
from llmstream_nb.protocol.events import Ended, Event, Gap, Restarted, text_of
from llmstream_nb.protocol.wire import POOL, LLMStreamError, Timing

from . import pool
from .model import stream_of
from .pool import Process, Zygote
from .versions import VARIABLE

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't fork, so a worker costs seconds")
SCHEDULES = int(os.environ.get("LLMSTREAM_SCHEDULES", "50"))
SEED = int(os.environ.get("LLMSTREAM_SEED", "0"))
AT_ONCE = 5  # schedules at the same time: they mostly wait for leases to run out
TIMING = Timing(lease=0.6, tick=0.06, ttl=600.0, give_up=8.0, patience=20.0)
BOUND = 30.0  # seconds until everything has ended
NEVER_OUT, STILL_WAITING = "every question has left the queue", "a viewer waits although all is over"


@dataclass
class Blow:
    """A signal to a worker: at a point of its own work, after a delay, or when an answer has so many entries."""

    number: int = getattr(signal, "SIGKILL", 9)
    worker: int = 0  # for the first two kinds
    point: tuple[str, str, int] | None = None  # see pool.POINTS; before or after; the nth call
    delay: float | None = None  # seconds
    entries: tuple[int, int] | None = None  # the number of a question, whose holder is hit, and how many


@dataclass
class Schedule:
    """What happens in one run."""

    questions: list[str] = field(default_factory=lambda: ["20 0.01"])
    workers: int = 3
    slots: int = 1
    blows: list[Blow] = field(default_factory=list)
    late: float = 0.5  # seconds until the late viewers join
    undisturbed: bool = False  # whether nobody may take anything over
    frozen: float = 1.5  # leases for which a frozen worker stays so
    variant: str | None = None
    goes_on: bool = False  # whether the source goes on from the text of who died
    bound: float = BOUND
    timing: Timing = TIMING


def drawn(seed: int, number: int) -> Schedule:
    """The schedule of this seed, with blows of this signal."""
    dice = random.Random(f"{seed} {number}")
    blows = []
    for worker in range(dice.choice([1, 2, 2, 3])):
        blow = Blow(number, worker)
        kind = dice.choice(["point", "point", "delay", "entries"])
        if kind == "point":
            point = dice.choice(list(pool.POINTS))
            calls = {"writes": dice.randint(1, 25)}.get(point, 1)
            blow.point = (point, dice.choice(["before", "after"]), calls)
        elif kind == "delay":
            blow.delay = dice.uniform(0.0, 1.0)
        else:
            blow.entries = (dice.randrange(3), dice.randint(1, 15))
        blows.append(blow)
    return Schedule(
        questions=[f"{dice.randint(5, 25)} {dice.choice([0.003, 0.01, 0.02])}" for _ in range(3)],
        slots=1 if number != signal.SIGKILL else dice.choice([1, 2]),
        blows=blows,
        late=dice.uniform(0.1, 1.5),
        frozen=dice.uniform(1.2, 2.5),
        goes_on=dice.random() < 0.5,
    )


class Viewer(threading.Thread):
    """Reads an answer as it grows."""

    def __init__(self, client: redis.Redis, answer_id: str) -> None:
        super().__init__(daemon=True)
        self.events: list[Event] = []
        self.error: LLMStreamError | None = None
        self._client, self._id = client, answer_id
        self.start()

    def run(self) -> None:
        try:
            self.events.extend(read_answer(self._id, client=self._client, timing=TIMING))
        except LLMStreamError as error:
            self.error = error


class Run:
    """One schedule, run."""

    def __init__(self, zygote: Zygote, url: str, schedule: Schedule) -> None:
        self.zygote, self.url, self.schedule = zygote, url, schedule
        self.prefix = f"t{uuid.uuid4().hex[:10]}"
        self.client = connect(url, prefix=self.prefix)
        self.queue = names_of(self.client).questions
        self.workers: dict[str, Process] = {}
        self.frozen: dict[str, float] = {}  # since when, in monotonic seconds
        self.thawed: set[str] = set()
        self.replaced: set[str] = set()
        self.questions: dict[str, str] = {}
        self.viewers: dict[str, list[Viewer]] = {}

    def __enter__(self) -> Self:
        own = {blow.worker: blow for blow in self.schedule.blows if blow.point}
        for number in range(self.schedule.workers):
            self.hire(own.get(number))
        for question in self.schedule.questions:
            self.ask(question)
        self.see()
        self.began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.send(signal.SIGKILL)
        for worker in self.workers.values():
            self.wait(lambda: worker.code() is not None, "a killed worker is gone")
        self.client.close()

    def hire(self, blow: Blow | None = None, variant: str | None = None) -> None:
        """Start one more worker."""
        schedule, name = self.schedule, f"w{len(self.workers)}"
        options: dict[str, Any] = {"url": self.url, "prefix": self.prefix, "name": name, "slots": schedule.slots}
        options |= {"timing": asdict(schedule.timing), "variant": variant or schedule.variant}
        options["goes_on"] = schedule.goes_on
        if blow and blow.point:
            point, when, call = blow.point
            options["blow"] = {"point": point, "when": when, "call": call, "number": blow.number}
        self.workers[name] = self.zygote.fork(options)

    def ask(self, question: str) -> str:
        """Put a question into the queue, and return the key of its answer."""
        answer_id = f"q{len(self.questions)}"
        self.questions[answer_id], self.viewers[answer_id] = question, []
        enqueue(question, id=answer_id, client=self.client, timing=self.schedule.timing)
        return names_of(self.client).answer(answer_id).chunks

    def wait(self, condition, what: str) -> None:
        """Wait for something, within the schedule's bound."""
        until = time.monotonic() + self.schedule.bound
        while not condition():
            assert time.monotonic() < until, f"not within {self.schedule.bound:g} s: {what}"
            time.sleep(0.005)

    # What goes on

    def until_all_is_over(self) -> None:
        """Strike the blows, replace the dead, wake the frozen, until every question is out of the queue."""
        left = [blow for blow in self.schedule.blows if not blow.point]

        def over() -> bool:
            now = time.monotonic() - self.began
            left[:] = [blow for blow in left if not self.strike(blow, now)]
            awake = self.tend()
            if now > self.schedule.late and len(self.viewers["q0"]) == 1:
                self.see()
            return awake and not self.client.xlen(self.queue)

        self.wait(over, NEVER_OUT)
        self.see()
        for viewer in [viewer for viewers in self.viewers.values() for viewer in viewers]:
            viewer.join(self.schedule.bound)
            assert not viewer.is_alive(), STILL_WAITING

    def see(self) -> None:
        """One more viewer for each answer."""
        for answer_id, viewers in self.viewers.items():
            viewers.append(Viewer(self.client, answer_id))

    def strike(self, blow: Blow, now: float) -> bool:
        """Do it if it is time; True once it is done."""
        worker = self.workers[f"w{blow.worker}"] if blow.delay is not None and now > blow.delay else None
        if blow.entries:
            question, entries = blow.entries
            if self.client.xlen(names_of(self.client).answer(f"q{question}").chunks) >= entries:
                worker = self.holder(f"q{question}")
                if not worker:
                    return True  # it is through with it
        if worker:
            worker.send(blow.number)
        return bool(worker)

    def holder(self, answer_id: str) -> Process | None:
        """The worker that has this question pending."""
        held = self.client.xpending_range(self.queue, POOL, "-", "+", 100)
        owner = {entry["message_id"]: entry["consumer"] for entry in held}
        for entry_id, fields in self.client.xrange(self.queue):
            if fields["answer"] == answer_id and entry_id in owner:
                return self.workers[owner[entry_id]]
        return None

    def tend(self, hire: bool = True) -> bool:
        """Replace who is dead, let who has been frozen for long enough go on, and return whether all are awake."""
        now = time.monotonic()
        for name, worker in list(self.workers.items()):
            if worker.frozen():
                since = self.frozen.setdefault(name, now)
                if now - since > self.schedule.frozen * self.schedule.timing.lease:
                    worker.send(signal.SIGCONT)
                    self.thawed.add(name)
                    del self.frozen[name]
            elif hire and worker.code() is not None and name not in self.replaced:
                self.replaced.add(name)
                self.hire()
        return not self.frozen

    # What must hold

    def check(self) -> None:
        """Every question has ended once, with the text of one attempt, which every viewer holds; nothing is left."""
        assert self.client.xpending(self.queue, POOL)["pending"] == 0
        rows = [json.loads(row) for row in self.client.lrange(names_of(self.client).failures, 0, -1)]
        given_up = {row["answer"] for row in rows}
        for row in rows:
            assert row["error"] == "GivenUp" and row["delivered"] > MAX_TAKEOVERS + 1, row
        for answer_id, question in self.questions.items():
            self.check_answer(answer_id, question, answer_id in given_up)

    def check_answer(self, answer_id: str, question: str, given_up: bool) -> None:
        entries = stream_of(self.client, answer_id)
        assert [entry for entry in entries if entry.final] == entries[-1:], "not exactly one end"
        texts: dict[int, str] = {}
        anew = set[int]()  # the attempts that begin from their beginning
        for attempt in sorted({entry.id.attempt for entry in entries}):
            own = [entry for entry in entries if entry.id.attempt == attempt]
            assert [entry.id.seq for entry in own] == list(range(len(own))), "an attempt with a hole"
            assert own[0].kind == "start" or (given_up and own[0].final)
            tokens = re.findall(r"(\d+)\.(\w+) ", text := "".join(entry.text for entry in own if entry.kind == "text"))
            kept = own[1].text if own[0].kind == "start" and "continues" in own[0].data else ""
            assert kept == (texts[attempt - 1] if kept else ""), "an heir keeps another text than stood"
            anew |= set() if kept else {attempt}
            tags = {tag for _, tag in tokens[len(kept.split()) :]}
            assert len(tags) <= 1, f"text of two producers in attempt {attempt}: {text}"
            assert [int(number) for number, _ in tokens] == list(range(len(tokens)))
            texts[attempt] = text
        assert list(texts) == list(range(1, len(texts) + 1)), "an attempt is missing"
        if self.schedule.goes_on:
            closing = {len(texts)} if given_up else set()
            assert anew <= closing | {n for n in texts if not texts.get(n - 1)}, "it begins anew, and could go on"
        assert not self.schedule.undisturbed or len(texts) == 1, "a living worker was taken for dead"
        whole = texts[max(texts) - given_up]
        record = look(answer_id, self.client).record
        assert (record["text"], record["end"]) == (whole, str(entries[-1].id)), "the record differs from the stream"
        if given_up:
            assert (entries[-1].kind, record["error"]) == ("error", "GivenUp")
        else:
            assert question != "poison" and len(re.findall(r"\d+\.", whole)) == int(question.split(maxsplit=1)[0]), (
                "not the whole answer"
            )
            assert (entries[-1].kind, record["reason"]) == ("end", "stop")
        for viewer in self.viewers[answer_id]:
            assert viewer.error is None, viewer.error
            assert text_of(viewer.events) == whole, "a viewer holds another text"
            assert {event.id.attempt for event in viewer.events if isinstance(event, Restarted)} <= anew | {len(texts)}
            assert not [event for event in viewer.events if isinstance(event, Gap)]
            assert given_up or [type(event) for event in viewer.events if isinstance(event, Ended)] == [Ended]

    def check_all_are_useful(self, names: set[str]) -> None:
        """Each of these workers still answers questions."""
        seen: set[str] = set()

        def asked_all() -> bool:
            for _ in self.workers:
                self.ask("5 0.02")
            self.wait(lambda: self.tend() and not self.client.xlen(self.queue), "the pool goes on")
            seen.update(stream_of(self.client, answer_id)[0].data["worker"] for answer_id in list(self.questions)[3:])
            return names <= seen

        self.wait(asked_all, f"{names} answer again")

    def check_they_end(self) -> None:
        """Told to, all workers end in good order."""
        for worker in self.workers.values():
            worker.send(signal.SIGTERM)

        def gone() -> bool:
            self.tend(hire=False)  # some may only now be at the point where they freeze
            return all(worker.code() is not None for worker in self.workers.values())

        self.wait(gone, "the workers end")
        assert {worker.code() for worker in self.workers.values()} <= {0, -signal.SIGKILL}


def play(zygote: Zygote, server: RedisServer, schedule: Schedule) -> Run:
    """Run a schedule, and check that all holds."""
    with Run(zygote, server.url, schedule) as run:
        run.until_all_is_over()
        if run.thawed:
            run.check_all_are_useful(run.thawed)
        run.check()
        run.check_they_end()
    return run


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as process:
        yield process


@pytest.fixture
def server(drawn_server, real_servers) -> RedisServer:
    return real_servers[drawn_server]


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_schedules(zygote, server, drawn_server, name: str) -> None:
    """Workers killed, or frozen for longer than a lease, at any moment: no question is lost, and no text mixed."""
    number = getattr(signal, name)

    def one(seed: int) -> str | None:
        try:
            play(zygote, server, drawn(seed, number))
        except Exception as error:
            return f"{VARIABLE}={drawn_server} LLMSTREAM_SEED={seed} LLMSTREAM_SCHEDULES=1: {type(error).__name__}: {error}\n{drawn(seed, number)}"
        return None

    with ThreadPoolExecutor(AT_ONCE) as executor:
        failed = list(filter(None, executor.map(one, range(SEED, SEED + SCHEDULES))))
    assert not failed, "\n\n".join([f"{len(failed)} of {SCHEDULES} schedules failed", *failed])


# ---------------------------------------------------------------------------------- scenarios, and broken variants


def a_worker_is_killed_in_mid_answer(
    zygote: Zygote, server: RedisServer, variant: str | None, bound: float = BOUND
) -> None:
    blows = [Blow(worker=worker, point=("writes", "after", 5)) for worker in range(2)]  # whoever it is, and its heir
    play(zygote, server, Schedule(["20 0.01"], workers=2, blows=blows, variant=variant, bound=bound))


def a_worker_is_killed_and_others_go_on(
    zygote: Zygote, server: RedisServer, variant: str | None, bound: float = BOUND
) -> None:
    blows = [Blow(worker=worker, point=("writes", "after", 5)) for worker in range(2)]
    schedule = Schedule(["20 0.01"], workers=2, blows=blows, goes_on=True, variant=variant, bound=bound)
    run = play(zygote, server, schedule)
    tags = re.findall(r"\.(\w+) ", text_of(run.viewers["q0"][0].events))
    # One whose fifth write is none of its own words, but what it keeps of another's, leaves none.
    assert len(set(tags)) >= 2, f"the words of one alone: {tags}"


def a_worker_is_frozen_in_mid_answer(
    zygote: Zygote, server: RedisServer, variant: str | None, bound: float = BOUND
) -> None:
    """It wakes up while its heir is writing."""
    blow = Blow(signal.SIGSTOP, entries=(0, 5))
    play(zygote, server, Schedule(["40 0.02"], workers=2, blows=[blow], frozen=1.5, variant=variant, bound=bound))


def a_worker_is_held_up(zygote: Zygote, server: RedisServer, variant: str | None, bound: float = BOUND) -> None:
    """Its entry in the queue is idle for leases, while its producer goes on writing."""
    broken = f"slow_coordinator_and_{variant}" if variant else "slow_coordinator"
    play(zygote, server, Schedule(["75 0.02"], workers=2, undisturbed=True, variant=broken, bound=bound))


def a_question_kills_its_workers(
    zygote: Zygote, server: RedisServer, variant: str | None, bound: float = BOUND
) -> None:
    """Three takeovers; then it is given up, and those beside it are answered."""
    run = play(zygote, server, Schedule(["poison", "5 0.01", "5 0.01"], workers=2, variant=variant, bound=bound))
    assert len(run.replaced) == MAX_TAKEOVERS + 1


def redis_is_away(
    zygote: Zygote, server: RedisServer, variant: str | None, bound: float = BOUND, leases: float = 1.2
) -> None:
    """Long enough for all leases to run out: all come back, the idle one first, and go on where they were."""
    timing = replace(TIMING, lease=1.2)
    with RedisServer(server.program, appendfsync="always") as mortal:
        schedule = Schedule(
            ["50 0.03"] * 6, 2, 3, undisturbed=True, variant="slow_to_come_back", bound=bound, timing=timing
        )
        with Run(zygote, mortal.url, schedule) as run:
            wait = lambda key: run.wait(lambda: run.client.xlen(key) > 3, "it is being answered")  # noqa: E731
            for answer_id in run.questions:
                wait(names_of(run.client).answer(answer_id).chunks)
            run.hire(variant=variant or "as_it_is")
            wait(run.ask("50 0.03"))
            mortal.kill()
            back = time.monotonic() + leases * timing.lease
            run.wait(lambda: time.monotonic() > back, "the outage")
            mortal.start()
            run.until_all_is_over()
            run.check()
            run.check_they_end()


VARIANTS = {  # what is broken: where that shows, and how
    "ack_before_the_end": (a_worker_is_killed_in_mid_answer, STILL_WAITING),
    "no_ack": (a_worker_is_killed_in_mid_answer, NEVER_OUT),
    "old_text_goes_on": (a_worker_is_killed_in_mid_answer, "text of two producers"),
    "one_entry_less_is_kept": (a_worker_is_killed_and_others_go_on, "an heir keeps another text"),
    "no_fencing": (a_worker_is_frozen_in_mid_answer, "text of two producers|not exactly one end"),
    "no_look_at_the_lease": (a_worker_is_held_up, "a living worker was taken for dead"),
    "no_end_of_takeovers": (a_question_kills_its_workers, NEVER_OUT),
    "no_wait_before_judging": (redis_is_away, "a living worker was taken for dead"),
}
SCENARIOS = dict.fromkeys(scenario for scenario, _ in VARIANTS.values())


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_scenario(zygote, server, scenario) -> None:
    scenario(zygote, server, None)


def test_a_short_outage(zygote, server) -> None:
    redis_is_away(zygote, server, None, leases=0.2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_broken_variant_is_caught(zygote, server, variant: str) -> None:
    scenario, how = VARIANTS[variant]
    bound = 4.0 if how in (NEVER_OUT, STILL_WAITING) else BOUND
    with pytest.raises(AssertionError, match=how):
        for _ in range(3):  # where it is a matter of who comes first
            scenario(zygote, server, variant, bound)
