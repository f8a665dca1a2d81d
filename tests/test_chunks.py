"""Whatever an endpoint sends becomes its text, or its own words: shapes that real ones send, over real HTTP."""

from __future__ import annotations

import asyncio
import base64
import gzip
import http.server
import json
import re
import string
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmstream_nb.llm import chunks, sources
from llmstream_nb.llm import completion as room
from llmstream_nb.llm.chunks import Reader, body_fault
from llmstream_nb.llm.endpoint import Endpoint, ModelError
from llmstream_nb.llm.sources import complete

KEY = f"sk-proj-{string.digits}{string.ascii_lowercase}ABCD"
SSE, JSON, HTML = ({"Content-Type": kind} for kind in ("text/event-stream", "application/json", "text/html"))


class Fake(http.server.ThreadingHTTPServer):
    """Answers each request with the next of `replies`, (status, headers, pieces of a body), and notes it."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.requests, self.gone = [], [], threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *_):
        """A client that left."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
        status, headers, pieces = self.server.replies.pop(0)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            for piece in pieces:
                if isinstance(piece, float):
                    time.sleep(piece)
                else:
                    self.wfile.write(piece)
        except OSError:
            self.server.gone.set()
            raise

    def log_message(self, *_):
        """Keep the output clean."""


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "CHECKOUT", tmp_path)
    for name in ("OPENAI_MODEL", "LLMSTREAM_TIMEOUT", "LLMSTREAM_FIRST_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    server = Fake()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    yield server
    server.shutdown()
    server.server_close()


def answered(fake, *replies, **options):
    """How an answer ended, and its text: (finish reason or error's name, text, message)."""
    fake.replies[:] = replies
    completion, text = complete("Why?", source="openai", **{"timeout": 5.0} | options), []
    try:
        text.extend(completion)
    except ModelError as error:
        return error.error, "".join(text), str(error)
    return completion.finish_reason, "".join(text), completion.usage


def data(thing) -> bytes:
    return b"data: " + (thing if isinstance(thing, bytes) else json.dumps(thing).encode()) + b"\n\n"


def piece(delta, reason=None, **more) -> bytes:
    return data({"choices": [{"index": 0, "delta": delta, "finish_reason": reason, **more}]})


def whole(message, reason="stop", **more) -> bytes:
    return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": reason}], **more}).encode()


HI, THERE, STOP, DONE = piece({"content": "Hi"}), piece({"content": " there"}), piece({}, "stop"), data(b"[DONE]")
END = STOP + DONE
PARTS = [{"type": "text", "text": "Hi"}, {"type": "thinking", "thinking": "hm"}, {"type": "text", "text": " there"}]

WHOLE_ANSWERS = {
    "choices null": [HI, data({"choices": None}), THERE, END],
    "choices empty": [HI, data({"choices": []}), THERE, END],
    "choices missing": [HI, data({"object": "x"}), THERE, END],
    "a choice null": [HI, data({"choices": [None]}), THERE, END],
    "a ping": [data({"type": "ping"}), HI, THERE, END],
    "a ping of plain text": [data(b"ping"), HI, THERE, END],
    "a ping as a number": [data(1), data(b"null"), HI, THERE, END],
    "delta null": [HI, piece(None), THERE, piece(None, "stop"), DONE],
    "delta missing": [HI, data({"choices": [{"index": 0}]}), THERE, END],
    "content null": [piece({"content": None}), HI, THERE, END],
    "content as parts": [piece({"content": PARTS}), END],
    "comments": [b": hello\n\n", HI, b":\n", THERE, b": bye\n\n", END],
    "a BOM": [b"\xef\xbb\xbf", HI, THERE, END],
    "CRLF": [(HI + THERE + END).replace(b"\n", b"\r\n")],
    "no blank lines": [(HI + THERE + END).replace(b"\n\n", b"\n")],
    "no space after data:": [(HI + THERE + END).replace(b"data: ", b"data:")],
    "JSON over several lines": [b'data: {"choices": [{"delta":\ndata: {"content": "Hi there"}}]}\n\n', END],
    "a second choice": [HI, data({"choices": [{"index": 1, "delta": {"content": "No"}}]}), THERE, END],
    "a second choice first": [
        data({"choices": [{"index": i, "delta": {"content": t}} for i, t in ((1, "No"), (0, "Hi there"))]}),
        END,
    ],
    "an error of null": [data({"error": None, "choices": [{"delta": {"content": "Hi there"}}]}), END],
    "[DONE] without a reason": [HI, THERE, DONE],
    "[DONE] without an end of line": [HI, THERE, DONE.strip()],
    "a reason, then a cut": [HI, THERE, STOP],
    "the reason with the last text": [HI, piece({"content": " there"}, "stop")],
    "a reason with every chunk": [piece({"content": "Hi"}, "stop"), piece({"content": " there"}, "stop"), DONE],
    "a whole completion": [whole({"content": "Hi there"})],
    "a whole completion, over lines": [json.dumps(json.loads(whole({"content": PARTS})), indent=1).encode()],
    "a whole completion without a reason": [whole({"content": "Hi there"}, None)],
    "a whole completion in an event": [data(whole({"content": "Hi there"}, None))],
    "the shape of older completions": [data({"choices": [{"index": "0", "text": "Hi there"}]}), END],
    "a delta that is a text": [piece("Hi"), piece(" there"), END],
    "parts of OpenAI's newer API": [piece({"content": [{"type": "output_text", "text": "Hi there"}]}), END],
    "parts without a type": [piece({"content": [{"text": "Hi"}, {"text": " there"}, {"thinking": "hm"}]}), END],
    "one part alone": [piece({"content": {"text": "Hi there"}}), END],
    "a delta that is a list": [piece([{"content": "Hi"}]), piece([" there"]), END],
    "choices as an object": [data({"choices": {"delta": {"content": "Hi there"}}}), END],
    "a whole message, and a delta of null": [piece(None, "stop", message={"content": "Hi there"})],
    "a whole message, and an empty delta": [piece({}, "stop", message={"content": "Hi there"})],
    "a message that repeats it": [HI, THERE, piece({}, "stop", message={"content": "Hi there"}), DONE],
    "a message that grows": [piece({}, message={"content": ""}), HI, piece({"content": " there"}, message={}), END],
    "words that were not the last": [HI, data(b"upstream is slow"), data({"detail": "Patience"}), THERE, END],
    "a whole completion with a BOM": [b"\xef\xbb\xbf" + whole({"content": "Hi there"})],
}


@pytest.mark.parametrize("body", WHOLE_ANSWERS.values(), ids=WHOLE_ANSWERS)
def test_the_text_is_the_answer(fake, body):
    assert answered(fake, (200, SSE, body)) == ("stop", "Hi there", None)


@pytest.mark.parametrize("stream", [True, False])
def test_a_whole_answer_where_none_was_asked_for_and_the_other_way_round(fake, stream):
    assert answered(fake, (200, JSON, [whole({"content": PARTS})]), stream=stream)[:2] == ("stop", "Hi there")
    assert answered(fake, (200, SSE, [HI, THERE, END]), stream=stream)[:2] == ("stop", "Hi there")


ROUTED = data(
    {
        "error": {"code": 429, "message": "Provider returned error", "metadata": {"raw": "Too hot"}},
        "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}],
    }
)
FAILURES = {
    "OpenAI's error": ([data({"error": {"code": 429, "message": "Too fast"}}), DONE], "RateLimited", "", "Too fast"),
    "an error of text": ([HI, data({"error": "Too fast"})], "ServerError", "Hi", "Too fast"),
    "vLLM's error": ([HI, data({"object": "error", "message": "Full", "code": 400})], "BadRequest", "Hi", "'Full'"),
    "vLLM's nested": ([data({"object": "error", "message": {"detail": [{"msg": "Odd"}]}})], "ServerError", "", "Odd"),
    "an error in a choice": (
        [HI, piece({}, "error", error={"code": 502, "message": "Idle"})],
        "ServerError",
        "Hi",
        "Idle",
    ),
    "beside text": (
        [data({"choices": [{"delta": {"content": "Hi"}}], "error": {"message": "Idle"}})],
        "ServerError",
        "Hi",
        "Idle",
    ),
    "reason error": ([HI, piece({}, "error"), DONE], "ServerError", "Hi", "reported an error"),
    "event: error, JSON": ([HI, b'event: error\ndata: {"message": "Idle"}\n\n'], "ServerError", "Hi", "Idle"),
    "event: error, text": ([HI, b"event: error\ndata: backend is away\n\n"], "ServerError", "Hi", "backend is away"),
    "event: error, cut": ([HI, b"event: error\r\ndata: backend is away"], "ServerError", "Hi", "backend is away"),
    "OpenRouter's, in mid-stream": ([HI, ROUTED], "RateLimited", "Hi", "'Provider returned error: Too hot'"),
    "OpenRouter's, whole": ([ROUTED.removeprefix(b"data: ")], "RateLimited", "", "'Provider returned error: Too hot'"),
    "JSON in a text": ([data({"error": {"message": '{"error": {"message": "Full"}}'}})], "ServerError", "", "'Full'"),
    "an error line, then a cut": ([HI, b'error: {"code": 400, "message": "Full"}\n\n'], "BadRequest", "Hi", "'Full'"),
    "bare JSON, then a cut": ([HI, b'{"error": {"message": "Full", "code": 400}}\n'], "BadRequest", "Hi", "'Full'"),
    "JSON over lines, then a cut": ([HI, b'{\n"error": {\n"message": "Full"\n}\n}'], "ServerError", "Hi", "'Full'"),
    "plain words, then a cut": ([HI, b"Internal Server Error"], "ServerError", "Hi", "'Internal Server Error'"),
    "words as data, then a cut": ([HI, b"data: upstream is away\n\n"], "ServerError", "Hi", "'upstream is away'"),
    "a detail, then a cut": ([HI, data({"detail": "Lost"})], "ServerError", "Hi", "'Lost'"),
    "a message, then a cut": ([HI, data({"message": "Full", "code": 429})], "RateLimited", "Hi", "'Full'"),
    "a page, then a cut": ([HI, b"<html>\n504\n</html>"], "ConnectionDropped", "Hi", "sent a web page in the middle"),
    "a ping, then a cut": ([HI, data(b"keep-alive")], "ConnectionDropped", "Hi", "broke off"),
    "a detail, then [DONE]": ([data({"detail": "Model is loading"}), DONE], "ServerError", "", "'Model is loading'"),
    "a ping, then [DONE]": ([data(b"ping"), DONE], "EmptyAnswer", "", "answered nothing"),
    "words alone": ([data(b"backend is away")], "ServerError", "", "backend is away"),
    "a list": ([b'[{"error": {"code": 404, "message": "No such model"}}]'], "ModelNotFound", "", "No such model"),
    "an error in the body": ([b'{"error": "Unexpected endpoint"}'], "ServerError", "", "Unexpected endpoint"),
    "a detail in the body": ([b'{"detail": "Not Found"}'], "ServerError", "", "Not Found"),
    "plain words": ([b"Upstream is away\n"], "ServerError", "", "Upstream is away"),
    "a page": ([b"<!doctype html>\n<p>data: x\n"], "BadAnswer", "", "not a chat completion"),
    "nothing": ([], "BadAnswer", "", "not a chat completion"),
    "comments alone": ([b": x\n\n"], "BadAnswer", "", "not a chat completion"),
    "other JSON": ([b'{"models": []}'], "BadAnswer", "", "not a chat completion"),
    "JSON too deep": ([data(b'{"choices": ' + b"[" * 100_000)], "BadAnswer", "", "not a chat completion"),
    "JSON too deep, closed": ([b"[" * 100_000 + b"]" * 100_000], "BadAnswer", "", "not a chat completion"),
    "a garbled chunk": ([HI, data(b'{"choices": [{"delta": {"con'), THERE, END], "BadAnswer", "Hi", "completion"),
    "cut": ([HI, THERE], "ConnectionDropped", "Hi there", "broke off"),
    "cut in a chunk": ([HI, THERE[:30]], "ConnectionDropped", "Hi", "broke off"),
    "[DONE] alone": ([DONE], "EmptyAnswer", "", "answered nothing"),
    "white space": ([piece({"content": "\n"}), END], "EmptyAnswer", "\n", "answered nothing"),
    "reasoning alone": ([piece({"reasoning_content": "Hm"}), END], "EmptyAnswer", "", "thought, but answered nothing"),
}


@pytest.mark.parametrize(("body", "error", "text", "says"), FAILURES.values(), ids=FAILURES)
def test_a_failure_keeps_the_text_and_tells_the_endpoints_words(fake, body, error, text, says):
    name, came, message = answered(fake, (200, SSE, body))
    assert (name, came) == (error, text)
    assert says in message
    assert "answered 500" not in message  # a status that was never sent


def test_a_refusal_is_the_text(fake):
    refused = [piece({"refusal": "I can't"}), piece({"refusal": " help."}), END]
    assert answered(fake, (200, SSE, refused))[:2] == ("refusal", "I can't help.")
    reply = whole({"content": None, "refusal": "I can't help."})
    assert answered(fake, (200, JSON, [reply]), stream=False)[:2] == ("refusal", "I can't help.")
    filtered = [piece({"refusal": "No."}, "content_filter"), DONE]
    assert answered(fake, (200, SSE, filtered))[:2] == ("content_filter", "No.")


def test_the_body_is_cut_after_the_reason(fake):
    body = HI + STOP
    reply = (200, SSE | {"Transfer-Encoding": "chunked"}, [b"%x\r\n%s\r\n" % (len(body), body)])
    assert answered(fake, reply)[:2] == ("stop", "Hi")


@pytest.mark.parametrize("after", [[60.0], [0.1, b": heartbeat\n\n"] * 600, [0.1, data({"type": "ping"})] * 600])
def test_after_the_reason_there_is_a_short_grace_only(fake, after, monkeypatch):
    monkeypatch.setattr(room, "GRACE", 0.5)
    monkeypatch.setattr("time.sleep", lambda seconds: fake.gone.wait(seconds) if seconds > 1 else wait(seconds))
    wait = fake.gone.__class__().wait
    assert answered(fake, (200, SSE, [HI, THERE, STOP, *after]), timeout=30.0)[:2] == ("stop", "Hi there")
    fake.gone.set()


def test_usage_comes_within_the_grace(fake):
    usage = data({"usage": {"total_tokens": 3}})
    assert answered(fake, (200, SSE, [HI, STOP, 0.2, usage, DONE])) == ("stop", "Hi", {"total_tokens": 3})


@pytest.mark.parametrize("before", [[], [HI]])
def test_heartbeats_are_no_life(fake, before):
    beats = [0.1, b": heartbeat\n\n"] * 100
    first = 20.0 if before else 0.5  # seconds: that comes, however late
    name, text, message = answered(fake, (200, SSE, [*before, *beats]), timeout=0.5, first_timeout=first)
    assert (name, text) == ("Stalled", "Hi" if before else "")
    assert "0.5 s" in message


@pytest.mark.parametrize("beat", [piece({"content": ""}), piece({}), b"x", b"foo\n", piece({"role": "assistant"})])
@pytest.mark.parametrize("before", [[], [HI]])
def test_what_holds_nothing_is_no_life_either(fake, before, beat):
    first = 20.0 if before else 0.5  # seconds: that comes, however late
    name, text, _ = answered(fake, (200, SSE, [*before, *[0.1, beat] * 100]), timeout=0.5, first_timeout=first)
    assert (name, text) == ("Stalled", "Hi" if before else "")


def test_a_tool_call_is_life(fake):
    calls = [0.4, piece({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]})] * 5
    assert answered(fake, (200, SSE, [*calls, HI, END]), timeout=1.5)[:2] == ("stop", "Hi")


