"""Set-up from nothing, its failures and repairs, and that no process outlives the one that wanted it."""

from __future__ import annotations

import ast
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from packaging.requirements import Requirement

from llmstream_nb.setup import environment
from llmstream_nb.setup.environment import LOCKED, LOCKED_DEV, OPTIONAL, ROOT
from llmstream_nb.setup.guard import end, guarded
from llmstream_nb.setup.redis_server import answers

# A build backend of twenty lines, so that the small checkout below needs nothing but pip.
BACKEND = """
import os, time, zipfile
def get_requires_for_build_editable(config_settings=None): return []
def build_editable(folder, config_settings=None, metadata_directory=None):
    if "SLOW" in os.environ:
        open("building", "w").close()
        time.sleep(60)
    name, info = "llmstream_nb-0.1.0-py3-none-any.whl", "llmstream_nb-0.1.0.dist-info"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as wheel:
        wheel.writestr("llmstream_nb.pth", os.getcwd())
        wheel.writestr(info + "/METADATA", "Metadata-Version: 2.1\\nName: llmstream-nb\\nVersion: 0.1.0\\n")
        wheel.writestr(info + "/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "/RECORD", "")
    return name
"""
# uv itself, in a wheel, which can be told to go wrong. The variable's name is none that the set-up keeps away from uv.
SHIM = """#!/bin/sh
if [ "$FAULT" = fails ]; then echo "error: uv is ill" >&2; exit 2; fi
'{uv}' "$@" || exit
case "$FAULT $*" in *requirements.txt*)
    if [ "$FAULT" ]; then rm -f "${{0%/bin/uv}}"/lib/python*/site-packages/tiny.py; fi
    if [ "$FAULT" = killed ]; then touch half; sleep 60; fi
esac
"""
REAL_UV = Path(sys.executable).with_name("uv")
needs_uv = pytest.mark.skipif(not REAL_UV.exists(), reason="there is no uv beside this Python")
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


