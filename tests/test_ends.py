"""How commands start and end where something is in their way, and what of them is left: nothing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis

from llmstream_nb import Worker, ask, connect
from llmstream_nb.answers.connection import names_of
from llmstream_nb.faults import servers
from llmstream_nb.llm import scripted
from llmstream_nb.protocol.wire import DAY
from llmstream_nb.setup.environment import ROOT
from llmstream_nb.setup.guard import end, guarded

from .conftest import FAST
from .model import wait_for
from .test_environment import running, tree, wait_until

posix = pytest.mark.skipif(os.name == "nt", reason="signals, shells and rights are POSIX here")
needs_redis = pytest.mark.skipif("redis-server" not in servers.available(), reason="redis-server is not on PATH")
QUICK = ("--model", "scripted:pace=300")
ASK = f"ask 'What is a Redis stream?' {' '.join(QUICK)}"


@pytest.fixture
def kit(tmp_path) -> Path:
    """A checkout of its own, with two notebooks as they came, and a home folder."""
    root = tmp_path / "kit"
    shutil.copytree(ROOT / "llmstream_nb", root / "llmstream_nb", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "notebooks").mkdir()
    (root / "home").mkdir()
    for file in (ROOT / "pyproject.toml", *ROOT.glob("requirements*.txt")):
        shutil.copy(file, root)
    for name in ("00-ask.ipynb", "04-groups.ipynb"):
        (root / "notebooks" / name).write_text("as it came")
    shutil.copytree(root / "notebooks", root / ".llmstream" / "pristine")
    return root


def environ(kit: Path, **changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LLMSTREAM", "JUPYTER", "REDIS"))}
    own = {"HOME": str(kit / "home"), "LLMSTREAM_NO_VENV": "1", "LLMSTREAM_LLM": "scripted", "PYTHONPATH": str(kit)}
    return kept | own | changes


def start(kit: Path, *command: str, **options) -> subprocess.Popen:
    """Start one of the kit's commands; all that it says is read together."""
    changes = {name: options.pop(name) for name in list(options) if name.isupper()}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | options
    command = (sys.executable, "-m", "llmstream_nb", *command)
    return subprocess.Popen(command, cwd=kit, env=environ(kit, **changes), text=True, **pipes)


def run(kit: Path, *command: str, **options) -> tuple[int, str]:
    process = start(kit, *command, **options)
    said = process.communicate(timeout=60)[0]
    assert "Traceback" not in said, said
    return process.returncode, said


