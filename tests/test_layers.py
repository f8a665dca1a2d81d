"""The package stays as it is drawn: imports go downward only, without circles, and each room keeps to its budget."""

from __future__ import annotations

import ast
import io
import tokenize
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "llmstream_nb"
# From the ground up: a room may import only from rooms below its own, or from within itself. The number is its budget
# in lines of code (docstrings, comments and blank lines are free), and behind it stands why it is large, if it is.
ROOMS = {
    "protocol": 607,  # with what makes JSON that anybody wrote harmless
    "extras": 13,
    "llm": 1487,  # a client for whatever calls itself OpenAI-compatible, whatever it sends, and two models of the kit's own
    "answers": 1512,  # the core: connections that never lie, a failover included; who writes, who reads; ids used again
    "pool": 561,  # a queue, workers that take over from the dead, and groups on one answer
    "tutorial": 87,
    "tables": 244,
    "plots": 113,
    "faults": 294,  # a proxy and servers that break for real, for notebooks and tests
    "viewing": 328,  # the last resort of all who show answers, what a takeover looks like, a notebook's errors, tables
    "widgets": 928,  # views of an answer, of a stream's key and of the pool
    "web": 1566,  # the page and OpenAI's API; a door that faces others: who may, under which name, for how long, and what it does where one answer breaks
    "checks": 929,  # twenty exercises, each tried with what learners get wrong, and a whole chat of the learner's own
    "setup": 1701,  # a bare Python, any system, uv and pip, which Redis serves and who may use it, errors and ends; a site to read
}
SET_UP = ("setup", "__main__")  # before anything is installed
PURE = {
    "__future__",
    "codecs",
    "json",
    "re",
    "collections",
    "dataclasses",
    "typing",
    "itertools",
    "llmstream_nb",
    "math",
}
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


def files(room: str) -> list[Path]:
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]


def module(path: Path) -> str:
    """The dotted name of a file's module."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, everywhere: bool = True) -> set[str]:
    """What a file imports, as dotted names; with `everywhere`, inside functions too."""
    tree = ast.parse(path.read_text("utf-8"))
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: whole names say where a thing lives"
            name = node.module or ""
            found |= {name} | {f"{name}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_its_place() -> None:
    there = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert there == {*ROOMS, *SET_UP, "__init__"}


@pytest.mark.parametrize("room", [room for room in ROOMS if room not in SET_UP])
def test_imports_go_downward(room: str) -> None:
    above = {f"llmstream_nb.{name}" for name in [*list(ROOMS)[list(ROOMS).index(room) + 1 :], *SET_UP]}
    for path in files(room):
        assert not [name for name in imported(path) if any(name == bad or name.startswith(f"{bad}.") for bad in above)]


# The two entries of the package are left out: they import what everybody imports them for.
@pytest.mark.parametrize("folder", [PACKAGE, PACKAGE.with_name("benchmarks")], ids=lambda folder: folder.name)
def test_nothing_imports_in_circles(folder: Path) -> None:
    modules = {module(path): path for path in folder.rglob("*.py")}
    for entry in ("llmstream_nb", "llmstream_nb.__main__"):
        modules.pop(entry, None)
    graph = {
        name: {found for found in imported(path) if found in modules and found != name}
        for name, path in modules.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_each_name_stands_for_one_thing() -> None:
    """A file's name says what it is, wherever one meets it."""
    names = [path.stem for path in PACKAGE.rglob("*.py") if path.stem not in ("__init__", "__main__")]
    assert sorted(names) == sorted(set(names))


def test_the_protocol_does_no_io() -> None:
    for path in files("protocol"):
        assert {name.split(".")[0] for name in imported(path)} <= PURE


@pytest.mark.parametrize("path", [path for room in SET_UP for path in files(room)], ids=lambda path: path.stem)
def test_the_set_up_starts_on_a_bare_python(path: Path) -> None:
    assert not {name.split(".")[0] for name in imported(path, everywhere=False)} & THIRD_PARTY


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


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_keeps_to_its_budget(room: str) -> None:
    assert sum(code_lines(path) for path in files(room)) <= ROOMS[room]


def test_the_package_stays_small() -> None:
    assert sum(code_lines(path) for path in PACKAGE.rglob("*.py")) <= 10_423
