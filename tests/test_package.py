"""The package by itself: small to install, whole in its wheel, and clear about what an extra would bring."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import uuid
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from llmstream_nb.setup.environment import LOCKED, PYTHON, ROOT

ALONE = Path(__file__).with_name("base_alone.py")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
# What needs an extra, and which; every other name of the package works without.
WANTS = {
    "notebook": ["AnswerView", "AskPanel", "Monitor", "StreamView"],
    "web": ["WebServer", "create_app"],
    "tables": ["plots", "tables"],
    "all": ["checks", "faults"],
}

# Refuses what is named; then takes each name of the kit, and prints what became of it.
TRY_ALL = """
import sys
from importlib import import_module

refused = set(sys.argv[1].split())

class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import llmstream_nb
from llmstream_nb.extras import MissingExtra

for name in llmstream_nb.__all__:
    try:
        getattr(llmstream_nb, name)
        print(name)
    except MissingExtra as missing:
        print(missing)
for module in sys.argv[2].split():
    import_module(module)
"""
# Rooms that are the core, or that all viewers share; `embedded` is the Redis inside Python.
CORE = [f"llmstream_nb.{name}" for name in ("viewing.transcript", "viewing.broken", "viewing.tracebacks", "setup.cli")]


def closure(requirements: list[str]) -> set[str]:
    """The distributions that `requirements` bring, as they are installed here."""
    found, todo = set[tuple[str, str]](), [(Requirement(line), "") for line in requirements]
    while todo:
        requirement, within = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": within}):
            continue
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in found:
                continue
            found.add((name, extra))
            needs = metadata.requires(name) if name != "llmstream-nb" else EXTRAS[extra] if extra else []
            todo += [(Requirement(line), extra) for line in needs or []]
    return {name for name, _ in found}


def others(requirements: list[str]) -> str:
    """The top-level names that can be imported here, but not where only these are installed."""
    names = closure(requirements) | {"llmstream-nb"}
    there = metadata.packages_distributions().items()
    return " ".join(top for top, by in there if not names & {canonicalize_name(one) for one in by})


def outcome(extra: str) -> dict[str, str]:
    """What becomes of each public name where the base and this extra are installed: "", or the error."""
    command = [sys.executable, "-c", TRY_ALL, others(EXTRAS[""] + EXTRAS[extra]), " ".join(CORE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return {name: error for name, _, error in (line.partition(" ") for line in done.stdout.splitlines())}


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_name_works_or_tells_its_extra(extra: str) -> None:
    wanted = {name: wanted for wanted, names in WANTS.items() for name in names if extra not in (wanted, "all")}
    for name, error in outcome(extra).items():
        if name not in wanted:
            assert error == ""
        elif error or not extra:  # one extra may happen to bring what another does
            assert re.fullmatch(rf'needs \w+: pip install "llmstream-nb\[{wanted[name]}\]"', error)


def test_the_base_is_small() -> None:
    assert {Requirement(line).name for line in EXTRAS[""]} == {"redis", "openai", "python-dotenv"}
    assert not closure(EXTRAS[""]) & {"ipython", "jupyterlab", "numpy", "pandas", "fastapi", "fakeredis", "matplotlib"}
    assert len(closure(EXTRAS[""])) <= 24


# ----------------------------------------------------------------------------------------------- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built without a network."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    shutil.copytree(ROOT / "llmstream_nb", source / "llmstream_nb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("notebooks", "tests", "benchmarks"):  # what a checkout has beside it
        (source / name).mkdir()
        (source / name / "__init__.py").touch()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, timeout=120)
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        inside = {name for name in file.namelist() if ".dist-info/" not in name}
    files = (path for path in (ROOT / "llmstream_nb").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert inside == {path.relative_to(ROOT).as_posix() for path in files}
    assert {Path(name).suffix for name in inside} >= {".py", ".pyi", ".typed", ".js", ".css", ".html", ".json", ".md"}


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory) -> Path:
    """The Python of an environment in which the wheel was installed, with the base packages as locked."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
    python = folder / PYTHON.relative_to(PYTHON.parents[1])
    options = ["--python", str(python), "install", "--quiet", "--only-binary=:all:", "--retries=1", "-c", str(LOCKED)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *options, str(wheel)], capture_output=True, text=True, timeout=240
    )
    if done.returncode and re.search("NewConnectionError|Max retries|No matching distribution", done.stderr):
        pytest.skip(f"no network to install from: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return python


def run(bare: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run that Python outside the checkout, and without what points to it."""
    own = ("PYTHON", "LLMSTREAM", "REDIS_URL", "OPENAI")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(own)} | changes
    return subprocess.run([bare, *arguments], cwd=bare.parent, env=environ, capture_output=True, text=True, timeout=120)


def test_all_of_the_core_works_with_the_base_packages_alone(bare: Path, request) -> None:
    servers = request.getfixturevalue("real_servers")
    where = {"REDIS_URL": servers["redis-server"].url, "LLMSTREAM_PREFIX": f"t{uuid.uuid4().hex[:10]}"}
    done = run(bare, str(ALONE), **where)
    assert (done.returncode, done.stdout) == (0, "works\n"), done.stderr
    web = run(bare, "-m", "llmstream_nb", "web", **where)
    assert (web.returncode, web.stderr.count("\n")) == (1, 1)
    assert 'WebServer needs fastapi: pip install "llmstream-nb[web]"' in web.stderr


@pytest.mark.parametrize(("extra", "name"), [(extra, names[0]) for extra, names in WANTS.items()])
def test_what_is_not_installed_is_told_in_one_line(bare: Path, extra: str, name: str) -> None:
    done = run(bare, "-c", f"from llmstream_nb import {name}")
    assert re.search(rf'MissingExtra: {name} needs \w+: pip install "llmstream-nb\[{extra}\]"\n$', done.stderr)


def test_without_a_redis_it_says_how_to_get_one(bare: Path) -> None:
    done = run(bare, "-m", "llmstream_nb", "ask", "Why?")
    said = 'set REDIS_URL, or use the Redis inside Python, which needs fakeredis: pip install "llmstream-nb[notebook]"'
    assert (done.returncode, done.stderr) == (1, f"llmstream-nb: {said}\n")


@pytest.mark.parametrize("command", ["lab", "test", "save-outputs", "wheels somewhere"])
def test_commands_for_a_checkout_say_so(bare: Path, command: str) -> None:
    done = run(bare, "-m", "llmstream_nb", *command.split())
    said = f"llmstream-nb: {command.split(maxsplit=1)[0]} works in a copy of the repository only.\n"
    assert (done.returncode, done.stderr) == (1, said)
