"""An answer in JupyterLab in Chromium: what goes from the kernel to the browser, what it costs, what people see."""

from __future__ import annotations

import re
import shutil
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from typing import Any

import psutil

from benchmarks.harness import Figures, Line, Samples, Unavailable, interleave, redis_server, row
from llmstream_nb import ask, connect

ONE, TEN, THIRTY = "AnswerView", "10 AnswerViews", "30 AnswerViews"
LONG, PLAIN, NAIVE = "AnswerView, 400 kB", "plain=True", "ipywidgets.HTML"
RATE = 100
MARK = "THE-LAST-CHUNK"

VIEW = "from llmstream_nb import AnswerView\nfrom IPython.display import display\n"
SHOW = {
    ONE: VIEW + "display(AnswerView(NAME))",
    TEN: VIEW + "display(*(AnswerView(NAME) for _ in range(10)))",
    THIRTY: VIEW + "display(*(AnswerView(NAME) for _ in range(30)))",
    LONG: VIEW + "display(AnswerView(NAME))",
    PLAIN: VIEW + "display(AnswerView(NAME, plain=True))",
    NAIVE: """
import html, threading
import ipywidgets
from llmstream_nb import read_answer
from llmstream_nb.protocol.events import Text
label, shown = ipywidgets.HTML("<b>Streaming</b>"), ipywidgets.HTML("<pre></pre>")
display(label, shown)
def show():
    text = ""
    for event in read_answer(NAME):
        if isinstance(event, Text):
            text += event.text
            shown.value = f"<pre>{html.escape(text)}</pre>"
    label.value = "<b>Complete</b>"
threading.Thread(target=show).start()
""",
}
OURS = [side for side in SHOW if side != NAIVE]
BODY = {PLAIN: "pre", NAIVE: "pre"}  # else the view's own
DATE = re.compile(rb'"date": ?"([^"]+)"')  # of a message; its header comes first

# Looks at every animation frame whether the last chunk is there, and how long the page had stood still.
PROBE = """([mark, views, body]) => {
  const probe = (window.probe = { seen: 0, longest: 0 });
  let before = performance.now();
  const look = (now) => {
    probe.longest = Math.max(probe.longest, now - before);
    before = now;
    const bodies = [...document.querySelectorAll(`.jp-Cell-outputArea ${body}`)];
    const there = bodies.filter((node) => node.textContent.slice(-200).includes(mark)).length;
    if (there >= views && !probe.seen) probe.seen = Date.now();
    if (!probe.over) requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
}"""
COMPLETE = """([label, views]) =>
  [...document.querySelectorAll(label)].filter((node) => node.textContent === "Complete").length >= views"""


@row(
    "JupyterLab in Chromium, 2,000 chunks at 100 a second",
    Line("kernel to browser, kB", ONE, goal=("<=", 320)),
    *(Line("kernel to browser, kB", side, NAIVE) for side in (ONE, PLAIN)),
    *(Line("messages, most in a second", side, goal=("<=", 100), always=True) for side in OURS),
    *(Line("exact, %", side, goal=(">=", 100), always=True) for side in OURS),
    bound=1800,
)
def jupyter(quick: bool) -> tuple[str, Samples]:
    """The model and the producer are in this process, so the kernel only reads and shows."""
    try:
        from tests.browser.lab import chromium, lab
    except ImportError:
        raise Unavailable("playwright is not installed: pip install -r requirements-dev.txt") from None
    if not shutil.which("chromium"):
        raise Unavailable("chromium is not on PATH")
    chunks, runs = (100, 1) if quick else (2_000, 3)
    with redis_server() as server, ExitStack() as stack:
        client = connect(server.url)
        browser = stack.enter_context(chromium())
        running = stack.enter_context(lab(REDIS_URL=server.url))

        def run(side: str) -> Figures:
            return _run(browser, running, client, side, chunks)

        samples = interleave({side: lambda side=side: run(side) for side in SHOW}, runs)  # type: ignore[misc]
    return f"{chunks:,} chunks at {RATE}/s, of 4 characters (of 200 for 400 kB), {runs} runs", samples


