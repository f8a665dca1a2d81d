"""A worker as a process: how one is started, and how it ends."""

import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired

import redis

from llmstream_nb.answers.connection import current, environment_of
from llmstream_nb.pool.worker import FINISH, Worker

_started: dict[str, Popen[bytes]] = {}  # by the name of the worker


def serve(worker: Worker, within: float = FINISH, *, with_parent: bool = False) -> None:
    """Run a worker in the main thread of a process, until SIGTERM or Ctrl-C; a second one hands back at once.

    `with_parent` ends it too when standard input does, which is a pipe from the process that wanted it.
    """

    def end(*_: object) -> None:
        worker.finish(0 if worker.ending else within)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)

    def watch() -> None:
        with suppress(OSError):  # what can't be read has ended, too
            while os.read(0, 64):
                pass
        worker.finish(0)

    if with_parent:
        threading.Thread(target=watch, name="llmstream parent", daemon=True).start()
    worker.run()


def start_process(name: str, *, slots: int = 1, lease: float = 5.0, client: redis.Redis | None = None) -> Popen[bytes]:
    """Start a worker in a process of its own; it ends when this process does, however that happens.

    One that was started under this name before is ended first, and hands back what it is at.

    The process is the worker itself: `kill()` kills it, without a word to Redis. To see what a worker says, start
    one in a terminal: `python3 -m llmstream_nb worker`.
    """
    if old := _started.get(name):
        old.stdin.close()  # type: ignore[union-attr]  # as if this process had ended
        with suppress(TimeoutExpired):
            old.wait(5)
        old.kill()
        old.wait()
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = os.environ | environment_of(client or current()) | {"PYTHONPATH": path, "LLMSTREAM_NO_VENV": "1"}
    command = [sys.executable, "-m", "llmstream_nb", "worker", f"--name={name}", "--slots", str(slots)]
    command += ["--lease", str(lease), "--with-parent"]
    # In a session of its own: to interrupt a cell is not to interrupt the workers.
    _started[name] = Popen(command, env=environment, stdin=PIPE, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True)
    return _started[name]
