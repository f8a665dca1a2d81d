"""The widgets without a browser: what they send, and that a page which receives it holds the exact text."""

from __future__ import annotations

import gc
import json
import logging
import re
import threading
import time
import weakref
from html.parser import HTMLParser
from typing import Any

import comm
import ipywidgets
import pytest
from comm.base_comm import BaseComm

from llmstream_nb import AnswerView, AskPanel, Monitor, StreamView
from llmstream_nb.answers import connection
from llmstream_nb.answers.ask import ask, stop_answer
from llmstream_nb.answers.connection import names_of
from llmstream_nb.faults import servers
from llmstream_nb.llm.endpoint import ModelError
from llmstream_nb.protocol.follow import Follower
from llmstream_nb.protocol.parts import Reasoning, Refusal, ToolCall, ToolResult
from llmstream_nb.protocol.round import LOOK
from llmstream_nb.protocol.wire import BadAnswerId, Joiner
from llmstream_nb.viewing import broken
from llmstream_nb.viewing.markdown import LONGEST, to_html
from llmstream_nb.widgets.ask_panel import AskForm
from llmstream_nb.widgets.bundle import FOLDERS, bundle
from llmstream_nb.widgets.live import hub

from .conftest import FAST
from .model import Model, start, wait_for

INJECTIONS = [
    "<script>alert(1)</script>",
    "<ScRiPt src=//evil.example/x.js></sCrIpT>",
    "<img src=x onerror=alert(1)>",
    "<img src='https://evil.example/p.png'>",
    "![pixel](https://evil.example/p.png)",
    "![x](javascript:alert(1))",
    '![x" onerror="alert(1)](https://evil.example/p.png "t\\" onload=alert(1)")',
    "[click](javascript:alert(1))",
    "[click](JaVaScRiPt:alert(1))",
    "[click](java\tscript:alert(1))",
    "[click](&#106;avascript:alert(1))",
    "[click](vbscript:msgbox(1))",
    "[click](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "[click](file:///etc/passwd)",
    "[click](/api/kernels) [click](//evil.example) [click](../../lab)",
    '[click](https://a.example/"onmouseover="alert(1))',
    "[click](https://a.example 'x\" onmouseover=\"alert(1)')",
    "<javascript:alert(1)>",
    "<https://a.example/'onclick='alert(1)>",
    "[ref]\n\n[ref]: javascript:alert(1)",
    "<svg onload=alert(1)><animate onbegin=alert(1) attributeName=x dur=1s>",
    "<svg><style><img src=x onerror=alert(1)></style></svg>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=alert(1)&gt;'>",
    "<iframe src='javascript:alert(1)'></iframe><iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<object data='data:text/html,<script>alert(1)</script>'></object><embed src=//evil.example>",
    "<link rel=stylesheet href=//evil.example/x.css><style>@import '//evil.example/x.css'</style>",
    "<meta http-equiv=refresh content='0;url=javascript:alert(1)'><base href=//evil.example/>",
    "<form action=javascript:alert(1)><input type=submit autofocus onfocus=alert(1)></form>",
    "<a href=javascript:alert(1)>x</a><details open ontoggle=alert(1)><video src=x onerror=alert(1)>",
    "&lt;script&gt;alert(1)&lt;/script&gt; &#60;img src=x onerror=alert(1)&#62;",
    "```html\n<script>alert(1)</script>\n```",
    '```"><script>alert(1)</script>\nx\n```',
    "`<script>alert(1)</script>`",
    "</div></pre></textarea></title></script><script>alert(1)</script>",
    "<!--><script>alert(1)</script>-->",
    "| a | b |\n|---|---|\n| <script>alert(1)</script> | ![](//evil.example) |",
    "<div style='background:url(//evil.example/x)'>x</div>",
    "{{constructor.constructor('alert(1)')()}} ${alert(1)} <%= alert(1) %>",
    "\0<scr\0ipt>alert(1)</scr\0ipt>",
]


# ------------------------------------------------------------------------------------------ a stand-in page


class RecordingComm(BaseComm):
    """Keeps what a kernel would send to the page."""

    def publish_msg(self, msg_type: str, data: Any = None, **_: Any) -> None:
        LOG.append((time.monotonic(), self.comm_id, json.loads(json.dumps(data or {}))))


LOG: list[tuple[float, str, dict]] = []


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    """Record all comm messages of a test; afterwards close its widgets, and no thread of the hub may remain."""
    ipywidgets.Widget.close_all()  # those of another file: a view of a Redis that is gone keeps the hub's thread
    wait_for(lambda: "llmstream views" not in threads())
    LOG.clear()
    broken._note.cache_clear()
    monkeypatch.setattr(comm, "create_comm", RecordingComm)
    yield LOG
    ipywidgets.Widget.close_all()
    wait_for(lambda: "llmstream views" not in threads())


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


class Page:
    """A page that holds one view's model, as answer_view.js does: offsets count UTF-16 units."""

    def __init__(self, view: AnswerView, since: int = 0) -> None:
        self.state: dict[str, Any] = {}
        self.deltas = self.wholes = self.missed = 0
        for _, comm_id, data in LOG[since:]:
            if comm_id != view.model_id:
                continue
            if "state" in data:
                self.state |= data["state"]
                self.wholes += "text" in data["state"]
            elif data.get("method") == "custom":
                self._apply(**data["content"])

    def _apply(
        self, version: int, offset: int, added: str, kept: int = 0, skip: int = 0, blocks: Any = (), **figures: Any
    ) -> None:
        old = self.state["blocks"]
        if version != self.state["version"] or 2 * offset > len(units(self.state["text"])) or kept > len(old):
            self.missed += 1
            return
        self.deltas += 1
        self.state |= figures | {"text": joined(self.state["text"], offset, added)}
        if blocks:
            new = [[at, dict(block)] for at, block in blocks]
            if skip:
                new[0][1]["text"] = joined(old[kept][1]["text"], skip, new[0][1]["text"])
            self.state["blocks"] = old[:kept] + new


def units(text: str) -> bytes:
    return text.encode("utf-16-le", "surrogatepass")


def joined(before: str, offset: int, added: str) -> str:
    assert 2 * offset <= len(units(before))
    return (units(before)[: 2 * offset] + units(added)).decode("utf-16-le", "surrogatepass")


def settled(*views: Any) -> None:
    wait_for(lambda: not [view for view in views if view in hub._views])


def add(client, entry_id: str, kind: str, text: str = "", answer_id: str = "a") -> None:
    client.xadd(names_of(client).answer(answer_id).chunks, {"kind": kind, "text": text, "ms": "7"}, id=entry_id)


def lease(client, seconds: float = 60, attempt: int = 1, answer_id: str = "a") -> None:
    client.set(names_of(client).answer(answer_id).lease(attempt), "x", px=int(seconds * 1000))


# --------------------------------------------------------------------------------------------- the scripts


@pytest.mark.parametrize(
    "files",
    [
        ("elements.js", "blocks.js", "paper.js", "kernel.js", "sight.js", "answer_view.js"),
        ("elements.js", "kernel.js", "sight.js", "ask_form.js"),
        ("elements.js", "kernel.js", "sight.js", "monitor.js"),
        ("elements.js", "kernel.js", "sight.js", "stream_view.js"),
    ],
)
def test_a_widgets_script_is_one_module_with_all_that_its_parts_import(files) -> None:
    wanted, script = set(), bundle(*files)
    for file in files:
        source = next(folder / file for folder in FOLDERS if (folder / file).exists()).read_text("utf-8")
        for names, place in re.findall(r'^import \{ (.*) \} from ".*/(.*)";$', source, re.MULTILINE):
            assert place in files[: files.index(file)]
            wanted |= set(names.split(", "))
    defined = re.findall(r"^(?:const|let|function|class) (\w+)", script, re.MULTILINE)
    assert wanted and wanted <= set(defined) and len(defined) == len(set(defined))
    assert re.findall(r"^(?:import|export) .*", script, re.MULTILINE)[0].startswith("export default")
    assert any(widget._esm == script for widget in (AnswerView, AskForm, Monitor, StreamView))


# ------------------------------------------------------------------------------------------ the exact text


@pytest.mark.slow
def test_a_page_holds_every_character_also_when_emoji_are_split_over_chunks(client) -> None:
    texts = ["grin \ud83d", "\ude00 ", "👩‍👩", "‍👧", "\ud800", "e\u0301", "日本", "\0", "\r\n", " 🎉" * 40, "end"]
    model = Model()
    producer = start(client, model, FAST)
    view = AnswerView("a")
    joiner, wanted = Joiner(), ""
    for text in texts:
        model.say(text)
        wanted += joiner.push(text)
        wait_for(lambda wanted=wanted: view.text == wanted)
    model.end()
    settled(view)
    assert wanted == "".join(texts).replace("\ud83d\ude00", "😀").replace("\ud800", "\ufffd")
    page = Page(view)
    assert view.text == wanted == page.state["text"]
    assert page.deltas > 3 and page.missed == 0
    assert (view.state, view.label, view.chunks) == ("ended", "Complete", producer.attempt.sent - 2)
    assert page.state["html"] == view.html != ""


@pytest.mark.slow
def test_a_megabyte_in_one_chunk_and_twenty_thousand_chunks(client) -> None:
    whole = ask("big", source=lambda *_: ["x😀" * 500_000], client=client)
    many = ask("many", source=lambda *_: (f"{n:05d}…\n" * 3 for n in range(20_000)), client=client)
    views = AnswerView(whole), AnswerView(many)
    settled(*views)
    assert views[0].text == "x😀" * 500_000
    assert views[1].text == "".join(f"{n:05d}…\n" * 3 for n in range(20_000))
    assert (views[0].chunks, views[1].chunks) == (1, 20_000)
    for view in views:
        page = Page(view)
        assert page.state["text"] == view.text and page.missed == 0
        assert view.html == ""  # too long for Markdown: it stays text


def test_a_page_that_lost_messages_is_whole_again_once_it_asks(client) -> None:
    model = Model("one ")
    start(client, model, FAST)
    view = AnswerView("a")
    wait_for(lambda: view.text == "one ")
    model.say("two ")
    wait_for(lambda: view.text == "one two ")
    begun = len(LOG)  # a page that is loaded now has missed all of this
    view._handle_msg({"content": {"data": {"method": "custom", "content": {"want": "all"}}}, "buffers": []})
    wait_for(lambda: Page(view, begun).wholes)
    model.say("three")
    model.end()
    settled(view)
    assert Page(view, begun).state["text"] == "one two three"
    assert view.get_state("text") == {"text": "one two three"}  # what a reload or a second page is given
    begun = len(LOG)
    view._asked_for_all()  # also long after the end
    wait_for(lambda: Page(view, begun).wholes)
    assert Page(view, begun).state["state"] == "ended"


@pytest.mark.slow
def test_lost_deltas_are_healed_by_a_keyframe(client, monkeypatch) -> None:
    monkeypatch.setattr("llmstream_nb.widgets.answer_view.KEYFRAME", 0.2)
    model = Model("a")
    start(client, model, FAST)
    view = AnswerView("a")
    wait_for(lambda: view.text == "a")
    wholes = Page(view).wholes
    text = "a"
    for _ in range(30):  # nothing but text comes, and still the whole state is sent now and then
        model.say("b")
        text += "b"
        wait_for(lambda text=text: view.text == text)
    assert Page(view).wholes > wholes
    model.end()
    settled(view)


# ------------------------------------------------------------------------------------------ parts beside the text


def test_a_page_holds_all_parts_in_their_places_and_is_sent_only_what_is_new(client) -> None:
    thoughts = [f"{n}: 😀 thinking \ud83d" if n % 2 else f"\ude00 on {n}. " for n in range(1, 301)]
    model = Model()
    start(client, model, FAST)
    view = AnswerView("a")
    wait_for(lambda: view.state == "waiting" and not view.unseen)
    LOG.clear()
    for n, thought in enumerate(thoughts):
        model.say(Reasoning(thought))
        if n % 10 == 0:
            time.sleep(0.02)
    model.say("Let me **see**.", ToolCall("c", "look", '{"at": "<b>"}'))
    wait_for(lambda: len(view.blocks) == 2)
    begun = [data for *_, data in LOG]
    model.say(ToolResult("c", "x" * 30_000), Reasoning("So. "), Reasoning("Yes."), "It is ", "so.", Refusal("No."))
    model.end("refusal")
    settled(view)
    wanted = "".join(thoughts).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    kinds = [(at, block["kind"]) for at, block in view.blocks]
    assert kinds == [(0, "reasoning"), (15, "call"), (15, "result"), (15, "reasoning"), (24, "refusal")]
    assert view.blocks[0][1]["text"] == wanted and view.note == "The model refused."
    assert (view.blocks[2][1]["more"], view.html.count("<!-- -->")) == (10_000, 1)
    page = Page(view)
    assert page.missed == 0 and page.deltas > 3
    assert (page.state["blocks"], page.state["text"]) == (view.blocks, view.text)
    assert len(json.dumps(begun, ensure_ascii=False)) < 3 * len(wanted) + 20_000
    late = AnswerView("a")  # from its record
    settled(late)
    assert (late.blocks, late.html, late.text) == (view.blocks, view.html, view.text)
    assert (late.first_part_ms, late.first_ms, late.chunks) == (view.first_part_ms, view.first_ms, view.chunks)


@pytest.mark.parametrize("backend", ["fake"], indirect=True)
def test_a_thousand_calls_and_a_megabyte_of_arguments_stay_within_bounds(client) -> None:
    huge = json.dumps({"words": "x" * 900_000})

    def agent(*_: Any):
        for n in range(1_000):
            yield ToolCall(str(n), "look", huge if n in (500, 999) else f'{{"n": {n}}}')
            yield ToolResult(str(n), "found " * (10_000 if n == 700 else 1))
        yield "done"

    answer = ask("?", source=agent, id="a", client=client)
    view, plain = AnswerView(answer), AnswerView(answer, plain=True)
    answer.wait(60)
    settled(view, plain)
    page = Page(view)
    assert page.missed == 0 and len(page.state["blocks"]) == 2_000 and page.state["text"] == "done"
    assert page.state["blocks"][0][1] == {} and page.state["blocks"][-1][1]["id"] == "999"
    assert max(len(json.dumps(data)) for *_, data in LOG) < 1_000_000
    assert "1,700 earlier parts are not shown" in plain.value and "look(n=998)" in plain.value


def test_what_goes_on_stays_and_is_not_sent_again(client) -> None:
    for attempt in (1, 2):
        lease(client, attempt=attempt)
    add(client, "1-0", "start", '{"worker": "w1", "job": "5-0"}')
    add(client, "1-1", "text", "so ")
    view, plain = AnswerView("a"), AnswerView("a", plain=True)
    wait_for(lambda: view.text == "so ")
    add(client, "2-0", "start", '{"worker": "w3", "job": "5-0", "continues": "1-1"}')
    add(client, "2-1", "text", "so ")
    wait_for(lambda: view.note == "Attempt 2, by w3, goes on." and view.note in plain.value)
    assert (view.text, view.version, view.attempts, view.worker, view.state) == ("so ", 0, 2, "w3", "streaming")
    add(client, "2-2", "text", "it goes")
    add(client, "2-3", "end", '{"reason": "stop"}')
    settled(view, plain)
    assert view.text == Page(view).state["text"] == "so it goes" and not view.version


# ------------------------------------------------------------------------------------------ states in words


def test_waiting_then_streaming_then_complete(client) -> None:
    model = Model()
    answer = ask("why?", source=lambda *_: model, id="a", client=client, timing=FAST)
    view, plain = AnswerView(answer), AnswerView("a", plain=True)
    wait_for(lambda: "Waiting" in plain.value)
    assert (view.state, view.first_ms, view.live) == ("waiting", None, True)
    model.say("Hello ", "world")
    wait_for(lambda: view.text == "Hello world" and "Hello world</" in plain.value.replace("<mark>", "</"))
    assert view.state == "streaming" and view.first_ms is not None
    model.end()
    settled(view, plain)
    record = answer.wait(60).record
    assert (view.state, view.note, view.live) == ("ended", "", False)
    assert (view.chunks, view.first_ms, view.ms) == (2, record["first_token_ms"], record["total_ms"])
    assert "Complete" in plain.value and f"2 chunks · first token {view.first_ms / 1000:.2f} s" in plain.value


@pytest.mark.parametrize(("reason", "note"), [("length", "limit on length"), ("content_filter", "content_filter")])
def test_an_end_that_is_not_the_models_own_is_explained(client, reason: str, note: str) -> None:
    model = Model("cut")
    start(client, model, FAST)
    model.end(reason)
    view = AnswerView("a")
    settled(view)
    assert view.state == "ended" and note in view.note


def test_stopped_from_another_process(client) -> None:
    start(client, Model("so far"), FAST)
    view = AnswerView("a")
    wait_for(lambda: view.text == "so far")
    stop_answer("a", client=client, timing=FAST)
    settled(view)
    assert (view.state, view.label, view.text) == ("stopped", "Stopped", "so far")


def test_failed_keeps_the_text_and_says_why(client) -> None:
    model = Model("half a sen")
    start(client, model, FAST)
    model.break_off(ModelError("Burnt", "the <b>model</b> caught fire"))
    view, plain = AnswerView("a"), AnswerView("a", plain=True)
    settled(view, plain)
    assert (view.state, view.note) == ("failed", "the <b>model</b> caught fire")
    assert view.text == "half a sen"
    assert "half a sen" in plain.value and "the &lt;b&gt;model&lt;/b&gt; caught fire" in plain.value


@pytest.mark.slow
def test_a_dead_producer_shows_as_interrupted_and_the_answer_may_still_go_on(client) -> None:
    add(client, "1-0", "start", "{}")
    add(client, "1-1", "text", "so ")
    view, plain = AnswerView("a"), AnswerView("a", plain=True)
    wait_for(lambda: view.state == "interrupted" and "Interrupted" in plain.value)
    assert "producer died" in view.note and view.text == "so " and not view.live
    lease(client, attempt=2)
    add(client, "2-0", "start", "{}")
    add(client, "2-1", "text", "so it goes")
    wait_for(lambda: view.state == "streaming")
    assert view.live and view.text == "so it goes"
    add(client, "2-2", "end", '{"reason": "stop"}')
    settled(view, plain)
    page = Page(view)
    assert view.text == page.state["text"] == "so it goes" and page.state["version"] == 1
    assert "so it goes" in plain.value and "so so" not in plain.value


def test_deltas_of_an_attempt_that_was_replaced_are_not_mixed_in(client) -> None:
    lease(client)
    add(client, "1-0", "start", "{}")
    add(client, "1-1", "text", "the first try ")
    view = AnswerView("a")
    wait_for(lambda: view.text == "the first try ")
    lease(client, attempt=2)
    add(client, "2-0", "start", "{}")
    for n, word in enumerate(("the ", "second ", "try"), 1):
        add(client, f"2-{n}", "text", word)
        wait_for(lambda word=word: view.text.endswith(word))
    add(client, "2-4", "end", '{"reason": "stop"}')
    settled(view)
    assert Page(view).state["text"] == view.text == "the second try"
    assert view.chunks == 3


def test_what_is_missing_is_said_where_it_is_missing(client) -> None:
    lease(client)
    for entry_id, text in (("1-1", "😀 one "), ("1-5", "five "), ("1-7", "seven")):
        add(client, entry_id, "text", text)
    view, plain = AnswerView("a"), AnswerView("a", plain=True)
    wait_for(lambda: view.text and plain.value.count("missing"))
    assert view.text == "😀 one five seven"
    said = ["[1 entry is missing here]", "[3 entries are missing here]", "[1 entry is missing here]"]
    gaps = [[at, block["gap"]] for at, block in view.blocks]
    assert gaps == [[0, said[0]], [7, said[1]], [12, said[2]]]  # the emoji counts as two
    assert f"one <mark>{said[1]}</mark>five <mark>{said[2]}</mark>seven" in plain.value
    add(client, "1-8", "end", '{"reason": "stop"}')
    client.delete(names_of(client).answer("a").lease(1))
    settled(view, plain)
    assert (view.state, view.html) == ("ended", "") and len(view.blocks) == 3  # no Markdown with holes in it


def test_gaps_are_filled_from_the_record_once_the_producer_has_written_it(client) -> None:
    model = Model("one ", "two ", "three")
    producer = start(client, model, FAST)
    wait_for(lambda: client.xlen(names_of(client).answer("a").chunks) == 4)
    client.xdel(names_of(client).answer("a").chunks, "1-2")
    view = AnswerView("a")
    wait_for(lambda: view.text == "one three")
    assert view.blocks
    model.end()
    producer.done.wait(60)
    settled(view)
    assert (view.text, view.blocks, view.state) == ("one two three", [], "ended")
    assert Page(view).state["text"] == "one two three" and view.html


def test_a_record_that_lacks_the_same_entries_does_not_hide_the_gap(client) -> None:
    add(client, "1-0", "start", "{}")
    add(client, "1-3", "text", "three")
    stop_answer("a", client=client, timing=FAST)  # closes it from outside, with what is there
    view = AnswerView("a")
    settled(view)
    assert (view.state, view.text, len(view.blocks)) == ("stopped", "three", 1)


def test_missing_wrong_type_and_foreign_entries_fail_alone(client, backend) -> None:
    model = Model("well ")
    start(client, model, FAST, "good")
    client.xadd(names_of(client).answer("foreign").chunks, {"chunkOutput": "Once"})
    good, missing, foreign = (AnswerView(name) for name in ("good", "nothing", "foreign"))
    settled(missing, foreign)
    assert (missing.state, missing.label) == ("missing", "Not found")
    assert "'nothing'" in missing.note
    assert foreign.state == "failed"
    assert "kit's: it needs the fields" in foreign.note
    if backend != "fake-tcp":  # which hangs up instead of naming a wrong type: that looks like a lost Redis
        client.set(names_of(client).answer("string").chunks, "not a stream")
        string, plain = AnswerView("string"), AnswerView("string", plain=True)
        settled(string, plain)
        assert string.state == "failed"
        assert "holds another type" in string.note
        assert "holds another type" in plain.value
    model.say("and good")
    model.end()
    settled(good)
    assert (good.state, good.text) == ("ended", "well and good")


def test_an_odd_id_is_refused_at_once(client) -> None:
    for odd in ("", "a b", "a{b}", "../x", "<script>"):
        with pytest.raises(BadAnswerId):
            AnswerView(odd)


def test_the_repr_is_the_same_at_every_run(client) -> None:
    view, plain, panel = AnswerView("tides"), AnswerView("tides", plain=True), AskPanel()
    settled(view, plain)
    assert (
        repr(view)
        == repr(plain)
        == "<AnswerView tides: run the cell to see it live; if it stays blank, try plain=True>"
    )
    assert view._repr_mimebundle_()[0]["text/plain"] == plain._repr_mimebundle_()["text/plain"] == repr(view)
    assert panel._repr_mimebundle_()["text/plain"] == "<AskPanel: run the cell to use it>"


# ------------------------------------------------------------------------------------------ nothing runs


class Tags(HTMLParser):
    """The elements and attributes in a piece of HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("text", INJECTIONS)
def test_no_markdown_becomes_anything_that_acts_or_loads(text: str) -> None:
    for wrapped in (text, f"> {text}", f"- {text}", f"# {text}", f"**{text}**", f"[{text}](https://a.example)"):
        for tag, attributes in Tags(to_html(wrapped)).found:
            assert tag not in ("script", "img", "svg", "math", "iframe", "style", "object", "embed", "link", "form")
            if tag == "a":
                assert set(attributes) <= {"href", "rel", "target"}
                assert attributes["rel"] == "noopener noreferrer" and attributes["target"] == "_blank"
                assert (attributes.get("href") or "https://").startswith(("http://", "https://", "mailto:"))
            else:
                assert set(attributes) <= {"start"}


def test_markdown_is_rendered() -> None:
    html = to_html(
        "# T\n\n**b** `c<d` ~~s~~ [l](https://a.example/?q=1&r)\n\n| a |\n|---|\n| 1 |\n\n3. x\n\n![alt](http://b)"
    )
    assert "<h1>T</h1>" in html and "<strong>b</strong> <code>c&lt;d</code> <s>s</s>" in html
    assert 'href="https://a.example/?q=1&amp;r"' in html and "<td>1</td>" in html and '<ol start="3">' in html
    assert "[image: alt]" in html and "<img" not in html
    assert to_html("x" * (LONGEST + 1)) == ""


@pytest.mark.parametrize("second_wall", [True, False])
def test_each_of_the_two_walls_holds_alone(monkeypatch, second_wall: bool) -> None:
    from llmstream_nb.viewing import markdown

    if second_wall:
        monkeypatch.setattr(markdown._markdown, "render", lambda text: text)
    else:
        monkeypatch.setattr(markdown.nh3, "clean", lambda html, **_: html)
    for text in INJECTIONS:
        for tag, attributes in Tags(markdown.to_html(text)).found:
            assert tag not in ("script", "img", "svg", "math", "iframe", "style", "object", "embed", "link", "form")
            assert not [name for name in attributes if name.startswith("on") or name == "style"]
            assert not (attributes.get("href") or "").lower().startswith(("javascript:", "vbscript:", "data:", "file:"))


def test_the_plain_view_escapes_everything(client) -> None:
    start(client, Model(*INJECTIONS, end=True), FAST)
    view = AnswerView("a", plain=True)
    settled(view)
    assert [tag for tag, _ in Tags(view.value).found] == ["p", "b", "small", "pre"]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in view.value


@pytest.mark.parametrize("live", [True, False])
def test_the_plain_view_escapes_all_parts(client, live: bool) -> None:
    model = Model()
    for text in INJECTIONS:
        model.say(
            Reasoning(text),
            Refusal(text),
            "\n",
            ToolCall(text, text, text),
            ToolCall("x", "f", json.dumps({text: text})),
        )
        model.say(ToolResult(text, text), ToolResult("x", error=text), ToolResult("nobody's", f"{text}\n" * 9))
    start(client, model, FAST)
    if not live:
        model.end()
    view = AnswerView("a", plain=True)
    if live:
        wait_for(lambda: view.transcript.chunks == 8 * len(INJECTIONS) and "Streaming" in view.value)
        wait_for(lambda: not view.unseen and view.value.count("<b>Failed</b>") == len(INJECTIONS))
    else:
        settled(view)
    known = {*"pbi", "small", "pre", "mark", "details", "summary", "div", "bdi"}
    assert {tag for tag, _ in Tags(view.value).found} <= known
    assert not [attributes for tag, attributes in Tags(view.value).found if attributes and tag != "pre"]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in view.value and "<b>Failed</b>" in view.value
    assert "<i>no result" not in view.value and "Thought for " in view.value
    assert view.value.count("→ <bdi>") == 2 * len(INJECTIONS)  # else "not valid JSON" stands reversed behind a U+202E
    model.end()
    settled(view)


# ------------------------------------------------------------------------------------------ the hub


@pytest.mark.parametrize("backend", ["fake"], indirect=True)
def test_thirty_views_stay_within_the_message_budget(client) -> None:
    names = [f"a{n}" for n in range(10)]
    go = threading.Event()

    def stream(*_: Any):
        go.wait()
        for n in range(150):
            time.sleep(0.01)
            yield f"{n} "

    answers = [ask("go", source=stream, id=name, client=client) for name in names]
    views = [AnswerView(name, plain=plain) for name in names for plain in (False, False, True)]
    LOG.clear()
    go.set()
    settled(*views)
    times = [when for when, *_ in LOG]
    busiest = max(sum(1 for other in times if when <= other < when + 1) for when in times)
    assert 30 <= busiest <= 100, f"{busiest} messages in a second"
    text = "".join(f"{n} " for n in range(150))
    assert all(view.transcript.text == text for view in views)
    assert all(answer.wait(60).status == "ended" for answer in answers)


@pytest.mark.parametrize("backend", ["fake"], indirect=True)
def test_one_view_gets_at_most_twenty_messages_a_second(client, monkeypatch) -> None:
    model = Model()
    start(client, model, FAST)
    view = AnswerView("a")
    wait_for(lambda: view.state == "waiting" and not view.unseen)
    times, show = list[float](), view.show
    # By the hub's clock: a message that the machine holds up is nearer to the next.
    monkeypatch.setattr(view, "show", lambda: (times.append(view.show_at), show()))
    LOG.clear()
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        model.say("word ")
        time.sleep(0.002)
    model.end()
    settled(view)
    assert len(LOG) <= len(times) + 1  # one each, and the one before
    assert max(sum(1 for other in times if when <= other < when + 1) for when in times) <= 21


def test_the_thread_ends_with_the_last_view_and_starts_again(client) -> None:
    for name in ("a", "b"):
        start(client, Model("x", end=True), FAST, name)
        view = AnswerView(name)
        settled(view)
        wait_for(lambda: "llmstream views" not in threads())
        assert view.text == "x"


def test_a_closed_view_is_read_for_no_more(client) -> None:
    start(client, Model("x"), FAST)
    first, second = AnswerView("a"), AnswerView("a")
    wait_for(lambda: first.text == second.text == "x")
    first.close()
    second.close()
    wait_for(lambda: "llmstream views" not in threads())
    stop_answer("a", client=client, timing=FAST)


def test_closing_waits_for_no_lock_as_the_garbage_collector_does_it_at_any_moment(client) -> None:
    view = AnswerView("nothing")
    with hub._lock:
        closing = threading.Thread(target=view.close)
        closing.start()
        closing.join(60)
        assert not closing.is_alive()


@pytest.mark.slow
def test_the_hub_keeps_no_view_alive(client) -> None:
    start(client, Model("x"), FAST)
    view = AnswerView("a")
    gone = weakref.ref(view)
    wait_for(lambda: gone().text == "x")
    ipywidgets.widgets.widget._instances.pop(view.model_id)  # which holds every widget until it is closed
    view.comm.on_msg(None)  # so does its comm
    del view
    wait_for(lambda: gc.collect() >= 0 and gone() is None)
    wait_for(lambda: "llmstream views" not in threads())
    stop_answer("a", client=client, timing=FAST)


def test_a_view_that_cannot_send_does_not_end_the_others(client, monkeypatch) -> None:
    model = Model("x")
    start(client, model, FAST)
    broken, sound = AnswerView("a"), AnswerView("a")
    wait_for(lambda: broken.text == sound.text == "x")
    monkeypatch.setattr(broken, "show", lambda: 1 / 0)
    model.say("y")
    model.end()
    settled(sound)
    assert sound.text == "xy"


@pytest.mark.slow
def test_a_lost_redis_is_said_and_costs_no_character(program, caplog) -> None:
    with servers.RedisServer(program, appendfsync="always") as server, caplog.at_level(logging.WARNING):
        client = connection.connect(server.url, prefix="lost")
        model = Model("before ")
        producer = start(client, model, FAST)
        view, plain = AnswerView("a", client=client), AnswerView("a", plain=True, client=client)
        wait_for(lambda: view.text == "before ")
        server.kill()
        wait_for(lambda: view.note == "Redis is away, trying again." and view.note in plain.value)
        assert view.state == "streaming" and view.text == "before "
        model.say("meanwhile ")
        server.start()
        model.say("after")
        wait_for(lambda: view.text == "before meanwhile after")
        assert view.note == ""
        model.end()
        settled(view, plain)
        assert (view.state, Page(view).state["text"]) == ("ended", "before meanwhile after")
        producer.done.wait(60)
        wait_for(lambda: "llmstream views" not in threads())
        wait_for(lambda: len(client.client_list()) == 1)  # the hub has closed its connections
        client.close()
    assert not caplog.records


@pytest.mark.slow
def test_after_redis_was_away_nobody_is_called_dead_before_they_could_show_a_sign_of_life(program) -> None:
    with servers.RedisServer(program, appendfsync="always") as server:
        client = connection.connect(server.url, prefix="lost")
        add(client, "1-0", "start", "{}")
        add(client, "1-1", "text", "so far")
        lease(client)
        view = AnswerView("a", client=client)
        wait_for(lambda: view.text == "so far")
        client.delete(names_of(client).answer("a").lease(1))
        server.kill()
        wait_for(lambda: view.note == "Redis is away, trying again.")
        server.start()
        wait_for(lambda: view.note == "")
        looked = view.round.look_at
        wait_for(lambda: view.round.look_at > looked + 4 * LOOK)
        assert view.state == "streaming"
        lease(client)
        add(client, "1-2", "end", '{"reason": "stop"}')
        settled(view)
        assert not [data for *_, data in LOG if data.get("state", {}).get("state") == "interrupted"]
        client.close()


# ------------------------------------------------------------------------------------------ the panel


def press(panel: AskPanel, what: str, **form: Any) -> None:
    """A click as the page sends it."""
    names = ("question", "topic", "source", "without_stream")
    values = {name: getattr(panel.form, name) for name in names} | form
    content = {"do": what, "form": values}
    panel.form._handle_msg({"content": {"data": {"method": "custom", "content": content}}, "buffers": []})


def idle(panel: AskPanel) -> None:
    wait_for(
        lambda: not panel.form.busy and not [name for name in threads() if name in ("llmstream ask", "llmstream stop")]
    )


def test_ask_in_the_panel(client) -> None:
    asked: list[tuple[str, str | None]] = []

    def parrot(question: str, topic: str | None):
        asked.append((question, topic))
        yield from question

    panel = AskPanel("Polly?", "birds", source=parrot, timing=FAST)
    assert panel.form.source == "parrot" and panel.answer is None
    press(panel, "ask", question=" Polly! ")
    wait_for(lambda: panel.answer)
    idle(panel)
    assert asked == [("Polly!", "birds")]
    view = panel.children[1]
    settled(view)
    assert (view.text, panel.answer.text, panel.form.message) == ("Polly!", "Polly!", "")
    assert panel.form.question == " Polly! "
    press(panel, "ask", question="Again")
    wait_for(lambda: len(asked) == 2)
    idle(panel)
    assert len(panel.children) == 2 and panel.children[1] is not view and view.comm is None
    assert panel.answer.text == "Again"


def test_ask_and_stop_from_code(client) -> None:
    model = Model("so far")
    panel = AskPanel("why?", source=lambda *_: model, timing=FAST)
    answer = panel.ask()
    assert answer is panel.answer and panel.form.busy
    assert panel.ask() is None and "stop it first" in panel.form.message
    wait_for(lambda: panel.children[1].text == "so far")
    panel.stop()
    idle(panel)
    assert (panel.children[1].state, answer.text, model.closed) == ("stopped", "so far", True)
    assert panel.ask().id != answer.id
    panel.stop()
    idle(panel)


def test_stop_before_the_first_token(client) -> None:
    model = Model()
    panel = AskPanel("why?", source=lambda *_: model, timing=FAST)
    press(panel, "ask")
    wait_for(lambda: panel.form.busy)
    press(panel, "stop")
    idle(panel)
    wait_for(lambda: panel.children[1].state == "stopped")
    assert panel.answer.text == "" and model.closed


def test_a_double_click_asks_once(client) -> None:
    models: list[Model] = []

    def source(*_: Any) -> Model:
        models.append(Model("x"))
        return models[-1]

    panel = AskPanel("why?", source=source, timing=FAST)
    for _ in range(5):
        press(panel, "ask")
    wait_for(lambda: len(panel.children) == 2 and panel.children[1].text == "x")
    wait_for(lambda: "llmstream ask" not in threads())
    assert len(models) == 1
    panel.stop()
    idle(panel)


def test_what_goes_wrong_is_shown_as_text(client, monkeypatch) -> None:
    def explode(question: str, topic: str | None):
        raise ZeroDivisionError("of the <i>learner's</i> own making")

    panel = AskPanel(source="scripted", timing=FAST)
    for form, said in (
        ({"question": "  "}, "the question is empty"),
        ({"question": "x" * 100_000}, "the question has 100,000 characters"),
        ({"question": "why?", "source": "nonsense"}, "There is no source 'nonsense'"),
        ({"question": "why?", "source": "openai"}, "needs a key"),
    ):
        press(panel, "ask", **form)
        wait_for(lambda said=said: said in panel.form.message)
        idle(panel)
        assert panel.answer is None and len(panel.children) == 1
    panel = AskPanel("why?", source=explode, timing=FAST)
    press(panel, "ask")
    wait_for(lambda: panel.form.message == "ZeroDivisionError: of the <i>learner's</i> own making")
    idle(panel)


def test_an_error_that_nobody_expected_ends_that_view_alone(client, monkeypatch, caplog) -> None:
    bad, feed = list[str](), Follower.feed

    def breaking(self, raw):
        if self.answer_id in bad:
            raise RecursionError("the model's words")
        return feed(self, raw)

    monkeypatch.setattr(Follower, "feed", breaking)
    for name in ("a", "b"):
        lease(client, answer_id=name)
        add(client, "1-0", "start", "{}", name)
        add(client, "1-1", "text", "x", name)
    views = [AnswerView("a"), AnswerView("b")]
    wait_for(lambda: all(view.text == "x" for view in views))
    bad.append("a")
    for name in ("a", "b"):
        add(client, "1-2", "text", "y", name)
    add(client, "1-3", "end", '{"reason": "stop"}', "b")
    settled(*views)
    assert (views[0].state, views[0].text) == ("failed", "x") and "RecursionError" in views[0].note
    assert (views[1].state, views[1].text, views[1].note) == ("ended", "xy", "")
    assert "AnswerView a" in caplog.text and "RecursionError" in caplog.text and "words" not in caplog.text


def test_a_hub_that_dies_says_so_and_starts_anew_with_the_next_view(client, monkeypatch, caplog) -> None:
    lease(client)
    add(client, "1-0", "start", "{}")
    add(client, "1-1", "text", "x")
    view = AnswerView("a")
    wait_for(lambda: view.text == "x")
    with monkeypatch.context() as patch:
        patch.setattr(type(hub), "_round", lambda *_: 1 / 0)
        wait_for(lambda: view.state == "failed" and "llmstream views" not in threads())
    assert "ZeroDivisionError" in view.note and "ZeroDivisionError" in caplog.text
    again = AnswerView("a")
    wait_for(lambda: again.text == "x" and again.state == "streaming")


@pytest.mark.parametrize(
    "start", ['{"at": "noon", "model": ["x"]}', '{"at": 1e300}', '{"at": {"a": 1}}', "{" + '"a":{' * 90_000, "[1]"]
)
@pytest.mark.parametrize(
    "end", ['{"reason": ["x"], "first_token_ms": "5", "total_ms": null, "chunks": "many"}', '{"chunks": NaN}', "1"]
)
@pytest.mark.parametrize("backend", ["fake"], indirect=True)
def test_entries_that_hold_anything_harm_no_view_but_their_own(client, start: str, end: str) -> None:
    for name, first, last in (("a", start, end), ("b", "{}", '{"reason": "stop"}')):
        lease(client, answer_id=name)
        add(client, "1-0", "start", first, name)
        client.xadd(names_of(client).answer(name).chunks, {"kind": "text", "text": "x", "ms": "9" * 4_000}, id="1-1")
        add(client, "1-2", "end", last, name)
    views = [AnswerView("a"), AnswerView("a", plain=True), AnswerView("b")]
    settled(*views)
    assert views[0].state in ("ended", "failed") and views[0].label
    assert "Complete" in views[1].value or "Failed" in views[1].value
    assert (views[2].state, views[2].text) == ("ended", "x")
    assert not any(view.closed for view in views)
    for *_, data in LOG:
        json.dumps(data, allow_nan=False)


def test_sources_that_are_not_ready_say_why(client) -> None:
    rows = {name: (label, why) for name, label, why in AskPanel().form.sources}
    assert list(rows) == ["scripted", "local", "openai"]
    assert rows["scripted"][1] == "" and "needs a key" in rows["openai"][1]
    assert AskPanel().form.source == "scripted" and len(AskPanel().form.prepared) >= 1


def test_without_stream_comes_in_one_chunk(client) -> None:
    panel = AskPanel("What is a Redis stream?", source="scripted", model="scripted:pace=0", timing=FAST)
    press(panel, "ask", without_stream=True)
    wait_for(lambda: len(panel.children) == 2)
    settled(panel.children[1])
    assert panel.children[1].chunks == 1
    assert len(panel.answer.text) > 30
    idle(panel)


@pytest.mark.slow
def test_a_panel_on_a_lost_redis_says_so_and_works_again(program, monkeypatch) -> None:
    with servers.RedisServer(program) as server:
        client = connection.connect(server.url, prefix="lost")
        panel = AskPanel("why?", source=lambda *_: ["because"], client=client, timing=FAST)
        server.kill()
        press(panel, "ask")
        wait_for(lambda: "can't be reached" in panel.form.message)
        idle(panel)
        server.start()
        press(panel, "ask")
        wait_for(lambda: len(panel.children) == 2 and panel.children[1].text == "because")
        idle(panel)
        assert panel.form.message == ""
        panel.answer.wait(60)
        wait_for(lambda: "llmstream views" not in threads())
        client.close()
