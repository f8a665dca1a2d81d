"""AnswerView, AskPanel and Monitor in a real JupyterLab: what people see, press and reload."""

from __future__ import annotations

import ast
import re
import urllib.request

import pytest

from llmstream_nb import AnswerView, Worker, connect
from tests.test_widgets import INJECTIONS

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

from .lab import READY
from .lab import lab as start_lab

IMPORTS = "from llmstream_nb import AnswerView, AskPanel, ask, connect\nclient = connect()"
SLOW = "scripted:pace=40,long=240"  # 240 numbered chunks in six seconds
WHOLE = "".join(f"{n} " for n in range(240))


def view(notebook, cell: int):
    return notebook.output(cell).locator(".llmstream-answer")


def label(notebook, cell: int):
    return view(notebook, cell).locator(".llmstream-label")


def text(notebook, cell: int) -> str:
    return view(notebook, cell).locator(".llmstream-body").text_content()


def text_at_end(notebook, cell: int, state: str = "Complete") -> str:
    """Wait for the end; return the text exactly as the page holds it."""
    expect(label(notebook, cell)).to_have_text(state, timeout=90_000)  # a busy machine needs long for a megabyte
    raw = view(notebook, cell).get_by_role("button", name="as text")
    if raw.is_visible():
        raw.click()
    return text(notebook, cell)


def button(notebook, name: str):
    return notebook.page.get_by_role("button", name=name, exact=True)


def ask_in_panel(browser, lab) -> None:
    """Type a question, ask with the keyboard, and see text before the end, then all of it as Markdown."""
    notebook = lab.open(browser, lab.notebook(IMPORTS, "panel = AskPanel(); panel", "print(panel.answer.text, end='')"))
    notebook.run(0)
    notebook.run(1)
    question = notebook.page.get_by_role("textbox", name="Question")
    expect(button(notebook, "Stop")).to_be_disabled()
    question.fill("What is a Redis stream?")
    question.press("End")
    question.press("Control+Enter")
    expect(label(notebook, 1)).to_have_text("Streaming")
    expect(view(notebook, 1).locator(".llmstream-body")).to_contain_text("stream")
    expect(label(notebook, 1)).to_have_text("Streaming")  # there was text before the end
    expect(button(notebook, "Ask")).to_be_disabled()
    expect(button(notebook, "Stop")).to_be_enabled()
    expect(label(notebook, 1)).to_have_text("Complete")
    expect(view(notebook, 1).locator(".llmstream-body strong").first).to_be_visible()
    expect(view(notebook, 1).locator(".llmstream-figures")).to_have_text(
        re.compile(r"^\d+ chunks · first token \d+\.\d\d? s · total \d+\.\d s$")
    )
    expect(button(notebook, "Ask")).to_be_enabled()
    assert text_at_end(notebook, 1) == notebook.run(2)
    assert question.input_value() == "What is a Redis stream?"  # JupyterLab did not take the keys
    notebook.page.context.close()


def test_ask_and_watch(browser, lab) -> None:
    ask_in_panel(browser, lab)


def test_ask_and_watch_under_a_base_url(browser) -> None:
    with start_lab("/user/me/") as elsewhere:
        assert "/user/me/" in elsewhere.base
        ask_in_panel(browser, elsewhere)


def test_stop_and_ask_again(browser, lab) -> None:
    cells = IMPORTS, f"panel = AskPanel('count', model={SLOW!r}); panel", "print(panel.answer.text, end='')"
    notebook = lab.open(browser, lab.notebook(*cells))
    notebook.run(0)
    notebook.run(1)
    ask, stop = button(notebook, "Ask"), button(notebook, "Stop")
    ask.dblclick()
    expect(view(notebook, 1).locator(".llmstream-body")).to_contain_text("0 1 2")
    stop.click()
    said = text_at_end(notebook, 1, "Stopped")
    assert WHOLE.startswith(said)
    assert "0 1 2" in said != WHOLE
    assert notebook.run(2) == said
    expect(view(notebook, 1)).to_have_count(1)
    ask.click()
    expect(label(notebook, 1)).to_have_text("Streaming")
    stop.click()
    expect(label(notebook, 1)).to_have_text("Stopped")
    notebook.page.get_by_role("textbox", name="Question").fill("  ")
    ask.click()
    expect(notebook.page.get_by_role("alert")).to_have_text("the question is empty: type one")
    notebook.page.context.close()


