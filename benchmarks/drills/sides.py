"""The sides of the drills in Python, each in the way of its own documents: one process says an answer, others watch it.

A side reads commands as JSON from standard input, each a line: ["produce", NAME], ["view", WHERE, CURSOR] and
["stop", WHERE]. It writes what happens: ["ready", WHERE], ["produced", WORDS], ["text", TEXT, CURSOR], ["warned"],
["end", HOW], ["stopped"] and ["cannot"]. An end is `whole` only where a viewer would take the answer for complete;
`warned` says that something is wrong, and that more may come.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from typing import Any

WORDS, PACE = 200, 0.01  # how many, and seconds from each to the next
MARK = "END"  # after the last word, for those who carry text alone: what is cut can be told from what has ended
Event = tuple[Any, ...]
say_lock = threading.Lock()


def tell(*event: Any) -> None:
    with say_lock:
        print(json.dumps(event), flush=True)


def words() -> Iterator[str]:
    """The answer of all drills, at a model's pace; tells how much of it was asked for."""
    began, said = time.monotonic(), 0
    try:
        while said < WORDS:
            time.sleep(max(0.0, began + said * PACE - time.monotonic()))
            said += 1
            yield f"{said - 1} "
    finally:
        tell("produced", said)


async def words_async() -> AsyncIterator[str]:
    """The same, for those in asyncio."""
    began, said = time.monotonic(), 0
    try:
        while said < WORDS:
            await asyncio.sleep(max(0.0, began + said * PACE - time.monotonic()))
            said += 1
            yield f"{said - 1} "
    finally:
        tell("produced", said)


def server_sent(url: str, cursor: str) -> Iterator[tuple[str, Any, str]]:
    """Name, data and ID of each event, as a browser reads them."""
    request = urllib.request.Request(url, headers={"Last-Event-ID": cursor} if cursor else {})
    name = data = ""
    with urllib.request.urlopen(request) as reply:
        for line in reply:
            field, _, value = line.decode().rstrip("\n").partition(": ")
            if field == "id":
                cursor = value
            elif field == "event":
                name = value
            elif field == "data":
                data = value
            elif not field and data:
                yield name, json.loads(data), cursor
                name = data = ""


class Kit:
    """`ask` in one process, and a WebServer of another one, from which a viewer reads server-sent events."""

    def __init__(self) -> None:
        import llmstream_nb

        self.kit = llmstream_nb
        llmstream_nb.connect()
        self.address = f"http://127.0.0.1:{llmstream_nb.WebServer(token='').start().port}/answers/"

    def produce(self, name: str) -> None:
        answer = self.kit.ask("Count!", id=name, source=lambda *_: words())
        tell("ready", name)
        answer.wait()

    def view(self, where: str, cursor: str) -> Iterator[Event]:
        for name, data, at in server_sent(f"{self.address}{where}/events", cursor):
            if name == "text":
                yield "text", data["text"], at
            elif name == "gap" or data.get("state") == "interrupted":
                yield ("warned",)
            elif name in ("end", "failed"):
                yield "end", "whole" if data.get("reason") == "stop" else json.dumps(data)

    def stop(self, where: str) -> bool:
        urllib.request.urlopen(urllib.request.Request(self.address + where, method="DELETE")).close()
        return True


class Recipe:
    """notebooks/recipe_async.py as it stands, in a uvicorn for each process; our words take the model's place."""

    def __init__(self) -> None:
        import uvicorn

        os.environ |= {"OPENAI_API_KEY": "none", "OPENAI_MODEL": "none"}
        sys.path.append(str(Path(__file__).parents[2] / "notebooks"))
        import recipe_async

        async def answer(_: str, say: Any) -> None:
            async for word in words_async():
                say(("text", word))
            say(("end", "stop"))

        recipe_async.answer = answer
        server = uvicorn.Server(uvicorn.Config(recipe_async.app, port=0, log_level="warning"))
        threading.Thread(target=server.run, daemon=True).start()
        while not server.started:
            time.sleep(0.01)
        self.address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/answers"

    def _call(self, method: str, path: str = "", body: bytes | None = None) -> bytes:
        about = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.address + path, body, about, method=method)) as reply:
            return reply.read()

    def produce(self, name: str) -> None:
        tell("ready", json.loads(self._call("POST", body=json.dumps({"question": name}).encode()))["id"])

    def view(self, where: str, cursor: str) -> Iterator[Event]:
        for _, data, at in server_sent(f"{self.address}/{where}/events", cursor):
            if data["kind"] == "text":
                yield "text", data["text"], at
            else:
                yield "end", "whole" if data["text"] == "stop" else f"{data['kind']}: {data['text']}"

    def stop(self, where: str) -> bool:
        self._call("DELETE", f"/{where}")
        return True


