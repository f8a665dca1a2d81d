"""The pool on every backend: what becomes of a question, of its worker, and of input that is none."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import psutil
import pytest
import redis

from llmstream_nb.answers import read
from llmstream_nb.answers.ask import Answer, ask, clear, close_answer
from llmstream_nb.answers.attempt import Attempt
from llmstream_nb.answers.connection import RedisUnusable, connect, environment_of, milliseconds, names_of
from llmstream_nb.answers.read import look, read_answer
from llmstream_nb.faults import servers
from llmstream_nb.llm import local
from llmstream_nb.llm import sources as llm
from llmstream_nb.llm.endpoint import ModelError
from llmstream_nb.pool import queue as queues
from llmstream_nb.pool import worker as workers
from llmstream_nb.pool.groups import BadName
from llmstream_nb.pool.process import start_process
from llmstream_nb.pool.queue import enqueue, read_question
from llmstream_nb.pool.worker import MAX_TAKEOVERS, Worker
from llmstream_nb.protocol.events import Ended, Interrupted, Restarted, Started, text_of
from llmstream_nb.protocol.round import StillWaiting
from llmstream_nb.protocol.wire import DAY, POOL, AnswerExists, BadAnswerId, BadQuestion, Fenced
from llmstream_nb.setup import cli
from llmstream_nb.setup.environment import ROOT

from . import conftest
from .model import Model, assert_whole, stream_of, text_in, wait_for
from .network import Proxy

FAST = replace(conftest.FAST, tick=0.02)
QUICK = replace(FAST, lease=0.4)  # where somebody has to die
STEADY = replace(FAST, lease=5.0)  # where a sign of life may come late
CALM = replace(FAST, lease=60.0)  # where nobody may be taken for dead, however busy the machine is


class Models:
    """A source: each question gets a model under the test's control, each attempt another one."""

    def __init__(self) -> None:
        self._made: dict[str, list[Model]] = defaultdict(list)

    def __call__(self, question: str, topic: str | None) -> Model:
        made = self._made[question]

        class Asked(Model):
            def __iter__(self) -> Iterator[str]:
                made.append(self)
                return super().__iter__()

        return Asked()

    def asked(self, question: str = "why?") -> int:
        """How often an answer to this was begun."""
        return len(self._made[question])

    def __getitem__(self, question: str) -> Model:
        """The model of the newest attempt at this question, as soon as there is one."""
        wait_for(lambda: self._made[question])
        return self._made[question][-1]


def parrot(question: str, topic: str | None) -> Iterable[str]:
    """A source that answers at once."""
    return iter(["so ", question])


def threads_of_the_kit() -> list[str]:
    kinds = ("llmstream worker", "llmstream write", "llmstream model", "llmstream parent")
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(kinds)]


@pytest.fixture
def pool(client) -> Iterator:
    """Starts workers on the backend, and ends them; none leaves a thread behind."""
    started: list[Worker] = []

    def start(source=parrot, timing=FAST, **options) -> Worker:
        started.append(Worker(source=source, client=client, timing=timing, **options).start())
        return started[-1]

    yield start
    for worker in started:
        worker.stop(within=0)
    wait_for(lambda: not threads_of_the_kit())


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch) -> None:
    """Viewers look for signs of life more often."""
    monkeypatch.setattr(read, "BLOCK", 0.1)


@pytest.fixture
def no_waiting_to_judge(monkeypatch) -> None:
    """Workers that have just begun judge at once."""
    monkeypatch.setattr(Worker, "_wait_to_judge", lambda self: None)


def put(client, question: str = "why?", answer_id: str = "a", timing=FAST) -> Answer:
    return enqueue(question, id=answer_id, client=client, timing=timing)


def queue(client) -> list[tuple[str, dict]]:
    return client.xrange(names_of(client).questions)


def pending(client) -> list[dict]:
    return client.xpending_range(names_of(client).questions, POOL, "-", "+", 100)


def consumers(client) -> list[str]:
    return [consumer["name"] for consumer in client.xinfo_consumers(names_of(client).questions, POOL)]


def failures(client) -> list[dict]:
    return [json.loads(row) for row in client.lrange(names_of(client).failures, 0, -1)]


def ended(answer: Answer) -> Answer:
    """An answer that has ended, and its record says so."""
    answer.wait(60)
    wait_for(lambda: "end" in answer.record)
    return answer


def assert_queue_empty(client) -> None:
    wait_for(lambda: not queue(client))
    assert pending(client) == []


def deliver(client, to: str = "dead", times: int = 1) -> str:
    """Give the next question to a worker that does not exist, as if so often and long ago; return the entry."""
    name = names_of(client).questions
    try:
        client.xgroup_create(name, POOL, "0", mkstream=True)
    except redis.ResponseError:
        pass
    [[_, [(entry, _)]]] = client.xreadgroup(POOL, to, {name: ">"}, count=1)
    client.xclaim(name, POOL, to, 0, [entry], idle=3_600_000, retrycount=times, justid=True)
    return entry


def open_attempt(client, entry: str, *texts: str, timing=QUICK, end: bool = False) -> Attempt:
    """An attempt as a worker opens it, which then stands still."""
    record = json.loads(client.get(names_of(client).answer("a").question))
    attempt = Attempt(client, record, timing)
    attempt.open(lambda top: ("start", {"model": "m", "source": "s", "worker": "dead", "job": entry}))
    attempt.entries += [("text", text, 1) for text in texts]
    if end:
        attempt.entries.append(("end", json.dumps({"reason": "stop"}), 2))
    attempt.flush()
    return attempt


def end_lease(client, attempt: Attempt) -> None:
    """The producer of this attempt has been dead for long enough."""
    attempt.close()
    client.delete(attempt.keys.lease(attempt.number))


# ---------------------------------------------------------------------------------------------------- answering


def test_a_question_is_answered_by_the_pool(client, pool) -> None:
    answer = enqueue("why?", topic="streams", client=client, timing=FAST)
    assert (answer.status, answer.text, answer.record["pooled"]) == ("queued", "", True)
    assert client.zrange(names_of(client).answers, 0, -1) == [answer.id]
    [(entry, fields)] = queue(client)
    assert fields == {"answer": answer.id, "nonce": answer.record["nonce"]}
    asked_about: list = []
    worker = pool(lambda question, topic: asked_about.append(topic) or iter(["so", " it is"]))
    events = list(read_answer(answer.id, client=client, timing=FAST))
    assert isinstance(events[0], Started) and isinstance(events[-1], Ended) and text_of(events) == "so it is"
    assert (events[0].data["worker"], events[0].data["job"]) == (worker.name, entry)
    assert answer.wait(60) is answer and (answer.status, answer.text) == ("ended", "so it is")
    wait_for(lambda: "end" in answer.record)
    assert (answer.record["question"], answer.record["topic"], answer.record["pooled"]) == ("why?", "streams", True)
    assert asked_about == ["streams"]
    assert_queue_empty(client)
    assert failures(client) == []


