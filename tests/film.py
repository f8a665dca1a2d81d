"""For maintainers: film JupyterLab for the README's first screen, light and dark: ask, come late, kill, take over."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat

from llmstream_nb.faults.servers import RedisServer
from llmstream_nb.setup.environment import ROOT, say

from .browser.lab import Notebook, chromium, lab

IMAGES = ROOT / "notebooks" / "images"
SCREEN = {"width": 1000, "height": 660}
LONGEST, LARGEST = 15.0, 1_000_000  # seconds and bytes of a film
STILL = 0.9  # seconds for which a scene's last frame stays
PACE = 0.1  # seconds between two frames, at least
# The notebook alone, and beneath it a line that says what is to be seen.
STAGE = """async (said) => {
  const { shell, commands } = window.jupyterapp;
  if (!shell.leftCollapsed) await commands.execute("application:toggle-left-area");
  const line = document.querySelector("#film") ?? document.body.appendChild(document.createElement("div"));
  line.id = "film";
  line.textContent = said;
  line.style = "position: fixed; inset: auto 0 0 0; z-index: 99999; padding: 9px 70px; background: #20242b;"
    + "color: #fff; font: 600 19px/1.3 system-ui, sans-serif;";
}"""
SIGHT = "() => document.querySelector('.jp-WindowedPanel-outer').getBoundingClientRect().toJSON()"
IS_CODE = "(i) => window.jupyterapp.shell.currentWidget.content.widgets[i].model.type === 'code'"
Frame = tuple[bytes, float]  # a PNG, and when it was taken, on the monotonic clock


def film() -> int:
    """Film both themes into the notebooks' images; say how long and large they are. 1 if one is too long or large."""
    bad = 0
    for theme in ("light", "dark"):
        with (
            RedisServer() as server,
            lab(LLMSTREAM_LLM="scripted", REDIS_URL=server.url) as running,
            chromium() as browser,
        ):
            shutil.copytree(IMAGES, running.folder / "images")
            scenes: list[list[Frame]] = []
            for name, act in (("00-ask.ipynb", _ask), ("04-groups.ipynb", _kill)):
                copy = Path(shutil.copy(IMAGES.parent / name, running.folder))
                path = copy.relative_to(ROOT).as_posix()
                notebook = running.open(browser, path, viewport=SCREEN, color_scheme=theme)
                notebook.theme(f"JupyterLab {theme.title()}")
                scenes += act(notebook, [cell.source for cell in nbformat.read(copy, as_version=4).cells])
                notebook.close()
            seconds, size = _develop(scenes, IMAGES / f"film-{theme}.webp")
            say(f"film-{theme}.webp: {seconds:.1f} s, {size:,} bytes")
            bad += seconds > LONGEST or size > LARGEST
    return int(bool(bad))


def _ask(notebook: Notebook, cells: list[str]) -> list[list[Frame]]:
    """A question in the panel; then one with a viewer that comes late."""
    page, panel = notebook.page, next(at for at, cell in enumerate(cells) if "AskPanel(" in cell)
    page.evaluate(STAGE, "Ask: each piece goes through a Redis stream")
    notebook.run(panel)
    notebook.scroll_to(panel)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator(".llmstream-answer").first.evaluate("(view) => view.scrollIntoView({ block: 'center' })")
    first = _shoot(notebook, lambda passed: passed > 3.2)

    early = next(at for at, cell in enumerate(cells) if "early = AnswerView" in cell)
    page.evaluate(STAGE, "A second viewer comes late, and has it all")
    notebook.run(next(at for at, cell in enumerate(cells) if "import AnswerView, ask" in cell))
    notebook.run(early)
    notebook.scroll_to(early)
    second = _shoot(notebook, lambda passed: passed > 1.8)
    notebook.run(early + 1, wait=False)
    return [first, second + _shoot(notebook, lambda passed: passed > 1.8)]


def _kill(notebook: Notebook, cells: list[str]) -> list[list[Frame]]:
    """A worker is killed in mid-answer, and another takes over."""
    page, pool = notebook.page, next(at for at, cell in enumerate(cells) if cell.startswith("## The pool"))
    act = next(at for at, cell in enumerate(cells) if cell.startswith("start_workers()  #"))
    page.evaluate(STAGE, "A worker is killed in mid-answer; another takes over")
    code = [at for at in range(act) if page.evaluate(IS_CODE, at)]
    for at in code:
        if at == code[0] or at > pool or "import" in cells[at]:
            notebook.run(at)
    notebook.press_shift_enter(act)
    shown = page.locator(".jp-CodeCell").nth(len(code)).locator(".jp-Cell-outputArea")
    shown.locator(".llmstream-body").get_by_text("Because").first.wait_for()
    before = _shoot(notebook, lambda passed: passed > 1.0)
    shown.get_by_role("button", name="Kill its worker").click()
    head = shown.locator(".llmstream-head")
    until = time.monotonic() + 60

    taken: list[float] = []

    def after(passed: float) -> bool:
        if not taken and "Attempt" in head.inner_text():
            taken.append(passed)
        return bool(taken and passed > taken[0] + 1.8) or time.monotonic() > until

    return [before + _shoot(notebook, after)]


def _shoot(notebook: Notebook, over: Callable[[float], bool]) -> list[Frame]:
    """Take frames until `over`, which is told the seconds that have passed, says so."""
    page, frames, began = notebook.page, list[Frame](), time.monotonic()
    sight = page.evaluate(SIGHT)
    clip = {"x": sight["x"], "y": sight["y"], "width": sight["width"], "height": SCREEN["height"] - sight["y"]}
    while not over((now := time.monotonic()) - began):
        frames.append((page.screenshot(clip=clip), now))
        page.wait_for_timeout(max(0, 1000 * (now + PACE - time.monotonic())))
    return frames


def _develop(scenes: list[list[Frame]], file: Path) -> tuple[float, int]:
    """Write the film as it went, in its own time; return its length in seconds and its size in bytes."""
    from PIL import Image

    pictures: list[Any] = []
    lengths: list[int] = []
    for frames in scenes:
        times = [taken for _, taken in frames]
        pictures += [Image.open(io.BytesIO(png)).convert("RGB") for png, _ in frames]
        lengths += [round(1000 * (later - taken)) for taken, later in pairwise(times)]
        lengths.append(round(1000 * STILL))
    options = {"save_all": True, "append_images": pictures[1:], "duration": lengths, "loop": 0}
    pictures[0].save(file, quality=50, method=6, minimize_size=True, **options)
    return sum(lengths) / 1000, file.stat().st_size
