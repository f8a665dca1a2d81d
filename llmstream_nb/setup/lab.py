"""Start JupyterLab with what the notebooks need, a Redis and the local model's server; end all together."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from llmstream_nb.llm.local import free_port, installed, launch
from llmstream_nb.protocol.wire import LLMStreamError, Names
from llmstream_nb.setup.environment import ROOT, STATE, SetupError, say, try_lock
from llmstream_nb.setup.guard import end, guarded
from llmstream_nb.setup.restore import pristine
from llmstream_nb.setup.shared import share

FIRST_NOTEBOOK = "notebooks/00-ask.ipynb"
OLDEST = (6, 2)  # of Redis; Valkey began at 7.2
LAB_LOCK = STATE / "lab.lock"  # held by the lab whose Redis keeps its data in this checkout


class StartError(Exception):
    """Why a server did not start, in a few words."""


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


# -------------------------------------------------------------------------------------------------- Redis


def find_redis() -> tuple[str, str]:
    """The redis-server or valkey-server to start, and its name with version; raises StartError."""
    reason = "neither redis-server nor valkey-server is installed"
    for name in ("redis-server", "valkey-server"):
        if program := shutil.which(name):
            reason = f"{name} here is older than {'.'.join(map(str, OLDEST))} or does not run"
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                command = [program, "--version"]
                shown = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=10)
                version = re.search(r"v=(\d+)\.(\d+)\.(\d+)", shown)
                if version and (int(version[1]), int(version[2])) >= OLDEST:
                    return program, f"{name} {version[0][2:]}"
    raise StartError(reason)


def start_redis(folder: Path, lock: int | None = None) -> tuple[subprocess.Popen[bytes], str]:
    """Start a Redis on a free loopback port, with its append-only file in `folder`; return it and its URL.

    `lock` is the descriptor of a lock to hold for as long as the server runs. Raises StartError.
    """
    program, _ = find_redis()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartError(f"{folder} can't be made ({error.strerror})") from None
    port = free_port()
    options = {"bind": "127.0.0.1", "port": port, "protected-mode": "yes", "daemonize": "no", "save": ""}
    options |= {"dir": folder, "appendonly": "yes"}
    command = [program, *(str(word) for name, value in options.items() for word in (f"--{name}", value))]
    return _start_server(command, port, lock)


def start_fake_redis(lock: int | None = None) -> tuple[subprocess.Popen[bytes], str]:
    """Start a fakeredis in a process of its own, for all kernels; as `start_redis`."""
    port = free_port()
    return _start_server([sys.executable, "-m", "llmstream_nb.answers.embedded", "--serve", str(port)], port, lock)


def _start_server(command: list[str], port: int, lock: int | None) -> tuple[subprocess.Popen[bytes], str]:
    with tempfile.TemporaryFile() as log:
        process = guarded(command, hold=lock, stdout=log, stderr=subprocess.STDOUT, env=child_environment())
        deadline = time.monotonic() + 20
        while process.poll() is None and time.monotonic() < deadline:
            if answers("127.0.0.1", port):
                return process, f"redis://127.0.0.1:{port}/0"
            time.sleep(0.05)
        end(process)
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()
    raise StartError(f"{Path(command[0]).name} did not start ({lines[-1] if lines else 'it printed nothing'})")


def _choose_redis(stack: contextlib.ExitStack) -> str | None:
    """Use REDIS_URL, or start the best Redis that there is; say which, and return its URL."""
    if given := os.environ.get("REDIS_URL", "").strip():
        _say_given(given)
        return given
    lock = None
    with contextlib.suppress(OSError):
        STATE.mkdir(exist_ok=True)
        lock = try_lock(LAB_LOCK)
    if lock is not None:
        folder, kept = STATE / "redis", f"answers are kept in {STATE.name}/redis"
    else:  # two servers on the same files would spoil them
        temporary = tempfile.TemporaryDirectory(prefix="llmstream-", ignore_cleanup_errors=True)
        folder = Path(stack.enter_context(temporary))
        kept = "this folder is another lab's or can't be written, so answers end with lab"
    try:
        process, url = start_redis(folder, lock)
        say(f"Redis: {find_redis()[1]} at {url}; {kept}.")
    except StartError as reason:
        try:
            process, url = start_fake_redis(lock)
            say(f"Redis: the kit's own stand-in (fakeredis) at {url}, as {reason}; answers end with lab.")
        except StartError as other:
            say(f"Redis: each notebook has its own stand-in (fakeredis), as {reason}, and {other}.")
            return None
    stack.callback(end, process)
    return url


def _say_given(url: str) -> None:
    """Say that REDIS_URL is used, never its password, and whether anything answers there."""
    said = "as REDIS_URL says."
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        if host := parts.hostname:
            port = parts.port or 6379
            said = f"as REDIS_URL says, at {host}:{port}."
            if not answers(host, port):
                said = f"REDIS_URL is set, but nothing answers at {host}:{port}; the notebooks will say so too. "
                said += "Start that server, or unset REDIS_URL and start again."
    say(f"Redis: {said}")


# ---------------------------------------------------------------------------------------------------- lab


def lab(*, port: int | None, base_url: str | None, browser: bool, model: bool) -> int:
    """Open JupyterLab on the first notebook; return its exit code once it has ended.

    Everything it starts is ended with it: on Ctrl-C in order, and by the guards when this process is killed.
    Raises SetupError where JupyterLab could not start.
    """
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)  # `kill`, and a terminal that closes, are as Ctrl-C
    if port and answers("127.0.0.1", port):
        raise SetupError(f"port {port} is in use: choose another --port, or leave it out.")
    for what, why in hindrances():
        raise SetupError(f"{what}: {why}")
    # It takes a second, for an import. JupyterLab has the same to import, and much more, before it shows a notebook.
    threading.Thread(target=trust_notebooks, daemon=True).start()
    with contextlib.ExitStack() as stack:
        url = _choose_redis(stack)
        local = start_model(stack) if model else None
        kernels = Path(sys.prefix, "share", "jupyter")  # this Python's kernel, before any of the user's own
        # Lab's own question about news would cover a corner of the page, its warnings at a kernel's start the address.
        own = str(Path(__file__).with_name("jupyter"))  # and an extension for the course's links and pictures
        paths = os.pathsep.join(filter(None, [str(kernels), os.environ.get("JUPYTER_PATH"), own]))
        config = os.pathsep.join(filter(None, [os.environ.get("JUPYTER_CONFIG_PATH"), own]))
        servers = {"REDIS_URL": url, "LLMSTREAM_LOCAL_URL": local}
        share(stack, servers)
        environment = child_environment(JUPYTER_PATH=paths, JUPYTER_CONFIG_PATH=config, **servers)
        say("JupyterLab: starting. Ctrl-C in this terminal ends everything.")
        jupyter = guarded(_jupyter_command(port, base_url, browser), env=environment)
        stack.callback(end, jupyter)
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    # Windows does not interrupt a wait without end on Ctrl-C.
                    return jupyter.wait(0.5 if os.name == "nt" else None)
        except KeyboardInterrupt:
            say("\nEnding JupyterLab, its kernels and the servers ...")
            return 0


def hindrances() -> Iterator[tuple[str, str]]:
    """What in this environment stops `lab`: the name of a variable, and what there is to say and to do."""
    try:
        Names(os.environ.get("LLMSTREAM_PREFIX", "").strip() or "llmstream")
    except LLMStreamError as error:
        yield "LLMSTREAM_PREFIX", str(error)
    with contextlib.suppress(ImportError):  # not installed yet
        from jupyter_core.paths import jupyter_runtime_dir

        folder = jupyter_runtime_dir()
        there = next(each for each in [Path(folder), *Path(folder).parents] if os.path.exists(each))
        try:
            with tempfile.TemporaryFile(dir=there) as file:
                file.write(bytes(8192))
        except OSError as error:
            yield "HOME", f"{folder} can't be written ({error.strerror}): make room, or set it to a folder of your own"


def trust_notebooks() -> None:
    """Sign the notebooks as they came, as `jupyter trust` does.

    They come with outputs, and JupyterLab takes outputs that were not made here for a stranger's: it would not
    draw widgets from them, nor, after a reload, those of the learner's own runs.
    """
    with contextlib.suppress(Exception):  # without it all works but the reload
        import nbformat
        from nbformat.sign import NotebookNotary

        notary = NotebookNotary()
        for text in pristine().values():
            notary.sign(nbformat.reads(text, nbformat.NO_CONVERT))


def _jupyter_command(port: int | None, base_url: str | None, browser: bool) -> list[str]:
    start = f"/lab/tree/{FIRST_NOTEBOOK}" if (ROOT / FIRST_NOTEBOOK).exists() else "/lab"
    settings = {
        "Application.log_level": "WARN",  # else the address is hard to find among the news of a start
        "ServerApp.root_dir": str(ROOT),
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.base_url": base_url,
        "ServerApp.open_browser": browser,
        # On one machine no proxy cuts a silent connection, and tornado would warn of the timeout that pings need.
        "ServerApp.tornado_settings": {"ws_ping_interval": 0},
        "ServerApp.allow_root": hasattr(os, "geteuid") and os.geteuid() == 0,
        "ServerApp.jpserver_extensions": "llmstream_nb.setup.address=True",
        "LabApp.default_url": start,
    }
    options = [f"--{name}={value}" for name, value in settings.items() if value is not None]
    return [sys.executable, "-m", "jupyterlab", *options]


def start_model(stack: contextlib.ExitStack) -> str | None:
    """Start the local model's server, ended with `stack`, without waiting for it; return its URL, None without one."""
    if not installed():
        say("Model: the local one is not installed; the scripted answers and your own endpoint work.")
        return None
    process, port = launch(stdout=subprocess.DEVNULL)  # what it has to complain of stands in this terminal
    stack.callback(end, process)
    say(f"Model: SmolLM2-135M (real, small, invents facts) at http://127.0.0.1:{port}/v1.")
    return f"http://127.0.0.1:{port}/v1"
