"""The sides of the drills in Python, each used as its own documents say: one process speaks, others watch it.

A side reads commands as JSON from standard input, each a line: ["produce", NAME], ["view", WHERE, CURSOR] and
["stop", WHERE]. It writes what happens: ["ready", WHERE], ["produced"] once all was said, ["text", TEXT, CURSOR],
["warned"], ["end", HOW], ["stopped"] and ["cannot"]. An end is `whole` only where a viewer takes the answer for
complete; `warned` says that something is wrong, and that more may come.
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
from itertools import chain
from pathlib import Path
from typing import Any

WORDS, PACE = 200, 0.01  # how many, and seconds before each
MARK = "END"  # after the last word, where nothing but text is carried: so what was cut is not taken for complete
Event = tuple[Any, ...]


def tell(*event: Any) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def words() -> Iterator[str]:
    """The answer of all drills, at a model's pace."""
    for number in range(WORDS):
        time.sleep(PACE)
        yield f"{number} "
    tell("produced")


async def words_async() -> AsyncIterator[str]:
    """The same, in asyncio."""
    for number in range(WORDS):
        await asyncio.sleep(PACE)
        yield f"{number} "
    tell("produced")


def call(method: str, url: str, body: Any = None, **headers: str) -> Any:
    """The reply to one request, to be read as a file; raises HTTPError."""
    headers = {name.replace("_", "-"): value for name, value in headers.items() if value}
    data = json.dumps(body).encode() if body else None
    return urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method))


def server_sent(url: str, cursor: str) -> Iterator[tuple[str, Any, str]]:
    """Name, data and ID of each server-sent event, read as a browser does."""
    name = ""
    with call("GET", url, Last_Event_ID=cursor) as reply:
        for line in reply:
            field, _, value = line.decode().rstrip("\n").partition(": ")
            if field == "id":
                cursor = value
            elif field == "event":
                name = value
            elif field == "data":
                yield name, json.loads(value), cursor


def serve(app: Any) -> str:
    """Serve an application in a thread; gives its address."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


class Kit:
    """`ask` in one process, and a WebServer in each of the others."""

    def __init__(self) -> None:
        import llmstream_nb

        self.ask, _ = llmstream_nb.ask, llmstream_nb.connect()
        self.address = f"http://127.0.0.1:{llmstream_nb.WebServer(token='').start().port}/answers/"

    def produce(self, name: str) -> None:
        self.ask("Count!", id=name, source=lambda *_: words())
        tell("ready", name)

    def view(self, where: str, cursor: str) -> Iterator[Event]:
        for name, data, at in server_sent(f"{self.address}{where}/events", cursor):
            if name == "text":
                yield "text", data["text"], at
            elif name == "gap" or data.get("state") == "interrupted":
                yield ("warned",)
            elif name in ("end", "failed"):
                yield "end", "whole" if data.get("reason") == "stop" else name

    def stop(self, where: str) -> None:
        call("DELETE", self.address + where)


class Recipe:
    """notebooks/recipe_async.py as it stands, in each process; our words take the model's place."""

    def __init__(self) -> None:
        os.environ |= {"OPENAI_API_KEY": "none", "OPENAI_MODEL": "none"}
        sys.path.append(str(Path(__file__).parents[2] / "notebooks"))
        import recipe_async

        async def answer(_: str, say: Any) -> None:
            async for word in words_async():
                say(("text", word))
            say(("end", "stop"))

        recipe_async.answer = answer
        self.address = f"{serve(recipe_async.app)}/answers"

    def produce(self, name: str) -> None:
        reply = call("POST", self.address, {"question": name}, Content_Type="application/json")
        tell("ready", json.load(reply)["id"])

    def view(self, where: str, cursor: str) -> Iterator[Event]:
        for _, data, at in server_sent(f"{self.address}/{where}/events", cursor):
            if data["kind"] == "text":
                yield "text", data["text"], at
            else:
                yield "end", "whole" if data["text"] == "stop" else data["text"]

    def stop(self, where: str) -> None:
        call("DELETE", f"{self.address}/{where}")


class PlainStream:
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
        from fastapi import FastAPI, HTTPException
        from fastapi.responses import StreamingResponse

        app, self.asked = FastAPI(), set[str]()

        @app.get("/{name}")
        def events(name: str) -> StreamingResponse:
            if name not in self.asked:
                raise HTTPException(404)
            self.asked.remove(name)
            return StreamingResponse(f"data: {json.dumps(text)}\n\n" for text in chain(words(), [MARK]))

        self.address = serve(app)

    def produce(self, name: str) -> None:
        self.asked.add(name)
        tell("ready", f"{self.address}/{name}")

    def view(self, where: str, _: str) -> Iterator[Event]:
        for _, text, _ in server_sent(where if ":" in where else f"{self.address}/{where}", ""):
            yield ("end", "whole") if text == MARK else ("text", text, "")

    def stop(self, _: str) -> None:
        tell("stopped")
        os._exit(0)  # the page is closed


SIDES = {"kit": Kit, "recipe": Recipe, "xadd": PlainStream, "sse": PlainEvents}


def run(side: Any, verb: str, arguments: list[str]) -> None:
    """Carry out one command."""
    try:
        if verb == "produce":
            side.produce(*arguments)
        elif verb == "view":
            for event in side.view(*arguments):
                tell(*event)
            tell("end", "cut")  # unless another end came before
        elif hasattr(side, "stop"):
            side.stop(*arguments)
            tell("stopped")
        else:
            tell("cannot")
    except Exception as error:
        tell("end", f"{type(error).__name__}: {error}")


def main() -> None:
    side = SIDES[sys.argv[1]]()
    tell("up")
    for line in sys.stdin:
        threading.Thread(target=run, args=(side, (command := json.loads(line))[0], command[1:]), daemon=True).start()
    os._exit(0)


if __name__ == "__main__":
    main()
