"""The LLM sources, over real HTTP: the scripted server with all its faults, and the local model; one's own."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import redis

from llmstream_nb.llm import completion as room
from llmstream_nb.llm import local, prepared, scripted
from llmstream_nb.llm import sources as llm
from llmstream_nb.llm.endpoint import ModelError
from llmstream_nb.llm.own import OwnSource
from llmstream_nb.llm.sources import complete

KEY = "key-test-5ecret5ecret5ecret"
QUESTION = "What is a Redis stream?"


def wait_for(condition, seconds=60):
    """Wait until `condition()` is true; fail if it doesn't become so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def fails(*, source="scripted", timeout=30.0, **options) -> tuple[ModelError, list[str]]:
    """The error in which a completion ends, and the deltas that came before."""
    deltas = []
    with pytest.raises(ModelError) as caught:
        deltas.extend(complete(QUESTION, source=source, timeout=timeout, **options))
    return caught.value, deltas


def post(body: object, path="/chat/completions") -> tuple[int, dict, str]:
    """What the scripted server answers to a bare request: status, headers, body."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {scripted.server().key}"}
    request = urllib.request.Request(scripted.server().url + path, data, headers)
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, dict(reply.headers), reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read().decode()


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def active() -> int:
    """How many requests are being answered now."""
    return sum("process_request" in name for name in threads())


@dataclass
class Echoing(scripted.Script):
    """The scripts of the server, and one that only tests want: the answer is the question, verbatim."""

    echo: bool = False

    def chunks(self, question):
        return iter(scripted.split(question, self.piece)) if self.echo else super().chunks(question)


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch, tmp_path):
    """Each test has no settings but its own, and leaves no request, thread or connection behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(llm, "CHECKOUT", tmp_path / "checkout")
    monkeypatch.setattr(scripted, "Script", Echoing)
    for name in (
        "LLMSTREAM_TIMEOUT",
        "LLMSTREAM_FIRST_TIMEOUT",
        "LLMSTREAM_LLM",
        "LLMSTREAM_LOCAL_URL",
        "LLMSTREAM_LOCAL_KEY",
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
        "OPENAI_MODEL",
        "OPENAI_GOES_ON",
    ):
        monkeypatch.delenv(name, raising=False)
    yield
    wait_for(lambda: active() == 0)
    wait_for(lambda: "open-completion" not in threads())
    wait_for(lambda: not any("process_request" in name for name in threads()))


# ---------------------------------------------------------------------------------------- a good answer


def test_streams_the_prepared_answer_in_small_deltas():
    completion = complete(QUESTION, model="scripted:pace=0")
    assert completion.finish_reason is None
    assert completion.usage is None
    deltas = list(completion)
    assert "".join(deltas) == prepared.reply(QUESTION)
    assert len(deltas) > 100
    assert all(0 < len(delta.strip()) <= 4 for delta in deltas)
    assert (completion.source, completion.model) == ("scripted", "scripted:pace=0")
    assert completion.finish_reason == "stop"
    assert completion.usage["completion_tokens"] == len(deltas)
    assert completion.usage["total_tokens"] == completion.usage["prompt_tokens"] + len(deltas)
    assert list(completion) == []


def test_without_stream_the_whole_text_is_one_delta():
    completion = complete(QUESTION, model="scripted:pace=0", stream=False)
    assert list(completion) == [prepared.reply(QUESTION)]
    assert completion.finish_reason == "stop"
    assert completion.usage["completion_tokens"] > 100


def test_length_ends_early_and_says_so():
    completion = complete(QUESTION, model="scripted:pace=0,length=2")
    assert "".join(completion) == "A Redi"
    assert completion.finish_reason == "length"
    assert completion.usage["completion_tokens"] == 2


def test_no_completion_is_active_once_its_client_knows_the_end():
    for _ in range(50):
        assert "".join(complete(QUESTION, source="scripted", model="scripted:long=3,pace=0")) == "0 1 2 "
        assert scripted.server().active == 0


