"""Workers in processes of their own, to be killed, frozen, or broken on purpose.

They are forked from one process that has imported everything, so that a new one costs milliseconds:

    with Zygote() as zygote:
        worker = zygote.fork({"url": …, "prefix": …, "name": "w0", "slots": 1, "timing": {…}})
        worker.kill()

A question to such a worker is two numbers, `<tokens> <seconds between two>`. The answer to `3 0.01` is
`0.7f3a 1.7f3a 2.7f3a `: numbered, and with a tag that every attempt makes anew, so that text of two attempts can't
be taken for one. `poison` kills whoever begins to answer it.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import psutil

from llmstream_nb.answers import attempt as attempts
from llmstream_nb.answers.attempt import Attempt
from llmstream_nb.answers.connection import connect
from llmstream_nb.answers.read import Backoff
from llmstream_nb.pool import worker as workers
from llmstream_nb.pool.process import serve
from llmstream_nb.pool.queue import Job, Queue
from llmstream_nb.pool.worker import Worker
from llmstream_nb.protocol.wire import EntryID, Fenced, Timing, parse_entries

POINTS = {  # what a worker does, where it can be hit: the method, before or after its nth call
    "takes a question": (Worker, "_begin"),
    "opens an attempt": (Attempt, "_begin"),
    "writes": (Attempt, "_queue_xadd"),  # in the middle of building a batch, when all has been checked
    "writes the record": (Attempt, "finish"),
    "takes it from the queue": (Queue, "done"),
}


# ------------------------------------------------------------------------------------------------ in the test


class Process:
    """A worker, as the test sees it. Its process id is its own until it is reaped."""

    def __init__(self, zygote: Zygote, pid: int, name: str) -> None:
        self.name, self._zygote, self._pid = name, zygote, pid
        self._code: int | None = None

    def send(self, number: int) -> None:
        """Send it a signal."""
        if self._code is None:
            os.kill(self._pid, number)

    def frozen(self) -> bool:
        """Whether SIGSTOP has reached it."""
        return self._code is None and psutil.Process(self._pid).status() == psutil.STATUS_STOPPED

    def code(self) -> int | None:
        """Its exit code, as subprocess gives it: None while it runs."""
        if self._code is None and psutil.Process(self._pid).status() == psutil.STATUS_ZOMBIE:
            self._code = self._zygote.ask({"reap": self._pid})
        return self._code


class Zygote:
    """The process that workers are forked from; when it ends, they do."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.pool"],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )

    def fork(self, options: dict[str, Any]) -> Process:
        """Start a worker."""
        return Process(self, self.ask({"fork": options}), options["name"])

    def ask(self, request: dict[str, Any]) -> Any:
        """Have it do something, and return its answer."""
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


# -------------------------------------------------------------------------------------------- in the processes


def main() -> None:
    """Fork workers, and reap them, as standard input says; end them all with it."""
    alive, (ear, mouth) = set[int](), os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # until a worker can deal with it
    for line in sys.stdin:
        request = json.loads(line)
        if "reap" in request:
            _, status = os.waitpid(request["reap"], 0)
            alive.discard(request["reap"])
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if not answer:
                os.close(mouth)
                work(ear, **request["fork"])
            alive.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def work(
    ear: int,
    url: str,
    prefix: str,
    name: str,
    slots: int,
    timing: dict[str, float],
    blow: dict[str, Any] | None = None,
    variant: str | None = None,
    goes_on: bool = False,
) -> None:
    """Be a worker until told to end. `blow` hits it at one of POINTS; `variant` breaks it on purpose.

    `goes_on`: its source goes on from the text of who died.
    """

    def end_with_the_zygote() -> None:
        os.read(ear, 1)
        os._exit(1)

    code = 1
    try:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        threading.Thread(target=end_with_the_zygote, daemon=True).start()
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        if variant:
            VARIANTS[variant]()
        if blow:
            arm(**blow)
        client = connect(url, prefix=prefix)
        asked = going_on if goes_on else source
        serve(Worker(name=name, slots=slots, source=asked, client=client, timing=Timing(**timing)), within=0)
        code = 0
    finally:
        os._exit(code)


def source(question: str, topic: str | None) -> Iterator[str]:
    if question == "poison":
        yield "poison "
        time.sleep(0.05)  # so that it can be seen
        os.kill(os.getpid(), signal.SIGKILL)
    yield from going_on(question, topic, "")


def going_on(question: str, topic: str | None, prefix: str) -> Iterator[str]:
    tokens, seconds = question.split()
    tag = secrets.token_hex(2)
    for number in range(len(prefix.split()), int(tokens)):
        time.sleep(float(seconds))
        yield f"{number}.{tag} "


