"""The cases of conformance.json in the page's JavaScript, over event streams that come whole, or break after each event."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import Page

from llmstream_nb.protocol.events import Continued, Ended, Event, Failed, Gap, Restarted, Started
from llmstream_nb.protocol.parts import Part, Reasoning, Refusal, Text, ToolCall, ToolResult, Unknown
from llmstream_nb.protocol.wire import ORIGIN, EntryID
from llmstream_nb.viewing.blocks import drawn
from llmstream_nb.web.sse import Frame, frame, frames
from tests.test_conformance import FOLDER, named
from tests.test_conformance import READING as CASES

SCRIPT = (FOLDER / "web/page/answer.js").read_text("utf-8")
PATIENCE = 15.0  # seconds: a bound, not an expectation
KINDS = {
    each.__name__.lower(): each
    for each in (Started, Restarted, Continued, Gap, Ended, Failed, Text, Reasoning, Refusal, ToolCall, ToolResult)
}
BEGIN = """async (after) => {
  const { Answer } = await import(new URL("answer.js", location.href));
  const { Paper } = await import(new URL("paper.js", location.href));
  window.answer = new Answer("x", new Paper(document.body, (draw) => draw()), () => {});
  if (after) Object.assign(window.answer, { seen: after, anew: after.endsWith("-0") });
  window.answer.watch();
}"""
SHOWN = """() => {
  const { paper, state, seen, message } = window.answer;
  paper.draw();
  return { state, seen, message, text: paper.root.textContent };
}"""
# All parts as a page gets them from the stream; and from a record, where none but the end has an ID of its own.
PARTS = [["reasoning", "a"], ["reasoning", "b"], ["toolcall", "c", "f", "{}"], ["toolresult", "c", "ok"], ["text", "t"]]
PARTS += [
    ["reasoning", "more"],
    ["refusal", "no"],
    ["unknown", "audio"],
    ["unknown", "audio"],
    ["text", "u"],
    ["text", "v"],
]
STREAM = [["started", "1-0"], *([kind, f"1-{n}", *rest] for n, (kind, *rest) in enumerate(PARTS, 1))]
ON = [["continued", "2-1"], ["reasoning", "2-2", "w"], ["text", "2-3", "x"], ["ended", "2-4", "stop"]]
AT_ONCE = [["started", "1-9"], *([kind, "1-9", *rest] for kind, *rest in PARTS), ["ended", "1-9", "stop"]]
READING = [
    *CASES,
    {
        "name": "all parts, and an attempt that goes on",
        "steps": [{"read": [], "events": STREAM + ON, "state": "ended"}],
    },
    *(
        {
            "name": f"an answer's own error that is called {error}",
            "steps": [{"read": [], "events": [["text", "1-1", "so far"], ["failed", "1-2", error, "Its own words."]]}],
        }
        for error in ("Ahead", "Interrupted")
    ),
    {"name": "all parts of a record", "steps": [{"read": [], "events": AT_ONCE, "state": "ended"}]},
]
READ_ONLY = [case for case in READING if all("events" in step and "read" in step for step in case["steps"])]


def events_of(step: dict[str, Any]) -> list[Event]:
    """The events of a step that go to a browser."""
    told = [event for event in step.get("events", []) if event[0] != "interrupted"]
    return [event_of(kind, EntryID.parse(entry), *values) for kind, entry, *values in told]


def event_of(kind: str, entry_id: EntryID, *values: Any) -> Event:
    """An event of a case."""
    if kind == "unknown":
        return Unknown(values[0], "", entry_id)
    if issubclass(KINDS[kind], Part):
        return KINDS[kind](*values, id=entry_id)
    return KINDS[kind](entry_id, *values)


def frames_of(case: dict[str, Any]) -> Iterator[Frame]:
    """What the server sends of a case."""
    for step in case["steps"]:
        if "error" in step:
            yield Frame(
                ORIGIN, frame("failed", {"error": step["error"], "message": "Told.", "server": True}), final=True
            )
        yield from frames(events_of(step))
        if "look" in step and step.get("state") in ("queued", "streaming", "interrupted"):
            yield Frame(ORIGIN, frame("state", {"state": step["state"]}))


def expected(case: dict[str, Any]) -> dict[str, str]:
    """What the page must show in the end."""
    text, seen, message, before = "", EntryID.parse(case.get("after", "0-0")), "", None
    state = {"queued": "waiting"}.get(last := case["steps"][-1].get("state", "failed"), last)
    for event in [event for step in case["steps"] for event in events_of(step)]:
        seen = max(seen, event.id)
        match event:
            case Started() | Restarted():
                text = ""
            case Text(text=more):
                text += more
            case Reasoning(text=more) | Refusal(text=more):
                heading = "Thought for 0.0 s" if isinstance(event, Reasoning) else "Refused"
                text += more if type(before) is type(event) else heading + more
            case ToolCall() | ToolResult():
                block = drawn(event)
                said = "Failed" * ("error" in block) + block.get("error", block.get("content", ""))
                broken = "not valid JSON" * ("broken" in block)
                text += f"{block['line']}{broken}no result yet" if "line" in block else said
            case Unknown(kind=kind) if not isinstance(before, Unknown):
                text += f"[a part of kind {kind}, which this page doesn't know]"
            case Gap(missing=missing):
                text += f"[… {missing} {'entry is' if missing == 1 else 'entries are'} missing here]"
            case Ended(reason="cancelled"):
                state = "stopped"
            case Failed(message=said):
                message = said
        before = event
    if state == "streaming" and not text:
        state = "waiting"
    message = "Told." if "error" in case["steps"][-1] else message
    return {"state": state, "seen": str(seen) if seen > ORIGIN else "", "message": message, "text": text}


class Site:
    """Serves one case: all that follows the page's place, or one event of it and a broken connection."""

    def __init__(self, case: dict[str, Any], breaks: bool, script: str = SCRIPT) -> None:
        self.frames, self.breaks, self.script = list(frames_of(case)), breaks, script
        self.missing = sum(e.missing for step in case["steps"] for e in events_of(step) if isinstance(e, Gap))
        self.drained, self.over = threading.Event(), threading.Event()  # the page has asked for more than there is
        self._asked: dict[EntryID, int] = {}  # how often for what follows this place

    def reply(self, path: str, last_id: str | None) -> tuple[str, str]:
        """Type and body for a request."""
        path, _, query = path.partition("?")
        if path == "/answer.js":
            return "text/javascript", self.script
        if path in ("/paper.js", "/blocks.js", "/elements.js"):
            return "text/javascript", (FOLDER / f"viewing/browser{path}").read_text("utf-8")
        if path == "/answers/x":
            shown = {"status": "ended", "text": "", "html": "", "blocks": [], "missing": self.missing, "record": {}}
            return "application/json", json.dumps(shown)
        if path == "/answers/x/events":
            seen = EntryID.parse(last_id or query.removeprefix("after=") or str(ORIGIN))
            return "text/event-stream", "retry: 1\n\n" + "".join(one.data.decode() for one in self._next(seen))
        return "text/html", "<!DOCTYPE html>"

    def _next(self, seen: EntryID) -> list[Frame]:
        if not self.breaks:
            rest, self.frames = self.frames, []
        else:
            times = self._asked[seen] = self._asked.get(seen, 0) + 1
            rest = [one for one in self.frames if one.id > seen][:times]
        if not rest:
            self.drained.set()
            self.over.wait(PATIENCE)  # the connection stays, and nothing comes
        return rest


