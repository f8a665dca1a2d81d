"""The recipe of notebook 05 does what the notebook says of it, on a Redis and with a model that misbehave."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import pytest
import redis
from openai import OpenAI
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from llmstream_nb.answers.connection import environment_of
from llmstream_nb.faults.proxy import Proxy
from llmstream_nb.llm import prepared, scripted

from .conftest import FAST
from .model import wait_for

FOLDER = Path(__file__).parents[1] / "notebooks"
FILE = FOLDER / "recipe.py"
QUESTION = "What is a Redis stream?"
REPLY = prepared.reply(QUESTION)
spec = importlib.util.spec_from_file_location("recipe", FILE)
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)


def model() -> OpenAI:
    return OpenAI(base_url=scripted.server().url, api_key="none", timeout=5, max_retries=0)


def pieces(name: str = "scripted:pace=0"):
    return recipe.answer(model(), name, QUESTION)


def text_of(entries) -> str:
    return "".join(text for _, kind, text in entries if kind == "text")


@pytest.fixture
def key(client):
    name = f"{client.names.prefix}:story"
    yield name
    client.delete(name)


def test_it_is_short_and_needs_redis_and_openai_alone() -> None:
    source = FILE.read_text("utf-8")
    assert len(source.splitlines()) <= 60
    assert max(map(len, source.splitlines())) <= 100  # none breaks in the notebook
    nodes = list(ast.walk(ast.parse(source)))
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == {"redis", "openai"}


def test_every_cursor_resumes_exactly(client, key) -> None:
    recipe.produce(client, key, pieces())
    whole = list(recipe.read(client, key))
    assert text_of(whole) == REPLY
    assert whole[-1][1:] == ("end", "stop")
    for number, (last, _, _) in enumerate(whole[:-1], 1):
        assert list(recipe.read(client, key, last)) == whole[number:]
    assert 0 < client.ttl(key) <= 86_400


def test_a_reader_sees_what_is_there_while_more_comes(client, key) -> None:
    go_on = threading.Event()

    def slow():
        yield "text", "first "
        go_on.wait(10)
        yield "text", "second"
        yield "end", "stop"

    work = threading.Thread(target=recipe.produce, args=[client, key, slow()])
    work.start()
    reader = recipe.read(client, key)
    assert next(reader)[2] == "first "
    assert not go_on.is_set()
    go_on.set()
    assert text_of(reader) == "second"
    work.join(10)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("scripted:pace=0,drop=12", "error"),
        ("scripted:status=401", "error"),
        ("scripted:pace=0,length=12", "end"),
        ("scripted:long=0", "end"),
    ],
)
def test_an_answer_ends_however_the_model_does(client, key, name, kind) -> None:
    recipe.produce(client, key, pieces(name))
    entries = list(recipe.read(client, key))
    assert REPLY.startswith(text_of(entries))
    assert entries[-1][1] == kind
    assert "none" not in entries[-1][2]  # the key of the endpoint
    assert len(entries) == (13 if "12" in name else 1)


def test_a_lost_entry_is_told(client, key) -> None:
    recipe.produce(client, key, pieces())
    client.xdel(key, "1-20")
    with pytest.raises(LookupError, match=r"1-20 is missing"):
        list(recipe.read(client, key))


def test_a_dead_producer_is_told(client, key) -> None:
    client.xadd(key, {"kind": "text", "text": "half"}, id="1-1")
    reader = recipe.read(client, key, patience=0.2)
    assert next(reader)[2] == "half"
    with pytest.raises(TimeoutError, match=r"after 1-1 for 0\.2 s"):
        next(reader)


def test_another_error_of_redis_is_not_taken_for_a_repetition(client, key) -> None:
    client.set(key, "equal or smaller")
    with pytest.raises((redis.ResponseError, AttributeError)):  # the latter: how fakeredis says it
        recipe.produce(client, key, pieces())


def test_lost_replies_double_nothing_and_lose_nothing(real_servers) -> None:
    if "redis-server" not in real_servers:
        pytest.skip("redis-server is not on PATH")
    with Proxy("127.0.0.1", real_servers["redis-server"].port) as proxy:
        lossy = redis.Redis.from_url(
            f"redis://127.0.0.1:{proxy.port}", decode_responses=True, retry=Retry(ConstantBackoff(0.01), 5)
        )
        lossy.delete("recipe:lossy")

        def losing():
            for number, piece in enumerate(pieces()):
                if number % 25 == 3:
                    proxy.drop_reply(when=b"XADD")
                yield piece

        recipe.produce(lossy, "recipe:lossy", losing())
        assert text_of(recipe.read(lossy, "recipe:lossy")) == REPLY
        assert proxy.dropped >= 10
        lossy.delete("recipe:lossy")
        lossy.close()


@pytest.mark.parametrize("backend", ["fake", "redis-server"], indirect=True)
def test_as_two_programs(client, backend, key) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI")} | environment_of(client)
    environment |= {"OPENAI_BASE_URL": scripted.server().url, "OPENAI_API_KEY": "none", "PYTHONIOENCODING": "utf-8"}
    environment["OPENAI_MODEL"] = "scripted:pace=200"
    run = [sys.executable, str(FILE)]
    asking = subprocess.Popen([*run, "ask", key, QUESTION], env=environment)
    try:
        wait_for(lambda: client.xlen(key) > 20)
        whole = subprocess.run(
            [*run, "read", key], env=environment, capture_output=True, encoding="utf-8", timeout=60, check=True
        )
        rest = subprocess.run(
            [*run, "read", key, "1-30"], env=environment, capture_output=True, encoding="utf-8", timeout=60, check=True
        )
    finally:
        asking.wait(30)
    assert whole.stdout == f"{REPLY}\n[end: stop]"
    assert len(rest.stdout) > 100
    assert whole.stdout.endswith(rest.stdout)


@pytest.mark.parametrize("backend", ["fake", "redis-server"], indirect=True)
def test_the_endpoint_for_fastapi_streams(client) -> None:
    """The example in the notebook, with a worker behind it."""
    from starlette.testclient import TestClient

    from llmstream_nb import Worker

    prose = "\n".join(
        cell.source for cell in nbformat.read(FOLDER / "05-take-home.ipynb", 4).cells if cell.cell_type == "markdown"
    )
    example = re.search(r"```python\n(from fastapi.*?)```", prose, re.DOTALL)
    assert example
    space: dict = {}
    exec(example[1], space)  # the notebook's own example
    worker = Worker(source="scripted", client=client, timing=FAST).start()
    try:
        web = TestClient(space["app"])
        answer_id = web.post("/questions", params={"question": QUESTION}).json()
        assert web.get(f"/answers/{answer_id}").text == REPLY
    finally:
        worker.stop()