class Plain:
    """XADD for each piece, XREAD BLOCK in a loop, and an entry that says the end: what many products do."""

    def __init__(self) -> None:
        from redis import Redis

        self.redis = Redis.from_url(os.environ["REDIS_URL"], decode_responses=True)

    def produce(self, name: str) -> None:
        tell("ready", name)
        for word in words():
            self.redis.xadd(name, {"text": word})
        self.redis.xadd(name, {"end": "stop"})

    def view(self, where: str, cursor: str) -> Iterator[Event]:
        last = cursor or "0"
        while True:
            for _, entries in self.redis.xread({where: last}, block=1000):
                for last, entry in entries:
                    yield ("end", "whole") if "end" in entry else ("text", entry["text"], last)


class PlainEvents:
    """Server-sent events from the process that asks the model, to the one who asked, and kept nowhere."""

    def __init__(self) -> None:
        class Handler(BaseHTTPRequestHandler):
            asked: set[str] = set()

            def do_GET(self) -> None:
                if self.path not in self.asked:
                    return self.send_error(404)
                self.asked.remove(self.path)
                self.send_response(200)
                self.end_headers()
                for data in chain(words(), [MARK]):
                    self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.asked, self.server = Handler.asked, ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def produce(self, name: str) -> None:
        self.asked.add(f"/{name}")
        tell("ready", f"http://127.0.0.1:{self.server.server_port}/{name}")

    def view(self, where: str, _: str) -> Iterator[Event]:
        url = where if ":" in where else f"http://127.0.0.1:{self.server.server_port}/{where}"
        for _, data, _ in server_sent(url, ""):
            yield ("end", "whole") if data == MARK else ("text", data, "")

    def stop(self, _: str) -> bool:
        tell("stopped")
        os._exit(0)  # the page is closed


class Port:
    """resumable-stream of PyPI, a port of the npm package: the text is in the producer's memory, and told by pub/sub."""

    def __init__(self) -> None:
        from resumable_stream import RedisPublisher, RedisSubscriber, create_resumable_stream_context

        self.make, self.ends = create_resumable_stream_context, (RedisPublisher, RedisSubscriber)

    async def _context(self) -> Any:
        publisher, subscriber = (end(os.environ["REDIS_URL"]) for end in self.ends)
        await asyncio.gather(publisher.connect(), subscriber.connect())
        return self.make(publisher=publisher, subscriber=subscriber)

    async def marked(self) -> AsyncIterator[str]:
        async for word in words_async():
            yield word
        yield MARK

    def produce(self, name: str) -> None:
        async def said() -> None:
            stream = await (await self._context()).create_new_resumable_stream(name, self.marked)
            tell("ready", name)
            async for _ in stream:
                pass

        asyncio.run(said())

    def view(self, where: str, cursor: str) -> Iterator[Event]:
        seen = int(cursor or 0)
        with asyncio.Runner() as runner:
            stream = runner.run(runner.run(self._context()).resume_existing_stream(where, seen))
            if stream in (None, "NOT_FOUND"):
                yield "end", "none"
                return
            while text := runner.run(anext(stream, None)):
                seen += len(text)
                yield "text", text.removesuffix(MARK), str(seen)
                if text.endswith(MARK):
                    yield "end", "whole"


SIDES = {"kit": Kit, "recipe": Recipe, "plain-xadd": Plain, "plain-sse": PlainEvents, "resumable-stream-pypi": Port}


def run(side: Any, verb: str, arguments: list[str]) -> None:
    """Carry out one command."""
    try:
        if verb == "stop":
            tell("stopped" if hasattr(side, "stop") and side.stop(*arguments) else "cannot")
            return
        made = getattr(side, verb)(*arguments)
        if verb == "view":
            for event in made:
                tell(*event)
                if event[0] == "end":
                    return
            tell("end", "cut")
    except urllib.error.HTTPError as error:
        tell("end", "none" if error.code == 404 else f"HTTP {error.code}")
    except Exception as error:
        tell("end", f"error: {type(error).__name__}: {error}")


def main() -> None:
    side = SIDES[sys.argv[1]]()
    tell("up")
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        threading.Thread(target=partial(run, side, verb, arguments), daemon=True).start()
    os._exit(0)


if __name__ == "__main__":
    main()
