"""The stream itself: how fast entries are written and read, how late a chunk is seen, and what it all takes."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import redis

from benchmarks.harness import Figures, Line, Samples, child, interleave, quantile, redis_server, row
from llmstream_nb import ask, connect, read_answer, tutorial
from llmstream_nb.answers.connection import names_of
from llmstream_nb.answers.produce import Writing
from llmstream_nb.llm.prepared import reply
from llmstream_nb.llm.scripted import split
from llmstream_nb.protocol.events import Started, Text, text_of

if TYPE_CHECKING:
    from llmstream_nb.faults.servers import RedisServer

KIT, PLAIN, TUTORIAL = "the kit", "plain redis-py", "the tutorial"
CEILING = "redis-benchmark"
COALESCING = "the kit, coalesce_ms=100"
PIPELINE, COUNT = 100, 500  # of plain redis-py


def exactly(text: str, wanted: str) -> float:
    """100 if the text is what it should be, else 0."""
    return 100.0 * (text == wanted)


def source(chunks: list[str]) -> Callable[[str, str | None], Iterator[str]]:
    """A model that has all its chunks ready."""
    return lambda *_: iter(chunks)


# ------------------------------------------------------------------------------------------------ produce


@row(
    "produce from an iterator that is infinitely fast",
    Line("chunks a second", KIT, PLAIN, (">=", 0.7)),
    Line("chunks a second", KIT, TUTORIAL, (">=", 12)),
    Line("chunks a second", KIT, CEILING),
    Line("exact, %", KIT, "", (">=", 100), always=True),
)
def produce(quick: bool) -> tuple[str, Samples]:
    """From asking to the confirmed end, with lease, cancel check, record and time to live."""
    count, runs = (500, 2) if quick else (20_000, 9)
    chunks = [f"{n} ".rjust(5) for n in range(count)]
    whole = "".join(chunks)
    with redis_server() as server:
        client, bare = connect(server.url), server.client()

        def kit() -> Figures:
            client.flushall()
            began = time.perf_counter()
            answer = ask("count", source=source(chunks), client=client).wait()
            seconds = time.perf_counter() - began
            return {"chunks a second": count / seconds, "exact, %": exactly(answer.text, whole)}

        def plain() -> Figures:
            bare.flushall()
            began = time.perf_counter()
            for at in range(0, count, PIPELINE):
                with bare.pipeline(transaction=True) as pipe:
                    for chunk in chunks[at : at + PIPELINE]:
                        ms = int((time.perf_counter() - began) * 1000)
                        pipe.xadd("plain", {"kind": "text", "text": chunk, "ms": ms})
                    pipe.execute()
            seconds = time.perf_counter() - began
            return {"chunks a second": count / seconds, "exact, %": exactly(_joined(bare, "plain", "text"), whole)}

        def pattern() -> Figures:
            bare.flushall()
            began = time.perf_counter()
            tutorial.ask_question(bare, "q", None, "count", source=source(chunks))
            seconds = time.perf_counter() - began
            text = _joined(bare, tutorial.OPENAI_STREAM, "chunkOutput")
            said = text.removeprefix(tutorial.start_chunk("q")).removesuffix(tutorial.end_chunk("q"))
            return {"chunks a second": count / seconds, "exact, %": exactly(said, whole)}

        sides: dict[str, Callable[[], Figures]] = {KIT: kit, PLAIN: plain, TUTORIAL: pattern}
        if shutil.which("redis-benchmark"):
            sides[CEILING] = lambda: {"chunks a second": _ceiling(server, bare, count)}
        for side in (kit, plain):
            side()  # the first run of each loads code
        return f"{count:,} chunks, {runs} runs", interleave(sides, runs)


def _joined(client: redis.Redis, key: str, field: str) -> str:
    entries: Any = client.xrange(key)
    return "".join(fields[field] for _, fields in entries)


def _ceiling(server: RedisServer, client: redis.Redis, count: int) -> float:
    """Entries a second that redis-benchmark, written in C, gets through one connection with as long pipelines."""
    client.flushall()
    command = ["redis-benchmark", "-h", "127.0.0.1", "-p", str(server.port), "-c", "1", "-P", str(PIPELINE)]
    command += ["-n", str(count * 10), "--csv", "XADD", "bench", "*", "kind", "text", "text", "1234 ", "ms", "100"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return float(re.findall(r'"([\d.]+)"', printed.splitlines()[-1])[0])


# --------------------------------------------------------------------------------------------------- read


@row(
    "read a finished answer through the cursor",
    Line("chunks a second", KIT, PLAIN, (">=", 0.6)),
    Line("chunks a second", KIT, TUTORIAL),
    Line("exact, %", KIT, "", (">=", 100), always=True),
)
def read(quick: bool) -> tuple[str, Samples]:
    """One answer, from its first entry to its end; the tutorial's reader gets a tenth, as it is so much slower."""
    count, runs = (2_000, 2) if quick else (100_000, 7)
    chunks = [f"{n} ".rjust(5) for n in range(count)]
    part, whole = chunks[: count // 10], "".join(chunks)
    with redis_server() as server:
        client, bare = connect(server.url), server.client()
        answer = ask("count", source=source(chunks), client=client).wait()
        key = names_of(client).answer(answer.id).chunks
        tutorial.ask_question(bare, "q", None, "count", source=source(part))

        def kit() -> Figures:
            began = time.perf_counter()
            text = text_of(read_answer(answer.id, client=client))
            return {"chunks a second": count / (time.perf_counter() - began), "exact, %": exactly(text, whole)}

        def plain() -> Figures:
            began, pieces, after, kind = time.perf_counter(), list[str](), "0-0", ""
            while kind != "end":
                reply: Any = bare.xread({key: after}, count=COUNT, block=1000)
                for _, fields in reply[0][1]:
                    kind = fields["kind"]
                    if kind == "text":
                        pieces.append(fields["text"])
                after = reply[0][1][-1][0]
            text = "".join(pieces)
            return {"chunks a second": count / (time.perf_counter() - began), "exact, %": exactly(text, whole)}

        def pattern() -> Figures:
            pieces: list[str] = []

            def on_chunk(item: dict[str, str], _: str) -> None:
                pieces.append(item["chunkOutput"])

            began = time.perf_counter()
            tutorial.read_stream(bare, tutorial.OPENAI_STREAM, "0-0", "q", on_chunk, timeout=120)
            seconds = time.perf_counter() - began
            return {"chunks a second": len(part) / seconds, "exact, %": exactly("".join(pieces[1:-1]), "".join(part))}

        samples = interleave({KIT: kit, PLAIN: plain, TUTORIAL: pattern}, runs)
    return f"{count:,} chunks, of the tutorial {len(part):,}, {runs} runs", samples


# ------------------------------------------------------------------------------------------------- latency


@row(
    "from the model's delta to the reader's event, in two processes",
    Line("a chunk p50, ms", KIT, PLAIN, ("<=", 1.3)),
    Line("a chunk p50, ms", KIT, TUTORIAL),
    Line("first token p50, ms", KIT, PLAIN, ("<=", 1.3)),
    Line("exact, %", KIT, "", (">=", 100), always=True),
)
def latency(quick: bool) -> tuple[str, Samples]:
    """Each chunk carries the moment at which the model yielded it; the machine's monotonic clock serves both."""
    chunks, firsts, runs = (20, 2, 2) if quick else (200, 20, 9)
    rate = 100
    with redis_server() as server, child(_read_stamps, server.url) as reader:
        client, bare = connect(server.url), server.client()
        writers = {KIT: _write_kit, PLAIN: _write_plain, TUTORIAL: _write_pattern}

        def one(side: str, name: str, count: int) -> tuple[list[float], bool]:
            """Milliseconds that each chunk of one answer took, and whether all came."""
            bare.flushall()
            texts: list[str] = []

            def model() -> Iterator[str]:
                reader.send((side, name))
                reader.recv()  # now it waits for text
                began = time.monotonic() + 0.05
                for n in range(count):
                    time.sleep(max(0.0, began + n / rate - time.monotonic()))
                    texts.append(str(time.monotonic_ns()).rjust(20))
                    yield texts[-1]

            writers[side]({KIT: client}.get(side, bare), name, model())
            got: list[tuple[str, int]] = reader.recv()
            return [(at - int(text)) / 1e6 for text, at in got], [text for text, _ in got] == texts

        def run(side: str) -> Figures:
            delays, exact = one(side, "long", chunks)
            shorts = [one(side, f"short-{n}", 2) for n in range(firsts)]  # a model goes on after its first token
            return {
                "a chunk p50, ms": quantile(delays, 0.5),
                "a chunk p99, ms": quantile(delays, 0.99),
                "first token p50, ms": quantile([first[0] for first, _ in shorts], 0.5),
                "exact, %": 100.0 * (exact and all(same for _, same in shorts)),
            }

        for side in writers:
            one(side, "warm", 5)
        samples = interleave({side: lambda side=side: run(side) for side in writers}, runs)  # type: ignore[misc]
    return f"{chunks} chunks at {rate}/s and {firsts} first tokens in each of {runs} runs", samples


def _write_kit(client: redis.Redis, name: str, deltas: Iterator[str]) -> None:
    ask("stamps", source=lambda *_: deltas, id=name, client=client).wait()


def _write_plain(client: redis.Redis, name: str, deltas: Iterator[str]) -> None:
    began = time.monotonic()
    for delta in deltas:
        client.xadd(name, {"kind": "text", "text": delta, "ms": int((time.monotonic() - began) * 1000)})
    client.xadd(name, {"kind": "end", "text": "", "ms": 0})


def _write_pattern(client: redis.Redis, name: str, deltas: Iterator[str]) -> None:
    tutorial.ask_question(client, name, None, "stamps", source=lambda *_: deltas)


def _read_stamps(orders: Connection, url: str) -> None:
    """In a process of its own: read the answers it is told to, and say when each text came."""
    client, bare = connect(url), redis.Redis.from_url(url, decode_responses=True)
    while True:
        try:
            side, name = orders.recv()
        except EOFError:
            return
        got: list[tuple[str, int]] = []
        if side == KIT:
            for event in read_answer(name, client=client):
                if isinstance(event, Text):
                    got.append((event.text, time.monotonic_ns()))
                elif isinstance(event, Started):
                    orders.send("ready")
        else:
            orders.send("ready")
            _READ[side](bare, name, lambda text, got=got: got.append((text, time.monotonic_ns())))  # type: ignore[misc]
        orders.send(got)


def _read_plain(client: redis.Redis, name: str, take: Callable[[str], None]) -> None:
    after, kind = "0-0", ""
    while kind != "end":
        reply: Any = client.xread({name: after}, count=COUNT, block=1000)
        for _, fields in reply[0][1] if reply else ():
            kind = fields["kind"]
            if kind == "text":
                take(fields["text"])
        after = reply[0][1][-1][0] if reply else after


def _read_pattern(client: redis.Redis, name: str, take: Callable[[str], None]) -> None:
    def on_chunk(item: dict[str, str], _: str) -> None:
        text = item["chunkOutput"]
        if not text.startswith("START:") and not text.startswith(";END:"):
            take(text)

    tutorial.read_stream(client, tutorial.OPENAI_STREAM, "0-0", name, on_chunk, timeout=60)


_READ = {PLAIN: _read_plain, TUTORIAL: _read_pattern}


# -------------------------------------------------------------------------------------------------- memory


@row(
    "memory in Redis of 500 tokens, the chunks alone",
    Line("bytes", KIT, TUTORIAL, ("<=", 1)),
    Line("bytes", COALESCING, TUTORIAL, ("<=", 1)),
    Line("exact, %", KIT, "", (">=", 100), always=True),
    Line("exact, %", COALESCING, "", (">=", 100), always=True),
)
def memory(quick: bool) -> tuple[str, Samples]:
    """MEMORY USAGE of an answer's stream; its tokens come at 100 a second, since times take room too."""
    tokens, runs, rate = (50, 1, 500) if quick else (500, 3, 100)
    chunks = (split(reply("What is a Redis stream?")) * 10)[:tokens]
    whole = "".join(chunks)

    def paced(*_: object) -> Iterator[str]:
        began = time.monotonic()
        for n, chunk in enumerate(chunks):
            time.sleep(max(0.0, began + n / rate - time.monotonic()))
            yield chunk

    with redis_server() as server:
        client, bare = connect(server.url), server.client()

        def usage(stream: str, record: str, text: str) -> Figures:
            used, entries = bare.memory_usage(stream, samples=0), bare.xlen(stream)
            about = {"bytes of the record": float(bare.memory_usage(record) or 0), "exact, %": exactly(text, whole)}
            return {"bytes": float(used or 0), "entries": float(entries)} | about  # type: ignore[arg-type]

        def kit(writing: Writing) -> Figures:
            bare.flushall()
            answer = ask("tokens", source=paced, client=client, writing=writing).wait()
            keys = names_of(client).answer(answer.id)
            return usage(keys.chunks, keys.question, answer.text)

        def pattern() -> Figures:
            bare.flushall()
            name = uuid.uuid4().hex
            tutorial.ask_question(bare, name, None, "tokens", source=paced)
            text = _joined(bare, tutorial.OPENAI_STREAM, "chunkOutput")
            said = text.removeprefix(tutorial.start_chunk(name)).removesuffix(tutorial.end_chunk(name))
            return usage(tutorial.OPENAI_STREAM, f"questions:{name}", said)

        coalescing = Writing(coalesce_ms=100)
        sides = {KIT: lambda: kit(Writing()), COALESCING: lambda: kit(coalescing), TUTORIAL: pattern}
        return f"{tokens} tokens at {rate}/s, {runs} runs", interleave(sides, runs)