def make_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    info = f"{name}-{version}.dist-info"
    files |= {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for file, content in files.items():
            whole = zipfile.ZipInfo(file)
            whole.external_attr = 0o100755 << 16  # scripts can be run
            wheel.writestr(whole, content)


@pytest.fixture
def checkout():
    """A checkout that is set up in seconds: the real code, with tiny packages in place of the locked ones."""
    with tempfile.TemporaryDirectory(prefix="llmstream-checkout-", ignore_cleanup_errors=True) as folder:
        root = Path(folder).resolve() / "check out"  # the space is there on purpose
        (root / "wheels").mkdir(parents=True)
        shutil.copytree(ROOT / "llmstream_nb", root / "llmstream_nb", ignore=shutil.ignore_patterns("__pycache__"))
        (root / "backend.py").write_text(BACKEND)
        (root / "pyproject.toml").write_text(PYPROJECT)
        names = {
            "requirements.txt": "tiny",
            "requirements-server.txt": "tinyserver",
            "requirements-model.txt": "tinymodel",
        }
        for file, name in names.items():
            (root / file).write_text(f"{name}==1.0\n")
            make_wheel(root / "wheels", name, "1.0", {f"{name}.py": ""})
        (root / "requirements-uv.txt").write_text("uv==1.0\n")
        if REAL_UV.exists():
            make_wheel(root / "wheels", "uv", "1.0", {"uv-1.0.data/scripts/uv": SHIM.format(uv=REAL_UV)})
        Path(folder).chmod(0o755)
        yield root


def wait_until(condition: Callable[[], object], timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the awaited condition did not come true in time"
        time.sleep(0.02)


def start(root: Path, *arguments: str, before: Sequence[str] = (), **changes: str) -> subprocess.Popen:
    """Start the command line as a user of that checkout does, with a home folder of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LLMSTREAM", "PIP_", "PYTHON"))}
    return subprocess.Popen(
        [*before, getattr(sys, "_base_executable", sys.executable), "-m", "llmstream_nb", *arguments],
        cwd=root,
        env=kept | {"HOME": str(root), "PIP_RETRIES": "1"} | changes,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(root: Path, *arguments: str, **changes: Any) -> tuple[int, str]:
    process = start(root, *arguments, **changes)
    output = process.communicate(timeout=60)[0]
    assert "Traceback" not in output, output
    return process.returncode, output


WATCH = ("watch", "x", "--wheels", "wheels")  # a command that needs the set-up and then ends at once
NOWHERE = "http://127.0.0.1:9"  # an index that refuses
DONE = r"(\[.*): done"
WATCHED = "there is nothing to watch"


def show(root: Path, code: str, *options: str) -> str:
    """What the checkout's own Python prints, in a clean shell."""
    python = root / environment.PYTHON.relative_to(ROOT)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LLMSTREAM"))}
    done = subprocess.run(
        [python, *options, "-c", code], cwd=root, env=environ, capture_output=True, text=True, timeout=30
    )
    return done.stdout.strip() or done.stderr


def tree(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def running(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; a dead one may stay listed until its new parent takes notice."""
    left = []
    for one in processes:
        with suppress(psutil.NoSuchProcess):  # it may end between the two questions
            if one.is_running() and one.status() != psutil.STATUS_ZOMBIE:
                left.append(one)
    return left


# ------------------------------------------------------------------------------------------ it works


@needs_uv
def test_sets_up_once_and_then_only_what_has_changed(checkout):
    code, output = run(checkout, *WATCH, "--no-model")
    assert (code, WATCHED in output) == (2, True)
    steps = ["virtual environment", "uv", "packages", "the kit itself", "a Redis server"]
    assert re.findall(DONE, output) == [f"[{number}/5] {step}" for number, step in enumerate(steps, 1)]
    log = (checkout / ".venv" / "set-up.log").read_text()
    assert "Successfully installed uv-1.0" in log
    assert " + tiny==1.0" in log  # as uv says it

    again = run(checkout, "watch", "x", "--no-model", PIP_INDEX_URL=NOWHERE)[1]  # no pip, so no index either
    assert again.startswith("llmstream-nb: ")
    assert WATCHED in again
    assert (checkout / ".venv" / "set-up.log").read_text() == log

    with (checkout / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    code, output = run(checkout, *WATCH)
    assert re.findall(DONE, output) == ["[1/1] packages"]  # it began without a model: only lab adds that

    moved = checkout.with_name("moved")  # now the editable install points to the old place
    checkout.rename(moved)
    assert re.findall(DONE, run(moved, *WATCH)[1]) == ["[1/1] the kit itself"]
    where = show(moved, "import llmstream_nb; print(llmstream_nb.__file__)", "-I")  # as a kernel in another folder does
    assert Path(where).parent == moved / "llmstream_nb"


@needs_uv
def test_a_killed_or_lying_uv_leaves_nothing_half_done(checkout):
    halved = start(checkout, *WATCH, FAULT="killed")
    wait_until((checkout / "half").exists, timeout=60)
    halved.kill()
    halved.communicate(timeout=60)
    code, output = run(checkout, *WATCH, FAULT="lies")  # all anew, and again a file is gone that uv put there
    assert code == 1
    assert_one_line(output, "tiny is missing tiny.py", "run the same command again")
    assert run(checkout, *WATCH)[0] == 2
    assert show(checkout, "import tiny; print('whole')", "-I") == "whole"


POISON = {
    **{f"PIP_{name}": "1" for name in ("USER", "DRY_RUN", "QUIET", "REQUIRE_HASHES")},
    **{f"PIP_{name}": "/nowhere" for name in ("PREFIX", "ROOT", "CONSTRAINT", "PYTHON")},
    **{f"UV_{name}": "/nowhere" for name in ("CONFIG_FILE", "CONSTRAINT", "TARGET", "PROJECT", "DEFAULT_INDEX")},
    "UV_LINK_MODE": "symlink",
    "UV_OFFLINE": "1",
    "UV_EXCLUDE_NEWER": "2000-01-01",
}


@pytest.mark.parametrize("fault", [pytest.param("", marks=needs_uv), "fails"])
def test_what_the_caller_set_does_not_reach_into_the_venv(checkout, tmp_path, fault):
    with zipfile.ZipFile(checkout / "wheels" / "tiny-1.0-py3-none-any.whl") as wheel:
        wheel.extractall(tmp_path / "elsewhere")  # where pip would find it, and leave it at that
    (checkout / "requirements.txt").write_text("tiny==1.0\ntinyserver==1.0\n")  # not all of it is there
    config = tmp_path / "pip.conf"
    config.write_text(f"[global]\ntarget = {tmp_path}\nuser = true\n[install]\ndry-run = true\n")
    (checkout / "uv.toml").write_text("offline = 'neither true nor false'")
    changes = {"PYTHONPATH": str(tmp_path / "elsewhere"), "PIP_CONFIG_FILE": str(config), "FAULT": fault}
    code, output = run(checkout, *WATCH, "--no-model", **POISON, **changes)
    assert (code, "packages: uv can't, so by pip" in output) == (2, bool(fault) and REAL_UV.exists())
    assert show(checkout, "import tiny; print(tiny.__file__)").startswith(str(checkout / ".venv"))
    assert run(checkout, "watch", "x")[0] == 2


class Index(http.server.SimpleHTTPRequestHandler):
    """A package index that is a folder of wheels, and knows who asked for what."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers["User-Agent"].split("/")[0]))
        if self.path.startswith("/simple/"):
            name = self.path.split("/")[2]
            links = "".join(
                f'<a href="/{file}">{file}</a>' for file in os.listdir(self.directory) if file.startswith(f"{name}-")
            )
            self.send_response(200 if links else 404)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(links)))
            self.end_headers()
            self.wfile.write(links.encode())
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@needs_uv
def test_a_companys_index_serves_uv_too_and_what_it_lacks_is_not_asked_for_again(checkout):
    next(checkout.glob("wheels/tinymodel-*")).unlink()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Index, directory=checkout / "wheels")) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever).start()
        config = checkout / "pip.conf"
        config.write_text(f"[global]\nindex-url = http://127.0.0.1:{server.server_port}/simple\n")
        changes = {"PIP_CONFIG_FILE": str(config), "XDG_CACHE_HOME": str(checkout / "cache")}
        code, output = run(checkout, "watch", "x", **changes)
        assert code == 2
        assert "no wheel of tinymodel==1.0 for Python" in output
        assert "going on without the local model" in output
        asked = list(server.asked)
        again = run(checkout, "lab", "--no-browser", **changes)[1]
        server.shutdown()
    assert ("/simple/tiny/", "uv") in asked and ("/simple/tiny/", "pip") not in asked
    assert "local model" not in again and server.asked == asked


