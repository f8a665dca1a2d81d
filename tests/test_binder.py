"""Binder without Docker: repo2docker's steps in its order, in a fresh home, as a user who may write nothing else.

Instead of installing the lock it makes the tests' own packages visible. LLMSTREAM_BINDER=python3.12 installs
everything with that Python, as Binder does, which takes minutes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
import redis
from websocket import create_connection

from llmstream_nb.llm.local import installed
from llmstream_nb.setup.environment import ROOT
from llmstream_nb.setup.redis_server import answers, free_port

from .test_environment import running, wait_until

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Binder's scripts are bash")

REAL = os.environ.get("LLMSTREAM_BINDER")
BASE, TOKEN = "/user/somebody-llmstream-nb-x1y2z3/", "0123abcd"
# BinderHub's command is a Python script too, which becomes JupyterLab; its name then is "-c".
COMMAND = ["python3", "-c", "import os, sys\n\nos.execvp('jupyter-lab', sys.argv)\n"]
SHOW = [sys.executable, "-c", "import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]))"]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "wheels", "backup-*")
JUPYTER_LAB = '#!/bin/sh\nexec python3 -m jupyterlab "$@"\n'


def unprivileged() -> list[str]:
    """What to put before a command. Not root, it may read everything, as this Python may lie in root's home."""
    if os.geteuid():
        return []
    if not shutil.which("setpriv"):
        pytest.skip("root needs setpriv to become somebody else")
    rights = [f"--{which}=-all,+dac_read_search" for which in ("inh-caps", "ambient-caps", "bounding-set")]
    return ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", *rights]


class Image:
    """A home folder that holds the repository, and an environment with what the build has installed."""

    def __init__(self, folder: Path) -> None:
        self.home, self.env = folder / "home" / "jovyan", folder / "conda"
        self.home.mkdir(parents=True)
        folder.chmod(0o755)
        own = ("LLMSTREAM", "JUPYTER", "PYTHON", "VIRTUAL_ENV", "REDIS_URL", "OPENAI", "XDG", "MPL", "IPYTHON")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        self.environment |= {
            "HOME": str(self.home),
            "REPO_DIR": str(self.home),
            "PATH": f"{self.home}/.local/bin:{self.env}/bin:{os.environ['PATH']}",
            "SHELL": "/bin/bash",
            "PYTHONUNBUFFERED": "1",
            "JUPYTERHUB_SERVICE_PREFIX": BASE,
            "BINDER_LAUNCH_HOST": "https://mybinder.org/",
            "CPU_LIMIT": "2.0",
            "MEM_LIMIT": "2147483648",
        }
        self._make_environment()
        # Terminals are login shells. Where the image's /etc/profile sets PATH again, Debian's takes it away.
        (self.home / ".bash_profile").write_text(f"PATH='{self.environment['PATH']}'\n")
        self._own(folder)

    def _make_environment(self) -> None:
        if REAL:
            subprocess.run([REAL, "-m", "venv", "--copies", self.env], check=True)
            return
        # --copies: bash takes no program on PATH that only a right as above lets it reach.
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--copies", self.env], check=True)
        site = next(self.env.glob("lib/python*/site-packages"))
        (site / "packages-of-the-tests.pth").write_text(sysconfig.get_path("purelib"))
        for name in ("share", "etc"):  # JupyterLab itself, and its extensions
            (self.env / name).symlink_to(Path(sys.prefix, name))
        (self.env / "bin" / "jupyter-lab").write_text(JUPYTER_LAB)
        (self.env / "bin" / "jupyter-lab").chmod(0o755)
        self.environment["PIP_NO_INDEX"] = "1"

    def copy(self, *names: str) -> None:
        """Copy files of the repository, to be the user's own."""
        for name in names:
            (self.home / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, self.home / name)
        if not names:
            shutil.copytree(ROOT, self.home, ignore=LEFT_OUT, dirs_exist_ok=True)
        self._own(self.home)

    def _own(self, folder: Path) -> None:
        if os.geteuid() == 0:
            for path in [folder, *folder.rglob("*")]:
                os.chown(path, 1000, 1000, follow_symlinks=False)

    def start(self, command: Sequence[str | Path], **changes: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*unprivileged(), *command],
            cwd=self.home,
            env=self.environment | changes,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # As there: a terminal that is closed ends what runs in it. Under nohup all of this would be born deaf to it.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # noqa: PLW1509 - it takes no lock
        )

    def run(self, *command: str | Path, **changes: str) -> str:
        """Run a command to its end, and that of all that holds its output, as Binder does."""
        process = self.start(command, **changes)
        output = process.communicate(timeout=1800 if REAL else 60)[0]
        assert process.returncode == 0, output
        return output


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """The image as repo2docker builds it."""
    if not shutil.which("redis-server"):
        pytest.skip("redis-server, which apt.txt brings, is not on PATH")
    if not REAL and not installed():
        pytest.skip("the local model is not installed")
    with tempfile.TemporaryDirectory(prefix="llmstream-binder-", ignore_cleanup_errors=True) as folder:
        made = Image(Path(folder).resolve())
        made.copy("binder/requirements.txt")  # alone: so this layer is kept until the lock changes
        made.run("python3", "-m", "pip", "install", "--no-cache-dir", "-r", "binder/requirements.txt")
        made.copy()
        made.run("./binder/postBuild")
        yield made


