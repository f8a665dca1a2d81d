"""What the course's own JupyterLab extension adds: the glossary on hover and beside the page, dark diagrams."""

import shutil
from collections.abc import Iterator

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from .lab import ROOT, Lab, lab

pytestmark = pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not on PATH")
# The glossary's heading of this id: whether all of it can be seen, in the upper half of its panel.
IN_SIGHT = """(id) => {
  const heading = document.querySelector(`[id="${id}"], [data-jupyter-id="${id}"]`), panel = heading?.closest(".jp-NotebookPanel");
  if (!heading?.checkVisibility()) return false;
  const { top, bottom, left } = heading.getBoundingClientRect(), whole = panel.getBoundingClientRect();
  return document.elementFromPoint(left + 5, (top + bottom) / 2) === heading && top - whole.top < whole.height / 2;
}"""
PANELS = "() => [...document.querySelectorAll('.jp-NotebookPanel')].map((one) => one.getBoundingClientRect().left)"


@pytest.fixture(scope="module")
def running() -> Iterator[Lab]:
    with lab(LLMSTREAM_LLM="scripted") as started:
        for name in ("00-ask.ipynb", "04-groups.ipynb", "glossary.ipynb"):
            shutil.copy(ROOT / "notebooks" / name, started.folder)
        shutil.copytree(ROOT / "notebooks" / "images", started.folder / "images")
        yield started


def opened(browser, running: Lab, name: str):
    path = (running.folder / name).relative_to(ROOT).as_posix()
    return running.open(browser, path, viewport={"width": 1280, "height": 720})


def test_a_word_of_the_glossary_says_its_meaning_and_opens_beside_the_page_at_its_word(browser, running) -> None:
    notebook = opened(browser, running, "00-ask.ipynb")
    page = notebook.page
    for term, word in [("finish-reason", "ended"), ("chunk", "piece"), ("stream", "Redis")]:  # the first and others
        link = page.locator(f'.jp-RenderedMarkdown a[href*="glossary.ipynb"][href$="#{term}"]').first
        link.hover()
        page.wait_for_function("(a) => a.title", arg=link.element_handle())
        title = link.get_attribute("title") or ""
        assert word in title, title
        assert not {"[", "`", "*", "#"} & set(title), title
        link.click()
        page.wait_for_function(IN_SIGHT, arg=term)
    lefts = page.evaluate(PANELS)
    assert len(lefts) == 2 and lefts[0] < lefts[1]  # once, and beside
    running_kernels = "async (api) => (await api.refreshRunning(), [...api.running()].length)"
    api = page.evaluate_handle("() => window.jupyterapp.serviceManager.sessions")
    assert page.evaluate(running_kernels, api) == 1  # words need no kernel
    notebook.page.context.close()


def test_diagrams_are_dark_in_a_dark_theme(browser, running) -> None:
    notebook = opened(browser, running, "04-groups.ipynb")
    picture = notebook.page.locator('.jp-RenderedMarkdown img[src*=".svg"]').first
    picture.scroll_into_view_if_needed()
    assert picture.evaluate("(one) => getComputedStyle(one).filter") == "none"
    notebook.theme("JupyterLab Dark")
    notebook.page.wait_for_function("(one) => getComputedStyle(one).filter !== 'none'", arg=picture.element_handle())
    notebook.page.context.close()
