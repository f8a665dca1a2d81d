"""Growing past one open server: a Redis Cluster of three nodes, TLS, and a user whom an ACL limits to a prefix."""

from __future__ import annotations

import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from llmstream_nb import AnswerView, Monitor, StreamView, tables
from llmstream_nb.answers.ask import Answer, ask, clear, stop_answer
from llmstream_nb.answers.connection import RedisUnusable, connect, environment_of, names_of
from llmstream_nb.answers.read import read_answer
from llmstream_nb.faults import servers
from llmstream_nb.pool.groups import read_answer_group
from llmstream_nb.pool.queue import enqueue
from llmstream_nb.pool.worker import Worker
from llmstream_nb.protocol.events import Interrupted, Restarted, text_of
from llmstream_nb.web import WebServer

from .conftest import FAST
from .model import Model, assert_whole, start, text_in, wait_for
from .versions import program_of
from .web import TOKEN, call

pytestmark = pytest.mark.skipif("redis-server" not in servers.available(), reason="redis-server is not on PATH")
SLOTS = 16384
ANSWERS = [f"a{n}" for n in range(9)]  # enough to lie on all three nodes


def say(*texts: str):
    return lambda question, topic: iter(texts)


# ------------------------------------------------------------------------------------------------ cluster


@pytest.fixture(scope="module")
def nodes(drawn_server) -> Iterator[list[servers.RedisServer]]:
    """Three primaries that share the slots."""
    program = program_of(drawn_server)
    options: dict[str, str | int] = {"cluster_enabled": "yes", "cluster_node_timeout": 10_000, "appendfsync": "always"}
    made = [servers.RedisServer(program, **options) for _ in range(3)]
    try:
        for number, node in enumerate(made):
            admin = node.client()
            share = range(number * SLOTS // 3, (number + 1) * SLOTS // 3)
            admin.execute_command("CLUSTER ADDSLOTS", *share)
            admin.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
        for node in made[1:]:
            made[0].client().execute_command("CLUSTER MEET", "127.0.0.1", node.port)
        wait_for(lambda: all(is_whole(node) for node in made))
        yield made
    finally:
        for node in made:
            node.stop()


def is_whole(node: servers.RedisServer) -> bool:
    info = node.client().execute_command("CLUSTER INFO")
    told = info if isinstance(info, dict) else dict(line.split(":") for line in info.split() if ":" in line)
    return told["cluster_state"] == "ok" and told["cluster_known_nodes"] == "3"


@pytest.fixture
def cluster(nodes) -> Iterator[redis.Redis]:
    client = connect(nodes[1].url, prefix=f"t{uuid.uuid4().hex[:8]}")
    yield client
    clear(client=client, timing=FAST)
    client.close()


def holder(nodes: list[servers.RedisServer], key: str) -> int:
    """Which of the nodes holds a key."""
    return next(n for n, node in enumerate(nodes) if key in node.client().keys(key))


def test_a_cluster_is_noticed_and_named(cluster, nodes) -> None:
    assert isinstance(cluster, redis.RedisCluster)
    assert repr(cluster) == f"<Redis: cluster at {nodes[1].url}>"
    assert environment_of(cluster)["REDIS_URL"] == nodes[1].url


def test_answers_lie_on_all_nodes_and_read_alike(cluster, nodes) -> None:
    for answer_id in ANSWERS:
        ask("one", source=say("Hi ", "there, ", answer_id), id=answer_id, timing=FAST).wait(60)
    keys = {answer_id: names_of(cluster).answer(answer_id) for answer_id in ANSWERS}
    assert {holder(nodes, each.chunks) for each in keys.values()} == {0, 1, 2}
    assert all(holder(nodes, each.chunks) == holder(nodes, each.question) for each in keys.values())
    for answer_id in ANSWERS:
        assert text_of(read_answer(answer_id)) == f"Hi there, {answer_id}"
        assert len([entry for batch in read_answer_group(answer_id, "g", "c") for entry in batch]) == 5
    assert list(tables.answers()["id"]) == ANSWERS and set(tables.answers()["status"]) == {"ended"}
    assert list(tables.keys("a0")["type"]) == ["stream", "string"]
    assert clear() == len(ANSWERS) and tables.answers().empty


def test_the_web_server_shows_answers_of_all_nodes_at_once(cluster, nodes) -> None:
    says = {answer_id: Model(f"{answer_id} ") for answer_id in ANSWERS}
    for answer_id, model in says.items():
        ask("one", source=lambda *_, model=model: model, id=answer_id, timing=FAST)
    wait_for(lambda: all(text_in(cluster, answer_id) for answer_id in ANSWERS))
    assert {holder(nodes, names_of(cluster).answer(answer_id).chunks) for answer_id in ANSWERS} == {0, 1, 2}
    with WebServer(client=cluster, token=TOKEN, timing=FAST) as server, ThreadPoolExecutor(len(ANSWERS)) as pool:
        read = [pool.submit(call, server, "GET", f"answers/{answer_id}/events") for answer_id in ANSWERS]
        for model in says.values():
            model.say("goes on")
            model.end()
        for answer_id, reply in zip(ANSWERS, read, strict=True):
            told = reply.result(60).body.decode()
            assert "event: end" in told
            assert told.count(f"{answer_id} ") == told.count("goes on") == 1, told
        last = names_of(cluster).answer("a0").chunks
        seen = str(cluster.xrevrange(last, count=1)[0][0])
        assert call(server, "GET", "answers/a0/events", last_event_id=seen).status == 204


def test_stop_from_elsewhere_and_a_queued_one(cluster) -> None:
    says = Model("half ")
    answer = ask("long", source=lambda question, topic: says, id="a3", timing=FAST)
    wait_for(lambda: text_in(cluster, "a3") == "half ")
    assert stop_answer("a3", timing=FAST) == "ended" and answer.record["reason"] == "cancelled"
    wait_for(lambda: says.closed)
    assert enqueue("never", id="a5", timing=FAST).stop() == "ended"


def test_the_pool_answers_and_takes_over(cluster, nodes) -> None:
    says = Model("half ")
    first = Worker(name="first", slots=9, source=lambda question, topic: says, timing=FAST).start()
    answer = enqueue("one", id="a4", timing=FAST)
    wait_for(lambda: text_in(cluster, "a4") == "half ")
    second = Worker(name="second", source=say("all ", "of it"), timing=FAST).start()
    first.stop(within=0)
    assert answer.wait(60).text == "all of it" and answer.look().top.attempt == 2
    monitor = Monitor()
    wait_for(lambda: {row["name"]: row["state"] for row in monitor.consumers}.get("second") == "idle")
    monitor.close()
    assert holder(nodes, names_of(cluster).worker("second")) == holder(nodes, names_of(cluster).questions)
    rest = [enqueue("more", id=f"b{n}", timing=FAST) for n in range(6)]
    assert {each.wait(60).text for each in rest} == {"all of it"}
    wait_for(lambda: tables.queue().empty)
    second.stop()
    assert first.error is second.error is None and tables.failures().empty


def test_views_and_monitor(cluster) -> None:
    says = {answer_id: Model(answer_id) for answer_id in ANSWERS}
    for answer_id, model in says.items():
        ask("one", source=lambda question, topic, model=model: model, id=answer_id, timing=FAST)
    views, monitor = [AnswerView(answer_id) for answer_id in ANSWERS], Monitor()
    grouped = AnswerView("a1", group="screen")
    wait_for(lambda: [view.text for view in views] == ANSWERS and grouped.text == "a1")
    wait_for(lambda: {row["state"] for row in monitor.answers} == {"streaming"})
    for model in says.values():
        model.say(" end")
        model.end()
    wait_for(lambda: {view.state for view in [*views, grouped]} == {"ended"} and grouped.text == "a1 end")
    wait_for(lambda: {row["state"] for row in monitor.answers} == {"ended"} and not monitor.note)
    monitor.close()


def test_streams_of_all_nodes_are_drawn(cluster) -> None:
    for answer_id in ANSWERS:
        ask("one", source=say(answer_id), id=answer_id, timing=FAST).wait(60)
        cluster.xgroup_create(names_of(cluster).answer(answer_id).chunks, "g", id="$")
    views = [StreamView(Answer(answer_id)) for answer_id in ANSWERS]
    wait_for(
        lambda: (
            [[text for _, kind, text, _ in view.entries if kind == "text"] for view in views] == [[a] for a in ANSWERS]
        )
    )
    assert {view.cursor("me", "$") for view in views} == {"1-2"}
    wait_for(lambda: all(view.marks["groups"] and view.marks["readers"] == [["me", "1-2", []]] for view in views))


def test_a_node_that_restarts_in_the_middle_of_an_answer(cluster, nodes) -> None:
    says = Model("one ")
    producer = start(cluster, says, FAST, "a7")
    wait_for(lambda: text_in(cluster, "a7") == "one ")
    node = nodes[holder(nodes, names_of(cluster).answer("a7").chunks)]
    node.kill()
    says.say("two ")
    node.start()
    says.say("three")
    says.end()
    wait_for(producer.done.is_set)
    assert producer.error is None
    wait_for(lambda: all(is_whole(each) for each in nodes))
    assert_whole(cluster, ["one ", "two ", "three"], "a7")


def test_a_slot_that_moves_in_the_middle_of_an_answer(cluster, nodes) -> None:
    says = Model("one ")
    producer = start(cluster, says, FAST, "a8")
    wait_for(lambda: text_in(cluster, "a8") == "one ")
    keys = names_of(cluster).answer("a8")
    old = holder(nodes, keys.chunks)
    move(nodes, keys.chunks, old, (old + 1) % 3)
    says.say("two")
    says.end()
    wait_for(producer.done.is_set)
    assert producer.error is None and holder(nodes, keys.chunks) == (old + 1) % 3
    assert_whole(cluster, ["one ", "two"], "a8")
    events = list(read_answer("a8", client=cluster, timing=FAST))
    assert text_of(events) == "one two" and not [e for e in events if isinstance(e, (Restarted, Interrupted))]


def move(nodes: list[servers.RedisServer], key: str, old: int, new: int) -> None:
    """Move a key's slot, with all that is in it, to another node."""
    admins = [node.client() for node in nodes]
    names = [str(admin.execute_command("CLUSTER MYID")) for admin in admins]
    slot = admins[0].execute_command("CLUSTER KEYSLOT", key)
    admins[new].execute_command("CLUSTER SETSLOT", slot, "IMPORTING", names[old])
    admins[old].execute_command("CLUSTER SETSLOT", slot, "MIGRATING", names[new])
    while found := admins[old].execute_command("CLUSTER GETKEYSINSLOT", slot, 100):
        admins[old].execute_command("MIGRATE", "127.0.0.1", nodes[new].port, "", 0, 5000, "KEYS", *found)
    for n in (new, old, 3 - new - old):
        admins[n].execute_command("CLUSTER SETSLOT", slot, "NODE", names[new])


# --------------------------------------------------------------------------------------- TLS and ACL users


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    """An authority of the test's own, and a certificate that it signed for 127.0.0.1."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not on PATH")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(words: str) -> None:
        subprocess.run(["openssl", *words.split()], cwd=folder, check=True, capture_output=True, timeout=60)

    for name in ("ca", "other"):
        openssl(f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN={name} -keyout {name}.key -out {name}.crt")
    openssl("req -newkey rsa:2048 -nodes -subj /CN=server -keyout server.key -out server.csr")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1")
    openssl("x509 -req -days 2 -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -extfile names -out server.crt")
    return folder


def test_tls(certificates: Path) -> None:
    port = servers.free_port()
    files = {f"tls_{name}_file": str(certificates / file) for name, file in
             [("cert", "server.crt"), ("key", "server.key"), ("ca_cert", "ca.crt")]}  # fmt: skip
    with servers.RedisServer(tls_port=port, tls_auth_clients="no", **files) as server:
        url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificates / 'ca.crt'}"
        client = connect(url, prefix="tls")
        assert ask("one", source=say("Hi ", "there"), id="a", timing=FAST).wait(60).text == "Hi there"
        assert text_of(read_answer("a")) == "Hi there"
        client.close()
        faults = [
            (url.replace("ca.crt", "other.crt"), "not trusted here"),
            (url.replace("ca.crt", "nowhere.crt"), "is missing"),
            (url.replace("ca.crt", "names"), "or no certificate"),
            (url.replace("127.0.0.1", "localhost"), "for another name"),
            (url.replace("rediss", "redis").partition("?")[0], "If it wants TLS"),
            (url.replace(str(port), str(server.port)), "speaks no TLS"),
        ]
        for wrong, words in faults:
            with pytest.raises(RedisUnusable, match=words):
                connect(wrong, socket_timeout=10)


def test_a_user_whom_an_acl_limits_to_a_prefix() -> None:
    with servers.RedisServer() as server:
        commands = "+@stream +@string +@sortedset +@list +@keyspace +@transaction +@connection -@dangerous"
        rules = f"on >s3cret ~room7:* {commands}"  # as docs/which-redis.md says
        server.client().execute_command("ACL SETUSER", "guest", *rules.split())
        url = server.url.replace("redis://", "redis://guest:s3cret@")
        client = connect(url, prefix="room7")
        worker = Worker(source=say("Hi"), timing=FAST).start()
        assert enqueue("one", id="a", timing=FAST).wait(60).text == "Hi"
        assert ask("two", source=say("there"), id="b", timing=FAST).wait(60).text == "there"
        view = AnswerView("b")
        wait_for(lambda: view.state == "ended")
        worker.stop()
        assert worker.error is None and list(tables.answers()["status"]) == ["ended", "ended"]
        assert list(tables.groups("b")["group"]) == [] and len(tables.keys("b")) == 2 and tables.queue().empty
        assert clear() == 2
        client.close()
        other = connect(url, prefix="room8")
        with pytest.raises(RedisUnusable, match="does not let this user") as caught:
            ask("three", source=say("no"), timing=FAST)
        assert "s3cret" not in str(caught.value)
        other.close()


def test_a_cluster_that_is_away_is_an_error_in_time(nodes) -> None:
    client = connect(nodes[0].url, prefix="away", socket_timeout=1)
    for node in nodes:
        node.pause()
    try:
        began = time.monotonic()
        with pytest.raises(RedisUnusable):
            list(read_answer("a", client=client, timing=replace(FAST, give_up=5.0)))
        assert time.monotonic() - began < 60
    finally:
        for node in nodes:
            node.resume()
        client.close()