def test_a_source_by_name_is_asked_as_the_question_says(client, pool) -> None:
    pool(None)
    pooled = enqueue("What is a Redis stream?", source="scripted", model="scripted:pace=0", client=client)
    asked = ask("What is a Redis stream?", source="scripted", model="scripted:pace=0", client=client)
    assert pooled.wait(60).text == asked.wait(60).text
    wait_for(lambda: "end" in pooled.record)
    same = ("source", "model", "usage", "reason", "chunks", "question", "topic")
    assert [pooled.record[name] for name in same] == [asked.record[name] for name in same]


def test_without_a_worker_the_patience_ends(client) -> None:
    with pytest.raises(StillWaiting):
        put(client, timing=replace(FAST, patience=0.2)).wait()
    assert look("a", client).status == "queued"


def test_a_worker_answers_as_many_at_once_as_it_has_slots(client, pool) -> None:
    models = Models()
    for name in "abc":
        put(client, name, name)
    pool(models, slots=2)
    for name in "ab":
        models[name].say(f"{name}!")
        wait_for(lambda: text_in(client, name) == f"{name}!")
    assert [row["times_delivered"] for row in pending(client)] == [1, 1]
    assert models.asked("c") == 0 and look("c", client).status == "queued"
    models["b"].end()
    models["c"].say("c!")
    wait_for(lambda: text_in(client, "c") == "c!")
    for name in "ac":
        models[name].end()
    assert_queue_empty(client)
    assert [look(name, client).status for name in "abc"] == ["ended"] * 3


def test_workers_share_the_questions(client, pool) -> None:
    models = Models()
    names = [pool(models, slots=1).name for _ in range(3)]
    for name in "abc":
        put(client, name, name)
    for model in [models[name] for name in "abc"]:  # once all of them are being answered
        model.end()
    for name in "abc":
        Answer(name, client=client, timing=FAST).wait(60)
    assert_queue_empty(client)
    assert sorted(stream_of(client, name)[0].data["worker"] for name in "abc") == sorted(names)
    assert [models.asked(name) for name in "abc"] == [1, 1, 1]


@pytest.mark.slow
def test_a_silent_model_keeps_its_question(client, pool, no_waiting_to_judge) -> None:
    """It is held by ticks alone, while another worker waits for it to become idle."""
    models = Models()
    put(client)
    pool(models, timing=STEADY)
    models["why?"].say("one ")
    pool(models, timing=STEADY)
    wait_for(lambda: text_in(client) == "one ")
    idle = list[float]()

    def another() -> bool:
        idle.extend(row["time_since_delivered"] for row in pending(client))
        return renewals(idle) >= 20

    wait_for(another)
    models["why?"].say("two")
    models["why?"].end()
    assert_queue_empty(client)
    assert models.asked() == 1 and text_in(client) == "one two" and {e.id.attempt for e in stream_of(client)} == {1}
    assert max(idle) < STEADY.lease * 1000


# -------------------------------------------------------------------------------------------- stopping and clearing


def test_a_queued_question_is_stopped_and_never_asked(client, pool) -> None:
    answer, models = put(client), Models()
    assert answer.stop() == "ended" and answer.record["reason"] == "cancelled"
    pool(models)
    assert_queue_empty(client)
    assert models.asked() == 0 and answer.status == "ended" and len(stream_of(client)) == 1


def test_a_running_answer_is_stopped(client, pool) -> None:
    answer, models = put(client), Models()
    pool(models)
    models["why?"].say("so far ")
    wait_for(lambda: answer.text == "so far ")
    assert answer.stop() == "ended"
    assert (answer.text, answer.record["reason"]) == ("so far ", "cancelled")
    wait_for(lambda: models["why?"].closed)
    assert_queue_empty(client)


def test_an_interrupted_answer_is_stopped_and_not_begun_again(client, pool, no_waiting_to_judge) -> None:
    answer, models = put(client), Models()
    end_lease(client, open_attempt(client, deliver(client), "half"))
    assert answer.stop() == "ended" and answer.text == "half"
    pool(models, timing=QUICK)
    assert_queue_empty(client)
    assert models.asked() == 0 and answer.text == "half" and failures(client) == []


@pytest.mark.parametrize("when", ["queued", "running", "held by the dead"])
def test_a_cleared_question_stays_away(client, pool, no_waiting_to_judge, when: str) -> None:
    models = Models()
    put(client)
    if when == "running":
        pool(models, timing=QUICK)
        models["why?"].say("so far ")
        wait_for(lambda: text_in(client) == "so far ")
    elif when == "held by the dead":
        end_lease(client, open_attempt(client, deliver(client), "half"))
    assert clear("a", client=client, timing=QUICK) == 1
    pool(models, timing=QUICK)
    assert_queue_empty(client)
    assert look("a", client).status == "missing" and failures(client) == []
    assert models.asked() == (when == "running")


@pytest.mark.slow
def test_the_pool_goes_on_when_all_is_cleared(client, pool) -> None:
    models = Models()
    put(client)
    worker = pool(models)
    models["why?"].say("so far ")
    wait_for(lambda: text_in(client) == "so far ")
    assert clear(client=client, timing=FAST) == 1
    assert put(client, "again?", "b").status == "queued"
    models["again?"].say("yes")
    models["again?"].end()
    assert Answer("b", client=client, timing=FAST).wait(60).text == "yes"
    assert_queue_empty(client)
    assert worker.error is None and look("a", client).status == "missing"
    wait_for(lambda: consumers(client) == [worker.name] and silence(client, worker.name, FAST) < FAST.lease)


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["queue", "group"])
def test_a_pool_whose_queue_or_group_is_gone_makes_it_again(client, pool, gone: str) -> None:
    name, worker = names_of(client).questions, pool()
    put(client).wait(60)
    client.delete(name) if gone == "queue" else client.xgroup_destroy(name, POOL)
    assert put(client, answer_id="b").wait(60).text == "so why?"
    assert_queue_empty(client)
    assert worker.error is None


# ----------------------------------------------------------------------------------------------- ending a worker


def test_a_worker_finishes_its_answer_before_it_ends(client, pool) -> None:
    models, answer = Models(), put(client)
    worker = pool(models, slots=1)
    models["why?"].say("one ")
    wait_for(lambda: answer.text == "one ")
    worker.finish(within=30)
    assert put(client, answer_id="b").status == "queued" and worker.ending
    models["why?"].say("two")
    models["why?"].end()
    worker.stop(within=30)
    assert (answer.status, answer.text) == ("ended", "one two")
    assert models.asked() == 1 and look("b", client).status == "queued"  # it took no more
    assert [fields["answer"] for _, fields in queue(client)] == ["b"] and pending(client) == []
    assert consumers(client) == []  # signed off


