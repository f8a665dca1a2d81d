"""Who comes in at the web server's door, and what the application does where another one holds it."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import socket
import stat
import subprocess
import sys
import threading
import uuid
import webbrowser
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlparse
from urllib.request import url2pathname

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import HTTPException
from redis import Redis
from starlette.routing import Mount
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from llmstream_nb.answers import connection
from llmstream_nb.answers.ask import Answer
from llmstream_nb.faults import servers
from llmstream_nb.pool.queue import enqueue
from llmstream_nb.pool.worker import Worker
from llmstream_nb.protocol.wire import ORIGIN
from llmstream_nb.setup import cli
from llmstream_nb.web import NotServed, WebServer, create_app, hub
from llmstream_nb.web import server as serving
from llmstream_nb.web.app import hub_of as hub_of_app

from .conftest import FAST, found
from .model import wait_for
from .test_web import hub_of, problem, says, serve, tasks_of  # noqa: F401 - fixtures
from .web import TOKEN, Slow, Writer, call, head, raw


@pytest.fixture
def backend() -> str:
    return "fake"


def threads() -> set[threading.Thread]:
    return {one for one in threading.enumerate() if one.name.startswith(("llmstream w", "llmstream m"))}


# ----------------------------------------------------------------------------------------------- mounted


@pytest.fixture
def mounted(client):
    """Serve an application that holds two of the kit's, without a lifespan; the event loop's end is all they learn."""
    host = FastAPI()
    apps = [create_app(client, token=TOKEN, timing=FAST) for _ in range(2)]
    host.mount("/llm", apps[0])
    host.mount("/other", apps[1])
    with socket.create_server(("127.0.0.1", 0)) as sock:
        server = uvicorn.Server(uvicorn.Config(host, log_level="warning", ws="none", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        server.port, server.apps, server.thread = sock.getsockname()[1], apps, thread
        wait_for(lambda: server.started)
        yield server
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def test_a_mounted_application_streams_asks_stops_and_ends_with_its_loop(client, mounted, says):  # noqa: F811
    for place in ("llm", "other"):
        assert call(mounted, "GET", f"{place}/sources").status == 200
        assert problem(call(mounted, "GET", f"{place}/sources", token=None), 401) == "NoToken"
        assert call(mounted, "GET", f"{place}/page.js", token=None).status == 200
        assert call(mounted, "GET", f"{place}/", token=None, accept="text/html").body.startswith(b"<!doctype")
        assert call(mounted, "GET", f"{place}/healthz", token=None).status == 200
        asked = call(mounted, "POST", f"{place}/answers", {"question": "why?"})
        assert asked.status == 201
        says[-1].say("half")
        assert call(mounted, "GET", f"{place}/{asked.json['answer']}").json["status"] in ("queued", "streaming")
    Writer(client, "a").say("x").end()
    reply = call(mounted, "GET", "llm/answers/a/events")
    assert reply.status == 200 and b"event: end" in reply.body
    answer_id = asked.json["id"]
    open_stream = socket.create_connection(("127.0.0.1", mounted.port))
    open_stream.sendall(head(mounted, "GET", f"other/answers/{answer_id}/events"))
    wait_for(lambda: mounted.apps[1].state.hub.viewers == 1)
    mounted.should_exit = True
    mounted.thread.join(60)
    open_stream.close()
    assert not mounted.thread.is_alive()
    assert Answer(answer_id, client=client).record["reason"] == "cancelled"  # nobody else could end it
    for app in mounted.apps:
        assert app.state.hub.closing and app.state.hub.viewers == 0 and app.state.hub.life.done()


def test_an_application_starts_and_ends_as_often_as_one_likes(client):
    Writer(client, "a").say("x").end()
    app = create_app(client, token=TOKEN, timing=FAST)
    hubs = []
    for told in (True, False, True, False):
        host = FastAPI(lifespan=(lambda _: app.router.lifespan_context(app)) if told else None)
        host.mount("/llm", app)
        with TestClient(host) as browser:
            for _ in range(2):
                assert "event: end" in browser.get(f"/llm/answers/a/events?token={TOKEN}").text
            hubs.append(app.state.hub)
        assert hubs[-1].closing and hubs[-1].life.done()
    assert len(set(hubs)) == 4


def test_an_application_has_one_reader_for_each_event_loop_and_start(client):
    app = create_app(client, token=TOKEN, timing=FAST)

    async def reader() -> hub.Hub:
        return hub_of_app(app)

    async def main() -> None:
        async with app.router.lifespan_context(app):
            first = await reader()
            assert await reader() is first and await first.answers()
        second = await reader()
        assert second is not first
        assert await asyncio.to_thread(asyncio.run, reader()) is not second

    asyncio.run(main())


def test_a_web_socket_is_refused(client):
    host = FastAPI()
    host.mount("/llm", create_app(client, token=TOKEN))
    with TestClient(host) as browser, pytest.raises(WebSocketDisconnect):
        browser.websocket_connect(f"/llm/x?token={TOKEN}").__enter__()


def test_a_server_starts_again(client):
    server = WebServer(client=client, timing=FAST)
    link = server.link()
    for _ in range(3):
        assert server.start().start() is server and server.link() == link
        assert call(server, "GET", "sources", token=server.token).status == 200
        server.stop()
        server.stop()
    with WebServer(server.port, client=client), pytest.raises(NotServed, match="choose another"):
        server.start()


# ------------------------------------------------------------------------------------------------ tokens


def test_servers_that_share_a_token_serve_the_same_pages(client, monkeypatch, serve):  # noqa: F811
    assert serve(token=None).token != serve(token=None).token
    monkeypatch.setenv("LLMSTREAM_WEB_TOKEN", f" {TOKEN}\n")
    assert [serve(token=None).token for _ in range(2)] == [TOKEN] * 2
    assert serve(token="mine").token == "mine"
    monkeypatch.setenv("LLMSTREAM_WEB_TOKEN", " ")
    assert len(serve(token=None).token) > 16


def test_the_command_takes_a_token_from_a_file(tmp_path, capsys):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert cli.parser().parse_args(["web", "--token-file", str(file)]).token == TOKEN
    assert cli.parser().parse_args(["web"]).token is None
    file.write_text(" \n")
    for path, said in [(file, "is empty: write a token"), (tmp_path / "none", "No such file")]:
        with pytest.raises(SystemExit):
            cli.parser().parse_args(["web", "--token-file", str(path)])
        assert said in capsys.readouterr().err


def test_an_owner_outlives_what_a_worker_writes(client, says):  # noqa: F811
    answer = enqueue("why?", client=client, timing=FAST, owner="ann")
    worker = Worker(source=lambda question, topic: iter(["so"]), client=client, timing=FAST).start()
    assert answer.wait(60).text == "so"
    wait_for(lambda: answer.record.get("reason") == "stop")
    worker.stop()
    assert answer.record["owner"] == "ann"


def test_the_link_stands_on_no_command_line(client, monkeypatch, serve):  # noqa: F811
    server, opened = serve(token='a"token&of<mine>'), []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    with server.in_browser():
        (address,) = opened
        assert server.token not in unquote(address) and address.startswith("file:///")
        page = Path(url2pathname(urlparse(address).path))
        assert stat.S_IMODE(page.stat().st_mode) == 0o600 and stat.S_IMODE(page.parent.stat().st_mode) == 0o700
        assert server.link().replace("&", "&amp;") in page.read_text()
    assert not page.exists() and not page.parent.exists()


def test_a_link_for_reading_alone(client, serve, says):  # noqa: F811
    server = serve()
    Writer(client, "a").say("x").end()
    Writer(client, "b").say("x")
    token = re.search("token=(.*)&answer=a$", server.link("a", read_only=True))[1]
    assert token != TOKEN and token == re.search("token=([^&]*)", serve().link("a", read_only=True))[1]
    for path in ("", "answers/a", "answers/a/events"):
        assert call(server, "GET", path, token=token).status == 200
    for method, path, body in [
        ("GET", "sources", None),
        ("POST", "answers", {"question": "why?"}),
        *(("DELETE", f"answers/{answer_id}", None) for answer_id in "ab"),
        *(("GET", path, None) for path in ("answers/b", "answers/b?answer=a", "answers/b/events", "answers/A")),
    ]:
        assert problem(call(server, method, path, body, token=token), 403) == "HTTP", path
    for forged in (token.replace("a.", "b.", 1), token[2:], token[1:], token[:-1], "a.", f"a.{TOKEN}"):
        assert problem(call(server, "GET", "answers/b", token=forged), 401) == "NoToken"
    assert not says and Answer("b", client=client).status == "streaming"
    for bad in (serve(token=""), server):
        with pytest.raises(ValueError, match="reading alone"):
            bad.link("a" if bad is not server else "", read_only=True)


# ------------------------------------------------------------------------------------------------ who may


def paths_of(app: FastAPI) -> list[tuple[str, str]]:
    """Every method and path that the application knows, but the static files."""
    return [(method, route.path) for route in app.routes if not isinstance(route, Mount) for method in route.methods]


def test_every_route_asks_who_may(client, says):  # noqa: F811
    Writer(client, "a~b").say("x")
    asked = []

    def authorize(request, answer_id, action):
        asked.append((request.method, request.url.path, answer_id, action))
        return False

    app = create_app(client, timing=FAST, authorize=authorize)
    routes = paths_of(app)
    # Those of the other API are asked for in its own tests: their errors have another form.
    routes = [route for route in routes if not route[1].startswith("/v1/")]
    assert {path for _, path in routes} >= {"/answers", "/answers/{answer_id}/events", "/sources", "/openapi.json"}
    with TestClient(app) as browser:
        for method, path in [*routes, ("GET", "/"), ("GET", "/index.html"), ("GET", "/x/y"), ("PUT", "/answers")]:
            reply = browser.request(method, path.replace("{answer_id}", "a%7Eb"), json={"question": "why?"})
            if path == "/healthz":
                assert reply.status_code == 200 and not asked
                continue
            assert reply.status_code == 403 and (method == "HEAD" or reply.json()["error"] == "HTTP"), (method, path)
            found = asked.pop()
            action = {"POST": "ask", "DELETE": "stop"}.get(method, "ask" if path == "/sources" else "read")
            assert found[2:] == ("a~b" if "{" in path else "", action) and not asked, (method, path)
    assert not says and Answer("a~b", client=client).status == "streaming"


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("later", [False, True])
def test_an_owner_is_kept_in_the_record_and_may_do_more_than_others(client, says, pool, later):  # noqa: F811
    """Each may ask, read what is theirs, and stop it; a header stands for a sign-in."""

    def authorize(request, answer_id, action):
        request.state.owner = request.headers.get("user")
        if not request.state.owner:
            raise HTTPException(401, "sign in first", {"WWW-Authenticate": "Basic"})
        if answer_id:
            return Answer(answer_id, client=client).record.get("owner") == request.state.owner
        return True

    async def asynchronous(*args):
        return await asyncio.to_thread(authorize, *args)

    app = create_app(client, timing=FAST, pool=pool, authorize=asynchronous if later else authorize)
    with TestClient(app) as browser:
        ann, bob = {"user": "ann"}, {"user": "bob"}
        nobody = browser.post("/answers", json={"question": "why?"})
        assert nobody.status_code == 401 and nobody.headers["www-authenticate"] == "Basic"
        assert nobody.json() == {"error": "HTTP", "message": "sign in first"} and not says
        assert browser.get("/", headers={"accept": "text/html"}).text.startswith("<!doctype")
        place = browser.post("/answers", json={"question": "why?"}, headers=ann).json()["answer"]
        assert Answer(place.rpartition("/")[2], client=client).record["owner"] == "ann"
        shown = browser.get(place, headers=ann)
        assert shown.status_code == 200 and "ann" not in shown.text
        for method, path in [("GET", place), ("GET", f"{place}/events"), ("DELETE", place), ("GET", "answers/none")]:
            assert browser.request(method, path, headers=bob).status_code == 403
        assert browser.get("answers/%20", headers=bob).status_code == 422  # what the function raised for a bad id
        assert browser.delete(place, headers=ann).json()["status"] == "ended"
        record = Answer(place.rpartition("/")[2], client=client).record
        assert (record["owner"], record["reason"]) == ("ann", "cancelled")


def test_one_who_may_not_be_asked_for_lack_of_redis_or_by_an_error(client, caplog):
    def broken(request, answer_id, action):
        if answer_id:
            raise connection.RedisUnusable("Redis is away")
        raise KeyError("hunter2")

    with TestClient(create_app(client, authorize=broken)) as browser:
        assert browser.get("/answers/a").json() == {"error": "RedisUnusable", "message": "Redis is away"}
        assert browser.get("/answers/a").status_code == 503
        reply = browser.get("/sources")
    assert reply.status_code == 500 and "hunter2" not in reply.text + caplog.text and "KeyError" in caplog.text


# ------------------------------------------------------------------------------------------------- hosts


def test_without_a_token_only_this_machines_names_will_do(client, serve):  # noqa: F811
    """A page whose name its owner lets lead to 127.0.0.1 has the server's origin, as browsers see it."""
    server, writer = serve(token="", hosts=["llm.example.org"]), Writer(client, "healthz").say("x")
    for host in ("127.0.0.1", "localhost", "[::1]"):
        assert call(server, "GET", "sources", token=None, host=f"{host}:{server.port}").status == 200
    assert call(server, "GET", "sources", token=None, host="llm.example.org").status == 200
    for host in (
        "evil.example",
        f"evil.example:{server.port}",
        "127.0.0.1",
        "127.0.0.1:1",
        "",
        "localhost.evil.example",
    ):
        for method, path in [("GET", ""), ("GET", "sources"), ("GET", "page.js"), ("DELETE", "answers/healthz")]:
            own = {"origin": f"http://{host}"} if method == "DELETE" else {}
            assert problem(call(server, method, path, token=None, host=host, **own), 403) == "ForeignHost", host
        assert call(server, "GET", "answers/healthz", token=None, host=host).status == 403
        assert call(server, "GET", "healthz", token=None, host=host).status == 200
    assert raw(server.port, b"GET /sources HTTP/1.0\r\n\r\n").status == 403
    assert call(serve(), "GET", "sources", host="hub.example.org").status == 200  # with one, any
    writer.end()


