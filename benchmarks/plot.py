"""`python -m benchmarks.plot`: draw results.json into the README's picture."""

from __future__ import annotations

import json
from pathlib import Path

from llmstream_nb import plots

HERE = Path(__file__).parent
PICTURE = HERE.parent / "notebooks" / "images" / "benchmarks.png"


def main() -> None:
    """Write the picture; the same data give the same file."""
    results = json.loads((HERE / "results.json").read_text("utf-8"))
    figure = plots.measured(results)
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})  # on white, so that a dark page can show it too


if __name__ == "__main__":
    main()