def test_pace_is_kept_without_drift(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(scripted.time, "monotonic", lambda: clock[0])
    waits = []

    class Handler(scripted._Handler):
        def __init__(self):
            self.server = SimpleNamespace(answering=set())

        def _pause(self, seconds):
            waits.append(seconds)
            clock[0] += max(seconds, 0) + 0.01  # each wait takes longer than asked for

    assert len(list(Handler()._paced(scripted.Script(pace=10, think=0), ["x"] * 5))) == 5
    assert waits == pytest.approx([0, 0.09, 0.09, 0.09, 0.09])
    waits.clear()
    assert len(list(Handler()._paced(scripted.Script(pace=0, think=500), ["x"] * 2))) == 2
    assert waits == pytest.approx([0.5, -0.01])
    waits.clear()
    for name in ("scripted", "scripted:pace=0"):  # a model takes a moment before its first token
        assert list(Handler()._paced(scripted.Script.parse(name), ["x"])) == ["x"]
    assert waits == pytest.approx([0.4, 0])


ODD = [
    "\x00<script>alert(1)</script>",
    "START:1;\r\n;END:1;",
    "e\u0301 \U0001f469\U0001f3fd\u200d\U0001f680 \u2028\x85 ",
    "data: x\n\n",
    "x" * 100_000,
]


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_odd_text_comes_back_as_it_was(text):
    assert "".join(complete(text, model="scripted:pace=0,echo,piece=1000")) == text
    assert "".join(scripted.split(text)) == text


def test_an_emoji_cut_in_two_passes_as_two_halves():
    deltas = list(complete("a😀", model="scripted:pace=0,echo,piece=1"))
    assert deltas == ["a", "\ud83d", "\ude00"]


def test_a_lone_surrogate_in_the_question_is_replaced():
    assert "".join(complete("x\ud83d!", model="scripted:pace=0,echo,piece=9")) == "x\ufffd!"


def test_a_megabyte_in_one_delta(endpoint):
    endpoint(sse(chunk("x" * 1_000_000, "stop")))
    (delta,) = complete("x", source="openai")
    assert len(delta) == 1_000_000


def test_a_fast_endpoint_waits_for_its_reader():
    completion = complete("x", model="scripted:pace=0,piece=10000,long=20000", timeout=2.0, first_timeout=20.0)
    assert next(completion)
    request = completion._request
    wait_for(lambda: request.came.qsize() >= room.AHEAD)
    assert len(list(complete("x", model="scripted:pace=0,long=5000"))) == 5000  # time for as much of the other
    threading.Event().wait(2.2)  # longer than the endpoint may be silent: it is not, it has to wait
    assert request.came.qsize() <= room.AHEAD + 1
    assert sum(len(delta) for delta in completion) == 19_999 * 10_000
    assert request.came.qsize() == 0


def test_long_is_numbered():
    assert "".join(complete("x", model="scripted:pace=0,long=12")).split() == [str(n) for n in range(12)]


def test_the_topic_reaches_the_model(monkeypatch):
    seen = []
    monkeypatch.setattr(scripted.Script, "chunks", lambda *_: iter(["ok"]))
    parse = json.loads
    monkeypatch.setattr(scripted.json, "loads", lambda body: seen.append(parse(body)) or seen[-1])
    list(complete("Why?", topic="Redis Streams"))
    list(complete("Why?", stream=False))
    system = [request["messages"][0]["content"] for request in seen if "messages" in request]
    assert "expert in answering questions about Redis Streams" in system[0]
    assert "expert" not in system[1]


# ---------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        ("status=400", "BadRequest", "change the question"),
        ("status=401", "Unauthorized", "OPENAI_API_KEY"),
        ("status=403", "Forbidden", "403"),
        ("status=404", "ModelNotFound", "another model"),
        ("status=429", "RateLimited", "wait 20 s"),
        ("status=500", "ServerError", "ask again"),
        ("status=503", "ServerError", "503"),
        ("silence", "Stalled", "0.2 s"),
        ("stall=0", "Stalled", "0.2 s"),
        ("drop=0", "ConnectionDropped", "ask again"),
        ("long=0", "EmptyAnswer", "answered nothing"),
        ("oops", "BadRequest", "unknown option 'oops'"),
        ("pace=fast", "BadRequest", "bad option 'pace=fast'"),
        ("silence=1", "BadRequest", "bad option 'silence=1'"),
        ("status=200", "BadRequest", "from 400 to 599"),
        ("piece=0", "BadRequest", "from 1 to 10000"),
        ("long=1000001", "BadRequest", "from 0 to 1000000"),
        ("pace=100001", "BadRequest", "from 0 to 100000"),
        ("think=" + "9" * 5000, "BadRequest", "think"),
    ],
)
def test_a_fault_before_the_first_token(fault, error, says, stream):
    timeout = 0.2 if error == "Stalled" else 30.0
    failed, deltas = fails(model=f"scripted:{fault}", timeout=timeout, stream=stream)
    assert (failed.error, deltas) == (error, [])
    assert says in str(failed)
    assert "The scripted model" in str(failed)


