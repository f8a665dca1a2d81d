"""The workshop's pages keep to the notebooks: links and headings, clock times that add up, polls and their answers."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmstream_nb import connect
from llmstream_nb.faults import servers
from llmstream_nb.llm import prepared, scripted
from llmstream_nb.setup import cli
from llmstream_nb.setup.redis_server import answers, child_environment

from . import model
from .model import wait_for
from .test_notebooks import LESSONS, LINK, NOTEBOOKS, OPTIONAL, ROOT, WIDTH, prose
from .test_notebooks import test_links_and_pictures_lead_somewhere as check_links

WORKSHOP = ROOT / "workshop"
PAGES = sorted(WORKSHOP.glob("*.md"))
needs_redis = pytest.mark.skipif("redis-server" not in servers.available(), reason="redis-server is not on PATH")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere_and_name_what_is_there(path: Path) -> None:
    text = path.read_text("utf-8")
    if LINK.search(text):
        check_links(path)
    for _, label, target in LINK.findall(text):
        if target.startswith("../notebooks/") and not re.match(r"\d\d", label):
            headings = [line.lstrip("# ") for line in prose(path.parent / target.partition("#")[0]).splitlines()]
            assert label in headings, f"{target} has no heading {label!r}"


def test_every_page_is_on_the_list() -> None:
    listed = {target for _, _, target in LINK.findall((WORKSHOP / "README.md").read_text("utf-8"))}
    assert {path.name for path in PAGES} - {"README.md"} <= listed


@pytest.mark.parametrize(("page", "whole"), [("45-minutes.md", 45), ("2-hours.md", 120)])
def test_the_clock_adds_up(page: str, whole: int) -> None:
    rows = re.findall(r"(?m)^\| (\d):(\d\d) \| (\d+) \|", (WORKSHOP / page).read_text("utf-8"))
    now = 0
    for hours, minutes, length in rows:
        assert 60 * int(hours) + int(minutes) == now
        now += int(length)
    assert now == whole
    advice = re.findall(r"\*\*(?:Late a|A)t (\d:\d\d)\?\*\*", (WORKSHOP / page).read_text("utf-8"))
    assert advice and {(time[0], time[2:]) for time in advice} <= {(hours, minutes) for hours, minutes, _ in rows}


@pytest.mark.parametrize("notebook", LESSONS, ids=lambda path: path.stem)
def test_each_notebook_has_its_polls_and_its_recovery_line(notebook: Path) -> None:
    number = notebook.stem[:2]
    found = re.search(rf"(?ms)^## {number} · .*?(?=^## |\Z)", (WORKSHOP / "notebooks.md").read_text("utf-8"))
    assert found, f"notebooks.md has no part about {number}"
    part, text = found[0], prose(notebook)
    polls = re.findall(r"> \*\*Poll:\*\* (.+?\?) \(a\) .+? \(b\) .+? \(c\) .+\n\n- \*\*(\([abc]\))\.\*\*", part)
    told = re.findall(r"(?s)\*\*Predict[^*]*\*\* ([^\n]+\?)\n.*?\n\*\*(\([abc]\))\.\*\*", text)
    assert polls and polls == told, f"the predictions of {number} are {told}"
    assert f"- **Recovery line:** `python3 -m llmstream_nb restore {number}`" in part
    assert "- **If the Wi-Fi dies:** " in part


@pytest.mark.parametrize("notebook", [*NOTEBOOKS, OPTIONAL], ids=lambda path: path.stem)
def test_each_notebook_has_its_part_by_its_name_and_minutes(notebook: Path) -> None:
    number = notebook.stem.partition("-")[0]
    minutes = re.search(r"(?m)^(\d+) minutes", prose(notebook))
    assert minutes
    found = re.findall(rf"(?m)^## {number} · (.+) · (\d+) minutes$", (WORKSHOP / "notebooks.md").read_text("utf-8"))
    assert len(found) == 1 and found[0][1] == minutes[1]
    # The name by which other pages call it: 04b's own title says that it is optional.
    assert f"{number} {found[0][0]}]" in (ROOT / "notebooks" / "glossary.ipynb").read_text("utf-8")


def test_each_command_and_menu_of_the_pages_is_there() -> None:
    for page in PAGES:
        for line in re.findall(r"(?:python3|py) (-m llmstream_nb [^`\n]+)", page.read_text("utf-8")):
            words = [word for word in shlex.split(line.split("|")[0])[2:] if word != ".."]
            cli.parser().parse_args([*words, *[".."] * (words[-1] == "--wheels")])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_code_that_is_typed_on_stage_fits_a_projector(path: Path) -> None:
    for block in re.findall(r"(?ms)^```python\n(.*?)^```", path.read_text("utf-8")):
        assert max(map(len, block.splitlines())) <= WIDTH


# ------------------------------------------------------------------------------------------------ the drills


def drill(name: str) -> list[str]:
    """The blocks of code of a drill; it goes faster here than on stage, and what a cell shows is kept."""
    part = re.search(rf"(?ms)^## {name}$.*?(?=^## |\Z)", (WORKSHOP / "drills.md").read_text("utf-8"))
    assert part
    blocks = re.findall(r"(?ms)^```\w*\n(.*?)^```", part[0])
    quick = [block.replace("pace=20", "pace=150").replace('"timeout": 5', '"timeout": 1') for block in blocks]
    return [re.sub(r"(?m)^AnswerView\(", "view = AnswerView(", block) for block in quick]


@pytest.fixture
def started(monkeypatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes that a test starts; they end with it, and are given time to start."""
    monkeypatch.setattr(model, "PATIENCE", 90.0)
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


