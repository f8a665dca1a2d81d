"""What all measurements share: interleaved runs, medians, ratios, goals, and the table that shows them."""

from __future__ import annotations

import multiprocessing
import platform
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

from tests.servers import RedisServer
from tests.servers import available as servers_there

ROOT = Path(__file__).resolve().parents[1]
SPAWN = multiprocessing.get_context("spawn")  # children begin afresh on every system
LIBRARIES = ("redis", "hiredis", "fakeredis", "openai", "jupyterlab", "ipykernel", "ipywidgets", "anywidget", "uvicorn")

Figures = Mapping[str, float]  # one run of one side: what was measured, named with its unit
Samples = dict[str, dict[str, list[float]]]  # side, figure, and its value in each run


class Unavailable(Exception):
    """What is needed for a row is not there; the text says what."""


@dataclass(frozen=True)
class Line:
    """One line of the table: a figure of one side, and perhaps of another beside it.

    Where something stands beside, `by` says how the two are compared: by their `ratio`, their `difference`, or not
    at all (`value`). `goal` is a limit for that, or for the value alone, as `(">=", 0.7)`; with `always` the worst
    run is held against it, not the median.
    """

    what: str
    figure: str
    side: str = "the kit"
    beside: str = ""
    goal: tuple[str, float] | None = None
    by: str = "ratio"
    always: bool = False


@dataclass
class Row:
    """One row: how to measure it, and which lines show it. `bound` is when it is ended, in seconds."""

    name: str
    title: str
    measure: Callable[[bool], tuple[str, Samples]]  # takes whether to be quick; gives the sizes in words, and samples
    lines: tuple[Line, ...]
    bound: float


ROWS: dict[str, Row] = {}


def row(
    title: str, *lines: Line, bound: float = 900
) -> Callable[[Callable[[bool], tuple[str, Samples]]], Callable[[bool], tuple[str, Samples]]]:
    """Make the function a row, under its own name."""

    def register(measure: Callable[[bool], tuple[str, Samples]]) -> Callable[[bool], tuple[str, Samples]]:
        name = measure.__name__.replace("_", "-")
        ROWS[name] = Row(name, title, measure, lines, bound)
        return measure

    return register


# ----------------------------------------------------------------------------------------------- measuring


def interleave(sides: Mapping[str, Callable[[], Figures]], runs: int) -> Samples:
    """Run the sides in turn, ABCABC…, so that what else the machine does meets all of them alike."""
    samples: Samples = {side: {} for side in sides}
    for _ in range(runs):
        for side, run in sides.items():
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
    process = SPAWN.Process(target=_measure, args=(chosen.name, quick, theirs))
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


def _measure(name: str, quick: bool, answer: Connection) -> None:
    from benchmarks.__main__ import load

    load()
    try:
        answer.send(("measured", *ROWS[name].measure(quick)))
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
    shown: dict[str, Any] = {"what": line.what, "figure": line.figure, "side": line.side, "beside": line.beside}
    shown |= {"goal": " ".join(map(str, line.goal or ())), "value": _spread(mine), "other": _spread(other)}
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
        return "–"
    middle, least, most = map(number, spread)
    return middle if least == middle == most else f"{middle} ({least} to {most})"


def table(results: Iterable[Result]) -> str:
    """All rows as one Markdown table."""
    lines = ["| row | what | side | measured | beside | measured | ratio | goal | |", "|---|---|---|---|---|---|---|---|---|"]
    for result in results:
        name = f"**{result.name}**"
        if result.failed or result.skipped:
            lines.append(f"| {name} | {'failed' if result.failed else 'skipped'}: {result.failed or result.skipped} |" + " |" * 7)
        for line in result.lines:
            compared = shown(line["ratio"]) if "ratio" in line else ""
            compared = f"by {shown(line['difference'])}" if "difference" in line else compared
            verdict = {True: "met", False: "**missed**"}.get(line.get("met"), "") if line["goal"] else ""
            cells = [name, f"{line['what']}, {line['figure']}", line["side"], shown(line["value"])]
            cells += [line["beside"], shown(line["other"]) if line["beside"] else ""]
            cells += [compared, line["goal"], verdict]
            lines.append(f"| {' | '.join(cells)} |".replace(">=", "≥").replace("<=", "≤"))
            name = ""
    return "\n".join(lines)


def report(about: Mapping[str, str], results: Iterable[Result]) -> str:
    """RESULTS.md: the table, what each row was run with, and on what."""
    results = list(results)
    kept = [line for result in results for line in result.lines if "met" in line]
    met = sum(line["met"] for line in kept)
    rows = [f"- **{result.name}**: {result.title}; {result.sizes} ({result.seconds:.0f} s)." for result in results if result.sizes]
    return "\n".join(
        [
            "# Results",
            "",
            f"{met} of {len(kept)} goals met. Each figure is the median of all runs, with the least and the greatest in "
            "parentheses; a ratio is the median of the runs' own ratios. The sides ran in turn. "
            "[What is measured, and how](README.md).",
            "",
            table(results),
            "",
            *rows,
            "",
            "Measured with " + ", ".join(f"{name} {value}" for name, value in about.items()) + ".",
            "",
        ]
    )


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