def arm(point: str, when: str, call: int, number: int) -> None:
    """Send this process a signal before or after its nth call of a method."""
    home, name = POINTS[point]
    method, calls = getattr(home, name), 0

    def armed(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        this = calls == call
        if this and when == "before":
            os.kill(os.getpid(), number)
        result = method(*args, **options)
        if this and when == "after":
            os.kill(os.getpid(), number)
        return result

    setattr(home, name, armed)


# ---------------------------------------------------------------------------------------------- broken variants


def no_fencing() -> None:
    """Nobody looks whether the answer is still its own, and the next free ID is as good as any."""
    synchronise = Attempt.synchronise

    def hopeful(self: Attempt) -> None:
        try:
            synchronise(self)
        except Fenced:
            self._leased = time.monotonic()

    def xadd(self: Attempt, pipe: Any, seq: int, create: bool = False) -> None:
        kind, text, ms = self.entries[seq]
        top = parse_entries(self.client.xrevrange(self.keys.chunks, count=1))
        free = EntryID(top[0].id.attempt, top[0].id.seq + 1 + seq - self.sent) if top and not create else None
        pipe.execute_command(
            "XADD", self.keys.chunks, str(free or f"{self.number}-0"), "kind", kind, "text", text, "ms", ms
        )

    Attempt.synchronise, Attempt._queue_xadd = hopeful, xadd


def no_look_at_the_lease() -> None:
    """What is idle in the queue is taken for dead, also while its answer is being written."""
    workers.is_written = lambda answer_id, client: False
    synchronise = Attempt.synchronise

    def careless(self: Attempt) -> None:
        if not self.number:
            self._line.redis.delete(*(self.keys.lease(number) for number in range(1, 9)))
        synchronise(self)

    Attempt.synchronise = careless


def ack_before_the_end() -> None:
    """At most once: what is taken from the queue is out of it."""
    begin = Worker._begin

    def careless(self: Worker, job: Job) -> None:
        begin(self, job)
        self._queue.done(job)

    Worker._begin = careless


def no_ack() -> None:
    """What has been answered stays in the queue."""
    Queue.done = lambda self, job: None


def as_it_is() -> None:
    """Not broken."""


def slow_to_come_back() -> None:
    """Not broken: after an outage it takes longer than others to come back, but less than a lease."""

    class Slow(Backoff):
        def sleep(self) -> bool:
            time.sleep(self._longest)
            return super().sleep()

    attempts.Backoff = workers.Backoff = Slow


def no_wait_before_judging() -> None:
    """Whoever is back first after an outage takes the others for dead."""
    Worker._wait_to_judge = lambda self: None


def no_end_of_takeovers() -> None:
    """A question may kill as many workers as it likes."""
    workers.MAX_TAKEOVERS = 1_000


def old_text_goes_on() -> None:
    """A takeover does not begin anew, but continues the dead attempt under its IDs."""
    synchronise = Attempt.synchronise

    def thrifty(self: Attempt) -> None:
        top = self._line.redis.xrevrange(self.keys.chunks, count=1) if not self.number else []
        if top and "text" in top[0][1]["kind"]:
            attempt, seq = map(int, top[0][0].split("-"))
            self.number, self.sent, self._leased = attempt, seq + 1, time.monotonic()
            self.entries = [("text", "", 0)] * self.sent
            return
        synchronise(self)

    Attempt.synchronise = thrifty


def one_entry_less_is_kept() -> None:
    """Who goes on lacks the last word of who died."""
    standing = Attempt._standing
    Attempt._standing = lambda self, pipe, last: standing(self, pipe, EntryID(last.attempt, max(0, last.seq - 1)))


def slow_coordinator() -> None:
    """Not broken: held up for seconds after each question it takes, while its producers go on."""
    begin = Worker._begin

    def slow(self: Worker, job: Job) -> None:
        begin(self, job)
        time.sleep(3 * self.timing.lease)

    Worker._begin = slow


def slow_coordinator_and_no_look_at_the_lease() -> None:
    no_look_at_the_lease()
    slow_coordinator()


VARIANTS: dict[str, Callable[[], None]] = {
    variant.__name__: variant
    for variant in (
        no_fencing,
        ack_before_the_end,
        no_ack,
        as_it_is,
        slow_to_come_back,
        no_wait_before_judging,
        no_end_of_takeovers,
        old_text_goes_on,
        one_entry_less_is_kept,
        slow_coordinator,
        slow_coordinator_and_no_look_at_the_lease,
    )
}

if __name__ == "__main__":
    main()
