"""Monitor without a browser: what it tells of the queue and the answers, when it is silent, what it survives."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from llmstream_nb import AnswerView, Monitor
from llmstream_nb.answers import connection
from llmstream_nb.answers.ask import clear, stop_answer
from llmstream_nb.answers.connection import names_of
from llmstream_nb.faults import servers
from llmstream_nb.pool.process import start_process
from llmstream_nb.pool.queue import enqueue as ask_pool
from llmstream_nb.pool.worker import Worker
from llmstream_nb.protocol.follow import Follower
from llmstream_nb.protocol.wire import DAY, POOL
from llmstream_nb.widgets import monitor, survey
from llmstream_nb.widgets.live import hub

from .conftest import FAST
from .model import Model, start, wait_for
from .test_widgets import LOG, add, lease, recorded, settled, threads  # noqa: F401 - recorded is a fixture


@pytest.fixture(autouse=True)
def often(monkeypatch) -> None:
    """Sample often, and judge consumers soon."""
    monkeypatch.setattr(monitor, "EVERY", 0.05)
    monkeypatch.setattr(survey, "QUIET", 0.4)
    monkeypatch.setattr(survey, "WINDOW", 0.2)


@pytest.fixture
def samples(monkeypatch) -> list[tuple[survey.Survey, dict[str, Any]]]:
    """Every sample taken, and by which survey."""
    taken: list[tuple[survey.Survey, dict[str, Any]]] = []
    sample = survey.Survey.sample

    def noted(self: survey.Survey, *arguments: Any) -> dict[str, Any]:
        taken.append((self, sample(self, *arguments)))
        return taken[-1][1]

    monkeypatch.setattr(survey.Survey, "sample", noted)
    return taken


def index(client: redis.Redis, answer_id: str, asked: float, **record: Any) -> None:
    """Ask, without anybody who answers."""
    record = {"id": answer_id, "question": "?", "asked": asked} | record
    client.set(names_of(client).answer(answer_id).question, json.dumps(record))
    client.zadd(names_of(client).answers, {answer_id: asked})


class Page(types.SimpleNamespace):
    """What a page shows that has got all messages of a monitor so far: its state in the kernel is a moment ahead."""

    def __init__(self, watching: Monitor) -> None:
        super().__init__(consumers=[], answers=[], failures=None)
        for _, comm_id, data in list(LOG):
            if comm_id == watching.model_id:
                vars(self).update(data.get("state", {}))


def rows(watching: Monitor | Page) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in watching.answers}


def pool_of(watching: Monitor | Page) -> dict[str, str]:
    return {row["name"]: row["state"] for row in watching.consumers}


def states(watching: Monitor | Page) -> dict[str, str]:
    return {row["id"]: row["state"] for row in watching.answers}


def enqueue(client: redis.Redis, *answer_ids: str) -> None:
    for answer_id in answer_ids:
        client.xadd(names_of(client).questions, {"answer": answer_id})


def take(client: redis.Redis, consumer: str | bytes, count: int) -> None:
    client.xreadgroup(POOL, consumer, {names_of(client).questions: ">"}, count=count)


# ------------------------------------------------------------------------------------------ what it tells


def test_an_empty_prefix(client) -> None:
    watching = Monitor()
    wait_for(lambda: watching.now)  # what is set last
    assert (watching.waiting, watching.answering, watching.failures) == (0, 0, 0)
    assert (watching.consumers, watching.answers, watching.note) == ([], [], "")
    assert watching.prefix == names_of(client).prefix


def test_the_queue_its_workers_and_the_failures(client) -> None:
    names = names_of(client)
    enqueue(client, "a", "b", "c", "d")
    watching = Monitor()
    wait_for(lambda: watching.waiting == 4 and watching.now)
    assert (watching.answering, watching.consumers, watching.note) == (0, [], "")  # there is no group yet
    client.xgroup_create(names.questions, POOL, "0")
    take(client, "w2", 2)
    take(client, b"odd \xff\n<b>", 1)
    client.xgroup_createconsumer(names.questions, POOL, "w1")
    client.lpush(names.failures, "{}", "no JSON")
    wait_for(lambda: watching.failures == 2 and len(watching.consumers) == 3)
    assert (watching.waiting, watching.answering) == (1, 3)
    held = {consumer["name"]: consumer["pending"] for consumer in watching.consumers}
    assert list(held.items()) == [("odd \\xff\n<b>", 1), ("w1", 0), ("w2", 2)]
    entry_id = client.xrange(names.questions)[0][0]
    client.xack(names.questions, POOL, entry_id)
    client.xdel(names.questions, entry_id)
    wait_for(lambda: (watching.waiting, watching.answering) == (1, 2))  # a sample may fall between the two commands


@pytest.mark.slow
def test_a_consumer_without_a_sign_of_life_is_judged_by_its_idle_time(client) -> None:
    """One of a group of one's own, or a worker that knows nothing of signs: who can tell whether it is gone?"""
    queue = names_of(client).questions
    enqueue(client, "a")
    client.xgroup_create(queue, POOL, "0")
    took = time.time()
    take(client, "w", 1)
    client.xgroup_createconsumer(queue, POOL, "idle")
    client.rpush(names_of(client).worker("idle"), "no sign of life")
    watching = Monitor()
    wait_for(lambda: [row["state"] for row in watching.consumers] == ["quiet", "quiet"])
    assert all(abs(row["since"] - took) < 2 for row in watching.consumers)
    client.xclaim(queue, POOL, "w", 0, [client.xrange(queue)[0][0]], justid=True)
    wait_for(lambda: watching.consumers[1] == {"name": "w", "pending": 1, "state": "busy", "since": None})


