"""Connecting: every way in which it can fail says what to do, and never shows a password."""

from __future__ import annotations

import asyncio
import http.server
import os
import re
import socketserver
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import redis
from fakeredis import FakeRedis
from redis.backoff import NoBackoff
from redis.retry import Retry

from llmstream_nb import AnswerView, tables
from llmstream_nb.answers import connection
from llmstream_nb.answers.ask import Answer, ask, clear
from llmstream_nb.answers.connection import (
    Line,
    Packer,
    RedisUnusable,
    async_client,
    connect,
    environment_of,
    masked,
    names_of,
)
from llmstream_nb.answers.read import aread_answer, read_answer
from llmstream_nb.faults import servers
from llmstream_nb.faults.proxy import Proxy
from llmstream_nb.pool.queue import enqueue
from llmstream_nb.pool.worker import Worker
from llmstream_nb.protocol.events import Event, Failed, text_of
from llmstream_nb.protocol.wire import LLMStreamError

from .conftest import FAST
from .model import Model, wait_for

SECRET = "s3cr3t/with@odd:chars"
QUOTED = "s3cr3t%2Fwith%40odd%3Achars"
needs_redis = pytest.mark.skipif("redis-server" not in servers.available(), reason="redis-server is not on PATH")


def refused(url: str, **options) -> str:
    """The message with which `connect` refuses."""
    with pytest.raises(RedisUnusable) as caught:
        connect(url, **options)
    shown = "".join(traceback.format_exception(caught.value))
    assert "s3cr3t" not in shown.replace(repr(url), "").replace(url, ""), shown  # what a notebook would show
    text = str(caught.value)
    assert "s3cr3t" not in text and "odd" not in text, text
    return text


def test_without_a_url_there_is_a_redis_in_this_process_that_others_can_join(monkeypatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    client = connect(prefix="conn")
    assert repr(client) == "<Redis: fakeredis in this process>"
    client.set("conn:x", "é\r\n\0")
    code = "from llmstream_nb import connect; r = connect(); print(ascii(r.get('conn:x')), r.names.prefix)"
    env = os.environ | environment_of(client)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [ascii("é\r\n\0"), "conn"], done.stderr


def test_only_who_has_the_password_joins_the_redis_of_this_process(monkeypatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    url = environment_of(connect(prefix="conn"))["REDIS_URL"]
    place = url.partition("@")[2]
    assert "wants a password" in refused(f"redis://{place}")
    assert "refused the user name or password" in refused(f"redis://:{QUOTED}@{place}")
    assert repr(connect(url)) == f"<Fakeredis: redis://***@{place}>"
    with redis.Redis.from_url(url, protocol=3) as client:  # which logs in with HELLO
        assert client.ping()


def test_a_client_says_what_serves_it(shared) -> None:
    client = connect(shared.url)
    assert re.fullmatch(r"<(Redis|Valkey) \d+\.\d+\.\d+: redis://127.0.0.1:\d+/0>", repr(client))


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:6379", "foo", f":{SECRET}@127.0.0.1", f"http://:{QUOTED}@127.0.0.1:6379", "redis://127.0.0.1:port/0",
        f"redis://:{SECRET}@127.0.0.1:6379/0", "redis://[::1", "redis://127.0.0.1:99999", "redis://127.0.0.1:6379/0?db=x",
    ],
)  # fmt: skip
def test_a_malformed_url_is_told(url: str) -> None:
    assert "should look like redis://" in refused(url)


@pytest.mark.parametrize(
    "url", [f"redis://user:{QUOTED}@127.0.0.1:1/0", "redis://nosuchhost.invalid:6379", "redis://a..b:6379"]
)
def test_an_unreachable_server_is_told(url: str) -> None:
    assert "can't be reached" in refused(url)


def test_an_unknown_option_in_the_url_is_told() -> None:
    assert "URL" in refused("redis://127.0.0.1:1/0?nonsense=1")


