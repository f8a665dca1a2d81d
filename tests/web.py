"""Clients for the web server, as plain as can be: raw HTTP, event streams as a browser reads them, and a writer."""

from __future__ import annotations

import asyncio
import codecs
import http.client
import json
import re
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlencode

from llmstream_nb.answers.connection import names_of
from llmstream_nb.answers.record import new_record
from llmstream_nb.protocol.wire import Entry, EntryID
from llmstream_nb.web import WebServer

TOKEN = "a-token-of-the-tests"
PATIENCE = 60.0  # seconds


# ------------------------------------------------------------------------------------------------ one request


class Reply(NamedTuple):
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def raw(port: int, request: bytes) -> Reply:
    """Send these bytes, and read one reply."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock:
        sock.sendall(request)
        reply = http.client.HTTPResponse(sock, method=request.partition(b" ")[0].decode("latin-1"))
        reply.begin()
        return Reply(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())


def call(
    server: WebServer, method: str, path: str, body: Any = None, *, token: str | None = TOKEN, **headers: str
) -> Reply:
    """One request with the token in its address; `body` is bytes, or sent as JSON. `_` in a header's name is `-`."""
    return raw(server.port, head(server, method, path, body, token=token, **headers))


def head(server: WebServer, method: str, path: str, body: Any = None, *, token: str | None = TOKEN, **headers: str):
    """The request as bytes."""
    if token:
        path += ("&" if "?" in path else "?") + urlencode({"token": token})
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    given = {"Host": f"127.0.0.1:{server.port}", "Connection": "close"}
    if body is not None:
        given |= {"Content-Type": "application/json", "Content-Length": str(len(content))}
    given |= {name.replace("_", "-").title(): value for name, value in headers.items()}
    lines = [f"{method} /{path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1") + content


# ------------------------------------------------------------------------------------------------ event streams


class Sent(NamedTuple):
    """A server-sent event: its name and data, and the ID that the browser would come back with after it."""

    name: str
    data: str
    id: str
    own: bool  # whether it brought that ID itself


class Parser:
    """Reads an event stream as the HTML standard says, in pieces of any size."""

    def __init__(self) -> None:
        self.comments: list[str] = []
        self.retry = ""
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._rest, self._name, self._data, self._id, self._own = "", "", list[str](), "", False

    def feed(self, data: bytes) -> list[Sent]:
        *lines, self._rest = re.split("\r\n|\n|\r(?!$)", self._rest + self._decoder.decode(data))
        return [event for line in lines if (event := self._line(line))]

    def _line(self, line: str) -> Sent | None:
        if not line:
            made = Sent(self._name or "message", "\n".join(self._data), self._id, self._own) if self._data else None
            self._name, self._data, self._own = "", [], False
            return made
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not name:
            self.comments.append(value)
        elif name == "event":
            self._name = value
        elif name == "data":
            self._data.append(value)
        elif name == "id" and "\0" not in value:
            self._id, self._own = value, True
        elif name == "retry":
            self.retry = value
        return None


@dataclass
class Watcher:
    """What a browser's EventSource and its page do: watch, keep the text, and come back where a connection breaks."""

    server: WebServer
    answer_id: str
    last_id: str = ""
    text: str = ""
    header: bool = True  # how it says where it was: with Last-Event-ID, else with ?after=
    pause: float = 0.05  # seconds before it comes back
    missing: int = 0
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    ids: list[EntryID] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    clean: bool = False  # whether the last stream was ended, not cut
    alive: int = 0  # signs of life in silence

    @property
    def states(self) -> list[str]:
        return [data["state"] for name, data in self.events if name == "state"]

    @property
    def end(self) -> tuple[str, dict[str, Any]] | None:
        return next(((name, data) for name, data in self.events if name in ("end", "failed")), None)

    def request(self) -> bytes:
        after = {} if self.header or not self.last_id else {"after": self.last_id}
        given = {"Last_Event_ID": self.last_id} if self.header and self.last_id else {}
        path = f"answers/{self.answer_id}/events" + (f"?{urlencode(after)}" if after else "")
        return head(self.server, "GET", path, **given)

    async def connect(self) -> int:
        """Watch on one connection, to its end; returns the status."""
        self.clean = False
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        try:
            writer.write(self.request())
            top = await reader.readuntil(b"\r\n\r\n")
            self.statuses.append(int(top.split(b" ", 2)[1]))
            if self.statuses[-1] == 200:
                await self._read(reader)
        finally:
            writer.close()
        return self.statuses[-1]

    async def _read(self, reader: asyncio.StreamReader) -> None:
        parser = Parser()
        while size := int(await reader.readline(), 16):
            for event in parser.feed((await reader.readexactly(size + 2))[:-2]):
                self.take(event)
        self.clean = True

    def take(self, event: Sent) -> None:
        """Take an event as the page does, and look that nothing comes twice."""
        data = json.loads(event.data)
        if event.name == "alive":
            assert not event.own and not data
            self.alive += 1
            return
        self.events.append((event.name, data))
        if event.name == "start":
            self.text, self.missing = "", 0
        elif event.name == "text":
            self.text += data["text"]
        elif event.name == "gap":
            self.missing += data["missing"]
        if event.own:
            made = EntryID.parse(event.id)
            assert made > EntryID.parse(self.last_id or "0-0") or event.name == "failed", f"twice: {event}"
            self.ids.append(made)
            self.last_id = event.id

    async def run(self) -> Watcher:
        """Watch until the end, over as many connections as it takes."""
        async with asyncio.timeout(120):
            while not self.end and (not self.statuses or self.statuses[-1] == 200):
                try:
                    await self.connect()
                except (OSError, EOFError):
                    self.statuses.append(200)  # cut: come back
                if not self.end:
                    await asyncio.sleep(self.pause)
        return self