@pytest.fixture
def processes(client) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts workers in processes of their own, which can be killed."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(name: str, lease: float = 1.0) -> subprocess.Popen[bytes]:
        started.append(start_process(name, lease=lease, client=client))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_killed_worker_is_silent_then_gone_and_never_idle_again(client, processes, monkeypatch) -> None:
    watching = Monitor()
    workers: dict[str, subprocess.Popen[bytes]] = {}
    for name in ("w1", "w2", "w3"):
        workers[name] = processes(name)
        wait_for(lambda: pool_of(Page(watching)) == dict.fromkeys(workers, "idle"))  # it has not taken a question yet
    killed = time.time()
    workers["w2"].kill()
    LOG.clear()
    wait_for(lambda: pool_of(Page(watching)).get("w2") == "gone")
    told = [row for *_, data in LOG for row in data["state"].get("consumers", ()) if row["name"] == "w2"]
    assert list(dict.fromkeys(row["state"] for row in told)) == ["silent", "gone"]
    assert all(abs(row["since"] - killed) < 1 for row in told)
    later = Monitor()  # somebody who sees it for the first time is told no less
    wait_for(lambda: later.consumers)
    assert pool_of(later)["w2"] == "gone"
    wait_for(lambda: pool_of(later) == {"w1": "idle", "w2": "gone", "w3": "idle"})
    monkeypatch.setattr(survey, "LISTED", 0.5)
    wait_for(lambda: pool_of(watching) == {"w1": "idle", "w3": "idle"})
    assert {each["name"] for each in client.xinfo_consumers(names_of(client).questions, POOL)} == set(workers)
    processes("w2")  # another one of this name
    wait_for(lambda: pool_of(watching) == dict.fromkeys(workers, "idle"))


@pytest.mark.slow
def test_a_paused_worker_is_silent_then_gone_then_back(client, processes) -> None:
    watching, paused = Monitor(), processes("w1")
    wait_for(lambda: pool_of(Page(watching)) == {"w1": "idle"})
    LOG.clear()
    paused.send_signal(signal.SIGSTOP)
    wait_for(lambda: pool_of(watching) == {"w1": "gone"})
    paused.send_signal(signal.SIGCONT)
    wait_for(lambda: pool_of(Page(watching)) == {"w1": "idle"})
    told = [row["state"] for *_, data in LOG for row in data["state"].get("consumers", ())]
    assert list(dict.fromkeys(told)) == ["silent", "gone", "idle"]


