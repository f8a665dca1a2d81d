"""The pool: workers share a queue of questions through a consumer group, and take over from those that die."""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from redis.exceptions import RedisError, ResponseError

from llmstream_nb.answers.ask import Answer, Source, clear, close_answer
from llmstream_nb.answers.connection import (
    Line,
    current,
    environment_of,
    is_passing,
    milliseconds,
    names_of,
    said,
    unusable,
)
from llmstream_nb.answers.produce import Producer, Writing
from llmstream_nb.answers.read import Backoff, look
from llmstream_nb.answers.record import new_record, register
from llmstream_nb.llm.sources import check_source, complete, default_source
from llmstream_nb.pool.groups import NEW, check_name, is_gone, read_group
from llmstream_nb.protocol.wire import (
    POOL,
    BadAnswerId,
    Deleted,
    Fenced,
    LLMStreamError,
    Timing,
    check_answer_id,
    check_question,
    parse_entries,
    parse_record,
)

MAX_TAKEOVERS = 3  # a question that has outlived so many is given up: it may be what kills its workers
KEPT_FAILURES = 1_000
FINISH = 30.0  # seconds that a worker has by default to finish its answers when it is told to end

log = logging.getLogger("llmstream_nb.pool.worker")


def enqueue(
    question: str,
    *,
    topic: str | None = None,
    source: str | None = None,
    model: str | None = None,
    id: str | None = None,
    client: redis.Redis | None = None,
    timing: Timing | None = None,
) -> Answer:
    """Put a question into the pool's queue (XADD), and return the same handle as `ask`.

    Some worker will answer it, also after this process has ended; if that worker dies, another begins anew.
    Without a worker it waits: `Worker().start()`, or `python3 -m llmstream_nb worker` in a terminal.

    Arguments and errors are those of `ask`; what `source` needs must be where the workers are.
    """
    client, timing = client or current(), timing or Timing()
    question, answer_id = check_question(question), check_answer_id(id or secrets.token_hex(6))
    source = check_source(source or default_source())
    record = new_record(answer_id, question, topic, source, model or "") | {"pooled": True}
    register(client, record, timing)
    try:
        client.xadd(names_of(client).questions, {"answer": answer_id})
    except (RedisError, OSError) as error:
        with suppress(LLMStreamError):
            clear(answer_id, client=client, timing=timing)
        raise unusable(error, client) from None
    return Answer(answer_id, client=client, timing=timing)


class NotAQuestion(LLMStreamError):
    """An entry of the queue, or the record behind it, that `enqueue` did not write."""


@dataclass
class Job:
    """A queue entry that a worker holds."""

    entry: str  # its ID
    answer_id: str
    question: str
    delivered: int  # how often it was: one more than there were takeovers
    producer: Producer


