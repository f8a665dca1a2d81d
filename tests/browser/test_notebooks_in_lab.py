"""Every notebook, run from top to bottom in JupyterLab in a real browser, as its readers do."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

from llmstream_nb.setup.restore import pristine

from .lab import ROOT, Lab, lab

pytestmark = [
    pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not on PATH"),
]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]-*.ipynb"))
SETTLED = re.compile("Complete|Stopped|Failed|Not found")  # notebooks 06 and 07 break things
RUN_ALL = "() => window.jupyterapp.commands.execute('notebook:run-all-cells')"
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
        shutil.copy(ROOT / "notebooks" / "recipe.py", started.folder)  # which notebook 05 has beside it
        shutil.copytree(ROOT / "notebooks" / "images", started.folder / "images")
        yield started


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_run_all(browser, running: Lab, path: Path) -> None:
    copy = shutil.copy(path, running.folder)  # JupyterLab saves by itself, and these must stay as they are
    notebook = running.open(browser, Path(copy).relative_to(ROOT).as_posix())
    asked: list[str] = []
    notebook.page.on("request", lambda request: asked.append(request.url))
    notebook.page.evaluate(RUN_ALL)
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