def test_behind_a_proxy_the_refusal_names_the_header(client, serve):  # noqa: F811
    reply = call(serve(), "POST", "answers", {"question": "why?"}, origin="https://llm.example.org")
    assert problem(reply, 403) == "ForeignOrigin" and "pass on the header Host" in reply.json["message"]
    reply = call(serve(token=""), "GET", "", token=None, host="backend")
    assert "pass on the header Host" in reply.json["message"] and "hosts=" in reply.json["message"]


# ------------------------------------------------------------------------------------------- connections


def test_who_says_nothing_or_half_is_closed_and_nobody_else(client, serve, monkeypatch):  # noqa: F811
    monkeypatch.setattr(serving, "ARRIVE", 0.4)
    server, writer = serve(), Writer(client, "a").say("x")
    before = len(tasks_of(server))
    line = head(server, "GET", "sources", connection="keep-alive")
    body = head(server, "POST", "answers", b"x" * 50, connection="keep-alive")[:-20]
    silent = {
        "nothing": b"",
        "half a line": b"GET /sou",
        "half a header": line[:-10],
        "half a body": body,
        "half a second request": line + line[:-10],
        "half a body in the second request": line + body,
        "a body with a GET that streams": head(server, "GET", "answers/a/events", b"x" * 50)[:-20],
    }
    watching = Slow(server, "a")
    watching.read()
    socks = {name: socket.create_connection(("127.0.0.1", server.port), timeout=60) for name in silent}
    for name, sock in socks.items():
        sock.sendall(silent[name])
    drip = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    stop = threading.Event()

    def dripping() -> None:
        for byte in b"GET /" + b"a" * 10_000:
            if stop.wait(0.05):
                return
            try:
                drip.send(bytes([byte]))
            except OSError:
                return

    thread = threading.Thread(target=dripping)
    thread.start()
    for name, sock in [*socks.items(), ("byte by byte", drip)]:
        with sock:
            got = b""
            try:
                while data := sock.recv(65_536):
                    got += data
            except ConnectionError:
                pass
            assert b" 500 " not in got and got.count(b"HTTP/1.1 200") == name.count("second") + name.count("GET"), name
    stop.set()
    thread.join()
    wait_for(lambda: len(server._server.server_state.connections) == 1)  # the one that watches stays
    writer.say("y").end()
    while not watching.done:
        watching.read()
    assert watching.watcher.text == "xy"
    watching.sock.close()
    wait_for(lambda: not server._server.server_state.connections and len(tasks_of(server)) <= before)