def test_a_reload_in_mid_answer_loses_nothing(browser, lab) -> None:
    cells = IMPORTS, f"panel = AskPanel('count', model={SLOW!r}); panel", "AnswerView(panel.answer)"
    notebook = lab.open(browser, lab.notebook(*cells))
    for index in (0, 1):
        notebook.run(index)
    button(notebook, "Ask").click()
    expect(view(notebook, 1).locator(".llmstream-body")).to_contain_text("0 1 2")
    notebook.run(2)
    notebook.save()
    before = text(notebook, 1)
    notebook.reload()
    expect(view(notebook, 1).locator(".llmstream-body")).to_contain_text(before)
    expect(label(notebook, 1)).to_have_text("Streaming")
    expect(button(notebook, "Stop")).to_be_enabled()
    assert text_at_end(notebook, 1) == text_at_end(notebook, 2) == WHOLE
    notebook.reload()  # long after the end, too
    assert text_at_end(notebook, 1) == WHOLE
    notebook.page.context.close()


def test_two_views_and_another_kernel_all_show_everything(browser, lab) -> None:
    show = "AnswerView('shared')"
    here = lab.open(browser, lab.notebook(IMPORTS, f"a = ask('count', model={SLOW!r}, id='shared')", show, show))
    for index in range(4):
        here.run(index)
    expect(view(here, 2).locator(".llmstream-body")).to_contain_text("0 1 2")
    there = lab.open(browser, lab.notebook(IMPORTS, show, "AnswerView('shared', plain=True)"))
    for index in range(3):
        there.run(index)
    expect(view(there, 1).locator(".llmstream-body")).to_contain_text("0 1 2")
    assert text_at_end(here, 2) == text_at_end(here, 3) == text_at_end(there, 1) == WHOLE
    expect(there.output(2).locator("b").first).to_have_text("Complete")
    assert there.output(2).locator("pre").text_content() == WHOLE
    for notebook in (here, there):
        notebook.page.context.close()


def test_a_pooled_answer_goes_on_when_the_kernel_that_asked_restarts(browser, lab) -> None:
    asks = f"from llmstream_nb import enqueue\nenqueue('count', source='scripted', model={SLOW!r}, id='pooled')"
    cells = (
        IMPORTS,
        "from llmstream_nb.answers.connection import environment_of\nprint(*environment_of(client).values())",
        asks,
    )
    notebook = lab.open(browser, lab.notebook(*cells, "AnswerView('pooled')"))
    notebook.run(0)
    notebook.run(1)
    expect(notebook.output(1)).to_contain_text("redis://")
    url, prefix = notebook.text(1).split()
    worker = Worker(client=connect(url, prefix=prefix)).start()
    try:
        for index in (2, 3):
            notebook.run(index)
        expect(view(notebook, 3).locator(".llmstream-body")).to_contain_text("0 1 2")
        expect(label(notebook, 3)).to_have_text("Streaming")
        notebook.restart_kernel()
        for index in (0, 3):
            notebook.run(index)
        assert text_at_end(notebook, 3) == WHOLE
    finally:
        worker.stop(0)
    notebook.page.context.close()


HOSTILE = [text.replace("alert(1)", "alert(window.__pwned=1)") for text in INJECTIONS]
SOURCE = f"""
import threading
go_on = threading.Event()
def hostile(question, topic):
    for text in {HOSTILE!r}:
        yield text + "\\n\\n"
    yield "all was said"
    go_on.wait(120)
    yield "the end"
    if question == "fail":
        raise RuntimeError({HOSTILE[2]!r})
panel = AskPanel("end", source=hostile, id="hostile")
panel"""


