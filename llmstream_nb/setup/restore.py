"""Bring notebooks back as they came, without losing what the reader has written."""

import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from llmstream_nb.setup.environment import PRISTINE, ROOT, SetupError, say

NOTEBOOKS = ROOT / "notebooks"
STAGE = ROOT / "presented"  # beside it, so that links lead to the same places: what `lab --present` shows
STAGE_LAB = STAGE / ".lab"  # its JupyterLab's settings and layouts
PROJECTOR = Path(__file__).with_name("projector")


def named(names: Sequence[str], all_names: Sequence[str]) -> list[str]:
    """The notebooks whose names begin as asked for; all of them where nothing is."""
    chosen = [name for name in all_names if not names or name.startswith(tuple(Path(n).name for n in names))]
    if not chosen:
        say(f"llmstream-nb: no notebook's name begins so. There are: {', '.join(all_names) or 'none'}.")
    return chosen


def restore(names: Sequence[str]) -> int:
    """Bring the named notebooks back, the changed ones after a copy into `notebooks/backup-<time>/`."""
    as_they_came = pristine()
    chosen = named(names, sorted(as_they_came))
    here = {name: (NOTEBOOKS / name).read_bytes() for name in chosen if (NOTEBOOKS / name).exists()}
    # git may have given this checkout the line ends of its system.
    changed = [name for name in chosen if here.get(name, b"").replace(b"\r\n", b"\n") != as_they_came[name]]
    backup = NOTEBOOKS / time.strftime("backup-%Y-%m-%d-%H%M%S")
    for name in changed:
        if name in here:
            backup.mkdir(parents=True, exist_ok=True)
            (backup / name).write_bytes(here[name])
        NOTEBOOKS.mkdir(exist_ok=True)
        (NOTEBOOKS / name).write_bytes(as_they_came[name])
    if changed:
        kept = f"; your versions are in {backup.relative_to(ROOT)}" if backup.exists() else ""
        say(f"Restored: {', '.join(changed)}{kept}. If one is open, choose File > Reload Notebook from Disk.")
    elif chosen:
        say("Nothing to restore: the notebooks are as they came.")
    return 0 if chosen else 2


def set_stage() -> None:
    """Fill the folder for a projector anew: the notebooks as they came, without outputs, and what lies beside them."""
    shutil.rmtree(STAGE, ignore_errors=True)
    besides = shutil.ignore_patterns("*.ipynb", "backup-*", ".*")
    shutil.copytree(NOTEBOOKS, STAGE, ignore=besides, dirs_exist_ok=True)
    for name, text in pristine().items():
        notebook = json.loads(text)
        notebook["metadata"].pop("widgets", None)
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell |= {"execution_count": None, "outputs": []}
        (STAGE / name).write_text(json.dumps(notebook, ensure_ascii=False, indent=1), "utf-8")
    for plugin, settings in json.loads((PROJECTOR / "settings.json").read_text("utf-8")).items():
        file = STAGE_LAB / (plugin.replace(":", "/") + ".jupyterlab-settings")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings), "utf-8")


def pristine() -> dict[str, bytes]:
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
