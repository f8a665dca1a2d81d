"""The scripted model: an OpenAI-compatible server that streams prepared answers, with faults on demand."""

from __future__ import annotations

import hmac
import json
import re
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from http.server import BaseHTTPRequestHandler
from itertools import chain, islice
from socketserver import ThreadingTCPServer
from typing import Any

from llmstream_nb.llm import prepared
from llmstream_nb.llm.local import KEY
from llmstream_nb.llm.messages import question_in

WANTS_KEY = "this model wants its key: OpenAI(base_url=scripted.server().url, api_key=scripted.server().key)"
ALONE = {"reason": 24}  # what an option stands for that has a number, and is given without one
RANGES = {
    "pace": (0, 100_000),
    "think": (0, 600_000),
    "reason": (0, 100_000),
    "piece": (1, 10_000),
    "status": (400, 599),
}  # else to a million


@dataclass
class Script:
    """How to answer, as the model's name says it: `scripted`, `scripted:pace=200,drop=12`, …

    The text is the prepared answer unless `long` is chosen. Where a request offers tools, and the question is one that
    needs them, it reasons, calls them one after the other, and tells what they gave back. `drop`, `stall` and `length`
    happen after that many chunks, of whatever kind. With `goes_on` it goes on from a last message that is the
    assistant's.
    """

    pace: int = 40  # chunks a second; 0: as fast as possible
    think: int | None = None  # milliseconds before the first chunk; else 400, like a model's, and 0 with pace=0
    piece: int | None = None  # UTF-16 units in a chunk (1 halves every emoji); else about a token
    long: int | None = None  # the answer is that many numbered chunks: "0 1 2 3 …"
    drop: int | None = None  # cut the connection
    stall: int | None = None  # keep silent until the client leaves
    length: int | None = None  # end there with finish_reason "length"
    reason: int | None = None  # think aloud first, in that many words
    refuse: bool = False  # refuse, in the place where models have that beside the text
    silence: bool = False  # accept the request and never answer
    status: int | None = None  # refuse the request with this HTTP status
    goes_on: bool = False  # send only what follows a last message that is the assistant's, where the answer begins so

    @classmethod
    def parse(cls, model: str) -> Script:
        """Read a model name. Raises ValueError for an option that does not exist or has no sensible value."""
        script = cls()
        kinds = {field.name: field.default for field in fields(cls)}
        for option in filter(None, model.partition(":")[2].split(",")):
            name, _, value = option.strip().partition("=")
            if name not in kinds:
                raise ValueError(f"unknown option {name!r} in {model!r}; there are {', '.join(kinds)}")
            low, high = RANGES.get(name, (0, 1_000_000))
            if not value and (name in ALONE or kinds[name] is False):
                setattr(script, name, ALONE.get(name, True))
            elif kinds[name] is not False and value.isdecimal() and len(value) < 10 and low <= int(value) <= high:
                setattr(script, name, int(value))
            else:
                raise ValueError(f"bad option {option!r} in {model!r}; a number goes from {low} to {high}")
        return script

    def chunks(self, question: str) -> Iterator[str]:
        """The answer to `question`, in the chunks in which it is sent, each made when it is wanted."""
        if self.long is not None:
            return (f"{n} ".ljust(self.piece or 0, "x") for n in range(self.long))
        return iter(split(prepared.reply(question), self.piece))

    def deltas(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The whole answer, each chunk as a delta: what it thinks, then a refusal, a call, or the text."""
        tools = [tool["function"]["name"] for tool in request.get("tools") or ()]
        turn = prepared.turn(request["messages"], tools)
        thought = turn.reasoning if turn else prepared.reasoning(self.reason or 0)
        if self.refuse:
            rest = _each("refusal", split(prepared.refusal(), self.piece))
        elif turn and turn.call:
            rest = _call(turn, self.piece)
        else:
            rest = _each("content", split(turn.text, self.piece) if turn else self._text(request["messages"]))
        return chain(_each("reasoning_content", split(thought, self.piece)), rest)

    def _text(self, messages: list[dict[str, Any]]) -> Iterator[str]:
        """The answer, or only what follows the text that it is to go on from, where it begins with that."""
        asked, last = [m["content"] for m in messages if m["role"] == "user"][-1], messages[-1]
        question = asked if isinstance(asked, str) else question_in(messages)  # it may be parts
        if self.goes_on and last["role"] == "assistant":
            whole, kept = "".join(self.chunks(question)), str(last["content"])
            if whole.startswith(kept):
                return iter(split(whole[len(kept) :], self.piece))
        return self.chunks(question)


def _each(name: str, chunks: Iterable[str]) -> Iterator[dict[str, Any]]:
    return ({name: chunk} for chunk in chunks)


def _call(turn: prepared.Turn, piece: int | None) -> Iterator[dict[str, Any]]:
    """A call as models send it: first its id and name, then its arguments, a text that grows."""
    head = {"index": 0, "id": f"call_{turn.number}", "type": "function"}
    yield {"tool_calls": [head | {"function": {"name": turn.call, "arguments": ""}}]}
    for chunk in split(turn.arguments, piece):
        yield {"tool_calls": [{"index": 0, "function": {"arguments": chunk}}]}


def split(text: str, piece: int | None = None) -> list[str]:
    """Cut `text` into chunks of about one token, or of `piece` UTF-16 units; joined they give it back."""
    if piece is None:
        return re.findall(r"\s*\S{1,4}|\s+", text)
    units, size = text.encode("utf-16-le"), 2 * piece
    return [units[at : at + size].decode("utf-16-le", "surrogatepass") for at in range(0, len(units), size)]


class Server(ThreadingTCPServer):
    """The server, listening on a free port of 127.0.0.1 from the moment it exists; it answers who has its `key`.

    It is no HTTPServer, which looks its own name up: that takes seconds on some networks.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128  # a whole workshop may press Ask at once

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.key = KEY
        self.answering: set[_Handler] = set()
        threading.Thread(target=self.serve_forever, name="scripted-model", daemon=True).start()

    @property
    def active(self) -> int:
        """How many completions are being answered now."""
        return len(self.answering)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: an error here is a client that left, which is what clients do."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # small chunks must leave at once

    def log_message(self, *args: Any) -> None:
        """Keep the notebook's output clean."""

    def do_POST(self) -> None:
        self.server.answering.add(self)
        try:
            self._complete()
        finally:
            self.server.answering.discard(self)

    def _is_known(self) -> bool:
        given = self.headers.get("Authorization", "").encode()
        return hmac.compare_digest(given, f"Bearer {self.server.key}".encode())

    def _complete(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self._is_known():
            self._refuse(401, WANTS_KEY)
            return
        try:
            request = json.loads(body)
            script = Script.parse(request["model"])
            deltas = script.deltas(request)  # raises, if the question is no text
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            self._refuse(400, f"{error}")
            return
        if script.silence:
            self._pause(None)
        if self.path != "/v1/chat/completions" or request["model"].partition(":")[0] != "scripted":
            self._refuse(404, f"there is no {request['model']!r} at {self.path}")
        elif script.status:
            # Like some real endpoints it quotes the key: nothing that the kit shows may do so.
            self._refuse(script.status, f"scripted refusal of {self.headers['Authorization']}")
        else:
            self._answer(script, request, deltas)

    def _answer(self, script: Script, request: dict[str, Any], deltas: Iterator[dict[str, Any]]) -> None:
        body = (self._events if request.get("stream") else self._whole)(script, request, deltas)
        first = next(body)  # a whole answer takes its time before its head is sent
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if request.get("stream") else "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")
        self.end_headers()
        for text in chain([first], body, [""]):
            data = text.encode()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _events(self, script: Script, request: dict[str, Any], deltas: Iterator[dict[str, Any]]) -> Iterator[str]:
        """The body of a streamed answer, event by event."""

        def event(**content: Any) -> str:
            return f"data: {json.dumps({**_head(request, 'chat.completion.chunk'), **content})}\n\n"

        def chunk(delta: dict[str, Any], reason: str | None = None) -> str:
            return event(choices=[{"index": 0, "delta": delta, "finish_reason": reason}])

        yield chunk({"role": "assistant", "content": ""})
        count, delta = 0, {}
        for delta in self._paced(script, islice(deltas, script.length)):
            count += 1
            yield chunk(delta)
        yield chunk({}, _reason(delta, deltas))
        if (request.get("stream_options") or {}).get("include_usage"):
            yield event(choices=[], usage=_usage(request, count))
        yield "data: [DONE]\n\n"

    def _whole(self, script: Script, request: dict[str, Any], deltas: Iterator[dict[str, Any]]) -> Iterator[str]:
        """The body of an answer in one piece."""
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        delta, count = {}, 0
        for delta in self._paced(script, islice(deltas, script.length)):
            count += 1
            for name, more in delta.items():
                if name == "tool_calls" and name in message:
                    message[name][0]["function"]["arguments"] += more[0]["function"]["arguments"]
                else:
                    message[name] = more if name == "tool_calls" else message.get(name, "") + more
        choice = {"index": 0, "finish_reason": _reason(delta, deltas), "message": message}
        head = _head(request, "chat.completion")
        yield json.dumps(head | {"usage": _usage(request, count), "choices": [choice]})

    def _paced(self, script: Script, chunks: Iterable[Any]) -> Iterator[Any]:
        """The chunks, each when it is due; the clock starts once, so that small delays don't add up."""
        think = script.think if script.think is not None else 400 * bool(script.pace)
        start = time.monotonic() + think / 1000
        for n, chunk in enumerate(chain(chunks, [None])):
            if n == script.stall:
                self._pause(None)
            if n == script.drop:
                raise ConnectionAbortedError("cut, as the script says")
            if chunk is not None:
                self._pause(start + (n / script.pace if script.pace else 0) - time.monotonic())
                yield chunk
        self.server.answering.discard(self)  # it has said all, before anybody can know

    def _pause(self, seconds: float | None) -> None:
        """Wait that long, or with None until the client leaves; leave as soon as it does."""
        self.connection.settimeout(None if seconds is None else max(seconds, 0))
        try:
            while self.connection.recv(1):  # a client has nothing more to say, so this only waits
                pass
            raise ConnectionAbortedError("the client left")
        except (BlockingIOError, TimeoutError):
            pass
        finally:
            self.connection.settimeout(None)

    def _refuse(self, status: int, message: str) -> None:
        kind = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}.get(status)
        error = {"message": message, "type": "server_error" if status >= 500 else "invalid_request_error"}
        body = json.dumps({"error": error | {"param": None, "code": kind}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        if status == 429:
            self.send_header("Retry-After", "20")
        self.end_headers()
        self.wfile.write(body)


def _reason(last: dict[str, Any], left: Iterator[dict[str, Any]]) -> str:
    """Why it ends after this delta, where these are left."""
    return "length" if next(left, None) is not None else "tool_calls" if "tool_calls" in last else "stop"


def _head(request: dict[str, Any], kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-scripted", "object": kind, "created": int(time.time()), "model": request["model"]}


def _usage(request: dict[str, Any], completion: int) -> dict[str, int]:
    prompt = sum(len(split(str(message.get("content")))) for message in request["messages"])
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


_start = cache(Server)
_starting = threading.Lock()  # cache alone might start two


def server() -> Server:
    """This process's scripted model, started by the first call."""
    with _starting:
        return _start()