class Model:
    """Says so many chunks at a steady pace, once it may, and knows when it said the last."""

    def __init__(self, chunks: int, size: int) -> None:
        self.chunks = [str(n)[-3:].ljust(size - 1, ".") + (" " if n % 20 else "\n") for n in range(1, chunks)] + [MARK]
        self.text, self.go, self.last = "".join(self.chunks), False, 0.0

    def __call__(self, *_: object) -> Iterator[str]:
        """The deltas of an answer."""
        while not self.go:
            time.sleep(0.01)
        began = time.monotonic()
        for n, chunk in enumerate(self.chunks):
            time.sleep(max(0.0, began + n / RATE - time.monotonic()))
            self.last = time.time()
            yield chunk


def _run(browser: Any, running: Any, client: Any, side: str, chunks: int) -> Figures:
    from playwright.sync_api import Error

    from tests.browser.lab import READY, Notebook

    client.flushall()
    model = Model(chunks, 200 if side == LONG else 4)
    answer = ask("show", source=model, client=client)
    views, body = {TEN: 10, THIRTY: 30}.get(side, 1), BODY.get(side, ".llmstream-body")
    path = running.notebook("import os\nprint(os.getpid())", f"NAME = {answer.id!r}\n{SHOW[side]}")
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    messages: list[bytes] = []

    def listen(socket: Any) -> None:
        if "/channels" in socket.url:  # the kernel's
            socket.on("framereceived", lambda data: messages.append(data if isinstance(data, bytes) else data.encode()))

    page.on("websocket", listen)
    page.goto(f"{running.base}lab/tree/{path}?reset&token={running.token}")
    page.wait_for_function(READY, timeout=60_000)
    notebook = Notebook(page)
    kernel = psutil.Process(int(notebook.run(0)))
    messages.clear()
    notebook.run(1)
    shown = notebook.output(1)
    shown.locator(body).nth(views - 1).wait_for(state="attached")
    page.evaluate(PROBE, [MARK, views, body])
    before, at_first = kernel.cpu_times(), len(messages)
    model.go = True
    figures: dict[str, float] = {"exact, %": 0.0}
    try:
        page.wait_for_function("() => window.probe.seen", timeout=1000 * (chunks / RATE + 60))
        page.wait_for_function(COMPLETE, arg=["b" if body == "pre" else ".llmstream-label", views], timeout=60_000)
    except Error:
        answer.wait(60)  # it never came: what was sent is told all the same
    else:
        figures["last chunk, from the model to the page, ms"] = (
            page.evaluate("() => window.probe.seen") - 1000 * model.last
        )
    after = kernel.cpu_times()
    probe = page.evaluate("() => Object.assign(window.probe, { over: true })")
    sent = list(messages)
    page.evaluate("() => document.querySelectorAll('.llmstream-raw:not([hidden])').forEach((button) => button.click())")
    texts = shown.locator(body).all_text_contents()
    page.context.close()
    cpu = after.user + after.system - before.user - before.system
    return figures | {
        "exact, %": 100.0 * (texts == [model.text] * views),
        "kernel to browser, kB": sum(map(len, sent)) / 1000,
        "kernel to browser, messages": float(len(sent)),
        "messages, most in a second": float(_most_in_a_second(sent[at_first:])),
        "kernel's CPU, s": cpu,
        "longest without a new frame, ms": probe["longest"],
    }


def _most_in_a_second(messages: list[bytes]) -> int:
    """How many messages the kernel sent within any one second, by the times in their headers."""
    times = sorted(
        datetime.fromisoformat(found[1].decode()).timestamp() for one in messages if (found := DATE.search(one))
    )
    return max((bisect_right(times, moment + 1) - n for n, moment in enumerate(times)), default=0)