def test_many_connections_leave_files_for_others(client, monkeypatch):
    monkeypatch.setattr(serving, "_room", lambda: 20)
    with WebServer(client=client, token=TOKEN, timing=FAST) as server:
        connections = server._server.server_state.connections
        idle = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(60)]
        for sock in idle[25:]:
            with suppress(ConnectionError):
                assert not sock.recv(1)
        wait_for(lambda: len(connections) == 25)  # the server forgets one a moment after its client sees the end
        for sock in idle[:6]:
            sock.close()
        wait_for(lambda: len(connections) == 19)
        assert call(server, "GET", "sources").status == 503
        for sock in idle:
            sock.close()
        wait_for(lambda: not connections)
        assert call(server, "GET", "sources").status == 200


def test_connections_that_say_nothing_do_not_use_up_the_files_of_a_process(fake_tcp):
    limited = ["sh", "-c", 'ulimit -n 256; exec "$@"', "sh", sys.executable, "-m", "llmstream_nb"]
    given = os.environ | {"REDIS_URL": fake_tcp, "LLMSTREAM_NO_VENV": "1", "LLMSTREAM_WEB_TOKEN": TOKEN}
    process = subprocess.Popen(
        [*limited, "web", "--no-browser", "--port", "0"],
        env=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        server = SimpleNamespace(port=int(re.search(rf":(\d+)/\?token={TOKEN}$", process.stdout.readline())[1]))
        idle = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(400)]
        for sock in idle[160:]:
            with suppress(ConnectionError):
                assert not sock.recv(1)
        for sock in idle:
            sock.close()
        wait_for(lambda: call(server, "GET", "answers/a").status == 404)
    finally:
        process.terminate()
        said = process.communicate(timeout=60)[1]
    assert "Too many open files" not in said and "Traceback" not in said


