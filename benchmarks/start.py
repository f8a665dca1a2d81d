"""Cold starts: how long until something can be done, and until all notebooks have been run as tests."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import redis

from benchmarks.harness import ROOT, Figures, Line, Samples, interleave, redis_server, row
from llmstream_nb.setup.environment import say
from llmstream_nb.setup.redis_server import child_environment
from tests.suites import ENVIRONMENT, NBVAL

PATIENCE = 120.0  # seconds
BARE, IMPORT, REAL, FAKE = "bare Python", "import llmstream_nb", "connect(), redis-server", "connect(), fakeredis"


def python(*arguments: str, redis_url: str | None = None, **options: Any) -> subprocess.Popen[str]:
    """This Python in the checkout, with nothing of the user's in its environment."""
    environment = child_environment(**ENVIRONMENT | {"REDIS_URL": redis_url, "LLMSTREAM_NO_VENV": "1"})
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, encoding="utf-8", **options)


@row(
    "a new process until it can work",
    Line("ms", IMPORT, BARE, ("<=", 30), "difference"),
    Line("ms", REAL, BARE, by="difference"),
    Line("ms", FAKE, BARE, by="difference"),
)
def imports(quick: bool) -> tuple[str, Samples]:
    """Whole processes, from their start to their end."""
    runs = 2 if quick else 25

    def whole(code: str, redis_url: str | None = None) -> Figures:
        began = time.perf_counter()
        if python("-c", code, redis_url=redis_url).wait(PATIENCE):
            raise RuntimeError(f"failed: {code}")
        return {"ms": 1000 * (time.perf_counter() - began)}

    connecting = "import llmstream_nb; llmstream_nb.connect()"
    with redis_server() as server:
        sides = {
            BARE: partial(whole, "pass"),
            IMPORT: partial(whole, "import llmstream_nb"),
            REAL: partial(whole, connecting, server.url),
            FAKE: partial(whole, connecting),
        }
        for side in sides.values():
            side()  # writes .pyc files, and has the system read what lies on the disk
        return f"{runs} runs", interleave(sides, runs)


# --------------------------------------------------------------------------------------------- a notebook


@row("notebook 00, from starting its kernel to the first token in Redis", Line("s", "redis-server"))
def notebook(quick: bool) -> tuple[str, Samples]:
    """A new kernel runs the notebook's cells in order; somebody else waits for the first text of its first answer."""
    runs = 1 if quick else 5
    with redis_server() as server:
        return f"{runs} runs", interleave({"redis-server": lambda: _first_token(server.url)}, runs)


def _first_token(url: str) -> Figures:
    import nbformat
    from jupyter_client.manager import start_new_kernel

    path = ROOT / "notebooks" / "00-ask.ipynb"
    cells = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    bare = redis.Redis.from_url(url, decode_responses=True)
    bare.flushall()
    environment = child_environment(**ENVIRONMENT | {"REDIS_URL": url})
    began = time.monotonic()
    manager, client = start_new_kernel(cwd=str(ROOT / "notebooks"), env=environment)
    started = time.monotonic()
    try:
        for cell in cells[:2]:  # the panel, and the first question
            client.execute(cell)
        while time.monotonic() < began + PATIENCE:
            reply: Any = bare.xread({"nb00:{tour}:chunks": "1-0"}, block=1000)  # beyond the start entry
            if reply:
                return {"s": time.monotonic() - began, "until the kernel answers, s": started - began}
        raise RuntimeError("notebook 00 asked nothing")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


# -------------------------------------------------------------------------------------------------- lab


@row("python3 -m llmstream_nb lab, once installed, until it answers", Line("s", "lab"))
def lab(quick: bool) -> tuple[str, Samples]:
    """From the command to JupyterLab's first page; it starts a Redis on its way."""
    runs = 1 if quick else 5
    return f"{runs} runs", interleave({"lab": _lab}, runs)


def _lab() -> Figures:
    with tempfile.TemporaryDirectory(prefix="llmstream-lab-") as folder:
        log = Path(folder, "log")
        began = time.monotonic()
        with log.open("w") as output:
            command = ("-m", "llmstream_nb", "lab", "--no-browser", "--no-model")
            process = python(*command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            while time.monotonic() < began + PATIENCE and process.poll() is None:
                found = re.search(r"http://127\.0\.0\.1:\d+/\S*token=\w+", log.read_text(errors="replace"))
                if found:
                    with contextlib.suppress(OSError), urllib.request.urlopen(found[0], timeout=10) as page:
                        if page.status == 200 and page.read():
                            return {"s": time.monotonic() - began}
                time.sleep(0.02)
            raise RuntimeError("lab did not answer")
        finally:
            process.terminate()
            process.wait(30)


# ------------------------------------------------------------------------------------------------- nbval


@row(
    "all notebooks as tests, with nbval",
    *(Line("s", side, goal=("<=", 120)) for side in ("fakeredis", "redis-server")),
    *(Line("cells that failed", side, goal=("<=", 0), always=True) for side in ("fakeredis", "redis-server")),
    bound=2400,
)
def nbval(quick: bool) -> tuple[str, Samples]:
    """The command of the test suite."""
    runs = 1 if quick else 3
    with redis_server() as server:
        sides = {"fakeredis": partial(_nbval, None, quick), "redis-server": partial(_nbval, server.url, quick)}
        return f"{'00 alone' if quick else 'all'}, {runs} runs", interleave(sides, runs)


def _nbval(redis_url: str | None, quick: bool) -> Figures:
    chosen = [str(Path("notebooks", "00-ask.ipynb")), *NBVAL[1:]] if quick else NBVAL
    began = time.monotonic()
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = python("-m", "pytest", "-q", *chosen, redis_url=redis_url, **output)
    printed, _ = process.communicate(timeout=600)
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error)", printed.splitlines()[-1])}
    if not counts.get("passed"):
        raise RuntimeError(f"nbval: {printed.splitlines()[-1]}")
    failed = counts.get("failed", 0) + counts.get("error", 0)
    if failed:
        say("\n".join(line for line in printed.splitlines() if line.startswith(("FAILED", "ERROR"))))
    return {"s": time.monotonic() - began, "cells that passed": counts["passed"], "cells that failed": failed}
