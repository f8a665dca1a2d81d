"""Reasoning, calls, results and refusals as people see them in Chromium: live, late, after the end; and none of it acts."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import Locator, expect

from llmstream_nb import AnswerView, Reasoning, Refusal, ToolCall, ToolResult, connect
from llmstream_nb.answers.ask import Answer, ask
from llmstream_nb.answers.connection import names_of
from tests.conftest import FAST
from tests.model import Model, wait_for
from tests.web import Writer

from .test_page import HARM, HOSTILE, PATIENCE, client, site, visit  # noqa: F401 - fixtures
from .test_widgets_in_lab import HARM as HARM_IN_LAB

LONG = "\n".join(f"row {n}" for n in range(5_000))


def asked(client: Any, model: Model) -> Answer:  # noqa: F811
    return ask("?", source=lambda *_: model, id=uuid.uuid4().hex[:8], client=client, timing=FAST)


def think(model: Model) -> None:
    model.say(Reasoning("The user wants "), Reasoning("<b>weather</b>."))


def act(model: Model) -> None:
    model.say("Let me **see**.", ToolCall("a", "weather", '{"city": "Zürich", "days": 2}'))
    model.say(ToolCall("b", "news", '{"topic": '))


def find(model: Model) -> None:
    model.say(ToolResult("b", error="no such tool"), ToolResult("a", LONG), Reasoning("Aha."), "It is **sunny**.")
    model.say(Refusal("No more."))


def check_end(body: Locator) -> None:
    """All of it stands in its place, as the reader left it."""
    order = body.evaluate("(body) => [...body.children].map((node) => node.className.replace('llmstream-', ''))")
    assert order == ["reasoning", "markdown", "call", "call", "reasoning", "markdown", "refusal"]
    calls, thoughts = body.locator(".llmstream-call"), body.locator(".llmstream-thought")
    expect(thoughts).to_have_text([re.compile(r"^Thought for [\d.]+ s$")] * 2)
    expect(calls.nth(0).locator("> code")).to_have_text('weather(city="Zürich", days=2)')
    expect(calls.nth(0).locator(".llmstream-result summary")).to_have_text("row 0 …")
    expect(calls.nth(0)).to_contain_text(f"[{len(LONG) - 20_000:,} more characters are not shown]")
    expect(calls.nth(1)).to_contain_text("not valid JSON")
    expect(calls.nth(1).locator(".llmstream-result")).to_have_text("Failedno such tool")
    expect(body.locator(".llmstream-open:visible")).to_have_count(0)
    expect(body.locator(".llmstream-refusal")).to_have_text("RefusedNo more.")
    expect(body.locator(".markdown strong")).to_have_text(["see", "sunny"])


def test_on_the_page(site, client, visit) -> None:  # noqa: F811
    model = Model()
    answer = asked(client, model)
    viewer = visit(site.link(answer), viewport={"width": 1280, "height": 720})
    think(model)
    first, thought = viewer.text.locator("details").first, viewer.text.locator(".llmstream-thought").first
    expect(thought).to_have_text(re.compile(r"^Thinking … [\d.]+ s$"))
    before = thought.text_content()
    expect(thought).not_to_have_text(before)  # the clock goes on, though nothing comes
    assert not first.evaluate("(fold) => fold.open")
    thought.focus()
    viewer.page.keyboard.press("Enter")
    expect(first).to_contain_text("The user wants <b>weather</b>.")
    act(model)
    expect(thought).to_have_text(re.compile(r"^Thought for [\d.]+ s$"))
    expect(viewer.text.locator(".llmstream-open:visible")).to_have_count(2)
    late = visit(site.link(answer)).has("news(")
    expect(late.text.locator(".llmstream-open:visible")).to_have_count(2)
    find(model)
    viewer.has("No more.")
    model.end("refusal")
    viewer.see("Complete")
    expect(viewer.note).to_have_text("The model refused.")
    expect(viewer.text.locator(".markdown")).to_have_count(2)
    check_end(viewer.text)
    assert first.evaluate("(fold) => fold.open && fold.contains(document.activeElement)")
    expect(viewer.figures).to_have_text(re.compile(r"^10\schunks · first\ssign\s[\d.]+\ss · first\stoken\s.* · total"))
    check_end(late.see("Complete").text)
    client.delete(names_of(client).answer(answer.id).chunks)  # from the record alone
    after = visit(site.link(answer)).see("Complete")
    check_end(after.text)
    assert after.figures.text_content() == viewer.figures.text_content()
    after.raw.click()
    expect(after.text).to_contain_text("Let me **see**.")


def test_what_goes_on_stays_on_the_page(site, client, visit) -> None:  # noqa: F811
    writer = Writer(client, uuid.uuid4().hex[:8], begin=False).begin(worker="w1", job="1-0").say("the first ", "half")
    viewer = visit(site.link(writer.id)).has("the first half")
    writer.fall_silent()
    viewer.see("Interrupted")
    writer.begin(worker="w3", job="1-0", continues="1-2").say("the first half", " and more")
    viewer.see("Streaming").has("the first half and more")
    expect(viewer.note).to_have_text("Attempt 2, by w3, goes on.")
    expect(viewer.page.locator(".llmstream-voided")).to_have_count(0)
    writer.end()
    assert viewer.ends() == "the first half and more"
    expect(viewer.figures).to_contain_text("2\u00a0attempts · ")


def hostile_parts() -> Iterator[Any]:
    for text in HOSTILE:
        yield from (Reasoning(text), text, Refusal(text), ToolCall(text, text, text), ToolResult(text, text))
        yield from (ToolCall("x", "f", json.dumps({text: [text]})), ToolResult("x", error=f"{text}\n" * 9))
        yield ToolResult("nobody's", text * 20)


def test_no_part_runs_or_loads_anything(site, client, visit) -> None:  # noqa: F811
    model = Model()
    model.say(*hostile_parts(), "all was said")
    answer = asked(client, model)
    viewer = visit(site.link(answer)).has("all was said")
    chunks = names_of(client).answer(answer.id).chunks
    unfold = "document.querySelectorAll('#text details').forEach((fold) => (fold.open = true))"
    viewer.evaluate(unfold)
    assert not viewer.evaluate(HARM) and client.xlen(chunks) > 8 * len(HOSTILE)
    model.end()
    for _ in range(2):
        viewer.see("Complete")
        viewer.evaluate(unfold)
        viewer.page.wait_for_load_state("networkidle")
        assert not viewer.evaluate(HARM)
        viewer.page.reload()
    writer = Writer(client, uuid.uuid4().hex[:8])
    for text in HOSTILE:
        writer._add(text, text)  # of a kind that nobody knows
    writer._add("call", '{"id": {"<b>": 1}, "name": ["<img src=x onerror=alert(1)>"]}')
    writer._add("result", '{"id": null, "content": {"<img src=x onerror=alert(1)>": 1}}').end()
    viewer.open(site.link(writer.id)).see("Complete")
    expect(viewer.text).to_contain_text("which this page doesn't know")
    assert not viewer.evaluate(HARM)


def test_a_thousand_calls_are_drawn_quickly_and_the_oldest_in_words(site, client, visit) -> None:  # noqa: F811
    model = Model("Before. ")
    answer = asked(client, model)
    viewer = visit(site.link(answer)).has("Before.")
    for n in range(1_000):
        model.say(ToolCall(str(n), "look", json.dumps({"n": n, "words": "x" * (900_000 if n == 990 else 10)})))
        model.say(ToolResult(str(n), f"found {n}"))
    model.say("After.")
    for _ in range(2):
        viewer.has("After.")
        calls = viewer.text.locator(".llmstream-call")
        assert 100 <= calls.count() <= 200
        expect(calls.last).to_contain_text("found 999")
        expect(viewer.text).to_contain_text("[1,700 earlier parts are not shown]")
        assert viewer.text.evaluate("(node) => node.textContent.length") < 100_000
        model.end()
        viewer.see("Complete")
        viewer.page.reload()


CELLS = (
    "from llmstream_nb import AnswerView, connect\nfrom llmstream_nb.answers.connection import environment_of\n"
    "print(*environment_of(connect()).values())"
)


def test_in_a_notebook(browser, lab) -> None:
    name = f"p{uuid.uuid4().hex[:8]}"
    shows = f"AnswerView('{name}')"
    notebook = lab.open(
        browser,
        lab.notebook(CELLS, shows, shows, shows.replace(")", ", plain=True)")),
        viewport={"width": 1280, "height": 720},
    )
    notebook.run(0)
    expect(notebook.output(0)).to_contain_text("redis://")
    url, prefix = notebook.text(0).split()
    model = Model()
    with connect(url, prefix=prefix) as made:
        answer = ask("?", source=lambda *_: model, id=name, client=made, timing=FAST)
        notebook.run(1)
        body = notebook.output(1).locator(".llmstream-body")
        think(model)
        thought = body.locator(".llmstream-thought").first
        expect(thought).to_have_text(re.compile(r"^Thinking … [\d.]+ s$"))
        before = thought.text_content()
        expect(thought).not_to_have_text(before)
        thought.click()
        act(model)
        expect(body.locator(".llmstream-open:visible")).to_have_count(2)
        expect(thought).to_have_text(re.compile(r"^Thought for"))
        notebook.save()
        notebook.reload()  # in the middle of it
        expect(body.locator(".llmstream-open:visible")).to_have_count(2)
        thought.click()
        find(model)
        expect(body).to_contain_text("No more.")
        model.end("refusal")
        expect(notebook.output(1).locator(".llmstream-label")).to_have_text("Complete")
        expect(body.locator(".markdown")).to_have_count(2)
        check_end(body)
        assert body.locator("details").first.evaluate("(fold) => fold.open")
        answer.wait(10)
        wait_for(lambda: answer.record.get("end"))
        made.delete(names_of(made).answer(name).chunks)
        notebook.run(2)
        late = notebook.output(2).locator(".llmstream-body")
        expect(late.locator(".markdown")).to_have_count(2)
        check_end(late)
        notebook.run(3)
        plain = notebook.output(3)
        expect(plain.locator("summary").first).to_have_text(re.compile(r"^Thought for"))
        expect(plain.locator("pre")).to_contain_text('weather(city="Zürich", days=2)')
        assert not notebook.page.evaluate(HARM_IN_LAB)
    notebook.page.context.close()


ALONE = """async ([script, steps]) => {
  const view = (await import(URL.createObjectURL(new Blob([script], { type: "text/javascript" })))).default;
  const state = { version: 0, text: "", blocks: [], html: "", state: "streaming", label: "", note: "", chunks: 1, ms: 7 };
  Object.assign(state, { first_part_ms: 7, first_ms: null, attempts: 1, worker: "" });
  const handlers = {};
  const asked = [];
  const set = (changes) => (Object.assign(state, changes), handlers.change());
  const on = (name, handler) => (handlers[name] = handler);
  const model = { get: (name) => state[name], set, on, off() {}, send: () => asked.push(1) };
  const el = document.body.appendChild(document.createElement("div"));
  view.initialize({ model });
  view.render({ model, el });
  handlers["change:ms"](); // what it asked for at first has come
  asked.length = 0;
  const body = el.querySelector(".llmstream-body");
  const seen = [];
  for (const step of steps) {
    handlers["msg:custom"](step);
    await new Promise(requestAnimationFrame);
    seen.push([body.textContent.replace(/Thinking … [\\d.]+ s|Thought for [\\d.]+ s/, "T:"), asked.length]);
  }
  return seen;
}"""


def test_messages_that_come_twice_or_not_at_all(browser) -> None:
    """With a model in the place of a kernel."""
    thought = {"kind": "reasoning", "text": "😀 a", "since": 0, "ms": 1}
    base = {"version": 0, "offset": 0, "added": ""}
    first = base | {"kept": 0, "blocks": [[0, thought]]}
    more = base | {
        "kept": 0,
        "skip": 4,
        "blocks": [[0, thought | {"text": "b"}], [0, {"kind": "refusal", "text": "no"}]],
    }
    page = browser.new_page()
    steps = [first, first, more, first, more, base | {"kept": 5, "blocks": [[0, thought]]}]
    seen = page.evaluate(ALONE, [AnswerView._esm, steps])
    whole = "T:😀 abRefusedno"
    assert seen == [["T:😀 a", 0], ["T:😀 a", 0], [whole, 0], [whole, 0], [whole, 0], [whole, 1]]
    page.close()
