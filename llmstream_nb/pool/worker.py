"""The pool's workers: they answer the questions of the queue, and take over from those that die."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import redis
from redis.exceptions import ResponseError

from llmstream_nb.answers.ask import close_answer
from llmstream_nb.answers.connection import LOST, RedisUnusable, current, is_passing, names_of, unusable
from llmstream_nb.answers.log import Log
from llmstream_nb.answers.produce import Producer, Writing
from llmstream_nb.answers.read import Backoff, look
from llmstream_nb.answers.turns import said_before
from llmstream_nb.llm.endpoint import ModelError
from llmstream_nb.llm.messages import request_text
from llmstream_nb.llm.own import Source
from llmstream_nb.llm.sources import deltas_of, silence
from llmstream_nb.pool.groups import check_name, is_gone
from llmstream_nb.pool.queue import Job, Queue, read_question
from llmstream_nb.protocol.wire import Deleted, EntryID, Fenced, LLMStreamError, Timing, parse_entries

MAX_TAKEOVERS = 3  # a question that has outlived so many is given up: it may be what kills its workers
FINISH = 30.0  # seconds that a worker has by default to finish its answers when it is told to end

log = Log(__name__)


class GivenUp(LLMStreamError):
    """A question that has outlived too many workers."""


class Worker:
    """Answers the pool's questions, several at once; any number of workers share them.

    Args:
        slots: how many answers are written at the same time.
        name: its name as a consumer of the group; else made of host, process id and a random part.
        source: as in `ask`, your own function too; else each question says who answers it.
        client: a Redis client; else that of the last `connect()`.
        timing: leases and limits in seconds, the same for all workers of a pool.
        writing: as in `ask`. How long a model may be silent, LLMSTREAM_TIMEOUT and LLMSTREAM_FIRST_TIMEOUT say.
        params: as in `ask`, for all questions; what a question says itself comes first.

    How it holds up (the commands are those of Redis 6.2): a question stays pending with its worker until the end
    of its answer is confirmed, then XACK and XDEL. Each tick the holder resets the idle time of what it holds,
    with XCLAIM … JUSTID to itself. What is idle for a lease has lost its holder: whoever comes first claims it
    (XPENDING … IDLE, then XCLAIM, which counts the delivery) and opens a new attempt. Two at once can't both
    succeed, and a holder that wakes up is shut out: the stream refuses them (see `attempt.Attempt`).
    A worker that holds nothing gives a sign of life each tick as well, so that nobody who looks takes a dead one
    for one that waits.
    """

    def __init__(
        self,
        *,
        slots: int = 4,
        name: str | None = None,
        source: Source | str | None = None,
        client: redis.Redis | None = None,
        timing: Timing | None = None,
        writing: Writing | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        request_text(None, params)
        if slots < 1:
            raise ValueError(f"a worker needs at least one slot, not {slots}")
        self.name = check_name(name or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}")
        self.slots, self.source, self.writing, self.params = slots, source, writing, params or {}
        self.client, self.timing = client or current(), timing or Timing()
        self.error: LLMStreamError | None = None  # what ended a worker that was started with `start`
        self._queue = Queue(self.client, self.name, self.timing)
        self._jobs: dict[Job, Producer] = {}  # what it holds
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
            except Exception as error:  # noqa: BLE001 - above this thread is nobody to whom it could be raised
                # Of an unexpected error only the class is told, for its text may hold anything; the cause has it.
                broken = LLMStreamError(f"the worker broke down by {type(error).__name__}, its __cause__")
                broken.__cause__ = error
                self.error = error if isinstance(error, LLMStreamError) else broken
                log.error("%s: ends: %s: %s", self.name, type(self.error).__name__, self.error)

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
        retry = Backoff(self.timing)
        self._wait_to_judge()
        try:
            while self._goes_on:
                try:
                    self._queue.join()
                    while self._goes_on:
                        self._round()
                        retry.reset()
                except LOST as error:
                    if not (is_passing(error, self._queue.line.worked) or is_gone(error)) or not retry.sleep():
                        raise unusable(error, self.client) from None
                    self._queue.line.reopen()
                    self._wait_to_judge()
                    # Redis may be back with older data: let producers first write again what looks unanswered there.
                    self._new_from = self._judge_from
                except Exception as error:
                    log.error("%s: %s in a round; it goes on", self.name, type(error).__name__)
                    if not retry.sleep():
                        raise
        finally:
            self._leave()
            self._queue.line.close()

    @property
    def _goes_on(self) -> bool:
        return self._end_by is None or (bool(self._jobs) and time.monotonic() < self._end_by)

    def _wait_to_judge(self) -> None:
        """Idle time goes on counting while Redis is down: give all holders a lease to come back first."""
        self._judge_from = time.monotonic() + self.timing.lease

    def _round(self) -> None:
        """See to what is held; then fill free slots, or wait until one is free."""
        self._settle()
        now = time.monotonic()
        if now >= self._tick_at:
            awake = now - self._tick_at < self.timing.lease  # else its entries may be another's by now
            self._tick_at = now + self.timing.tick
            if not self._queue.renew(self._jobs if awake else ()):
                self.finish(0)
        if self._free and now >= self._judge_from:  # before new questions: somebody watches it stand still
            self._take_over()
        pause = max(0.0, self._tick_at - time.monotonic())
        if self._free and now >= self._new_from:
            for job in self._queue.take(self._free, pause):
                self._begin(job)
        else:
            self._changed.wait(pause)
            self._changed.clear()

    @property
    def _free(self) -> int:
        return self.slots - len(self._jobs) if self._end_by is None else 0

    def _take_over(self) -> None:
        """Claim what has been idle for a lease, if no living producer writes its answer."""
        for job, holder in self._queue.idle():
            if not self._free:
                return
            if job not in self._jobs and not is_written(job.answer_id, self.client) and self._queue.claim(job):
                log.info("%s: takes over %s from %s", self.name, job.answer_id, holder)
                self._begin(job)

    # One question, from the beginning to the end

    def _begin(self, job: Job) -> None:
        """Answer the question of this entry, unless there is nothing to answer."""
        question = ""
        try:
            record = read_question(job, self.client)
            if record is None:
                self._queue.done(job)  # cleared, or expired: nobody waits for it
                return
            question = record["question"]
            # An entry that is older than its question was delivered for another one, which was cleared.
            if job.delivered > 1 + MAX_TAKEOVERS and record["asked"] * 1000 <= EntryID.parse(job.entry).attempt + 1:
                raise GivenUp(f"Given up: {job.delivered - 1} workers died, or were lost, while they answered this.")
            deltas, own = self._ask(record)
        except LLMStreamError as error:
            cause: Any = error.__context__
            if isinstance(error, RedisUnusable) and is_passing(cause):
                raise cause from None  # not now: this question is not what is wrong
            self._give_up(job, question, error)
            return
        for name in ("source", "model"):
            record[name] = getattr(deltas, name, "") or record[name] or "own"
        about = {"worker": self.name, "job": job.entry}
        producer = Producer(self.client, record, deltas, self.timing, self.writing, own, **about)
        self._jobs[job] = producer
        log.info("%s: answers %s", self.name, job.answer_id)

        def run() -> None:
            producer.run()
            self._changed.set()

        threading.Thread(target=run, name=f"llmstream write {job.answer_id}", daemon=True).start()

    def _ask(self, record: dict[str, Any]) -> tuple[Iterable[str], tuple[float, float]]:
        """The deltas of an answer; what goes wrong already here comes out of their iteration, and into the answer."""
        source, model = self.source or record["source"], record["model"] or None
        told = said_before(record, self.client)
        told["params"] = {**self.params, **(told["params"] or {})}
        try:
            return deltas_of(record["question"], record["topic"] or None, source, model, **told)
        except ModelError as error:
            return _failing(error), silence()

    def _settle(self) -> None:
        """See to the answers whose producer is done."""
        for job, producer in list(self._jobs.items()):
            if not producer.done.is_set():
                continue
            error = producer.error
            if error is None or isinstance(error, Deleted):
                self._queue.done(job)
            elif isinstance(error, Fenced):
                if written_for(job.answer_id, self.client) not in (job.entry, None):
                    self._queue.done(job)  # the question stands in the queue twice, as after a lost reply
            elif not producer.lost:
                self._give_up(job, producer.attempt.record["question"], error)
            del self._jobs[job]  # otherwise whoever finds it idle takes over
            log.info("%s: %s %s", self.name, job.answer_id, f"left: {error}" if error else "is answered")

    def _give_up(self, job: Job, question: str, error: LLMStreamError) -> None:
        """End the answer as an error, put a row into the list of failures, and take the entry out of the queue."""
        name = type(error).__name__
        try:
            close_answer(self.client, job.answer_id, self.timing, error=name, message=str(error))
            failed = look(job.answer_id, self.client).record.get("error") == name  # else somebody has finished it
        except Fenced:
            return  # somebody is at it after all
        except (LLMStreamError, ResponseError, AttributeError) as problem:
            cause: Any = problem.__context__ if isinstance(problem, LLMStreamError) else problem
            if is_passing(cause):
                raise cause from None  # not now: somebody does it later
            failed = True  # what lies there is no answer that could be closed
        if failed:
            self._queue.report(job, question, error)
            log.warning("%s: gives up %s: %s", self.name, job.answer_id or job.entry, error)
        self._queue.done(job)

    def _leave(self) -> None:
        """Hand back what is not answered, and sign off."""
        for producer in self._jobs.values():
            producer.leave()
        deadline = time.monotonic() + 2 * self.timing.tick
        with suppress(*LOST, LLMStreamError):
            for job, producer in self._jobs.items():
                producer.done.wait(max(0.0, deadline - time.monotonic()))
                if producer.ended:
                    self._queue.done(job)
                elif not producer.error:
                    log.info("%s: hands back %s", self.name, job.answer_id)
                    self._queue.hand_back(job)
            self._jobs.clear()
            self._queue.leave()


def _failing(error: Exception) -> Iterator[str]:
    raise error
    yield  # makes this a generator: it raises at its first `next`


def is_written(answer_id: str, client: redis.Redis) -> bool:
    """Whether a producer holds the lease of the answer's newest attempt."""
    try:
        keys = names_of(client).answer(answer_id)
        raw: Any = client.xrevrange(keys.chunks, count=1)
        top = parse_entries(raw)
    except (LLMStreamError, ResponseError, AttributeError):
        return False  # no answer at all, which whoever claims it will report
    return bool(top and not top[0].final and client.exists(keys.lease(top[0].id.attempt)))


def written_for(answer_id: str, client: redis.Redis) -> str | None:
    """The queue's entry for which the answer's newest attempt is written; None where nothing says so."""
    chunks = names_of(client).answer(answer_id).chunks
    try:
        raw: Any = client.xrevrange(chunks, count=1)
        start = f"{parse_entries(raw)[0].id.attempt}-0"
        raw = client.xrange(chunks, start, start)
        return parse_entries(raw)[0].data.get("job")
    except (LLMStreamError, ResponseError, AttributeError, IndexError):
        return None  # cleared meanwhile, trimmed, or not the kit's
