"""`python -m benchmarks.drills`: put this kit, and what else is installed, to the same drills, and print the table."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.drills.sides import WORDS
from llmstream_nb.faults.servers import RedisServer, available

HERE = Path(__file__).parent
WHICH = HERE.with_name("WHICH.md")
ANSWER = "".join(f"{number} " for number in range(WORDS))
LONG = 30.0  # seconds that a viewer waits to be told; nobody looks longer at a page that stands still
# The rows, with all that may stand in their cells.
ROWS = {
    "version": r"[\w.+-]+",
    "needs": r"(Python|Node)(, Redis|, a server of its own)?",
    "late viewer": r"has it all|has nothing|has a part",
    "reload": r"goes on at a cursor|gets all anew|has nothing|has a part",
    "viewer served by another process": r"yes|no",
    "stop": r"stops, text kept|stops, text gone|no way",
    "producer killed: who watches": r"told within (10|30) s|waits|ends as if whole",
    "producer killed: who comes then": r"told within (10|30) s|waits|ends as if whole",
    "entries trimmed": r"told|not told|nothing to trim",
    "right after the end": r"has it all(, for \d+ h|, until deleted)|has nothing|has a part",
    "after its time": r"told|waits|ends as if whole|has no end",
    "commands to Redis, with one viewer": r"[\d,]+",
}


@dataclass
class Agent:
    """A process of a side: takes commands, and keeps what it told."""

    command: list[str]
    url: str
    more: dict[str, str] = field(default_factory=dict)
    events: list[list[Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        environment = os.environ | {"REDIS_URL": self.url, **self.more}
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self.process = subprocess.Popen(self.command, env=environment, **pipes)
        threading.Thread(target=self._read, daemon=True).start()
        self.wait("up")

    def _read(self) -> None:
        for line in self.process.stdout or ():
            with self._changed:
                self.events.append(json.loads(line))
                self._changed.notify_all()

    def say(self, *command: str) -> Agent:
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return self

    def until(self, condition: Callable[[], Any], timeout: float = LONG) -> Any:
        with self._changed:
            return self._changed.wait_for(condition, timeout)

    def wait(self, *kinds: str, timeout: float = LONG) -> list[Any]:
        """The first event of these kinds; raises TimeoutError."""
        found = self.until(lambda: [event for event in self.events if event[0] in kinds], timeout)
        if not found:
            raise TimeoutError(f"{self.command[-2:]}: no {kinds} in {timeout:g} s, but {self.events[-3:]}")
        return found[0]

    @property
    def text(self) -> str:
        return "".join(event[1] for event in self.events if event[0] == "text")

    @property
    def end(self) -> str:
        return next((event[1] for event in self.events if event[0] == "end"), "")

    @property
    def warned(self) -> bool:
        return ["warned"] in self.events

    def half(self) -> Agent:
        """Wait until half of the answer is seen."""
        if not self.until(lambda: len(self.text) >= len(ANSWER) / 2):
            raise TimeoutError(f"{self.command[-2:]}: no half, but {self.events[-3:]}")
        return self

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Drills:
    """All drills of one side, on a Redis of its own."""

    def __init__(self, command: list[str], server: list[str], stack: ExitStack) -> None:
        self.command, self.stack, self.more = command, stack, {}
        self.redis = stack.enter_context(RedisServer(available()[0], appendonly="no"))
        self.client = self.redis.client()
        if server:
            self.more = {"DRILL_SERVER": self.agent(server).say("produce").wait("ready")[1]}

    def agent(self, command: list[str] | None = None) -> Agent:
        made = Agent(command or self.command, self.redis.url, self.more)
        self.stack.callback(made.kill)
        return made

    def begin(self, name: str) -> tuple[Agent, str]:
        producer = self.agent()
        return producer, producer.say("produce", name).wait("ready")[1]

    def run(self) -> Iterator[tuple[str, str]]:
        yield from self.watched()
        yield "stop", self.stop()
        yield from self.killed()
        yield "entries trimmed", self.trimmed()
        yield "commands to Redis, with one viewer", self.commands()

    def watched(self) -> Iterator[tuple[str, str]]:
        first, late, cut, back, elsewhere, after, expired = (self.agent() for _ in range(7))
        producer, where = self.begin("watched")
        first.say("view", where, "").wait("text")
        for one in (cut, elsewhere):
            one.say("view", where.rpartition("/")[2] if one is elsewhere else where, "")
        first.half()
        late.say("view", where, "")
        cut.kill()
        cursor = next((event[2] for event in reversed(cut.events) if event[0] == "text"), "")
        back.say("view", where, cursor)
        for one in (late, back, elsewhere, first):
            one.wait("end")
        yield "late viewer", whole(late.text)
        seen = whole(cut.text + back.text if cursor else back.text)
        yield "reload", {"has it all": "goes on at a cursor" if cursor else "gets all anew"}.get(seen, seen)
        yield "viewer served by another process", "yes" if elsewhere.text == ANSWER else "no"
        lives = [seconds for key in self.client.keys() if (seconds := self.client.ttl(key)) > 0]
        after.say("view", where, "").wait("end")
        kept = f", for {round(min(lives) / 3600)} h" if lives else ", until deleted"
        yield "right after the end", whole(after.text) + (kept if after.text == ANSWER else "")
        for key in self.client.keys():
            if self.client.ttl(key) > 0:
                self.client.delete(key)
        expired.say("view", where, "").until(lambda: expired.end, 10)
        yield "after its time", "has no end" if expired.text == ANSWER else told(expired, 0).removesuffix(" within 10 s")

    def stop(self) -> str:
        viewer, after = self.agent(), self.agent()
        producer, where = self.begin("stopped")
        viewer.say("view", where, "").half().say("stop", where)
        if viewer.wait("stopped", "cannot")[0] == "cannot" or producer.until(lambda: ["produced", WORDS] in producer.events, 5):
            return "no way"
        after.say("view", where, "").until(lambda: after.end, 10)
        kept = len(after.text) >= len(viewer.text) / 2 and ANSWER.startswith(after.text)
        return "stops, text kept" if kept else "stops, text gone"

    def killed(self) -> Iterator[tuple[str, str]]:
        watching, coming = self.agent(), self.agent()
        producer, where = self.begin("killed")
        watching.say("view", where, "").half()
        producer.kill()
        began = time.monotonic()
        coming.say("view", where, "")
        for row, viewer in (("who watches", watching), ("who comes then", coming)):
            viewer.until(lambda viewer=viewer: viewer.end or viewer.warned, began + LONG - time.monotonic())
            yield f"producer killed: {row}", told(viewer, time.monotonic() - began)

    def trimmed(self) -> str:
        viewer, back = self.agent(), self.agent()
        producer, where = self.begin("trimmed")
        viewer.say("view", where, "").half().kill()
        streams = [key for key in self.client.scan_iter(_type="stream") if self.client.xlen(key) > WORDS / 3]
        for key in streams:
            self.client.xtrim(key, maxlen=20, approximate=False)
        if not streams:
            return "nothing to trim"
        seen, cursor = next((event[1], event[2]) for event in viewer.events if event[0] == "text")
        back.say("view", where, cursor).wait("end")
        return "not told" if back.end == "whole" and not back.warned else "told"

    def commands(self) -> str:
        viewer = self.agent()
        before = self.client.info("stats")["total_commands_processed"]
        producer, where = self.begin("counted")
        viewer.say("view", where, "").wait("end")
        return f"{self.client.info('stats')['total_commands_processed'] - before:,}"


def whole(text: str) -> str:
    return "has it all" if text == ANSWER else "has a part" if text else "has nothing"


def told(viewer: Agent, seconds: float) -> str:
    """What one sees whose producer is dead."""
    if viewer.warned or viewer.end not in ("", "whole"):
        return f"told within {10 if seconds < 10 else 30} s"
    return "ends as if whole" if viewer.end else "waits"


@dataclass
class Side:
    """What is put to the drills: how it is called, how its processes begin, and where its version stands."""

    title: str
    name: str
    needs: str
    package: str = ""  # of Python or Node; else it is this kit's own
    server: str = ""

    def version(self, peers: Path) -> str:
        """Raises LookupError with a reason where it is not installed."""
        if not self.package:
            return metadata.version("llmstream-nb")
        if self.needs.startswith("Node"):
            about = peers / "node_modules" / self.package / "package.json"
            if not (about.exists() and shutil.which("node")):
                raise LookupError(f"{self.title}: needs Node, and npm install --prefix FOLDER {self.package}")
            return str(json.loads(about.read_text("utf-8"))["version"])
        try:
            return next(one.version for one in metadata.distributions(name=self.package, path=[*sys.path, str(peers)]))
        except StopIteration:
            raise LookupError(f"{self.title}: needs pip install --target FOLDER {self.package}") from None

    def command(self, peers: Path, name: str) -> list[str]:
        if self.needs.startswith("Node"):
            return ["node", str(HERE / "sides.mjs"), name, str(peers)]
        return [sys.executable, "-m", "benchmarks.drills.sides", name]


SIDES = [
    Side("this kit", "kit", "Python, Redis"),
    Side("its web recipe", "recipe", "Python, Redis"),
    Side("XADD and XREAD", "plain-xadd", "Python, Redis", "redis"),
    Side("plain SSE", "plain-sse", "Python"),
    Side("resumable-stream (npm)", "resumable-stream", "Node, Redis", "resumable-stream"),
    Side("resumable-stream (PyPI)", "resumable-stream-pypi", "Python, Redis", "resumable-stream"),
    Side("assistant-stream", "assistant-stream", "Node, Redis", "assistant-stream"),
    Side(
        "Durable Streams",
        "durable-streams",
        "Node, a server of its own",
        "@durable-streams/client",
        "durable-streams-server",
    ),
]


def drill(side: Side, peers: Path) -> dict[str, str]:
    """One column; raises LookupError where it is not installed."""
    cells = {"version": side.version(peers), "needs": side.needs}
    with ExitStack() as stack:
        server = side.command(peers, side.server) if side.server else []
        for row, cell in Drills(side.command(peers, side.name), server, stack).run():
            cells[row] = cell
    for row, cell in cells.items():
        assert re.fullmatch(ROWS[row], cell), f"{side.title}, {row}: {cell}"
    return cells


def said(program: str) -> str:
    """The version that a program tells."""
    try:
        told = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    except FileNotFoundError:
        return "not installed"
    return next(iter(re.findall(r"\d+\.\d+\.\d+", told)), "unknown")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drills", description=__doc__)
    parser.add_argument("peers", nargs="?", default=".", type=Path, help="folder with what npm and pip installed")
    peers = parser.parse_args(arguments).peers.resolve()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), str(peers)])
    columns: dict[str, dict[str, str]] = {}
    missing = []
    with ThreadPoolExecutor(2) as pool:
        for side, made in [(side, pool.submit(drill, side, peers)) for side in SIDES]:
            try:
                columns[side.title] = made.result()
            except LookupError as reason:
                missing.append(str(reason))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[row, *(column[row] for column in columns.values())] for row in ROWS]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    about = {"Python": platform.python_version()} | {name: said(name) for name in (available()[0], "node")}
    ran = f"Ran on {time.strftime('%Y-%m-%d')} with " + ", ".join(f"{name} {value}" for name, value in about.items())
    text = "\n\n".join(["# The same drills for all", table, f"{ran}.", *(f"Not run: {reason}." for reason in missing)]) + "\n"
    print(text)
    if not missing:
        WHICH.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