class Worker:
    """Answers the pool's questions, several at once; any number of workers share them.

    Args:
        slots: how many answers are written at the same time.
        name: its name as a consumer of the group; else made of host, process id and a random part.
        source: as in `ask`; else each question says who answers it.
        client: a Redis client; else that of the last `connect()`.
        timing: leases and limits in seconds, the same for all workers of a pool.
        writing: how to write answers, as in `ask`.

    How it holds up (the commands are those of Redis 6.2): a question stays pending with its worker until the end
    of its answer is confirmed, then XACK and XDEL. Each tick the holder resets the idle time of what it holds,
    with XCLAIM … JUSTID to itself. What is idle for a lease has lost its holder: whoever comes first claims it
    (XPENDING … IDLE, then XCLAIM, which counts the delivery) and opens a new attempt. Two at once can't both
    succeed, and a holder that wakes up is shut out: the stream refuses them (see `produce.Attempt`).
    """

    def __init__(
        self,
        *,
        slots: int = 4,
        name: str | None = None,
        source: Source = None,
        client: redis.Redis | None = None,
        timing: Timing | None = None,
        writing: Writing | None = None,
    ) -> None:
        if slots < 1:
            raise ValueError(f"a worker needs at least one slot, not {slots}")
        self.name = check_name(name or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}")
        self.slots, self.source, self.writing = slots, source, writing
        self.client, self.timing = client or current(), timing or Timing()
        self.error: LLMStreamError | None = None  # what ended a worker that was started with `start`
        self._names = names_of(self.client)
        self._jobs: dict[str, Job] = {}  # by the ID of the queue's entry
        self._ready = False  # the group is there
        self._thread: threading.Thread | None = None
        self._end_by: float | None = None  # monotonic time; None: go on
        self._changed = threading.Event()
        self._tick_at = self._judge_from = self._new_from = 0.0  # monotonic times

    def __repr__(self) -> str:
        return f"<Worker {self.name}>"

    @property
    def ending(self) -> bool:
        """Whether it takes no more questions."""
        return self._end_by is not None

    def start(self) -> Worker:
        """Do `run` in a thread of this process, until `stop`."""

        def run() -> None:
            try:
                self.run()
            except LLMStreamError as error:
                self.error = error

        self._thread = threading.Thread(target=run, name=f"llmstream worker {self.name}", daemon=True)
        self._thread.start()
        return self

    def finish(self, within: float = FINISH) -> None:
        """Take no more questions, and end once those in hand are answered; return at once.

        What is not answered within so many seconds goes back to the pool, and does not count as a takeover.
        """
        self._end_by = time.monotonic() + within  # and no event: a signal handler must not take its lock

    def stop(self, within: float = FINISH) -> None:
        """`finish`, and wait for it."""
        self.finish(within)
        if self._thread:
            self._thread.join()

    def run(self) -> None:
        """Work until `finish`. Raises RedisUnusable when Redis refuses, or stays away for `timing.give_up` seconds."""
        line, retry = Line(self.client, self._names.questions), Backoff(self.timing)
        self._wait_to_judge()
        try:
            while self._end_by is None or (self._jobs and time.monotonic() < self._end_by):
                try:
                    self._round(line.redis)
                    retry.reset()
                except (RedisError, OSError, AttributeError) as error:
                    if not (is_passing(error) or is_gone(error)) or not retry.sleep():
                        raise unusable(error, self.client) from None
                    self._ready = False
                    line.reopen()
                    self._wait_to_judge()
                    # Redis may be back with older data: let producers first write again what looks unanswered there.
                    self._new_from = self._judge_from
        finally:
            self._leave(line)
            line.close()

    def _wait_to_judge(self) -> None:
        """Idle time goes on counting while Redis is down: give all holders a lease to come back first."""
        self._judge_from = time.monotonic() + self.timing.lease

    def _round(self, line: redis.Redis) -> None:
        if not self._ready:
            self._make_group(line)
        self._settle(line)
        now = time.monotonic()
        if now >= self._tick_at:
            awake = now - self._tick_at < self.timing.lease  # else its entries may be another's by now
            self._tick_at = now + self.timing.tick
            if self._jobs and awake:
                line.xclaim(self._names.questions, POOL, self.name, 0, list(self._jobs), justid=True)
        if self._free and now >= self._judge_from:  # before new questions: somebody watches it stand still
            self._take_over(line)
        pause = max(0.0, self._tick_at - time.monotonic())
        if self._free and now >= self._new_from:
            for entry, fields in self._read(line, pause):
                self._begin(line, entry, fields, 1)
        else:
            self._changed.wait(pause)
            self._changed.clear()

    @property
    def _free(self) -> int:
        return self.slots - len(self._jobs) if self._end_by is None else 0

    def _make_group(self, line: redis.Redis) -> None:
        """Create queue and group where they are absent, and forget consumers that are long gone."""
        try:
            line.xgroup_create(self._names.questions, POOL, "0", mkstream=True)
        except ResponseError as error:
            if not said(error).startswith("BUSYGROUP"):
                raise
        consumers: Any = line.xinfo_consumers(self._names.questions, POOL)
        for consumer in consumers:
            if not consumer["pending"] and consumer["idle"] > milliseconds(self.timing.ttl):
                line.xgroup_delconsumer(self._names.questions, POOL, consumer["name"])
        self._ready = True

    def _read(self, line: redis.Redis, seconds: float) -> list[tuple[str, dict[str, str]]]:
        """New questions, as many as there are free slots; waits up to so many seconds for the first."""
        return read_group(line, self._names.questions, POOL, self.name, NEW, self._free, seconds)

    def _take_over(self, line: redis.Redis) -> None:
        """Claim what has been idle for a lease, if no living producer writes its answer."""
        lease, queue = milliseconds(self.timing.lease), self._names.questions
        idle: Any = line.xpending_range(queue, POOL, "-", "+", 100, idle=lease)
        for taken in idle:
            entry = taken["message_id"]
            found: Any = line.xrange(queue, entry, entry)
            fields = found[0][1] if found else {}
            if not self._free or entry in self._jobs or self._lives(fields.get("answer", "")):
                continue
            if not found:
                self._done(line, entry)  # somebody has deleted it
            elif line.xclaim(queue, POOL, self.name, lease, [entry]):  # empty: another was faster
                log.info("%s: takes over %s from %s", self.name, fields.get("answer"), taken["consumer"])
                self._begin(line, entry, fields, taken["times_delivered"] + 1)

    def _lives(self, answer_id: str) -> bool:
        """Whether a producer holds the lease of the newest attempt."""
        try:
            keys = self._names.answer(answer_id)
            top = parse_entries(self.client.xrevrange(keys.chunks, count=1))  # type: ignore[arg-type]
        except (LLMStreamError, ResponseError, AttributeError):
            return False  # no answer at all, which whoever claims it will report
        return bool(top and not top[0].final and self.client.exists(keys.lease(top[0].id.attempt)))

    def _begin(self, line: redis.Redis, entry: str, fields: Mapping[str, str], delivered: int) -> None:
        """Answer the question of this entry, unless there is nothing to answer."""
        answer_id = fields.get("answer", "")
        question = ""
        try:
            record = self._record(answer_id)
            if record is None:
                self._done(line, entry)  # cleared, or expired: nobody waits for it
                return
            question = record["question"]
            if delivered > 1 + MAX_TAKEOVERS:
                raise GivenUp(f"Given up: {delivered - 1} workers died, or were lost, while they answered this.")
            deltas = self._ask(record)
        except LLMStreamError as error:
            self._give_up(line, entry, answer_id, question, delivered, error)
            return
        record["source"], record["model"] = (
            getattr(deltas, name, "") or record[name] or "own" for name in ("source", "model")
        )
        producer = Producer(self.client, record, deltas, self.timing, self.writing, worker=self.name, job=entry)
        self._jobs[entry] = Job(entry, answer_id, question, delivered, producer)
        log.info("%s: answers %s", self.name, answer_id)

        def run() -> None:
            producer.run()
            self._changed.set()

        threading.Thread(target=run, name=f"llmstream write {answer_id}", daemon=True).start()

    def _record(self, answer_id: str) -> dict[str, Any] | None:
        """The question's record; None where there is none. Raises NotAQuestion."""
        try:
            text: Any = self.client.get(self._names.answer(answer_id).question)
        except BadAnswerId:
            raise NotAQuestion("This entry of the queue names no answer: enqueue() writes a field `answer`.") from None
        except ResponseError as error:
            raise NotAQuestion(f"The record of {answer_id!r} can't be read: {said(error)}") from None
        record = parse_record(text)
        if text is None:
            return None
        types = {"question": str, "topic": str, "source": str, "model": str, "asked": (int, float)}
        if record is None or not all(isinstance(record.get(name), kind) for name, kind in types.items()):
            raise NotAQuestion(f"The record of {answer_id!r} is not one that enqueue() wrote.")
        return record | {"id": answer_id, "question": check_question(record["question"])}

    def _ask(self, record: Mapping[str, Any]) -> Iterable[str]:
        """The deltas of an answer; what goes wrong already here comes out of their iteration, and into the answer."""
        question, topic = record["question"], record["topic"] or None
        try:
            if callable(self.source):
                return self.source(question, topic)
            return complete(
                question, topic=topic, source=self.source or record["source"], model=record["model"] or None
            )
        except Exception as error:  # noqa: BLE001 - a source may be anybody's code
            return _failing(error)

    # What becomes of a question

    def _settle(self, line: redis.Redis) -> None:
        """See to the answers whose producer is done."""
        for job in [job for job in self._jobs.values() if job.producer.done.is_set()]:
            error, entry = job.producer.error, job.entry
            if error is None or isinstance(error, Deleted):
                self._done(line, entry)
            elif isinstance(error, Fenced):
                if self._written_for(job.answer_id) not in (entry, None):
                    self._done(line, entry)  # the question stands in the queue twice, as after a lost reply
            elif not job.producer.lost:
                self._give_up(line, entry, job.answer_id, job.question, job.delivered, error)
            del self._jobs[entry]  # otherwise whoever finds it idle takes over
            log.info("%s: %s %s", self.name, job.answer_id, f"left: {error}" if error else "is answered")

    def _written_for(self, answer_id: str) -> str | None:
        """The queue's entry for which the newest attempt is written; None where nothing says so."""
        chunks = self._names.answer(answer_id).chunks
        try:
            top = parse_entries(self.client.xrevrange(chunks, count=1))  # type: ignore[arg-type]
            first: Any = top and self.client.xrange(chunks, *[f"{top[0].id.attempt}-0"] * 2)
            return parse_entries(first)[0].data.get("job")
        except (LLMStreamError, ResponseError, AttributeError, IndexError):
            return None  # cleared meanwhile, trimmed, or not the kit's

    def _done(self, line: redis.Redis, entry: str) -> None:
        with line.pipeline(transaction=True) as pipe:
            pipe.xack(self._names.questions, POOL, entry)
            pipe.xdel(self._names.questions, entry)
            pipe.execute()

    def _give_up(
        self, line: redis.Redis, entry: str, answer_id: str, question: str, delivered: int, error: LLMStreamError
    ) -> None:
        """End the answer as an error, put a row into the list of failures, and take the entry out of the queue."""
        name = type(error).__name__
        try:
            close_answer(self.client, answer_id, self.timing, error=name, message=str(error))
            ended = look(answer_id, self.client).record.get("error") == name  # else somebody has finished it after all
        except Fenced:
            return  # somebody is at it after all
        except (LLMStreamError, ResponseError, AttributeError) as problem:
            cause: Any = problem.__context__ if isinstance(problem, LLMStreamError) else problem
            if is_passing(cause):
                raise cause from None  # not now: somebody does it later
            ended = True  # what lies there is no answer that could be closed
        if ended:
            row = {"at": round(time.time(), 3), "entry": entry, "answer": answer_id, "question": question}
            row |= {"error": name, "message": str(error), "delivered": delivered, "worker": self.name}
            self.client.lpush(self._names.failures, json.dumps(row))
            self.client.ltrim(self._names.failures, 0, KEPT_FAILURES - 1)
            log.warning("%s: gives up %s: %s", self.name, answer_id or entry, error)
        self._done(line, entry)

    def _leave(self, line: Line) -> None:
        """Hand back what is not answered, and sign off from the group if nothing is pending."""
        for job in self._jobs.values():
            job.producer.leave()
        deadline = time.monotonic() + 2 * self.timing.tick
        for job in self._jobs.values():
            job.producer.done.wait(max(0.0, deadline - time.monotonic()))
        with suppress(RedisError, OSError, LLMStreamError):
            queue, idle = self._names.questions, 2 * milliseconds(self.timing.lease)
            for job in list(self._jobs.values()):
                if job.producer.ended:
                    self._done(line.redis, job.entry)
                elif not job.producer.error:
                    log.info("%s: hands back %s", self.name, job.answer_id)
                    line.redis.xclaim(
                        queue, POOL, self.name, 0, [job.entry], idle=idle, retrycount=job.delivered - 1, justid=True
                    )
            self._jobs.clear()
            if not line.redis.xpending_range(queue, POOL, "-", "+", 1, consumername=self.name):
                line.redis.xgroup_delconsumer(queue, POOL, self.name)


