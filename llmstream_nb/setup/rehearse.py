"""Try within two minutes what can fail on stage; nothing of it is left behind."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmstream_nb.setup.environment import ROOT, SPACE
from llmstream_nb.setup.guard import end, guarded
from llmstream_nb.setup.redis_server import StartError, answers, find_redis, start_fake_redis, start_redis
from llmstream_nb.setup.shared import shared

OK, NOTE, PROBLEM = "OK", "note", "PROBLEM"
Check = tuple[str, str, str]  # verdict, subject, and what there is to say
WHOLE = 118.0  # seconds that all of it may take
STICK = 75.0  # seconds that the set-up from a stick may take
PORTS = {8888: "JupyterLab", 8700: "the web page", 6390: "the drill that stops Redis"}
MEMORY = 1_500_000_000  # bytes: JupyterLab, four kernels, three workers, the local model
QUESTION = "What happens if the producer dies in the middle of an answer?"


class Untried(Exception):
    """Why something was not tried, which need not be a problem."""


def rehearse(wheels: Path | None) -> Iterator[Check]:
    """Each check as soon as it is known, in the order in which a workshop needs what they try."""
    ends, served = time.monotonic() + WHOLE, list[Any]()
    with contextlib.ExitStack() as stack:  # ends and removes what was started, also what was given up

        def tried(subject: str, seconds: float, attempt: Callable[[], str], advice: str) -> Check:
            return within(min(seconds, max(1, ends - time.monotonic())), subject, attempt, advice)

        fill = "fill it anew: python3 -m llmstream_nb wheels DIR"
        yield tried("stick", STICK, lambda: _set_up_from(wheels, stack), fill)
        yield from _machine()
        if given := os.environ.get("REDIS_URL") or shared().get("REDIS_URL"):
            yield tried("Redis", 8, lambda: _write_and_read(given), "is it reachable from here? Else unset REDIS_URL")
        yield tried("Redis started", 8, lambda: _serve(stack, served), "install redis-server, or set REDIS_URL")
        if served:
            yield tried("scripted", 8, lambda: _scripted(served[0]), "python3 -m llmstream_nb lab mends .venv")
            yield tried("local model", 30, lambda: _local(served[0]), "go on without it: lab --no-model")
            yield tried("kill a worker", 14, lambda: _kill_a_worker(served[0]), "leave that drill and act out")
        yield tried("stop Redis", 14, _stop_redis, "leave that drill out")


def within(seconds: float, subject: str, attempt: Callable[[], str], advice: str) -> Check:
    """What came of an attempt, which is given up after so many seconds."""
    found = [(PROBLEM, subject, f"not done within {seconds:.0f} s: {advice}")]

    def run() -> None:
        try:
            found.append((OK, subject, attempt()))
        except Untried as why:
            found.append((NOTE, subject, str(why)))
        except Exception as error:  # noqa: BLE001 - whatever it is, the host is to know it before the room does
            found.append((PROBLEM, subject, f"{error or type(error).__name__}: {advice}"))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[-1]


def _set_up_from(wheels: Path | None, stack: contextlib.ExitStack) -> str:
    """Set the kit of a stick up as its taker does, in a folder that goes again."""
    if not wheels:
        raise Untried("not tried: name its folder by --wheels DIR")
    if (free := shutil.disk_usage(tempfile.gettempdir()).free) < SPACE:
        raise Untried(f"not tried: {tempfile.gettempdir()} has {free / 1e9:.1f} GB free, of {SPACE / 1e9:.1f} needed")
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="llmstream-", ignore_cleanup_errors=True))
    kit, copy, log = wheels / "llmstream-nb", Path(folder, "llmstream-nb"), Path(folder, "log")
    left = shutil.ignore_patterns(".*", "*.whl", "__pycache__")
    shutil.copytree(kit if kit.is_dir() else ROOT, copy, ignore=left)
    own = {name: value for name, value in os.environ.items() if not name.startswith(("LLMSTREAM", "PYTHON", "XDG"))}
    own |= dict.fromkeys(("HOME", "USERPROFILE", "LOCALAPPDATA"), folder)  # for the caches of uv and pip
    # Any command first sets up all that is missing; this one then finds nothing to do.
    command = [getattr(sys, "_base_executable", sys.executable), "-m", "llmstream_nb", "restore"]
    command += ["--wheels", str(wheels.resolve())]
    began = time.monotonic()
    with log.open("wb") as file:
        process = guarded(command, cwd=copy, env=own, stdout=file, stderr=subprocess.STDOUT)
    stack.callback(end, process)
    try:
        process.wait(STICK - 2)
    except subprocess.TimeoutExpired:
        raise Untried(f"not done in {STICK:g} s, so not known: try it by hand, see workshop/participants.md") from None
    said = log.read_text("utf-8", errors="replace").splitlines()
    if process.returncode:
        raise StartError(said[-1] if said else "it said nothing")
    without = " ".join(line.strip() for line in said if "oing on without" in line)
    return f"set up in {time.monotonic() - began:.0f} s, without a network. {without}".strip()


def _machine() -> Iterator[Check]:
    import psutil

    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            reached = answers("127.0.0.1", server.getsockname()[1])
    except OSError:
        reached = False
    yield (OK if reached else PROBLEM), "127.0.0.1", "can be reached" if reached else "can't be reached: a firewall?"
    for port, who in PORTS.items():
        if answers("127.0.0.1", port):
            yield NOTE, f"port {port}", f"is taken; {who} needs another one, unless it is {who} itself"
        else:
            yield OK, f"port {port}", f"is free for {who}"
    free = psutil.virtual_memory().available
    few = free < MEMORY
    more = f"; {MEMORY / 1e9:.1f} GB are needed: close other programs" if few else ""
    yield (PROBLEM if few else OK), "memory", f"{free / 1e9:.1f} GB free{more}"
    try:
        yield OK, "browser", f"{webbrowser.get().name} opens what lab prints"
    except webbrowser.Error:
        yield NOTE, "browser", "none is found: copy lab's address into one"


# --------------------------------------------------------------------------------------------- with a Redis


def _write_and_read(url: str) -> str:
    """Add an entry to the Redis that lab takes, read it, and delete it."""
    from llmstream_nb.answers.connection import connect, names_of, where

    client = connect(url)
    key = f"{names_of(client).prefix}:doctor"
    try:
        entry = client.xadd(key, {"kind": "text"})
        if client.xrange(key) != [(entry, {"kind": "text"})]:
            raise StartError(f"{where(client)} gave back another entry than it took")
    finally:
        client.delete(key)
    return f"{where(client)} takes an entry and gives it back"


def _serve(stack: contextlib.ExitStack, served: list[Any]) -> str:
    """Start what lab would start, with a folder of its own; leave a client of it in `served`."""
    from llmstream_nb.answers.connection import connect

    try:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="llmstream-", ignore_cleanup_errors=True))
        (process, url), name = start_redis(Path(folder)), find_redis().name
    except StartError:
        (process, url), name = start_fake_redis(), "the stand-in fakeredis"
    stack.callback(end, process)
    served.append(connect(url, prefix="doctor"))
    return f"{_write_and_read(url)}: {name}"


def _answered(client: Any, put: Callable[..., Any], pace: int, disturb: Callable[[str], None] | None = None) -> None:
    """Ask, `disturb` the answer's worker once there is some text, and read on; raise what differs from that text."""
    from llmstream_nb import Started, Text, read_answer
    from llmstream_nb.llm.prepared import reply

    answer, worker = put(QUESTION, source="scripted", model=f"scripted:pace={pace}", client=client), ""
    for event in read_answer(answer.id, client=client):
        if isinstance(event, Started):
            worker = str(event.data.get("worker"))
        elif disturb and isinstance(event, Text):
            disturb = disturb(worker)
    if answer.text != reply(QUESTION):
        raise StartError(f"it is {answer.status}, and not the whole text")