@pytest.mark.slow
def test_a_worker_that_holds_a_question_is_listed_for_as_long_as_it_does(client, processes, monkeypatch) -> None:
    monkeypatch.setattr(survey, "LISTED", 0.0)
    enqueued = ask_pool("?", source="scripted", model="scripted:stall=1", client=client)
    watching, killed = Monitor(), processes("w1")
    wait_for(lambda: pool_of(watching) == {"w1": "busy"})
    wait_for(lambda: enqueued.text)
    killed.kill()
    wait_for(lambda: pool_of(watching) == {"w1": "gone"})
    worker = Worker(name="w2", source=lambda *_: ["so"], client=client, timing=FAST).start()
    assert enqueued.wait(60).text == "so"
    wait_for(lambda: pool_of(watching) == {"w2": "idle"})
    worker.stop()
    wait_for(lambda: pool_of(watching) == {})


def sign(client: redis.Redis, name: str, ago: float, lease: float = 1.0) -> None:
    """Leave what a worker leaves that gave its last sign of life so many seconds ago."""
    names = names_of(client)
    client.xgroup_createconsumer(names.questions, POOL, name)
    client.set(names.worker(name), round(1000 * lease), px=round(1000 * (lease + DAY - ago)))


def signs_until(client: redis.Redis, condition: Callable[[], bool]) -> None:
    """The worker `alive` gives signs of life until this is true, and at that moment."""

    def signed() -> bool:
        sign(client, "alive", ago=0)
        return condition()

    wait_for(signed)


@pytest.mark.slow
def test_every_state_in_the_words_of_the_answer_view(client) -> None:
    now = time.time()
    index(client, "queued", now - 7, pooled=True, question="When?")
    index(client, "streaming", now - 6, question="Why?")
    lease(client, answer_id="streaming")
    add(client, "1-0", "start", '{"worker": "w1"}', "streaming")
    add(client, "1-1", "text", "so", "streaming")
    index(client, "ended", now - 5)
    add(client, "1-0", "start", '{"worker": "w2"}', "ended")
    add(client, "1-3", "end", '{"reason": "stop", "chunks": 2}', "ended")
    index(client, "failed", now - 4)
    add(client, "1-0", "start", "{}", "failed")
    add(client, "1-1", "error", '{"error": "E", "message": "it <i>broke</i>"}', "failed")
    index(client, "stopped", now - 3)
    for seq, kind in enumerate(("start", "text", "text")):
        add(client, f"2-{seq}", kind, '{"worker": "w3"}' if kind == "start" else "x", "stopped")
    stop_answer("stopped", client=client, timing=FAST)
    index(client, "interrupted", now - 2)
    add(client, "1-0", "start", "{}", "interrupted")
    client.zadd(names_of(client).answers, {"gone": now - 1})
    index(client, "by-record", now, reason="stop", start="2-0", end="2-9", chunks=8, text="…")
    watching = Monitor()
    wait_for(lambda: states(watching).get("interrupted") == "interrupted" and states(watching)["gone"] == "missing")
    wait_for(lambda: rows(watching)["stopped"]["worker"])
    found = rows(watching)
    assert list(found) == [*("by-record", "gone", "interrupted", "stopped", "failed", "ended", "streaming", "queued")]
    view = AnswerView("ended")
    settled(view)
    assert found["ended"]["label"] == view.label == "Complete"
    assert found["queued"] | {"asked": 0} == {
        "id": "queued", "question": "When?", "state": "waiting", "label": "Waiting", "note": "", "attempt": 1, "first": 1,
        "worker": "", "chunks": 0, "rate": None, "asked": 0,
    }  # fmt: skip
    columns = ("state", "attempt", "worker", "chunks")
    told = {name: tuple(row[column] for column in columns) for name, row in found.items()}
    assert told["streaming"] == ("streaming", 1, "w1", 1)
    assert told["ended"] == ("ended", 1, "w2", 2)
    assert told["stopped"] == ("stopped", 2, "w3", 2)  # by an entry 3-0, which is no attempt at an answer
    assert told["by-record"] == ("ended", 2, "", 8)
    assert (told["failed"][0], found["failed"]["note"]) == ("failed", "it <i>broke</i>")
    assert abs(found["queued"]["asked"] - (now - 7)) < 0.01


def test_an_ended_answer_is_complete_at_first_sight(client, samples) -> None:
    start(client, Model("x", end=True), FAST).done.wait(60)
    Monitor()
    wait_for(lambda: samples)
    assert [row["state"] for row in samples[0][1]["answers"]] == ["ended"]


