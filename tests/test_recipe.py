"""The two recipes of notebook 05 do what the notebook says of them, on a Redis and with a model that misbehave."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

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

from llmstream_nb.answers.connection import environment_of
from llmstream_nb.faults.proxy import Proxy
from llmstream_nb.llm import prepared, scripted
from llmstream_nb.protocol.wire import EntryID

from .model import wait_for
from .versions import SERVERS

FOLDER = Path(__file__).parents[1] / "notebooks"
FILE = FOLDER / "recipe.py"
QUESTION = "What is a Redis stream?"
REPLY = prepared.reply(QUESTION)
CASES = json.loads((FOLDER.parent / "llmstream_nb" / "conformance.json").read_text("utf-8"))["cases"]


def loaded(file: Path) -> Any:
    """This file as a module, new at each call."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipe = loaded(FILE)


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


def foreign(source: str) -> set[str]:
    """The packages that it imports, beside the standard library."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


def test_it_is_short_and_needs_redis_and_openai_alone() -> None:
    source = FILE.read_text("utf-8")
    assert len(source.splitlines()) <= 66
    assert max(map(len, source.splitlines())) <= 96  # none breaks in the notebook, on a screen 1280 px wide
    assert foreign(source) == {"redis", "openai"}


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
        go_on.wait(60)
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
    work.join(60)


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


@pytest.mark.slow
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
        asking.wait(60)
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
        thread.join(60)


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


# --------------------------------------------------------------------------------- recipe_async.py: a web server


class Site:
    """recipe_async:app over real HTTP, on the Redis of this URL and with the scripted model."""

    def __init__(self, url: str, monkeypatch) -> None:
        self.url = url
        monkeypatch.setenv("REDIS_URL", url)
        monkeypatch.setenv("OPENAI_BASE_URL", scripted.server().url)
        monkeypatch.setenv("OPENAI_API_KEY", scripted.server().key)
        self.model = partial(monkeypatch.setenv, "OPENAI_MODEL")
        self.model("scripted:pace=0")
        self.module = loaded(FOLDER / "recipe_async.py")

    def ask(self) -> str:
        reply = self.web.post("/answers", json={"question": QUESTION})
        assert reply.status_code == 201
        return reply.json()["id"]

    def events(self, name: str, last: str | None = None) -> list[tuple[str, str, str]]:
        reply = self.web.get(f"/answers/{name}/events", headers={"Last-Event-ID": last} if last else {})
        assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream")
        return list(events_in(reply.text.splitlines()))

    def status(self, name: str, last: str = "1-0") -> int:
        with self.web.stream("GET", f"/answers/{name}/events", headers={"Last-Event-ID": last}) as reply:
            return reply.status_code


def events_in(lines) -> Iterator[tuple[str, str, str]]:
    """(ID, kind, text) of each event, as a browser reads them."""
    entry_id = ""
    for line in lines:
        name, _, value = line.partition(": ")
        if name == "id":
            entry_id = value
        elif name == "data":
            entry = json.loads(value)
            yield entry_id, entry["kind"], entry["text"]


@pytest.fixture
def site(client, monkeypatch) -> Iterator[Site]:
    with opened(Site(environment_of(client)["REDIS_URL"], monkeypatch)) as made:
        yield made


@contextmanager
def opened(made: Site) -> Iterator[Site]:
    many = httpx.Limits(max_connections=None)
    with served(made.module.app) as address, httpx.Client(base_url=address, timeout=30, limits=many) as made.web:
        yield made


def no_model_runs() -> bool:
    return not scripted.server().active


def test_the_web_recipe_is_short_and_needs_three_packages() -> None:
    source = (FOLDER / "recipe_async.py").read_text("utf-8")
    assert len(source.splitlines()) <= 90
    assert max(map(len, source.splitlines())) <= 96
    assert foreign(source) == {"redis", "openai", "fastapi"}


@pytest.mark.slow
def test_the_web_recipe_resumes_after_every_id(client, site) -> None:
    name = site.ask()
    whole = site.events(name)
    assert text_of(whole) == REPLY and whole[-1][1:] == ("end", "stop")
    assert [each[0] for each in whole] == [f"1-{number}" for number in range(1, len(whole) + 1)]
    for number in range(0, len(whole), 1 if len(whole) < 60 else 7):
        assert site.events(name, f"1-{number}") == whole[number:]
    assert site.status(name, whole[-1][0]) == 204
    assert 0 < client.ttl(f"answer:{name}") <= 86_400


def test_the_web_recipe_refuses_what_is_no_id(site) -> None:
    name = site.ask()
    for last in ("no-id", "1", "1-", "2-1", "-", "+", "$", "(1-0", "1-0 1-0", "1-" + "9" * 30, "1-²".encode()):
        assert site.status(name, last) == 400
    assert site.status(name, "1-0") == 200


def test_the_web_recipe_knows_no_answer_that_nobody_asked_for(client, site) -> None:
    client.xadd(f"{client.names.prefix}:private", {"kind": "text", "text": "secret"}, id="1-0")
    name = site.ask()
    assert site.web.delete(f"/answers/{name}").status_code == 202
    for unknown in ("nobody-asked", f"{client.names.prefix}:private", f"stop:answer:{name}", "x" * 3000):
        assert site.status(unknown) == 404
    assert site.status(name, "1-99999") == 404  # an ID of another answer
    assert site.web.post("/answers", json={"query": "?"}).status_code == 422


@pytest.mark.parametrize(
    ("model", "ending"),
    [
        ("scripted:pace=0,drop=12", ("error", "APIError")),
        ("scripted:status=401", ("error", "AuthenticationError")),
        ("scripted:pace=0,length=12", ("end", "length")),
        ("scripted:long=0", ("end", "stop")),
    ],
)
def test_the_web_recipe_ends_however_the_model_does(site, model, ending) -> None:
    site.model(model)
    name = site.ask()
    entries = site.events(name)
    assert REPLY.startswith(text_of(entries))
    assert len([text for _, kind, text in entries if kind == "text" and text]) == (12 if "12" in model else 0)
    assert entries[-1][1] == ending[0] and (ending[0] == "error" or entries[-1][2] == ending[1])
    assert scripted.server().key not in str(entries) and "refusal" not in str(entries)


@pytest.mark.slow
def test_stop_ends_a_silent_models_request_and_keeps_the_text(client, site) -> None:
    site.model("scripted:pace=0,stall=9")
    name = site.ask()
    wait_for(lambda: client.xlen(f"answer:{name}") > 9)
    assert scripted.server().active
    assert site.web.delete(f"/answers/{name}").status_code == 202
    entries = site.events(name)
    assert entries[-1][1:] == ("end", "cancelled")
    assert len(text_of(entries)) > 9 and REPLY.startswith(text_of(entries))
    wait_for(no_model_runs)


@pytest.mark.slow
def test_a_hundred_who_wait_hold_up_nobody_who_asks(client, site) -> None:
    """The order tells, not the clock: the reply to POST is there before the model has said a word."""
    site.model("scripted:think=10000")
    name = site.ask()
    waiting: queue.Queue[str] = queue.Queue()

    def watch() -> None:
        with site.web.stream("GET", f"/answers/{name}/events") as reply:
            events = events_in(reply.iter_lines())
            waiting.put(next(events)[2])  # a sign of life
            waiting.put(list(events)[-1][2])

    viewers = [threading.Thread(target=watch) for _ in range(100)]
    for viewer in viewers:
        viewer.start()
    assert [waiting.get(timeout=30) for _ in viewers] == [""] * 100
    other = site.ask()
    assert {entry["text"] for _, entry in client.xrange(f"answer:{name}")} == {""}  # not a word so far
    assert all(viewer.is_alive() for viewer in viewers)
    for each in (name, other):
        assert site.web.delete(f"/answers/{each}").status_code == 202
    assert [waiting.get(timeout=30) for _ in viewers] == ["cancelled"] * 100
    for viewer in viewers:
        viewer.join(60)
    wait_for(no_model_runs)


@pytest.mark.parametrize("case", [case for case in CASES if case.get("recipe")], ids=lambda case: case["name"])
@pytest.mark.parametrize("backend", ["fake"], indirect=True)
def test_the_web_recipe_reads_as_the_first_one(site, monkeypatch, case) -> None:
    """The cases of conformance.json, which another test tries with the recipe for the terminal."""
    entries = [(entry, fields) for step in case["steps"] for entry, fields in step["read"]]

    class Stub:
        def xread(self, streams: dict[str, str], **options: int) -> list:
            after = EntryID.parse(streams["x"])
            found = [each for each in entries if EntryID.parse(each[0]) > after]
            return [["x", found]] if found else []

        def xrevrange(self, key: str, count: int) -> list:
            return [("1-0", {"kind": "text", "text": ""})]

    class Async(Stub):
        async def xread(self, streams: dict[str, str], **options: int) -> list:
            return super().xread(streams)

    async def told() -> list[tuple[str, str, str]]:
        frames = [frame async for frame in site.module.read("x", max(case["after"], "1-0"))]
        return list(events_in("".join(frames).splitlines()))

    monkeypatch.setattr(site.module, "redis", Async())
    first, broken = [], ""
    try:
        first.extend(recipe.read(Stub(), "x", case["after"], patience=0.01))
    except (LookupError, TimeoutError) as error:
        broken = str(error).partition(" for ")[0].partition(" after ")[0]
    entries_told = asyncio.run(told())
    assert entries_told[: len(first)] == first
    rest = entries_told[len(first) :]
    assert len(rest) == bool(broken) and all(kind == "error" and broken.strip("'\"") in text for _, kind, text in rest)


@pytest.mark.slow
def test_a_missing_entry_is_told_to_browsers(client, site) -> None:
    name = site.ask()
    site.events(name)
    client.xdel(f"answer:{name}", "1-20")
    entries = site.events(name)
    assert len(entries) == 20 and entries[-1][1:] == ("error", "the entry 1-20 is missing")


@pytest.mark.slow
def test_a_producer_that_died_is_told_to_browsers(client, site) -> None:
    for number, text in enumerate(["", "half"]):
        client.xadd("answer:half", {"kind": "text", "text": text}, id=f"1-{number}")
    assert [each[1:] for each in site.events("half")] == [
        ("text", "half"),
        ("error", "nothing came for 4 s: is its producer dead?"),
    ]
    client.delete("answer:half")


@pytest.mark.slow
def test_a_browser_that_leaves_gives_its_connection_back(client, site) -> None:
    site.model("scripted:think=10000")
    name = site.ask()
    for _ in range(3):
        with site.web.stream("GET", f"/answers/{name}/events") as reply:
            next(reply.iter_lines())
    pool = site.module.redis.connection_pool
    wait_for(lambda: len(pool._in_use_connections) == 0)
    assert site.web.delete(f"/answers/{name}").status_code == 202
    assert site.events(name)[-1][2] == "cancelled"


@pytest.mark.slow
def test_lost_replies_double_and_lose_nothing_on_the_way_to_browsers(shared, monkeypatch) -> None:
    with Proxy("127.0.0.1", shared.port) as proxy, opened(Site(proxy.url, monkeypatch)) as site:
        site.model("scripted:pace=100")
        proxy.drop_reply(when=b"XADD")  # that of the first entry, for which the asker waits
        name = site.ask()
        lines = []
        with site.web.stream("GET", f"/answers/{name}/events") as reply:
            for number, event in enumerate(events_in(reply.iter_lines())):
                lines.append(event)
                if number % 25 == 3:
                    proxy.drop_reply(when=b"XADD")
                    proxy.drop_reply(when=b"XREAD")
        assert text_of(lines) == REPLY == text_of(site.events(name))
        assert [each[0] for each in lines] == [f"1-{number}" for number in range(1, len(lines) + 1)]
        assert proxy.dropped >= 10


@pytest.mark.slow
def test_the_web_recipe_starts_by_its_one_line(client) -> None:
    """What the notebook says, as a process: the module is read, the address printed, an answer streamed."""
    environment = os.environ | environment_of(client) | {"OPENAI_MODEL": "scripted:pace=0"}
    environment |= {"OPENAI_BASE_URL": scripted.server().url, "OPENAI_API_KEY": scripted.server().key}
    command = [sys.executable, "-m", "uvicorn", "recipe_async:app", "--limit-concurrency", "500", "--port", "0"]
    process = subprocess.Popen(command, cwd=FOLDER, env=environment, stderr=subprocess.PIPE, encoding="utf-8")
    try:
        line = next(line for line in process.stderr if "running on" in line)
        address = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
        asked = httpx.post(f"{address}/answers", json={"question": QUESTION}, timeout=30).json()
        reply = httpx.get(address + asked["events"], timeout=30)
        assert text_of(events_in(reply.text.splitlines())) == REPLY
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_the_notebook_runs_in_another_folder(tmp_path):
    notebook = nbformat.read(FOLDER / "05-take-home.ipynb", as_version=4)
    notebook.cells = notebook.cells[:11]  # all that has to do with the file
    client = NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=os.environ | {"PYTHONPATH": str(FOLDER.parent)})
    assert "the two parts are the whole answer: True" in notebook.cells[-1].outputs[0].text
    assert not (tmp_path / "recipe.py").exists()