def test_a_silent_server_is_told_in_time() -> None:
    with servers_that_say(None) as port:
        assert "in time" in refused(f"redis://:{QUOTED}@127.0.0.1:{port}/0", socket_timeout=0.3)


def test_what_is_no_redis_is_told() -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    server.RequestHandlerClass.log_message = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert "no Redis" in refused(f"redis://127.0.0.1:{server.server_address[1]}/0", socket_timeout=2)
    finally:
        server.shutdown()
        server.server_close()


def test_a_redis_that_is_too_old_is_told() -> None:
    with servers_that_say("redis_version:5.0.7\r\nrole:master\r\n") as port:
        assert "5.0.7" in refused(f"redis://127.0.0.1:{port}/0")
    with servers_that_say("redis_version:6.2.0\r\nrole:master\r\n") as port:
        connect(f"redis://127.0.0.1:{port}/0").close()


class servers_that_say:  # noqa: N801 - reads as a context
    """A server that answers PING, and INFO with this text; with None it accepts and says nothing."""

    def __init__(self, info: str | None) -> None:
        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while line := self.rfile.readline():
                    word = line.strip().upper()
                    if info is None:
                        continue
                    if word == b"PING":
                        self.wfile.write(b"+PONG\r\n")
                    elif word == b"INFO":
                        self.wfile.write(b"$%d\r\n%s\r\n" % (len(info), info.encode()))
                    elif word == b"SETINFO":
                        self.wfile.write(b"+OK\r\n")

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.block_on_close = True, False

    def __enter__(self) -> int:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return int(self.server.server_address[1])

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


# --------------------------------------------------------------------------------------- a server with a password


@pytest.fixture(scope="module")
def locked(program) -> Iterator[servers.RedisServer]:
    with servers.RedisServer(program, requirepass=SECRET) as server:
        yield server


def test_a_password_goes_in_and_never_comes_out(locked, capsys) -> None:
    client = connect(locked.url, prefix="locked")
    assert client.ping() and "s3cr3t" not in repr(client) + str(client) + masked(locked.url)
    assert ask("?", source=lambda q, t: iter(["ok"]), client=client).wait(60).text == "ok"
    code = "from llmstream_nb import connect; print(connect())"
    env = os.environ | environment_of(client)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "s3cr3t" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "url",
    [
        "redis://h/0?password=abc@s3cr3t",
        "redis://user:s3cr3t:127.0.0.1:6379/0",
        "redis://u:s3cr3t@h:1/0",
        "s3cr3t",
        "redis://127.0.0.1:s3cr3t/0",
        "redis://h:s3cr3t",
        "redis+sentinel://:s3cr3t@h:1,h:2/name/0?sentinel_password=s3cr3t",
    ],
)
def test_a_url_is_quoted_without_what_may_be_a_password(url: str) -> None:
    assert "s3cr3t" not in masked(url)
    assert masked("redis://[::1]:6379/0") == "redis://[::1]:6379/0"
    assert masked("redis+sentinel://u:p@h:1,[::1]:2/name/0?x=y") == "redis+sentinel://***@h:1,[::1]:2/name/0"


def test_a_password_that_a_url_cannot_hold_as_it_is_gets_the_hint() -> None:
    assert "written %40 %3A %2F" in refused("redis://:s3cr3t/odd@127.0.0.1:6379/0")


def test_a_wrong_or_missing_password_is_told(locked) -> None:
    assert "refused the user name or password" in refused(f"redis://:wrong-{QUOTED}@127.0.0.1:{locked.port}/0")
    assert "wants a password" in refused(f"redis://127.0.0.1:{locked.port}/0")


def test_tls_to_a_port_without_is_told_without_long_retries(locked) -> None:
    began = time.monotonic()
    refused(f"rediss://:{QUOTED}@127.0.0.1:{locked.port}/0", socket_timeout=1, socket_connect_timeout=1)
    assert time.monotonic() - began < 10  # a bound against waiting for ever, not a speed


def test_a_read_only_replica_is_told(shared) -> None:
    with servers.RedisServer(shared.program, replicaof=f"127.0.0.1 {shared.port}") as replica:
        assert "read-only replica" in refused(replica.url)