class Slow:
    """One who asks for an answer's events and reads only when told to; its system takes little for it meanwhile."""

    def __init__(self, server: WebServer, answer_id: str) -> None:
        self.watcher, self.done = Watcher(server, answer_id), False
        self._parser, self._held = Parser(), b""
        self.sock = socket.socket()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(("127.0.0.1", server.port))
        self.sock.sendall(self.watcher.request())

    def read(self) -> None:
        """Read some of it."""
        data = self.sock.recv(1 << 20)
        assert data, "the connection was closed"
        self._held += data
        if not self.watcher.statuses and b"\r\n\r\n" in self._held:
            head, _, self._held = self._held.partition(b"\r\n\r\n")
            self.watcher.statuses.append(int(head.split(b" ", 2)[1]))
        while self.watcher.statuses and b"\r\n" in self._held and not self.done:
            size, _, rest = self._held.partition(b"\r\n")
            count = int(size, 16)
            if len(rest) < count + 2:
                break
            for event in self._parser.feed(rest[:count]):
                self.watcher.take(event)
            self._held, self.done = rest[count + 2 :], not count

    def vanish(self) -> None:
        """Go away as a machine does that is switched off: with a reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


async def until(condition) -> None:
    """Wait for a condition, in asyncio."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"the awaited condition did not come true in {PATIENCE:g} s"
        await asyncio.sleep(0.01)


# ------------------------------------------------------------------------------------------------ answers


class Writer:
    """Writes an answer with bare commands, at the test's pace; its producer never dies by itself."""

    def __init__(self, client: Any, answer_id: str, first: int = 1, begin: bool = True) -> None:
        self.client, self.id, self.keys = client, answer_id, names_of(client).answer(answer_id)
        self.attempt, self.seq, self.text = first - 1, 0, ""
        self.record = new_record(answer_id, "why?", None, "test", "test") | {"first": first, "pooled": not begin}
        client.set(self.keys.question, json.dumps(self.record))
        if begin:
            self.begin()

    def begin(self, **about: str) -> Writer:
        """The next attempt; the text begins anew. `about`: what else its opening tells."""
        self.attempt, self.seq, self.text = self.attempt + 1, 0, ""
        self.client.set(self.keys.lease(self.attempt), "here", px=600_000)
        return self._add("start", json.dumps({"model": "test", "source": "test", "at": 1} | about))

    def fall_silent(self) -> Writer:
        """Its lease runs out."""
        self.client.delete(self.keys.lease(self.attempt))
        return self

    def say(self, *texts: str) -> Writer:
        self.text += "".join(texts)
        return self._add("text", *texts)

    def end(self, **data: Any) -> Writer:
        data = data or {"reason": "stop"}
        self._add("error" if "error" in data else "end", json.dumps(data))
        whole = {"start": f"{self.attempt}-0", "end": f"{self.attempt}-{self.seq - 1}", "text": self.text}
        self.client.set(self.keys.question, json.dumps(self.record | data | whole))
        self.client.delete(self.keys.lease(self.attempt))
        return self

    def _add(self, kind: str, *texts: str) -> Writer:
        with self.client.pipeline(transaction=False) as pipe:
            for text in texts:
                pipe.xadd(self.keys.chunks, {"kind": kind, "text": text, "ms": 1}, f"{self.attempt}-{self.seq}")
                self.seq += 1
            pipe.execute()
        return self


def held(entries: list[Entry]) -> str:
    """The text that one holds who has seen these entries, judged without the kit's cursor."""
    text, attempt = "", 0
    for entry in entries:
        if entry.id.attempt != attempt and entry.kind != "end":
            text, attempt = "", entry.id.attempt
        text += entry.text if entry.kind == "text" else ""
    return text
