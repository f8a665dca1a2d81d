"""Check what the kit needs on this machine, and say what to do; it runs on a bare Python too."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from llmstream_nb.llm.names import SOURCES
from llmstream_nb.protocol.wire import LLMStreamError
from llmstream_nb.setup import environment
from llmstream_nb.setup.environment import LOCKED, LOCKED_MODEL, ROOT, VENV
from llmstream_nb.setup.lab import hindrances
from llmstream_nb.setup.redis_server import StartError, find_redis
from llmstream_nb.setup.rehearse import NOTE, OK, PROBLEM, Check, rehearse
from llmstream_nb.setup.shared import shared

WIDTH = 17  # of the longest subject


def doctor(*, workshop: bool = False, wheels: Path | None = None) -> int:
    """Print the table of checks, for a workshop with what is tried in a rehearsal; return 1 if one is a problem."""
    checks = []
    looks = [_python(), _packages(), _redis(), _models(), _binder(), _machine()]
    for check in chain(*looks, rehearse(wheels) if workshop else ()):
        checks.append(check)
        verdict, subject, text = check
        tick = ("[x] " if verdict == OK else "[ ] ") * workshop
        print(f"{tick}{verdict:8} {subject:{WIDTH}}  {text}", flush=True)
    problems = sum(verdict == PROBLEM for verdict, _, _ in checks)
    print(f"\n{problems} problem{'s' * (problems != 1)}." if problems else "\nAll that is needed works.")
    return 1 if problems else 0


def _python() -> Iterator[Check]:
    shown = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    if sys.maxsize < 2**32:
        yield PROBLEM, "Python", f"{shown}, 32 bits: the packages need a 64-bit Python"
    else:
        yield OK, "Python", shown
    if os.environ.get("PYTHONPATH", str(ROOT)) != str(ROOT):  # which is what lab sets
        yield NOTE, "PYTHONPATH", "is set: if imports fail strangely, unset it"
    if os.name == "nt" and len(str(ROOT)) > 90:
        yield NOTE, "folder", f"{ROOT} is a long path for Windows: move it nearer to the drive's root"


def _packages() -> Iterator[Check]:
    path = None
    if os.environ.get("LLMSTREAM_NO_VENV"):
        yield OK, "set-up", "LLMSTREAM_NO_VENV is set: this Python is used as it is"
    elif not LOCKED.exists():
        yield OK, "set-up", "none is needed: the package was installed by itself"
        return
    elif what := environment.in_the_way():
        yield PROBLEM, "set-up", what
        return
    elif environment.is_set_up():
        yield OK, "set-up", "done, in .venv"
        path = environment.site_packages()
    elif VENV.exists() or environment.differences(LOCKED):
        yield NOTE, "set-up", "not done yet, or not to its end: python3 -m llmstream_nb lab does it"
        return
    else:
        yield OK, "set-up", "this Python has everything"
    if wrong := environment.differences(LOCKED, path=path, whole=True):
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        advice = "python3 -m llmstream_nb lab mends what is missing; or delete .venv before"
        yield PROBLEM, "packages", f"{'; '.join(wrong[:3])}{more}: {advice}"
    else:
        yield OK, "packages", f"as locked, with JupyterLab {min(environment.pins(LOCKED)['jupyterlab'])}"
    if any("is missing" in line for line in environment.differences(LOCKED_MODEL, path=path)):
        yield NOTE, "local model", "not installed; lab tries again unless told --no-model"
    else:
        yield OK, "local model", "installed"


def _redis() -> Iterator[Check]:
    try:
        yield OK, "Redis", f"{find_redis().name}: lab starts it"
    except StartError as reason:
        hints = {"Darwin": "brew install redis", "Linux": "sudo apt install redis-server"}
        hint = hints.get(platform.system(), "there is none for Windows; WSL or Docker have one")
        yield NOTE, "Redis", f"{reason}: the stand-in fakeredis is used ({hint})"
    if shared():
        yield OK, "lab", "runs, and commands in this folder use its Redis and its model"
    if url := os.environ.get("REDIS_URL", "").strip():
        try:
            from llmstream_nb.answers.connection import connect, masked

            connect(url)
            yield OK, "REDIS_URL", f"{masked(url)} answers"
        except ImportError:
            yield NOTE, "REDIS_URL", "is set; it can be tried once the kit is set up"
        except LLMStreamError as error:
            yield PROBLEM, "REDIS_URL", str(error)


def _models() -> Iterator[Check]:
    chosen = os.environ.get("LLMSTREAM_LLM", "").strip()
    if chosen and chosen not in SOURCES:
        yield PROBLEM, "LLMSTREAM_LLM", f"{chosen!r} is none of {', '.join(SOURCES)}"
    elif chosen:
        yield OK, "LLMSTREAM_LLM", chosen
    if os.environ.get("OPENAI_API_KEY"):
        yield OK, "OPENAI_API_KEY", "is set; it is used only when you choose openai"
    else:
        verdict = NOTE if chosen == "openai" else OK
        yield verdict, "OPENAI_API_KEY", "is not in the environment (a file .env may have it)"


def _binder() -> Iterator[Check]:
    if notice := os.environ.get("LLMSTREAM_NOTICE"):
        yield NOTE, "start", notice
    if os.environ.get("BINDER_LAUNCH_HOST"):
        limit = os.environ.get("MEM_LIMIT", "")
        memory = f"has {int(limit) / 1e9:.1f} GB of memory at most, and " if limit.isdigit() else ""
        yield NOTE, "Binder", f"{memory}ends after ten idle minutes: download your work; enter no keys here"


def _machine() -> Iterator[Check]:
    free = shutil.disk_usage(ROOT).free
    installed = not LOCKED.exists() or environment.is_set_up() or os.environ.get("LLMSTREAM_NO_VENV")
    stops = NOTE if installed else PROBLEM  # lab starts all the same, but keeps nothing
    need = 100_000_000 if installed else environment.SPACE
    verdict, advice = (OK, "") if free > need else (stops, f"; {need / 1e9:.1f} GB are needed: make room")
    yield verdict, "disk", f"{free / 1e9:.1f} GB free{advice}"
    if not os.access(ROOT, os.W_OK):
        yield stops, "folder", f"{ROOT} can't be written: copy it to a place of your own"
    yield from ((PROBLEM, what, why) for what, why in hindrances())
