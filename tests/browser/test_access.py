"""For all who use it: axe-core finds nothing against WCAG 2.2 A and AA, the keyboard suffices, and nothing moves for those who ask for calm."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ipywidgets
import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
AXE = pytest.importorskip("axe_playwright_python.base", reason="axe-playwright-python is not installed").AXE_SCRIPT

from playwright.sync_api import Page, expect

from llmstream_nb import AnswerView, AskPanel, Monitor, Reasoning, Refusal, StreamView, ToolCall, ToolResult, connect
from llmstream_nb.answers.ask import ask
from llmstream_nb.answers.connection import names_of
from llmstream_nb.viewing.transcript import LABELS
from llmstream_nb.web.frame import WebFrame
from tests.conftest import FAST
from tests.model import Model, wait_for
from tests.web import Writer

from .test_page import client, site, visit  # noqa: F401 - fixtures

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
RUN = """async (tags) => {
  const found = await axe.run(document, { runOnly: tags, resultTypes: ["violations", "incomplete", "passes"] });
  const told = (results) => results.flatMap(({ id, nodes }) => nodes.map(({ target, html, any, all, none }) => {
    const node = document.querySelector(String(target));
    const why = [...any, ...all, ...none].map(({ message }) => message).join("; ");
    return [id, node?.closest("[data-case]")?.dataset.case ?? "", `${target} ${html.slice(0, 150)} ${why}`];
  }));
  return { violations: told(found.violations), unsure: told(found.incomplete), passes: told(found.passes).map(([id, at]) => [id, at]) };
}"""

THEMES = Path(sys.prefix, "share", "jupyter", "lab", "themes", "@jupyterlab")
SHEETS = {
    "a light page": ":root { color-scheme: light; background: #fff; color: #000; }",
    "a dark page": ":root { color-scheme: dark; background: #111; color: #eee; }",
    "light": "@theme-light :root { color-scheme: light; background: var(--jp-layout-color0); }",
    "dark": "@theme-dark :root { color-scheme: dark; background: var(--jp-layout-color0); color: #fff; }",
}
DRAW = """async ([cases, css]) => {
  document.head.appendChild(document.createElement("style")).textContent = css;
  const setTimeout = window.setTimeout;
  window.setTimeout = () => 0; // what is shown for a moment stays
  for (const [title, { states, live = true, then = {} }] of Object.entries(cases)) {
    const section = document.querySelector("main").appendChild(document.createElement("section"));
    section.dataset.case = title;
    section.appendChild(document.createElement("h2")).textContent = title;
    for (const state of states) {
      const el = section.appendChild(document.createElement("div"));
      if (!state._esm) {
        el.innerHTML = state.value;
        continue;
      }
      document.head.appendChild(document.createElement("style")).textContent = state._css ?? "";
      const script = URL.createObjectURL(new Blob([state._esm], { type: "text/javascript" }));
      const heard = [];
      const model = {
        get: (name) => (name === "layout" ? { comm_live: live } : state[name]),
        set: (changes) => (Object.assign(state, changes), heard.forEach((each) => each())),
        on: (name, each) => name === "change" && heard.push(each),
        off() {}, send() {}, save_changes() {},
      };
      (await import(script)).default.render({ model, el });
      if (then.set) model.set(then.set);
    }
    section.querySelectorAll("details").forEach((fold) => (fold.open = Boolean(then.unfold)));
    if (then.click) section.querySelector(then.click)?.click();
  }
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  window.setTimeout = setTimeout;
}"""
PAGE = '<!doctype html><html lang="en"><meta charset="utf-8"><title>The widgets</title><body><main><h1>The widgets</h1></main>'
MARKDOWN = """# A title

