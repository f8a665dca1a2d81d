"""What the course shows on a small screen: each state of an act is on it, in its order, without scrolling."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import Locator, expect

from .lab import ROOT, Lab, Notebook, lab

pytestmark = [
    pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not on PATH"),
]
PROJECTOR = {"width": 1280, "height": 720}
PAGE = "() => document.querySelector('.jp-WindowedPanel-outer').getBoundingClientRect().toJSON()"


@pytest.fixture(scope="module")
def running() -> Iterator[Lab]:
    with lab(LLMSTREAM_LLM="scripted") as started:
        shutil.copytree(ROOT / "notebooks" / "images", started.folder / "images")
        yield started


@pytest.fixture(scope="module")
def presented() -> Iterator[Lab]:
    with lab("/", "--present", LLMSTREAM_LLM="scripted") as started:
        yield started


def in_sight(notebook: Notebook, *things: Locator) -> bool:
    """Whether the notebook's window shows all of each of these."""
    page = notebook.page.evaluate(PAGE)
    boxes = [thing.bounding_box() for thing in things]
    return all(box and page["top"] <= box["y"] and box["y"] + box["height"] <= page["bottom"] + 1 for box in boxes)


@pytest.mark.parametrize(
    ("mode", "theme"),
    [("running", "JupyterLab Light"), ("running", "JupyterLab Dark"), ("presented", "JupyterLab Light")],
)
def test_a_worker_is_killed_before_everybodys_eyes(browser, request, mode: str, theme: str) -> None:
    running: Lab = request.getfixturevalue(mode)
    copy = ROOT / "presented" / "04-groups.ipynb"
    if mode == "running":
        copy = Path(shutil.copy(ROOT / "notebooks" / "04-groups.ipynb", running.folder))
    notebook = running.open(browser, copy.relative_to(ROOT).as_posix(), viewport=PROJECTOR)
    notebook.theme(theme)
    cells = nbformat.read(copy, as_version=4).cells
    act = next(at for at, cell in enumerate(cells) if cell.source.startswith("start_workers()  #"))
    from_here = next(at for at, cell in enumerate(cells) if cell.source.startswith("## The pool"))
    for at, cell in enumerate(cells[:act]):
        if cell.cell_type == "code" and (at == 1 or at > from_here or "import" in cell.source):
            notebook.run(at)
    notebook.press_shift_enter(act)
    shown = notebook.output(act_in_code(cells, act))
    button, view, monitor = (
        shown.get_by_role("button", name="Kill its worker"),
        shown.locator(".llmstream-answer"),
        shown.locator(".llmstream-monitor"),
    )
    head, workers = view.locator(".llmstream-head"), monitor.locator(".llmstream-workers")
    expect(view.locator(".llmstream-body")).to_contain_text("Because a model writes")
    expect(monitor).to_contain_text("At work")
    assert in_sight(notebook, button, view, monitor)

    button.click()
    expect(workers).to_contain_text("Silent for")
    assert in_sight(notebook, view, workers)
    expect(view).to_contain_text(re.compile(r"Interrupted\s*Its worker w\d is silent"))
    assert in_sight(notebook, head, view.locator(".llmstream-voided"))
    expect(workers).to_contain_text("Gone for")
    expect(monitor.get_by_role("status")).to_contain_text(re.compile(r"2\s*workers\s*w\d is gone"))
    expect(head).to_contain_text(re.compile(r"Attempt \d+, by w\d"))
    assert in_sight(notebook, head, workers)
    expect(view.locator(".llmstream-voided")).to_have_count(0)
    expect(head).to_contain_text("Complete")
    expect(head).to_contain_text("2 attempts")
    notebook.page.keyboard.press("ArrowDown")  # the click has left the keyboard to the notebook
    notebook.page.wait_for_function(
        f"() => window.jupyterapp.shell.currentWidget.content.activeCellIndex === {act + 1}"
    )
    assert not notebook.errors
    notebook.close()


def act_in_code(cells: list[nbformat.NotebookNode], at: int) -> int:
    """Which of the code cells the cell at this index is."""
    return sum(cell.cell_type == "code" for cell in cells[:at])


SIZES = """() => ["code", "content"].map((kind) => {
  const size = kind === "code" ? "--jp-code-font-size" : "--jp-content-font-size1";
  return parseFloat(getComputedStyle(document.documentElement).getPropertyValue(size));
})"""
BESIDE = (
    ".jp-SideBar, .jp-SidePanel, .jp-NotebookPanel-toolbar, .jp-Dialog, .lm-DockPanel-tabBar, #jp-title-panel-title"
)


def test_a_projector_shows_one_large_notebook_and_nothing_beside_it(browser, presented: Lab) -> None:
    for name in ("00-ask.ipynb", "04-groups.ipynb"):
        came, copy = (nbformat.read(ROOT / folder / name, as_version=4) for folder in ("notebooks", "presented"))
        assert [cell.source for cell in copy.cells] == [cell.source for cell in came.cells]
        assert not any(cell.get("outputs") for cell in copy.cells) and any(cell.get("outputs") for cell in came.cells)
    notebook = presented.open(browser, "presented/00-ask.ipynb", viewport=PROJECTOR)
    page = notebook.page
    link = page.locator('.jp-RenderedMarkdown a[href*="01-stream-commands.ipynb"]').first
    for step in ("opened", "saved", "second", "reloaded"):
        if step == "saved":
            notebook.run(1)
            notebook.save()
        elif step == "second":
            link.click()
            page.wait_for_function("() => window.jupyterapp.shell.currentWidget.title.label.startsWith('01')")
        elif step == "reloaded":
            notebook.reload()
        code, content = page.evaluate(SIZES)
        assert code >= 1.34 * 13 and content >= 1.34 * 14
        page.wait_for_function(
            "(beside) => ![...document.querySelectorAll(beside)].some((one) => one.checkVisibility())", arg=BESIDE
        )
    assert presented.log.read_text().count("not trusted") == 0
    assert not notebook.errors
    notebook.page.context.close()


def test_what_grows_after_shift_enter_stays_in_sight(browser, running: Lab) -> None:
    setup = "from llmstream_nb import AnswerView, ask, clear, connect\n\nredis = connect(prefix='sight')\nclear()"
    long = "AnswerView(ask('?', source='scripted', model='scripted:long=400,pace=200', id='long', replace=True))"
    path = running.notebook(setup, *["1"] * 8, long, *["2"] * 8)
    notebook = running.open(browser, path, viewport=PROJECTOR)
    notebook.run(0)
    notebook.press_shift_enter(9)
    view = notebook.output(9).locator(".llmstream-answer")
    expect(view.locator(".llmstream-head")).to_contain_text("Complete")
    assert in_sight(notebook, view.locator(".llmstream-head"))
    assert not notebook.errors
    notebook.close()
