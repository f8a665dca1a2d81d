"""What all measurements share: interleaved runs, medians, ratios, goals, and the table that shows them."""

from __future__ import annotations

import gc
import multiprocessing
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from llmstream_nb.faults.servers import RedisServer
from llmstream_nb.faults.servers import available as servers_there

ROOT = Path(__file__).resolve().parents[1]
SPAWN = multiprocessing.get_context("spawn")  # children begin afresh on every system
LIBRARIES = ("redis", "hiredis", "fakeredis", "openai", "jupyterlab", "ipykernel", "ipywidgets", "anywidget", "uvicorn")

Figures = Mapping[str, float]  # one run of one side: what was measured, named with its unit
Samples = dict[str, dict[str, list[float]]]  # side, figure, and its value in each run
Measure = Callable[[bool], tuple[str, Samples]]  # takes whether to be quick; gives the sizes in words, and samples


class Unavailable(Exception):
    """What is needed for a row is not there; the text says what."""


@dataclass(frozen=True)
class Line:
    """One line of the table: a figure of one side, perhaps beside another's, perhaps with a goal.

    Where something stands beside, `by` says how the two are compared: by their `ratio`, their `difference`, or not
    at all (`value`). `goal` is a limit for that, or for the value alone, as `(">=", 0.7)`; with `always` the worst
    run is held against it, not the median.
    """

    figure: str
    side: str
    beside: str = ""
    goal: tuple[str, float] | None = None
    by: str = "ratio"
    always: bool = False


@dataclass
class Row:
    """One row: how to measure it, and which lines show it. `bound` is when it is ended, in seconds."""

    name: str
    title: str
    measure: Measure
    lines: tuple[Line, ...]
    bound: float


ROWS: dict[str, Row] = {}


def row(title: str, *lines: Line, bound: float = 900) -> Callable[[Measure], Measure]:
    """Make the function a row, under its own name."""

    def register(measure: Measure) -> Measure:
        name = measure.__name__.replace("_", "-")
        ROWS[name] = Row(name, title, measure, lines, bound)
        return measure

    return register


# ----------------------------------------------------------------------------------------------- measuring


def interleave(sides: Mapping[str, Callable[[], Figures]], runs: int) -> Samples:
    """Run the sides in turn, ABCABC…, so that what else the machine does meets all of them alike."""
    samples: Samples = {side: {} for side in sides}
    gc.collect()
    gc.freeze()  # what the measuring itself holds shall not be looked through in the middle of a run
    for _ in range(runs):
        for side, run in sides.items():
            gc.collect()  # nobody tidies up after another
            for figure, value in run().items():
                samples[side].setdefault(figure, []).append(float(value))
    return samples


@contextmanager
def redis_server() -> Iterator[RedisServer]:
    """A server for one row alone. It writes nothing to disk, so that no side pays for another's data."""
    programs = servers_there()
    if not programs:
        raise Unavailable("neither redis-server nor valkey-server is installed")
    with RedisServer(programs[0], appendonly="no") as server:
        yield server


def quantile(values: Iterable[float], part: float) -> float:
    """The smallest value that at least this part of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(part * len(ordered) + 0.499999) - 1))]


@contextmanager
def child(target: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """Run `target(connection, *arguments)` in a process of its own; the pipe to it is given, and ends it."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=target, args=(theirs, *arguments), daemon=False)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()


# ------------------------------------------------------------------------------------------- a row by itself


@dataclass
class Result:
    """What became of a row."""

    name: str
    title: str
    sizes: str = ""
    seconds: float = 0.0
    samples: Samples = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    skipped: str = ""  # why there is nothing
    failed: str = ""


