"""The web page in Chromium: what people see, press, reload, lose and send to others."""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import Browser, Page, expect

from llmstream_nb import connect
from llmstream_nb.answers.ask import Answer, ask
from llmstream_nb.answers.connection import names_of
from llmstream_nb.faults import servers
from llmstream_nb.web import Limits, WebServer
from tests.conftest import FAST
from tests.model import Model, wait_for
from tests.model import start as produce
from tests.network import Proxy
from tests.test_widgets import INJECTIONS
from tests.web import Writer

PATIENCE = 30_000  # milliseconds: a bound, not an expectation
COUNT = "scripted:pace=40,long=200"  # 200 numbered chunks in five seconds
WHOLE = "".join(f"{n} " for n in range(200))
HOSTILE = [text.replace("alert(1)", "alert(window.__pwned=1)") for text in INJECTIONS]

# What the page itself must not do: break its own policy, or make a text shorter while it grows.
WATCH = """
window.__violations = [];
window.__shrunk = 0;
window.__said = [];
document.addEventListener("securitypolicyviolation", (event) => window.__violations.push(event.violatedDirective));
document.addEventListener("DOMContentLoaded", () => {
  const [text, status] = ["text", "status"].map((id) => document.getElementById(id));
  if (!text) return; // about:blank
  let length = 0;
  new MutationObserver(() => {
    const now = text.textContent.length;
    window.__shrunk += now < length && text.ariaBusy === "true";
    length = now;
  }).observe(text, { childList: true, characterData: true, subtree: true });
  new MutationObserver(() => {
    const now = status.textContent;
    if (now !== window.__said.at(-1)) window.__said.push(now);
  }).observe(status, { childList: true, characterData: true, subtree: true });
});
"""


