"""The web page's server: many viewers of many answers, and what they cost."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import psutil
import redis

from benchmarks.harness import Figures, Line, Samples, child, interleave, quantile, redis_server, row
from llmstream_nb import WebServer, connect
from llmstream_nb.answers.connection import names_of
from llmstream_nb.answers.record import new_record
from llmstream_nb.setup.environment import allow_open_files
from tests.web import Parser

MANY, SOME, FEW = "1,000 viewers", "100 viewers", "10 viewers"
VIEWERS = {MANY: 1_000, SOME: 100, FEW: 10}
ANSWERS, RATE = 50, 20
PATIENCE = 60.0  # seconds


@row(
    "web page, viewers of 50 answers at 20 chunks a second each",
    *(Line("exact, % of viewers", side, goal=(">=", 100), always=True) for side in VIEWERS),
    *(Line("a chunk p99, ms", side, goal=("<=", 250), always=True) for side in VIEWERS),
    *(Line("connections to Redis", side, goal=("<=", 8), always=True) for side in VIEWERS),
    Line("kB a viewer", MANY, goal=("<=", 100)),
)
def web(quick: bool) -> tuple[str, Samples]:
    """Server, viewers and writer are three processes; all viewers are there before the first chunk is written.

    The writer sends bare XADDs, the answers' chunks evenly spread in time, each with the moment of its XADD.
    """
    chunks, runs = (5, 1) if quick else (200, 3)
    viewers = {side: count // 50 or 1 for side, count in VIEWERS.items()} if quick else VIEWERS
    with redis_server() as server:
        sides = {side: partial(_run, server.url, count, chunks) for side, count in viewers.items()}
        samples = interleave(sides, runs)
    return f"{chunks} chunks, viewers {', '.join(f'{count:,}' for count in viewers.values())}, {runs} runs", samples


def _run(url: str, viewers: int, chunks: int) -> Figures:
    client = connect(url)
    client.flushall()
    port = int(url.rpartition(":")[2].partition("/")[0])
    answers = [Answer(client, f"answer-{n}") for n in range(min(ANSWERS, viewers))]
    watched = [answers[n % len(answers)] for n in range(viewers)]
    with child(_serve, url) as serving, child(_watch) as watching:
        address = serving.recv()
        server = psutil.Process(address["pid"])
        warm = Answer(client, "warm")
        watching.send((address, [warm.id] * 8))
        watching.recv()
        warm.end()
        watching.recv()
        memory = server.memory_info().rss
        watching.send((address, [answer.id for answer in watched]))
        watching.recv()  # all of them are there
        began, cpu = time.monotonic(), server.cpu_times()
        late = _write(client, answers, chunks)
        seconds, used = time.monotonic() - began, server.cpu_times()
        connections = sum(1 for each in server.net_connections() if each.raddr and each.raddr.port == port)
        grown = server.memory_info().rss - memory
        for answer in answers:
            answer.end()
        got = watching.recv()
    exact = sum(text == answer.text for (text, _), answer in zip(got, watched, strict=True))
    delays = [delay for _, all_delays in got for delay in all_delays]
    cpu_seconds = used.user + used.system - cpu.user - cpu.system
    return {
        "exact, % of viewers": 100 * exact / viewers,
        "a chunk p50, ms": quantile(delays, 0.5),
        "a chunk p99, ms": quantile(delays, 0.99),
        "connections to Redis": connections,
        "CPU, % of a core": 100 * cpu_seconds / seconds,
        "kB a viewer": grown / viewers / 1000,
        "the writer was late by, ms": late,
    }


# ----------------------------------------------------------------------------------------------- the writer


class Answer:
    """An answer that is written with bare commands; its producer never dies."""

    def __init__(self, client: redis.Redis, answer_id: str) -> None:
        self.client, self.id, self.keys = client, answer_id, names_of(client).answer(answer_id)
        self.seq, self.text = 0, ""
        self.record = new_record(answer_id, "why?", None, "benchmark", "benchmark")
        client.set(self.keys.question, json.dumps(self.record))
        client.set(self.keys.lease(1), "here", px=600_000)
        self.add(client, "start", json.dumps({"model": "benchmark", "source": "benchmark"}))

    def add(self, pipe: Any, kind: str, text: str) -> None:
        """Add one entry, or queue it in a pipeline."""
        pipe.xadd(self.keys.chunks, {"kind": kind, "text": text, "ms": 50 * self.seq}, f"1-{self.seq}")
        self.seq += 1
        self.text += text if kind == "text" else ""

    def end(self) -> None:
        """Write the end, and the record."""
        self.add(self.client, "end", json.dumps({"reason": "stop"}))
        whole = {"reason": "stop", "start": "1-0", "end": f"1-{self.seq - 1}", "text": self.text}
        self.client.set(self.keys.question, json.dumps(self.record | whole))


def _write(client: redis.Redis, answers: list[Answer], chunks: int) -> float:
    """Write all chunks, each when it is due; return by how many milliseconds it was late, at worst."""
    began, late = time.monotonic(), 0.0
    due = [(turn + n / len(answers)) / RATE for turn in range(chunks) for n in range(len(answers))]
    at = 0
    while at < len(due):
        time.sleep(max(0.0, began + due[at] - time.monotonic()))
        now = time.monotonic() - began
        late = max(late, now - due[at])
        with client.pipeline(transaction=False) as pipe:
            while at < len(due) and due[at] <= now:
                answers[at % len(answers)].add(pipe, "text", f"{at} {time.monotonic_ns()};")
                at += 1
            pipe.execute()
    return 1000 * late


# ------------------------------------------------------------------------------- server and viewers, in processes


def _serve(parent: Connection, url: str) -> None:
    """The server, until the pipe closes."""
    allow_open_files(8_192)
    with WebServer(client=connect(url)) as server:
        parent.send({"port": server.port, "token": server.token, "pid": psutil.Process().pid})
        try:
            parent.recv()
        except EOFError:
            return


def _watch(parent: Connection) -> None:
    """Viewers of one round after another, until the pipe closes: all connect, then all see their answer's end."""
    allow_open_files(8_192)
    while True:
        try:
            address, names = parent.recv()
        except EOFError:
            return
        viewers = asyncio.run(_all(address, names, parent))
        parent.send([viewer.seen() for viewer in viewers])


