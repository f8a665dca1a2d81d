"""StreamView in a real JupyterLab: what people see of a stream while things happen to it."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

from .test_widgets_in_lab import HARM, HOSTILE, OURS

IMPORTS = """
from llmstream_nb import AnswerView, StreamView, ask, connect
from llmstream_nb.answers.connection import names_of
redis = connect()
key = names_of(redis).prefix + ":story"
def tell(text, start=1):
    for number, word in enumerate(text.split(), start):
        redis.xadd(key, {"word": word}, id=f"1-{number}")"""
AT_END = "(node) => node.scrollLeft + node.clientWidth >= node.scrollWidth - 1"
CALM = """() => [...document.querySelectorAll(".llmstream-stream")]
  .every((view) => !view.getAnimations({subtree: true}).length)"""
# Keeps in `window.gone` what was drawn as gone, if only for a moment.
WATCH = """(view) => {
  window.gone = new Set();
  const look = () => {
    for (const box of view.querySelectorAll(".llmstream-box:is([data-gone=deleted], [data-gone=trimmed])"))
      window.gone.add(`${box.dataset.gone} ${box.textContent}`);
    requestAnimationFrame(look);
  };
  look();
}"""
# Where a reader's arrow is: the number of boxes to its left.
LEFT_OF = """(view, name) => {
  const mark = [...view.querySelectorAll(".llmstream-lane-mark")].find((node) => node.textContent.startsWith(name));
  if (!mark) return -1; // not yet
  const x = mark.getBoundingClientRect().left + 6;
  return [...view.querySelectorAll(".llmstream-box")].filter((box) => box.getBoundingClientRect().right < x).length;
}"""


def boxes(view):
    return view.locator(".llmstream-box")


def says(view, *words: str) -> None:
    """Expect these texts in the boxes, in this order."""
    expect(view.locator(".llmstream-box-words")).to_have_text(list(words))


def stands(notebook, view, name: str, after: int) -> None:
    """Expect a reader's or group's arrow in the gap after so many boxes."""
    notebook.page.wait_for_function(
        f"([view, name, after]) => ({LEFT_OF})(view, name) === after", arg=[view.element_handle(), name, after]
    )


def parts(view) -> list[str]:
    return view.locator(".llmstream-lane-part").all_text_contents()


def test_entries_readers_and_groups(browser, lab) -> None:
    cells = (
        IMPORTS,
        "redis.delete(key); view = StreamView(key); view",
        "tell('Once upon a time')",
        "view.cursor('loop', '1-2')",
        "tell('there was', 5); view.cursor('loop', '$')",
        "redis.xgroup_create(key, 'g', id='0'); redis.xreadgroup('g', 'c1', {key: '>'}, count=3)",
        "redis.xclaim(key, 'g', 'c2', 0, ['1-2'], justid=True); redis.xclaim(key, 'g', 'c2', 0, ['1-3'])",
        "redis.xack(key, 'g', '1-1', '1-2', '1-3')",
        "redis.xdel(key, '1-4')",
        "redis.xtrim(key, maxlen=3, approximate=False)",
        "redis.delete(key)",
        "tell('There is')",
    )
    notebook = lab.open(browser, lab.notebook(*cells))
    notebook.run(0)
    notebook.run(1)
    view = notebook.output(1).locator(".llmstream-stream")
    status = view.get_by_role("status")
    expect(status).to_have_text("No such key yet.")
    view.evaluate(WATCH)

    def gone(*expected: str) -> None:
        notebook.page.wait_for_function("(expected) => expected.every((one) => window.gone.has(one))", arg=expected)

    notebook.run(2)
    says(view, "Once", "upon", "a", "time")
    expect(view.locator(".llmstream-box-id")).to_have_text(["1-1", "1-2", "1-3", "1-4"])
    expect(status).to_be_hidden()
    notebook.run(3)
    stands(notebook, view, "loop", 2)
    notebook.run(4)
    stands(notebook, view, "loop", 6)
    assert parts(view) == ["skipped"]
    notebook.run(5)
    stands(notebook, view, "g", 3)
    expect(view.locator(".llmstream-lane-part[data-kind=held]")).to_have_text(["c1"])
    expect(view.locator(".llmstream-lane-mark").last).to_have_text("g3 pending")
    notebook.run(6)
    expect(view.locator(".llmstream-lane-part[data-kind=held]")).to_have_text(["c1", "c2", "c2 ×2"])
    expect(view.get_by_role("img")).to_have_attribute(
        "aria-label", re.compile("6 entries; newest 1-6: was; .*g after 1-3")
    )
    notebook.run(7)
    expect(view.locator(".llmstream-lane-part[data-kind=held]")).to_have_count(0)
    notebook.run(8)
    gone("deleted 1-4time")  # a hole, for a moment
    expect(view.locator("[data-gone=deleted]")).to_have_count(0)
    says(view, "Once", "upon", "a", "there", "was")
    notebook.run(9)
    gone("trimmed 1-1Once", "trimmed 1-2upon")
    expect(view.locator("[data-gone=trimmed]")).to_have_count(0)
    says(view, "a", "there", "was")
    expect(view).to_contain_text("3 entries")
    notebook.run(10)
    expect(status).to_have_text("The key is gone: deleted, or expired.")
    notebook.run(11)
    says(view, "There", "is")
    notebook.save()
    notebook.reload()
    says(view, "There", "is")
    for theme, colour in (("JupyterLab Dark", "rgb(255, 255, 255)"), ("JupyterLab Light", "rgb(0, 0, 0)")):
        notebook.theme(theme)
        expect(view.locator(".llmstream-box-words").first).to_have_css("color", colour)
    notebook.page.context.close()


ATTEMPTS = """
chunks = names_of(redis).answer("attempts").chunks
redis.delete(chunks)
def put(id, kind, text="{}"): redis.xadd(chunks, {"kind": kind, "text": text, "ms": 0}, id=id)
put("1-0", "start"); put("1-1", "text", "half "); put("1-2", "text", "a")
StreamView(chunks)"""


def test_what_is_missing_and_what_another_attempt_has_voided(browser, lab) -> None:
    cells = (
        IMPORTS,
        ATTEMPTS,
        "put('2-0', 'start'); put('2-1', 'text', 'a'); put('2-4', 'text', 'whole')",
        "put('3-0', 'end', '{\"closes\": \"2-4\"}')",
    )
    notebook = lab.open(browser, lab.notebook(*cells))
    notebook.run(0)
    notebook.run(1)
    view = notebook.output(1).locator(".llmstream-stream")
    says(view, "start", "half·", "a")
    expect(view.locator("[data-voided=true]")).to_have_count(0)
    notebook.run(2)
    says(view, "start", "half·", "a", "start", "a", "missing", "whole")
    expect(view.locator("[data-kind=missing]")).to_have_text("2-2 … 2-3missing")
    expect(view.locator("[data-voided=true]")).to_have_text([re.compile(f"^1-{n}") for n in (0, 1, 2)])
    notebook.run(3)  # closed from outside: the text of attempt 2 stands
    expect(boxes(view)).to_have_count(8)
    expect(view.locator("[data-voided=true]")).to_have_count(3)
    notebook.page.context.close()


def test_nothing_in_an_entry_runs_and_its_text_is_exact(browser, lab) -> None:
    name = "<img src=x onerror='window.__pwned=1'>"
    act = f"""