def test_a_full_memory_is_told_and_the_text_is_not_lost(program) -> None:
    from llmstream_nb.protocol.wire import Timing

    with servers.RedisServer(program, maxmemory_policy="noeviction") as server, server.client() as admin:
        full = admin.info("memory")["used_memory"] // 2  # servers differ in what an empty one takes
        client = connect(server.url, prefix="full")
        admin.config_set("maxmemory", full)
        with pytest.raises(LLMStreamError, match="out of memory"):
            ask("?", source=lambda q, t: iter(["x"]), client=client)
        admin.config_set("maxmemory", 0)
        ready, go = threading.Event(), threading.Event()

        def source(question, topic):
            yield "before "
            ready.set()
            go.wait(60)
            yield "after"

        answer = ask("?", source=source, client=client, timing=Timing(lease=1, tick=0.05, give_up=1))
        ready.wait(60)
        wait_for(lambda: answer.text == "before ")
        admin.config_set("maxmemory", full)
        go.set()
        with pytest.raises(LLMStreamError, match="out of memory"):
            answer.wait(60)
        assert answer.text == "before after"


def test_a_user_limited_to_a_prefix_can_work(shared) -> None:
    admin = shared.client()
    admin.execute_command(
        "ACL", "SETUSER", "limited", "reset", "on", f">{SECRET}", "~class:*", "+@all", "-@admin", "-@dangerous"
    )
    url = f"redis://limited:{QUOTED}@127.0.0.1:{shared.port}/0"
    client = connect(url, prefix="class")
    assert ask("?", source=lambda q, t: iter(["ok"]), client=client).wait(60).text == "ok"
    with pytest.raises(LLMStreamError, match="does not let this user"):
        ask("?", source=lambda q, t: iter(["ok"]), client=connect(url, prefix="other"))
    admin.execute_command("ACL", "DELUSER", "limited")


@needs_redis
def test_a_protocol_in_the_url_changes_nothing(locked) -> None:
    client = connect(f"{locked.url}?protocol=3&socket_timeout=2", prefix="locked")
    assert ask("?", source=lambda q, t: iter(["ok"]), client=client).wait(60).text == "ok"
    assert client.get_connection_kwargs()["socket_timeout"] == 2


# ------------------------------------------------------------------------------- refused in the middle of an answer

GUEST = "~class:* +@all -@admin -@dangerous"


class Guest:
    """A user of a server, who may be refused this or that while an answer of its is written."""

    def __init__(self, server: servers.RedisServer) -> None:
        self.admin = server.client()
        self.rule("reset", "on", f">{SECRET}", *GUEST.split())
        self.url = f"redis://guest:{QUOTED}@127.0.0.1:{server.port}/0"
        self.client = connect(self.url, prefix="class")

    def rule(self, *words: str) -> None:
        self.admin.execute_command("ACL", "SETUSER", "guest", *words)

    def ask(self) -> tuple[Answer, Model]:
        says = Model("one ")
        answer = ask("?", source=lambda q, t: says, client=self.client, timing=FAST, id="a", replace=True)
        wait_for(lambda: answer.text == "one ")
        return answer, says


@pytest.fixture
def guest(locked) -> Iterator[Guest]:
    made = Guest(locked)
    yield made
    made.client.close()
    made.admin.execute_command("ACL", "DELUSER", "guest")


@needs_redis
@pytest.mark.parametrize("command", ["multi", "set"])  # as a batch, and the lease, need it
def test_what_a_producer_may_do_no_more_is_an_error_that_all_see(guest, command) -> None:
    answer, says = guest.ask()
    guest.rule(f"-{command}")
    says.say("two ", "three ")
    *_, last = read_answer("a", client=guest.client, timing=FAST)
    assert isinstance(last, Failed) and "does not let this user do that" in last.message
    with pytest.raises(RedisUnusable, match="does not let this user"):
        answer.wait(60)
    assert answer.text == answer.look().text and answer.text.startswith("one ")


