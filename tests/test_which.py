"""The table of peers says what the drills printed, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.drills.__main__ import ROWS, SIDES, WHICH

DOC = Path(__file__).parents[1] / "docs" / "which-should-i-take.md"


def table(path: Path) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in path.read_text("utf-8").splitlines() if line.startswith("|")]


def test_the_doc_has_the_table_that_was_printed() -> None:
    assert table(DOC) == table(WHICH)


def test_each_cell_is_what_the_command_can_print() -> None:
    (head, _, *lines) = table(WHICH)
    assert head == list(SIDES)
    for (name, *cells), (row, allowed) in zip(lines, ROWS.items(), strict=True):
        assert (name, len(cells)) == (row, len(SIDES))
        assert [cell for cell in cells if not re.fullmatch(allowed, cell)] == []