def test_where_pip_is_told_to_look_uv_is_told_too(tmp_path, monkeypatch):
    for name in os.environ:
        if name.startswith(("PIP_", "UV_")):
            monkeypatch.delenv(name)
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\ncert = /a.pem\nproxy = p:1\nfind-links =\n  /x\n  /y\ntarget = /t\n[install]\nproxy = p:2\n"
    )
    for name, value in (("CONFIG_FILE", config), ("TIMEOUT", 9), ("EXTRA_INDEX_URL", "a b"), ("NO_INDEX", "")):
        monkeypatch.setenv(f"PIP_{name}", str(value))
    found = environment.sources(Path(sys.executable))
    for_uv = {name: value for name, value in found.items() if name.startswith("UV_")}
    assert for_uv["UV_FIND_LINKS"] == "/x,/y"
    assert for_uv["UV_EXTRA_INDEX_URL"] == "a b"
    assert "UV_TARGET" not in for_uv and "UV_CONFIG_FILE" not in for_uv
    assert (found["SSL_CERT_FILE"], found["HTTPS_PROXY"]) == ("/a.pem", "p:2")
    assert (found["PIP_CERT"], found["PIP_PROXY"], found["PIP_FIND_LINKS"]) == ("/a.pem", "p:2", "/x /y")
    assert "PIP_TARGET" not in found and "PIP_NO_INDEX" not in found


