"""The picture of what the benchmarks found: `python -m benchmarks.plot` draws it for the docs, notebook 07 itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmstream_nb.plots import STYLES, drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).parent
PICTURE = HERE.parent / "notebooks" / "images" / "benchmarks.png"

BESIDE = {"the tutorial": "tutorial", "plain redis-py": "redis-py", "the kit": "kit"}
# For each panel: row and figure of the results, title, and the sides to show under short names.
PANELS: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    ("produce", "chunks a second", "writing, chunks a second", BESIDE),
    ("read", "chunks a second", "reading, chunks a second", BESIDE),
    ("latency", "a chunk p50, ms", "model to reader, ms", BESIDE),
    ("askers", "exact, % of askers", "100 ask at once, % exact",
     {"the tutorial": "tutorial", "the kit, threads": "kit", "the kit, pool": "kit, pool"}),
    ("memory", "bytes", "500 tokens in Redis, bytes",
     {"the tutorial": "tutorial", "the kit": "kit", "the kit, coalesce_ms=100": "kit, 100 ms"}),
    ("jupyter", "kernel to browser, kB", "kernel to browser, kB",
     {"ipywidgets.HTML": "HTML widget", "plain=True": "kit, plain", "AnswerView": "kit"}),
)  # fmt: skip


def kept() -> dict[str, Any]:
    """What the last whole run found."""
    found: dict[str, Any] = json.loads((HERE / "results.json").read_text("utf-8"))
    return found


def measured(results: Mapping[str, Any]) -> Figure:
    """Draw what the benchmarks found, as their results.json has it: medians, and the spread of all runs as a line.

    Rows that were skipped are left out. Raises ValueError where none is left.
    """
    samples = {row["name"]: row["samples"] for row in results["rows"]}
    panels = [
        (title, sides, [samples[row][side][name] for side in sides])
        for row, name, title, sides in PANELS
        if all(name in samples.get(row, {}).get(side, {}) for side in sides)
    ]
    if not panels:
        raise ValueError("these results hold none of the rows that this plot shows: run python -m benchmarks")
    rows = -(-len(panels) // 3)
    with drawing(rows, columns=3, figsize=(9, 1.7 * rows)) as (figure, axes):
        for each, (title, sides, values) in zip(np.ravel(axes), panels, strict=False):
            medians = np.array([float(np.median(runs)) for runs in values])
            spread = np.abs([[min(runs), max(runs)] for runs in values] - medians[:, None]).T
            colours = [STYLES[0][0] if short.startswith("kit") else "#8c959f" for short in sides.values()]
            bars = each.barh(list(sides.values()), medians, xerr=spread, color=colours, ecolor="#1f2328")
            each.bar_label(bars, [f"{median:,.{2 if 0 < median < 10 else 0}f}" for median in medians], padding=4)
            each.set_title(title, loc="left", fontsize="medium")
            each.set(xticks=[])
            each.margins(x=0.35)
            each.invert_yaxis()  # the first side on top
        for each in np.ravel(axes)[len(panels) :]:
            each.remove()
    return figure


def main() -> None:
    """Write the picture; the same data give the same file."""
    # on white, so that a dark page can show it too
    measured(kept()).savefig(PICTURE, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