class GivenUp(LLMStreamError):
    """A question that has outlived too many workers."""


def _failing(error: Exception) -> Iterator[str]:
    raise error
    yield  # makes this a generator: it raises at its first `next`


# -------------------------------------------------------------------------------------------------- processes


def serve(worker: Worker, within: float = FINISH, *, with_parent: bool = False) -> None:
    """Run a worker in the main thread of a process, until SIGTERM or Ctrl-C; a second one hands back at once.

    `with_parent` ends it too when standard input does, which is a pipe from the process that wanted it.
    """

    def end(*_: object) -> None:
        worker.finish(0 if worker.ending else within)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)

    def watch() -> None:
        while os.read(0, 64):
            pass
        worker.finish(0)

    if with_parent:
        threading.Thread(target=watch, name="llmstream parent", daemon=True).start()
    worker.run()


def start_process(
    name: str, *, slots: int = 1, lease: float = 5.0, client: redis.Redis | None = None
) -> subprocess.Popen[bytes]:
    """Start a worker in a process of its own; it ends when this process does, however that happens.

    The process is the worker itself: `kill()` kills it, without a word to Redis. To see what a worker says, start
    one in a terminal: `python3 -m llmstream_nb worker`.
    """
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = os.environ | environment_of(client or current()) | {"PYTHONPATH": path, "LLMSTREAM_NO_VENV": "1"}
    command = [sys.executable, "-m", "llmstream_nb", "worker", "--name", name, "--slots", str(slots)]
    command += ["--lease", str(lease), "--with-parent"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, **quiet)  # type: ignore[call-overload]
