"""AnswerView and AskPanel in a real JupyterLab: what people see, press and reload."""

from __future__ import annotations

import ast
import re

import pytest

from tests.test_widgets import INJECTIONS

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

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
    expect(label(notebook, cell)).to_have_text(state)
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
        re.compile(r"^\d+ chunks · first token \d+\.\d\d s · total \d+\.\d s$")
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
  ...[...document.querySelectorAll(".llmstream-answer, .widget-html")].flatMap((root) => [
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