@pytest.mark.slow
def test_chunks_rate_and_a_takeover(client) -> None:
    index(client, "a", time.time(), pooled=True)
    lease(client)
    watching = Monitor()
    wait_for(lambda: states(watching) == {"a": "waiting"})
    add(client, "1-0", "start", '{"worker": "w1"}')
    for seq in range(1, 30):
        add(client, f"1-{seq}", "text", "x")
    wait_for(lambda: rows(watching)["a"]["chunks"] == 29)
    wait_for(lambda: rows(watching)["a"]["rate"] == 0)  # none of late
    LOG.clear()
    add(client, "1-30", "text", "x")
    wait_for(lambda: any(row["rate"] for *_, data in list(LOG) for row in data["state"].get("answers", ())))
    client.delete(names_of(client).answer("a").lease(1))
    wait_for(lambda: states(watching) == {"a": "interrupted"})
    lease(client, attempt=2)
    add(client, "2-0", "start", '{"worker": "w2"}')
    wait_for(lambda: rows(watching)["a"]["worker"] == "w2")
    assert (rows(watching)["a"]["attempt"], rows(watching)["a"]["chunks"]) == (2, 0)
    add(client, "2-1", "text", "y")
    add(client, "2-2", "end", '{"reason": "stop"}')
    wait_for(lambda: states(watching) == {"a": "ended"})
    assert (rows(watching)["a"]["attempt"], rows(watching)["a"]["chunks"]) == (2, 1)


@pytest.mark.slow
def test_asked_again_under_the_same_id(client) -> None:
    watching = Monitor()
    start(client, Model("one", end=True), FAST, question="first?").done.wait(60)
    wait_for(lambda: states(watching) == {"a": "ended"})
    clear("a", client=client)
    producer = start(client, Model("one", "two"), FAST, question="second?")
    wait_for(lambda: states(watching) == {"a": "streaming"})
    assert rows(watching)["a"]["question"] == "second?"
    assert rows(watching)["a"]["attempt"] == rows(watching)["a"]["first"] == 2, "that is no takeover"
    producer.stop()
    wait_for(lambda: states(watching) == {"a": "stopped"})
    clear("a", client=client)
    wait_for(lambda: not watching.answers)


def test_the_newest_answers_only(client) -> None:
    for n in range(8):
        index(client, f"a{n}", n, pooled=True)
    few, more = Monitor(limit=2), Monitor(limit=5)
    wait_for(lambda: few.answers and len(more.answers) == 5)
    assert list(rows(few)) == ["a7", "a6"]
    with pytest.raises(ValueError, match="at least 1"):
        Monitor(limit=0)


# ------------------------------------------------------------------------------------------ how much it sends


def busy_but_still(client: redis.Redis) -> None:
    """All that could make a careless monitor talk: ages, idle times, a silent producer, a dead one."""
    queue = names_of(client).questions
    enqueue(client, "streaming", "b")
    client.xgroup_create(queue, POOL, "0")
    take(client, "w", 1)
    client.xgroup_createconsumer(queue, POOL, "idle")
    sign(client, "gone", ago=9)
    sign(client, "silent", ago=0, lease=600)
    for name in ("streaming", "interrupted", "ended", "queued"):
        index(client, name, time.time(), pooled=True)
    lease(client, answer_id="streaming")
    for name in ("streaming", "interrupted", "ended"):
        add(client, "1-0", "start", "{}", name)
        add(client, "1-1", "text", "x", name)
    add(client, "1-2", "end", '{"reason": "stop"}', "ended")


def still(*watching: Monitor) -> None:
    late = {"gone": "gone", "idle": "quiet", "silent": "silent", "w": "quiet"}

    def at_rest(page: Page) -> bool:
        return (
            states(page).get("interrupted") == "interrupted"
            and pool_of(page) == late
            and rows(page)["streaming"]["rate"] == 0
        )

    wait_for(lambda: all(at_rest(Page(each)) for each in watching) and not any(each.unseen for each in watching))


