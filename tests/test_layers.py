"""The package stays as it is drawn: imports go downward only, the protocol does no I/O, the core stays small."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "llmstream_nb"
# From the ground up; a module may import only from floors below its own, or from its own package.
FLOORS = [
    "protocol",
    "embedded",
    "connection",
    "llm",
    "tutorial",
    "record",
    "read",
    "aread",
    "produce",
    "groups",
    "answer",
    "workers",
    "tables",
    "plots",
    "markdown",
    "widgets",
    "web",
    "checks",
]
CORE = ["protocol", "connection", "read", "produce"]
CORE_BUDGET = 900  # lines of code; docstrings, comments and blank lines are free
SET_UP = [
    "guard",
    "environment",
    "wheels",
    "notebooks",
    "lab",
    "doctor",
    "cli",
    "__main__",
]  # before anything is installed
THIRD_PARTY = {
    "redis",
    "hiredis",
    "openai",
    "pandas",
    "fakeredis",
    "anywidget",
    "ipywidgets",
    "matplotlib",
    "nh3",
    "jupyterlab",
}


def files(module: str) -> list[Path]:
    folder = PACKAGE / module
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{module}.py"]


def imported(path: Path, everywhere: bool = True) -> set[str]:
    """The modules that a file imports, as dotted names; with `everywhere`, inside functions too."""
    tree = ast.parse(path.read_text("utf-8"))
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "llmstream_nb" if node.level else ""
            name = ".".join(filter(None, [base, node.module]))
            found |= {name} | {f"{name}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_its_place() -> None:
    there = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert there - {"__init__"} == set(FLOORS) | set(SET_UP)


@pytest.mark.parametrize("module", FLOORS)
def test_imports_go_downward(module: str) -> None:
    forbidden = {f"llmstream_nb.{name}" for name in [*FLOORS[FLOORS.index(module) + 1 :], *SET_UP]}
    for path in files(module):
        found = imported(path)
        assert not [name for name in found if any(name == bad or name.startswith(f"{bad}.") for bad in forbidden)]


def test_the_protocol_does_no_io() -> None:
    allowed = {"__future__", "json", "re", "collections", "dataclasses", "typing"}
    assert {name.split(".")[0] for name in imported(PACKAGE / "protocol.py")} <= allowed


@pytest.mark.parametrize("module", SET_UP)
def test_the_set_up_starts_on_a_bare_python(module: str) -> None:
    assert not {name.split(".")[0] for name in imported(PACKAGE / f"{module}.py", everywhere=False)} & THIRD_PARTY


def code_lines(path: Path) -> int:
    source = path.read_text("utf-8")
    free = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            free |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    skip = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    taken = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skip:
            taken |= set(range(token.start[0], token.end[0] + 1))
    return len(taken - free)


def test_the_core_keeps_to_its_budget() -> None:
    assert sum(code_lines(path) for module in CORE for path in files(module)) < CORE_BUDGET
