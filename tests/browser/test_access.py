"""For all who use it: axe-core finds nothing against WCAG 2.2 A and AA, the keyboard suffices, and nothing moves for those who ask for calm."""

from __future__ import annotations

import shutil
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets
import nbformat
import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
AXE = pytest.importorskip("axe_playwright_python.base", reason="axe-playwright-python is not installed").AXE_SCRIPT

from playwright.sync_api import Page, expect

from llmstream_nb import AnswerView, AskPanel, Monitor, Reasoning, Refusal, StreamView, ToolCall, ToolResult, connect
from llmstream_nb.answers.ask import ask
from llmstream_nb.answers.connection import names_of
from llmstream_nb.setup.export import export
from llmstream_nb.viewing.transcript import LABELS
from llmstream_nb.web import WebServer
from llmstream_nb.web.frame import WebFrame
from tests.conftest import FAST
from tests.model import Model, wait_for
from tests.web import Writer

from .lab import CELL, ROOT
from .test_page import client, site, visit  # noqa: F401 - fixtures

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
# For each finding: its rule, the case in which it is, and what it is about.
RUN = """async (tags) => {
  const found = await axe.run(document, { runOnly: tags, resultTypes: ["violations", "incomplete", "passes"] });
  const told = (results) => results.flatMap(({ id, nodes }) => nodes.map(({ target, html, any, all, none }) => {
    const place = document.querySelector(String(target))?.closest("[data-case]")?.dataset.case ?? "";
    const why = [...any, ...all, ...none].map(({ message }) => message).join("; ");
    return [id, place, `${target} ${html.slice(0, 150)}: ${why}`];
  }));
  return [found.violations, found.incomplete, found.passes].map(told);
}"""
# What axe-core can't judge, and a look at it can: rule, selector, words of axe-core.
UNSURE = [
    ("color-contrast", ".llmstream-stream-earlier", "background gradient"),  # its words stand where it is one colour
    ("color-contrast", "<i>", "too short"),  # signs for spaces
    ("color-contrast", "<i>", "non-text"),
    ("color-contrast", "<div>→", "non-text"),  # arrows before words that stand in an element of their own
    ("color-contrast", "<div>←", "non-text"),
    ("color-contrast", "<details>", "overlapped"),  # by itself, where it is folded in a <pre>; unfolded it is judged
    ("color-contrast", ".llmstream-box-", "1:1"),  # of an entry that was deleted: the box is shown empty
    ("color-contrast", '<span class="', "obscured"),  # code, where it is scrolled out of its frame
    ("th-has-data-cells", ".llmstream-answers", "missing or empty"),  # no answers, and a head that is hidden
]
# Not all of axe-core's rules find something to judge here; BROKEN shows what these find.
RULES = {
    *("aria-allowed-attr", "aria-hidden-focus", "aria-progressbar-name", "aria-required-attr", "aria-roles"),
    *("aria-valid-attr", "aria-valid-attr-value", "button-name", "color-contrast", "document-title", "frame-title"),
    *("html-has-lang", "label", "link-in-text-block", "link-name", "nested-interactive", "role-img-alt"),
    *("select-name", "summary-name", "target-size"),
}
ON_THE_PAGE = RULES - {"frame-title", "role-img-alt"}
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
  window.setTimeout = () => 0; // what is shown for a moment stays …
  performance.now = () => 1000; // … however long it takes to look at it
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


def asked(here: Any, model: Any) -> Any:
    return ask("?", source=lambda *_: model, id=uuid.uuid4().hex[:8], client=here, timing=FAST)