class Session:
    """A running Binder, seen through the one door it has: HTTP and WebSockets under its base URL."""

    def __init__(self, image: Image, **changes: str) -> None:
        self.port = free_port()
        settings = [
            f"--{app}.{name}" for app in ("NotebookApp", "ServerApp") for name in (f"base_url={BASE}", f"token={TOKEN}")
        ]
        command = [image.home / "binder" / "start", *COMMAND, "--ip=127.0.0.1", f"--port={self.port}", *settings]
        self.process = image.start(command, **changes)
        self.processes: list[psutil.Process] = []
        try:
            wait_until(lambda: self.process.poll() is not None or answers("127.0.0.1", self.port), 60)
            assert self.call("api/status")["started"]
        except BaseException:
            self.process.kill()
            print(self.process.communicate()[0])
            raise

    def call(self, path: str, /, **body: Any) -> Any:
        """GET, or with a body POST."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{BASE}{path}")
        request.add_header("Authorization", f"token {TOKEN}")
        if body:
            request.data = json.dumps(body).encode()
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.load(reply)

    def browse(self, *paths: str) -> str:
        """Go to one page after the other, with cookies; return the last one."""
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        pages = [browser.open(f"http://127.0.0.1:{self.port}{BASE}{path}", timeout=30).read() for path in paths]
        return pages[-1].decode()

    def connect(self, path: str) -> Any:
        where = f"ws://127.0.0.1:{self.port}{BASE}{path}"
        return create_connection(where, timeout=60, header=[f"Authorization: token {TOKEN}"])

    def run_cells(self, path: str, sources: Sequence[str]) -> list[str]:
        """Run code in a new kernel of a notebook as its page does; return what each cell has printed."""
        kernel = {"name": "python3"}
        session = self.call("api/sessions", path=path, name=path, type="notebook", kernel=kernel)
        socket = self.connect(f"api/kernels/{session['kernel']['id']}/channels")
        printed = [self._run_cell(socket, source) for source in sources]
        socket.close()
        return printed

    def _run_cell(self, socket: Any, source: str) -> str:
        header = {"msg_id": uuid.uuid4().hex, "msg_type": "execute_request", "version": "5.3", "session": "s"}
        content = {"code": source, "silent": False, "allow_stdin": False}
        message = {"header": header | {"username": "", "date": ""}, "channel": "shell", "content": content}
        socket.send(json.dumps(message | {"parent_header": {}, "metadata": {}, "buffers": []}))
        text, awaited = "", {"idle", "execute_reply"}
        while awaited:
            reply = socket.recv()
            got = json.loads(reply) if isinstance(reply, str) else {"parent_header": {}}  # bytes: of a widget
            if got["parent_header"].get("msg_id") == header["msg_id"]:
                assert got["msg_type"] != "error", got["content"]
                awaited -= {got["msg_type"], got["content"].get("execution_state")}
                text += got["content"].get("text", "") if got["msg_type"] == "stream" else ""
        return text

    def type_in_terminal(self, *lines: str, until: str) -> str:
        """Type into a new terminal; return what it shows, once the pattern `until` is there."""
        socket = self.connect(f"terminals/websocket/{self.call('api/terminals', cwd='')['name']}")
        socket.send(json.dumps(["stdin", "".join(f"{line}\r" for line in lines)]))
        shown = ""
        while not re.search(until, shown):
            kind, *rest = json.loads(socket.recv())
            shown += rest[0] if kind == "stdout" else ""
        socket.close()
        return shown

    def end(self, how: int) -> None:
        """End what `start` has become; all else ends by itself, and lets go of the output."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(how)
        self.output = self.process.communicate(timeout=60)[0]
        wait_until(lambda: not running(children), 30)
        self.processes = children


@contextlib.contextmanager
def session(image: Image, **changes: str) -> Iterator[Session]:
    started = Session(image, **changes)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.end(signal.SIGKILL)