@pytest.mark.parametrize("ending", ["end", "fail"])
def test_nothing_that_a_model_writes_runs_or_loads(browser, lab, ending: str) -> None:
    name = f"hostile-{ending}"
    source = SOURCE.replace('"end", source', f'"{ending}", source').replace('"hostile")', f'"{name}")')
    shown = f"AnswerView('{name}', plain=True)"
    notebook = lab.open(browser, lab.notebook(IMPORTS, source, shown, "go_on.set()", "print(ascii(panel.answer.text))"))
    page = notebook.page
    bad: list[str] = []
    page.on("dialog", lambda dialog: (bad.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: bad.append(request.url) if not request.url.startswith(OURS) else None)
    for index in (0, 1):
        notebook.run(index)
    button(notebook, "Ask").click()
    expect(view(notebook, 1).locator(".llmstream-body")).to_contain_text("all was said")
    notebook.run(2)
    expect(notebook.output(2).locator("pre")).to_contain_text("all was said")
    assert not harm(page)  # while it streams
    notebook.run(3)
    state = {"end": "Complete", "fail": "Failed"}[ending]
    expect(label(notebook, 1)).to_have_text(state)
    expect(notebook.output(2).locator("b").first).to_have_text(state)
    page.wait_for_timeout(500)  # for whatever an element might still be about to load
    assert not harm(page)  # as Markdown
    notebook.save()
    notebook.reload()
    expect(label(notebook, 1)).to_have_text(state)
    assert not harm(page)  # from the saved state
    assert text_at_end(notebook, 1, state) == ast.literal_eval(notebook.run(4))
    assert not bad
    page.context.close()


OURS = ("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:")
HARM = """() => [
  ...(window.__pwned ? ["code ran"] : []),
  ...[...document.querySelectorAll(".llmstream-answer, .llmstream-monitor, .widget-html")].flatMap((root) => [
    ...root.querySelectorAll("script, img, svg, iframe, object, embed, style, link, form, input, math, video, meta"),
    ...[...root.querySelectorAll("*")].filter((node) => [...node.attributes].some(({ name, value }) =>
      name.startsWith("on") || /^\\s*(javascript|data|vbscript|file):/i.test(value))),
  ]).map((node) => node.outerHTML),
]"""


def harm(page) -> list[str]:
    """Whether anything ran, and every element or attribute in the views that could act or load."""
    return page.evaluate(HARM)


def test_a_megabyte_in_one_chunk_and_many_chunks_at_full_speed(browser, lab) -> None:
    cells = (
        IMPORTS,
        "whole = ask('big', source=lambda *_: ['x😀 \\n' * 200_000]); AnswerView(whole)",
        "many = ask('many', source=lambda *_: (f'{n:06d}\\n' for n in range(50_000))); AnswerView(many)",
        "AnswerView(many, plain=True)",
    )
    notebook = lab.open(browser, lab.notebook(*cells))
    for index in range(4):
        notebook.run(index)
    assert text_at_end(notebook, 1) == "x😀 \n" * 200_000
    many = "".join(f"{n:06d}\n" for n in range(50_000))
    assert text_at_end(notebook, 2) == many
    expect(notebook.output(3).locator("b").first).to_have_text("Complete")
    assert notebook.output(3).locator("pre").text_content() == many
    assert "rate exceeded" not in "".join(notebook.text(index) for index in range(4))
    notebook.page.context.close()


def test_a_page_stays_where_its_reader_scrolled_to(browser, lab) -> None:
    model = "scripted:pace=60,piece=60,long=300"
    notebook = lab.open(browser, lab.notebook(IMPORTS, f"a = ask('count', model={model!r}); AnswerView(a)"))
    notebook.run(0)
    notebook.run(1)
    body = view(notebook, 1).locator(".llmstream-body")
    at_end = "(body) => body.scrollTop > 200 && body.scrollTop + body.clientHeight > body.scrollHeight - 30"
    notebook.page.wait_for_function(at_end, arg=body.element_handle())
    body.evaluate("(body) => body.scrollTo(0, 0)")
    height = body.evaluate("(body) => body.scrollHeight")
    notebook.page.wait_for_function("([body, h]) => body.scrollHeight > h", arg=[body.element_handle(), height])
    assert body.evaluate("(body) => body.scrollTop") == 0
    notebook.page.context.close()


ALONE = """async (script) => {
  const view = (await import(URL.createObjectURL(new Blob([script], { type: "text/javascript" })))).default;
  const state = { version: 0, text: "😀 one five", blocks: [[0, { gap: "[a]" }], [7, { gap: "[b]" }]], html: "", state: "streaming" };
  Object.assign(state, { label: "Streaming", note: "", chunks: 2, first_ms: 7, ms: 7 });
  let update;
  const model = { get: (name) => state[name], on: (_, heard) => (update = heard), off() {}, send() {} };
  const el = document.body.appendChild(document.createElement("div"));
  view.render({ model, el });
  const body = el.querySelector(".llmstream-body");
  const seen = [body.innerHTML];
  for (const change of [{ text: "😀 one five six" }, { state: "ended" }, { html: "<p>😀</p>", blocks: [] }, { html: "" }]) {
    Object.assign(state, change);
    update();
    seen.push(body.innerHTML);
  }
  return seen;
}"""


def test_gaps_are_marked_and_the_end_is_drawn_at_once(browser) -> None:
    """With a model in the place of a kernel."""
    page = browser.new_page()
    start = "<mark>[a]</mark><div>😀 one </div><mark>[b]</mark>"
    seen = page.evaluate(ALONE, AnswerView._esm)
    assert seen[:2] == [f"{start}<div>five</div>"] * 2  # what is new waits for the next frame
    assert seen[2:] == [f"{start}<div>five six</div>", "<p>😀</p>", "<div>😀 one five six</div>"]
    page.close()


WATCH_STATUS = """() => {
  const node = document.querySelector(".llmstream-missing");
  const told = [node.textContent];
  const status = node.closest("[role=status]");
  const note = () => told.at(-1) === node.textContent || told.push(node.textContent);
  new MutationObserver(note).observe(status, { childList: true, characterData: true, subtree: true });
  return told;
}"""
POOL = """
from llmstream_nb import Monitor, Worker, clear, enqueue
from llmstream_nb.answers.connection import names_of
clear()  # the answers of other tests
Monitor()"""
QUESTIONS = f"""
import itertools, threading, time
go_on = threading.Event()
def count(question, topic):
    for n in itertools.count():
        yield f"{{n}} "
        if go_on.wait(0.03):
            return
worker = Worker(slots=2, name="worker-1", source=count).start()
for n in (1, 2, 3):
    enqueue("count", id=f"pooled-{{n}}", source="scripted")
hostile = ask({HOSTILE[0]!r}, source=lambda *_: [], id="hostile-row")
client.zadd(names_of(client).answers, {{{HOSTILE[2]!r}: time.time()}})"""
END = f"client.zrem(names_of(client).answers, {HOSTILE[2]!r}); worker.stop(); clear()"


def test_monitor(browser, lab) -> None:
    notebook = lab.open(browser, lab.notebook(IMPORTS, POOL, QUESTIONS, "go_on.set()", END))
    page = notebook.page
    bad: list[str] = []
    page.on("request", lambda request: bad.append(request.url) if not request.url.startswith(OURS) else None)
    notebook.run(0)
    notebook.run(1)
    monitor = notebook.output(1).locator(".llmstream-monitor")
    status = monitor.get_by_role("status")
    expect(status).to_contain_text("0 questions waiting")
    expect(monitor.locator("caption").last).to_contain_text("No answers under")
    notebook.run(2)

    def row(name: str):
        return monitor.get_by_role("row").filter(has=page.get_by_role("rowheader", name=name, exact=True))

    expect(status).to_contain_text("1 question waiting")  # two slots, three questions
    expect(status).to_contain_text("2 being answered")
    expect(status).to_contain_text("1 worker")
    expect(row("worker-1").get_by_role("cell")).to_have_text(["2", "At work"])
    expect(row("pooled-3").locator(".llmstream-label")).to_have_text("Waiting")
    cells = [
        "count",
        "Streaming",
        "worker-1",
        re.compile(r"^\d+$"),
        re.compile(r"^\d+(\.\d)?/s$"),
        re.compile(r"^\d+ s$"),
    ]
    expect(row("pooled-1").get_by_role("cell")).to_have_text(cells)
    for theme, colour in (("JupyterLab Dark", "rgb(255, 255, 255)"), ("JupyterLab Light", "rgb(0, 0, 0)")):
        notebook.theme(theme)
        expect(row("pooled-1").locator(".llmstream-label")).to_have_css("color", colour)
    notebook.run(3)
    for name in ("pooled-1", "pooled-2", "pooled-3"):
        cells[1], cells[4] = "Complete", "–"
        expect(row(name).get_by_role("cell")).to_have_text(cells)
    expect(status).to_contain_text("0 being answered")
    expect(row("worker-1").get_by_role("cell")).to_have_text(["0", "Idle"])
    notebook.save()
    notebook.reload()
    expect(row("pooled-3").locator(".llmstream-label")).to_have_text("Complete")
    age = row("pooled-3").get_by_role("cell").last
    before = age.text_content()
    expect(age).not_to_have_text(before)  # it grows, though nothing is sent
    expect(row("hostile-row").get_by_role("cell").first).to_have_text(HOSTILE[0])
    expect(row(HOSTILE[2]).locator(".llmstream-label")).to_have_text("Unreadable")
    expect(monitor.locator("th:not([scope])")).to_have_count(0)
    expect(page.locator(".llmstream-monitor :is([aria-live]:not([aria-live=off]), [role=status])")).to_have_count(1)
    assert not harm(page)
    assert not bad
    notebook.run(4)
    expect(monitor.locator("caption").last).to_contain_text("No answers under")
    page.context.close()


MORTAL = """
from llmstream_nb import Monitor, clear, start_process
clear()
worker = start_process("mortal", lease=2)
Monitor()"""


def test_monitor_tells_a_dead_worker_from_an_idle_one(browser, lab) -> None:
    notebook = lab.open(browser, lab.notebook(IMPORTS, MORTAL, "worker.kill(); worker.wait()"))
    notebook.run(0)
    notebook.run(1)
    monitor = notebook.output(1).locator(".llmstream-monitor")
    status, state = monitor.get_by_role("status"), monitor.locator(".llmstream-workers .llmstream-label")
    expect(state).to_have_text("Idle")
    expect(status).to_contain_text("1 worker")
    told = notebook.page.evaluate_handle(WATCH_STATUS)
    notebook.run(2)
    expect(state).to_have_text(re.compile(r"^Gone for \d+ s$"))
    expect(status).to_contain_text("0 workers")
    expect(state).not_to_have_text(state.text_content())  # it grows, though nothing is sent
    assert told.json_value() == ["", "mortal is silent", "mortal is gone"]  # and is not read aloud every second
    notebook.page.context.close()


SHARED = """
import threading
import ipywidgets
from llmstream_nb import read_answer_group
answer = ask("count", model="scripted:pace=40,long=120", id="in-groups")
boxes = [ipywidgets.Textarea(description=name) for name in ("left", "right")]
def read(box):
    for batch in read_answer_group(answer.id, "both", box.description):
        box.value += "".join(entry.text for entry in batch if entry.kind == "text")
    box.disabled = True
for box in boxes:
    threading.Thread(target=read, args=(box,), daemon=True).start()
ipywidgets.HBox(boxes)"""


def test_two_consumers_of_a_group_share_the_words_and_a_group_of_its_own_feeds_a_view(browser, lab) -> None:
    shown = "AnswerView(answer, group='viewer')"
    notebook = lab.open(browser, lab.notebook(IMPORTS, SHARED, shown, "AnswerView(answer, group='both')", shown))
    for index in range(4):
        notebook.run(index)
    words = "".join(f"{n} " for n in range(120))
    assert text_at_end(notebook, 2) == words
    boxes = notebook.output(1).locator("textarea")
    for box in (boxes.first, boxes.last):
        expect(box).to_be_disabled()
    left, right = (boxes.nth(at).input_value().split() for at in (0, 1))
    assert min(len(left), len(right)) > 10
    assert sorted(left + right, key=int) == words.split()
    expect(label(notebook, 3)).to_have_text("Failed")
    expect(view(notebook, 3)).to_contain_text("has other consumers (left, right): each would get only a part")
    notebook.run(4)  # the group has nothing left to give, and the text is whole
    assert text_at_end(notebook, 4) == words
    notebook.page.context.close()


RESTARTED, GONE = (
    "The kernel was restarted: run the cells from the first one on again.",
    "The kernel is gone: start one, and run the cells from the first one on again.",
)
CONTEXT = "window.jupyterapp.shell.currentWidget.sessionContext"
CLOCKS = (
    "() => [...document.querySelectorAll('.llmstream-figures, .llmstream-cell-age')].map((node) => node.textContent)"
)


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (f"{CONTEXT}.session.kernel.restart()", RESTARTED),
        (f"{CONTEXT}.session.kernel.requestExecute({{code: 'os.kill(os.getpid(), 9)'}})", RESTARTED),
        (f"{CONTEXT}.shutdown()", GONE),
        ("", GONE),  # by the server, as another page would
    ],
    ids=["restarted", "killed", "shut down", "deleted"],
)
def test_views_say_so_when_their_kernel_is_lost(browser, lab, end: str, said: str) -> None:
    panel = f"panel = AskPanel('count', model={SLOW.replace('240', '9999')!r}); panel"
    notebook = lab.open(
        browser, lab.notebook(f"import os\n{IMPORTS}", panel, "from llmstream_nb import Monitor; Monitor()")
    )
    for index in range(3):
        notebook.run(index)
    page = notebook.page
    button(notebook, "Ask").click()
    expect(view(notebook, 1).locator(".llmstream-body")).to_contain_text("0 1 2")
    if end:
        page.evaluate(f"() => void {end}")
    else:
        kernel = page.evaluate(f"() => {CONTEXT}.session.kernel.id")
        url = f"{lab.base}api/kernels/{kernel}?token={lab.token}"
        urllib.request.urlopen(urllib.request.Request(url, method="DELETE")).close()
    for part in (notebook.output(1).locator(".llmstream-form"), view(notebook, 1), notebook.output(2)):
        expect(part.get_by_role("status").filter(has_text=said)).to_be_visible()
    expect(label(notebook, 1)).to_have_text("Not live")
    for name in ("Ask", "Stop"):
        expect(button(notebook, name)).to_be_disabled()
        button(notebook, name).dispatch_event("click")  # as somebody who was quicker
    page.get_by_role("textbox", name="Question").dispatch_event("keydown", {"key": "Enter", "ctrlKey": True})
    clocks = page.evaluate(CLOCKS)
    page.wait_for_timeout(2100)  # the monitor's clock goes once a second
    assert page.evaluate(CLOCKS) == clocks
    assert not notebook.errors
    if end:  # with a kernel that is there again, the cell brings it all back
        if "kill" in end:  # JupyterLab says it, too
            page.locator(".jp-Dialog .jp-mod-accept").click()
        if said == GONE:
            page.evaluate(f"() => {CONTEXT}.startKernel()")
        page.wait_for_function(READY)
        for index in range(2):
            notebook.run(index)
        expect(button(notebook, "Ask")).to_be_enabled()
        expect(notebook.output(1).get_by_text(said)).to_have_count(0)
    page.context.close()