def test_a_broken_venv_is_mended(checkout):
    run(checkout, *WATCH, "--no-model")
    site = next((checkout / ".venv").glob("[Ll]ib/**/site-packages"))
    look = "from llmstream_nb.setup.environment import _pending, _steps; print([len(_pending(_steps(False, []), whole)) for whole in (False, True)])"
    base = getattr(sys, "_base_executable", sys.executable)

    def pending():
        return subprocess.check_output([base, "-c", look], cwd=checkout, text=True, timeout=30).strip()

    assert pending() == "[0, 0]"
    (site / "tiny.py").unlink()
    assert pending() == "[0, 4]"  # `lab` and `test` look at each file
    shutil.rmtree(site / "tiny-1.0.dist-info")
    assert pending() == "[4, 4]"
    (checkout / environment.PYTHON.relative_to(ROOT)).unlink()
    assert run(checkout, *WATCH, "--no-model")[0] == 2
    assert pending() == "[0, 0]"


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_what_is_in_the_way_is_not_emptied(checkout):
    (checkout / "other" / "bin").mkdir(parents=True)
    (checkout / ".venv").symlink_to("other")
    for _ in ("a link", "a file"):
        code, output = run(checkout, *WATCH)
        assert code == 1
        assert_one_line(output, f'rm "{checkout / ".venv"}"', "run the same command again")
        assert (checkout / "other" / "bin").exists()
        (checkout / ".venv").unlink()
        (checkout / ".venv").write_text("other")


@needs_uv
@pytest.mark.skipif(os.name == "nt", reason="kill -9, and Ctrl-C for one process, are POSIX")
def test_an_interrupted_set_up_is_repaired(checkout):
    def reach_the_kit_itself():
        process = start(checkout, *WATCH, SLOW="yes")
        wait_until((checkout / "building").exists, timeout=60)
        (checkout / "building").unlink()
        assert len(tree(process.pid)) >= 3  # the guard, uv and its build
        return process, tree(process.pid)

    killed, children = reach_the_kit_itself()
    killed.kill()
    killed.communicate(timeout=60)
    stopped, others = reach_the_kit_itself()  # this run waited until the orphans were gone
    assert not running(children)
    stopped.send_signal(signal.SIGINT)
    output = stopped.communicate(timeout=60)[0]
    assert "virtual environment: done" in output  # a killed one may leave half a package: all anew
    assert stopped.returncode == 130
    assert "Traceback" not in output
    assert not running(others)
    code, output = run(checkout, *WATCH)  # but nothing had been changed yet when Ctrl-C came
    assert re.findall(DONE, output) == ["[1/1] the kit itself"]
    assert (code, WATCHED in output) == (2, True)