@pytest.mark.parametrize(("fault", "error"), [("drop=3", "ConnectionDropped"), ("stall=3", "Stalled")])
def test_a_fault_in_mid_answer_keeps_what_came(fault, error):
    failed, deltas = fails(model=f"scripted:pace=0,long=9,{fault}", timeout=1.0, first_timeout=20.0)
    assert failed.error == error
    assert deltas == ["0 ", "1 ", "2 "]


def test_a_model_of_another_name_is_not_found():
    failed, _ = fails(model="gpt-5")
    assert failed.error == "ModelNotFound"
    assert "'gpt-5'" in str(failed)


@pytest.fixture
def endpoint(monkeypatch):
    """An endpoint that sends the given bytes to the first client and hangs up; the source openai asks it."""
    listener = socket.create_server(("127.0.0.1", 0))
    thread = None

    def serve(reply: bytes) -> None:
        nonlocal thread

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(reply)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):  # else unread bytes would reset the connection
                    pass

        thread = threading.Thread(target=answer)
        thread.start()
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}/v1")

    yield serve
    listener.close()
    if thread:
        thread.join(60)
        assert not thread.is_alive()


def sse(*events: object) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    return head + b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in events)


def chunk(text: str, reason: str | None = None) -> dict:
    return {"id": "1", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]}


@pytest.mark.parametrize(
    ("reply", "error", "deltas"),
    [
        (sse(chunk("Hel"), chunk("lo")), "ConnectionDropped", ["Hel", "lo"]),
        (sse(chunk("Hel"), {"error": {"message": "overloaded"}}), "ServerError", ["Hel"]),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: {oops\n\n", "BadAnswer", []),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 9\r\n\r\n<html/>\r\n", "ServerError", []),
        (b"SSH-2.0-OpenSSH\r\n", "ConnectionDropped", []),
        (b"", "ConnectionDropped", []),
    ],
    ids=["no finish reason", "error event", "no JSON", "HTML from a gateway", "no HTTP", "nothing"],
)
def test_an_endpoint_that_misbehaves(endpoint, reply, error, deltas):
    endpoint(reply)
    failed, came = fails(source="openai")
    assert (failed.error, came) == (error, deltas)


