"""JupyterLab in Chromium for tests: started as a user starts it, driven as a user drives it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / ".llmstream"  # git-ignored; a notebook must lie inside the folder that lab serves
PATIENCE = 60_000  # milliseconds: a bound, not an expectation

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SETTINGS = {
    "LabApp": {"expose_app_in_browser": True},
    "ContentsManager": {"allow_hidden": True},
    "FileContentsManager": {"allow_hidden": True},
}
READY = """() => {
  const panel = window.jupyterapp?.shell?.currentWidget;
  return panel?.content?.activeCell && ["idle", "busy"].includes(panel.sessionContext?.kernelDisplayStatus);
}"""
RUN = """async ([index, wait]) => {
  const panel = window.jupyterapp.shell.currentWidget;
  panel.content.deselectAll();
  panel.content.activeCellIndex = index;
  const done = window.jupyterapp.commands.execute("notebook:run-cell");
  if (wait) await done;
}"""
CELL = "(i) => window.jupyterapp.shell.currentWidget.content.widgets[i]"


# Its names on Linux, and where macOS has it.
PROGRAMS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
PROGRAM = next(filter(None, map(shutil.which, PROGRAMS)), None)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The system's Chromium, headless."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class Lab:
    """A running `python3 -m llmstream_nb lab`, and a folder for notebooks inside the folder that it serves.

    `log` is the file with what it says in its terminal.
    """

    def __init__(self, address: str, folder: Path, log: Path) -> None:
        self.base, self.mode, token = re.split(r"(lab|doc)(?=[/?])", address, maxsplit=1)
        self.token = re.sub(r".*token=", "", token)
        self.folder, self.log = folder, log
        self._made = 0

    def notebook(self, *cells: str) -> str:
        """Write a notebook of these code cells; return its path as JupyterLab names it."""
        self._made += 1
        file = self.folder / f"test-{self._made}.ipynb"
        notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3 (ipykernel)"}
        nbformat.write(notebook, file)
        return file.relative_to(ROOT).as_posix()

    def open(self, browser: Browser, path: str, **context: Any) -> Notebook:
        """Open a notebook in a page of its own; `context` is for Playwright, e.g. viewport or color_scheme."""
        page = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | context).new_page()
        notebook = Notebook(page)
        page.goto(f"{self.base}{self.mode}/tree/{path}?reset&token={self.token}")
        page.wait_for_function(READY, timeout=PATIENCE)
        return notebook


class Notebook:
    """An open notebook. `page` is Playwright's, `errors` what the browser had to complain about."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("response", lambda got: self.errors.append(f"{got.status} {got.url}") if got.status >= 400 else None)
        page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)

    def run(self, index: int, wait: bool = True) -> str:
        """Run the cell at `index` and return its output's text; without `wait`, return at once."""
        self.page.evaluate(RUN, [index, wait])
        return self.text(index) if wait else ""

    def scroll_to(self, index: int) -> None:
        """Bring a cell to the top of what the window shows, as a reader does."""
        self.page.evaluate("(i) => window.jupyterapp.shell.currentWidget.content.scrollToItem(i, 'start')", index)
        self.page.wait_for_function(
            f"(i) => ({CELL})(i).node.isConnected && ({CELL})(i).node.checkVisibility()", arg=index
        )

    def press_shift_enter(self, index: int) -> None:
        """Click into a code cell, press Shift+Enter, and wait until it is done."""
        self.page.evaluate(f"(i) => {{ ({CELL})(i).model.executionCount = null; }}", index)  # it tells the end below
        self.scroll_to(index)
        editor = self.page.evaluate_handle(f"(i) => ({CELL})(i).node.querySelector('.cm-content')", index)
        editor.as_element().click(position={"x": 5, "y": 5})
        self.page.keyboard.press("Shift+Enter")
        self.page.wait_for_function(f"(i) => ({CELL})(i).model.executionCount", arg=index)

    def text(self, index: int) -> str:
        """The text of a cell's output as it is now."""
        return self.page.evaluate(f"(i) => ({CELL})(i).outputArea?.node.textContent ?? ''", index)

    def output(self, index: int) -> Any:
        """A locator of the output of the code cell at `index`."""
        return self.page.locator(".jp-CodeCell").nth(index).locator(".jp-Cell-outputArea")

    def save(self) -> None:
        """Save the notebook."""
        self.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")

    def reload(self) -> None:
        """Reload the page; the kernel stays."""
        self.page.reload()
        self.page.wait_for_function(READY)

    def restart_kernel(self) -> None:
        """Restart the kernel, and wait until it is idle."""
        self.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
        self.page.wait_for_function(READY)

    def close(self) -> None:
        """Close the notebook and shut its kernel down, as File > Close and Shut Down does; then close the page."""
        self.page.evaluate("() => void window.jupyterapp.commands.execute('filemenu:close-and-cleanup')")
        self.page.locator(".jp-Dialog .jp-mod-accept").click()
        self.page.wait_for_function("() => !document.querySelector('.jp-NotebookPanel')")
        self.page.context.close()

    def theme(self, name: str) -> None:
        """Switch JupyterLab's theme: `JupyterLab Dark`, `JupyterLab Light`."""
        self.page.evaluate("(theme) => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", name)


@contextlib.contextmanager
def lab(base_url: str = "/", *options: str, **environment: str) -> Iterator[Lab]:
    """Start `lab` with a home of its own, wait until it prints its address, and end it with all it started."""
    STATE.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="llmstream-home-") as home,
        tempfile.TemporaryDirectory(prefix="browser-", dir=STATE) as folder,
    ):
        config = Path(home, "config")
        config.mkdir()
        (config / "jupyter_server_config.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
        own = {
            "HOME": home,
            "USERPROFILE": home,
            "JUPYTER_CONFIG_DIR": str(config),
            "JUPYTER_RUNTIME_DIR": str(Path(home, "runtime")),
            "IPYTHONDIR": str(Path(home, "ipython")),
            "LLMSTREAM_NO_VENV": "1",
        }
        log = Path(home, "lab.log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "llmstream_nb",
                    "lab",
                    "--no-browser",
                    "--no-model",
                    "--base-url",
                    base_url,
                    *options,
                ],
                cwd=ROOT,
                env=os.environ | own | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield Lab(_address(process, log), Path(folder), log)
        finally:
            process.terminate()
            process.wait(30)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """The address that lab prints for its user, once it answers there."""
    deadline = time.monotonic() + PATIENCE / 1000
    while process.poll() is None and time.monotonic() < deadline:
        found = re.search(r"http://127\.0\.0\.1:\d+/\S*token=\w+", log.read_text(errors="replace"))
        if found:
            return found[0]
        time.sleep(0.1)
    raise RuntimeError(f"lab printed no address:\n{log.read_text(errors='replace')}")