def code_cells(name: str) -> list[str]:
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_a_notebook_runs_on_binder_and_terminals_share_its_redis_and_its_model(image):
    with session(image) as binder:
        settings = binder.call("lab/api/settings/@jupyterlab/apputils-extension:notification")
        assert settings["schema"]["properties"]["fetchNews"]["default"] == "false"  # no question over the notebook

        names = "REDIS_URL", "LLMSTREAM_LOCAL_URL", "LLMSTREAM_LOCAL_KEY"
        show = f"import os; print(*map(os.environ.get, {names}))"
        cells = [*code_cells("00-ask.ipynb"), "print(late.text)", show]
        *printed, late, places = binder.run_cells("notebooks/00-ask.ipynb", cells)
        assert late.strip() and late.strip() in [text.strip() for text in printed]  # another process has seen all of it
        assert not any("Binder" in text for text in printed)
        redis_url, model_url, key = places.split()
        with redis.Redis.from_url(redis_url) as client:
            assert client.exists("nb00:{tour}:chunks")
            program = os.path.basename(client.info("server")["executable"])
            assert client.config_get("bind")["bind"] == "127.0.0.1"
        packages = (ROOT / "binder" / "apt.txt").read_text().split()
        assert [package for package in packages if shutil.which(package)] == packages == ["redis-server"]
        assert "redis" in program

        shown = binder.type_in_terminal(
            "kit='python3 -m llmstream_nb'",
            "LLMSTREAM_PREFIX=nb00 $kit watch tour",
            "$kit worker & $kit ask --pool --model scripted:pace=300 'What is a Redis stream?'; kill %1; wait",
            "$kit doctor",
            "$kit redis",
            "echo lines' 'typed",
            until="lines typed",
        )
        assert shown.count("[stop · ") == 2, shown
        assert "All that is needed works." in shown, shown
        assert redis_url in shown and "redis-cli -h 127.0.0.1" in shown
        assert "2.1 GB of memory at most, and ends after ten idle minutes" in shown

        shown = binder.type_in_terminal("python3 -m llmstream_nb web --port 0", until=r"token=\S+\r")
        path = re.search(rf"{BASE}(proxy/\d+/\?token=\S+)", shown)[1]
        assert "<!doctype html>" in binder.browse(f"lab?token={TOKEN}", path).lower()

        def models() -> Any:
            asking = urllib.request.Request(f"{model_url}/models", headers={"Authorization": f"Bearer {key}"})
            with contextlib.suppress(OSError), urllib.request.urlopen(asking, timeout=60) as reply:
                return json.load(reply)

        wait_until(lambda: "smollm2-135m" in str(models()), 60)
        binder.end(signal.SIGTERM)
        assert len(binder.processes) >= 6  # Redis, the model, a guard for each, what started them, and a kernel
        assert "without encryption" not in binder.output  # as kernels warn, each at its start, unless it is set
        assert not answers("127.0.0.1", int(redis_url.rpartition(":")[2].partition("/")[0]))
    assert not (image.home / ".venv").exists()


def broken(image: Image, *programs: str) -> dict[str, str]:
    """A change of the environment in which these programs fail."""
    folder = Path(tempfile.mkdtemp(dir=image.home))
    for program in programs:
        (folder / program).write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n")
        (folder / program).chmod(0o755)
    folder.chmod(0o755)
    return {"PATH": f"{folder}:{image.environment['PATH']}"}


def test_without_a_redis_jupyterlab_opens_all_the_same_and_the_first_cell_says_so(image):
    with session(image, **broken(image, "redis-server", "valkey-server")) as binder:
        first, *_, found = binder.run_cells("notebooks/00-ask.ipynb", [*code_cells("00-ask.ipynb")[:1], "print(redis)"])
        assert first.startswith("This Binder has no Redis: ")
        assert first.count("\n") == 1
        assert found == "<Redis: fakeredis in this process>\n"
        binder.type_in_terminal("python3 -m llmstream_nb doctor", until="note +start +This Binder has no Redis")
        binder.end(signal.SIGKILL)
        assert "This Binder has no Redis" in binder.output  # which Binder keeps in .jupyter-server-log.txt


@pytest.mark.parametrize("what", ["python3", "mkfifo"])
def test_whatever_fails_the_command_is_started_as_it_was_given(image, what):
    given = ["two words", "", "$HOME", "a\nline"]
    output = image.run(image.home / "binder" / "start", *SHOW, *given, **broken(image, what))
    arguments, folder, environment = json.loads(output.splitlines()[-1])
    assert (arguments, folder) == (given, str(image.home))
    assert "REDIS_URL" not in environment
    assert "did not start" in environment["LLMSTREAM_NOTICE"]


def test_a_short_command_leaves_nothing_behind(image):
    output = image.run(image.home / "binder" / "start", *SHOW)  # which waits until nobody holds the output
    environment = json.loads(output.splitlines()[-1])[2]
    url = re.fullmatch(r"redis://default:\w{32}@127\.0\.0\.1:(\d+)/0", environment["REDIS_URL"])
    assert not answers("127.0.0.1", int(url[1]))
    assert "LLMSTREAM_NOTICE" not in environment


def test_start_goes_on_after_any_failure():
    lines = (ROOT / "binder" / "start").read_text().splitlines()
    assert lines[-1] == 'exec "$@"'
    assert not [line for line in lines if re.match(r"\s*(set|trap|exit)\b", line)]