hostile = {HOSTILE!r}
redis.delete(key)
for number, text in enumerate([*hostile, "x" * 1_000_000, "\\u202e\\x00\\x1b"], 1):
    redis.xadd(key, {{"kind": text, "text": text, "by": text}}, id=f"1-{{number}}")
redis.xadd(key, {{f"<b>{{n}}": "<i>" for n in range(10_000)}}, id="2-0")
redis.xgroup_create(key, {name!r}, id="0")
redis.xreadgroup({name!r}, {name!r}, {{key: ">"}}, count=50)
view = StreamView(key, newest=60, colour="by")
view.cursor({name!r}, "1-3")
view"""
    notebook = lab.open(browser, lab.notebook(IMPORTS, act))
    page = notebook.page
    bad: list[str] = []
    page.on("request", lambda request: bad.append(request.url) if not request.url.startswith(OURS) else None)
    notebook.run(0)
    notebook.run(1)
    view = notebook.output(1).locator(".llmstream-stream")
    expect(boxes(view)).to_have_count(len(HOSTILE) + 3)
    expect(view.locator(".llmstream-lane")).to_have_count(2)
    expect(view.locator(".llmstream-lane-mark").first).to_contain_text(name)
    for at, text in enumerate(HOSTILE):
        assert boxes(view).nth(at).get_attribute("title").endswith(text)
    assert boxes(view).nth(len(HOSTILE)).get_attribute("title").endswith("x" * 1000 + "…")
    assert boxes(view).nth(len(HOSTILE) + 1).locator(".llmstream-box-words").text_content().endswith("␀␛")
    assert not page.evaluate(HARM.replace(".llmstream-answer", ".llmstream-stream"))
    assert not bad
    page.context.close()


def test_many_entries_go_by_and_a_late_reader_follows(browser, lab) -> None:
    cells = (
        IMPORTS,
        "many = ask('count', source='scripted', model='scripted:long=1500,pace=500', id='fast', replace=True)",
        "StreamView(many, newest=20, readers={'late': AnswerView(many)})",
        "many.wait().status",
    )
    notebook = lab.open(browser, lab.notebook(*cells))
    for index in range(3):
        notebook.run(index)
    view = notebook.output(2).locator(".llmstream-stream")
    expect(view.locator(".llmstream-stream-earlier")).to_contain_text("earlier")
    assert boxes(view).count() <= 20
    notebook.run(3)
    expect(view).to_contain_text("1,502 entries")
    expect(boxes(view).last).to_contain_text("end")
    expect(boxes(view)).to_have_count(20)
    expect(view.locator(".llmstream-box-id").first).to_have_text("1-1482")
    notebook.page.wait_for_function(CALM)
    stands(notebook, view, "late", 20)
    sight = view.locator(".llmstream-stream-sight")
    assert sight.evaluate(AT_END)
    notebook.page.context.close()


def test_a_view_stays_at_its_end_until_its_reader_scrolls_away(browser, lab) -> None:
    """Also while entries move in, and where it is shown a second time."""
    cells = (
        IMPORTS,
        "words = ask('count', source='scripted', model='scripted:long=60,pace=25', id='slow', replace=True)",
        "view = StreamView(words); view",
        "words.wait().status",
        "view",
        "for number in range(5): redis.xadd(view.key, {'kind': 'note', 'text': ''}, id=f'9-{number}')",
    )
    notebook = lab.open(browser, lab.notebook(*cells))
    for index in range(5):
        notebook.run(index)
    views = [notebook.output(index).locator(".llmstream-stream") for index in (2, 4)]
    for view in views:
        expect(boxes(view).last).to_contain_text("end")
    notebook.page.wait_for_function(CALM)
    first, again = (view.locator(".llmstream-stream-sight") for view in views)
    assert first.evaluate(AT_END) and again.evaluate(AT_END)
    first.evaluate("(node) => new Promise((done) => { node.onscroll = done; node.scrollLeft = 50; })")
    notebook.run(5)
    for view in views:
        expect(boxes(view).last).to_contain_text("note")
    notebook.page.wait_for_function(CALM)
    assert first.evaluate("(node) => node.scrollLeft") == 50
    assert again.evaluate(AT_END)
    notebook.page.context.close()