def answer_views(here: Any) -> dict[str, Any]:
    """An AnswerView in every state, as a kernel has it."""
    found = dict[str, Any]()

    def keep(title: str, answer: Any, state: str, chunks: int = 0, **how: Any) -> None:
        for plain in (False, True):
            view = AnswerView(answer, client=here, plain=plain)
            if plain:
                wait_for(lambda: LABELS[state] in view.value and (not chunks or f">{chunks} chunk" in view.value))
            else:
                wait_for(lambda: view.state == state and view.chunks >= chunks)
            found[f"{title}{', plain' * plain}"] = {"states": states(view)} | how
            view.close()

    live = Model()
    answer = asked(here, live)
    keep("waiting", answer, "waiting")
    live.say(THOUGHT)
    keep("thinking", answer, "streaming", 1, then={"unfold": True})
    live.say(MARKDOWN, *CALLS)
    keep("streaming", answer, "streaming", 4)
    answer.stop()
    keep("stopped", answer, "stopped")
    whole = asked(here, [THOUGHT, MARKDOWN, *CALLS, *RESULTS, THOUGHT, MARKDOWN, Refusal("No more.")])
    keep("complete", whole.wait(10), "ended")
    keep("complete, unfolded", whole, "ended", then={"unfold": True})
    keep("complete, as text", whole, "ended", then={"click": ".llmstream-raw"})
    broken = Model("so far")
    failed = asked(here, broken)
    broken.break_off(ValueError("no"))
    keep("failed", failed.wait(10), "failed")
    writer = Writer(here, uuid.uuid4().hex[:8]).say("the first ", "half").fall_silent()
    keep("interrupted", writer.id, "interrupted")
    keep("missing", "nobody", "missing")
    before = found["streaming"]["states"][0]
    void = before | {"worker": "w1", "text": "void words", "blocks": []}
    found["voided words"] = {"states": [void], "then": {"set": {"version": 9, "attempts": 2, "text": "anew"}}}
    found["without its kernel"] = {"states": [dict(before)], "live": False}
    return found


def row(state: str, **more: Any) -> dict[str, Any]:
    """What a Monitor shows of an answer."""
    label = state.capitalize()
    return {
        "id": f"a-{state}",
        "question": "Why?",
        "state": state,
        "label": label,
        "note": "",
        "attempt": 1,
        "first": 1,
        "worker": "w1",
        "chunks": 5,
        "rate": None,
        "asked": 90.0,
    } | more


def monitors() -> dict[str, Any]:
    """A Monitor that has seen all, and one that has seen nothing."""
    about = {"_esm": Monitor._esm, "_css": Monitor._css, "prefix": "pool", "now": 100.0}
    workers = [
        {"name": f"w-{state}", "pending": n % 2, "state": state, "since": 50.0}
        for n, state in enumerate(["idle", "busy", "silent", "gone", "quiet"])
    ]
    rows = [
        row("waiting", worker="", chunks=None),
        row("streaming", rate=12.5, attempt=2),
        row("ended", note="The model refused."),
        row("stopped"),
        row("failed", note="No such model."),
        row("interrupted"),
        row("unreadable", asked=None),
    ]
    full = about | {
        "waiting": 3,
        "answering": 1,
        "failures": 2,
        "consumers": workers,
        "answers": rows,
        "note": "Redis is away, trying again.",
    }
    empty = about | {"waiting": None, "answering": None, "failures": None, "consumers": [], "answers": [], "note": ""}
    return {
        "monitor": {"states": [full]},
        "monitor, empty": {"states": [empty]},
        "monitor, lost": {"states": [dict(full)], "live": False},
    }


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
    for title, one, length in (
        ("askers", view, 16),
        ("stream", StreamView(names_of(here).answer(writer.id).chunks, client=here), 9),
        ("failed stream", StreamView(names_of(here).answer(failed.id).chunks, client=here), 3),
        ("no stream", StreamView("nokey", client=here), 0),
    ):
        wait_for(lambda: len(one.entries) >= length and one.marks and not one.unseen)
        found[title] = {"states": states(one)}
        one.close()
    before, shown = found["askers"]["states"][0], found["stream"]["states"][0]
    new = {"states": [before | {"entries": before["entries"][:-1]}], "then": {"set": {"entries": before["entries"]}}}
    found["grows"] = new
    rest = before["entries"][:-3] + before["entries"][-2:]
    found["deleted"] = {"states": [dict(before)], "then": {"set": {"entries": rest}}}
    later = {"entries": shown["entries"][3:], "marks": shown["marks"] | {"first": shown["entries"][3][0]}}
    found["trimmed"] = {"states": [dict(shown)], "then": {"set": later}}
    return found


def panels() -> dict[str, Any]:
    """A panel's form, quiet, at work and without a kernel; and a frame."""
    form = states(AskPanel("What is Redis?").form)[0] | {"prepared": ["One?", "Two?"]}
    unready = {
        "busy": True,
        "message": "the question is empty: type one",
        "sources": [["x", "X", "It needs a key."]],
        "source": "x",
    }
    frame = {"_esm": WebFrame._esm, "height": 300}
    return {
        "form": {"states": [form]},
        "form, at work": {"states": [form | unready]},
        "form, lost": {"states": [dict(form)], "live": False},
        "frame": {"states": [frame]},
    }


@pytest.fixture(scope="module")
def cases() -> Iterator[dict[str, Any]]:
    with connect(prefix=f"access-{uuid.uuid4().hex[:8]}") as here:
        yield panels() | monitors() | answer_views(here) | stream_views(here)