def test_what_is_not_finished_goes_back_and_another_takes_it_at_once(client, pool, monkeypatch) -> None:
    models, answer = Models(), put(client)
    first = pool(models, timing=CALM)
    models["why?"].say("half")
    wait_for(lambda: answer.text == "half")
    monkeypatch.setattr(Worker, "_wait_to_judge", lambda self: None)
    second = pool(models, timing=CALM)
    first.stop(within=0)
    wait_for(lambda: models.asked() == 2)
    [row] = pending(client)
    assert (row["consumer"], row["times_delivered"]) == (second.name, 1)  # that was no takeover
    models["why?"].say("whole")
    models["why?"].end()
    events = list(read_answer("a", client=client, timing=CALM))
    assert text_of(events) == "whole" and [type(e) for e in events if isinstance(e, Restarted)] == [Restarted]
    assert_queue_empty(client)
    assert first.error is None, first.error


def test_a_handed_back_question_that_nobody_takes_is_interrupted_not_lost(client, pool) -> None:
    models, answer = Models(), put(client)
    worker = pool(models)
    models["why?"].say("half")
    wait_for(lambda: answer.text == "half")
    worker.stop(within=0)
    wait_for(lambda: models["why?"].closed)
    assert answer.status == "interrupted" and answer.text == "half"  # its lease is given up at once
    assert len(queue(client)) == len(pending(client)) == 1


def test_an_idle_worker_leaves_nothing(client, pool) -> None:
    worker = pool()
    put(client).wait(60)
    assert_queue_empty(client)
    assert consumers(client) == [worker.name] and client.exists(names_of(client).worker(worker.name))
    worker.stop()
    assert consumers(client) == [] and worker.error is None
    wait_for(lambda: threads_of_the_kit() == [])  # those of its answer may have a last word to say in the log
    assert not client.exists(names_of(client).worker(worker.name))


def silence(client, name: str, timing=STEADY) -> float:
    """Seconds since this worker's last sign of life, of which it has given at least one."""
    key, lease = names_of(client).worker(name), milliseconds(timing.lease)
    assert client.get(key) == str(lease)
    return (lease + 1000 * DAY - client.pttl(key)) / 1000


def assert_alive(client, worker: Worker, signs: int = 20) -> None:
    """It gives signs of life, as a consumer of the group: so many that are seen, however slow the machine is."""
    wait_for(lambda: client.exists(names_of(client).worker(worker.name)) and consumers(client) == [worker.name])
    seen = list[float]()

    def another() -> bool:
        seen.append(silence(client, worker.name))
        assert seen[-1] < STEADY.lease and consumers(client) == [worker.name]
        return renewals(seen) >= signs

    wait_for(another)
    assert worker.error is None


def renewals(idle: list[float]) -> int:
    """How often a time that grows, seen again and again, began anew."""
    return sum(later < before for before, later in pairwise(idle))


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True])
def test_a_worker_gives_signs_of_life(client, pool, busy: bool) -> None:
    """Before it has taken a question, and while all its slots are taken."""
    models = Models()
    worker = pool(models, timing=STEADY, slots=1)
    if busy:
        put(client)
        put(client, answer_id="b")
        models["why?"].say("so ")
    assert_alive(client, worker)


def test_signs_of_life_that_somebody_deletes_come_back(client, pool) -> None:
    worker = pool(timing=STEADY)
    assert_alive(client, worker, signs=1)
    client.xgroup_delconsumer(names_of(client).questions, POOL, worker.name)  # as another worker of this name does
    client.delete(names_of(client).worker(worker.name))  # when it ends
    wait_for(lambda: client.exists(names_of(client).worker(worker.name)))
    assert_alive(client, worker, signs=5)


def test_a_full_memory_keeps_no_worker_from_showing_that_it_lives(program) -> None:
    with servers.RedisServer(program, maxmemory_policy="noeviction") as server:
        client = connect(server.url, prefix="full")
        worker = Worker(client=client, timing=STEADY).start()
        assert_alive(client, worker, signs=1)
        client.config_set("maxmemory", 1)
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            client.set("full:x", "x")
        assert_alive(client, worker)
        worker.stop()
        client.close()