@pytest.mark.slow
@needs_redis
@pytest.mark.parametrize(
    ("rules", "words"),
    [(["-xadd"], "does not let this user do that"), (["off"], "refused the user"), (["resetpass", ">x"], "refused the user")],
)  # fmt: skip
def test_what_only_the_producer_knows_is_told_by_a_view(guest, rules, words) -> None:
    answer, says = guest.ask()
    view = AnswerView(answer)
    wait_for(lambda: view.text == "one ")
    guest.rule(*rules)
    if rules != ["-xadd"]:
        guest.admin.client_kill_filter(user="guest")
    says.say("two ")
    wait_for(lambda: view.state == "failed")
    assert words in view.note and "s3cr3t" not in view.note
    assert answer.text == "one two "


@pytest.mark.slow
@needs_redis
def test_what_only_the_producer_knows_is_told_in_the_terminal(guest) -> None:
    env = os.environ | environment_of(guest.client) | {"LLMSTREAM_NO_VENV": "1", "LLMSTREAM_LLM": "scripted"}
    command = [sys.executable, "-m", "llmstream_nb", "ask", "What is a consumer group?"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr and process.stderr.readline().startswith("id ") and process.stdout
        process.stdout.read(1)
        guest.rule("-xadd")
        errors = process.communicate(timeout=60)[1]
    assert "does not let this user do that" in errors and process.returncode == 1


@needs_redis
def test_too_many_clients_is_told_at_once() -> None:
    with servers.RedisServer(maxclients=12) as server, ExitStack() as others:
        client = connect(server.url, prefix="full")
        client.ping()
        others.callback(client.close)
        while True:
            try:
                other = server.client(retry=Retry(NoBackoff(), 0))
                others.callback(other.close)
                other.ping()
            except redis.ConnectionError:
                break
        began = time.monotonic()
        answer = ask("?", source=lambda q, t: iter(["ok"]), client=client)
        view = AnswerView(answer)
        for look in (
            answer.wait,
            lambda: list(read_answer(answer.id, client=client)),
            lambda: asyncio.run(all_of(answer)),
        ):
            with pytest.raises(RedisUnusable, match="maxclients"):
                look()
        wait_for(lambda: "maxclients" in view.note)
        assert time.monotonic() - began < 20  # a bound against waiting for ever, not a speed


async def all_of(answer: Answer) -> list[Event]:
    return [event async for event in aread_answer(answer.id, client=answer.client)]


# ----------------------------------------------------------------------------------------- clients of one's own


@needs_redis
def test_a_client_of_ones_own_works_everywhere_and_two_are_not_mixed_up(locked, real_servers, monkeypatch) -> None:
    monkeypatch.setenv("LLMSTREAM_PREFIX", "own")
    monkeypatch.setenv("REDIS_URL", real_servers["redis-server"].url)
    connect()
    own = redis.Redis(port=locked.port, password=SECRET, db=3, decode_responses=True)
    answer = ask("?", source=lambda q, t: iter(["ok"]), client=own, id="a", timing=FAST).wait(60)
    view = AnswerView(answer)
    assert text_of(read_answer("a", client=own)) == text_of(asyncio.run(all_of(answer))) == "ok"
    wait_for(lambda: view.text == "ok")
    assert list(tables.answers(client=own)["id"]) == ["a"] and tables.answers().empty
    assert Answer("a").status == "missing"
    code = "from llmstream_nb import Answer; print(Answer('a').text)"
    env = os.environ | environment_of(own)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "ok\n", done.stderr
    clear(client=own)
    own.close()


@needs_redis
def test_a_password_beside_the_url_reaches_other_processes(locked) -> None:
    client = connect(f"redis://127.0.0.1:{locked.port}?db=2", password=SECRET, prefix="beside")
    assert environment_of(client)["REDIS_URL"] == f"redis://127.0.0.1:{locked.port}?db=2&password={QUOTED}"
    client.close()


@pytest.mark.parametrize("options", [{}, {"decode_responses": True, "protocol": 3}])
def test_a_client_whose_replies_are_of_another_kind_is_refused(options) -> None:
    own = redis.Redis(**options)
    calls = [
        lambda: ask("?", source="scripted", client=own), lambda: list(read_answer("a", client=own)),
        lambda: Answer("a", client=own).status, lambda: tables.answers(client=own), lambda: AnswerView("a", client=own),
        lambda: environment_of(own), lambda: Worker(client=own), lambda: enqueue("?", client=own),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(RedisUnusable, match="use connect"):
            call()


def test_a_fake_of_ones_own_is_not_taken_for_the_kits() -> None:
    own = FakeRedis(decode_responses=True)
    assert ask("?", source=lambda q, t: iter(["ok"]), client=own, id="a").wait(60).text == "ok"
    with pytest.raises(RedisUnusable, match="use connect"):
        environment_of(own)


# ------------------------------------------------------------------------------------------------------- Line


def test_a_line_never_reconnects_unasked(shared) -> None:
    with Proxy("127.0.0.1", shared.port) as proxy:
        line = Line(connect(proxy.url))
        assert line.redis.ping()
        proxy.cut()
        for attempt in (line.redis.ping, lambda: line.redis.pipeline().set("x", "1").execute(), line.redis.ping):
            with pytest.raises(redis.ConnectionError):
                attempt()
        line.reopen()
        assert line.redis.ping()
        line.close()


@pytest.mark.parametrize(
    "command",
    [("XADD", "llmstream:{a}:chunks", "NOMKSTREAM", "1-0", "text", "naïve 😀\x00\r\n", "ms", 12), ("XINFO STREAM", "k"),
     ("PING",), ("SET", "", b"\xff", "PX", 1.5)],
)  # fmt: skip
def test_a_command_is_packed_as_redis_py_does_it(command: tuple) -> None:
    assert b"".join(Packer().pack(*command)) == b"".join(redis.Connection().pack_command(*command))


def test_names_come_from_the_client_or_the_environment(client, monkeypatch) -> None:
    assert names_of(client).prefix.startswith("t")
    monkeypatch.setenv("LLMSTREAM_PREFIX", "elsewhere")
    assert names_of(redis.Redis(decode_responses=True)).prefix == "elsewhere"
    monkeypatch.setenv("LLMSTREAM_PREFIX", "a{b}")
    with pytest.raises(ValueError, match="prefix"):
        connect()


def test_words_of_a_model_in_an_error_are_not_taken_for_the_error(client) -> None:
    error = redis.ResponseError(
        "Command # 1 (XADD k * text NOAUTH OOM WRONGTYPE) of pipeline caused error: MISCONF no disk"
    )
    assert "can't save its data" in str(connection.unusable(error, client)) and connection.is_passing(error)


def test_the_current_connection_is_the_last_one_made(client) -> None:
    assert connection.current() is client


def test_a_connection_for_asyncio_that_failed_is_not_used_again(shared) -> None:
    async def main() -> None:
        made = async_client(connect(shared.url), 1)
        await made.ping()
        old = await made.connection_pool.get_connection()
        await made.connection_pool.release(old)

        async def refuses() -> None:
            raise redis.ConnectionError("another server is meant")

        old.check_health = refuses
        with pytest.raises(redis.ConnectionError):
            await made.ping()
        assert not old.is_connected
        await made.aclose()

    asyncio.run(main())


def test_a_tls_client_of_ones_own_is_followed_in_asyncio_and_an_address_of_ipv6_told() -> None:
    own = redis.Redis(host="::1", port=1, ssl=True, ssl_ca_certs="ca.pem", decode_responses=True)
    assert environment_of(own)["REDIS_URL"].startswith("rediss://[::1]:1/0")

    async def main() -> None:
        pool = async_client(own, 1).connection_pool
        connection = pool.make_connection()
        assert (connection.host, connection.port, connection.ssl_context.ca_certs) == ("::1", 1, "ca.pem")

    asyncio.run(main())