def judge(page: Page) -> set[tuple[str, str, str]]:
    """Let axe-core look at a page, which must be without a fault; return what it found right."""
    page.evaluate(AXE)
    violations, unsure, passes = page.evaluate(RUN, TAGS)
    assert not violations
    assert not [
        one for one in unsure if not any(one[0] == rule and at in one[2] and why in one[2] for rule, at, why in UNSURE)
    ]
    return {tuple(one) for one in passes}


@pytest.fixture
def draw(browser, cases) -> Iterator[Any]:
    """Draw the widgets, all of them or these, in a page without JupyterLab: in there axe-core judges no colours."""
    pages: list[Page] = []

    def make(skin: str, *names: str, **context: Any) -> Page:
        pages.append(
            browser.new_page(**{"viewport": {"width": 1280, "height": 720}, "reduced_motion": "reduce"} | context)
        )
        pages[-1].set_content(PAGE)
        pages[-1].evaluate(WATCH)
        pages[-1].evaluate(DRAW, [{name: cases[name] for name in names or cases}, theme(skin)])
        return pages[-1]

    yield make
    for page in pages:
        page.close()


# How much the edge of a field differs from what is around it: WCAG 1.4.11, for which axe-core has no rule.
EDGE = """(node) => {
  const [over, under] = [getComputedStyle(node).borderTopColor, getComputedStyle(node).backgroundColor];
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
  const [one, other] = [[], [over]].map((more) => {
    for (const colour of [getComputedStyle(document.documentElement).backgroundColor, under, ...more]) {
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
    }
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((part) => (part / 255 > 0.04 ? ((part / 255 + 0.055) / 1.055) ** 2.4 : part / 255 / 12.92));
    return 0.05 + 0.2126 * r + 0.7152 * g + 0.0722 * b;
  });
  return Math.max(one / other, other / one);
}"""


@pytest.mark.parametrize("skin", SHEETS)
def test_widgets(draw, cases, skin: str) -> None:
    page = draw(skin)
    passes = judge(page)
    assert page.locator("[data-gone=deleted], [data-gone=trimmed], .llmstream-voided").count() == 5
    assert {rule for rule, *_ in passes} >= RULES
    assert {case for rule, case, _ in passes if rule == "color-contrast"} - {""} == cases.keys()
    for field in ("textarea", "[type=text]", "select", "button:not(.llmstream-ask)"):
        assert page.locator(f"[data-case='form, at work'] {field}:enabled").first.evaluate(EDGE) >= 3, field


def test_struck_words_can_be_read_by_those_who_see_them(draw) -> None:
    """axe-core passes over what is hidden from screen readers, as words are that count no more."""
    page = draw("light", "voided words")
    page.evaluate(
        "() => Object.assign(document.querySelector('.llmstream-voided'), { ariaHidden: null, inert: false })"
    )
    assert any(rule == "color-contrast" and ">void words<" in what for rule, _, what in judge(page))


BROKEN = """<!doctype html><html><body><main>
<p style="color: #999; background: #fff">Faint words with <a href="/z" style="color: #888; text-decoration: none">a link</a> among them.</p>
<button></button><input><a href="/x"></a><select><option>1</option></select><iframe></iframe>
<details><summary></summary>x</details>
<button><a href="/y">y</a></button><b aria-hidden="true"><button>z</button></b>
<i role="progressbar"></i><i role="img"></i><i role="nonsense"></i><i role="button" aria-nonsense="1">x</i>
<i role="checkbox">c</i><i role="switch" aria-checked="nonsense">s</i><i role="alert" aria-selected="true">a</i>
<p><button style="width: 9px; height: 9px; padding: 0" aria-label="p"></button><button style="width: 9px; height: 9px;
padding: 0" aria-label="q"></button></p></main>"""


def test_a_page_with_these_faults_is_found_faulty(browser) -> None:
    page = browser.new_page()
    page.set_content(BROKEN)
    page.evaluate(AXE)
    found = {rule for rule, *_ in page.evaluate(RUN, TAGS)[0]}
    page.close()
    assert found >= RULES, RULES - found


# ------------------------------------------------------------------------------------------- the site to read