def test_half_of_the_files_are_left(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    assert serving._room() == 128
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, 0))
    assert serving._room() == serving.MANY


# ------------------------------------------------------------------------------------------------ health


def test_health_is_told_to_anybody_and_nothing_else():
    with servers.RedisServer(found("redis-server")) as redis:
        client = connection.connect(redis.url, prefix=f"t{uuid.uuid4().hex[:10]}")
        with WebServer(client=client, token=TOKEN, timing=FAST) as server:

            def health() -> int:
                reply = call(server, "GET", "healthz", token=None, host="10.0.0.1")
                assert not reply.body and "evil" not in str(reply.headers)
                return reply.status

            assert health() == 200
            redis.kill()
            assert health() == 503
            redis.start()
            wait_for(lambda: health() == 200)
            redis.pause()
            assert health() == 503
            redis.resume()
            wait_for(lambda: health() == 200)
            assert call(server, "POST", "healthz", b"x").status == 405
        client.close()


# ----------------------------------------------------------------------------------------------- rubbish


def test_whatever_is_sent_leaves_nothing_behind(client, serve, says):  # noqa: F811
    """Every route, asked by those who send too much, too little, another's, and go away in the middle."""
    server = serve()
    Writer(client, "a").say("x").end()
    before = len(tasks_of(server))
    statuses = set()
    for method, path in [*paths_of(server._app), ("GET", "/"), ("GET", "/page.js"), ("GET", "/nothing")]:
        for answer_id in ("a", "zzz", "%00", "..", "x" * 65, "%F0%9F%92%A5"):
            place = path[1:].replace("{answer_id}", answer_id)
            for body in (None, b"", b"{", b"\xff" * 100, b"[" * 20_000, b"x" * 70_000):
                reply = call(server, method, place, body)
                statuses.add(reply.status)
                assert reply.status < 500 and (body is None or len(body) < 64_000 or reply.status == 413), (
                    place,
                    reply,
                )
            request = head(server, method, place, b'{"question": "why?"}', connection="keep-alive")
            for cut in (1, len(request) // 2, len(request) - 1):
                with socket.create_connection(("127.0.0.1", server.port)) as sock:
                    sock.sendall(request[:cut])
            with socket.create_connection(("127.0.0.1", server.port)) as sock:
                sock.sendall(request * 3 if method != "POST" else b"")
    assert statuses >= {200, 404, 413, 422}
    wait_for(lambda: not server._server.server_state.connections and len(tasks_of(server)) <= before)
    assert hub_of(server).viewers == 0 and not says


def test_foreign_names_do_not_break_the_search_for_a_route(client):
    Writer(client, "a").say("x").end()
    host = FastAPI()
    host.mount("/answers/{answer_id}", create_app(client, token=TOKEN))
    with TestClient(host) as browser:
        assert browser.get(f"/answers/z/answers/a?token={TOKEN}").json()["id"] == "a"


def test_a_client_that_the_server_can_not_follow_is_refused_at_once():
    with pytest.raises(connection.RedisUnusable, match="decode_responses"):
        WebServer(client=Redis())


def test_a_user_that_is_switched_off_is_told_to_those_who_watch():
    with servers.RedisServer(found("redis-server")) as server:
        owner, admin = connection.connect(server.url, prefix="off"), server.client()
        admin.acl_setuser("guest", enabled=True, passwords=["+pw"], keys=["*"], commands=["+@all"])
        guest = connection.connect(f"redis://guest:pw@127.0.0.1:{server.port}/0", prefix="off")
        Writer(owner, "a").say("one ")

        async def nothing() -> None: ...

        async def watch() -> str:
            watched, shown = hub.Hub(guest, FAST, 15.0, nothing), ""
            top, *_ = await watched.place("a")
            async for frame in watched.stream(hub.View("a"), ORIGIN, top):
                shown += frame.decode()
                if "one" in shown and admin.acl_getuser("guest")["flags"] == ["on"]:
                    admin.acl_setuser("guest", enabled=False)
                    admin.execute_command("CLIENT KILL", "USER", "guest")
            await watched.close()
            return shown

        assert "refused the user name or password" in asyncio.run(asyncio.wait_for(watch(), 20))