class Viewer:
    """Somebody with a browser of their own who looks at the page."""

    def __init__(self, browser: Browser, **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}} | context)
        self.context.set_default_timeout(PATIENCE)
        self.context.add_init_script(WATCH)
        self.page: Page = self.context.new_page()
        self.bad: list[str] = []
        self.requests: list[str] = []
        self.page.on("dialog", lambda dialog: (self.bad.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("pageerror", lambda error: self.bad.append(f"error {error}"))
        self.page.on("request", lambda request: self.requests.append(f"{request.method} {request.url}"))

    def open(self, link: str) -> Viewer:
        self.page.goto(link)
        return self

    def __getattr__(self, name: str) -> Any:
        """The element with this id."""
        return self.page.locator(f"#{name}")

    @property
    def shown(self) -> str:
        """The text as it is in the page now."""
        return self.text.text_content()

    def see(self, state: str) -> Viewer:
        """Wait until the page says so."""
        expect(self.state).to_have_text(state, timeout=PATIENCE)
        return self

    def has(self, text: str) -> Viewer:
        """Wait until this is in the text."""
        expect(self.text).to_contain_text(text, timeout=PATIENCE)
        return self

    def ends(self, state: str = "Complete") -> str:
        """Wait for the end; return the text exactly as this page has got it."""
        self.see(state)
        if self.shown:
            self.raw.click()
        return self.shown

    def evaluate(self, code: str) -> Any:
        return self.page.evaluate(code)

    def leave(self) -> None:
        """Close the page. Nothing bad may have happened on it."""
        self.bad += self.evaluate("window.__violations")
        self.bad += [one for one in self.requests if not re.match(r"\w+ (http://127\.0\.0\.1:|data:image/svg)", one)]
        self.context.close()
        assert not self.bad


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    if "redis-server" not in servers.available():
        pytest.skip("redis-server is not on PATH")
    with servers.RedisServer() as redis:
        made = connect(redis.url, prefix=f"t{uuid.uuid4().hex[:10]}")
        yield made
        made.close()


@pytest.fixture(scope="module")
def site(client) -> Iterator[WebServer]:
    with WebServer(client=client, timing=replace(FAST, patience=20.0)) as server:  # an answer in one piece takes long
        yield server


@pytest.fixture
def visit(browser) -> Iterator[Any]:
    """Make viewers, and look after them at the end."""
    viewers: list[Viewer] = []

    def make(link: str, **context: Any) -> Viewer:
        viewers.append(Viewer(browser, **context))
        return viewers[-1].open(link)

    yield make
    for viewer in viewers:
        viewer.leave()


@pytest.fixture
def writer(client) -> Writer:
    """An answer that says what the test tells it to."""
    return Writer(client, uuid.uuid4().hex[:8])


def count(client) -> Answer:
    """An answer that takes some seconds."""
    return ask("count", model=COUNT, client=client, timing=FAST)


# ------------------------------------------------------------------------------------------------- asking


def test_ask_and_watch_it_grow(site, client, visit) -> None:
    viewer = visit(site.link())
    expect(viewer.source.locator("option")).to_have_count(3)
    viewer.prepared.select_option("What is a Redis stream?")
    expect(viewer.question).to_have_value("What is a Redis stream?")
    viewer.ask.dblclick()
    viewer.see("Streaming").has("stream")
    expect(viewer.text).to_have_attribute("aria-busy", "true")
    expect(viewer.ask).to_be_disabled()
    assert viewer.evaluate("history.length") == 2 + 1  # about:blank, the page, one answer
    before = viewer.shown
    expect(viewer.text).not_to_have_text(before)
    assert viewer.shown.startswith(before)
    viewer.see("Complete")
    expect(viewer.text.locator("strong").first).to_be_visible()
    expect(viewer.text).to_have_attribute("aria-busy", "false")
    expect(viewer.figures).to_have_text(re.compile(r"^\d+\schunks · first\stoken\s\d+\.\d\d?\ss · total\s\d+\.\d\ss$"))
    expect(viewer.asked).to_have_text("What is a Redis stream?")
    expect(viewer.stop).to_be_hidden()
    expect(viewer.ask).to_be_enabled()
    said = viewer.evaluate("window.__said")
    assert said[-1].strip() == "Answer: Complete"
    assert len(said) < 10  # a screen reader hears of states, not of tokens
    assert viewer.page.title().startswith("Complete")
    answer_id = re.fullmatch(re.escape(site.link()) + r"&answer=(\w+)", viewer.page.url)[1]
    assert viewer.ends() == Answer(answer_id, client=client).text


def test_without_stream_all_comes_at_once(site, client, visit) -> None:
    viewer = visit(site.link())
    viewer.question.fill("What is time to first token?")
    viewer.whole.check()
    viewer.ask.click()
    viewer.see("Waiting")
    expect(viewer.bar).to_be_visible()
    expect(viewer.text).to_be_hidden()
    viewer.see("Complete")
    expect(viewer.bar).to_be_hidden()
    expect(viewer.figures).to_contain_text(re.compile(r"^1\schunk ·"))
    answer_id = viewer.page.url.partition("answer=")[2]
    assert viewer.ends() == Answer(answer_id, client=client).text != ""
    assert not [one for one in viewer.requests if "/events" in one]


def test_stop_without_stream_stops_the_answer_too(site, client, visit) -> None:
    viewer = visit(site.link())
    viewer.question.fill("What is a Redis stream?")
    viewer.whole.check()
    answers = names_of(client).answers
    before = client.zcard(answers)
    viewer.ask.click()
    viewer.see("Waiting")
    wait_for(lambda: client.zcard(answers) > before)  # the page says so before the server has heard
    newest = client.zrange(answers, -1, -1)[0]
    viewer.stop.click()
    expect(viewer.asked).to_have_text("The answer will stand here")
    expect(viewer.ask).to_be_enabled()
    wait_for(lambda: Answer(newest, client=client).record.get("reason") == "cancelled")


def test_refusals_are_said(client, visit) -> None:
    with WebServer(client=client, timing=FAST, limits=Limits(answers=1)) as small:
        viewer = visit(small.link())
        viewer.question.fill("  ")
        viewer.ask.click()
        expect(viewer.page.get_by_role("alert")).to_have_text("The question is empty: type one.")
        viewer.question.fill("x" * 8_001)
        viewer.ask.click()
        expect(viewer.page.get_by_role("alert")).to_contain_text("8,000 characters")
        other = visit(small.link())
        other.question.fill("What is Redis?")
        other.ask.click()
        other.see("Streaming")
        viewer.question.fill("What is Redis?")
        viewer.ask.click()
        expect(viewer.page.get_by_role("alert")).to_contain_text("too many answers are being written")
        expect(viewer.ask).to_be_disabled()  # as long as Retry-After says
        other.stop.click()
        expect(viewer.ask).to_be_enabled(timeout=PATIENCE)
        viewer.ask.click()
        viewer.see("Streaming")
        expect(viewer.page.get_by_role("alert")).to_be_hidden()


# ------------------------------------------------------------------------- reload, cut, offline, restarts


def test_a_reload_in_mid_answer_goes_on_with_it(site, client, visit) -> None:
    answer = count(client)
    viewer = visit(site.link(answer)).has("0 1 2")
    before = viewer.shown
    viewer.page.reload()
    viewer.has(before).see("Streaming")
    expect(viewer.question).to_have_value("count")
    assert viewer.ends() == WHOLE == answer.text
    viewer.requests.clear()
    viewer.page.reload()
    assert viewer.ends() == WHOLE
    assert not [one for one in viewer.requests if "/events" in one]  # from the record, and not as a film


def test_back_and_forward_go_from_answer_to_answer(site, client, visit) -> None:
    viewer = visit(site.link())
    for question in ("What is Redis?", "What does BLOCK do in XREAD?"):
        viewer.question.fill(question)
        viewer.ask.click()
        expect(viewer.asked).to_have_text(question)
        viewer.see("Streaming")
        viewer.stop.click()
        viewer.see("Stopped")
    viewer.page.go_back()
    expect(viewer.asked).to_have_text("What is Redis?")
    viewer.see("Stopped")
    viewer.page.go_back()
    expect(viewer.asked).to_have_text("The answer will stand here")
    expect(viewer.text).to_be_hidden()
    viewer.page.go_forward()
    expect(viewer.asked).to_have_text("What is Redis?")


@pytest.fixture
def cuttable(site) -> Iterator[tuple[Proxy, Any]]:
    """A proxy in front of the server, and the links through it."""
    with Proxy("127.0.0.1", site.port, redis=False) as proxy:
        yield proxy, lambda answer: site.link(answer).replace(f":{site.port}/", f":{proxy.port}/")


def test_cut_connections_lose_nothing(cuttable, writer, visit) -> None:
    proxy, link = cuttable
    viewer = visit(link(writer.id))
    for n in range(3):
        writer.say(f"{n} before ", "the cut, ")
        viewer.has(f"{n} before the cut").see("Streaming")
        proxy.cut()
        viewer.see("Reconnecting …")
        writer.say(f"{n} after ", "it; ")
    viewer.has("2 after it")
    proxy.cut()
    viewer.see("Reconnecting …")
    writer.say("the end").end()
    assert viewer.ends() == writer.text
    assert viewer.evaluate("window.__shrunk") == 0  # it went on where it was


def test_offline_and_online_again(cuttable, writer, visit) -> None:
    proxy, link = cuttable
    writer.say("one ", "two ")
    viewer = visit(link(writer.id)).has("one two")
    viewer.context.set_offline(True)
    proxy.cut()
    viewer.see("Reconnecting …")
    expect(viewer.note).to_contain_text("offline")
    writer.say("three ", "four ")
    viewer.context.set_offline(False)
    viewer.has("three four").see("Streaming")
    viewer.context.set_offline(True)
    proxy.cut()
    viewer.see("Reconnecting …")
    writer.say("five").end()
    viewer.context.set_offline(False)
    assert viewer.ends() == writer.text
    assert [one for one in viewer.requests if f"after={writer.attempt}-" in one]  # at once, and not from the beginning
    assert viewer.evaluate("window.__shrunk") == 0


class Mute:
    """A connection to a browser that is dead, of which nobody tells it."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock

    def sendall(self, data: bytes) -> None:
        """Lose it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def test_a_connection_that_died_without_a_word_is_noticed(cuttable, writer, visit) -> None:
    proxy, link = cuttable
    writer.say("one ")
    viewer = visit(link(writer.id))
    viewer.page.clock.install()
    viewer.page.reload()
    viewer.has("one").see("Streaming")
    wait_for(lambda: proxy.connections == 1)  # else the browser would come back on another that is dead
    for each in list(proxy._links):
        each.client = Mute(each.client)
    writer.say("two ")
    viewer.page.clock.fast_forward(30_000)
    viewer.see("Streaming")
    assert viewer.shown == "one "
    viewer.page.clock.fast_forward(12_000)
    viewer.has("two").see("Streaming")
    writer.say("three").end()
    assert viewer.ends() == writer.text
    assert viewer.evaluate("window.__shrunk") == 0  # it went on where it was


def test_a_silent_answer_on_a_live_connection_is_left_alone(client, writer, visit) -> None:
    writer.say("one ")
    with WebServer(client=client, timing=FAST, limits=Limits(keep_alive=0.2)) as site:
        viewer = visit(site.link(writer.id))
        viewer.page.clock.install()
        viewer.page.reload()
        viewer.has("one")
        viewer.requests.clear()
        for _ in range(3):
            viewer.page.clock.fast_forward(20_000)
            signs = "let n = 0; s.addEventListener('alive', () => ++n > 2 && (s.close(), done()))"
            address = site.link().replace("?", f"answers/{writer.id}/events?")
            viewer.evaluate(f"new Promise((done) => {{ const s = new EventSource('{address}'); {signs} }})")
        assert len([one for one in viewer.requests if "/events" in one]) == 3  # those of this test
        viewer.see("Streaming")
        viewer.open(site.link())
        writer.end()


@pytest.mark.parametrize("same", [True, False], ids=["same token", "another token"])
def test_the_server_is_started_again(client, writer, visit, same: bool) -> None:
    writer.say("one ", "two ")
    with WebServer(client=client, timing=FAST) as first:
        viewer = visit(first.link(writer.id)).has("one two")
    viewer.see("Reconnecting …")
    writer.say("three ")
    with WebServer(first.port, client=client, timing=FAST, token=first.token if same else None) as second:
        if not same:
            expect(viewer.trouble).to_contain_text("The token in this page's address is missing or wrong")
            viewer.see("No access").has("one two")  # it is not the answer that failed
            viewer.open(second.link(writer.id))
        viewer.has("three").see("Streaming")
        writer.say("four").end()
        assert viewer.ends() == writer.text


def test_a_server_that_has_no_room_is_asked_again(client, writer, visit) -> None:
    writer.say("one ")
    with WebServer(client=client, timing=FAST, limits=Limits(viewers=1)) as small:
        first = visit(small.link(writer.id)).has("one")
        second = visit(small.link(writer.id))
        expect(second.trouble).to_contain_text("too many are watching")
        second.see("Reconnecting …")
        expect(second.again).to_be_visible()
        first.page.goto("about:blank")
        second.again.click()
        second.has("one").see("Streaming")
        expect(second.trouble).to_be_hidden()
        writer.say("two").end()
        assert second.ends() == writer.text
        first.open(small.link())


def test_events_that_come_twice_count_once(site, writer, visit) -> None:
    writer.say(*"abcdefghijkl")
    viewer = visit(site.link())
    ids = ["1-0", "1-1", "1-2", "1-2", "1-1", "1-0", *(f"1-{n}" for n in range(3, 13)), "1-12", "1-9", "1-13"]

    def twice(route) -> None:
        writer.end()
        frames = []
        for one in ids:
            n = int(one[2:])
            name, data = ("text", {"text": "abcdefghijkl"[n - 1], "ms": n}) if 0 < n < 13 else ("start", {"attempt": 1})
            name, data = ("end", {"reason": "stop", "chunks": 12}) if n == 13 else (name, data)
            frames.append(f"id: {one}\nevent: {name}\ndata: {json.dumps(data)}\n\n")
        route.fulfill(content_type="text/event-stream", body="".join(frames))

    viewer.page.route("**/events*", twice)
    viewer.open(site.link(writer.id))
    assert viewer.ends() == writer.text
    expect(viewer.figures).to_contain_text(re.compile(r"^12\schunks"))


def test_an_answer_whose_stream_has_expired_meanwhile(cuttable, client, writer, visit) -> None:
    proxy, link = cuttable
    writer.say("one ", "two ")
    viewer = visit(link(writer.id)).has("one two")
    proxy.refuse()
    proxy.cut()
    viewer.see("Reconnecting …")
    writer.say("three").end()
    client.delete(writer.keys.chunks)
    proxy.heal()
    assert viewer.ends() == writer.text


def test_a_new_attempt_begins_the_text_anew(site, writer, visit) -> None:
    writer.say("old ", "text ")
    viewer = visit(site.link(writer.id)).has("old text")
    writer.begin().say("new ")
    expect(viewer.text).to_have_text("new ")
    writer.say("words").end()
    assert viewer.ends() == "new words"


def test_what_is_missing_is_marked_and_then_healed(site, client, writer, visit) -> None:
    writer.say(*"abcdefg")
    client.xdel(writer.keys.chunks, "1-3", "1-4")
    viewer = visit(site.link(writer.id))
    expect(viewer.text).to_have_text("ab[… 2 entries are missing here]efg")
    expect(viewer.text.locator("mark")).to_have_count(1)
    writer.say("h").end()
    assert viewer.ends() == "abcdefgh"


def test_interrupted_try_again_and_stop(client, writer, visit) -> None:
    writer.say("so far, ", "so **good**")
    with WebServer(client=client, timing=replace(FAST, patience=2.0)) as impatient:
        viewer = visit(impatient.link(writer.id)).has("so far")
        client.delete(writer.keys.lease(1))
        viewer.see("Interrupted")
        expect(viewer.trouble).to_contain_text("nobody took over", timeout=PATIENCE)
        viewer.again.click()
        expect(viewer.trouble).to_be_hidden()
        viewer.see("Interrupted")
        viewer.stop.click()
        assert viewer.ends("Stopped") == writer.text
    assert Answer(writer.id, client=client).record["reason"] == "cancelled"


def test_failed_and_missing_answers_say_why(site, writer, visit) -> None:
    writer.say("so far").end(error="Overloaded", message="the model has no time")
    viewer = visit(site.link(writer.id)).see("Failed")
    expect(viewer.trouble).to_have_text("the model has no time")
    assert viewer.ends("Failed") == "so far"
    viewer.open(site.link("never-asked")).see("Not found")
    expect(viewer.trouble).to_contain_text("there is no answer 'never-asked'")


@pytest.mark.parametrize("error", ["Ahead", "Interrupted"])
def test_an_answers_own_error_may_be_called_like_the_servers(site, writer, visit, error) -> None:
    writer.say("so far")
    viewer = visit(site.link(writer.id)).has("so far")
    writer.end(error=error, message="told")
    assert viewer.ends("Failed") == "so far"
    expect(viewer.trouble).to_have_text("told")
    assert len([one for one in viewer.requests if "/events" in one]) == 1


def test_twenty_thousand_chunks_at_full_speed(site, client, visit) -> None:
    answer = ask("count", model="scripted:pace=0,long=20000", client=client, timing=FAST)
    viewer = visit(site.link(answer)).see("Complete")
    assert viewer.shown == "".join(f"{n} " for n in range(20_000))  # too long to be parsed as Markdown
    expect(viewer.raw).to_be_hidden()


# --------------------------------------------------------------------------------------- several viewers


def test_an_answer_that_one_leaves_while_it_runs_stays_in_reach(site, client, visit) -> None:
    answer, short = count(client), Writer(client, uuid.uuid4().hex[:8]).say("x")
    viewer = visit(site.link(short.id)).see("Streaming")
    viewer.evaluate(f"history.pushState(null, '', location.href.replace('{short.id}', '{answer.id}'))")
    viewer.evaluate("dispatchEvent(new PopStateEvent('popstate'))")
    viewer.has("0 1 2").anew.click()
    expect(viewer.asked).to_have_text("The answer will stand here")
    assert viewer.evaluate("document.activeElement.id") == "question" and viewer.question.input_value() == ""
    expect(viewer.others.locator("p")).to_have_text(["Still running: why?", "Still running: count"])
    short.end()
    expect(viewer.others.locator("p").first).to_have_text("Complete: why?", timeout=PATIENCE)
    viewer.page.get_by_role("link", name="count").click()
    assert viewer.ends() == WHOLE
    expect(viewer.others.locator("p")).to_have_text(["Complete: why?"])


def test_a_link_for_reading_alone(site, writer, visit) -> None:
    writer.say("so far ")
    viewer = visit(site.link(writer.id, read_only=True)).has("so far").see("Streaming")
    for control in (viewer.form, viewer.anew, viewer.stop):
        expect(control).to_be_hidden()
    expect(viewer.trouble).to_be_hidden()
    writer.say("and on").end()
    assert viewer.ends() == writer.text
    viewer.open(site.link(writer.id, read_only=True).replace(f"answer={writer.id}", "answer=other")).see("No access")


def test_two_viewers_see_the_same_and_either_can_stop(site, client, visit) -> None:
    asker = visit(site.link())
    asker.question.fill("What is a Redis stream?")
    asker.ask.click()
    asker.see("Streaming")
    asker.context.grant_permissions(["clipboard-read", "clipboard-write"])
    asker.copy.click()
    expect(asker.copy).to_have_text("Copied")
    link = asker.evaluate("navigator.clipboard.readText()")
    assert link == asker.page.url
    other = visit(link).has("A Redis")
    expect(other.asked).to_have_text("What is a Redis stream?")
    other.stop.click()
    text = other.ends("Stopped")
    assert asker.ends("Stopped") == text == Answer(link.partition("answer=")[2], client=client).text
    expect(asker.note).to_have_text("The text so far is kept.")


def test_a_link_can_be_copied_by_hand(site, writer, visit) -> None:
    writer.say("x").end()
    viewer = visit(site.link(writer.id)).see("Complete")
    viewer.evaluate("void (navigator.clipboard.writeText = () => Promise.reject(new Error('not allowed')))")
    viewer.copy.click()
    expect(viewer.link).to_have_value(viewer.page.url)
    assert viewer.evaluate("getSelection().toString() || document.activeElement.id") in ("link", viewer.page.url)


def test_the_page_stays_where_its_reader_scrolled_to(site, writer, visit) -> None:
    writer.say(*(f"line {n}\n" for n in range(80)))
    viewer = visit(site.link(writer.id)).has("line 79")
    at_end = "scrollY > 100 && scrollY + innerHeight > document.documentElement.scrollHeight - 5"
    wait_for(lambda: viewer.evaluate(at_end))
    writer.say("more\n" * 9)
    viewer.has("more")
    wait_for(lambda: viewer.evaluate(at_end))
    expect(viewer.stop).to_be_in_viewport()
    viewer.page.mouse.wheel(0, -300)
    wait_for(lambda: not viewer.evaluate(at_end))
    place = viewer.evaluate("scrollY")
    writer.say("and more\n" * 9)
    viewer.has("and more")
    assert viewer.evaluate("scrollY") <= place
    writer.end()
    viewer.see("Complete")


# ---------------------------------------------------------------------------------------------- security


HARM = """() => [
  ...(window.__pwned ? ["code ran"] : []),
  ...(document.scripts.length === 1 && document.images.length === 0 ? [] : ["a script or an image"]),
  ...["text", "asked", "trouble", "note"].flatMap((id) => [...document.getElementById(id).querySelectorAll("*")])
    .filter((node) => node.matches("script, img, svg, iframe, object, embed, style, link, form, input, math, video, meta, base")
      || [...node.attributes].some(({ name, value }) => name.startsWith("on") || /^\\s*(javascript|data|vbscript|file):/i.test(value)))
    .map((node) => node.outerHTML),
]"""


@pytest.mark.parametrize("ending", ["end", "fail"])
def test_nothing_that_a_model_writes_runs_or_loads(site, client, visit, ending: str) -> None:
    go_on = threading.Event()

    def hostile(question: str, topic: str | None) -> Iterator[str]:
        for text in HOSTILE:
            yield text + "\n\n"
        yield "all was said"
        go_on.wait(PATIENCE / 1000)
        if ending == "fail":
            raise RuntimeError(HOSTILE[2])

    answer = ask(
        "\n".join(HOSTILE), topic=HOSTILE[0], source=hostile, id=f"hostile-{ending}", client=client, timing=FAST
    )
    viewer = visit(site.link(answer)).has("all was said")
    assert not viewer.evaluate(HARM)  # while it streams
    assert viewer.shown == answer.text
    go_on.set()
    state = {"end": "Complete", "fail": "Failed"}[ending]
    viewer.see(state)
    expect(viewer.text).to_have_class("markdown")
    for _ in range(2):
        assert not viewer.evaluate(HARM)  # as Markdown
        viewer.page.wait_for_load_state("networkidle")  # whatever an element might be about to load
        assert not viewer.evaluate(HARM)
        viewer.page.reload()  # from the record
        viewer.see(state)
    assert viewer.ends(state) == answer.text
    assert not viewer.evaluate(HARM)


@pytest.mark.parametrize("query", ["", "?token=", "?token=wrong"])
def test_without_the_right_token_the_page_says_what_to_do(site, writer, browser, query: str) -> None:
    viewer = Viewer(browser)
    reply = viewer.page.goto(site.base + query)
    assert reply.status == 401
    expect(viewer.page.get_by_role("alert")).to_contain_text("Open the whole link that the server gave")
    expect(viewer.source.locator("option")).to_have_count(0)
    viewer.question.fill("What is Redis?")
    viewer.ask.click()
    expect(viewer.page.get_by_role("alert")).to_contain_text("Open the whole link that the server gave")
    assert "answer=" not in viewer.page.url
    viewer.leave()


class Elsewhere(BaseHTTPRequestHandler):
    """Another site's page."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>elsewhere</title>")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


TRY = """async ([address, method, type]) => {
  const body = method === "POST" ? JSON.stringify({ question: "What is Redis?" }) : undefined;
  const tries = ["cors", "no-cors"].map((mode) =>
    fetch(address, { method, mode, headers: { "Content-Type": type }, body }).then((reply) => reply.text(), () => ""));
  return (await Promise.all(tries)).join("");
}"""


def test_another_sites_page_can_do_nothing_even_with_the_token(site, client, writer, browser) -> None:
    writer.say("x")
    elsewhere = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
    answers = names_of(client).answers
    before = client.zcard(answers)
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{elsewhere.server_port}/")
    for kind in ("text/plain", "application/json"):
        assert page.evaluate(TRY, [site.link().replace("?", "answers?"), "POST", kind]) == ""
    own = site.link().replace("?", f"answers/{writer.id}?")
    assert page.evaluate(TRY, [own, "DELETE", "text/plain"]) == ""
    assert page.evaluate(TRY, [own, "GET", "text/plain"]) == ""
    assert client.zcard(answers) == before
    assert Answer(writer.id, client=client).status == "streaming"
    page.goto(site.link())  # the same from the page itself, to know that it was the origin
    assert '"id"' in page.evaluate(TRY, [site.link().replace("?", "answers?"), "POST", "application/json"])
    assert client.zcard(answers) > before
    context.close()
    elsewhere.shutdown()
    elsewhere.server_close()


# ------------------------------------------------------------------------------------ for all who use it


def test_keyboard_alone(site, client, visit) -> None:
    viewer = visit(site.link())
    keyboard, focused = viewer.page.keyboard, "document.activeElement.id"
    outline = "getComputedStyle(document.activeElement).outlineStyle"

    def tab_to(name: str) -> list[str]:
        way: list[str] = []
        while viewer.evaluate(focused) != name:
            keyboard.press("Tab")
            way.append(viewer.evaluate(focused))
            assert viewer.evaluate(outline) != "none", way  # one sees where one is
            assert len(way) < 15, way
        return way

    expect(viewer.prepared).to_be_visible()
    tab_to("question")
    keyboard.type("What is a Redis stream?")
    order = [name for name in tab_to("ask") if name]
    assert order == ["prepared", "topic", "source", "ask"]
    keyboard.press("Shift+Tab")
    tab_to("ask")
    viewer.question.focus()
    keyboard.press("Control+Enter")
    viewer.see("Streaming").has("stream")
    tab_to("stop")
    keyboard.press("Enter")
    viewer.see("Stopped")
    assert viewer.evaluate(focused) == "ask"  # the button that is gone has handed it on
    keyboard.press("Enter")
    viewer.see("Streaming")
    assert viewer.evaluate(focused) == "ask"
    tab_to("stop")
    keyboard.press("Space")
    viewer.see("Stopped")


def test_every_control_has_a_name_and_only_the_status_is_live(site, visit) -> None:
    viewer = visit(site.link())
    nameless = (
        "[...document.querySelectorAll('input, textarea, select')].filter((n) => !n.labels.length && !n.ariaLabel)"
    )
    assert viewer.evaluate(f"{nameless}.map((n) => n.id)") == []
    live = viewer.evaluate(
        "[...document.querySelectorAll('[role=status], [role=alert], [aria-live]')].map((n) => n.id)"
    )
    assert live == ["refusal", "status", "trouble", "text"]
    expect(viewer.text).to_have_attribute("aria-live", "off")


WIDE = """# Aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa

```
one line of code that is far too long for the screen of a phone, and must not make all of it wide
```

| a | table | with | many | columns | and | long | words | in | it |
|---|---|---|---|---|---|---|---|---|---|
| aaaaaaaaa | bbbbbbbbbbbb | ccccccccccccc | ddddddddddddd | eeeeeeeeeee | f | g | h | i | j |

"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_cut_off(site, client, visit, scheme: str) -> None:
    model = Model(WIDE)
    answer_id = f"wide-{scheme}"
    produce(client, model, FAST, answer_id, question="w" * 200)
    viewer = visit(site.link(), viewport={"width": 320, "height": 568}, color_scheme=scheme, has_touch=True)
    too_wide = "document.documentElement.scrollWidth > innerWidth"
    expect(viewer.source.locator("option")).to_have_count(3)
    assert not viewer.evaluate(too_wide)
    viewer.open(site.link(answer_id)).has("columns").see("Streaming")
    assert not viewer.evaluate(too_wide)
    expect(viewer.stop).to_be_in_viewport()
    model.end()
    viewer.see("Complete")
    expect(viewer.text.locator("td").first).to_be_attached()
    assert not viewer.evaluate(too_wide)
    dark = viewer.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] < 60")
    assert dark == (scheme == "dark")