@pytest.mark.slow
def test_nothing_is_sent_while_nothing_changes(client, samples, monkeypatch) -> None:
    late = itertools.cycle([0.0, 0.3])  # seconds that a reply may take
    clock = types.SimpleNamespace(time=lambda: time.time() + next(late), monotonic=time.monotonic)
    monkeypatch.setattr(survey, "time", clock)
    busy_but_still(client)
    watching = Monitor()
    still(watching)
    LOG.clear()
    seen = len(samples)
    wait_for(lambda: len(samples) > seen + 8)
    assert not LOG
    add(client, "1-2", "text", "y", "streaming")
    wait_for(lambda: rows(watching)["streaming"]["chunks"] == 2)
    wait_for(lambda: LOG)
    assert set(LOG[0][2]["state"]) == {"answers", "now"}  # only what is new


@pytest.mark.slow
def test_monitors_of_one_client_share_one_sample(client, samples) -> None:
    first, second = Monitor(), Monitor()
    busy_but_still(client)
    still(first, second)
    assert len({id(taker) for taker, _ in samples}) == 1
    LOG.clear()
    client.lpush(names_of(client).failures, "{}")
    wait_for(lambda: len(LOG) >= 2 and Page(first).failures == Page(second).failures == 1)
    assert [data["state"].keys() for *_, data in LOG] == [{"failures", "now"}] * 2


def test_what_has_ended_is_not_asked_again(client, samples, monkeypatch) -> None:
    for name in ("a", "b", "c"):
        start(client, Model("x", end=True), FAST, name).done.wait(60)
    watching = Monitor()
    wait_for(lambda: list(states(watching).values()) == ["ended"] * 3)
    watching.close()
    wait_for(lambda: "llmstream views" not in threads())
    sent: list[str] = []
    execute = redis.client.Pipeline.execute

    def noted(self: Any, **options: Any) -> Any:
        sent.extend(command[0][0] for command in self.command_stack)
        return execute(self, **options)

    line = connection.Line(client)
    monkeypatch.setattr(redis.client.Pipeline, "execute", noted)
    samples[-1][0].sample(line.redis, 20)
    assert sent == ["ZREVRANGE", "LLEN", "XLEN", "XINFO GROUPS", "XINFO CONSUMERS"]
    monkeypatch.undo()
    line.close()


def test_a_page_that_was_loaded_later_is_told_everything(client) -> None:
    index(client, "a", 1, pooled=True)
    watching = Monitor()
    wait_for(lambda: states(Page(watching)) == {"a": "waiting"} and not watching.unseen)
    LOG.clear()
    watching._handle_msg({"content": {"data": {"method": "custom", "content": {"want": "all"}}}, "buffers": []})
    wait_for(lambda: len(LOG) == 2)
    assert abs(LOG[0][2]["state"]["now"] - time.time()) < 60
    assert LOG[1][2]["state"]["answers"] == watching.answers


def test_it_is_watched_until_it_is_closed(client) -> None:
    watching = Monitor()
    wait_for(lambda: watching.waiting == 0)
    assert watching in hub._views
    watching.close()
    wait_for(lambda: "llmstream views" not in threads())


def test_a_view_is_read_as_fast_beside_a_monitor(client) -> None:
    model = Model("one ")
    start(client, model, FAST)
    watching, view = Monitor(), AnswerView("a")
    wait_for(lambda: view.text == "one " and states(watching) == {"a": "streaming"})
    model.say("two")
    model.end()
    settled(view)
    assert view.text == "one two"
    wait_for(lambda: states(watching) == {"a": "ended"})


def test_the_repr_is_the_same_at_every_run(client) -> None:
    watching = Monitor()
    assert (
        watching._repr_mimebundle_()[0]["text/plain"] == repr(watching) == "<Monitor: run the cell to see what goes on>"
    )


# ------------------------------------------------------------------------------------------ what it survives


def test_keys_of_the_wrong_type_are_said_and_may_become_right(client) -> None:
    names = names_of(client)
    for key in (names.questions, names.answers, names.failures):
        client.set(key, "text")
    watching = Monitor()
    wait_for(lambda: watching.note)
    for key in (names.questions, names.answers, names.failures):
        assert f"The key {key!r} holds another type" in watching.note
    assert (watching.waiting, watching.answering, watching.failures) == (None, None, None)
    client.delete(names.questions, names.answers, names.failures)
    wait_for(lambda: watching.waiting == watching.failures == 0 and watching.note == "")