def test_ending_takes_no_lock(client) -> None:
    """A signal comes between any two instructions of the main thread, also while that holds a lock."""
    worker = Worker(client=client, timing=FAST)
    with worker._changed._cond:
        thread = threading.Thread(target=worker.finish, daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive() and worker.ending


def test_a_worker_leaves_no_connection_behind(shared) -> None:
    with shared.client() as admin:
        client = connect(shared.url, prefix=f"t{uuid.uuid4().hex[:8]}")
        client.ping()
        before = len(admin.client_list())
        worker = Worker(source=parrot, client=client, timing=FAST).start()
        for number in range(5):
            put(client, answer_id=f"a{number}").wait(60)
        worker.stop()
        client.close()  # its pool has a connection for each thread that used it at the same time
        wait_for(lambda: not threads_of_the_kit() and len(admin.client_list()) < before)


# -------------------------------------------------------------------------------------------------- taking over


@pytest.mark.slow
@pytest.mark.parametrize("opened", [False, True])
def test_the_question_of_a_dead_worker_is_taken_over(client, pool, no_waiting_to_judge, opened: bool) -> None:
    models, answer = Models(), put(client)
    entry = deliver(client)
    if opened:
        open_attempt(client, entry, "half").close()  # its lease runs out by itself
        wait_for(lambda: look("a", client).status == "interrupted")
        assert answer.text == "half"
    heir = pool(models, timing=QUICK)
    models["why?"].say("the ", "whole")
    wait_for(lambda: answer.text == "the whole")
    assert [(row["consumer"], row["times_delivered"]) for row in pending(client)] == [(heir.name, 2)]
    models["why?"].end()
    assert_queue_empty(client)
    assert_whole(client, ["the ", "whole"], attempt=1 + opened)
    assert max(stream_of(client)).id.attempt == 1 + opened
    wait_for(lambda: answer.record.get("text") == "the whole")
    assert models.asked() == 1 and failures(client) == []


def test_a_viewer_sees_the_takeover(client, pool, no_waiting_to_judge) -> None:
    answer = put(client)
    end_lease(client, open_attempt(client, deliver(client), "half"))
    events: list = []
    viewer = threading.Thread(target=lambda: events.extend(read_answer("a", client=client, timing=QUICK)), daemon=True)
    viewer.start()
    wait_for(lambda: any(isinstance(event, Interrupted) for event in list(events)))
    worker = pool(timing=QUICK)
    wait_for(lambda: not viewer.is_alive())
    [restarted] = [event for event in events if isinstance(event, Restarted)]
    assert restarted.data["worker"] == worker.name
    assert text_of(events) == "so why?" == answer.wait(60).text


def test_a_takeover_goes_before_new_questions(client, pool, no_waiting_to_judge) -> None:
    models = Models()
    put(client, "old")
    end_lease(client, open_attempt(client, deliver(client), "half"))
    for name in "bc":
        put(client, name, name)
    pool(models, timing=QUICK, slots=1)
    models["old"].say("whole")
    wait_for(lambda: text_in(client, attempt=2) == "whole")
    assert models.asked("b") == models.asked("c") == 0
    for name in ("old", "b", "c"):
        models[name].end()
    assert_queue_empty(client)


@pytest.mark.parametrize("takeovers", [MAX_TAKEOVERS, MAX_TAKEOVERS + 1])
def test_a_question_is_given_up_after_three_takeovers(client, pool, no_waiting_to_judge, takeovers: int) -> None:
    answer = put(client)
    entry = deliver(client, times=takeovers)  # the last of them is to come
    end_lease(client, open_attempt(client, entry, "so ", "far"))
    worker = pool(timing=QUICK)
    assert_queue_empty(client)
    if takeovers <= MAX_TAKEOVERS:
        assert (answer.status, answer.text, failures(client)) == ("ended", "so why?", [])
        return
    assert (answer.status, answer.text, answer.record["error"]) == ("failed", "so far", "GivenUp")
    assert answer.record["text"] == "so far" and "workers died" in answer.record["message"]
    [row] = failures(client)
    assert row.pop("at") > 1e9
    assert row == {
        "entry": entry,
        "answer": "a",
        "question": "why?",
        "error": "GivenUp",
        "message": answer.record["message"],
        "delivered": MAX_TAKEOVERS + 2,
        "worker": worker.name,
    }


def test_what_had_ended_is_not_given_up(client, pool, no_waiting_to_judge) -> None:
    """It killed its workers after its end, so to speak: the answer is whole, and stays so."""
    answer = put(client)
    end_lease(client, open_attempt(client, deliver(client, times=9), "all", end=True))
    pool(timing=QUICK)
    assert_queue_empty(client)
    assert (answer.status, answer.record["text"], failures(client)) == ("ended", "all", [])


def test_the_list_of_failures_is_capped_newest_first(client, pool, monkeypatch) -> None:
    monkeypatch.setattr(queues, "KEPT_FAILURES", 2)
    pool()
    for number in range(4):
        client.xadd(names_of(client).questions, {"answer": f"bad id {number}"})
    assert_queue_empty(client)
    assert [row["answer"] for row in failures(client)] == ["bad id 3", "bad id 2"]


def test_an_answer_that_had_ended_is_only_repaired(client, pool, no_waiting_to_judge) -> None:
    models, answer = Models(), put(client)
    end_lease(client, open_attempt(client, deliver(client), "all ", "of it", end=True))
    before = stream_of(client)
    assert "end" not in answer.record
    pool(models, timing=QUICK)
    assert_queue_empty(client)
    assert (answer.record["text"], answer.record["end"], answer.record["reason"]) == ("all of it", "1-3", "stop")
    assert models.asked() == 0 and stream_of(client) == before


@pytest.mark.slow
def test_a_producer_that_lives_is_not_displaced_though_its_entry_is_idle(client, pool, monkeypatch) -> None:
    """Its worker's coordinator may be held up; what counts is whether the answer is being written."""
    monkeypatch.setattr(Worker, "_wait_to_judge", lambda self: None)
    models, looks, is_written = Models(), [], workers.is_written
    monkeypatch.setattr(workers, "is_written", lambda *args: looks.append(is_written(*args)) or looks[-1])
    put(client)
    entry = deliver(client)
    attempt = open_attempt(client, entry, "half", timing=CALM)
    client.persist(attempt.keys.lease(1))
    pool(models, timing=QUICK)
    wait_for(lambda: looks.count(True) > 5)
    [row] = pending(client)
    assert (row["consumer"], row["times_delivered"], models.asked()) == ("dead", 1, 0)
    end_lease(client, attempt)
    models["why?"].end()
    assert_queue_empty(client)


def test_two_heirs_at_once_take_it_once(client, pool, no_waiting_to_judge) -> None:
    models, heirs = Models(), []
    put(client)
    end_lease(client, open_attempt(client, deliver(client), "half"))
    heirs += [pool(models, timing=CALM, name=f"heir{n}") for n in range(4)]
    models["why?"].say("whole")
    wait_for(lambda: text_in(client, attempt=2) == "whole")
    assert [row["times_delivered"] for row in pending(client)] == [2]
    models["why?"].end()
    assert_queue_empty(client)
    assert models.asked() == 1 and text_in(client, attempt=2) == "whole"
    assert all(heir.error is None for heir in heirs)


class Sleeper(Worker):
    """A worker that can be put to sleep as a whole: neither it nor its producers do anything then."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.awake = threading.Event()
        self.awake.set()

    def _round(self) -> None:
        self.awake.wait()
        super()._round()

    def _begin(self, *args) -> None:
        super()._begin(*args)
        for producer in self._jobs.values():
            flush = Attempt.flush.__get__(producer.attempt)
            producer.attempt.flush = lambda flush=flush: self.awake.wait() and flush()


@pytest.mark.slow
@pytest.mark.parametrize("wakes", ["while its heir is writing", "when all is over"])
def test_a_worker_that_wakes_up_late_can_neither_write_nor_keep_the_question(client, pool, wakes: str) -> None:
    old, new, answer = Models(), Models(), put(client)
    zombie = Sleeper(source=old, client=client, timing=QUICK, name="zombie").start()
    try:
        old["why?"].say("old ")
        wait_for(lambda: answer.text == "old ")
        zombie.awake.clear()
        heir = pool(new, timing=QUICK)
        new["why?"].say("new ")
        wait_for(lambda: answer.text == "new ")
        if wakes == "when all is over":
            new["why?"].end()
            assert_queue_empty(client)
        old["why?"].say("older ")
        zombie.awake.set()
        wait_for(lambda: old["why?"].closed and not zombie._jobs)
        assert put(client, "next?", "b").id == "b"
        if wakes == "while its heir is writing":
            wait_for(lambda: heir.name in [row["consumer"] for row in pending(client)])
            new["why?"].say("text")
            new["why?"].end()
        answer.wait(60)
        assert answer.text == ("new text" if wakes == "while its heir is writing" else "new ")
        assert "older" not in json.dumps(client.xrange(names_of(client).answer("a").chunks))
        answered_by = old if old.asked("next?") else new
        wait_for(lambda: old.asked("next?") + new.asked("next?"))  # whoever it is, the pool goes on
        answered_by = old if old.asked("next?") else new
        answered_by["next?"].end()
        assert_queue_empty(client)
        assert failures(client) == [] and new.asked() == old.asked() == 1
    finally:
        zombie.awake.set()
        zombie.stop(within=0)


@pytest.mark.parametrize("then", ["it ends", "it goes on"])
def test_who_wakes_up_just_before_the_takeover_is_not_displaced(client, monkeypatch, then: str) -> None:
    """Between its heir's look at the stream and the heir's first entry, it writes: the heir must look again."""
    put(client)
    sleeper = open_attempt(client, deliver(client), "half", timing=CALM)
    client.delete(sleeper.keys.lease(1))
    begin = Attempt._begin

    def at_the_last_moment(attempt: Attempt, pipe) -> None:
        monkeypatch.setattr(Attempt, "_begin", begin)
        sleeper.entries.append(("text", " and whole", 2))
        if then == "it ends":
            sleeper.entries.append(("end", json.dumps({"reason": "stop"}), 2))
        sleeper._ticked = 0.0  # with the batch goes its lease
        sleeper.flush()
        begin(attempt, pipe)

    monkeypatch.setattr(Attempt, "_begin", at_the_last_moment)
    if then == "it ends":
        close_answer(client, "a", QUICK)
        assert look("a", client).record["text"] == "half and whole"
    else:
        with pytest.raises(Fenced, match="alive"):
            close_answer(client, "a", QUICK)
    assert {entry.id.attempt for entry in stream_of(client)} == {1} and text_in(client) == "half and whole"


@pytest.mark.parametrize("when", ["while it is answered", "once it has ended"])
def test_a_question_that_stands_twice_is_answered_once(client, pool, no_waiting_to_judge, when: str) -> None:
    models, answer = Models(), put(client)
    if when == "while it is answered":
        client.xadd(names_of(client).questions, {"answer": "a"})
    workers_ = [pool(models, timing=CALM) for _ in range(2)]
    models["why?"].say("so ")
    wait_for(lambda: answer.text == "so ")
    if when == "while it is answered":
        wait_for(lambda: len(queue(client)) == 1)  # the other entry is dropped
    models["why?"].say("it is")
    models["why?"].end()
    assert answer.wait(60).text == "so it is"
    if when == "once it has ended":
        client.xadd(names_of(client).questions, {"answer": "a"})
    assert_queue_empty(client)
    assert {e.id.attempt for e in stream_of(client)} == {1} and failures(client) == []
    assert all(worker.error is None for worker in workers_)


@pytest.mark.slow
def test_consumers_that_are_long_gone_are_forgotten(client, pool) -> None:
    name, brief = names_of(client).questions, replace(QUICK, ttl=0.05)
    client.xgroup_create(name, POOL, "0", mkstream=True)
    for consumer in ("gone", "holder"):
        client.xgroup_createconsumer(name, POOL, consumer)
    client.xadd(name, {"answer": "nosuch"})
    client.xreadgroup(POOL, "holder", {name: ">"})
    idle = lambda: min(consumer["idle"] for consumer in client.xinfo_consumers(name, POOL))  # noqa: E731
    wait_for(lambda: idle() > 60)
    worker = pool(timing=brief)
    wait_for(lambda: set(consumers(client)) == {worker.name, "holder"})
    assert_queue_empty(client)  # and what it held is seen to


@pytest.mark.slow
def test_odd_bytes_in_the_name_of_a_dead_worker_do_no_harm(client, pool) -> None:
    put(client)
    raw = redis.Redis.from_url(environment_of(client)["REDIS_URL"], protocol=2)
    raw.xgroup_create(names_of(client).questions, POOL, "0")
    raw.xreadgroup(POOL, b"\xff\xfe\x1b[31m", {names_of(client).questions: ">"})
    raw.close()
    worker = pool(timing=QUICK)
    assert Answer("a", client=client, timing=QUICK).wait(60).text == "so why?"
    assert_queue_empty(client)
    assert worker.error is None


# ----------------------------------------------------------------------------------------------------- bad input


def entry_without_answer(client) -> None:
    client.xadd(names_of(client).questions, {"question": "why?"})


def hostile_id(client) -> None:
    client.xadd(names_of(client).questions, {"answer": "../{x}*\n\x1b[31m"})


def no_record(client) -> None:
    client.xadd(names_of(client).questions, {"answer": "a"})


def with_record(text: str):
    def write(client) -> None:
        client.set(names_of(client).answer("a").question, text)
        no_record(client)

    return write


def record_of_another_type(client) -> None:
    client.rpush(names_of(client).answer("a").question, "x")
    no_record(client)


def chunks_of_another_type(client) -> None:
    put(client)
    client.set(names_of(client).answer("a").chunks, "x")


def chunks_of_something_else(client) -> None:
    put(client)
    client.xadd(names_of(client).answer("a").chunks, {"questionId": "a"}, id="1-0")


GOOD = {"id": "a", "question": "why?", "topic": "", "source": "scripted", "model": "", "asked": 1.0, "pooled": True}
BAD_INPUT = {  # what stands in the queue: the row of failures, and what a viewer is told
    "no answer": (entry_without_answer, "NotAQuestion", "missing"),
    "hostile id": (hostile_id, "NotAQuestion", "missing"),
    "no record": (no_record, None, "missing"),
    "no JSON": (with_record("so"), "NotAQuestion", "failed"),
    "a JSON list": (with_record("[1]"), "NotAQuestion", "failed"),
    "foreign JSON": (with_record('{"reason": 5}'), "NotAQuestion", None),
    "no question": (with_record(json.dumps(GOOD | {"question": None})), "NotAQuestion", "failed"),
    "empty question": (with_record(json.dumps(GOOD | {"question": " "})), "BadQuestion", "failed"),
    "endless question": (with_record(json.dumps(GOOD | {"question": "x" * 100_000})), "BadQuestion", "failed"),
    "odd source": (with_record(json.dumps(GOOD | {"source": 7})), "NotAQuestion", "failed"),
    "deep JSON": (with_record("[" * 100_000), "NotAQuestion", "failed"),
    "record of another type": (record_of_another_type, "NotAQuestion", None),
    "chunks of another type": (chunks_of_another_type, "RedisUnusable", None),
    "chunks of something else": (chunks_of_something_else, "NotAnAnswer", None),
}


@pytest.mark.parametrize("what", BAD_INPUT)
def test_what_is_no_question_leaves_the_queue_and_the_pool_goes_on(client, pool, what: str) -> None:
    write, error, status = BAD_INPUT[what]
    write(client)
    worker = pool(slots=1)
    assert put(client, answer_id="good").wait(60).text == "so why?"
    assert_queue_empty(client)
    assert [row["error"] for row in failures(client)] == ([error] if error else [])
    for row in failures(client):
        assert len(row["message"]) > 20 and "Traceback" not in row["message"]
        assert row["worker"] == worker.name and len(row["answer"]) <= 64
    if status:
        assert look("a", client).status == status
    wait_for(lambda: worker._jobs == {})  # it drops the job after it has acknowledged the entry
    assert worker.error is None


@pytest.mark.parametrize("what", ["hostile id", "no record", "record of another type", "chunks of another type"])
def test_what_is_no_question_leaves_the_queue_also_when_it_is_taken_over(
    client, pool, no_waiting_to_judge, what: str
) -> None:
    write, error, _ = BAD_INPUT[what]
    write(client)
    deliver(client)
    worker = pool(timing=QUICK)
    assert_queue_empty(client)
    assert [row["error"] for row in failures(client)] == ([error] if error else [])
    assert worker.error is None


@pytest.mark.parametrize(
    ("source", "error"), [("openai", "NoAPIKey"), ("local", "LocalModelMissing"), ("nosuch", "UnknownSource")]
)
def test_a_source_that_the_worker_has_not_is_an_answer_that_failed(client, pool, monkeypatch, source, error) -> None:
    monkeypatch.setattr(local, "installed", lambda: False)
    monkeypatch.setattr(llm, "_settings", dict)
    monkeypatch.setattr(queues, "check_source", lambda name: name)
    monkeypatch.delenv("LLMSTREAM_LOCAL_URL", raising=False)
    worker = pool(None)
    answer = ended(enqueue("why?", source=source, client=client, timing=FAST))
    assert answer.status == "failed" and answer.record["error"] == error and len(answer.record["message"]) > 20
    assert enqueue("?", source="scripted", model="scripted:pace=0", client=client).wait(60).status == "ended"
    assert_queue_empty(client)
    assert failures(client) == [] and worker.error is None  # the answer itself tells


def breaks_at_once(question: str, topic: str | None) -> Iterable[str]:
    raise RuntimeError("the wheel came off")


def breaks_later(question: str, topic: str | None) -> Iterable[str]:
    yield "so far "
    raise RuntimeError("the wheel came off")


@pytest.mark.parametrize("source", [breaks_at_once, breaks_later, lambda question, topic: 5, lambda: "too few"])
def test_a_source_that_breaks_is_an_answer_that_failed(client, pool, source) -> None:
    worker = pool(source)
    for answer_id in "ab":
        answer = ended(put(client, answer_id=answer_id))
        assert answer.status == "failed" and answer.record["message"]
        assert answer.text == ("so far " if source is breaks_later else "")
        assert answer.record["error"] in ("RuntimeError", "TypeError")
    assert_queue_empty(client)
    assert worker.error is None


def test_a_queue_of_another_type_is_told(client) -> None:
    client.set(names_of(client).questions, "x")
    with pytest.raises(RedisUnusable, match="type"):
        Worker(client=client, timing=FAST).run()
    worker = Worker(client=client, timing=FAST).start()
    wait_for(lambda: worker.error)
    assert isinstance(worker.error, RedisUnusable)
    with pytest.raises(RedisUnusable, match="type"):
        put(client)
    assert look("a", client).status == "missing"  # nothing is left of it
    assert client.get(names_of(client).questions) == "x"


def test_a_question_that_breaks_a_round_is_given_up_and_the_others_are_answered(
    client, pool, monkeypatch, caplog
) -> None:
    def picky(job, *args):
        if job.answer_id == "bad":
            raise ZeroDivisionError
        return read_question(job, *args)

    monkeypatch.setattr("llmstream_nb.pool.worker.read_question", picky)
    enqueue("?", id="bad", client=client, timing=FAST)
    good = [enqueue("?", id=f"good{n}", client=client, timing=FAST) for n in range(3)]
    worker = pool(source=lambda *_: ["Yes."], timing=replace(FAST, lease=0.3))
    for answer in good:
        assert answer.wait(60).text == "Yes."
    assert worker.error is None and "ZeroDivisionError in a round; it goes on" in caplog.text


def test_a_worker_that_breaks_down_says_so(client, pool, monkeypatch, caplog) -> None:
    """By its class alone: what an unexpected error says may hold a secret."""

    def broken(self) -> None:
        raise ZeroDivisionError("redis://:hunter2@127.0.0.1")

    monkeypatch.setattr(Worker, "_take_over", broken)
    monkeypatch.setattr(Worker, "_wait_to_judge", lambda self: None)
    worker = pool(name="mule", timing=replace(FAST, give_up=0.3))
    wait_for(lambda: not worker._thread.is_alive())
    assert "ZeroDivisionError" in str(worker.error) and isinstance(worker.error.__cause__, ZeroDivisionError)
    assert "mule" in caplog.text and "ZeroDivisionError" in caplog.text and "hunter2" not in caplog.text


def test_a_queue_that_changes_its_type_ends_a_worker_with_an_error(client, pool, caplog) -> None:
    worker = pool()
    wait_for(lambda: client.exists(names_of(client).questions))
    client.delete(names_of(client).questions)
    client.set(names_of(client).questions, "x")
    wait_for(lambda: worker.error)
    assert isinstance(worker.error, RedisUnusable)
    wait_for(lambda: "RedisUnusable" in caplog.text)


def test_a_list_of_failures_of_another_type_ends_a_worker_with_an_error(client, pool) -> None:
    client.set(names_of(client).failures, "x")
    hostile_id(client)
    worker = pool()
    wait_for(lambda: worker.error)
    assert isinstance(worker.error, RedisUnusable) and len(queue(client)) == 1  # it is not lost


@pytest.mark.slow
def test_a_foreign_entry_in_a_stream_that_another_has_taken_over_does_no_harm(client, pool) -> None:
    """The answer is another producer's now, and its beginning is trimmed: nobody can say for which entry it is."""
    models = Models()
    put(client)
    worker = pool(models, timing=QUICK)
    models["why?"].say("ours ")
    wait_for(lambda: text_in(client) == "ours ")
    keys = names_of(client).answer("a")
    client.xadd(keys.chunks, {"kind": "text", "text": "theirs", "ms": 1}, id="7-3")
    client.set(keys.lease(7), "x", px=600)
    models["why?"].say("more")
    wait_for(lambda: not worker._jobs)
    assert put(client, "next?", "b").id == "b"
    models["next?"].end()
    assert Answer("b", client=client, timing=FAST).wait(60).status == "ended"
    models["why?"].end()
    wait_for(lambda: worker.error or models.asked() == 2)
    models["why?"].end()
    assert_queue_empty(client)
    assert worker.error is None


def test_bad_arguments_are_refused_before_anything_is_written(client) -> None:
    for question in ("", " \n", "x" * 100_000, None):
        with pytest.raises(BadQuestion):
            enqueue(question, client=client)
    with pytest.raises(BadAnswerId):
        enqueue("?", id="{a}", client=client)
    for source in ("nosuch", parrot):
        with pytest.raises(ModelError):
            enqueue("?", source=source, client=client)
    assert client.zcard(names_of(client).answers) == 0 and not client.exists(names_of(client).questions)
    put(client)
    with pytest.raises(AnswerExists):
        put(client, "another?")
    assert len(queue(client)) == 1
    for name in ("x" * 201, "\ud83d"):
        with pytest.raises(BadName):
            Worker(name=name, client=client)
    for slots in (0, -1):
        with pytest.raises(ValueError, match="slot"):
            Worker(slots=slots, client=client)


def test_an_odd_name_is_a_name(client, pool) -> None:
    worker = pool(name="two\nlines 🦊 \x1b[31m")
    put(client).wait(60)
    assert stream_of(client)[0].data["worker"] == worker.name == "two\nlines 🦊 \x1b[31m"
    assert_queue_empty(client)


# ------------------------------------------------------------------------------------- a bad network, redis-server


@pytest.fixture
def network(shared) -> Iterator[SimpleNamespace]:
    """A redis-server, seen directly and through a proxy."""
    server, prefix = shared, f"t{uuid.uuid4().hex[:8]}"
    with Proxy("127.0.0.1", server.port) as proxy:
        direct = connect(server.url, prefix=prefix)
        client = connect(proxy.url, prefix=prefix, socket_timeout=1)
        yield SimpleNamespace(proxy=proxy, direct=direct, client=client)
        proxy.heal()
        direct.close()
        client.close()


@pytest.fixture
def remote(network) -> Iterator:
    """Starts workers behind the proxy."""
    started: list[Worker] = []

    def start(source=parrot, timing=QUICK, **options) -> Worker:
        started.append(Worker(source=source, client=network.client, timing=timing, **options).start())
        return started[-1]

    yield start
    for worker in started:
        worker.stop(within=0)
    wait_for(lambda: not threads_of_the_kit())


def test_a_lost_reply_to_enqueue_leaves_one_answer_and_an_empty_queue(network, remote) -> None:
    models = Models()
    network.proxy.drop_reply(when=b"XADD")
    answer = put(network.client)
    network.proxy.wait_dropped()
    assert len(queue(network.direct)) == 2
    remote(models)
    models["why?"].say("so")
    wait_for(lambda: answer.text == "so")
    models["why?"].end()
    assert_queue_empty(network.direct)
    assert models.asked() == 1 and {e.id.attempt for e in stream_of(network.direct)} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("command", [b"XREADGROUP", b"XACK", b"XINFO", b"XPENDING", b"CREATE"])
def test_a_lost_reply_to_a_worker_loses_no_question(network, remote, command: bytes) -> None:
    network.proxy.drop_reply(when=command)
    put(network.direct)
    worker = remote()
    network.proxy.wait_dropped()
    assert Answer("a", client=network.direct, timing=QUICK).wait(60).text == "so why?"
    assert_queue_empty(network.direct)
    assert_whole(network.direct, ["so ", "why?"])  # the first attempt
    assert failures(network.direct) == [] and worker.error is None


@pytest.mark.slow
@pytest.mark.parametrize("command", [b"XCLAIM", b"XPENDING", b"XRANGE"])
def test_a_lost_reply_in_a_takeover_loses_no_question(network, remote, command: bytes) -> None:
    answer = put(network.direct)
    end_lease(network.direct, open_attempt(network.direct, deliver(network.direct), "half"))
    network.proxy.drop_reply(when=command)
    worker = remote()
    assert answer.wait(60).text == "so why?"
    network.proxy.wait_dropped()
    assert_queue_empty(network.direct)
    assert failures(network.direct) == [] and worker.error is None


@pytest.mark.slow
def test_a_lost_reply_when_a_question_is_given_up_leaves_it_failed_and_told(network, remote) -> None:
    answer = put(network.direct)
    end_lease(network.direct, open_attempt(network.direct, deliver(network.direct, times=9), "half"))
    network.proxy.drop_reply(when=b"LPUSH")
    worker = remote()
    network.proxy.wait_dropped()
    assert_queue_empty(network.direct)
    assert (answer.status, answer.text, answer.record["error"]) == ("failed", "half", "GivenUp")
    assert {row["error"] for row in failures(network.direct)} == {"GivenUp"}
    assert len({row["entry"] for row in failures(network.direct)}) == 1  # the same row may stand there twice
    assert worker.error is None


@pytest.mark.slow
def test_an_answer_that_can_not_be_closed_for_a_moment_is_closed_later(network, remote) -> None:
    """It is not taken for something that never can be, and forgotten while its viewer waits."""
    answer = put(network.direct)
    end_lease(network.direct, open_attempt(network.direct, deliver(network.direct, times=9), "half"))
    network.proxy.drop_request(n=5, when=rb"XREAD\r\n")  # a look at the answer, and its retries
    remote()
    assert_queue_empty(network.direct)
    assert (answer.status, answer.text, len(failures(network.direct))) == ("failed", "half", 1)


def test_a_short_outage_changes_nothing(network, remote) -> None:
    """Longer than the lease, so that all leases have run out when Redis is back."""
    models, answer = Models(), put(network.direct)
    workers_ = [remote(models, timing=FAST) for _ in range(3)]
    models["why?"].say("one ")
    wait_for(lambda: answer.text == "one ")
    network.proxy.refuse()
    network.proxy.cut()
    wait_for(lambda: not network.direct.exists(names_of(network.direct).answer("a").lease(1)))
    wait_for(lambda: pending(network.direct)[0]["time_since_delivered"] > 1000 * FAST.lease)
    network.proxy.heal()
    models["why?"].say("two")
    wait_for(lambda: answer.text == "one two")
    models["why?"].end()
    assert_queue_empty(network.direct)
    assert models.asked() == 1 and {e.id.attempt for e in stream_of(network.direct)} == {1}
    assert all(worker.error is None for worker in workers_)


@pytest.mark.slow
def test_a_redis_that_stays_away_ends_a_worker_with_an_error(network, remote) -> None:
    models, answer = Models(), put(network.direct)
    worker = remote(models, timing=replace(QUICK, give_up=0.5))
    models["why?"].say("half")
    wait_for(lambda: answer.text == "half")
    network.proxy.refuse()
    network.proxy.cut()
    wait_for(lambda: worker.error)
    assert isinstance(worker.error, RedisUnusable) and "can't be reached" in str(worker.error)
    wait_for(lambda: models["why?"].closed and not threads_of_the_kit())
    network.proxy.heal()
    remote()  # a later one takes the question over
    assert answer.wait(60).text == "so why?"


def test_a_worker_ends_in_time_while_redis_is_away(network, remote) -> None:
    models, answer = Models(), put(network.direct)
    worker = remote(models, timing=replace(QUICK, give_up=60.0))
    models["why?"].say("half")
    wait_for(lambda: answer.text == "half")
    network.proxy.refuse()
    network.proxy.cut()
    worker.finish(within=0)
    wait_for(lambda: not worker._thread.is_alive())
    network.proxy.heal()
    assert worker.error is None


# -------------------------------------------------------------------------------------------------- command line

posix = pytest.mark.skipif(os.name == "nt", reason="a process there can't be asked to end, only ended")
HEAVY = re.compile(r"^import time:.*\| +(fakeredis|pandas|ipywidgets|anywidget|matplotlib|IPython)$", re.MULTILINE)


@pytest.fixture
def redis_client(real_servers) -> Iterator[redis.Redis]:
    made = connect(real_servers["redis-server"].url, prefix=f"t{uuid.uuid4().hex[:8]}")
    yield made
    made.close()


@pytest.fixture
def command(redis_client, tmp_path) -> Iterator:
    """Starts commands of the kit; what they say on standard error goes into a file."""
    started: list[subprocess.Popen] = []

    def start(*arguments: str, options: tuple[str, ...] = (), **changes: str) -> subprocess.Popen:
        environment = os.environ | environment_of(redis_client) | {"LLMSTREAM_NO_VENV": "1"} | changes
        with (tmp_path / "said").open("ab") as said:
            started.append(
                subprocess.Popen(
                    [sys.executable, *options, "-m", "llmstream_nb", *arguments],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=said,
                )
            )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@posix
def test_the_command_answers_stays_small_and_finishes_when_told_to_end(redis_client, command, tmp_path) -> None:
    worker = command("worker", "--name", "mule", "--slots", "1", options=("-X", "importtime"))
    for _ in range(3):
        whole = enqueue("What is a Redis stream?", source="scripted", model="scripted:pace=0", client=redis_client)
        assert whole.wait(60).status == "ended"
    asked = command("ask", "What is a Redis stream?", "--pool", "--source", "scripted", "--model", "scripted:pace=0")
    assert asked.communicate(timeout=60)[0].decode().strip() == whole.text and asked.returncode == 0

    slow = enqueue("count", source="scripted", model="scripted:long=30,pace=40", client=redis_client)
    wait_for(lambda: slow.text)
    worker.send_signal(signal.SIGTERM)
    late = enqueue("why?", source="scripted", client=redis_client)
    assert worker.wait(60) == 0
    assert slow.status == "ended" and slow.text == "".join(f"{n} " for n in range(30))
    assert late.status == "queued" and len(queue(redis_client)) == 1 and consumers(redis_client) == []
    said = (tmp_path / "said").read_text()
    assert "mule answers questions from redis://127.0.0.1" in said and "Traceback" not in said
    assert "openai" in said and not HEAVY.search(said)  # what it imported


@posix
def test_told_twice_the_command_hands_back_and_ends(redis_client, command) -> None:
    worker = command("worker", "--name", "mule", "--within", "600")
    answer = enqueue("?", source="scripted", model="scripted:stall=3", client=redis_client)
    wait_for(lambda: answer.text)
    worker.send_signal(signal.SIGINT)
    worker.send_signal(signal.SIGTERM)  # another one, as two of a kind may be taken for one
    assert worker.wait(60) == 0
    assert answer.status == "interrupted"  # and not for a lease more
    [row] = pending(redis_client)
    assert row["times_delivered"] == 0 and row["time_since_delivered"] >= 5000  # free to be taken


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fake", "redis-server"])
def test_a_worker_in_a_process_of_its_own_ends_with_its_parent(client) -> None:
    process = start_process("mule", slots=2, lease=1.0, client=client)
    try:
        for _ in range(2):
            answer = enqueue("?", source="scripted", model="scripted:long=5,pace=0", client=client, timing=FAST)
            assert ended(answer).text == "0 1 2 3 4 "
        assert stream_of(client, answer.id)[0].data["worker"] == "mule"
        process.stdin.close()  # as the system does when this process is gone
        assert process.wait(60) == 0
        assert consumers(client) == []
    finally:
        process.kill()
        process.wait()


@posix
def test_a_worker_that_is_started_again_takes_the_place_of_the_first(redis_client) -> None:
    first = start_process("mule", lease=1, client=redis_client)
    try:
        answer = enqueue("?", source="scripted", model="scripted:stall=3", client=redis_client)
        wait_for(lambda: answer.text)
        second = start_process("mule", lease=1, client=redis_client)
        assert first.poll() == 0, "it was killed, and has not handed back its question"
        assert answer.status == "interrupted"
        wait_for(lambda: stream_of(redis_client, answer.id)[-1].id.attempt == 2)
        second.send_signal(signal.SIGSTOP)
        third = start_process("mule", lease=1, client=redis_client)
        assert second.poll() == -signal.SIGKILL and third.poll() is None
        assert os.getpgid(0) != os.getpgid(third.pid), "Jupyter interrupts the group of its kernel"
    finally:
        for process in (first, second, third):
            process.kill()
            process.wait()


def test_a_worker_needs_little_memory(redis_client) -> None:
    process = start_process("mule", client=redis_client)
    try:
        for _ in range(5):
            answer = enqueue("?", source="scripted", model="scripted:long=200,pace=0", client=redis_client)
            assert answer.wait(60).status == "ended"
        try:
            used = psutil.Process(process.pid).memory_full_info().uss
        except (psutil.AccessDenied, AttributeError):
            pytest.skip("this system does not tell how much memory is a process's own")
        assert used < 60e6
    finally:
        process.kill()
        process.communicate()


def test_without_a_queue_the_command_says_what_to_do(monkeypatch, capsys) -> None:
    monkeypatch.setenv("LLMSTREAM_NO_VENV", "1")
    monkeypatch.setattr(cli, "shared", dict)
    assert cli.main(["worker"]) == 2
    said = capsys.readouterr().err
    assert "REDIS_URL" in said and "lab" in said and said.count("\n") == 1


def test_a_redis_that_is_not_there_is_told_by_the_command(command, tmp_path) -> None:
    worker = command("worker", REDIS_URL="redis://:hunter2@127.0.0.1:9/0")
    assert worker.wait(60) == 1
    said = (tmp_path / "said").read_text()
    assert "can't be reached" in said and said.count("\n") == 1 and "hunter2" not in said


@pytest.mark.parametrize("wrong", [("--slots", "0"), ("--slots", "-1"), ("--slots", "two"), ("--slots", "1.5"),
                                   ("--lease", "0"), ("--lease", "nan"), ("--within", "soon")])  # fmt: skip
def test_bad_options_are_refused(wrong: tuple[str, str], capsys) -> None:
    with pytest.raises(SystemExit) as ending:
        cli.main(["worker", *wrong])
    assert ending.value.code == 2 and wrong[0] in capsys.readouterr().err
