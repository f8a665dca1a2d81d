"""Bring notebooks back as they came; for maintainers, run them and save their outputs in a stable form."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmstream_nb.environment import PRISTINE, ROOT, SetupError, say
from llmstream_nb.lab import child_environment
from llmstream_nb.suites import ENVIRONMENT

NOTEBOOKS = ROOT / "notebooks"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
# Cells return at once; this one returns when the views have shown the ends of their answers.
SETTLE = "import threading\nfor t in threading.enumerate():\n    t.name == 'llmstream views' and t.join(60)"
WIDGET_LIMIT = 200_000  # characters of saved widget state: more would drown the notebook's own changes
# What differs from run to run or from machine to machine, and so has no place in a committed notebook.
UNSTABLE = re.compile(rf"\bat 0x[0-9a-f]{{6,}}|{re.escape(str(ROOT))}|/ipykernel_\d+/|{re.escape(str(Path.home()))}/")


def _named(names: Sequence[str], all_names: Sequence[str]) -> list[str]:
    """The notebooks whose names begin as asked for; all of them where nothing is."""
    chosen = [name for name in all_names if not names or name.startswith(tuple(Path(n).name for n in names))]
    if not chosen:
        say(f"llmstream-nb: no notebook's name begins so. There are: {', '.join(all_names) or 'none'}.")
    return chosen


# ------------------------------------------------------------------------------------------------ restore


def restore(names: Sequence[str]) -> int:
    """Bring the named notebooks back, the changed ones after a copy into `notebooks/backup-<time>/`."""
    pristine = _pristine()
    chosen = _named(names, sorted(pristine))
    here = {name: (NOTEBOOKS / name).read_bytes() for name in chosen if (NOTEBOOKS / name).exists()}
    # git may have given this checkout the line ends of its system.
    changed = [name for name in chosen if here.get(name, b"").replace(b"\r\n", b"\n") != pristine[name]]
    backup = NOTEBOOKS / time.strftime("backup-%Y-%m-%d-%H%M%S")
    for name in changed:
        if name in here:
            backup.mkdir(parents=True, exist_ok=True)
            (backup / name).write_bytes(here[name])
        NOTEBOOKS.mkdir(exist_ok=True)
        (NOTEBOOKS / name).write_bytes(pristine[name])
        say(f"{name}: restored. If it is open, choose File > Reload Notebook from Disk.")
    if backup.exists():
        say(f"Your versions are in {backup.relative_to(ROOT)}.")
    if chosen and not changed:
        say("Nothing to restore: the notebooks are as they came.")
    return 0 if chosen else 2


def _pristine() -> dict[str, bytes]:
    """The notebooks as they came, by name: from git, or where there is none from the set-up's copy."""

    def git(*arguments: str) -> bytes:
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, timeout=60, check=False)
        if done.returncode:
            raise SetupError(f"git can't show the notebooks as they came: {done.stderr.decode().strip()}")
        return done.stdout

    if (ROOT / ".git").exists() and shutil.which("git"):
        paths = git("ls-tree", "--name-only", "HEAD", "notebooks/").decode().splitlines()
        return {Path(path).name: git("show", f"HEAD:{path}") for path in paths if path.endswith(".ipynb")}
    return {path.name: path.read_bytes().replace(b"\r\n", b"\n") for path in PRISTINE.glob("*.ipynb")}


# ------------------------------------------------------------------------------------------- save-outputs


def save_outputs(names: Sequence[str]) -> int:
    """Run the named notebooks as the tests do, on embedded fakeredis, and save them with their outputs."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    wanted = child_environment(**ENVIRONMENT)
    os.environ.clear()
    os.environ.update(wanted)  # the kernels take it over
    chosen, bad = _named(names, sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))), 0
    for name in chosen:
        notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
        began = time.monotonic()
        where = {"metadata": {"path": str(NOTEBOOKS)}}
        client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources=where)
        notebook.cells.append(nbformat.v4.new_code_cell(SETTLE))
        try:
            client.execute()
        except CellExecutionError as error:
            say(f"{name}: not saved: {error}")
            bad += 1
            continue
        notebook.cells.pop()
        notebook = normalise(notebook)
        found = unstable(notebook)
        if found:
            say(f"{name}: not saved: " + "; ".join(found))
            bad += 1
            continue
        nbformat.write(notebook, NOTEBOOKS / name)
        say(f"{name}: saved ({time.monotonic() - began:.0f} s)")
    return 1 if bad or not chosen else 0


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
    """Number the widgets' random ids in order, and keep their saved state only where it is small."""
    import nbformat

    state = notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    text = json.dumps(notebook)
    ids = dict.fromkeys([*re.findall(r'"model_id": "([0-9a-f]{32})"', text), *state])
    for number, old in enumerate(ids, 1):
        text = text.replace(old, f"{number:032x}")
    numbered = nbformat.from_dict(json.loads(text))
    if len(json.dumps(state)) > WIDGET_LIMIT or not state:
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