# A notebook with pictures, folds and tables; code with long lines; boxes to tick; the index.
PAGES = ["index", "notebooks/04-groups", "notebooks/07-fast-and-slow", "notebooks/glossary", "docs/which-redis"]
PAGES += ["workshop/README", "workshop/drills", "llmstream_nb/answers/index", "llmstream_nb/PROTOCOL"]
ON_THE_SITE = {
    *("color-contrast", "document-title", "html-has-lang", "image-alt", "label", "link-in-text-block", "link-name"),
    *("list", "listitem", "scrollable-region-focusable", "summary-name", "target-size"),
}


def test_the_site(browser, tmp_path) -> None:
    export(tmp_path)
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        rules = set()
        for name in PAGES:
            page.goto((tmp_path / f"{name}.html").as_uri())
            page.evaluate("() => document.querySelectorAll('details').forEach((fold) => (fold.open = true))")
            rules |= {rule for rule, *_ in judge(page)}
        assert rules >= ON_THE_SITE, ON_THE_SITE - rules
    page.close()


# ------------------------------------------------------------------------------------------------ what moves

WATCH = """() => {
  window.moved = [];
  const { animate } = Element.prototype;
  Element.prototype.animate = function (...how) {
    window.moved.push(this.className);
    return animate.apply(this, how);
  };
}"""
MOVES = """() => {
  const found = new Set(window.moved);
  for (const node of document.querySelectorAll("*")) {
    for (const part of [null, "::before", "::after"]) {
      const { animationName, transitionDuration } = getComputedStyle(node, part);
      if (animationName !== "none" || transitionDuration !== "0s") found.add(node.className);
    }
  }
  return [...found].sort();
}"""


def test_nothing_moves_for_those_who_ask_for_calm(draw) -> None:
    assert draw("light").evaluate(MOVES) == []
    moving = draw("light", reduced_motion="no-preference").evaluate(MOVES)
    assert {"llmstream-bar", "llmstream-voided", "llmstream-box llmstream-new", "llmstream-stream-track"} <= {*moving}
    assert {"llmstream-lane-mark", "llmstream-lane-part", "llmstream-box"} <= {*moving}


# ----------------------------------------------------------------------------------------------- the web page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page(site, client, visit, scheme: str) -> None:  # noqa: F811
    viewer = visit(site.link(), color_scheme=scheme, reduced_motion="reduce")
    expect(viewer.prepared).to_be_visible()
    passes = judge(viewer.page)
    viewer.ask.click()
    expect(viewer.refusal).to_be_visible()
    passes |= judge(viewer.page)
    live = Model()
    answer = asked(client, live)
    viewer.open(site.link(answer)).see("Waiting")
    passes |= judge(viewer.page)
    assert viewer.evaluate(MOVES) == []
    live.say(THOUGHT, MARKDOWN, *CALLS, *RESULTS)
    viewer.see("Streaming").has("no such tool")
    passes |= judge(viewer.page)
    live.say(Refusal("No more."))
    live.end("refusal")
    viewer.see("Complete")
    expect(viewer.text.locator(".markdown a").first).to_be_visible()
    passes |= judge(viewer.page)
    viewer.evaluate("document.querySelectorAll('#text details').forEach((fold) => (fold.open = true))")
    viewer.page.set_viewport_size({"width": 320, "height": 568})
    passes |= judge(viewer.page)
    viewer.raw.click()
    passes |= judge(viewer.page)
    writer = Writer(client, uuid.uuid4().hex[:8]).say("so far").end(error="Overloaded", message="no time")
    viewer.open(site.link(writer.id)).see("Failed")
    passes |= judge(viewer.page)
    viewer.open(site.link("never-asked")).see("Not found")
    passes |= judge(viewer.page)
    viewer.page.goto(site.base)
    expect(viewer.refusal).to_contain_text("whole link")
    passes |= judge(viewer.page)
    assert {rule for rule, *_ in passes} >= ON_THE_PAGE, ON_THE_PAGE - {rule for rule, *_ in passes}