def measure(chosen: Row, quick: bool) -> Result:
    """Run one row in a process of its own, so that no row sees what another has left behind."""
    result, began = Result(chosen.name, chosen.title), time.monotonic()
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_measure, args=(chosen.measure, quick, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(chosen.bound):
            raise EOFError(f"not done within {chosen.bound:g} seconds")
        kind, *content = ours.recv()
        if kind == "measured":
            result.sizes, result.samples = content
            result.lines = [judge(line, result.samples) for line in chosen.lines]
        else:
            setattr(result, kind, content[0])
    except EOFError as error:
        result.failed = str(error) or "its process ended"
    finally:
        if result.failed:
            _end_tree(process.pid)
        process.join()
    result.seconds = round(time.monotonic() - began, 1)
    return result


def _measure(function: Measure, quick: bool, answer: Connection) -> None:
    try:
        answer.send(("measured", *function(quick)))
    except Unavailable as reason:
        answer.send(("skipped", str(reason)))
    except Exception as error:
        answer.send(("failed", f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"))
        raise


def _end_tree(pid: int | None) -> None:
    """End a process that hangs, and all that it has started."""
    try:
        found = psutil.Process(pid)
        family = [*found.children(recursive=True), found]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue


# ------------------------------------------------------------------------------------------------- judging


def judge(line: Line, samples: Samples) -> dict[str, Any]:
    """What a line shows: the values, their ratio or difference run by run, and whether the goal is met."""
    mine = samples.get(line.side, {}).get(line.figure)
    other = samples.get(line.beside, {}).get(line.figure) if line.beside else None
    goal = f"{'≥' if line.goal[0] == '>=' else '≤'} {line.goal[1]:g}" if line.goal else ""
    shown: dict[str, Any] = {"figure": line.figure, "side": line.side, "beside": line.beside, "goal": goal}
    shown |= {"value": _spread(mine), "other": _spread(other)}
    compared = mine
    if mine and line.beside and line.by != "value":
        pairs = zip(mine, other or (), strict=False)
        compared = [a - b for a, b in pairs] if line.by == "difference" else [a / b for a, b in pairs if b]
        shown[line.by] = _spread(compared)
    if line.goal and compared:
        sign, limit = line.goal
        worst = (min if sign == ">=" else max)(compared)
        reached = worst if line.always else statistics.median(compared)
        shown["met"] = reached >= limit if sign == ">=" else reached <= limit
    return shown


def _spread(values: list[float] | None) -> list[float] | None:
    """Median, least and greatest."""
    return [statistics.median(values), min(values), max(values)] if values else None


# -------------------------------------------------------------------------------------------------- showing


def number(value: float) -> str:
    """A number with as many digits as it needs."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 3}f}"


def shown(spread: list[float] | None) -> str:
    """Median and spread as words."""
    if not spread:
        return "none"
    middle, least, most = map(number, spread)
    return middle if least == middle == most else f"{middle} ({least} to {most})"


def report(about: Mapping[str, str], results: Iterable[Result]) -> str:
    """RESULTS.md: the comparisons and goals of all rows, all figures of each, and what it was measured on."""
    results = list(results)
    goals = [line for result in results for line in result.lines if "met" in line]
    met = sum(line["met"] for line in goals)
    summary = (
        f"{met} of {len(goals)} goals met. Each figure is the median of all runs, with the least and the greatest in "
        "parentheses. The sides ran in turn; a ratio is the median of the runs' own ratios. "
        "[What is measured, and how](README.md)."
    )
    head = ["row", "figure", "side", "", "beside it", "", "ratio", "goal", ""]
    text = ["# Results", summary, _table(head, _compared(results))]
    for result in results:
        text.append(f"## {result.name}: {result.title}")
        if result.failed or result.skipped:
            text.append(f"{'Failed' if result.failed else 'Skipped'}: {result.failed or result.skipped}.")
            continue
        figures = dict.fromkeys(figure for side in result.samples.values() for figure in side)
        rows = [
            [figure, *(shown(_spread(side.get(figure))) if figure in side else "" for side in result.samples.values())]
            for figure in figures
        ]
        text += [f"{result.sizes}; took {result.seconds:.0f} s.", _table(["", *result.samples], rows)]
    text.append("Measured with " + ", ".join(f"{name} {value}" for name, value in about.items()) + ".")
    return "\n\n".join(text) + "\n"


def _compared(results: Iterable[Result]) -> Iterator[list[str]]:
    """The cells of the first table."""
    for result in results:
        name = (
            f"[{result.name}](#{re.sub('[^a-z0-9_ -]', '', f'{result.name} {result.title}'.lower()).replace(' ', '-')})"
        )
        if result.failed or result.skipped:
            yield [name, "failed" if result.failed else "skipped", *[""] * 7]
        for line in result.lines:
            ratio = shown(line["ratio"]) if "ratio" in line else ""
            ratio = f"{shown(line['difference'])} more" if "difference" in line else ratio
            other = shown(line["other"]) if line["beside"] else ""
            verdict = {True: "met", False: "**missed**", None: ""}[line.get("met")]
            yield [
                name,
                line["figure"],
                line["side"],
                shown(line["value"]),
                line["beside"],
                other,
                ratio,
                line["goal"],
                verdict,
            ]
            name = ""


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def surroundings() -> dict[str, str]:
    """What it ran on and with: versions, and no name of a host or path."""
    about = {"llmstream-nb": _said("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--tags") or "no git"}
    about |= {"Python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    about["cores"] = str(psutil.cpu_count())
    about["memory"] = f"{psutil.virtual_memory().total / 1e9:.0f} GB"
    about["busy before"] = f"{psutil.cpu_percent(2):.0f} %"
    for program in servers_there()[:1]:
        about[program] = _said(program, "--version").partition("v=")[2].partition(" ")[0]
    for library in LIBRARIES:
        try:
            about[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            about[library] = "not installed"
    about["Chromium"] = _said("chromium", "--version").removeprefix("Chromium ").partition(" ")[0] or "not installed"
    return about


def _said(*command: str) -> str:
    """What a program prints; nothing where it does not run."""
    if not shutil.which(command[0]):
        return ""
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.strip()
