"""Every notebook, run from top to bottom in JupyterLab in a real browser, as its readers do."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

from llmstream_nb.setup.restore import pristine

from .lab import CELL, ROOT, Lab, Notebook, lab

pytestmark = [
    pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not on PATH"),
]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]-*.ipynb"))
SETTLED = re.compile("Complete|Stopped|Failed|Not found")  # notebooks 06 and 07 break things
# Of the cell at an index: what a reader sees of it, and for code what of its output.
SEEN = f"(i) => ({CELL})(i).node.innerText"
OUTPUT_SHOWN = f"(i) => ({CELL})(i).outputArea.node.checkVisibility()"
STATE_OF_CELLS = """() => window.jupyterapp.shell.currentWidget.content.widgets
  .filter((cell) => cell.model.type === "code" && cell.model.sharedModel.source.trim())
  .map((cell) => ({
    count: cell.model.executionCount,
    kinds: cell.model.outputs.toJSON().map((output) => output.output_type),
    text: cell.outputArea.node.textContent,
  }))"""


@pytest.fixture(scope="module")
def running() -> Iterator[Lab]:
    with lab(LLMSTREAM_LLM="scripted") as started:
        for name in ("recipe.py", "recipe_async.py", "glossary.ipynb"):  # which notebooks have beside them
            shutil.copy(ROOT / "notebooks" / name, started.folder)
        shutil.copytree(ROOT / "notebooks" / "images", started.folder / "images")
        yield started


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs_and_no_answer_shows_before_it_is_opened(browser, running: Lab, path: Path) -> None:
    copy = shutil.copy(path, running.folder)  # JupyterLab saves by itself, and these must stay as they are
    notebook = running.open(browser, Path(copy).relative_to(ROOT).as_posix(), viewport={"width": 1280, "height": 720})
    asked: list[str] = []
    notebook.page.on("request", lambda request: asked.append(request.url))
    sources = nbformat.read(path, as_version=4).cells
    surprises = [
        at
        for start, cell in enumerate(sources)
        if "**Predict" in cell.source
        for at in range(start + 1, next_text(sources, start + 1))
    ]
    hidden = [at for at, cell in enumerate(sources) if cell.metadata.get("jupyter", {}).get("outputs_hidden")]
    assert hidden and surprises
    for at in surprises:
        assert not answer_shown(notebook, sources, at)
    for at in hidden:
        notebook.scroll_to(at)
        assert not notebook.page.evaluate(OUTPUT_SHOWN, at)
    for at, cell in enumerate(sources):
        if at in surprises:
            notebook.press_shift_enter(at)
            assert notebook.page.evaluate(OUTPUT_SHOWN, at)
            assert not answer_shown(notebook, sources, at)
        elif cell.cell_type == "code":
            notebook.run(at)
    for at in surprises:
        if at in hidden:
            assert answer_shown(notebook, sources, at, opened=True)
    cells = notebook.page.evaluate(STATE_OF_CELLS)
    assert [cell["count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [cell["text"] for cell in cells if "error" in cell["kinds"]]
    views = notebook.page.locator(".llmstream-answer")
    for at in range(views.count()):
        views.nth(at).filter(has_text=SETTLED).wait_for()
    assert notebook.page.get_by_text("Not started yet").count() >= 1  # the exercise waits for the learner
    assert not [url for url in asked if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))]
    notebook.save()
    notebook.close()
    assert not notebook.errors


def next_text(sources: list[nbformat.NotebookNode], start: int) -> int:
    return next(at for at in range(start, len(sources)) if sources[at].cell_type == "markdown")


def answer_shown(notebook: Notebook, sources: list[nbformat.NotebookNode], surprise: int, opened: bool = False) -> bool:
    """Whether the page shows which letter was right, in the first text after the surprise."""
    at = next_text(sources, surprise)
    notebook.scroll_to(at)
    if opened:
        notebook.page.evaluate(f"(i) => {{ ({CELL})(i).node.querySelector('details').open = true; }}", at)
    notebook.page.wait_for_function(f"(i) => ({SEEN})(i).includes('Answer')", arg=at)
    return bool(re.search(r"\([abc]\)\.", notebook.page.evaluate(SEEN, at)))


def test_a_view_in_a_notebook_that_came_with_outputs_is_there_after_a_reload(browser, running: Lab) -> None:
    """JupyterLab draws widgets only in a notebook that it trusts, and this one brings outputs along."""
    copy = running.folder / "reloaded.ipynb"
    copy.write_bytes(pristine()["00-ask.ipynb"])
    notebook = running.open(browser, copy.relative_to(ROOT).as_posix())
    asked_first = notebook.page.get_by_role("status").filter(has_text="Run the cell above first.")
    form = notebook.page.locator(".llmstream-form")
    expect(asked_first).to_be_visible()
    for control in form.locator("button, input, textarea, select").all():
        expect(control).to_be_disabled()
    notebook.run(1)
    expect(asked_first).to_have_count(0)
    view = notebook.page.get_by_role("button", name="Ask", exact=True)
    expect(view).to_be_enabled()
    notebook.save()
    notebook.reload()
    expect(view).to_be_enabled()
    notebook.page.context.close()


def test_the_terminal_says_nothing_that_a_newcomer_has_to_wonder_about(browser, running: Lab) -> None:
    """After the address that lab prints, kernels start and end without a word."""
    copy = running.folder / "quiet.ipynb"
    copy.write_bytes(pristine()["01-stream-commands.ipynb"])
    notebook = running.open(browser, copy.relative_to(ROOT).as_posix())
    assert "redis" in notebook.run(1)
    notebook.restart_kernel()
    assert "redis" in notebook.run(1)
    notebook.page.context.close()
    said = running.log.read_text("utf-8")
    assert said.rpartition("token=")[2].split("\n", 1)[1].strip() == "", said