STAY = """() => {
  const setTimeout = window.setTimeout;
  window.setTimeout = (act, time) => (time === 2000 ? 0 : setTimeout(act, time)); // what is shown for so long stays
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_when_a_worker_is_silent(client, visit, scheme: str) -> None:  # noqa: F811
    writer = Writer(client, uuid.uuid4().hex[:8], begin=False).begin(worker="w1", job="1-0").say("void words")
    with WebServer(client=client, timing=replace(FAST, patience=2.0)) as impatient:
        viewer = visit(impatient.link(writer.id), color_scheme=scheme, reduced_motion="reduce").has("void words")
        writer.fall_silent()
        expect(viewer.again).to_be_visible()
        judge(viewer.page)
        viewer.again.click()
        viewer.evaluate(STAY)
        writer.begin(worker="w2", job="1-0").say("anew")
        viewer.has("anew")
        assert viewer.evaluate(MOVES) == []
        void = viewer.page.locator(".llmstream-voided")
        expect(void).to_contain_text("void words")
        void.evaluate("(node) => Object.assign(node, { ariaHidden: null, inert: false })")
        assert any(rule == "color-contrast" and ">void words<" in what for rule, _, what in judge(viewer.page))


# ------------------------------------------------------------------------------------- the keyboard, in JupyterLab

ACTIVE = "() => window.jupyterapp.shell.currentWidget.content.activeCellIndex"
# What a screen reader says by itself: the texts of live regions whenever they change, but for what in them is not live.
HEAR = """() => {
  window.heard = [];
  new MutationObserver((changes) => {
    for (const { target } of changes) {
      const node = target.nodeType === Node.TEXT_NODE ? target.parentElement : target;
      const live = node?.closest("[aria-live], [role=status], [role=alert]");
      if (!live?.closest(".llmstream-form, .llmstream-answer") || live.ariaLive === "off") continue;
      const said = live.innerText.trim();
      if (said && said !== window.heard.at(-1)) window.heard.push(said);
    }
  }).observe(document.body, { childList: true, characterData: true, subtree: true });
}"""


def test_the_first_notebook_by_keyboard_alone(browser, lab) -> None:
    copy = shutil.copy(ROOT / "notebooks" / "00-ask.ipynb", lab.folder)
    shutil.copytree(ROOT / "notebooks" / "images", lab.folder / "images", dirs_exist_ok=True)
    where = Path(copy).relative_to(ROOT).as_posix()
    notebook = lab.open(browser, where, viewport={"width": 1280, "height": 720}, reduced_motion="reduce")
    page, keys = notebook.page, notebook.page.keyboard
    page.evaluate(HEAR)
    panel = notebook.output(0)

    def go_to(cell: int) -> None:
        while (at := page.evaluate(ACTIVE)) != cell:
            keys.press("ArrowDown" if at < cell else "ArrowUp")
            page.wait_for_function(f"(at) => ({ACTIVE})() !== at", arg=at)

    def tab_to(thing: Any, key: str = "Tab", most: int = 8) -> None:
        for _ in range(most):
            if thing.evaluate("(node) => node === document.activeElement"):
                break
            keys.press(key)
        expect(thing).to_be_focused()

    go_to(1)
    keys.press("Shift+Enter")
    question, ask_, stop = (
        panel.get_by_role("textbox", name="Question"),
        panel.get_by_role("button", name="Ask"),
        panel.get_by_role("button", name="Stop"),
    )
    expect(question).to_be_visible()
    tab_to(question, "Shift+Tab")
    keys.press("ControlOrMeta+A")
    keys.type("What is a consumer group?")
    keys.press("Control+Enter")
    expect(stop).to_be_focused()
    expect(panel.locator(".llmstream-body")).to_contain_text("group")
    keys.press("Enter")
    label = panel.locator(".llmstream-label")
    expect(label).to_have_text("Stopped")
    expect(ask_).to_be_focused()
    keys.press("Enter")
    expect(label).to_have_text("Complete")
    expect(ask_).to_be_focused()
    body = panel.locator(".llmstream-body")
    tab_to(body)
    heard = page.evaluate("window.heard")
    assert [said for said in heard if not said.startswith("Waiting")] == [
        "Streaming",
        "Stopped The text so far is kept.",
        "Streaming",
        "Complete",
    ]
    go_to(5)  # from a widget back into the notebook
    for cell in (5, 6):
        keys.press("Shift+Enter")
        page.wait_for_function(f"(cell) => ({ACTIVE})() === cell", arg=cell + 1)
    go_to(10)
    fold = page.locator("details").filter(has=page.get_by_text("Answer", exact=True)).first
    tab_to(fold.locator("summary"))
    keys.press("Enter")
    expect(fold).to_have_attribute("open", "")
    go_to(19)
    keys.press("Enter")  # to write
    keys.press("ControlOrMeta+A")
    solution = next(cell for cell in nbformat.read(copy, 4).cells if "```python\nkey = " in cell.source)
    keys.insert_text("from llmstream_nb import checks\n" + solution.source.split("```")[1].removeprefix("python\n"))
    keys.press("Shift+Enter")
    page.wait_for_function(f"({CELL})(19).outputArea.node.textContent.includes('✓')")
    assert not notebook.errors
    notebook.close()