ACTIVE = "() => window.jupyterapp.shell.currentWidget.content.activeCellIndex"


def test_the_keyboard_works_on_after_ask_and_stop_and_a_click_in_a_view(browser, lab) -> None:
    panel = f"panel = AskPanel('count', model={SLOW!r}); panel"
    notebook = lab.open(browser, lab.notebook(IMPORTS, panel, "2", "3", "4"))
    for index in range(2):
        notebook.run(index)
    page, ask, stop = notebook.page, button(notebook, "Ask"), button(notebook, "Stop")
    cells = page.locator(".jp-CodeCell")

    def press(key: str, active: int) -> None:
        page.keyboard.press(key)
        page.wait_for_function(f"(index) => ({ACTIVE})() === index", arg=active)

    ask.click()
    expect(stop).to_be_focused()
    press("ArrowDown", 2)
    press("Shift+Enter", 3)
    expect(notebook.output(2)).to_contain_text("2")
    view(notebook, 1).locator(".llmstream-body").click()
    press("ArrowUp", 0)
    stop.focus()
    page.keyboard.press("Enter")
    expect(label(notebook, 1)).to_have_text("Stopped")
    expect(ask).to_be_focused()
    page.keyboard.type("xddaabb")  # as commands they would cut, delete and insert cells
    expect(cells).to_have_count(5)
    question = page.get_by_role("textbox", name="Question")
    question.fill("")
    question.press_sequentially("xdd a b")
    question.press("Shift+Enter")
    expect(question).to_have_value("xdd a b\n")
    expect(cells).to_have_count(5)
    assert page.evaluate(ACTIVE) == 1
    question.press("Control+Enter")
    expect(stop).to_be_focused()
    expect(label(notebook, 1)).to_have_text("Complete")
    expect(ask).to_be_focused()
    press("ArrowDown", 2)
    ask.focus()
    press("Shift+Enter", 2)
    expect(notebook.output(1).locator(".llmstream-answer")).to_have_count(0)  # a new panel
    assert not notebook.errors
    page.context.close()
