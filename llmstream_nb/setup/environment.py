"""Set the kit up: a `.venv` in the checkout with the locked packages, made once and repaired when broken.

It runs on a bare Python before anything is installed, so it imports the standard library only.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

from llmstream_nb.setup.guard import end, guarded

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
STATE = ROOT / ".llmstream"  # git-ignored: the locks of set-up and lab, Redis data
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "set-up.json"
LOG = VENV / "set-up.log"
LOCKED = ROOT / "requirements.txt"
LOCKED_DEV = ROOT / "requirements-dev.txt"
LOCKED_MODEL = ROOT / "requirements-model.txt"
PRISTINE = STATE / "pristine"  # what `restore` uses where there is no git

SPACE = 1_500_000_000  # bytes: about 800 MB installed, the rest is for downloads being unpacked
PLATFORMS = ("windows", "macos", "macos-intel", "linux", "linux-arm")  # what `wheels` knows
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
AGAIN = "Then run the same command again."
NO_WHEEL = re.compile(r"No matching distribution found for (\S+)")  # pip, of one pin at a time
PATIENCE = 900.0  # seconds to wait for another set-up of the same checkout
_HANDED_OVER = "_LLMSTREAM_HANDED_OVER"  # tells the .venv's Python that the set-up was done a moment ago


class SetupError(Exception):
    """What keeps the kit from being set up, and what to do about it, in one line."""


class Step(NamedTuple):
    """One `pip install`; it is done once its `key` stands in the stamp."""

    title: str
    key: str
    arguments: list[str]
    needed: bool = True


# ------------------------------------------------------------------------------------------ what is to do


def ensure(*, dev: bool = False, model: bool = True, wheels: Path | None = None) -> Path:
    """Set up what is missing and return the Python to run the kit with.

    Args:
        dev: install what the tests need too.
        model: install the local model too; its failure is reported and goes no further.
        wheels: a folder of wheels to install from, without any network.

    Raises:
        SetupError: it can't be done.
    """
    if _as_is():
        return Path(sys.executable)
    if not VENV.exists() and not differences(LOCKED, *[LOCKED_DEV] * dev):
        return Path(sys.executable)  # Binder, or an environment of the user's own
    steps = _steps(dev, model)
    if not _pending(steps):
        return PYTHON
    if wheels and not wheels.is_dir():
        raise SetupError(f"--wheels: there is no folder {wheels}.")
    try:
        with _only_one() as lock:
            if _pending(steps):  # another one may have done it while this one waited
                _set_up(steps, wheels, lock)
    except OSError as error:
        raise SetupError(
            f"{error.filename or ROOT} can't be written: {error.strerror}. Make room, mend its rights, or "
            f"copy the whole folder to a place of your own. {AGAIN}"
        ) from None
    return PYTHON


def current() -> Path:
    """The Python to run the kit with if nothing is to be set up: the one in `.venv`, if that is complete."""
    return PYTHON if not _as_is() and is_set_up() else Path(sys.executable)


def _as_is() -> bool:
    """Whether this Python is to be used without looking further."""
    handed_over = os.environ.pop(_HANDED_OVER, "")
    return bool(handed_over or os.environ.get("LLMSTREAM_NO_VENV") or not LOCKED.exists())


def _steps(dev: bool, model: bool) -> list[Step]:
    steps = [Step("packages", _digest(LOCKED), ["-r", str(LOCKED)])]
    # setuptools is in the lock, so that installing the package itself needs no network.
    arguments = ["--no-deps", "--no-build-isolation", "-e", str(ROOT)]
    steps.append(Step("the kit itself", _digest(ROOT / "pyproject.toml", place=str(ROOT)), arguments))
    if dev:
        arguments = ["-r", str(LOCKED), "-r", str(LOCKED_DEV)]
        steps.append(Step("what the tests need", _digest(LOCKED, LOCKED_DEV), arguments))
    if model:
        # --ignore-installed writes over what an earlier failure may have left half done.
        arguments = ["--no-deps", "--ignore-installed", "--retries", "2", "-r", str(LOCKED_MODEL)]
        steps.append(Step("the local model", _digest(LOCKED_MODEL), arguments, needed=False))
    return steps


def _digest(*files: Path, place: str = "") -> str:
    """A fingerprint of the files, and of the place where something lies."""
    content = b"".join(file.read_bytes().replace(b"\r\n", b"\n") for file in files)
    return hashlib.sha256(content + place.encode()).hexdigest()[:16]


def _pending(steps: Sequence[Step]) -> list[Step]:
    """The steps still to do: all of them, where the environment is missing, broken or half made."""
    stamp = read_stamp()
    if stamp.get("busy") or stamp.get("python") != _venv_version():
        return list(steps)
    return [step for step in steps if stamp["done"].get(step.title) != step.key]


def read_stamp() -> dict[str, Any]:
    """What the last set-up wrote: `python`, `done` and, while a step runs or after it was killed, `busy`."""
    try:
        return dict(json.loads(STAMP.read_text("utf-8")))
    except (OSError, ValueError):
        return {"busy": "nothing was set up yet", "done": {}}


def is_set_up() -> bool:
    """Whether `.venv` has what `lab` needs, the local model aside."""
    return not _pending(_steps(dev=False, model=False))


def in_venv() -> bool:
    """Whether this very process runs on the checkout's `.venv`."""
    return VENV.exists() and os.path.samefile(sys.prefix, VENV)