def test_what_no_kit_wrote_is_unreadable_and_harms_no_other_row(client) -> None:
    names = names_of(client)
    index(client, "good", 100, pooled=True)
    others = {"list": 97, "set": 96, "foreign": 95, "string": 94}
    client.zadd(names.answers, {"<b>{x}*\n" + "y" * 500: 99, b"\xff\xfe": 98} | others)
    client.rpush(names.answer("list").question, "x")
    client.sadd(names.answer("set").chunks, "x")
    client.set(names.answer("string").chunks, "x")
    client.xadd(names.answer("foreign").chunks, {"chunkOutput": "Once"})
    for n, text in enumerate(["[1]", "{", '"x"', "[" * 100_000, '{"question": {"a": NaN}}']):
        client.zadd(names.answers, {f"record{n}": 90 - n})
        client.set(names.answer(f"record{n}").question, text)
        lease(client, answer_id=f"record{n}")
    client.zadd(names.answers, {"endless": float("inf"), "surrogate": 50, "closes": 49})
    lease(client, answer_id="endless")
    lease(client, answer_id="surrogate")
    client.set(names.answer("surrogate").question, '{"question": "\\ud800 \\u202e x", "pooled": 1}')
    add(client, "1-0", "end", '{"reason": "stop", "closes": "x", "chunks": "many"}', "closes")
    watching = Monitor()
    wait_for(lambda: "surrogate" in states(watching) and len(watching.answers) == 15)
    found = states(watching)
    assert found["good"] == found["endless"] == found["surrogate"] == "waiting"
    unreadable = [name for name, state in found.items() if state == "unreadable"]
    assert [name[:12] for name in unreadable] == [
        *("<b>{x}*\nyyyy", "\\xff\\xfe", "list", "set", "foreign", "string", "closes")
    ]
    assert all(rows(watching)[name]["note"] for name in unreadable)
    for name, key in (("list", names.answer("list").question), ("set", names.answer("set").chunks)):
        assert f"The key {key!r} holds another type" in rows(watching)[name]["note"]
    assert rows(watching)["endless"]["asked"] is None
    assert rows(watching)["surrogate"]["question"].startswith("\ufffd")
    for *_, data in LOG:
        json.dumps(data, allow_nan=False, ensure_ascii=False).encode()  # as it goes to the browser
    client.delete(names.answer("set").chunks)
    index(client, "set", 96, pooled=True)
    wait_for(lambda: states(watching)["set"] == "waiting")


@pytest.mark.parametrize("error", [RecursionError("the model's words"), KeyError("hunter2")])
def test_an_error_that_nobody_expected_harms_its_own_row_alone(client, monkeypatch, caplog, error) -> None:
    glance = Follower.glance

    def broken(self, *signs):
        if self.answer_id == "bad":
            raise error
        return glance(self, *signs)

    monkeypatch.setattr(Follower, "glance", broken)
    index(client, "good", 2, pooled=True)
    index(client, "bad", 1, pooled=True)
    watching = Monitor()
    wait_for(lambda: states(watching) == {"good": "waiting", "bad": "unreadable"})
    assert type(error).__name__ in rows(watching)["bad"]["note"] and not watching.note
    client.lpush(names_of(client).failures, "{}")
    wait_for(lambda: watching.failures == 1)  # several samples later
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"bad: reading it raised {type(error).__name__}"]


