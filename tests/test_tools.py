"""The fault tools do what they say: each test is an example of a fault, and of what redis-py makes of it."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from llmstream_nb.faults import servers
from llmstream_nb.faults.servers import RedisServer

from .model import wait_for
from .network import Proxy
from .schedules import Restorable
from .versions import SERVERS

NO_RETRY = Retry(NoBackoff(), 0)
ENTRY: dict[Any, Any] = {"text": "x"}


@pytest.fixture(scope="module")
def server(program: str) -> Iterator[RedisServer]:
    with RedisServer(program) as server:
        yield server


@pytest.fixture
def direct(server: RedisServer) -> Iterator[redis.Redis]:
    """A client that no fault meets, on an empty database."""
    with server.client() as client:
        client.flushall()
        yield client


@pytest.fixture
def proxy(server: RedisServer, direct: redis.Redis) -> Iterator[Proxy]:
    with Proxy("127.0.0.1", server.port) as proxy:
        yield proxy


@pytest.fixture(params=[*SERVERS, "fake-tcp"])
def any_proxy(request: pytest.FixtureRequest) -> Iterator[Proxy]:
    """A proxy in front of a server of each kind, fakeredis over TCP among them."""
    if request.param == "fake-tcp":
        port = urlsplit(request.getfixturevalue("fake_tcp")).port
    else:
        port = request.getfixturevalue("real_servers")[request.param].port
    with redis.Redis(port=port) as client:
        client.delete("s")
    with Proxy("127.0.0.1", port) as proxy:
        yield proxy


def strict(proxy: Proxy, **options: Any) -> redis.Redis:
    """A client that raises instead of trying again."""
    defaults = {"decode_responses": True, "retry": NO_RETRY}
    return redis.Redis.from_url(proxy.url, **defaults | options)


# The proxy


def test_default_client_adds_again_after_each_lost_reply(any_proxy: Proxy) -> None:
    with redis.Redis(port=any_proxy.port) as client:
        client.ping()
        any_proxy.drop_reply()
        client.xadd("s", ENTRY)
        assert client.xlen("s") == 2
        any_proxy.drop_reply(2, when=b"XADD")
        client.xadd("s", ENTRY)
        any_proxy.wait_dropped()
        assert client.xlen("s") == 5
        assert any_proxy.dropped == 3
        assert any_proxy.accepted == 4


def test_explicit_id_leaves_one_entry_and_raises(any_proxy: Proxy) -> None:
    with redis.Redis(port=any_proxy.port) as client:
        any_proxy.drop_reply(when=b"xadd")
        with pytest.raises(redis.ResponseError, match="equal or smaller"):
            client.xadd("s", ENTRY, id="1-0")
        assert client.xlen("s") == 1


def test_without_retries_a_lost_reply_raises(proxy: Proxy, direct: redis.Redis) -> None:
    proxy.drop_reply()
    with strict(proxy) as client, pytest.raises(redis.ConnectionError):
        client.xadd("s", ENTRY)
    assert direct.xlen("s") == 1


def test_lost_request_never_reaches_the_server(proxy: Proxy, direct: redis.Redis) -> None:
    proxy.drop_request(when=b"XADD")
    with strict(proxy) as client:
        assert client.xlen("s") == 0  # another command: let through
        with pytest.raises(redis.ConnectionError):
            client.xadd("s", ENTRY)
    assert direct.xlen("s") == 0


@pytest.mark.parametrize("transaction", [True, False])
def test_lost_reply_of_a_long_pipeline(proxy: Proxy, direct: redis.Redis, transaction: bool) -> None:
    """A pipeline of many TCP segments is one request: all of it is done before the cut."""
    proxy.drop_reply(when=b"1-150")  # in the middle
    with strict(proxy) as client, client.pipeline(transaction=transaction) as pipe:
        for seq in range(300):
            pipe.xadd("s", {"text": "x" * 2000}, id=f"1-{seq}")
        with pytest.raises(redis.ConnectionError):
            pipe.execute()
    assert direct.xlen("s") == 300


@pytest.mark.parametrize("transaction", [True, False])
def test_lost_request_of_a_long_pipeline(proxy: Proxy, direct: redis.Redis, transaction: bool) -> None:
    proxy.drop_request(when=b"1-150")
    with strict(proxy) as client, client.pipeline(transaction=transaction) as pipe:
        for seq in range(300):
            pipe.xadd("s", {"text": "x" * 2000}, id=f"1-{seq}")
        with pytest.raises(redis.ConnectionError):
            pipe.execute()
    assert proxy.dropped == 1
    assert direct.xlen("s") == 0


def test_transaction_that_dawdles_is_still_one_request(proxy: Proxy, direct: redis.Redis) -> None:
    proxy.drop_request(when=b"SET")
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=0.1) as client:
        client.sendall(b"*1\r\n$5\r\nMULTI\r\n")
        with pytest.raises(TimeoutError):  # held back until EXEC comes: else the server would say OK
            client.recv(1)
        client.sendall(b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$1\r\nv\r\n*1\r\n$4\r\nEXEC\r\n")
        client.settimeout(5)
        assert client.recv(1) == b""
    assert proxy.bytes_up == 0


def test_cut_in_the_middle_of_a_reply(proxy: Proxy, direct: redis.Redis) -> None:
    direct.set("k", "value")
    proxy.cut_mid_reply(keep=6, when=b"GET")  # of the reply's 11 bytes
    with strict(proxy) as client:
        client.ping()
        before = proxy.bytes_down
        with pytest.raises(redis.ConnectionError):
            client.get("k")
        assert proxy.bytes_down == before + 6
        assert client.get("k") == "value"


def test_reply_lost_in_silence_times_out(proxy: Proxy, direct: redis.Redis) -> None:
    proxy.drop_reply(cut=False)
    with strict(proxy, socket_timeout=0.3) as client, pytest.raises(redis.TimeoutError):
        client.xadd("s", ENTRY)
    proxy.wait_dropped()
    assert direct.xlen("s") == 1


def test_lost_reply_of_a_blocked_read(proxy: Proxy, direct: redis.Redis) -> None:
    """The reply is lost when it comes: the group has delivered the entry, its reader has not got it."""
    direct.xgroup_create("s", "g", mkstream=True)
    proxy.drop_reply(when=b"XREADGROUP")
    errors: list[Exception] = []

    def read() -> None:
        with strict(proxy) as client:
            try:
                client.xreadgroup("g", "me", {"s": ">"}, block=4000)
            except redis.ConnectionError as error:
                errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    wait_for(lambda: direct.info("clients")["blocked_clients"] == 1)
    assert proxy.dropped == 0
    direct.xadd("s", ENTRY)
    reader.join(60)
    assert len(errors) == 1
    assert direct.xpending("s", "g")["pending"] == 1


def test_cut_ends_open_connections_only(proxy: Proxy) -> None:
    with strict(proxy, single_connection_client=True) as client:
        client.ping()
        assert proxy.connections == 1
        proxy.cut()
        assert proxy.connections == 0
        with pytest.raises(redis.ConnectionError):
            client.ping()
        assert client.ping()
        assert proxy.accepted == 2


def test_blackhole_times_out_and_loses_what_fell_in(proxy: Proxy, direct: redis.Redis) -> None:
    with strict(proxy, socket_timeout=0.3) as client, strict(proxy, socket_timeout=0.3) as other:
        client.ping()
        proxy.blackhole()
        with pytest.raises(redis.TimeoutError):
            client.xadd("s", ENTRY)
        with pytest.raises(redis.TimeoutError):  # a new connection opens, and stays silent
            other.ping()
        proxy.heal()
        assert client.ping()
        assert direct.xlen("s") == 0


def test_blackhole_hides_that_the_server_has_gone(proxy: Proxy, direct: redis.Redis) -> None:
    with strict(proxy, socket_timeout=0.3, single_connection_client=True) as client:
        number = client.client_id()
        proxy.blackhole()
        assert direct.client_kill_filter(_id=str(number)) == 1
        with pytest.raises(redis.TimeoutError):
            client.ping()


def test_late_request_arrives_after_its_client_has_given_up(proxy: Proxy, direct: redis.Redis) -> None:
    with strict(proxy, socket_timeout=0.3) as client:
        client.ping()
        proxy.blackhole()
        with pytest.raises(redis.TimeoutError):
            client.xadd("s", ENTRY)
    assert direct.xlen("s") == 0
    proxy.heal(late=True)
    wait_for(lambda: direct.xlen("s") == 1)
    wait_for(lambda: proxy.connections == 0)


def test_delay_holds_requests_back(proxy: Proxy) -> None:
    with strict(proxy, socket_timeout=0.3) as client:
        client.ping()
        proxy.delay(30)
        with pytest.raises(redis.TimeoutError):
            client.ping()
        proxy.heal()
        assert client.ping()


def test_refuse_meets_new_connections_only(proxy: Proxy) -> None:
    with strict(proxy, single_connection_client=True) as old, strict(proxy) as new:
        old.ping()
        proxy.refuse()
        assert old.ping()
        with pytest.raises(redis.ConnectionError):
            new.ping()
        proxy.heal()
        assert new.ping()


def test_heal_forgets_faults_and_wait_dropped_is_bounded(proxy: Proxy) -> None:
    proxy.drop_reply()
    with pytest.raises(TimeoutError, match="1 of the drops"):
        proxy.wait_dropped(timeout=0.01)
    proxy.heal()
    proxy.wait_dropped()
    with strict(proxy) as client:
        assert client.ping()


def test_closed_proxy_leaves_no_thread_and_no_port(server: RedisServer) -> None:
    before = set(threading.enumerate())
    proxy = Proxy("127.0.0.1", server.port)
    with strict(proxy) as client:
        client.ping()
        proxy.blackhole()
        proxy.close()
        wait_for(lambda: set(threading.enumerate()) <= before)
        with pytest.raises(redis.ConnectionError):
            client.ping()


def test_a_cell_that_runs_again_gets_the_same_proxy_healed(server: RedisServer) -> None:
    before = set(threading.enumerate())
    proxy = Proxy.before(server.url)
    try:
        with strict(proxy) as client:
            proxy.drop_reply(when=b"PING")
            assert Proxy.before(server.url) is proxy
            assert client.ping()
        proxy.close()
        anew = Proxy.before(server.url)
        assert anew is not proxy
        with strict(anew) as client:
            assert client.ping()
    finally:
        Proxy.before(server.url).close()
    wait_for(lambda: set(threading.enumerate()) <= before)


def test_dead_server_behind_the_proxy_is_a_lost_connection(server: RedisServer) -> None:
    with (
        RedisServer(server.program) as mortal,
        Proxy("127.0.0.1", mortal.port) as proxy,
        strict(proxy) as client,
    ):
        client.ping()
        mortal.kill()
        for _ in range(2):
            with pytest.raises(redis.ConnectionError):
                client.ping()
        mortal.start()
        assert client.ping()


# The servers


def test_killed_server_comes_back_on_its_port_with_its_data(server: RedisServer) -> None:
    with RedisServer(server.program, appendfsync="always") as mortal, mortal.client(retry=NO_RETRY) as client:
        url = mortal.url
        client.xadd("s", ENTRY, id="1-0")
        mortal.kill()
        with pytest.raises(redis.ConnectionError):
            client.ping()
        mortal.start()
        assert mortal.url == url
        assert client.xrange("s") == [("1-0", ENTRY)]


@pytest.mark.parametrize("appendonly", ["yes", "no"])
def test_snapshot_brings_the_older_data_back(server: RedisServer, appendonly: str) -> None:
    with Restorable(server.program, appendonly=appendonly) as mortal, mortal.client() as client:
        client.xadd("s", ENTRY, id="1-0")
        mortal.snapshot()
        client.xadd("s", ENTRY, id="1-1")
        mortal.restore_snapshot()
        assert [entry_id for entry_id, _ in client.xrange("s")] == ["1-0"]
        mortal.wipe()
        assert client.dbsize() == 0
        mortal.restore_snapshot()
        assert client.xlen("s") == 1


def test_paused_server_lets_clients_time_out(server: RedisServer, direct: redis.Redis) -> None:
    with server.client(socket_timeout=0.3, retry=NO_RETRY) as client:
        client.ping()
        server.pause()
        try:
            with pytest.raises(redis.TimeoutError):
                client.ping()
        finally:
            server.resume()
        assert client.ping()


def test_options_reach_the_server(server: RedisServer) -> None:
    with (
        RedisServer(server.program, requirepass="p@ss/w#rd", maxmemory="2mb") as master,
        RedisServer(server.program, replicaof=f"127.0.0.1 {master.port}", masterauth="p@ss/w#rd") as replica,
    ):
        assert master.client().config_get("maxmemory") == {"maxmemory": "2097152"}
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=master.port, retry=NO_RETRY).ping()
        with pytest.raises(redis.ReadOnlyError):
            replica.client().set("k", 1)


def test_failed_start_shows_the_log_and_leaves_nothing(server: RedisServer, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path))
        with pytest.raises(RuntimeError, match=r"did not start:(.|\n)*no-such-option"):
            RedisServer(server.program, no_such_option=1)
    assert not list(tmp_path.iterdir())


def test_port_in_use_is_retried(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with RedisServer(server.program) as other:
        free = other.port + 1
        ports = iter([server.port, free])
        monkeypatch.setattr(servers, "free_port", lambda: next(ports))
        with RedisServer(server.program) as second:
            assert second.port == free


def test_nobody_takes_the_port_of_a_server_that_is_down(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even who begins with the same random numbers: clients of the dead one would be told things by a stranger."""
    with RedisServer(server.program) as mortal:
        free = servers.free_port()
        mortal.kill()
        with socket.create_server(("127.0.0.1", mortal.port)):
            pass  # it could be had
        ports = iter([mortal.port, free])
        monkeypatch.setattr(random.SystemRandom, "randrange", lambda *_: next(ports))
        assert servers.free_port() == free


@pytest.mark.slow
def test_killed_test_run_leaves_no_server(server: RedisServer, tmp_path: Path) -> None:
    script = f"""if True:
        from llmstream_nb.faults.servers import RedisServer
        server = RedisServer({server.program!r})
        print(server._process.pid, flush=True)
        input()
    """
    paths = {"PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(tmp_path), "TEMP": str(tmp_path)}
    run = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | paths
    )
    assert run.stdin
    assert run.stdout
    pid = int(run.stdout.readline())
    assert psutil.pid_exists(pid)
    run.kill()
    run.wait()
    wait_for(lambda: not psutil.pid_exists(pid) and not list(tmp_path.iterdir()))
    run.stdin.close()
    run.stdout.close()