class Handler(BaseHTTPRequestHandler):
    sites: dict[str, Site] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        number, _, path = self.path[1:].partition("/")
        if number not in self.sites:  # the icon
            return self.send_error(404)
        kind, body = self.sites[number].reply(f"/{path}", self.headers["Last-Event-ID"])
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.end_headers()
        with suppress(ConnectionError):  # the page is gone
            self.wfile.write(body.encode())
        return None

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture(scope="module")
def page(browser) -> Iterator[Page]:
    context = browser.new_context()
    yield context.new_page()
    context.close()


@pytest.fixture
def show(page, port) -> Iterator[Any]:
    """What the page shows of a case in the end."""
    sites: list[Site] = []

    def shown(case: dict[str, Any], breaks: bool, script: str = SCRIPT) -> dict[str, str]:
        site = Site(case, breaks, script)
        sites.append(site)
        number = str(len(Handler.sites))
        Handler.sites[number] = site
        page.goto(f"http://127.0.0.1:{port}/{number}/")
        page.evaluate(BEGIN, case.get("after", ""))
        deadline = time.monotonic() + PATIENCE
        while not page.evaluate("!window.answer.live") and not site.drained.wait(0.005):
            assert time.monotonic() < deadline
        return page.evaluate(SHOWN)

    yield shown
    for site in sites:
        site.over.set()


@named(READING)
def test_in_one_connection(show, case) -> None:
    assert show(case, breaks=False) == expected(case)


@named(READ_ONLY)
def test_over_connections_that_break_after_each_event(show, case) -> None:
    assert show(case, breaks=True) == expected(case)


@pytest.mark.parametrize(
    ("code", "broken"),
    [
        pytest.param("a[0] - b[0] || a[1] - b[1]", "(id > (other || '')) - 0.5", id="IDs are compared as text"),
        pytest.param("if (known[kind]) return;", "", id="what comes again counts"),
        pytest.param("gap: this.gapAfter === this.seen", "gap: false", id="gaps that come again count"),
        pytest.param("this.paper.add({ gap:", "void ({ gap:", id="gaps are not shown"),
        pytest.param('else if (kind === "start") this.paper.show([]);', "", id="attempts are one text"),
        pytest.param("      this.end(data);\n", "", id="the end is not the end"),
        pytest.param("this.paper.add(data.text);", "this.paper.add(data.text.trim());", id="the text is touched"),
    ],
)
def test_a_page_without_a_rule_fails_a_case(show, code: str, broken: str) -> None:
    assert SCRIPT.count(code) == 1
    script = SCRIPT.replace(code, broken)
    assert any(show(case, True, script) != expected(case) for case in READ_ONLY)
