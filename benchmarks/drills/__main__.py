"""`python -m benchmarks.drills [FOLDER]`: put the kit and its peers to the same drills, and print what became of them.

FOLDER is where `npm install --prefix` and `pip install --target` put the peers; see benchmarks/README.md.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.drills.sides import WORDS
from llmstream_nb.faults.servers import RedisServer, available

HERE = Path(__file__).parent
WHICH = HERE.with_name("WHICH.md")
ANSWER = "".join(f"{number} " for number in range(WORDS))
LONG = 30.0  # seconds: who stands before a page that stands still looks no longer
# What is put to the drills, by its title: the side, what it needs, and the package whose version is told.
SIDES = {
    "this kit": ("kit", "Python, Redis", "llmstream-nb"),
    "its web recipe": ("recipe", "Python, Redis", "fastapi"),
    "XADD and XREAD": ("xadd", "Python, Redis", "redis"),
    "plain SSE": ("sse", "Python", "fastapi"),
    "resumable-stream": ("resumable-stream", "Node, Redis", "resumable-stream"),
    "assistant-stream": ("assistant-stream", "Node, Redis", "assistant-stream"),
    "Durable Streams": ("durable-streams", "Node, a server of its own", "@durable-streams/client"),
}
# The rows, and all that may stand in their cells.
SEEN = "has it all|has nothing|has a part"
TOLD = r"told within \d+ s|waits|ends as if whole"
ROWS = {
    "package": r"[\w@/-]+ \d[\w.]+",
    "needs": r"(Python|Node)(, Redis|, a server of its own)?",
    "late viewer": SEEN,
    "reload": f"({SEEN}), from (a cursor|the start)",
    "viewer served by another process": "yes|no",
    "stop": "stops, text kept|stops, text gone|no way",
    "producer killed: who watches": TOLD,
    "producer killed: who comes then": TOLD,
    "entries trimmed": f"nothing to trim|not told|{TOLD}",
    "after the end": rf"({SEEN}), (for \d+ h|kept nowhere|until deleted)",
    "after its time": f"never over|{TOLD}",
    "commands to Redis, one viewer": r"[\d,]+",
}


class Agent:
    """A process of a side: takes commands, and keeps what it tells, and when."""

    def __init__(self, command: list[str], **environment: str) -> None:
        self.events: list[tuple[float, list[Any]]] = []
        self._more, pipe = threading.Condition(), subprocess.PIPE
        self.process = subprocess.Popen(
            command, env=os.environ | environment, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        threading.Thread(target=self._listen, daemon=True).start()
        self.first("up")

    def _listen(self) -> None:
        for line in self.process.stdout or ():
            with self._more:
                self.events.append((time.monotonic(), json.loads(line)))
                self._more.notify_all()

    def say(self, *command: str) -> Agent:
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return self

    def text(self) -> str:
        return "".join(event[1] for _, event in self.events if event[0] == "text")

    def first(self, *kinds: str, half: bool = False, patience: float = LONG) -> list[Any]:
        """The first event of these kinds, once there is one, and half of the answer; else an empty list."""

        def found() -> list[Any]:
            return next((event for _, event in self.events if event[0] in kinds), [])

        with self._more:
            self._more.wait_for(lambda: found() and (not half or len(self.text()) >= len(ANSWER) / 2), patience)
            return found()

    def told(self, since: float) -> str:
        """How this viewer learns that something is wrong."""
        kind, *how = self.first("end", "warned", patience=since + LONG - time.monotonic()) or ["", ""]
        if not kind or how == ["whole"]:
            return "ends as if whole" if kind else "waits"
        when = next(at for at, event in self.events if event[0] == kind)
        return f"told within {next(limit for limit in (1, 10, 40) if when - since < limit)} s"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Drills:
    """All drills of one side, on a Redis of its own."""

    def __init__(self, side: str, node: bool, folder: str, stack: ExitStack) -> None:
        self.stack, self.redis = stack, stack.enter_context(RedisServer(available()[0], appendonly="no"))
        self.client, self.environment = self.redis.client(), {"REDIS_URL": self.redis.url}
        self.command = [sys.executable, "-m", "benchmarks.drills.sides", side]
        if node:
            self.command = ["node", str(HERE / "sides.mjs"), folder, side]
        if side == "durable-streams":
            server = self.agent([*self.command[:-1], "durable-streams-server"]).say("produce")
            self.environment["DRILL_SERVER"] = server.first("ready")[1]

    def agent(self, command: list[str] | None = None) -> Agent:
        made = Agent(command or self.command, **self.environment)
        self.stack.callback(made.kill)
        return made

    def asked(self, viewers: int) -> tuple[str, Agent, list[Agent]]:
        """Ask, and wait until the first viewer has half; gives where the answer is, its producer, and the viewers."""
        producer, agents = self.agent(), [self.agent() for _ in range(viewers)]
        where = producer.say("produce", f"n{time.monotonic_ns()}").first("ready")[1]
        agents[0].say("view", where, "").first("text", half=True)
        return where, producer, agents

    def all(self) -> Iterator[str]:
        """The cells, in the order of the rows."""
        yield from self.watched()
        for drill in (self.stopped, self.killed, self.trimmed, self.ended, self.counted):
            self.client.flushall()
            yield from drill()

    def watched(self) -> Iterator[str]:
        where, _, (cut, late, back, elsewhere) = self.asked(4)
        cut.kill()
        cursor = next(event[2] for _, event in reversed(cut.events) if event[0] == "text")
        back.say("view", where, cursor).first("text")
        late.say("view", where, "")
        elsewhere.say("view", where.rpartition("/")[2], "")
        for one in (late, back, elsewhere):
            one.first("end")
        yield seen(late.text())
        yield seen((cut.text() if cursor else "") + back.text()) + (", from a cursor" if cursor else ", from the start")
        yield "yes" if elsewhere.text() == ANSWER else "no"

    def stopped(self) -> Iterator[str]:
        where, producer, (viewer, after) = self.asked(2)
        if viewer.say("stop", where).first("stopped", "cannot") == ["cannot"] or producer.first("produced", patience=5):
            yield "no way"
            return
        after.say("view", where, "").first("end", patience=5)
        yield "stops, text kept" if len(after.text()) >= len(ANSWER) / 2 else "stops, text gone"

    def killed(self) -> Iterator[str]:
        where, producer, (watching, coming) = self.asked(2)
        producer.kill()
        began = time.monotonic()
        coming.say("view", where, "")
        yield watching.told(began)
        yield coming.told(began)

    def trimmed(self) -> Iterator[str]:
        where, _, (viewer, back) = self.asked(2)
        viewer.kill()
        streams = [key for key in self.client.scan_iter(_type="stream") if self.client.xlen(key) > WORDS / 3]
        for key in streams:
            self.client.xtrim(key, maxlen=20, approximate=False)
        began, cursor = time.monotonic(), viewer.first("text")[2]
        found = back.say("view", where, cursor).told(began) if streams else "nothing to trim"
        yield found.replace("ends as if whole", "not told")

    def ended(self) -> Iterator[str]:
        where, _, (viewer, after, expired) = self.asked(3)
        viewer.first("end")
        after.say("view", where, "").first("end")
        lives = {key: life for key in self.client.scan_iter() if (life := self.client.ttl(key)) > 0}
        had = seen(after.text())
        kept = f"for {min(lives.values()) / 3600:.0f} h" if lives else "until deleted"
        yield f"{had}, {kept if had == 'has it all' else 'kept nowhere'}"
        self.client.delete("none", *lives)
        began = time.monotonic()
        expired.say("view", where, "")
        yield "never over" if not lives and had == "has it all" else expired.told(began)

    def counted(self) -> Iterator[str]:
        before = self.client.info("stats")["total_commands_processed"]
        self.asked(1)[2][0].first("end")
        yield f"{self.client.info('stats')['total_commands_processed'] - before - 1:,}"


def seen(text: str) -> str:
    return "has it all" if text == ANSWER else "has a part" if text else "has nothing"


def column(title: str, folder: Path) -> list[str]:
    """The cells of one side; raises OSError or PackageNotFoundError where it is not installed."""
    side, needs, package = SIDES[title]
    node = needs.startswith("Node")
    about = folder / "node_modules" / package / "package.json"
    version = json.loads(about.read_text("utf-8"))["version"] if node else metadata.version(package)
    with ExitStack() as stack:
        cells = [f"{package} {version}", needs, *Drills(side, node, str(folder), stack).all()]
    wrong = [cell for cell, allowed in zip(cells, ROWS.values(), strict=True) if not re.fullmatch(allowed, cell)]
    assert not wrong, f"{title}: {wrong}"
    return cells


def main() -> None:
    folder = Path(*sys.argv[1:2]).resolve()
    sys.path.append(str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), str(folder)])
    columns, missing = {"": list(ROWS)}, []
    with ThreadPoolExecutor(2) as pool:
        for title, made in [(title, pool.submit(column, title, folder)) for title in SIDES]:
            try:
                columns[title] = made.result()
            except (OSError, metadata.PackageNotFoundError) as error:
                missing.append(f"Not run: {title}, which is not installed ({error}).")
    lines = [list(columns), ["---"] * len(columns), *map(list, zip(*columns.values(), strict=True))]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    versions = []
    for program in (sys.executable, available()[0], "node"):
        said = re.search(r"\d+\.\d+\.\d+", subprocess.getoutput(f"{program} --version"))
        versions.append(f"{Path(program).name} {said.group() if said else 'none'}")
    ran = f"Ran on {time.strftime('%Y-%m-%d')} with {', '.join(versions)}. [What the words mean](README.md#drills)."
    text = "\n\n".join(["# The same drills for all", table, ran, *missing]) + "\n"
    print(text)
    if not missing:
        WHICH.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
