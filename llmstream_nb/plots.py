"""Plots of answers: how their text arrived, and what became of their readers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import redis

from llmstream_nb.answers.ask import Answer
from llmstream_nb.protocol.wire import LLMStreamError
from llmstream_nb.tables import entries

if TYPE_CHECKING:  # it takes its time to import
    from matplotlib.figure import Figure

# Told apart by dashes and marks as well: colours don't reach everybody, nor a black-and-white print.
STYLES = (
    ("#0072b2", "-", "o", "●"),
    ("#d55e00", "--", "s", "■"),
    ("#007a5a", "-.", "^", "▲"),
    ("#8a4f7d", ":", "D", "◆"),
)


def arrival(*answers: Answer | str, client: redis.Redis | None = None) -> Figure:
    """Draw how many characters of each answer had arrived, over the seconds since it was begun.

    A mark shows when its first text came; the label beside the line's end begins with the same mark.
    Raises as `tables.entries` does.
    """
    labels = []  # height, text, colour
    with drawing() as (figure, axes):
        for answer, (colour, dashes, mark, sign) in zip(answers, cycle(STYLES), strict=False):
            texts = _texts(answer, client)
            seconds = [0.0, *texts["ms"] / 1000]
            characters = [0, *texts["text"].str.len().cumsum()]
            axes.plot(seconds, characters, color=colour, linestyle=dashes, drawstyle="steps-post")
            axes.plot(seconds[1:2], characters[1:2], color=colour, marker=mark, markersize=8, clip_on=False)
            came = f"first text after {seconds[1]:.1f} s" if len(texts) else "no text"
            labels.append((characters[-1], f"{sign} {_name(answer)}:\n{came}", colour))
        axes.set(xlabel="seconds since the answer was begun", ylabel="characters", xlim=(0, None), ylim=(0, None))
        at, room = float("inf"), axes.get_ylim()[1] / 6
        for height, text, colour in sorted(labels, reverse=True):
            at = min(height, at - room)  # below the label above
            _label(axes, at, text, colour)
    return figure


def lag(answer: Answer | str, reads: Iterable[tuple[float, int]], *, client: redis.Redis | None = None) -> Figure:
    """Draw how many entries were produced and how many a reader had read, and below it the lag between the two.

    `reads` is what the reader noted: Unix time in seconds, and how many entries it had read by then. The two
    clocks must agree. Raises as `tables.entries` does, and LLMStreamError where the start has been trimmed.
    """
    frame = _last_attempt(answer, client)
    if frame["seq"].min() > 0:
        raise LLMStreamError(f"the start of {_name(answer)!r} was trimmed, so nobody knows when it was produced")
    began = frame["time"].iloc[0].timestamp()
    produced = (frame["ms"].to_numpy(float) / 1000, frame["seq"].to_numpy(float) + 1)
    noted = np.array([(began, 0), *reads], dtype=float)
    read = (noted[:, 0] - began, noted[:, 1])
    moments = np.union1d(produced[0], read[0])
    behind = np.maximum(0, _steps(*produced, moments) - _steps(*read, moments))
    with drawing(rows=2, figsize=(7, 4.6), sharex=True) as (figure, (above, below)):
        for (seconds, count), what, at, (colour, dashes, *_) in (
            (produced, "produced", 1.0, STYLES[0]),
            (read, "read", 0.8, STYLES[1]),
        ):
            above.plot(seconds, count, color=colour, linestyle=dashes, drawstyle="steps-post")
            _label(above, at * produced[1][-1], f"{what}: {seconds[-1]:.1f} s", colour)
        colour = STYLES[3][0]
        below.fill_between(moments, behind, step="post", color=colour, alpha=0.3)
        below.plot(moments, behind, color=colour, drawstyle="steps-post")
        _label(below, behind.max(), f"at most {behind.max():,.0f}\nentries behind", colour)
        above.set(ylabel="entries", xlim=(0, None), ylim=(0, None))
        below.set(xlabel="seconds since the answer was begun", ylabel="lag in entries", ylim=(0, None))
    return figure


def pauses(*answers: Answer | str, client: redis.Redis | None = None) -> Figure:
    """Draw a row for each answer, with a stroke at each moment when text came; its label tells the longest pause.

    Raises as `tables.entries` does.
    """
    with drawing(figsize=(7, 0.8 + 0.5 * len(answers))) as (figure, axes):
        for row, (answer, (colour, *_)) in enumerate(zip(answers, cycle(STYLES), strict=False)):
            seconds = _texts(answer, client)["ms"] / 1000
            axes.eventplot(seconds.to_numpy(float), lineoffsets=row, linelengths=0.7, colors=colour)
            _label(axes, row, f"{_name(answer)}: longest pause {_longest(seconds):.2f} s", colour)
        axes.set(xlabel="seconds since the answer was begun", xlim=(0, None), yticks=[])
        axes.invert_yaxis()  # the first answer on top
    return figure


def coalescing(answers: Mapping[int, Answer | str], *, client: redis.Redis | None = None) -> Figure:
    """Draw, over the `coalesce_ms` that each answer was written with: entries, first text, longest pause.

    Raises as `tables.entries` does.
    """
    figures: dict[str, list[float]] = {"entries with text": [], "first text, s": [], "longest pause, s": []}
    for answer in answers.values():
        seconds = _texts(answer, client)["ms"] / 1000
        for values, value in zip(figures.values(), (len(seconds), seconds.min(), _longest(seconds)), strict=True):
            values.append(float(value) if len(seconds) else 0.0)
    with drawing(columns=3, figsize=(9, 2.8)) as (figure, panels):
        for panel, (title, values), (colour, *_) in zip(panels, figures.items(), STYLES, strict=False):
            bars = panel.bar([str(ms) for ms in answers], values, color=colour)
            panel.bar_label(bars, fmt="{:,.0f}" if title.startswith("entries") else "{:.2f}")
            panel.set(title=title, xlabel="coalesce_ms")
            panel.margins(y=0.15)
        top = max(panels[1].get_ylim()[1], panels[2].get_ylim()[1])
        for panel in panels[1:]:  # the same seconds, at the same height
            panel.set_ylim(0, top)
    return figure


# ------------------------------------------------------------------------------------------------- helpers


@contextmanager
def drawing(
    rows: int = 1, columns: int = 1, figsize: tuple[float, float] = (7, 3.2), **options: Any
) -> Iterator[tuple[Figure, Any]]:
    """A new figure and its axes; dark on white, so that it can be read in a dark notebook too."""
    from matplotlib import pyplot as plt

    with plt.style.context("default"):
        figure, axes = plt.subplots(rows, columns, figsize=figsize, layout="constrained", **options)
        for each in np.ravel(axes):
            each.spines[["top", "right"]].set_visible(False)
        try:
            yield figure, axes
        finally:  # else Jupyter shows it at the end of the cell, and once more as the cell's value
            plt.close(figure)


def _label(axes: Any, at: float, text: str, colour: str) -> None:
    """Write to the right of the plot, at that height."""
    place = {"xy": (1.02, at), "xycoords": ("axes fraction", "data"), "va": "center"}
    axes.annotate(text, color=colour, annotation_clip=False, **place)


def _name(answer: Answer | str) -> str:
    return answer if isinstance(answer, str) else answer.id


def _last_attempt(answer: Answer | str, client: redis.Redis | None) -> pd.DataFrame:
    frame = entries(answer, client=client)
    return frame[frame["attempt"] == frame["attempt"].max()]


def _texts(answer: Answer | str, client: redis.Redis | None) -> pd.DataFrame:
    frame = _last_attempt(answer, client)
    return frame[frame["kind"] == "text"]


def _longest(seconds: pd.Series[Any]) -> float:
    return float(seconds.diff().max()) if len(seconds) > 1 else 0.0


def _steps(times: np.ndarray, values: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """The value at each moment of what grows in steps, from 0 on."""
    return np.array([0.0, *values])[np.searchsorted(times, moments, side="right")]