def test_a_web_page_instead_of_an_api(endpoint):
    endpoint(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>")
    assert fails(source="openai", stream=False)[0].error == "BadAnswer"


def refusal(status: str, error: dict) -> bytes:
    body = json.dumps({"error": error})
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n{body}".encode()


def test_a_key_that_the_endpoint_quotes_in_part_is_not_shown_either(endpoint):
    endpoint(refusal("401 Unauthorized", {"message": f"Incorrect API key: {KEY[:9]}***{KEY[-4:]}"}))
    failed, _ = fails(source="openai")
    assert failed.error == "Unauthorized"
    assert KEY[:9] not in str(failed)


def test_a_context_that_is_too_small(endpoint):
    endpoint(refusal("400 Bad Request", {"message": "too many", "code": "context_length_exceeded"}))
    failed, _ = fails(source="openai", model="tiny")
    assert failed.error == "BadRequest"
    assert "too long for 'tiny'" in str(failed)


def test_nobody_listens(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
    failed, _ = fails(source="openai")
    assert failed.error == "Unreachable"
    assert f"http://127.0.0.1:{port}/v1" in str(failed)


@pytest.mark.parametrize(("name", "value"), [("SSL_CERT_FILE", "/no/such/file"), ("HTTPS_PROXY", "oops://x")])
def test_settings_that_the_http_client_refuses(monkeypatch, name, value):
    monkeypatch.setattr(room, "_certificates", room._certificates.__wrapped__)
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert fails(source="openai")[0].error == "BadSettings"
    assert list(complete("x", model="scripted:pace=0,long=1")) == ["0 "]  # which needs neither


# ---------------------------------------------------------------------------------------- close()


class Reading:
    """A completion that is read in a thread of its own."""

    def __init__(self, completion):
        self.completion, self.deltas, self.error = completion, [], None
        self.thread = threading.Thread(target=self.read)
        self.thread.start()

    def read(self):
        try:
            for delta in self.completion:
                self.deltas.append(delta)
        except BaseException as error:
            self.error = error

    def ends_quietly(self):
        self.thread.join(60)
        assert not self.thread.is_alive()
        assert self.error is None
        assert self.completion.finish_reason is None
        return self.deltas


def test_close_while_waiting_for_the_first_token():
    reading = Reading(complete(QUESTION, model="scripted:silence"))
    wait_for(lambda: active() == 1)
    reading.completion.close()
    assert reading.ends_quietly() == []
    wait_for(lambda: active() == 0)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("script", ["stall=2", "pace=50"])
def test_close_in_mid_answer_ends_both_sides(script, stream):
    reading = Reading(complete("x", model=f"scripted:long=100000,{script}", stream=stream))
    wait_for(lambda: len(reading.deltas) >= 2 or (not stream and active() == 1))
    reading.completion.close()
    deltas = reading.ends_quietly()
    assert deltas == [f"{n} " for n in range(len(deltas))]
    wait_for(lambda: active() == 0)


def test_close_while_connecting(monkeypatch):
    may_connect = threading.Event()
    connecting = threading.Event()
    resolve = socket.getaddrinfo

    def slowly(*args, **kwargs):
        connecting.set()
        assert may_connect.wait(60)
        return resolve(*args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", slowly)
    monkeypatch.setattr(room, "_LoopThread", type("_LoopThread", (room._LoopThread,), {"current": None}))
    monkeypatch.setenv("OPENAI_BASE_URL", scripted.server().url.replace("127.0.0.1", "localhost"))
    reading = Reading(complete(QUESTION, source="openai", model="scripted:silence"))
    assert connecting.wait(60)
    reading.completion.close()
    assert reading.ends_quietly() == []
    assert "open-completion" in threads()  # it still asks for the address, and lets go as soon as it can
    may_connect.set()
    wait_for(lambda: "open-completion" not in threads())


def test_close_during_the_tls_handshake(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("OPENAI_BASE_URL", f"https://127.0.0.1:{listener.getsockname()[1]}/v1")
        reading = Reading(complete(QUESTION, source="openai"))
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(65536)  # the client's hello; it gets no answer
            reading.completion.close()
            assert reading.ends_quietly() == []
            connection.settimeout(5)
            while connection.recv(65536):  # b"": the client has left
                pass


def test_close_before_the_first_next_makes_no_request(monkeypatch):
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(room._Request, "client", lambda _: asked.append(1))
        completion = complete(QUESTION)
        completion.close()
        completion.close()
        assert list(completion) == []
    assert asked == []


def test_close_from_the_loop_itself():
    completion = complete("x", model="scripted:pace=0,long=50")
    for delta in completion:
        if delta == "3 ":
            completion.close()
    assert delta == "3 "
    assert completion.finish_reason is None


def test_an_abandoned_completion_lets_go():
    completion = complete("x", model="scripted:long=100000")
    next(completion)
    del completion
    gc.collect()
    wait_for(lambda: active() == 0)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_no_file_is_left_open():
    def open_files():
        return len(os.listdir("/proc/self/fd"))

    def round_trip():
        list(complete("x", model="scripted:pace=0,long=3"))
        fails(model="scripted:drop=1")
        fails(model="scripted:status=500")
        completion = complete("x", model="scripted:long=9")
        next(completion)
        completion.close()
        list(completion)
        wait_for(lambda: active() == 0)

    round_trip()
    before = open_files()
    gc.disable()  # nothing may depend on the garbage collector
    try:
        for _ in range(5):
            round_trip()
        wait_for(lambda: open_files() <= before)
    finally:
        gc.enable()


FORKED = """
import os, sys
from llmstream_nb.llm.endpoint import ModelError
from llmstream_nb.llm.sources import complete
begun = complete("x", source="openai", model="scripted:long=100000,pace=200")
assert next(begun) == "0 "
if pid := os.fork():
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert next(begun) == "1 "  # the child has not taken it
else:
    assert list(complete("x", source="openai", model="scripted:long=2,pace=0")) == ["0 ", "1 "]
    try:
        list(begun)
    except ModelError as error:
        os._exit(error.error != "ConnectionDropped")
    os._exit(2)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_asks_anew():
    environment = os.environ | {"OPENAI_BASE_URL": scripted.server().url, "OPENAI_API_KEY": scripted.server().key}
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", FORKED], check=True, cwd=root, env=environment, timeout=60)


def test_a_loop_that_ends_takes_its_requests_with_it_and_no_others():
    completion = complete("x", model="scripted:long=100000,stall=1")
    assert next(completion) == "0 "
    thread = completion._request.thread
    thread.loop.call_soon_threadsafe(thread.loop.stop)
    with pytest.raises(ModelError) as failed:
        next(completion)
    assert failed.value.error == "ConnectionDropped"
    assert list(complete("x", model="scripted:pace=0,long=2")) == ["0 ", "1 "]
    thread = threading.Thread(target=thread.loop.run_forever)  # so that this request ends too
    thread.start()
    completion.close()
    completion._request.cancel()
    wait_for(lambda: active() == 0)
    completion._request.thread.loop.call_soon_threadsafe(completion._request.thread.loop.stop)
    thread.join()


# ---------------------------------------------------------------------------------------- secrets, settings


@pytest.mark.parametrize("fault", ["status=401", "status=403", "status=429", "status=500", "oops", "silence", "drop=0"])
@pytest.mark.parametrize("user", ["", "jo:p%40ss-5ecret@"])
def test_no_error_shows_a_secret(monkeypatch, fault, user):
    monkeypatch.setattr(scripted._Handler, "_is_known", lambda _: True)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", scripted.server().url.replace("//", f"//{user}"))
    timeout = 0.3 if fault == "silence" else 5.0
    failed, _ = fails(source="openai", model=f"scripted:{fault}", timeout=timeout)
    shown = "".join(traceback.format_exception(failed)) + repr(failed) + str(failed)
    assert failed.__cause__ is None
    assert failed.__context__ is None
    for secret in (KEY, "5ecret", "am86cEBzcy01ZWNyZXQ="):  # the last one is user and password in base64
        assert secret not in shown
    if fault in ("status=403", "status=500"):
        assert "***" in shown  # the server did quote it


def test_the_scripted_server_quotes_the_key(monkeypatch):
    """Else the test above would prove nothing."""
    monkeypatch.setattr(scripted.server(), "key", KEY)
    body = {"model": "scripted:status=401", "messages": [{"role": "user", "content": "x"}]}
    request = urllib.request.Request(scripted.server().url + "/chat/completions", json.dumps(body).encode())
    request.add_header("Authorization", f"Bearer {KEY}")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    with refused.value as reply:
        assert KEY in reply.read().decode()


def test_a_key_in_the_environment_spends_nothing(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert llm.default_source() == "scripted"
    assert complete(QUESTION).source == "scripted"


def test_the_environment_chooses_the_source(monkeypatch):
    monkeypatch.setenv("LLMSTREAM_LLM", "openai")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert complete(QUESTION).source == "openai"
    assert complete(QUESTION, source="scripted").source == "scripted"


def test_an_unknown_source_names_the_known(monkeypatch):
    monkeypatch.setenv("LLMSTREAM_LLM", "gpt")
    with pytest.raises(ModelError, match=r"no source 'gpt': choose scripted, local, openai") as failed:
        complete(QUESTION)
    assert failed.value.error == "UnknownSource"


def test_no_key():
    with pytest.raises(ModelError, match="OPENAI_API_KEY") as failed:
        complete(QUESTION, source="openai")
    assert failed.value.error == "NoAPIKey"


def test_a_mangled_key_is_refused_before_it_is_sent(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nx")
    with pytest.raises(ModelError, match="copy it again") as failed:
        complete(QUESTION, source="openai")
    assert KEY not in str(failed.value)


@pytest.mark.parametrize("url", ["127.0.0.1:1", "ftp://x/", "http://", "http://x:99999/", "http://[x/", "?"])
def test_a_malformed_address(monkeypatch, url):
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ModelError) as failed:
        complete(QUESTION, source="openai")
    assert failed.value.error == "BadAddress"


def test_an_endpoint_on_this_machine_needs_no_key_and_no_proxy(monkeypatch):
    monkeypatch.setattr(scripted.server(), "key", "none")
    monkeypatch.setenv("OPENAI_BASE_URL", scripted.server().url)
    monkeypatch.setenv("OPENAI_MODEL", "scripted:pace=0,long=2")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    completion = complete(QUESTION, source="openai")
    assert list(completion) == ["0 ", "1 "]
    assert (completion.source, completion.model) == ("openai", "scripted:pace=0,long=2")
    assert "".join(complete(QUESTION, source="openai", model="scripted:pace=0,length=1")) == "A"


def test_settings_come_from_the_environment_then_from_the_nearest_env_file(monkeypatch, tmp_path):
    (tmp_path / "checkout").mkdir()
    text = f"OPENAI_MODEL=far\nOPENAI_API_KEY='{KEY}'\n"
    (tmp_path / "checkout" / ".env").write_text(text)
    assert complete(QUESTION, source="openai").model == "far"
    Path(".env").write_text("\ufeffOPENAI_MODEL=near\nOPENAI_BASE_URL=\n", encoding="utf-8")
    assert complete(QUESTION, source="openai").model == "near"
    monkeypatch.setenv("OPENAI_MODEL", "nearest")
    assert complete(QUESTION, source="openai").model == "nearest"
    assert "OPENAI_API_KEY" not in os.environ
    assert (tmp_path / "checkout" / ".env").read_text() == text


def test_an_env_file_sends_no_key_from_elsewhere_to_its_own_address(monkeypatch, tmp_path):
    """The folder may be anybody's: its file could name an address that collects keys."""
    theirs = "OPENAI_BASE_URL=http://127.0.0.1:9/v1\n"
    Path(".env").write_text(theirs)
    assert complete(QUESTION, source="openai").source == "openai"  # no key, none sent
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for whole in (theirs, f"{theirs}OPENAI_API_KEY=another-key\n"):  # the environment's goes before the file's
        Path(".env").write_text(whole)
        with pytest.raises(ModelError, match=r"env sets OPENAI_BASE_URL: set .* there too, and nowhere else") as failed:
            complete(QUESTION, source="openai")
        assert failed.value.error == "BadSettings" and KEY not in str(failed.value)
        assert not llm.sources()[2].ready
    monkeypatch.setenv("OPENAI_BASE_URL", scripted.server().url)  # it goes before the file's
    monkeypatch.setenv("OPENAI_MODEL", "scripted:pace=0,long=1")
    assert complete(QUESTION, source="openai").source == "openai"
    monkeypatch.delenv("OPENAI_BASE_URL")
    monkeypatch.delenv("OPENAI_API_KEY")
    assert complete(QUESTION, source="openai").source == "openai"  # both are the file's
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / ".env").write_text(f"OPENAI_API_KEY={KEY}\n")
    Path(".env").write_text(theirs)
    with pytest.raises(ModelError, match="nowhere else"):
        complete(QUESTION, source="openai")
    (tmp_path / "checkout" / ".env").write_text(f"OPENAI_API_KEY={KEY}\nOPENAI_BASE_URL=http://127.0.0.1:8/v1\n")
    Path(".env").write_text("OPENAI_BASE_URL=\n")  # it would send the key to the usual address
    assert llm._settings()["OPENAI_BASE_URL"] == "http://127.0.0.1:8/v1"


def test_an_env_file_that_is_no_text():
    Path(".env").write_bytes(f"OPENAI_API_KEY={KEY}".encode("utf-16"))
    with pytest.raises(ModelError, match="UTF-8") as failed:
        complete(QUESTION, source="openai")
    assert KEY not in "".join(traceback.format_exception(failed.value))


def test_the_list_of_sources(monkeypatch):
    scripted_, local_, openai_ = llm.sources()
    assert (scripted_.name, scripted_.ready, scripted_.note) == ("scripted", True, "")
    assert (openai_.name, openai_.ready) == ("openai", False)
    assert "OPENAI_API_KEY" in openai_.note
    assert local_.label == "local: real, small, invents facts"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(local, "find_spec", lambda _: None)
    _, local_, openai_ = llm.sources()
    assert openai_.ready
    assert not local_.ready
    assert "lab" in local_.note
    monkeypatch.setenv("LLMSTREAM_LOCAL_URL", "http://127.0.0.1:1/v1")
    assert llm.sources()[1].ready


def test_importing_the_package_imports_neither_openai_nor_starts_anything():
    code = (
        "import sys, threading; from llmstream_nb.llm import sources as llm; llm.sources(); llm.complete('x'); "
        "llm.prepared_questions(); assert not {'openai', 'httpx2', 'http.server'} & set(sys.modules); "
        "assert threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], timeout=30)


# ---------------------------------------------------------------------------------------- the scripted server


def test_refuses_what_it_does_not_know():
    ask = {"model": "scripted", "messages": [{"role": "user", "content": "x"}]}
    assert post(ask, "/embeddings")[0] == 404
    for body in (b"{", b"\xff", [], {}, {"model": 1, "messages": []}, {"model": "scripted", "messages": []}):
        status, _, text = post(body)
        assert status == 400
        assert json.loads(text)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("given", [None, "", "Bearer ", "Bearer none", "Basic bm9uZQ==", "\xe9"])
def test_whoever_lacks_the_key_is_told_which_and_gets_nothing_else(given):
    data = json.dumps({"model": "scripted", "messages": [{"role": "user", "content": QUESTION}]}).encode()
    headers = {} if given is None else {"Authorization": given}
    request = urllib.request.Request(f"{scripted.server().url}/chat/completions", data, headers)
    with pytest.raises(urllib.error.HTTPError, match="401") as refused:
        urllib.request.urlopen(request)
    with refused.value as reply:
        said = json.load(reply)["error"]["message"]
    assert "api_key=scripted.server().key" in said and scripted.server().key not in said


def test_a_rate_limit_has_the_headers_and_body_of_the_real_one():
    ask = {"model": "scripted:status=429", "messages": [{"role": "user", "content": "x"}]}
    status, headers, text = post(ask)
    assert (status, headers["Retry-After"]) == (429, "20")
    assert json.loads(text)["error"].keys() == {"message", "type", "param", "code"}


def test_many_at_once():
    readings = [Reading(complete(f"{n} " * 20, model="scripted:pace=200,echo")) for n in range(20)]
    for n, reading in enumerate(readings):
        reading.thread.join(60)
        assert reading.error is None
        assert "".join(reading.deltas) == f"{n} " * 20


# ---------------------------------------------------------------------------------------- prepared answers


def test_there_are_enough_and_each_is_of_readable_length():
    assert len(llm.prepared_questions()) >= 14
    for question in llm.prepared_questions():
        assert prepared.find(question) == question
        assert 80 <= len(prepared.reply(question).split()) <= 220, question
        assert prepared.reply(question).count("```") % 2 == 0


def test_every_wording_in_the_file_finds_its_own_answer():
    for question, (wordings, _) in prepared._prepared().items():
        assert len(wordings) > 3
        for wording in wordings:
            assert prepared.find(wording) == question
            assert prepared.find(wording.upper().rstrip("?") + " ?!") == question


def commands() -> list[str]:
    """The Redis commands in the answers: the lines of all code blocks that name no language."""
    text = Path(prepared.__file__).with_name("prepared.md").read_text(encoding="utf-8")
    blocks = [block for block in text.split("```")[1::2] if block.startswith("\n")]
    return [line for block in blocks for line in block.strip().splitlines()]


def test_redis_accepts_every_command_in_the_answers(shared):
    url = shared.url
    with redis.Redis.from_url(url, single_connection_client=True) as client:
        client.execute_command("SELECT", 9)
        client.flushdb()
        client.xadd("answer", {"text": "0"}, id="0-1")
        client.xadd("events", {"type": "start"})
        client.response_callbacks.clear()  # only whether Redis accepts them matters, not what it answers
        assert len(commands()) > 20
        for line in sorted(commands(), key=lambda line: not line.startswith("XGROUP")):  # all need the group
            command, _, refused = line.partition("→ ")
            with pytest.raises(redis.ResponseError) if refused else nullcontext():
                client.execute_command(*shlex.split(re.sub(r"BLOCK [1-9]\d*", "BLOCK 1", command)))
        client.flushdb()


PARAPHRASES = {
    "can you explain redis streams to me please": "What is a Redis stream?",
    "What is a redis steam?": "What is a Redis stream?",
    "Why do we stream the answer of an LLM rather than waiting for it?": "Why stream an LLM's answer instead of waiting for all of it?",
    "Whats the difference betwen XREAD and XREADGROUP": "How do XREAD and XREADGROUP differ?",
    "what's a consumer group and how does it work": "What is a consumer group?",
    "Why is using $ in a loop risky?": "What does `$` mean in XREAD, and why is it risky in a loop?",
    "How is an entry's ID built?": "What is an entry ID made of?",
    "How can a reader resume after it crashed?": "How does a reader resume after a crash?",
    "What's the PEL?": "What is the pending entries list?",
    "should I use MAXLEN to trim streams": "When should I trim a stream with MAXLEN?",
    "compare redis streams, pub/sub and lists": "How do streams, Pub/Sub and lists compare?",
    "Define time to first token": "What is time to first token?",
    "what if a producer crashes in mid answer": "What happens if the producer dies in the middle of an answer?",
    "what does the XAUTOCLAIM command do": "What does XAUTOCLAIM do?",
    "how to cancel an answer that is being generated": "How do I stop an answer while it is being generated?",
    "How much memory does a Redis stream need?": "How much memory does a stream take?",
    "why shouldn't all answers share one stream": "Why not put all answers on one shared stream?",
    "how long should BLOCK be in XREAD": "What does BLOCK do in XREAD?",
}
STRANGERS = [
    "What is the capital of France?", "How do I bake bread?", "Tell me a joke", "hello", "???", "", "stream",
    "What is the difference between Redis Streams and Kafka?", "Write a story about a stream in the woods",
    "How do I stop smoking?", "How much memory does Chrome take?", "What happens if I die?", "日本の首都は?",
    "What does XDEL do?", "How do I install Redis?", "How do I make a group of consumers happy?",
    "What is an LLM?",
]  # fmt: skip


@pytest.mark.parametrize(("asked", "meant"), PARAPHRASES.items())
def test_a_paraphrase_finds_the_answer(asked, meant):
    assert prepared.find(asked) == meant


@pytest.mark.parametrize("asked", STRANGERS)
def test_a_stranger_gets_an_honest_answer_with_the_list(asked):
    assert prepared.find(asked) is None
    reply = prepared.reply(asked)
    assert "not a language model" in reply
    assert "LLMSTREAM_LLM" in reply
    assert all(f"- {question}" in reply for question in llm.prepared_questions())


# ---------------------------------------------------------------------------------------- the local model

needs_model = pytest.mark.skipif(not local.installed(), reason="the local model's packages are not installed")


@pytest.fixture(scope="module")
def local_model():
    yield local.url()
    process, _ = local._server
    process.stdin.close()  # as the end of this process would
    assert process.wait(60) == 0


@needs_model
def test_the_local_model_answers(local_model):
    completion = complete("Name three colours, nothing else.", source="local")
    deltas = list(completion)
    assert len(deltas) > 3
    assert completion.model == "smollm2-135m"
    assert completion.finish_reason in ("stop", "length")
    assert completion.usage["completion_tokens"] >= len(deltas)
    assert len(list(complete("Say hello.", source="local", stream=False))) == 1


@needs_model
def test_the_local_model_stops_when_its_client_leaves(local_model):
    began = time.monotonic()
    busy = [complete("Tell a very long story.", source="local") for _ in range(4)]
    for completion in busy:
        next(completion)
        completion.close()
    # All four places were taken: the next answer could not start if they were still at work. Where four first tokens
    # take long, so does the rest of four stories.
    started = complete("Say hello.", source="local", timeout=5 + time.monotonic() - began)
    assert next(started)
    started.close()
    assert list(started) == []


@needs_model
def test_a_question_too_long_for_the_local_model(local_model):
    with pytest.raises(ModelError, match="too long for 'smollm2-135m': shorten it") as failed:
        list(complete("a word " * 4000, source="local"))
    assert failed.value.error == "BadRequest"


@needs_model
def test_a_running_local_model_is_used(local_model, monkeypatch):
    monkeypatch.setenv("LLMSTREAM_LOCAL_URL", local_model)
    with pytest.raises(ModelError, match="401"):  # as another user of the machine
        list(complete("Say hello.", source="local"))
    monkeypatch.setenv("LLMSTREAM_LOCAL_KEY", local.KEY)
    monkeypatch.setattr(local, "url", lambda: pytest.fail("a second one was started"))
    completion = complete("Say hello.", source="local")
    assert next(completion)
    completion.close()
    assert list(completion) == []


def test_the_local_model_is_missing(monkeypatch):
    monkeypatch.setattr(local, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"llmstream_nb lab.*scripted") as failed:
        complete(QUESTION, source="local")
    assert failed.value.error == "LocalModelMissing"


def test_the_local_model_does_not_start(monkeypatch, tmp_path):
    (tmp_path / "broken.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(local, "__file__", str(tmp_path / "broken.py"))
    monkeypatch.setattr(local, "_server", None)
    monkeypatch.setattr(local, "installed", lambda: True)
    failed, _ = fails(source="local")
    assert failed.error == "LocalModelFailed"
    assert "exit code 3" in str(failed)


@needs_model
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_the_local_model_ends_with_a_killed_parent():
    code = "from llmstream_nb.llm import local; print(local.url(), flush=True); input()"
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[1]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=root, stdin=pipe, stdout=pipe, text=True) as parent:
        port = urlsplit(parent.stdout.readline()).port
        socket.create_connection(("127.0.0.1", port)).close()
        parent.send_signal(signal.SIGKILL)

    def gone():
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            return True
        return False

    wait_for(gone)


# ------------------------------------------------------------------------------------------- one's own sources


@pytest.mark.parametrize("made", ["yields", "returns text", "returns a list"])
def test_an_asynchronous_source(made):
    async def yields(question, topic):
        for text in ("so ", None, "", "far"):
            await asyncio.sleep(0)
            yield text

    async def returns(question, topic):
        return "so far" if made == "returns text" else ["so ", None, "far"]

    assert "".join(OwnSource(yields if made == "yields" else returns, "?", None)) == "so far"


@pytest.mark.parametrize("when", ["between two deltas", "while it is awaited"])
def test_an_asynchronous_source_ends_at_once_when_it_is_closed(when):
    waits, ended = threading.Event(), []

    async def source(question, topic):
        try:
            yield "so far"
            waits.set()
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    answer = OwnSource(source, "?", None)
    deltas = iter(answer)
    assert next(deltas) == "so far"
    if when == "between two deltas":
        answer.close()
    else:
        threading.Thread(target=lambda: waits.wait(60) and answer.close(), daemon=True).start()
    reading = threading.Thread(target=lambda: ended.append(list(deltas)), daemon=True)
    reading.start()
    reading.join(60)
    assert ended == [True, []]
