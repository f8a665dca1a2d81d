"""Plots of answers: how their text arrived."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

from llmstream_nb.tables import entries

if TYPE_CHECKING:
    import redis
    from matplotlib.figure import Figure

    from llmstream_nb.answer import Answer

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
    from matplotlib import pyplot as plt

    labels = []  # height, text, colour
    with plt.style.context("default"):  # dark on white: readable in a dark notebook too
        figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
        for answer, (colour, dashes, mark, sign) in zip(answers, cycle(STYLES), strict=False):
            frame = entries(answer, client=client)
            frame = frame[frame["attempt"] == frame["attempt"].max()]
            texts = frame[frame["kind"] == "text"]
            seconds = [0.0, *texts["ms"] / 1000]
            characters = [0, *texts["text"].str.len().cumsum()]
            axes.plot(seconds, characters, color=colour, linestyle=dashes, drawstyle="steps-post")
            axes.plot(seconds[1:2], characters[1:2], color=colour, marker=mark, markersize=8, clip_on=False)
            came = f"first text after {seconds[1]:.1f} s" if len(texts) else "no text"
            name = answer if isinstance(answer, str) else answer.id
            labels.append((characters[-1], f"{sign} {name}:\n{came}", colour))
        axes.set(xlabel="seconds since the answer was begun", ylabel="characters", xlim=(0, None), ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        at, room = float("inf"), axes.get_ylim()[1] / 6
        for height, text, colour in sorted(labels, reverse=True):
            at = min(height, at - room)  # below the label above
            place = {"xy": (1.02, at), "xycoords": ("axes fraction", "data"), "va": "center"}
            axes.annotate(text, color=colour, annotation_clip=False, **place)
    plt.close(figure)  # else Jupyter shows it at the end of the cell, and once more as the cell's value
    return figure
