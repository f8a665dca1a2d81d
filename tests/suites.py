"""Run the tests: the package's own, the notebooks as tests on several kinds of Redis, and those in a browser."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from llmstream_nb.faults.servers import RedisServer
from llmstream_nb.setup.environment import ROOT, allow_open_files, say
from llmstream_nb.setup.redis_server import child_environment

from .versions import INSTALLED, SERVERS, VARIABLE, fetch, missing, program_of

# Tests must neither reach a Redis of the user's nor spend a user's key.
UNSET = "REDIS_URL LLMSTREAM_PREFIX LLMSTREAM_LOCAL_URL LLMSTREAM_LOCAL_KEY OPENAI_API_KEY OPENAI_BASE_URL OPENAI_MODEL OPENAI_GOES_ON"
# The local model gets one thread: where six processes share two cores, its threads would wait for each other, busily.
ENVIRONMENT: dict[str, str | None] = {
    "LLMSTREAM_LLM": "scripted",
    **dict.fromkeys(UNSET.split()),
    "CPU_LIMIT": "1",
}
# A file's tests stay together, and long files come first, as conftest.py orders them.
FILES = ["--dist=loadfile", "--no-loadscope-reorder"]
# Notebooks are compared strictly; the glob leaves out what `restore` has put aside.
NBVAL = [
    "notebooks",
    "--ignore-glob=*/backup-*",
    "--nbval",
    "--nbval-current-env",
    "--nbval-cell-timeout=120",
    "-n6",
    "--dist=loadfile",
]
NBVAL += ["--nbval-kernel-startup-timeout=120", f"--nbval-sanitize-with={ROOT}/tests/nbval_sanitize.cfg"]
AGAIN = "tests/test_again.py"


class Suite(NamedTuple):
    """One run of pytest."""

    part: str  # what `--suite` calls it
    title: str
    budget: int  # seconds, after which it is ended and counts as failed
    arguments: list[str]
    server: str | None = None  # it runs on one of its own of this name


def suites() -> list[Suite]:
    """All suites, in the order in which they run.

    Their tests wait more than they work, so more processes than cores serve even a machine with two; browsers work.
    """
    every = os.environ.get(VARIABLE) == "all"
    compared = SERVERS if every else [INSTALLED]
    return [
        Suite(
            "core",
            "tests",
            2400 if every else 780,
            ["tests", "--ignore=tests/browser", f"--ignore={AGAIN}", "-n6", *FILES],
        ),
        Suite("notebooks", "notebooks on fakeredis", 240, NBVAL),
        *(Suite("notebooks", f"notebooks on {name}", 240, NBVAL, name) for name in compared),
        Suite("notebooks", "cells run again", 420, [AGAIN, "-n6", "--maxschedchunk=1"]),
        Suite("browser", "notebooks in a browser", 780, ["tests/browser", "-n2", *FILES]),
    ]


def drawn() -> str:
    """The server for fault schedules: another one from run to run, where VARIABLE doesn't say which."""
    return os.environ.get(VARIABLE) or random.choice(list(filter(program_of, SERVERS)) or SERVERS)


def run(part: str | None = None, expression: str | None = None) -> int:
    """Run the suites, or one part of them; print a summary and return 0 if all is well."""
    allow_open_files(4_096)  # one process serves hundreds of viewers, and is all of them
    began, total, lines = time.monotonic(), Counter[str](), []
    if part != "browser" and (absent := fetch()):
        say("\n".join(map(missing, absent)))
        if os.environ.get("CI") == "true":  # where nothing may be missing
            return 1
    on = drawn()
    said = f"Fault schedules run on {on}; {VARIABLE} chooses another: {', '.join(SERVERS)}, or all."
    say(said)
    for suite in suites():
        if part in (None, suite.part):
            say(f"\n---- {suite.title} (at most {suite.budget // 60} minutes)")
            counts = _run(suite, on, ["-k", expression] if expression else [])
            total += counts
            lines.append(f"{suite.title}: {_phrase(counts)}")
    print("\n" + "\n".join(lines))
    print(said)
    good = total["passed"] and not total["failed"] and not total["error"]
    print(f" {_phrase(total)} in {time.monotonic() - began:.2f}s ".center(80, "="), flush=True)
    return 0 if good else 1


def _phrase(counts: Counter[str]) -> str:
    words = [f"{counts[word]} {word}" for word in ("failed", "passed", "skipped", "error") if counts[word]]
    return ", ".join(words) or "no tests ran"


def _run(suite: Suite, schedules_on: str, extra: list[str]) -> Counter[str]:
    """Run one suite and return how many tests passed, failed, were skipped or broke."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        url = None
        if suite.server:
            program = program_of(suite.server)
            if program is None:
                word = "failed" if os.environ.get("CI") == "true" else "skipped"
                say(f"{word}: {missing(suite.server)}")
                return Counter({word: 1})
            url = stack.enter_context(RedisServer(program, requirepass=os.urandom(8).hex())).url
        report = folder / "report.xml"
        command = [sys.executable, "-m", "pytest", *suite.arguments, *extra, f"--junitxml={report}"]
        environment = child_environment(**ENVIRONMENT | {"REDIS_URL": url, VARIABLE: schedules_on})
        process = subprocess.Popen(command, cwd=ROOT, env=environment)
        try:
            code = process.wait(suite.budget)
        except subprocess.TimeoutExpired:
            say(f"{suite.title}: not done within its {suite.budget} seconds")
            code = _interrupt(process)
        except KeyboardInterrupt:  # pytest has it too
            process.wait(30)
            raise
        counts = _read(report)
        if code not in (0, 1, 5) or (code and not counts):  # 5: nothing was selected
            counts["error"] += code != 5
        return counts


def _interrupt(process: subprocess.Popen[bytes]) -> int:
    """End pytest so that its fixtures end what they started; return an exit code that counts as an error."""
    if os.name == "nt":
        process.terminate()
    else:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return 2


def _read(report: Path) -> Counter[str]:
    """The counts of a JUnit report; none where pytest did not get as far as writing it."""
    try:
        root = ET.parse(report).getroot()
    except (OSError, ET.ParseError):
        return Counter()
    counts: Counter[str] = Counter()
    for case in root.iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in {"failure", "error", "skipped"}), "passed")
        counts[{"failure": "failed"}.get(outcome, outcome)] += 1
    return counts