def test_reasoning_is_life(fake):
    thoughts = [0.4, piece({"reasoning_content": "Hm"})] * 5
    assert answered(fake, (200, SSE, [*thoughts, HI, END]), timeout=1.5)[:2] == ("stop", "Hi")


def test_the_first_token_may_take_longer(fake):
    slow = [piece({"role": "assistant"}), 1.5, HI, END]
    assert answered(fake, (200, SSE, slow), timeout=1.0, first_timeout=20.0)[:2] == ("stop", "Hi")
    stalled = answered(fake, (200, SSE, [HI, 0.9, END]), timeout=0.3, first_timeout=20.0)
    assert stalled[:2] == ("Stalled", "Hi") and "0.3 s" in stalled[2]


def test_times_come_from_the_environment(fake, monkeypatch):
    def times(**options):
        begin = complete("x", source="openai", **options)._begin
        return begin.keywords["timeout"], begin.keywords["first_timeout"]

    assert times() == (30.0, 120.0)
    assert times(stream=False) == (30.0, 600.0)
    assert times(timeout=5.0) == (5.0, 5.0)
    assert times(first_timeout=90.0) == (30.0, 90.0)
    monkeypatch.setenv("LLMSTREAM_TIMEOUT", "20")
    monkeypatch.setenv("LLMSTREAM_FIRST_TIMEOUT", "900")
    assert times() == (20.0, 900.0)
    assert times(stream=False) == (20.0, 900.0)
    for wrong in ("x", "0", "-1", "nan", "inf", "1e9"):
        monkeypatch.setenv("LLMSTREAM_TIMEOUT", wrong)
        with pytest.raises(ModelError, match="LLMSTREAM_TIMEOUT") as failed:
            complete("x", source="openai")
        assert failed.value.error == "BadSettings"


