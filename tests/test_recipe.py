"""The recipe of notebook 05 does what the notebook says of it, on a Redis and with a model that misbehave."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated

import httpx
import nbformat
import pytest
import redis
import uvicorn
from fastapi import FastAPI, Header, HTTPException
from fastapi.responses import Response, StreamingResponse
from nbclient import NotebookClient
from openai import OpenAI
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from llmstream_nb import Worker
from llmstream_nb.answers.connection import environment_of
from llmstream_nb.faults.proxy import Proxy
from llmstream_nb.llm import prepared, scripted

from .conftest import FAST
from .model import wait_for
from .versions import SERVERS

FOLDER = Path(__file__).parents[1] / "notebooks"
FILE = FOLDER / "recipe.py"
QUESTION = "What is a Redis stream?"
REPLY = prepared.reply(QUESTION)
spec = importlib.util.spec_from_file_location("recipe", FILE)
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)


def model() -> OpenAI:
    return OpenAI(base_url=scripted.server().url, api_key=scripted.server().key, timeout=5, max_retries=0)


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
    assert len(source.splitlines()) <= 66
    assert max(map(len, source.splitlines())) <= 96  # none breaks in the notebook, on a screen 1280 px wide
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
    wait_for(lambda: client.exists(key))
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


@pytest.mark.parametrize("name", ["scripted:pace=0,length=3", "scripted:pace=0,drop=3", "scripted:nothing"])
def test_whoever_joins_at_the_end_is_done_at_once(client, key, name) -> None:
    recipe.produce(client, key, pieces(name))
    last = client.xrevrange(key, count=1)[0][0]
    assert list(recipe.read(client, key, last, patience=0)) == []  # no patience: it must not wait


def test_an_answer_that_nobody_asked_for_is_told_at_once(client, key) -> None:
    for last in ("0-0", "1-3"):
        with pytest.raises(LookupError, match="no answer"):
            next(recipe.read(client, key, last, patience=0))


def test_an_answer_can_be_found_before_the_model_speaks(client, key) -> None:
    def silent():
        with pytest.raises(TimeoutError, match="nothing came after 1-0"):
            next(recipe.read(client, key, patience=0))
        yield "end", "stop"

    recipe.produce(client, key, silent())
    assert list(recipe.read(client, key)) == [("1-1", "end", "stop")]


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


def test_lost_replies_double_nothing_and_lose_nothing(shared) -> None:
    with Proxy("127.0.0.1", shared.port) as proxy:
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


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fake", *SERVERS], indirect=True)
def test_as_two_programs(client, backend, key) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI")} | environment_of(client)
    environment |= {"OPENAI_BASE_URL": scripted.server().url, "OPENAI_API_KEY": scripted.server().key}
    environment["PYTHONIOENCODING"] = "utf-8"
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


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The address of this application, over real HTTP on 127.0.0.1."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fake", *SERVERS], indirect=True)
def test_the_endpoint_for_fastapi(client) -> None:
    """The example in the notebook, with a worker behind it."""
    prose = "\n".join(
        cell.source for cell in nbformat.read(FOLDER / "05-take-home.ipynb", 4).cells if cell.cell_type == "markdown"
    )
    example = re.search(r"```python\n((?:(?!```).)*FastAPI.*?)```", prose, re.DOTALL)
    assert example
    space: dict = {}
    exec(example[1], space)  # the notebook's own example
    worker = Worker(source="scripted", client=client, timing=FAST).start()
    try:
        with served(space["app"]) as address, httpx.Client(base_url=address, timeout=30) as web:
            answer_id = web.post("/questions", params={"question": QUESTION}).json()
            for _ in range(2):  # while it is written, and from what is kept
                reply = web.get(f"/answers/{answer_id}")
                assert (reply.status_code, reply.text) == (200, REPLY)
            for unknown in ("nobody-asked", "no%20id", "x" * 65):
                assert web.get(f"/answers/{unknown}").status_code == 404
    finally:
        worker.stop()


def test_the_recipe_behind_fastapi(client, key) -> None:
    """As the notebook says it: the first entry is taken before the reply begins."""
    app = FastAPI()

    @app.get("/{name}")
    def watch(name: str, last_event_id: Annotated[str, Header()] = "0-0") -> Response:
        entries = recipe.read(client, name, last_event_id)
        try:
            first = next(entries, None)
        except LookupError:
            raise HTTPException(404) from None
        if first is None:
            return Response(status_code=204)
        texts = (text for _, kind, text in chain([first], entries) if kind == "text")
        return StreamingResponse(texts, media_type="text/plain")

    recipe.produce(client, key, pieces())
    last = client.xrevrange(key, count=1)[0][0]
    with served(app) as address, httpx.Client(base_url=address, timeout=10) as web:
        assert web.get(f"/{key}").text == REPLY
        assert web.get(f"/{key}x").status_code == 404
        assert web.get(f"/{key}", headers={"Last-Event-ID": last}).status_code == 204
        assert REPLY.endswith(web.get(f"/{key}", headers={"Last-Event-ID": "1-9"}).text)


def test_the_notebook_runs_in_another_folder(tmp_path):
    notebook = nbformat.read(FOLDER / "05-take-home.ipynb", as_version=4)
    notebook.cells = notebook.cells[:11]  # all that has to do with the file
    client = NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=os.environ | {"PYTHONPATH": str(FOLDER.parent)})
    assert "the two parts are the whole answer: True" in notebook.cells[-1].outputs[0].text
    assert not (tmp_path / "recipe.py").exists()