@pytest.mark.slow
def test_a_lost_redis_is_said_and_comes_back(program, monkeypatch) -> None:
    sampling, sample = threading.Lock(), survey.Survey.sample

    def one_at_a_time(self: survey.Survey, *arguments: Any) -> dict[str, Any]:
        with sampling:
            return sample(self, *arguments)

    monkeypatch.setattr(survey.Survey, "sample", one_at_a_time)
    with servers.RedisServer(program, appendfsync="always") as server:
        client = connection.connect(server.url, prefix="lost")
        index(client, "a", 1)
        lease(client)
        add(client, "1-0", "start", "{}")
        add(client, "1-1", "text", "x")
        watching = Monitor(client=client)
        wait_for(lambda: states(watching) == {"a": "streaming"} and rows(watching)["a"]["rate"] == 0)
        with sampling:  # no sample sees Redis without the lease, however long this takes
            client.delete(names_of(client).answer("a").lease(1))
            server.kill()
        wait_for(lambda: watching.note == "Redis is away, trying again.")
        assert states(watching) == {"a": "streaming"} and rows(watching)["a"]["rate"] is None
        server.start()
        begun = len(LOG)
        wait_for(lambda: watching.note == "" and rows(watching)["a"]["rate"] == 0)
        client.lpush(names_of(client).failures, "{}")
        wait_for(lambda: watching.failures == 1)  # several samples later
        assert states(watching) == {"a": "streaming"}  # it has one lease to show that it lives
        assert "interrupted" not in json.dumps([data for *_, data in LOG[begun:]])
        server.wipe()
        wait_for(lambda: watching.answers == [] and watching.failures == 0)
        watching.close()
        wait_for(lambda: "llmstream views" not in threads())
        wait_for(lambda: len(client.client_list()) == 1)
        client.close()


@pytest.mark.slow
@pytest.mark.parametrize("watched", ["before", "meanwhile"])
def test_nobody_is_gone_for_what_redis_was_away(program, watched: str, samples, monkeypatch) -> None:
    monkeypatch.setattr(survey, "STALL", 0.5)
    with servers.RedisServer(program, appendfsync="always") as server:  # a kill loses nothing
        client = connection.connect(server.url, prefix="lost")
        client.xgroup_create(names_of(client).questions, POOL, "0", mkstream=True)
        sign(client, "dead", ago=30)
        sign(client, "alive", ago=0)
        if watched == "before":
            watching = Monitor(client=client)
            signs_until(client, lambda: pool_of(watching) == {"alive": "idle", "dead": "gone"})
        server.kill()
        killed = time.monotonic()
        if watched == "meanwhile":
            watching = Monitor(client=client)
        wait_for(lambda: watching.note == "Redis is away, trying again." and time.monotonic() > killed + 1.5)
        samples.clear()
        server.start()
        wait_for(lambda: pool_of(watching).get("alive") == "gone")  # it did not come back within its lease
        told = [{row["name"]: row["state"] for row in sample["consumers"]} for _, sample in samples]
        assert list(dict.fromkeys(each["alive"] for each in told)) == ["idle", "silent", "gone"]
        if watched == "before":
            assert {each["dead"] for each in told} == {"gone"}  # that had nothing to do with Redis
        watching.close()
        client.close()


@pytest.mark.slow
def test_nobody_is_gone_for_what_redis_stood_still(program, samples, monkeypatch) -> None:
    """Without a word of a lost connection: nobody's reply came for longer than a lease."""
    monkeypatch.setattr(survey, "STALL", 0.5)
    with servers.RedisServer(program) as server:
        client = connection.connect(server.url, prefix="lost")
        client.xgroup_create(names_of(client).questions, POOL, "0", mkstream=True)
        watching = Monitor(client=client)
        signs_until(client, lambda: pool_of(watching) == {"alive": "idle"})
        server.pause()
        paused = time.monotonic()
        wait_for(lambda: time.monotonic() > paused + 1.5)
        samples.clear()
        server.resume()
        wait_for(lambda: pool_of(watching) == {"alive": "gone"})
        told = [row["state"] for _, sample in samples for row in sample["consumers"]]
        assert list(dict.fromkeys(told)) == ["idle", "silent", "gone"]
        watching.close()
        client.close()


def test_a_redis_that_refuses_is_said(program) -> None:
    with servers.RedisServer(program, requirepass="secret") as server:
        client = connection.connect(server.url, prefix="lost")
        client.execute_command("ACL", "SETUSER", "few", "on", ">word", "~*", "+@connection", "+info", "+xlen")
        few = connection.connect(server.url.replace(":secret@", "few:word@"), prefix="lost")
        watching = Monitor(client=few)
        wait_for(lambda: watching.note)
        assert "does not let this user do that" in watching.note and "word" not in watching.note
        watching.close()
        few.close()
        client.close()