A [link](https://redis.io), **bold** and `XADD`.

> quoted

```
code
```

| a | b |
|---|---|
| 1 | 2 |
"""
LONG = "\n".join(f"row {n}" for n in range(50))
THOUGHT = Reasoning("The user wants weather.")
CALLS = (ToolCall("a", "weather", '{"city": "Zürich"}'), ToolCall("b", "news", '{"topic": '))
RESULTS = (ToolResult("a", LONG), ToolResult("b", error="no such tool"))


def theme(name: str) -> str:
    """A page's style; `@theme-…` stands for the colours of JupyterLab's own theme."""
    word, _, rest = SHEETS[name].partition(" ")
    if not word.startswith("@"):
        return SHEETS[name]
    return (THEMES / f"{word[1:]}-extension" / "index.css").read_text("utf-8") + rest


def states(*widgets: ipywidgets.Widget) -> list[dict[str, Any]]:
    """What a page is told of these widgets."""
    return [{name: value for name, value in one.get_state().items() if name != "layout"} for one in widgets]


def answer_views(here: Any) -> dict[str, Any]:
    """An AnswerView in every state, as a kernel has it."""
    found = dict[str, Any]()

    def keep(title: str, answer: Any, state: str, chunks: int = 0, **how: Any) -> None:
        for plain in (False, True):
            view = AnswerView(answer, client=here, plain=plain)
            if plain:
                wait_for(lambda: LABELS[state] in view.value and (not chunks or f">{chunks} chunk" in view.value))  # noqa: B023
            else:
                wait_for(lambda: view.state == state and view.chunks >= chunks)  # noqa: B023
            found[f"{title}{', plain' * plain}"] = {"states": states(view)} | how
            view.close()

    def asked(model: Any) -> Any:
        return ask("?", source=lambda *_: model, id=uuid.uuid4().hex[:8], client=here, timing=FAST)

    live = Model()
    answer = asked(live)
    keep("waiting", answer, "waiting")
    live.say(THOUGHT)
    keep("thinking", answer, "streaming", 1, then={"unfold": True})
    live.say(MARKDOWN, *CALLS)
    keep("streaming", answer, "streaming", 4)
    answer.stop()
    keep("stopped", answer, "stopped")
    whole = asked([THOUGHT, MARKDOWN, *CALLS, *RESULTS, THOUGHT, MARKDOWN, Refusal("No more.")])
    keep("complete", whole.wait(10), "ended")
    keep("complete, unfolded", whole, "ended", then={"unfold": True})
    keep("complete, as text", whole, "ended", then={"click": ".llmstream-raw"})
    broken = Model("so far")
    failed = asked(broken)
    broken.break_off(ValueError("no"))
    keep("failed", failed.wait(10), "failed")
    writer = Writer(here, uuid.uuid4().hex[:8]).say("the first ", "half").fall_silent()
    keep("interrupted", writer.id, "interrupted")
    keep("missing", "nobody", "missing")
    before = found["streaming"]["states"][0]
    found["voided words"] = {"states": [before | {"worker": "w1"}], "then": {"set": {"version": 9, "attempts": 2, "text": "anew", "blocks": []}}}
    found["without its kernel"] = {"states": [dict(before)], "live": False}
    return found


def row(state: str, **more: Any) -> dict[str, Any]:
    """What a Monitor shows of an answer."""
    label = state.capitalize()
    return {"id": f"a-{state}", "question": "Why?", "state": state, "label": label, "note": "", "attempt": 1, "first": 1, "worker": "w1", "chunks": 5, "rate": None, "asked": 90.0} | more


def monitors() -> dict[str, Any]:
    """A Monitor that has seen all, and one that has seen nothing."""
    about = {"_esm": Monitor._esm, "_css": Monitor._css, "prefix": "pool", "now": 100.0}
    workers = [{"name": f"w-{state}", "pending": n % 2, "state": state, "since": 50.0} for n, state in enumerate(["idle", "busy", "silent", "gone", "quiet"])]
    rows = [row("waiting", worker="", chunks=None), row("streaming", rate=12.5, attempt=2), row("ended", note="The model refused."), row("stopped"), row("failed", note="No such model."), row("interrupted"), row("unreadable", asked=None)]
    full = about | {"waiting": 3, "answering": 1, "failures": 2, "consumers": workers, "answers": rows, "note": "Redis is away, trying again."}
    empty = about | {"waiting": None, "answering": None, "failures": None, "consumers": [], "answers": [], "note": ""}
    return {"monitor": {"states": [full]}, "monitor, empty": {"states": [empty]}, "monitor, lost": {"states": [dict(full)], "live": False}}


def stream_views(here: Any) -> dict[str, Any]:
    """A StreamView of an answer and one of many askers, with groups, what is pending and skipped, missing, void and gone."""
    writer = Writer(here, uuid.uuid4().hex[:8]).say("void ", "words")
    writer.begin().say("a", "b")
    writer.seq += 2  # two are missing
    writer.say("c\n", *"de").end()
    failed = Writer(here, uuid.uuid4().hex[:8]).say("a").end(error="Overloaded", message="no")
    key, found = f"key-{uuid.uuid4().hex[:8]}", dict[str, Any]()
    for n in range(12):
        here.xadd(key, {"questionId": f"q{n % 6}", "word": f"word{n}"})
    here.xgroup_create(key, "group", "0")
    for n in range(6):
        here.xreadgroup("group", f"consumer-{n}", {key: ">"}, count=1)
    view = StreamView(key, colour="questionId", client=here)
    view.cursor("early", "$")
    for n in range(4):
        here.xadd(key, {"questionId": "q1", "word": f"more{n}"})
    view.cursor("early", "$")
    for title, one, length in (("askers", view, 16), ("stream", StreamView(names_of(here).answer(writer.id).chunks, client=here), 9),
                       ("failed stream", StreamView(names_of(here).answer(failed.id).chunks, client=here), 3), ("no stream", StreamView("nokey", client=here), 0)):
        wait_for(lambda: len(one.entries) >= length and one.marks and not one.unseen)
        found[title] = {"states": states(one)}
        one.close()
    shown = found["stream"]["states"][0]
    for gone, left, first in (("deleted", shown["entries"][:-3] + shown["entries"][-2:], shown["entries"][0][0]), ("trimmed", shown["entries"][3:], shown["entries"][3][0])):
        found[gone] = {"states": [dict(shown)], "then": {"set": {"entries": left, "marks": shown["marks"] | {"first": first}}}}
    return found


def panels() -> dict[str, Any]:
    """A panel's form, quiet, at work and without a kernel; and a frame."""
    form = states(AskPanel("What is Redis?").form)[0] | {"prepared": ["One?", "Two?"]}
    unready = {"busy": True, "message": "the question is empty: type one", "sources": [["x", "X", "It needs a key."]], "source": "x"}
    frame = {"_esm": WebFrame._esm, "height": 300}
    return {"form": {"states": [form]}, "form, at work": {"states": [form | unready]}, "form, lost": {"states": [dict(form)], "live": False}, "frame": {"states": [frame]}}


@pytest.fixture(scope="module")
def cases() -> Iterator[dict[str, Any]]:
    with connect(prefix=f"access-{uuid.uuid4().hex[:8]}") as here:
        yield panels() | monitors() | answer_views(here) | stream_views(here)


def judge(page: Page) -> dict[str, Any]:
    """What axe-core says of a page."""
    page.evaluate(AXE)
    return page.evaluate(RUN, TAGS)


@pytest.fixture(params=SHEETS)
def drawn(browser, cases, request) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1280, "height": 720}, reduced_motion="reduce")
    page.set_content(PAGE)
    page.evaluate(DRAW, [cases, theme(request.param)])
    yield page
    page.close()


def test_widgets(drawn, cases) -> None:
    found = judge(drawn)
    for what in ("violations", "unsure"):
        print("=====", what)
        for one in found[what]:
            print(one)
    print(sorted({id for id, _ in found["passes"]}), set(cases) - {at for id, at in found["passes"] if id == "color-contrast"})
    drawn.screenshot(path="/tmp/axe/shot.png", full_page=True)
    assert not found["violations"]