def shell(kit: Path, line: str, **changes: str) -> tuple[int, str, str]:
    """What a shell makes of a line in which `kit` is the command line: exit code, and what it printed where."""
    line = line.replace("kit ", f"'{sys.executable}' -m llmstream_nb ", 1)
    done = subprocess.run(
        ["bash", "-c", line], cwd=kit, env=environ(kit, **changes), capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def until(process: subprocess.Popen, pattern: str) -> re.Match[str]:
    """Read what it prints until that is there."""
    said = ""
    for line in process.stdout:
        said += line
        if found := re.search(pattern, line):
            return found
    raise AssertionError(said)


# ------------------------------------------------------------------------------------------- what is in the way


@posix
@pytest.mark.parametrize(
    ("command", "how", "code", "why"),
    [
        (ASK, ">&-", 1, "Bad file descriptor"),
        ("doctor", "> /dev/full", 1, "No space left"),
        ("doctor", "| head -c 0; exit ${PIPESTATUS[0]}", 141, ""),
        (ASK, "2>&-", 0, ""),
        ("doctor", "2> /dev/full", 0, ""),
    ],
    ids=lambda value: str(value).split(" ")[0],
)
def test_output_that_can_not_be_written_is_one_line_and_errors_that_can_not_are_none(kit, command, how, code, why):
    if "/dev/full" in how and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    got, printed, said = shell(kit, f"kit {command} {how}")
    assert got == code
    lines = [line for line in said.splitlines() if not line.startswith("id ")]
    assert len(lines) == bool(why) and all(why in line and "standard output" in line for line in lines)
    assert bool(printed) == (code == 0)


@posix
def test_nothing_that_is_opened_takes_the_place_of_a_closed_stream(kit):
    show = "import os; os.close(1); os.close(2)\nos.execvp(sys.argv[1], sys.argv[1:])"
    seen = "print([os.fstat(n).st_rdev == os.stat(os.devnull).st_rdev for n in (0, 1, 2)], file=open('seen', 'w'))"
    cli = f"from llmstream_nb.setup import cli; cli._open_streams(); import subprocess, sys; subprocess.run([sys.executable, '-c', {'import os; ' + seen!r}])"
    subprocess.run(
        [sys.executable, "-c", f"import sys; {show}", sys.executable, "-c", cli],
        cwd=kit,
        env=environ(kit),
        timeout=30,
        check=True,
    )
    assert (kit / "seen").read_text() == "[True, True, True]\n"


@posix
def test_doctor_finds_what_stops_lab_and_nothing_else(kit):
    (kit / "a-file").touch()
    faults = [
        ({"LLMSTREAM_PREFIX": "two words"}, "the key prefix 'two words' must not"),
        ({"HOME": str(kit / "a-file")}, "make room, or set it to a folder"),
    ]
    for fault, why in faults:
        code, said = run(kit, "lab", "--no-browser", "--no-model", **fault)
        assert code in (1, 2) and said.count("\n") == 1 and said.startswith("llmstream-nb: ") and why in said
        code, said = run(kit, "doctor", **fault)
        assert code == 1 and said.count("PROBLEM") == 1 and why in said
    assert run(kit, "doctor")[0] == 0
    code, said = run(kit, "ask", "?", LLMSTREAM_PREFIX="two words")
    assert code == 2 and said.count("\n") == 1 and "LLMSTREAM_PREFIX" in said


@posix
def test_a_full_disk_is_told_by_lab_and_doctor(kit):
    import resource

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    code, said = run(kit, "lab", "--no-browser", preexec_fn=full)
    assert code == 1 and said.count("\n") == 1 and "File too large" in said and "make room" in said
    code, said = run(kit, "doctor", preexec_fn=full)
    assert code == 1 and re.search("PROBLEM +HOME .*make room", said)


def test_a_port_that_is_taken_is_told_before_anything_starts(kit, fake_tcp):
    port = fake_tcp.rpartition(":")[2].partition("/")[0]
    code, said = run(kit, "lab", "--no-browser", "--port", port)
    assert (code, said) == (1, f"llmstream-nb: port {port} is in use: choose another --port, or leave it out.\n")
    assert not (kit / ".llmstream" / "shared.json").exists()


# ------------------------------------------------------------------------------------------------- how it ends

INTERRUPT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ.get("INTERRUPT_AT"):
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""


@posix
@pytest.mark.parametrize(
    "phase", ["llmstream_nb.setup.cli", "llmstream_nb.setup.doctor", "Redis:", "JupyterLab: starting"]
)
def test_ctrl_c_ends_each_phase_of_lab_without_a_traceback(kit, phase):
    (kit / "sitecustomize.py").write_text(INTERRUPT)
    process = start(kit, "lab", "--no-browser", "--no-model", INTERRUPT_AT=phase)
    children = []
    if phase.startswith(("Redis", "Jupyter")):
        until(process, f"^{phase}")
        children = tree(process.pid)
        process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert "Traceback" not in said and process.returncode in (0, 130), said
    wait_until(lambda: not running(children))


def in_terminal(kit: Path, *command: str, **changes: str) -> tuple[int, int]:
    """Start a command in a terminal of its own; return its process id and the terminal's other end."""
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a terminal's; these tests may run under nohup
            os.chdir(kit)
            os.execve(sys.executable, [sys.executable, "-m", "llmstream_nb", *command], environ(kit, **changes))
        finally:
            os._exit(127)
    return pid, terminal


def read_until(terminal: int, pattern: str) -> str:
    shown = ""
    with contextlib.suppress(OSError):  # how Linux tells that nobody holds the terminal any more
        while not re.search(pattern, shown):
            shown += os.read(terminal, 4096).decode()
    return shown


@posix
@pytest.mark.skipif("redis-server" not in servers.available(), reason="redis-server is not on PATH")
def test_a_terminal_that_closes_ends_all_that_lab_started_in_good_order(kit):
    pid, terminal = in_terminal(kit, "lab", "--no-browser", "--no-model")
    read_until(terminal, "JupyterLab: starting")
    lab = psutil.Process(pid)
    wait_until(lambda: len(lab.children(recursive=True)) >= 4)  # two guards, and what they guard
    children = lab.children(recursive=True)
    assert (kit / ".llmstream" / "shared.json").exists()
    os.close(terminal)
    wait_until(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid)
    wait_until(lambda: not running(children))
    assert not (kit / ".llmstream" / "shared.json").exists()  # so it had the time to tidy up


@posix
def test_a_guarded_command_hears_of_a_hangup_also_under_nohup():
    show = "import signal; print(signal.getsignal(signal.SIGHUP) == signal.SIG_DFL)"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = guarded([sys.executable, "-c", show], stdout=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert process.stdout.read() == b"True\n"
    end(process)
    process.stdout.close()


@posix
@pytest.mark.skipif("redis-server" not in servers.available(), reason="redis-server is not on PATH")
def test_lab_with_a_token_of_the_users_tells_its_address_once_and_its_terminals_end_with_it(kit):
    from websocket import create_connection

    process = start(
        kit, "lab", "--no-browser", "--no-model", JUPYTER_TOKEN="abc",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    children: list[psutil.Process] = []
    try:
        address = until(process, r"http://127\.0\.0\.1:\d+/lab\S*")[0]
        assert "token" not in address
        base = address.partition("/lab")[0]
        request = urllib.request.Request(f"{base}/api/terminals", b"{}", {"Authorization": "token abc"})
        with urllib.request.urlopen(request, timeout=20) as reply:
            name = json.load(reply)["name"]
        socket = create_connection(
            f"{base.replace('http', 'ws')}/terminals/websocket/{name}", header=["Authorization: token abc"], timeout=30
        )
        socket.send(json.dumps(["stdin", f"'{sys.executable}' -m llmstream_nb web --no-browser --port 0\r"]))
        shown = ""
        while "?token=" not in shown:
            kind, *rest = json.loads(socket.recv())
            shown += rest[0] if kind == "stdout" else ""
        children = tree(process.pid)
        assert [one for one in children if "web" in one.cmdline()]
        process.kill()
        process.wait(60)
        wait_until(lambda: not running(children), 30)
        rest = process.stdout.read()
        assert "http" not in rest and "abc" not in address + rest
    finally:
        process.kill()
        for child in running(children):
            child.kill()
        process.stdout.close()


# --------------------------------------------------------------------------------------------- other terminals

SHARE = """
import contextlib, sys
from llmstream_nb.setup.shared import share
with contextlib.ExitStack() as stack:
    model = {"LLMSTREAM_LOCAL_URL": sys.argv[2], "LLMSTREAM_LOCAL_KEY": sys.argv[3]}
    share(stack, {"REDIS_URL": sys.argv[1], **model})
    print("shared", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def lab_shares(kit: Path, redis_url: str, model_url: str, **options) -> Iterator[subprocess.Popen]:
    """A process that shares servers as `lab` does."""
    command = [sys.executable, "-c", SHARE, redis_url, model_url, scripted.server().key]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=kit, env=environ(kit), text=True, **pipes | options) as process:
        until(process, "shared")
        yield process
        process.kill()


@posix
def test_other_terminals_use_the_lab_s_redis_and_its_model_while_it_runs(kit, fake_tcp):
    model = scripted.server().url
    with lab_shares(kit, fake_tcp, model) as process:
        file = kit / ".llmstream" / "shared.json"
        assert file.stat().st_mode & 0o777 == 0o600
        code, said = run(kit, "ask", "What is a Redis stream?", "--source", "local", *QUICK)
        assert code == 0 and "[stop · " in said  # the scripted model stands at the address of the local one
        answer_id = re.match(r"id (\w+)", said)[1]
        assert connect(fake_tcp).exists(connect(fake_tcp).names.answer(answer_id).chunks)
        body = {"question": "What is a Redis stream?", "source": "local", "stream": False}
        with start(kit, "web", "--no-browser", "--port", "0", stderr=subprocess.DEVNULL) as web:
            try:
                base, token = until(web, "http.*")[0].split("?token=")
                headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
                request = urllib.request.Request(f"{base}answers", json.dumps(body).encode(), headers)
                with urllib.request.urlopen(request, timeout=30) as reply:
                    assert "smollm2" in json.load(reply)["record"]["message"]  # which the scripted model does not know
            finally:
                web.kill()
        own = run(kit, "watch", answer_id, REDIS_URL="redis://127.0.0.1:9/0")  # what the user set counts
        assert own[0] == 1 and "127.0.0.1:9" in own[1]
        process.kill()
        process.wait(60)
    code, said = run(kit, "watch", answer_id)
    assert code == 2 and "no lab runs in this folder" in said


# ------------------------------------------------------------------------------------------------ tidying up


@needs_redis
@posix
def test_clear_all_names_what_it_deletes_and_wants_a_yes(kit):
    with servers.RedisServer(requirepass="hunter2") as server:
        for name in ("one", "two"):
            ask("?", source=lambda *_: iter("ab"), id=name, client=connect(server.url)).wait(60)
        place = rf"under 'llmstream' at redis://\*\*\*@127.0.0.1:{server.port}/0"
        code, said = run(kit, "clear", "--all", REDIS_URL=server.url)
        assert (
            code == 2
            and said.count("\n") == 1
            and "--yes" in said
            and re.search(f"Delete all answers {place}\\?", said)
        )
        pid, terminal = in_terminal(kit, "clear", "--all", REDIS_URL=server.url)
        shown = read_until(terminal, r"\[y/N\]")
        assert re.search(f"Delete all answers {place}\\?", shown)
        os.write(terminal, b"\x04")  # Ctrl-D
        shown += read_until(terminal, "Stopped")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130 and "Traceback" not in shown
        os.close(terminal)
        assert server.client().exists("llmstream:{one}:chunks")
        code, last = run(kit, "clear", "--all", "--yes", REDIS_URL=server.url)
        assert code == 0 and re.fullmatch(f"2 answers {place} deleted.\n", last)
        assert "hunter2" not in said + shown + last


@needs_redis
@posix
def test_next_group_ends_workers_deletes_answers_and_restores_notebooks(kit):
    with servers.RedisServer() as server:

        def under(prefix: str) -> redis.Redis:
            return connect(server.url, prefix=prefix)

        terminal = start(kit, "worker", "--name", "terminal", REDIS_URL=server.url)
        until(terminal, "answers questions")
        kernel = Worker(client=under("nb04"), timing=FAST).start()
        dead = start(kit, "worker", "--name", "dead", "--lease", "1", REDIS_URL=server.url)
        until(dead, "answers questions")
        admin = server.client()
        wait_for(lambda: len(admin.keys("*:worker:*")) == 3)
        dead.kill()
        dead.communicate()
        wait_for(lambda: admin.pttl(names_of(connect(server.url)).worker("dead")) <= 1000 * DAY)  # for a lease
        for prefix in ("llmstream", "nb00", "another"):
            ask("?", source=lambda *_: iter("ab"), id="one", client=under(prefix)).wait(60)
        (kit / "notebooks" / "04-groups.ipynb").write_text("mine")

        code, said = run(kit, "next-group", REDIS_URL=server.url)
        assert code == 2 and "--yes" in said and admin.exists("nb00:{one}:chunks")
        code, said = run(kit, "next-group", "--yes", REDIS_URL=server.url)
        assert code == 0
        ended, deleted, restored = said.splitlines()
        assert ended == "Workers ended: 2."
        assert deleted.startswith("Answers deleted: 2, under llmstream, nb00, nb04 at redis://")
        assert "04-groups.ipynb" in restored and "00-ask" not in restored
        assert terminal.wait(60) == 0
        wait_for(lambda: not kernel._thread.is_alive())
        assert not admin.exists("nb00:{one}:chunks", "llmstream:{one}:chunks") and admin.exists("another:{one}:chunks")
        assert (kit / "notebooks" / "04-groups.ipynb").read_text() == "as it came"
        assert [file.read_text() for file in (kit / "notebooks").glob("backup-*/*")] == ["mine"]
        terminal.stdout.close()