def _venv_version() -> str | None:
    """The version of the Python in `.venv`; None where it no longer starts, e.g. after a system upgrade."""
    if in_venv():
        return VERSION
    command = [str(PYTHON), "-I", "-S", "-c", "import sys; print(*sys.version_info[:2], sep='.')"]
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=30).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def pins(*files: Path) -> dict[str, set[str]]:
    """The versions in lock files by normalised name: several, where they differ by platform or Python.

    "" is among them where a package is not needed everywhere.
    """
    found = defaultdict[str, set[str]](set)
    for file in files:
        for name, version, marker in re.findall(r"(?m)^([\w.-]+)==([^\s;]+)( *;)?", file.read_text("utf-8")):
            found[_canonical(name)] |= {version, ""} if marker else {version}
    return found


def differences(*files: Path, path: list[str] | None = None) -> list[str]:
    """What is installed on `path` (default: here) other than the lock files say, as phrases to show."""
    found_there = metadata.distributions(path=sys.path if path is None else path)
    names = [(one.metadata["Name"], one.version) for one in found_there]
    installed = {_canonical(name): version for name, version in reversed(names) if name}
    found = []
    for name, versions in pins(*files).items():
        have = installed.get(name, "")
        if have not in versions:
            wanted = " or ".join(sorted(versions - {""}))
            found.append(f"{name} is {have}, not {wanted}" if have else f"{name} is missing")
    return found


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# ------------------------------------------------------------------------------------------------ doing it


