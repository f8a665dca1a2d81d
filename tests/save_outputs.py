"""For maintainers: run notebooks and save their outputs in a stable form."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmstream_nb.setup.environment import ROOT, say
from llmstream_nb.setup.redis_server import child_environment
from llmstream_nb.setup.restore import NOTEBOOKS, named

from .stills import WIDGET_STATE, WIDTH, add_stills
from .suites import ENVIRONMENT

# Cells return at once; this one returns when the views of answers have shown the ends of these.
SETTLE = """
import time
from llmstream_nb.widgets.live import hub
until = time.monotonic() + 60
while time.monotonic() < until and any(hasattr(view, "transcript") for view in list(hub._views)):
    time.sleep(0.05)
"""
# After each cell: a stream's view sends a page what is new alone, so that nothing of it would be saved. Its picture is
# of the cell after which it showed most (entries, then pending ones, then readers) before there was another of its key.
SNAP = """
from llmstream_nb.widgets.live import hub as _hub
_latest = globals().get("_latest", {}) | {v.key: v for v in list(_hub._views) if hasattr(v, "cursor") and not hasattr(v, "_saved")}
for _view in [view for view in list(_hub._views) if hasattr(view, "cursor") and _latest[view.key] is view]:
    _view._due = 0.0
    _view.reader(_view.client).read([_view])
    _entries, _marks = _view._known
    _much = len(_entries) + _marks["gone"], sum(g["pending"] for g in _marks["groups"]), len(_marks.get("readers", ()))
    if _much > getattr(_view, "_saved", (0, 0, -1)):
        _view._saved, _view.whole_wanted = _much, True
        _view.show()
"""
# What differs from run to run or from machine to machine, and so has no place in a committed notebook.
UNSTABLE = re.compile(rf"\bat 0x[0-9a-f]{{6,}}|{re.escape(str(ROOT))}|/ipykernel_\d+/|{re.escape(str(Path.home()))}/")


def save_outputs(names: Sequence[str]) -> int:
    """Run the named notebooks as the tests do, on embedded fakeredis, and save them with their outputs and stills."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    from .browser.lab import chromium

    wanted = child_environment(**ENVIRONMENT)
    os.environ.clear()
    os.environ.update(wanted)  # the kernels take it over
    chosen, bad = named(names, sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))), 0
    for name in chosen:
        notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
        began = time.monotonic()
        where = {"metadata": {"path": str(NOTEBOOKS)}}
        client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources=where)
        cells = notebook.cells
        notebook.cells = [part for cell in cells for part in (cell, *_snap(cell))] + [nbformat.v4.new_code_cell(SETTLE)]
        try:
            client.execute()
        except CellExecutionError as error:
            say(f"{name}: not saved: {error}")
            bad += 1
            continue
        notebook.cells = cells
        with chromium() as browser:
            found = add_stills(
                browser.new_page(viewport={"width": WIDTH, "height": 720}),
                notebook,
                nbformat.read(NOTEBOOKS / name, as_version=4),
            )
        notebook = normalise(notebook)
        found += unstable(notebook)
        if found:
            say(f"{name}: not saved: " + "; ".join(found))
            bad += 1
            continue
        nbformat.write(notebook, NOTEBOOKS / name)
        say(f"{name}: saved ({time.monotonic() - began:.0f} s)")
    return 1 if bad or not chosen else 0


def _snap(cell: Any) -> list[Any]:
    import nbformat

    return [nbformat.v4.new_code_cell(SNAP)] * (cell.cell_type == "code")


def normalise(notebook: Any) -> Any:
    """An executed notebook as it is committed: the same bytes whenever the outputs are the same."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    } | {key: value for key, value in notebook.metadata.items() if key not in ("kernelspec", "language_info")}
    count = 0
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        if cell.source.strip():
            count += 1
            cell.execution_count = count
        merged: list[Any] = []
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            last = merged[-1] if merged else {}
            if output.output_type == "stream" and output.name == last.get("name"):
                last.text += output.text  # the kernel cuts a stream up as time has it
            else:
                merged.append(output)
        cell.outputs = merged
    return _number_widgets(notebook)


def _number_widgets(notebook: Any) -> Any:
    """Number the widgets' random ids in order."""
    import nbformat

    state = notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    text = json.dumps(notebook)
    ids = dict.fromkeys([*re.findall(r'"model_id": "([0-9a-f]{32})"', text), *state])
    for number, old in enumerate(ids, 1):
        text = text.replace(old, f"{number:032x}")
    numbered = nbformat.from_dict(json.loads(text))
    if not state:
        numbered.metadata.pop("widgets", None)
    return numbered


def unstable(notebook: Any) -> list[str]:
    """Where outputs hold memory addresses or paths of this machine, as phrases to show."""
    found = []
    for number, cell in enumerate(notebook.cells):
        hit = UNSTABLE.search(json.dumps(cell.get("outputs", [])))
        if hit:
            found.append(f"cell {number} shows {hit[0]!r}, which differs elsewhere")
    return found