def test_two_at_once_set_up_one_after_the_other(checkout):
    both = [start(checkout, *WATCH) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [2, 2]
    assert sum("packages: done" in output for output in outputs) == 1
    assert sum("Another set-up is at work" in output for output in outputs) == 1


# ----------------------------------------------------------------------------------------- it does not


def assert_one_line(output: str, *parts: str) -> None:
    """The last line says it all."""
    last = output.rstrip().splitlines()[-1]
    assert last.startswith("llmstream-nb: ")
    assert all(part in last for part in parts), output


def test_each_failure_says_what_to_do_and_the_next_run_goes_on(checkout):
    code, output = run(checkout, "watch", "x", PIP_INDEX_URL=NOWHERE, PIP_CONFIG_FILE=os.devnull)
    assert code == 1
    assert_one_line(output, "can't be reached", "--wheels DIR", "run the same command again")

    tiny = next(checkout.glob("wheels/tiny-*"))
    tiny.rename(checkout / "aside")
    code, output = run(checkout, *WATCH)
    assert code == 1
    again = f"python3 -m llmstream_nb wheels DIR --for {environment.this_platform()} --python {environment.VERSION}"
    assert_one_line(output, "wheels has no wheel of tiny==1.0", again, "set-up.log")
    (checkout / "aside").rename(tiny)

    next(checkout.glob("wheels/tinymodel-*")).unlink()
    code, output = run(checkout, "lab", "--no-browser", "--wheels", "wheels")
    steps = ["packages", "the kit itself", "a Redis server"]
    assert re.findall(DONE, output)[-3:] == [f"[{number}/4] {step}" for number, step in enumerate(steps, 1)]
    assert output.count("the local model: failed") == 1
    assert output.index("Going on without the local model") < output.index("JupyterLab: starting")
    assert code == 1  # because the small checkout has no JupyterLab to start


def test_no_folder_of_wheels(checkout):
    code, output = run(checkout, "watch", "x", "--wheels", "nowhere")
    assert code == 1
    assert_one_line(output, "--wheels", "nowhere")


def test_a_python_without_ensurepip(checkout):
    (checkout / "sitecustomize.py").write_text("import sys; sys.modules['ensurepip'] = None")
    code, output = run(checkout, *WATCH, PYTHONPATH=str(checkout))
    assert code == 1
    assert_one_line(output, "sudo apt install python3.", "-venv")


def test_a_checkout_that_can_not_be_written(checkout):
    if os.name == "nt":
        pytest.skip("folders have no such rights on Windows")
    rights = "-dac_override,-dac_read_search"  # what lets root write anywhere
    meek = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"] if os.geteuid() == 0 else []
    checkout.chmod(0o555)
    try:
        code, output = run(checkout, *WATCH, before=meek)
    finally:
        checkout.chmod(0o755)
    assert code == 1
    assert_one_line(output, "can't be written", "copy the whole folder")


def test_no_room_on_the_disk(monkeypatch):
    full = shutil.disk_usage(ROOT)._replace(free=10**6)
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda _: full)
    with pytest.raises(environment.SetupError, match=r"0\.0 GB free in .*1\.5 GB needed"):
        environment._check_room()
    assert "the disk is full" in environment.explain(["OSError: [Errno 28] No space left on device"], "x")


# ------------------------------------------------------------------------------------ old Pythons, locks


@pytest.mark.parametrize("name", ["__init__.py", "__main__.py"])
def test_old_pythons_can_read_the_entry(name):
    tree = ast.parse((ROOT / "llmstream_nb" / name).read_text(), feature_version=(3, 6))
    new = (ast.JoinedStr, ast.NamedExpr, ast.AnnAssign, ast.Match)
    assert not [node for node in ast.walk(tree) if isinstance(node, new)]
    assert "__future__" not in [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]


def test_an_old_python_is_told_so_in_one_line():
    pretend = "import sys, runpy; sys.version_info = (3, 8); runpy.run_module('llmstream_nb', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", pretend], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "needs Python 3.11 or newer; this is Python 3.8" in done.stderr


def test_importing_the_package_costs_nothing():
    show = "import sys; before = set(sys.modules); import llmstream_nb; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", show], cwd=ROOT, capture_output=True, text=True, timeout=30)
    ours = [name for name in done.stdout.split() if name.startswith(("llmstream_nb.", "redis", "json"))]
    assert not ours


def test_locks_agree():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    locked, dev = environment.pins(LOCKED), environment.pins(LOCKED_DEV)
    groups = project["dependency-groups"]
    asked = [project["project"]["dependencies"], *project["project"]["optional-dependencies"].values(), groups["build"]]
    wanted = [(line, locked) for lines in asked for line in lines if not line.startswith("llmstream-nb[")]
    for line, lock in wanted + [(line, dev) for line in groups["dev"]]:
        requirement = Requirement(line)
        versions = lock[environment._canonical(requirement.name)] - {""}
        assert all(requirement.specifier.contains(version) for version in versions), line
    assert {name: versions - {""} for name, versions in dev.items() if name in locked} == {
        name: versions - {""} for name, versions in locked.items() if name in dev
    }
    assert (ROOT / "binder" / "requirements.txt").read_text("utf-8") == LOCKED.read_text("utf-8")