def _scripted(client: Any) -> str:
    from llmstream_nb import ask

    _answered(client, ask, 300)
    broken = ask(QUESTION, source="scripted", model="scripted:pace=300,drop=20", client=client).wait(5)
    if broken.status != "failed":
        raise StartError(f"a model that is cut off ends as {broken.status}")
    return "an answer streams to its end; a model that is cut off says so"


def _local(client: Any) -> str:
    from llmstream_nb import Text, ask, read_answer
    from llmstream_nb.llm.local import installed

    if not installed():
        raise Untried("not installed; python3 -m llmstream_nb lab brings it")
    answer = ask("What is a stream?", source="local", client=client)
    first = next((event for event in read_answer(answer.id, client=client) if isinstance(event, Text)), None)
    answer.stop()
    if not first:
        raise StartError(answer.record.get("message") or f"its answer {answer.status}")
    return "says its first word"


def _kill_a_worker(client: Any) -> str:
    """The drill, with shorter leases: two workers, of which the one that answers is killed."""
    from llmstream_nb import enqueue, start_process

    workers = {name: start_process(name, lease=1, client=client) for name in ("one", "two")}
    try:
        _answered(client, enqueue, 100, lambda worker: workers[worker].kill())
    finally:
        for process in workers.values():
            process.kill()
            process.wait()
    return "another worker takes over, and the answer is whole"


def _stop_redis() -> str:
    """The drill: a Redis of its own is ended in mid-answer, and comes back."""
    from llmstream_nb import ask
    from llmstream_nb.answers.connection import connect
    from llmstream_nb.faults.servers import RedisServer, available

    if "redis-server" not in available():
        raise Untried("redis-server is not on PATH: install it, or leave that drill out")

    with RedisServer() as server:

        def restart(_: str) -> None:
            server.kill()
            time.sleep(1)
            server.start()

        _answered(connect(server.url, prefix="doctor"), ask, 100, restart)
    return "the answer goes on when Redis is back, and is whole"