def _set_up(steps: Sequence[Step], wheels: Path | None, lock: int) -> None:
    """Do the steps that are pending, each written down before and after, so that a killed one is noticed."""
    stamp = read_stamp()
    fresh = bool(stamp.get("busy")) or stamp.get("python") != _venv_version()
    if fresh:
        _check_machine()
        say(f"Setting up in {VENV} (once: a minute or a few, about 800 MB).")
    todo = _pending(steps)
    count = len(todo) + fresh
    if fresh:
        # A killed pip can leave half a package that the next one takes for a whole one: begin anew.
        base = getattr(sys, "_base_executable", None) or sys.executable
        lines = [""]
        code = run(f"[1/{count}] virtual environment", [base, "-m", "venv", "--clear", str(VENV)], lock, lines)
        if code or not PYTHON.exists():
            raise SetupError(explain(lines, "the virtual environment could not be made"))
        stamp = {"python": _venv_version(), "done": {}}
    _save_pristine()
    source = ["--no-index", "--find-links", str(wheels.resolve())] if wheels else []
    for number, step in enumerate(todo, 1 + fresh):
        _write_stamp(stamp | {"busy": step.title})
        command = [str(PYTHON), "-m", "pip", "install", *source, *step.arguments]
        lines = [""]
        try:
            code = run(f"[{number}/{count}] {step.title}", command, lock, lines, LOG)
        finally:
            if not any(line.startswith("Installing collected packages") for line in lines):
                _write_stamp(stamp)  # pip had not begun to change anything
        if code:
            reason = f"{explain(lines, f'installing {step.title} failed', wheels)} Details: {LOG}"
            if step.needed:
                raise SetupError(reason)
            say(f"  {reason}\n  Going on without the local model: the scripted answers need nothing.")
        else:
            stamp["done"][step.title] = step.key
        _write_stamp(stamp)


def _check_machine() -> None:
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            "this Python can't make virtual environments. On Debian or Ubuntu: sudo apt install "
            f"python{VERSION}-venv; elsewhere install Python from https://www.python.org. {AGAIN}"
        )
    if (free := shutil.disk_usage(ROOT).free) < SPACE:
        raise SetupError(
            f"there is not enough room on the disk: {free / 1e9:.1f} GB free in {ROOT}, {SPACE / 1e9:.1f} GB "
            f"needed. Make room, or move the folder to another disk. {AGAIN}"
        )


def this_platform() -> str:
    """What the command `wheels` calls this kind of machine."""
    arm = platform.machine().lower() in {"arm64", "aarch64"}
    if sys.platform == "darwin":
        return "macos" if arm else "macos-intel"
    return "windows" if os.name == "nt" else "linux-arm" if arm else "linux"


def explain(lines: Sequence[str], what: str, wheels: Path | None = None) -> str:
    """What went wrong and what to do, from what a program printed."""
    output = "\n".join(lines)
    missing = NO_WHEEL.search(output)
    if wheels and missing:
        return (
            f"{what}: {wheels.resolve()} has no wheel of {missing[1]} for Python {VERSION} on this system. Where there "
            f"is a network: python3 -m llmstream_nb wheels DIR --for {this_platform()} --python {VERSION}. {AGAIN}"
        )
    if re.search(r"No space left on device|Errno 28|WinError 112|Disk quota exceeded", output):
        return f"{what}: the disk is full. Make room, for temporary files too. {AGAIN}"
    if re.search(r"CERTIFICATE_VERIFY_FAILED|SSLError", output):
        return f"{what}: the package index's certificate is not trusted. Behind a proxy, set PIP_CERT. {AGAIN}"
    if re.search(r"connection broken by|NewConnectionError|Max retries|timed out|getaddrinfo", output):
        return (
            f"{what}: the package index can't be reached. Check the network (for a proxy: HTTPS_PROXY), or "
            f"install from a folder with --wheels DIR (see --help). {AGAIN}"
        )
    errors = re.findall(r"^ERROR: (.+)$", output, re.MULTILINE) or output.strip().splitlines()[-1:]
    return f"{what}: {errors[0] if errors else 'it printed nothing'}. Put it right. {AGAIN}"


def _write_stamp(stamp: dict[str, Any]) -> None:
    part = STAMP.with_suffix(".part")
    part.write_text(json.dumps(stamp, indent=1), "utf-8")
    part.replace(STAMP)


def _save_pristine() -> None:
    """Keep a copy of the notebooks as they came, where no git does; another, once a newer kit was copied over this."""
    kit = PRISTINE / "kit"  # tells which kit they came with
    came_with = _digest(ROOT / "pyproject.toml")
    if not (ROOT / ".git").exists() and not (kit.exists() and kit.read_text("utf-8") == came_with):
        shutil.rmtree(PRISTINE, ignore_errors=True)
        PRISTINE.mkdir(parents=True)
        for notebook in (ROOT / "notebooks").glob("*.ipynb"):
            shutil.copy2(notebook, PRISTINE / notebook.name)
        kit.write_text(came_with, "utf-8")