@needs_redis
def test_drill_kill_a_worker(real_servers, started, tmp_path) -> None:
    url = real_servers["redis-server"].url
    environment = child_environment(REDIS_URL=url, LLMSTREAM_PREFIX="drill1", LLMSTREAM_NO_VENV="1")
    said = []
    for number, line in enumerate(drill("Kill a worker")[0].splitlines()):
        program, *words = shlex.split(line)
        assert program == "python3"
        said += [tmp_path / f"{number}.out", tmp_path / f"{number}.err"]
        with said[-2].open("wb") as out, said[-1].open("wb") as err:
            process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=out, stderr=err)
        started.append(process)
        if number == 1:
            wait_for(lambda: all("answers questions" in said[n].read_text("utf-8") for n in (1, 3)))
    text, told, question = said[-2], said[-1], words[-1]
    wait_for(text.read_bytes)
    worker = next(n for n in (0, 1) if ": answers" in said[2 * n + 1].read_text("utf-8"))
    started[worker].kill()
    assert started[-1].wait(40) == 0
    assert text.read_text("utf-8").strip().endswith(prepared.reply(question).strip())
    assert f"Attempt 2, by {('two', 'one')[worker]}. The answer begins anew." in told.read_text("utf-8")
    chunks = len(scripted.split(prepared.reply(question)))  # of the attempt that counts
    assert f"[stop · 2 attempts · the last: {chunks} chunks ·" in told.read_text("utf-8")
    assert ": takes over" in said[2 * (1 - worker) + 1].read_text("utf-8")


@needs_redis
@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C for one process is POSIX")
def test_drill_stop_redis(started, tmp_path) -> None:
    command, cell = drill("Stop Redis")
    port = str(servers.free_port())
    words = [{"6390": port, ".llmstream": str(tmp_path)}.get(word, word) for word in shlex.split(command)]

    def start() -> None:
        started.append(subprocess.Popen(words, stdout=subprocess.DEVNULL))
        wait_for(lambda: answers("127.0.0.1", int(port)))

    start()
    page: dict[str, Any] = {}
    exec(cell.replace("6390", port), page)
    view, answer = page["view"], page["answer"]
    wait_for(lambda: len(view.text) > 50)
    started[0].send_signal(signal.SIGINT)
    started[0].wait(60)
    wait_for(lambda: view.note == "Redis is away, trying again.")
    start()
    wait_for(lambda: view.state == "ended")
    assert view.text == prepared.reply(answer.record["question"])


def test_drill_lose_the_model() -> None:
    connect(prefix="drill3")
    cut, silent = drill("Lose the model")
    page: dict[str, Any] = {}
    for cell, why in ((cut, "dropped the connection"), (silent, "was silent for 1 s")):
        exec(cell, page)
        view = page["view"]
        wait_for(lambda view=view: view.state == "failed")
        assert (
            why in view.note and prepared.reply("What is a consumer group?").startswith(view.text) and view.chunks == 60
        )
