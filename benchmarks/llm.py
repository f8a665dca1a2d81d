"""A model's answer through the openai client: what the kit adds between the model and whoever waits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.harness import Figures, Line, Samples, child, interleave, redis_server, row
from llmstream_nb import ask, connect, read_answer
from llmstream_nb.llm import scripted
from llmstream_nb.protocol.events import Ended, Text

KIT, PLAIN = "the kit", "the openai client"
THINK = 200  # milliseconds to the first token: few hosted models are faster


@row(
    "from asking to reading through the openai client, and what the kit adds",
    Line("first token, ms", KIT, PLAIN, ("<=", 1.05)),
    Line("first token, ms", KIT, PLAIN, by="difference"),
    Line("total, ms", KIT, PLAIN, ("<=", 1.05)),
    Line("no pause: first token, ms", KIT, PLAIN, by="difference"),
    Line("no pause: total, ms", KIT, PLAIN),
    Line("exact, %", KIT, "", (">=", 100), always=True),
)
def llm(quick: bool) -> tuple[str, Samples]:
    """The scripted server answers from a process of its own; the kit's question goes through Redis and back."""
    import httpx2
    from openai import OpenAI

    chunks, fast, runs = (8, 100, 1) if quick else (80, 2_000, 9)
    with redis_server() as server, child(_serve) as model:
        url, key = model.recv()
        os.environ |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": key}
        client = connect(server.url)

        def kit(name: str) -> tuple[float, float, str]:
            client.flushall()
            began, first, pieces = time.perf_counter(), 0.0, list[str]()
            answer = ask("count", source="openai", model=name, client=client)
            for event in read_answer(answer.id, client=client):
                if isinstance(event, Text):
                    first = first or time.perf_counter()
                    pieces.append(event.text)
                elif isinstance(event, Ended):
                    break
            return first - began, time.perf_counter() - began, "".join(pieces)

        def plain(name: str) -> tuple[float, float, str]:
            began, first, pieces = time.perf_counter(), 0.0, list[str]()
            # As the kit does for a model on this machine: no certificates are read, which would take 30 ms.
            http = httpx2.Client(verify=False, trust_env=False)
            with OpenAI(api_key=key, base_url=url, max_retries=0, http_client=http) as asked:
                messages: Any = [{"role": "user", "content": "count"}]
                for part in asked.chat.completions.create(model=name, messages=messages, stream=True):
                    if part.choices and (text := part.choices[0].delta.content):
                        first = first or time.perf_counter()
                        pieces.append(text)
            return first - began, time.perf_counter() - began, "".join(pieces)

        def run(side: Callable[[str], tuple[float, float, str]]) -> Figures:
            first, total, slow = side(f"scripted:long={chunks},pace=40,think={THINK}")
            at_once, at_full_speed, quickly = side(f"scripted:long={fast},pace=0")
            wanted = ["".join(f"{n} " for n in range(count)) for count in (chunks, fast)]
            return {
                "first token, ms": first * 1000,
                "total, ms": total * 1000,
                "no pause: first token, ms": at_once * 1000,
                "no pause: total, ms": at_full_speed * 1000,
                "exact, %": 100.0 * ([slow, quickly] == wanted),
            }

        for side in (kit, plain):
            side("scripted:long=5,pace=0")  # loads code
        samples = interleave({KIT: lambda: run(kit), PLAIN: lambda: run(plain)}, runs)
    return f"{chunks} chunks at 40/s after {THINK} ms, {fast:,} without pause, {runs} runs", samples


def _serve(wanted: Connection) -> None:
    """In a process of its own, as a model is: the scripted server, until the pipe closes."""
    wanted.send((scripted.server().url, scripted.server().key))
    while True:
        try:
            wanted.recv()
        except EOFError:
            return
