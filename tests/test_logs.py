"""What is logged of an answer: its life by its id, harmless in a terminal, nothing where nobody has asked for logs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import httpx
import pytest

from llmstream_nb import Worker, enqueue
from llmstream_nb.answers.ask import clear
from llmstream_nb.answers.connection import connect, environment_of, names_of
from llmstream_nb.answers.produce import Producer
from llmstream_nb.answers.read import read_answer
from llmstream_nb.faults.proxy import Proxy
from llmstream_nb.web.server import WebServer

from .conftest import FAST
from .model import Model, record_of, start, text_in, wait_for


@pytest.fixture
def logged(caplog):
    caplog.set_level(logging.INFO, "llmstream_nb")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("llmstream_nb")]


def test_a_producer_tells_how_it_begins_and_ends(client, logged) -> None:
    start(client, Model("hunter2", end=True), FAST).done.wait(60)
    says = Model("hunter2")
    start(client, says, FAST, "b")
    says.break_off(ValueError("hunter2"))
    wait_for(lambda: "b: error: ValueError" in logged())
    assert {"a: attempt 1 opened", "a: end: stop"} <= set(logged())
    assert "hunter2" not in str(logged())


def test_who_is_shut_out_says_so(client, logged) -> None:
    says = Model("one")
    producer = start(client, says, FAST)
    wait_for(lambda: text_in(client) == "one")
    late = Producer(client, record_of(client), Model(), FAST)
    late.run()
    assert "a: left: Fenced" in logged()
    says.end()
    assert producer.done.wait(60)
    wait_for(lambda: "a: end: stop" in logged())  # said by the model's thread


def test_a_lost_connection_is_told_once_and_so_is_its_return(shared, logged) -> None:
    with Proxy("127.0.0.1", shared.port) as proxy:
        lossy = connect(proxy.url, prefix="tlogs")
        says = Model("one")
        start(lossy, says, FAST)
        wait_for(lambda: text_in(lossy) == "one")
        proxy.drop_reply(when=b"XADD")
        says.say("two")
        says.end()
        assert [*read_answer("a", client=lossy, timing=FAST)][-1].reason == "stop"
        key = names_of(lossy).answer("a").chunks
        wait_for(lambda: f"{key}: connected to Redis again" in logged())
        assert logged().count(f"{key}: lost the connection to Redis") == 1
        clear("a", client=lossy)
        lossy.close()


def test_what_others_wrote_cant_drive_the_workers_terminal(client, logged) -> None:
    evil = "\x1b]0;owned\x07\nforged line\u202e"
    client.xadd(names_of(client).questions, {"answer": evil})
    worker = Worker(name="mule", source="scripted", client=client, timing=FAST).start()
    try:
        wait_for(lambda: any("gives up" in line for line in logged()))
        answer = enqueue("What is a Redis stream?", client=client, model="scripted:pace=0").wait(60)
    finally:
        worker.stop()
    assert all(line.isprintable() for line in logged()), logged()
    assert any(line.startswith("mule: gives up ]0;owned forged line") for line in logged())
    assert f"{answer.id}: end: stop" in logged()


def test_a_refused_request_is_logged_without_its_token(client, logged) -> None:
    with WebServer(client=client, token="hunter2", timing=FAST) as server:
        base = server.link().partition("?")[0]
        assert httpx.get(f"{base}answers/nobody?token=wrong-hunter2").status_code == 401
        assert httpx.get(f"{base}answers/no%1B%5B2J?token=hunter2").status_code == 422
    assert "GET /answers/nobody: refused with 401" in logged()
    assert "hunter2" not in str(logged()) and "\x1b" not in "".join(logged())


@pytest.mark.slow
def test_nothing_is_printed_where_nobody_has_set_logging_up(client) -> None:
    """As in a notebook: a lost connection, a failing model and a refused producer are told by views and exceptions."""
    code = """
from llmstream_nb import ask, connect
from llmstream_nb.faults import Proxy
with Proxy.before(connect(prefix="tquiet")) as proxy:
    client = connect(proxy.url, prefix="tquiet")
    proxy.drop_reply(when=b"XADD")
    print(ask("?", model="scripted:pace=0,drop=3", source="scripted", client=client, id="q", replace=True).wait(60).status)
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=os.environ | environment_of(client), capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("failed\n", "")
