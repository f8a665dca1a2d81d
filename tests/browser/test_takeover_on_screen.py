"""A takeover as people see it in Chromium: the words of the interruption, the void words struck through, the new ones."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import Page, expect

from llmstream_nb import AnswerView, connect
from tests.web import Writer

from .test_page import PATIENCE, client, site, visit  # noqa: F401 - fixtures

SILENT = "Its worker {} is silent; another may take over."
# All that was on the screen: label, note, void words, text; each line once, in its order.
WATCH = """([root, label, note, text]) => {
  window.__seen = [];
  const at = (name) => root.querySelector(name);
  const look = () => {
    const void_ = at(".llmstream-voided del");
    const now = [at(label).textContent, at(note).textContent, void_?.textContent ?? "", at(text).textContent];
    if (JSON.stringify(now) !== JSON.stringify(window.__seen.at(-1))) window.__seen.push(now);
  };
  new MutationObserver(look).observe(root, { childList: true, characterData: true, subtree: true });
  look();
}"""


def seen(page: Page) -> list[tuple[str, str, str, str]]:
    return [tuple(line) for line in page.evaluate("window.__seen")]


def assert_in_order(seen: list[Any], *expected: Any) -> None:
    """Each of these was on the screen, one after the other."""
    rest = iter(seen)
    for line in expected:
        assert line in rest, f"{line} is not there, or not in its place, in {seen}"


def play(writer: Writer, heard: Any, void: Any) -> str:
    """Two takeovers, each once all of what was before is seen; return the text that counts."""
    writer.say("the first ", "half")
    heard("Streaming", "", "the first half")
    writer.fall_silent()
    heard("Interrupted", SILENT.format("w1"), "the first half")
    writer.begin(worker="w2", job="1-0").say("the second ")
    heard("Streaming", "Attempt 2, by w2.", "the second ")
    writer.fall_silent()
    heard("Interrupted", SILENT.format("w2"), "the second ")
    writer.begin(worker="w3", job="1-0").say("all ")
    heard("Streaming", "Attempt 3, by w3.", "all ")
    expect(void).to_have_count(0, timeout=PATIENCE)
    writer.say("of *it*").end()
    return writer.text


ORDER = [
    ("Streaming", "", "", "the first half"),
    ("Interrupted", SILENT.format("w1"), "", "the first half"),
    ("Streaming", "Attempt 2, by w2.", "the first half", "the second "),
    ("Interrupted", SILENT.format("w2"), "the first half", "the second "),
    ("Streaming", "Attempt 3, by w3.", "the second ", "all "),
    ("Streaming", "Attempt 3, by w3.", "", "all "),
]


def order(seen: list[Any]) -> list[Any]:
    """ORDER, but the first void words may have gone before the second interruption."""
    line = list(ORDER[3])
    return [*ORDER[:3], ORDER[3] if ORDER[3] in seen else (*line[:2], "", line[3]), *ORDER[4:]]


def test_on_the_page(site, client, visit) -> None:  # noqa: F811
    writer = Writer(client, uuid.uuid4().hex[:8], begin=False).begin(worker="w1", job="1-0")
    viewer = visit(site.link(writer.id), viewport={"width": 1280, "height": 720})
    viewer.see("Waiting")
    answer = viewer.answer.element_handle()
    viewer.page.evaluate(WATCH, [answer, "#state", "#note", "#text"])

    def heard(label: str, note: str, text: str) -> None:
        viewer.see(label)
        expect(viewer.note).to_have_text(note)
        expect(viewer.note).to_be_in_viewport() if note else None
        expect(viewer.text).to_have_text(text)

    whole = play(writer, heard, viewer.page.locator(".llmstream-voided"))
    assert viewer.ends() == whole == "all of *it*"
    expect(viewer.figures).to_contain_text("3\u00a0attempts · ")
    assert_in_order(seen(viewer.page), *order(seen(viewer.page)))
    viewer.open(site.link(writer.id)).see("Complete")  # from its record
    expect(viewer.page.locator(".llmstream-voided")).to_have_count(0)


def test_who_comes_to_the_page_in_attempt_2_sees_no_void_words(site, client, visit) -> None:  # noqa: F811
    writer = Writer(client, uuid.uuid4().hex[:8], begin=False).begin(worker="w1", job="1-0").say(*["void "] * 3000)
    writer.begin(worker="w2", job="1-0").say("all ")
    viewer = visit("about:blank")
    viewer.page.add_init_script(
        "new MutationObserver((all) => all.forEach((one) => one.addedNodes.forEach((node) => "
        "node.className === 'llmstream-voided' && (window.__void = true)))).observe(document, {childList: true, subtree: true});"
    )
    viewer.open(site.link(writer.id)).see("Streaming").has("all ")
    expect(viewer.note).to_have_text("Attempt 2, by w2.")
    assert not viewer.evaluate("window.__void")
    viewer.page.reload()
    viewer.see("Streaming")
    expect(viewer.note).to_have_text("Attempt 2, by w2.")
    writer.say("of it").end()
    assert viewer.ends() == "all of it"
    assert not viewer.evaluate("window.__void")


def test_another_question_under_its_id_is_no_takeover_on_the_page(site, client, visit) -> None:  # noqa: F811
    writer = Writer(client, uuid.uuid4().hex[:8], begin=False).begin(worker="w1", job="1-0").say("old")
    viewer = visit(site.link(writer.id)).has("old")
    writer.begin(worker="w2", job="2-0").say("new")
    expect(viewer.text).to_have_text("new")
    expect(viewer.note).to_be_hidden()
    expect(viewer.page.locator(".llmstream-voided")).to_have_count(0)
    writer.end()
    assert viewer.ends() == "new"


CELLS = (
    "from llmstream_nb import AnswerView, connect\nfrom llmstream_nb.answers.connection import environment_of\n"
    "print(*environment_of(connect()).values())"
)


def test_in_a_notebook(browser, lab) -> None:
    name = f"w{uuid.uuid4().hex[:8]}"
    notebook = lab.open(browser, lab.notebook(CELLS, f"AnswerView('{name}')"), viewport={"width": 1280, "height": 720})
    notebook.run(0)
    expect(notebook.output(0)).to_contain_text("redis://")
    url, prefix = notebook.text(0).split()
    writer = Writer(connect(url, prefix=prefix), name, begin=False).begin(worker="w1", job="1-0")
    notebook.run(1)
    view = notebook.output(1).locator(".llmstream-answer")
    label, body = view.locator(".llmstream-label"), view.locator(".llmstream-body")
    note = view.locator(".llmstream-label + span")
    expect(label).to_have_text("Waiting")
    names = [".llmstream-label", ".llmstream-label + span", ".llmstream-body"]
    notebook.page.evaluate(WATCH, [view.element_handle(), *names])

    def heard(words: str, on_it: str, text: str) -> None:
        expect(label).to_have_text(words)
        expect(note).to_have_text(on_it)
        expect(note).to_be_in_viewport() if on_it else None
        expect(body).to_have_text(text)

    whole = play(writer, heard, view.locator(".llmstream-voided"))
    expect(label).to_have_text("Complete")
    expect(view.locator(".llmstream-figures")).to_contain_text("3 attempts · ")
    view.get_by_role("button", name="as text").click()
    assert body.text_content() == whole == "all of *it*"
    assert_in_order(seen(notebook.page), *order(seen(notebook.page)))
    expect(view.locator("del")).to_have_count(0)
    notebook.page.context.close()


ALONE = """async ([script, css, first, steps]) => {
  document.body.appendChild(document.createElement("style")).textContent = css;
  const view = (await import(URL.createObjectURL(new Blob([script], { type: "text/javascript" })))).default;
  const state = { version: 0, blocks: [], html: "", state: "streaming", label: "Streaming", note: "", chunks: 1, first_ms: 7, ms: 7 };
  Object.assign(state, { attempts: 1, worker: "w1", ...first });
  let update;
  const model = { get: (name) => state[name], on: (_, heard) => (update = heard), off() {}, send() {} };
  const el = document.body.appendChild(document.createElement("div"));
  view.render({ model, el });
  const [head, body] = ["head", "body"].map((name) => el.querySelector(`.llmstream-${name}`));
  const seen = [];
  for (const step of steps) {
    Object.assign(state, step);
    update();
    await new Promise(requestAnimationFrame);
    const void_ = el.querySelectorAll(".llmstream-voided");
    getSelection().selectAllChildren(el);
    seen.push({
      count: void_.length,
      caption: void_[0]?.querySelector("p").textContent,
      struck: void_[0]?.querySelector("del").textContent,
      line: void_[0]?.querySelector("del > *") && getComputedStyle(void_[0].querySelector("del > *")).textDecorationLine,
      animation: void_[0] && getComputedStyle(void_[0]).animationName,
      hidden: void_[0]?.ariaHidden,
      text: body.textContent,
      selected: getSelection().toString().includes("void"),
      height: el.offsetHeight,
      sight: body.hidden || body.scrollTop + body.clientHeight > body.scrollHeight - 30,
    });
  }
  return seen;
}"""
AGAIN = {"version": 1, "attempts": 2, "worker": "w2", "text": ""}


@pytest.fixture(params=["no-preference", "reduce"])
def alone(browser, request) -> Any:
    """A view with a model in the place of a kernel: what is seen after each of these changes."""
    page = browser.new_page(reduced_motion=request.param, viewport={"width": 1280, "height": 720})

    def run(first: dict[str, Any], *steps: dict[str, Any]) -> list[dict[str, Any]]:
        found = page.evaluate(ALONE, [AnswerView._esm, AnswerView._css, first, list(steps)])
        for one in found:
            assert one["count"] < 2 and not (one["count"] and one["selected"]) and one["hidden"] in (None, "true")
            if one["count"]:
                assert one["animation"] == ("none" if request.param == "reduce" else "llmstream-void")
        expect(page.locator(".llmstream-voided")).to_have_count(0, timeout=PATIENCE)
        return found

    yield run
    page.close()


def test_void_words_are_struck_through_above_the_new_ones(alone) -> None:
    before, void, new, end = alone(
        {"text": "void"}, {}, AGAIN, {"text": "new"}, {"state": "ended", "html": "<p>new</p>"}
    )
    assert (before["count"], before["text"], before["selected"]) == (0, "void", True)
    for step, text in ((void, ""), (new, "new"), (end, "new")):
        assert (step["count"], step["struck"], step["line"], step["text"]) == (1, "void", "line-through", text)
        assert step["caption"] == "Interrupted Its worker w1 is silent."


def test_two_takeovers_in_a_row_and_an_attempt_without_a_word(alone) -> None:
    third = {"version": 2, "attempts": 3, "worker": "w3", "text": "gone, too"}
    empty, again, fourth = alone({"text": ""}, AGAIN, third, third | {"version": 3, "attempts": 4, "text": "new"})
    assert (empty["struck"], empty["caption"]) == ("", "Interrupted Its worker w1 is silent.")
    assert (again["struck"], again["caption"], again["text"]) == (
        "",
        "Interrupted Its worker w2 is silent.",
        "gone, too",
    )
    assert (fourth["struck"], fourth["text"]) == ("gone, too", "new")


def test_no_words_are_void_where_another_question_is_asked_or_the_view_comes_later(alone) -> None:
    late = {"text": "new", "attempts": 2, "version": 1}
    assert [one["count"] for one in alone({"text": "old"}, {"version": 1, "text": "new", "worker": "w2"})] == [0]
    assert [one["count"] for one in alone(late, {}, {"text": "new words"})] == [0, 0]


def test_a_long_first_text_leaves_the_new_words_in_sight(alone) -> None:
    text = "void words of many a line\n" * 4_000
    before, void, new = alone({"text": text}, {}, AGAIN, {"text": "new\n" * 200})
    assert len(before["text"]) == len(text) and before["height"] > 400
    assert void["height"] < 300 and void["struck"] == text
    assert new["sight"] and new["text"] == "new\n" * 200
