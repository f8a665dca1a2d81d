"""`python -m benchmarks.plot`: draw results.json into the README's picture."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib import pyplot as plt

from llmstream_nb import plots

HERE = Path(__file__).parent
PICTURE = HERE.parent / "notebooks" / "images" / "benchmarks.svg"


def main() -> None:
    """Write the picture; the same data give the same file."""
    results = json.loads((HERE / "results.json").read_text("utf-8"))
    figure = plots.measured(results)
    with plt.rc_context({"svg.hashsalt": "llmstream-nb"}):
        figure.savefig(PICTURE, metadata={"Date": None})  # on white, so that it can be read on a dark page too


if __name__ == "__main__":
    main()