# --------------------------------------------------------------------------------- running and showing it


def allow_open_files(count: int) -> None:
    """Let this process and its children open so many files and sockets; some systems begin with 256."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def say(text: str) -> None:
    """Tell the user something; on standard error, so that `ask` can be piped."""
    with contextlib.suppress(OSError):  # the terminal is closed, or a log's disk full: no reason to end
        print(text, file=sys.stderr, flush=True)


def run(title: str, command: list[str], lock: int | None, lines: list[str], log: Path | None = None) -> int:
    """Run a command, show how it goes, add what it prints to `lines` and `log`; return its exit code."""
    settings = {"DISABLE_PIP_VERSION_CHECK": "1", "NO_INPUT": "1", "PROGRESS_BAR": "off", "USER": "0"}
    environment = os.environ | {f"PIP_{name}": value for name, value in settings.items()}
    process = guarded(command, hold=lock, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)

    def collect(file: TextIO) -> None:
        for line in process.stdout or ():
            lines.append(line.decode(errors="replace").rstrip())
            print(lines[-1], file=file, flush=True)

    progress = Progress(title)
    with open(log or os.devnull, "a", encoding="utf-8") as file:
        reader = threading.Thread(target=collect, args=[file])
        reader.start()
        try:
            while process.poll() is None:
                progress.show(lines[-1].strip() or "...")
                reader.join(0.3)
        finally:  # also on Ctrl-C
            end(process)
            reader.join()
    progress.show("failed" if process.returncode else "done", last=True)
    return process.returncode


class Progress:
    """A line that says what is going on and for how long: rewritten on a terminal, now and then elsewhere."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.began = time.monotonic()
        self.shown = 0.0

    def show(self, text: str, *, last: bool = False) -> None:
        """Show `text` as what is going on now."""
        now = time.monotonic()
        line, seconds = f"{self.title}: {text}", f" ({now - self.began:.0f} s)"
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            line = (line[: width - len(seconds)] + seconds).ljust(width)
            print("\r" + line, end="\n" if last else "", file=sys.stderr, flush=True)
        elif last or now - self.shown > 15:
            self.shown = now
            say(line[:100] + seconds)  # pip names all packages in one line


# -------------------------------------------------------------------------------------- one at a time


def try_lock(file: Path) -> int | None:
    """Lock `file` while the returned descriptor is open, here or in a child; None where another holds it."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        return None
    except OSError:
        pass  # a file system without locks: go on without
    return descriptor


@contextlib.contextmanager
def _only_one() -> Iterator[int]:
    """Let one set-up of this checkout run at a time; the others wait for it, within bounds."""
    STATE.mkdir(exist_ok=True)
    progress = Progress("Another set-up is at work in this folder")
    while (descriptor := try_lock(STATE / "set-up.lock")) is None:
        if time.monotonic() - progress.began > PATIENCE:
            raise SetupError(f"another set-up has been at work here for {PATIENCE / 60:.0f} minutes: end it.")
        progress.show("waiting for it")
        time.sleep(0.5)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def hand_over(python: Path, arguments: Sequence[str]) -> NoReturn:
    """Run the same command line again on another Python, in place of this process."""
    command = [str(python), "-m", "llmstream_nb", *arguments]
    environment = {**os.environ, _HANDED_OVER: "1"}
    if os.name != "nt":
        sys.stdout.flush()
        os.execve(command[0], command, environment)
    process = subprocess.Popen(command, env=environment)  # on Windows exec would return to the prompt at once
    while True:
        with contextlib.suppress(KeyboardInterrupt):  # it reaches the child too, which decides
            sys.exit(process.wait())