async def _all(address: dict[str, Any], names: list[str], parent: Connection) -> list[Viewer]:
    viewers: list[Viewer] = []
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(10 * PATIENCE):
        for name in names:
            viewer = Viewer(f"/answers/{name}/events?token={address['token']}", address["port"])
            await loop.create_connection(lambda viewer=viewer: viewer, "127.0.0.1", address["port"])
            viewers.append(viewer)
        for viewer in viewers:
            await viewer.there.wait()
        parent.send("there")
        for viewer in viewers:
            await viewer.ended.wait()
    return viewers


@dataclass
class Viewer(asyncio.Protocol):
    """Notes what comes and when, and nothing else: it is read only once all is over."""

    path: str
    port: int
    got: list[tuple[int, bytes]] = field(default_factory=list)
    there: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def connection_made(self, transport: Any) -> None:
        """Ask."""
        self.transport = transport
        transport.write(f"GET {self.path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n\r\n".encode())

    def data_received(self, data: bytes) -> None:
        """Note it."""
        self.got.append((time.monotonic_ns(), data))
        if not self.there.is_set() and b"event: start" in data:
            self.there.set()
        if data.endswith(b"0\r\n\r\n"):  # the end of the last chunk; an event ends otherwise
            self.transport.close()

    def connection_lost(self, _: Exception | None) -> None:
        """That was all."""
        self.there.set()
        self.ended.set()

    def seen(self) -> tuple[str, list[float]]:
        """The text, and how many milliseconds each chunk took."""
        parser, rest, text, delays = Parser(), b"", list[str](), list[float]()
        for at, data in self.got:
            rest += data
            if rest.startswith(b"HTTP/"):
                _, _, rest = rest.partition(b"\r\n\r\n")
            body, rest = _unchunk(rest)
            for event in parser.feed(body):
                if event.name == "text":
                    text.append(json.loads(event.data)["text"])
                    delays.append((at - int(text[-1].split()[1][:-1])) / 1e6)
        return "".join(text), delays


def _unchunk(data: bytes) -> tuple[bytes, bytes]:
    """The content of the whole chunks of HTTP's chunked coding, and what is left."""
    body = b""
    while b"\r\n" in data:
        size, _, rest = data.partition(b"\r\n")
        count = int(size, 16)
        if len(rest) < count + 2:
            break
        body, data = body + rest[:count], rest[count + 2 :]
    return body, data
