"""The types hold: in each room of the package, and for those who call it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .test_layers import PACKAGE, ROOMS

ROOT = PACKAGE.parent
CALLER = "tests/typed_caller.py"


@pytest.fixture(scope="module")
def complaints() -> list[str]:
    """What mypy says of the package and of one who calls it, a line each."""
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--no-pretty", "llmstream_nb", CALLER]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode in (0, 1), done.stderr + done.stdout
    return done.stdout.replace("\\", "/").splitlines()


@pytest.mark.parametrize("room", [*ROOMS, "__main__"])
def test_a_room_is_typed(complaints: list[str], room: str) -> None:
    places = (f"llmstream_nb/{room}/", f"llmstream_nb/{room}.py")
    assert not [line for line in complaints if line.startswith(places)]


def test_a_caller_is_told_what_is_right_and_what_is_wrong(complaints: list[str]) -> None:
    assert not [line for line in complaints if line.startswith(CALLER)]


def test_nobody_else_complains(complaints: list[str]) -> None:
    """Whatever the rooms' names are."""
    assert not [line for line in complaints if not line.startswith(("llmstream_nb/", CALLER))]


def test_the_types_go_with_the_package() -> None:
    import llmstream_nb

    assert (PACKAGE / "py.typed").exists()
    stub = Path(PACKAGE, "__init__.pyi").read_text("utf-8")
    assert [name for name in llmstream_nb.__all__ if f"import {name} as {name}\n" not in stub] == []