@pytest.mark.parametrize("file", [LOCKED, LOCKED_DEV, *OPTIONAL], ids=lambda file: file.name)
def test_locks_name_no_index_and_no_place(file):
    text = file.read_text("utf-8")
    assert not re.search(r"https?:|file:|(?m:^-)|--index|--find-links|/\w+/", text)
    assert all(re.match(r"[\w.-]+==[\w.]+( ;|\s*#|$)", line) for line in text.splitlines() if line[0] != "#")


# ------------------------------------------------------------------------------------------- processes


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is POSIX")
def test_the_guard_ends_a_command_whose_parent_was_killed(tmp_path):
    child = "import time; print('up', flush=True); time.sleep(60)"
    parent = (
        "import sys, time; from llmstream_nb.setup.guard import guarded;"
        f"guarded([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    children = tree(process.pid)
    assert len(children) == 2
    process.kill()
    process.wait(60)
    wait_until(lambda: not running(children))
    process.stdout.close()


def test_the_guard_passes_the_exit_code_on_and_holds_a_lock(tmp_path):
    process = guarded([sys.executable, "-c", "raise SystemExit(7)"])
    assert process.wait(60) == 7
    end(process)
    if os.name != "nt":
        lock = environment.try_lock(tmp_path / "lock")
        process = guarded([sys.executable, "-c", "import time; time.sleep(60)"], hold=lock)
        os.close(lock)
        assert environment.try_lock(tmp_path / "lock") is None
        end(process)
        assert environment.try_lock(tmp_path / "lock") is not None


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is POSIX")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda how: how.name)
def test_lab_serves_and_all_it_started_ends_with_it(checkout, how):
    (checkout / "requirements.txt").unlink()  # so that this Python is used as it is
    spec = checkout / ".local/share/jupyter/kernels/python3/kernel.json"  # a kernel of the user's own, broken
    spec.parent.mkdir(parents=True)
    spec.write_text('{"argv": ["/nowhere/python"], "display_name": "Wrong", "language": "python"}')
    environ = {"HOME": str(checkout), "JUPYTER_PREFER_ENV_PATH": "0"}
    process = subprocess.Popen(
        [sys.executable, "-m", "llmstream_nb", "lab", "--no-browser", "--base-url", "/a/b/", "--no-model"],
        cwd=checkout,
        env={name: value for name, value in os.environ.items() if name != "REDIS_URL"} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    children = []
    try:
        output = ""
        for line in process.stdout:
            output += line
            found = re.search(r"http://127\.0\.0\.1:(\d+)/a/b/\S*\?token=(\w+)", line)
            if found:
                break
        wait_until(lambda: answers("127.0.0.1", int(found[1])), timeout=30)

        def read(path):
            where = f"http://127.0.0.1:{found[1]}/a/b/api/{path}?token={found[2]}"
            with urllib.request.urlopen(where, timeout=60) as reply:
                return json.load(reply)

        assert "started" in read("status")
        assert read("kernelspecs")["kernelspecs"]["python3"]["spec"]["display_name"] != "Wrong"
        assert "redis-server" in output or "valkey-server" in output or "fakeredis" in output
        url = urlsplit(json.loads((checkout / ".llmstream" / "shared.json").read_text())["REDIS_URL"])
        assert f"127.0.0.1:{url.port}" in output
        assert url.password not in output
        children = tree(process.pid)
        assert len(children) >= 4  # two guards, what they guard
        process.send_signal(how)
        process.wait(60)
        wait_until(lambda: not running(children))
    finally:
        process.kill()
        for child in children:
            if child.is_running():
                child.kill()
        process.stdout.close()