def test_usage_becomes_a_flat_dict_of_numbers(fake):
    details = {"prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 0, "x": {"y": 1}}}
    more = {"completion_tokens_details": {"audio_tokens": 9}, "cost": 0.5, "cache": True, "note": "x"}
    odd = {"bad": float("nan"), "endless": float("inf"), "huge": 10**400, "a\x00\ud83d\nb": 1}
    usage = {"prompt_tokens": 5} | details | more | odd
    assert answered(fake, (200, SSE, [HI, STOP, data({"usage": usage}), DONE]))[2] == {
        "prompt_tokens": 5,
        "cost": 0.5,
        "a b": 1,
        "cached_tokens": 4,
        "audio_tokens": 0,
        "completion_tokens_details_audio_tokens": 9,
    }
    many = {str(n): n for n in range(1000)}
    assert len(answered(fake, (200, SSE, [HI, STOP, data({"usage": many}), DONE]))[2]) == 32
    for odd in ([], "x", 1, None, {}):
        assert answered(fake, (200, SSE, [HI, STOP, data({"usage": odd}), DONE]))[2] is None


def test_the_reason_is_a_short_text(fake):
    assert answered(fake, (200, SSE, [HI, piece({}, "a\x1b[1m\ud83d b" + "x" * 99), DONE]))[0] == "a [1m b" + "x" * 33
    assert answered(fake, (200, SSE, [HI, piece({}, {"type": "stop"}), DONE]))[0] == "stop"


# ---------------------------------------------------------------------------------------- refusals with a status


@pytest.mark.parametrize(
    ("status", "headers", "body", "error", "says"),
    [
        (402, {}, b'{"error": {"message": "Insufficient Balance"}}', "PaymentRequired", "account"),
        (422, {}, b'{"detail": [{"loc": ["body", "n"], "msg": "Extra"}]}', "BadRequest", "'body.n: Extra'"),
        (422, {}, b'{"detail": "Odd"}', "BadRequest", "'Odd'"),
        (400, {}, b'[{"error": {"message": "Key\\n\\n  is odd"}}]', "BadRequest", "'Key is odd'"),
        (400, {}, b'\xef\xbb\xbf{"error": "Odd"}', "BadRequest", "'Odd'"),
        (418, {}, b'{"object": "error", "message": "Tea"}', "BadRequest", "'Tea'"),
        (503, {"Retry-After": "7"}, b"", "ServerError", "wait 7 s, then"),
        (
            429,
            {"Retry-After": "Wed, 21 Oct 2026 09:28:00 +0200"},
            b"{}",
            "RateLimited",
            "until 2026-10-21 07:28:00 UTC",
        ),
        (429, {"Retry-After": "soon"}, b"{}", "RateLimited", "answered 429: ask again"),
        (500, {}, b"<html>" + b"x" * 999, "ServerError", "answered 500: ask again"),
        (500, {}, b'{"error": {"message": "' + b"x" * 999 + b'"}}', "ServerError", "'" + "x" * 300 + "'"),
        (400, {}, b"[" * 100_000, "BadRequest", "answered 400: change"),
        (302, {"Location": "/elsewhere"}, b"", "BadAddress", "has moved to http://127.0.0.1"),
        (307, {"Location": "http://localhost:1/v1"}, b"", "BadAddress", "has moved to http://localhost:1/v1: set"),
        (308, {"Location": "https://example.com/v1?a=b"}, b"", "BadAddress", "https://example.com/v1: set"),
        (304, {}, b"", "BadAnswer", "answered 304"),
        (405, {}, b"", "BadAddress", "check its address"),
        (401, {}, b'{"message": "The project is archived"}', "Unauthorized", "'The project is archived'"),
        (401, {}, b'{"message": "Bad: sk-pr***BCD"}', "Unauthorized", "answered 401: check"),
        (401, {}, b'{"message": "Bad: sk-proj-..."}', "Unauthorized", "answered 401: check"),
        (401, {}, b'{"message": "Bad: ' + KEY[-8:].encode() + b'"}', "Unauthorized", "answered 401: check"),
        (401, {}, b'{"message": "Bad: ' + KEY.encode() + b'"}', "Unauthorized", "answered 401: check"),
    ],
)
def test_a_refusal_is_told_in_its_own_words(fake, status, headers, body, error, says):
    name, _, message = answered(fake, (status, JSON | headers | {"Content-Length": str(len(body))}, [body]))
    assert name == error
    assert says in message
    assert len(fake.requests) == 1


@pytest.mark.parametrize("timeout", [0.3, 30.0])
def test_a_refusal_whose_words_do_not_end_is_told_all_the_same(fake, monkeypatch, timeout):
    monkeypatch.setattr(room, "REFUSAL", (100_000, 0.5))
    length = {"Content-Length": "999"}
    name, _, message = answered(fake, (503, length, [b"Full up", *[0.1, b" "] * 100]), timeout=timeout)
    assert (name, "answered 503, 'Full up'" in message) == ("ServerError", True)


@pytest.mark.parametrize("packed", [False, True])
def test_no_more_of_a_refusal_is_read_than_its_words(fake, monkeypatch, packed):
    monkeypatch.setattr(room, "REFUSAL", (100_000, 30.0))
    kept, once = [], room.body_fault
    monkeypatch.setattr(room, "body_fault", lambda body: kept.append(len(body)) or once(body))
    endless = (b"Full up " * 100_000 for _ in range(1000))
    body = [gzip.compress(b"Full up " * 4_000_000)] if packed else endless
    name, _, message = answered(fake, (500, {"Content-Encoding": "gzip"} if packed else {}, body), timeout=60.0)
    assert (name, "Full up Full" in message, kept) == ("ServerError", True, [100_000])
    assert packed or fake.gone.wait(60)


def test_a_redirect_is_followed_whatever_its_body(fake):
    moved = (307, {"Location": "/v2/chat"}, (b"moved " * 100_000 for _ in range(100_000)))
    assert answered(fake, moved, (200, SSE, [HI, END]))[:2] == ("stop", "Hi")


def test_a_redirect_on_the_same_host_is_followed(fake):
    moved = (307, {"Location": "/v2/chat", "Content-Length": "0"}, [])
    assert answered(fake, moved, (200, SSE, [HI, END]))[:2] == ("stop", "Hi")
    (_, _, asked), (path, headers, again) = fake.requests
    assert path == "/v2/chat"
    assert asked == again
    assert headers["authorization"] == f"Bearer {KEY}"
    name, _, message = answered(fake, *[moved] * 30)
    assert (name, "from one address to the next" in message) == ("BadAddress", True)


def test_what_can_be_left_out_is_left_out_once(fake):
    options = (400, JSON, [b'{"message": "stream_options: Extra inputs are not permitted"}'])
    role = (422, JSON, [b'{"detail": "System role not supported"}'])
    assert answered(fake, options, role, (200, SSE, [HI, END]), topic="tea")[:2] == ("stop", "Hi")
    first, second, third = [request for _, _, request in fake.requests]
    assert "stream_options" in first and "stream_options" not in second
    assert [message["role"] for message in second["messages"]] == ["system", "user"]
    (message,) = third["messages"]
    assert message["role"] == "user"
    assert re.fullmatch(r"You are an expert .* tea.*\n\nWhy\?", message["content"], re.DOTALL)
    assert answered(fake, options, options)[0] == "BadRequest"
    assert answered(fake, role, role)[0] == "BadRequest"
    assert len(fake.requests) == 7


def test_azures_query_belongs_to_every_request(fake, monkeypatch):
    url = f"http://127.0.0.1:{fake.server_port}/openai/deployments/y?api-version=2024-10-21"
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    assert answered(fake, (200, SSE, [HI, END]))[:2] == ("stop", "Hi")
    path, headers, _ = fake.requests[0]
    assert path == "/openai/deployments/y/chat/completions?api-version=2024-10-21"
    assert headers["api-key"] == KEY


# ---------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize("at", range(250, 301, 5))
def test_no_cut_shows_a_part_of_the_key(fake, at):
    body = json.dumps({"error": {"message": "x" * at + KEY + "y"}}).encode()
    _, _, message = answered(fake, (500, JSON, [body]))
    assert KEY[:4] not in message


def test_a_longer_part_of_the_key_is_hidden_and_a_vendors_own_stars_stay():
    endpoint = Endpoint("openai", "It", "m", lambda: "", secrets=(KEY, "Basic123"))
    assert endpoint.mask(f"<{KEY[:-1]}> <{KEY[5:17]}> <{KEY}{KEY}> Basic123") == "<***> <***> <***> ***"
    for shown in ("sk-pr…ABCD", "sk-proj-***BCD", KEY[:11], "Basic"):
        assert endpoint.mask(shown) == shown


ASKED = {
    "raw": lambda text, request: text,
    "as JSON": lambda text, request: json.dumps(request, separators=(",", ":")),
    "as Python": lambda text, request: repr(request),
    "the parameters": lambda text, request: repr(request["user"]),
}


@pytest.mark.parametrize("quoted", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("status", [400, 200])
def test_what_an_endpoint_quotes_of_the_request_is_not_for_all_who_see_the_answer(fake, quoted, status):
    text = 'The code is "4711".\nOnly\nAnna\nmay\nknow\nof\nit, and nobody beside her.'
    request = {"messages": [{"role": "user", "content": text}], "user": "Anna of the fourth floor, room 12"}
    words = f"Too hot: temperature with {quoted(text, request)} is above 1"
    fake.replies[:] = [(status, JSON, [json.dumps({"error": {"message": words, "code": 400}}).encode()])]
    with pytest.raises(ModelError) as failed:
        list(complete(messages=request["messages"], params={"user": request["user"]}, source="openai"))
    assert re.search(r"Too hot: temperature with .*\*\*\*.* is above 1", str(failed.value))
    assert not re.search("4711|Only|nobody|floor", str(failed.value))


FORMS = {
    "base64": base64.b64encode(KEY.encode()).decode(),
    "a user's": base64.b64encode(f"me:{KEY}".encode()).decode(),
    "a password's": base64.b64encode(f":{KEY}".encode()).decode(),
    "no password's": base64.b64encode(f"{KEY}:".encode()).decode(),
    "for addresses": base64.urlsafe_b64encode(b"Bearer " + KEY.encode()).decode(),
    "hex": KEY.encode().hex(),
    "percent": "".join(f"%{ord(char):02X}" for char in KEY),
    "capitals": KEY.upper(),
    "small": KEY.lower(),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_key_is_hidden_however_it_is_written(fake, form):
    _, _, message = answered(fake, (400, JSON, [json.dumps({"message": f"İ bad <{form}>"}).encode()]))
    assert re.search(r"'İ bad <.{0,10}\*\*\*.{0,4}>'", message)


def test_a_base64_that_is_told_for_addresses_is_hidden_too():
    endpoint = Endpoint("openai", "It", "m", lambda: "", secrets=("~~~???>>>~~~???>>>",))
    assert endpoint.mask(base64.urlsafe_b64encode(b"~~~???>>>~~~???>>>").decode()) == "***"


def test_the_key_is_hidden_wherever_the_endpoint_writes_it(fake):
    usage = data({"usage": {KEY: 1, "total_tokens": 2}})
    body = [
        piece({"refusal": f"Not with {KEY[:20]}"}),
        piece({"refusal": KEY[20:]}),
        piece({}, f"x {KEY}"),
        usage,
        DONE,
    ]
    assert answered(fake, (200, SSE, body)) == ("x ***", "Not with ***", {"***": 1, "total_tokens": 2})


def test_the_key_in_the_text_stays(fake):
    """Whoever asks told the model."""
    assert answered(fake, (200, SSE, [piece({"content": KEY}), END]))[:2] == ("stop", KEY)


@pytest.mark.parametrize("key", ["ollama", "x", "e", "none", "lm-studio"])
def test_a_key_that_is_a_word_is_not_masked(fake, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    body = json.dumps({"error": {"message": f"not found, try {key} pull"}}).encode()
    _, _, message = answered(fake, (404, JSON, [body]))
    assert f"not found, try {key} pull" in message
    assert "choose another model, or see the address" in message


# ---------------------------------------------------------------------------------------- any stream, cut anywhere

words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
nothing = st.sampled_from(
    [
        b": comment\n\n",
        b"\n",
        data({"choices": None}),
        data({"choices": [], "usage": {"total_tokens": 1}}),
        data({"type": "ping"}),
        data(b"ping"),
        piece(None),
        piece({}),
        piece({"content": None}),
        piece({"role": "assistant", "content": ""}),
        data({"choices": [{"index": 1, "delta": {"content": "second"}, "finish_reason": "stop"}]}),
    ]
).map(lambda body: (body, "", None))
texts = st.one_of(
    words.map(lambda text: (piece({"content": text}), text, None)),
    words.map(lambda text: (piece({"content": [{"type": "text", "text": text}, {"type": "x"}]}), text, None)),
    words.map(lambda text: (piece({"refusal": text}), text, None)),
    words.map(lambda text: (data({"choices": [{"delta": {"content": text}}]}).replace(b"\n", b"\r\n"), text, None)),
)
ends = st.sampled_from(
    [
        (STOP, "", "reason"),
        (piece(None, "length"), "", "reason"),
        (DONE, "", "done"),
        (data({"error": {"message": "oh"}}), "", "failed"),
        (b"event: error\ndata: oh\n\n", "", "failed"),
        (piece({}, "error"), "", "failed"),
    ]
)


def cut(body: bytes, places: list[int]) -> list[bytes]:
    at = sorted(place % (len(body) + 1) for place in places)
    return [body[a:b] for a, b in zip([0, *at], [*at, len(body)], strict=True)]


@given(st.lists(st.one_of(texts, nothing, ends)), st.lists(st.integers(0, 9999), max_size=30), st.booleans())
def test_any_stream_cut_anywhere(events, places, bom):
    body = b"\xef\xbb\xbf" * bom + b"".join(event for event, _, _ in events)
    reader, came = Reader(), []
    for some in cut(body, places):
        came += reader.feed(some)
    came += reader.finish()
    expected, states = "", set()
    for _, text, state in events:
        if states & {"done", "failed"}:
            break  # what follows doesn't count
        expected += text
        states.add(state)
    assert "".join(part if isinstance(part, str) else part.text for part in came) == expected
    assert all(came)
    assert reader.done == ("done" in states)
    assert (reader.failed is not None) == (
        "failed" in states or (not expected and not states - {None} and plain(events))
    )
    assert reader.reason is not None or "reason" not in states
    assert reader.written == bool(expected.strip())


def plain(events) -> bool:
    """Whether nothing came but an event of plain words, which then are all that the endpoint said."""
    return any(event == data(b"ping") for event, _, _ in events) and not any(
        b'"choices": [{' in event for event, _, _ in events
    )


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_no_bytes_make_it_fail(body, places):
    reader = Reader()
    for some in cut(body, places):
        reader.feed(some)
    reader.finish()
    body_fault(body.decode(errors="replace"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("error"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "choices",
                    "delta",
                    "message",
                    "content",
                    "error",
                    "code",
                    "type",
                    "object",
                    "usage",
                    "finish_reason",
                    "index",
                    "detail",
                    "loc",
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(st.lists(json_values, max_size=5))
def test_no_json_makes_it_fail(values):
    reader = Reader()
    texts = [text for value in values for text in reader.feed(data(value))] + reader.finish()
    assert all(isinstance(text, str) and text for text in texts)
    assert reader.reason is None or 0 < len(reader.reason) <= 40
    assert reader.failed is None or isinstance(reader.failed.words, str)
    assert all(type(value) in (int, float) for value in reader.usage.values())


def test_pings_and_blank_lines_take_no_memory():
    reader = Reader()
    for body in (HI, *[data(b"ping") + b"\n\nodd\n" + piece({})] * 1000):
        reader.feed(body)
    assert not any(reader._body)
    assert not reader._size


def test_pings_of_plain_words_are_no_error(fake):
    beats = [0.1, data(b"ping")] * 100
    assert answered(fake, (200, SSE, beats), timeout=0.5)[:2] == ("Stalled", "")


def test_a_line_without_an_end_is_given_up():
    reader = Reader()
    for _ in range(20):
        reader.feed(b"data: " + b"x" * 1_000_000)
    assert reader.malformed


@pytest.mark.parametrize("line", [b"data: 1,\n", b"a\n"])
def test_an_event_of_too_many_lines_is_given_up(line):
    reader, parsed = Reader(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "_parsed", lambda text: parsed.append(len(text)))
        reader.feed(HI + b"data: [1,\n")
        for _ in range(200):
            reader.feed(line * 1000)
    assert reader.malformed
    assert sum(parsed) < 1000  # and not each line with all before it


def test_a_huge_body_leaves_the_loop_to_other_requests(fake):
    """Unpacked in one go, it is read in pieces, with a turn for the others after each."""
    turns, reader = [], Reader()

    async def unpacked():
        yield b"x" * 10 * room.PIECE

    async def other():
        while True:
            turns.append(None)
            await asyncio.sleep(0)

    async def read():
        beside = asyncio.create_task(other())
        async for some in room._small(unpacked()):
            assert len(some) <= room.PIECE
            reader.feed(some)
        beside.cancel()

    asyncio.run(read())
    assert len(turns) >= 10
    body = gzip.compress(b"data: [1,\n" + b"data: 1,\n" * 1_500_000)
    reply = (200, SSE | {"Content-Encoding": "gzip"}, [body])
    failed, _, says = answered(fake, reply)
    assert (failed, "more than 16,000,000 bytes, or 100,000 lines, in one piece: ask in" in says) == ("BadAnswer", True)


def test_what_is_too_large_is_named(fake):
    failed, refused, says = answered(fake, (200, SSE, [HI, piece({"refusal": "No " * 7_000}), END]))
    assert (failed, len(refused)) == ("BadAnswer", 20_002)
    assert "sent a refusal of more than 20,000 characters: ask in other words" in says
    failed, text, says = answered(fake, (200, SSE, [HI, piece({"content": "x" * 16_000_000}), END]), timeout=30.0)
    assert (failed, text) == ("BadAnswer", "Hi")
    assert "sent more than 16,000,000 bytes, or 100,000 lines, in one piece: ask in other words" in says


def test_a_refusal_without_end_is_given_up():
    reader = Reader()
    for _ in range(30):
        reader.feed(piece({"refusal": "x" * 1000}))
    assert reader.malformed
