"""Many ask at the same moment: does each get the whole answer, and only that?"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection

import redis

from benchmarks.harness import Figures, Line, Samples, child, interleave, quantile, redis_server, row
from llmstream_nb import Worker, ask, connect, enqueue, read_answer, tutorial
from llmstream_nb.protocol.events import Text
from llmstream_nb.protocol.wire import Timing

THREADS, POOL, TUTORIAL = "the kit, threads", "the kit, pool", "the tutorial"
WORKERS = 4
WAIT = 60.0  # seconds before whoever waits for a pooled answer gives up

Stamped = list[tuple[int, str]]  # when a piece of text came, in nanoseconds of the monotonic clock


@row(
    "100 ask at once",
    Line("exact, % of askers", THREADS, TUTORIAL, (">=", 100), "value", True),
    Line("exact, % of askers", POOL, TUTORIAL, (">=", 100), "value", True),
    Line("ended, % of askers", THREADS, TUTORIAL, by="value"),
)
def askers(quick: bool) -> tuple[str, Samples]:
    """Each asker is a thread that asks and reads to the end; whoever has not ended after `bound` has failed."""
    many, chunks, rate, bound, runs = (10, 5, 20, 1.0, 1) if quick else (100, 200, 20, 30.0, 3)

    def model(question: str, _: str | None) -> Iterator[str]:
        return paced(question, chunks, rate)

    def everybody(one: Callable[[str, Stamped], None]) -> Figures:
        return _all_at_once([f"asker-{n}" for n in range(many)], chunks, one)

    with redis_server() as server, ExitStack() as stack:
        client, bare = connect(server.url), server.client(max_connections=4 * many)

        def follow(answer_id: str, got: Stamped) -> None:
            for event in read_answer(answer_id, client=client, timing=Timing(patience=WAIT)):
                if isinstance(event, Text):
                    got.append((time.monotonic_ns(), event.text))

        def threads() -> Figures:
            return everybody(lambda name, got: follow(ask(name, source=model, client=client).id, got))

        def pool() -> Figures:
            return everybody(lambda name, got: follow(enqueue(name, source="scripted", client=client).id, got))

        def pattern() -> Figures:
            bare.delete(tutorial.OPENAI_STREAM)
            return everybody(lambda name, got: _ask_the_tutorial(bare, name, model, bound, got))

        slots = -(-many // WORKERS)
        for n in range(WORKERS):
            stack.enter_context(child(_work, server.url, f"w{n}", slots, chunks, rate)).recv()
        samples = interleave({THREADS: threads, POOL: pool, TUTORIAL: pattern}, runs)
    sizes = f"{many} askers, {chunks} chunks each at {rate}/s; {WORKERS} workers with {slots} slots each"
    return f"{sizes}; the tutorial's readers give up after {bound:g} s; {runs} runs", samples


def _all_at_once(names: list[str], chunks: int, one: Callable[[str, Stamped], None]) -> Figures:
    """Let `one` ask and read for each name, in threads; TimeoutError is one who left before the end."""
    got: dict[str, Stamped] = {name: [] for name in names}
    ended: list[str] = []

    def asker(name: str) -> None:
        with suppress(TimeoutError):
            one(name, got[name])
            ended.append(name)

    threads = [threading.Thread(target=asker, args=(name,)) for name in names]
    began = time.monotonic_ns()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = (time.monotonic_ns() - began) / 1e9
    exact = [name for name in ended if is_exact("".join(text for _, text in got[name]), name, chunks)]
    figures = {"exact, % of askers": 100 * len(exact) / len(names), "ended, % of askers": 100 * len(ended) / len(names)}
    figures["until all are done, s"] = seconds
    if exact:
        delays = [(at - int(text.split(":")[2])) / 1e6 for name in exact for at, text in got[name]]
        firsts = [(got[name][0][0] - began) / 1e6 for name in exact]
        figures["first text after asking p50, ms"] = quantile(firsts, 0.5)
        figures |= {"a chunk p50, ms": quantile(delays, 0.5), "a chunk p99, ms": quantile(delays, 0.99)}
    return figures


def paced(name: str, chunks: int, rate: float) -> Iterator[str]:
    """Deltas that say whose they are, their number, and when they were yielded."""
    began = time.monotonic()
    for n in range(chunks):
        time.sleep(max(0.0, began + n / rate - time.monotonic()))
        yield f"{name}:{n}:{time.monotonic_ns()}:;"


def is_exact(text: str, name: str, chunks: int) -> bool:
    """Whether these are all chunks of that asker's answer, once, in order, and nothing else."""
    return [piece.split(":")[:2] for piece in text.split(";")[:-1]] == [[name, str(n)] for n in range(chunks)]


def _ask_the_tutorial(
    client: redis.Redis, name: str, model: Callable[[str, str | None], Iterator[str]], bound: float, got: Stamped
) -> None:
    """Raises TimeoutError where END has not come, as if the asker had lost patience."""
    after = tutorial.get_last_id_of_stream(client, tutorial.OPENAI_STREAM)
    writer = threading.Thread(target=tutorial.ask_question, args=(client, name, None, name), kwargs={"source": model})
    writer.start()

    def on_chunk(item: dict[str, str], _: str) -> None:
        text = item["chunkOutput"]
        if not text.startswith("START:") and not text.startswith(";END:"):
            got.append((time.monotonic_ns(), text))

    try:
        tutorial.read_stream(client, tutorial.OPENAI_STREAM, after, name, on_chunk, timeout=bound)
    finally:
        writer.join()


def _work(parent: Connection, url: str, name: str, slots: int, chunks: int, rate: float) -> None:
    """A worker in a process of its own, until the pipe closes."""
    client = connect(url)
    worker = Worker(slots=slots, name=name, client=client, source=lambda question, _: paced(question, chunks, rate))
    worker.start()
    parent.send("at work")
    try:
        parent.recv()
    except EOFError:
        worker.stop(0)
