"""Fill a folder with all that other machines need to set the kit up without a network."""

import contextlib
import io
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags, mac_platforms
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from llmstream_nb.setup import environment
from llmstream_nb.setup.environment import LOCKED, LOCKED_MODEL, OPTIONAL, ROOT, SetupError, say

KIT = "llmstream-nb"  # the folder of the kit itself, beside the wheels
USUAL = ("windows", "macos", "linux")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


def _glibc(machine: str) -> list[str]:
    """What a Linux with glibc 2.28 takes: Debian 10, Ubuntu 20.04, RHEL 8 and all newer ones."""
    old = [f"manylinux{name}_{machine}" for name in ("2014", "2010", "1")]
    return [f"manylinux_2_{n}_{machine}" for n in range(28, 4, -1)] + old


class Platform(NamedTuple):
    """What markers and file names call a kind of machine."""

    os_name: str
    sys_platform: str
    platform_system: str
    platform_machine: str
    tags: list[str]  # of the files that run there


PLATFORMS = {
    "windows": Platform("nt", "win32", "Windows", "AMD64", ["win_amd64"]),
    "macos": Platform("posix", "darwin", "Darwin", "arm64", list(mac_platforms((13, 0), "arm64"))),
    "macos-intel": Platform("posix", "darwin", "Darwin", "x86_64", list(mac_platforms((13, 0), "x86_64"))),
    "linux": Platform("posix", "linux", "Linux", "x86_64", _glibc("x86_64")),
    "linux-arm": Platform("posix", "linux", "Linux", "aarch64", _glibc("aarch64")),
}


class Target(NamedTuple):
    """A kind of machine, a key of PLATFORMS, and a version of CPython such as 3.12.0."""

    platform: str
    python: str

    @property
    def abi(self) -> str:
        """What CPython's own file names call the version, e.g. cp312."""
        return "cp{}{}".format(*self.python.split("."))

    def pins(self, lock: Path) -> list[str]:
        """What a lock file wants there, as `name==version`."""
        facts = PLATFORMS[self.platform]._asdict() | {
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "python_full_version": self.python,
            "python_version": self.python.rpartition(".")[0],
        }
        lines = re.findall(r"(?m)^[\w.-]+==[^#\n]+", lock.read_text("utf-8"))
        wanted = [Requirement(line.strip()) for line in lines]
        return [f"{one.name}{one.specifier}" for one in wanted if not one.marker or one.marker.evaluate(facts)]

    def tags(self) -> set[Tag]:
        """The tags of the wheels that can be installed there."""
        version, platforms = tuple(map(int, self.python.split(".")[:2])), PLATFORMS[self.platform].tags
        return {*cpython_tags(version, [self.abi], platforms), *compatible_tags(version, self.abi, platforms)}

    def options(self) -> list[str]:
        """How to tell pip, which goes by the Python that runs it where it isn't told."""
        platforms = [word for tag in PLATFORMS[self.platform].tags for word in ("--platform", tag)]
        return ["--implementation", "cp", "--abi", self.abi, "--python-version", self.python, *platforms]


def missing(folder: Path, target: Target, pins: Iterable[str]) -> list[str]:
    """Which of the pins have no wheel in the folder that can be installed on the target."""
    tags, have = target.tags(), set()
    for file in folder.glob("*.whl"):
        with contextlib.suppress(InvalidWheelFilename):
            name, version, _, offered = parse_wheel_filename(file.name)
            if tags & offered:
                have.add(f"{name}=={version}")
    return [pin for pin in pins if pin not in have]


def fill(folder: Path, platforms: Sequence[str] | None, pythons: Sequence[str] | None, *, model: bool = True) -> int:
    """Download what is missing in the folder for all platforms and Pythons; return 0 once it is complete.

    Raises:
        SetupError: nothing can be downloaded, or a package has no wheel for one of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.whl"):
        if not zipfile.is_zipfile(file):  # an earlier run was ended while it wrote this
            file.unlink()
    lacking: list[str] = []
    optional = {lock: what for lock, what in OPTIONAL.items() if model or lock != LOCKED_MODEL}
    source = environment.sources(Path(sys.executable))
    pairs = [(platform, python) for platform in platforms or USUAL for python in pythons or PYTHONS]
    for number, (platform, python) in enumerate(pairs, 1):
        title = f"[{number}/{len(pairs)}] {platform}, Python {python}"
        gone: dict[str, None] = {}
        for patch in (0, 99):  # a few pins differ between the first and the last 3.11.x
            target = Target(platform, f"{python}.{patch}")
            gone |= dict.fromkeys(_download(folder, target, target.pins(LOCKED), title, source))
        lacking += [f"{pin} for {platform} and Python {python}" for pin in gone]
        lacks = [", ".join(gone)] * bool(gone)
        for lock, what in optional.items():
            if left_out := _download(folder, target, target.pins(lock), f"{title}: {what}", source):
                lacks.append(f"{', '.join(left_out)}, and so {what}")
        say(f"{title}: " + (f"lacks {'; '.join(lacks)}" if lacks else "complete"))
    if lacking:
        raise SetupError(f"there is no wheel of {'; '.join(lacking)}. Leave those out with --for and --python.")
    _add_kit(folder)
    sizes = [file.stat().st_size for file in folder.glob("*.whl")]
    say(
        f"{folder} has all that is needed: {len(sizes)} wheels, {sum(sizes) / 1e6:.0f} MB, and the kit. Copy it to the "
        f"other machine, and in its folder {KIT}, with the Python there:\n"
        "  python3 -m llmstream_nb lab --wheels .."
    )
    return 0


def _download(folder: Path, target: Target, pins: list[str], title: str, source: dict[str, str]) -> list[str]:
    """Download what is missing; return what can't be had."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    gone: list[str] = []
    while todo := [pin for pin in missing(folder, target, pins) if pin not in gone]:
        lines: list[str] = []
        if environment.run(f"{title}: {len(todo)} wheels", [*command, *target.options(), *todo], lines, source):
            if (named := environment.no_wheel(lines)) not in todo:
                raise SetupError(environment.explain(lines, "downloading failed"))
            gone.append(named)  # pip names one at a time, and then downloads nothing
        elif left := missing(folder, target, todo):
            raise SetupError(f"pip brought other files than {target.platform} takes for {', '.join(left)}.")
    return gone


def _add_kit(folder: Path) -> None:
    """Put the kit as it was last committed beside the wheels."""
    try:
        done = subprocess.run(["git", "archive", "--format=zip", "HEAD"], cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        say(f"This folder is no git checkout: copy a fresh download of it to {folder / KIT}.")
        return
    with zipfile.ZipFile(io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder / KIT)
