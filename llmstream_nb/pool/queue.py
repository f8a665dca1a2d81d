"""The pool's queue: how a question comes into it, and the commands by which a worker shares it with others."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import redis
from redis.exceptions import RedisError, ResponseError

from llmstream_nb.answers.ask import Answer, clear, take_id
from llmstream_nb.answers.connection import Line, current, milliseconds, names_of, said, unusable
from llmstream_nb.answers.record import new_record
from llmstream_nb.answers.turns import checked, said_before
from llmstream_nb.llm.messages import Message
from llmstream_nb.llm.sources import check_source, default_source
from llmstream_nb.pool.groups import NEW, read_group
from llmstream_nb.protocol.wire import DAY, POOL, LLMStreamError, Timing, check_answer_id, check_question, parse_record

KEPT_FAILURES = 1_000
END = "end"  # in place of the lease in a worker's sign of life: it is to end


class NotAQuestion(LLMStreamError):
    """An entry of the queue, or the record behind it, that `enqueue` did not write."""


def enqueue(
    question: str | None = None,
    *,
    follows: Answer | str | None = None,
    messages: Sequence[Message] | None = None,
    params: Mapping[str, Any] | None = None,
    topic: str | None = None,
    source: str | None = None,
    model: str | None = None,
    id: str | None = None,
    replace: bool = False,
    client: redis.Redis | None = None,
    timing: Timing | None = None,
    owner: str | None = None,
) -> Answer:
    """Put a question into the pool's queue (XADD), and return the same handle as `ask`.

    Some worker will answer it, also after this process has ended; if that worker dies, another begins anew.
    Without a worker it waits: `Worker().start()`, or `python3 -m llmstream_nb worker` in a terminal.

    These arguments, and errors, are as in `ask`; what `source` needs must be where the workers are. What the question
    `follows` must have ended now, and is told to the model as it stands when a worker answers.
    """
    client, timing = client or current(), timing or Timing()
    question, beside = checked(question, topic, follows, messages, params)
    answer_id, source = check_answer_id(id or secrets.token_hex(6)), check_source(source or default_source())
    record = new_record(answer_id, question, topic, source, model or "", owner) | beside | {"pooled": True}
    said_before(record, client)
    take_id(client, record, timing, replace)
    try:
        client.xadd(names_of(client).questions, {"answer": answer_id, "nonce": record["nonce"]})
    except (RedisError, OSError) as error:
        with suppress(LLMStreamError):
            clear(answer_id, client=client, timing=timing)
        raise unusable(error, client) from None
    answer = Answer(answer_id, client=client, timing=timing)
    answer.nonce = record["nonce"]
    return answer


def read_question(job: Job, client: redis.Redis) -> dict[str, Any] | None:
    """The record for which `enqueue` wrote this entry; None where it is gone, or another's, who asked under its id.

    Raises NotAQuestion or BadQuestion; Redis errors pass.
    """
    answer_id = job.answer_id
    try:
        text: Any = client.get(names_of(client).answer(answer_id).question)
    except (LLMStreamError, ResponseError) as error:  # the first where that can't be an id at all
        raise NotAQuestion(f"This entry of the queue leads to no record of a question: {said(error)}") from None
    if text is None:
        return None
    found = parse_record(text) or {}
    if found.get("nonce") and not (found.get("pooled") and job.nonce in ("", found["nonce"])):
        return None
    given = {name: value for name, value in found.items() if value is not None}
    record = {"topic": "", "source": "", "model": ""} | given
    types: dict[str, Any] = {"question": str, "topic": str, "source": str, "model": str, "asked": (int, float)}
    if not all(isinstance(record.get(name), kind) for name, kind in types.items()):
        raise NotAQuestion(f"The record of {answer_id!r} is not one that enqueue() wrote.")
    return record | {"id": answer_id, "question": check_question(record["question"])}


def end_workers(client: redis.Redis, within: float = 5.0) -> int:
    """End all workers of the pool, wherever they run; what they hold goes back to the queue. Return how many ended.

    Waits for them, so many seconds at most: who is frozen ends once it wakes up, and is not counted.
    """
    names, told, deadline = names_of(client), [], time.monotonic() + within
    with suppress(ResponseError):  # no queue, or nobody has joined it
        for worker in client.xinfo_consumers(names.questions, POOL):
            sign = names.worker(worker["name"])
            # Renewed less than a lease ago: the dead need not be told.
            if client.pttl(sign) > 1000 * DAY and client.set(sign, END, xx=True, keepttl=True):
                told.append(sign)
    while (left := sum(client.exists(sign) for sign in told)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(told) - left


@dataclass(frozen=True)
class Job:
    """An entry of the queue, and so a question to be answered; two are equal if they are the same entry."""

    entry: str  # its ID
    answer_id: str = field(compare=False)  # empty where the entry names none
    nonce: str = field(default="", compare=False)  # that of the question; empty where the entry has none
    delivered: int = field(default=1, compare=False)  # how often it was: one more than there were takeovers

    @classmethod
    def of(cls, entry: str, fields: dict[str, str], delivered: int = 1) -> Job:
        """An entry as redis-py gives it."""
        return cls(entry, fields.get("answer", ""), fields.get("nonce", ""), delivered)


class Queue:
    """The queue as a consumer of its group shares it, on a connection of its own. Redis errors pass.

    An entry is pending with whoever took it until `done`, and idle since it was taken or last renewed.
    """

    def __init__(self, client: redis.Redis, consumer: str, timing: Timing) -> None:
        self.client, self.consumer, self.timing = client, consumer, timing
        names, self.lease = names_of(client), milliseconds(timing.lease)
        self.key, self._sign, self._kept = names.questions, names.worker(consumer), self.lease + 1000 * DAY
        self.line: Any = Line(client, self.key)  # its client is `line.redis`

    def join(self) -> None:
        """Create queue and group where they are absent, forget consumers that are long gone, and be one that lives."""
        try:
            self.line.redis.xgroup_create(self.key, POOL, "0", mkstream=True)
        except ResponseError as error:
            if not said(error).startswith("BUSYGROUP"):
                raise
        for consumer in self.line.redis.xinfo_consumers(self.key, POOL):
            if not consumer["pending"] and consumer["idle"] > milliseconds(self.timing.ttl):
                self.line.redis.xgroup_delconsumer(self.key, POOL, consumer["name"])
        self.line.redis.set(self._sign, self.lease, px=self._kept)
        self.line.redis.xgroup_createconsumer(self.key, POOL, self.consumer)  # a read may not, before an entry comes

    def leave(self) -> None:
        """Sign off from the group if nothing is pending."""
        if not self.line.redis.xpending_range(self.key, POOL, "-", "+", 1, consumername=self.consumer):
            self.line.redis.xgroup_delconsumer(self.key, POOL, self.consumer)
            self.line.redis.delete(self._sign)

    def take(self, count: int, seconds: float) -> list[Job]:
        """New entries (XREADGROUP), at most `count`; waits up to so many seconds for the first."""
        raw = read_group(self.line.redis, self.key, POOL, self.consumer, NEW, count, seconds)
        return [Job.of(entry, fields) for entry, fields in raw]

    def renew(self, jobs: Iterable[Job]) -> bool:
        """Reset the idle time of these jobs (XCLAIM … JUSTID to itself), and give a sign of life (PEXPIRE).

        False where `end_workers` has asked this one to end.
        """
        if held := [job.entry for job in jobs]:
            self.line.redis.xclaim(self.key, POOL, self.consumer, 0, held, justid=True)
        pipe = self.line.redis.pipeline(transaction=False)
        alive, sign = pipe.pexpire(self._sign, self._kept).get(self._sign).execute()  # no SET: a full memory refuses it
        if not alive:
            self.join()  # somebody has deleted it
        elif sign == END:
            self.line.redis.delete(self._sign)  # tells that it was heard
        return bool(sign != END)

    def idle(self) -> Iterator[tuple[Job, str]]:
        """What has been idle for a lease (XPENDING … IDLE), as it will be once it is claimed, and its holder."""
        for row in self.line.redis.xpending_range(self.key, POOL, "-", "+", 100, idle=self.lease):
            entry = row["message_id"]
            if found := self.line.redis.xrange(self.key, entry, entry):
                yield Job.of(entry, found[0][1], row["times_delivered"] + 1), row["consumer"]
            else:
                self.done(Job(entry, ""))  # somebody has deleted it

    def claim(self, job: Job) -> bool:
        """Take it over (XCLAIM), which counts as a delivery; False where another was faster."""
        return bool(self.line.redis.xclaim(self.key, POOL, self.consumer, self.lease, [job.entry]))

    def hand_back(self, job: Job) -> None:
        """Let others claim it at once, and don't count that as a takeover."""
        undone = {"idle": 2 * self.lease, "retrycount": job.delivered - 1, "justid": True}
        self.line.redis.xclaim(self.key, POOL, self.consumer, 0, [job.entry], **undone)

    def done(self, job: Job) -> None:
        """Take it out of the queue (XACK and XDEL)."""
        with self.line.redis.pipeline(transaction=True) as pipe:
            pipe.xack(self.key, POOL, job.entry)
            pipe.xdel(self.key, job.entry)
            pipe.execute()

    def report(self, job: Job, question: str, error: LLMStreamError) -> None:
        """Put a row into the list of failures, newest first."""
        row = {"at": round(time.time(), 3), "entry": job.entry, "answer": job.answer_id, "question": question}
        row |= {"error": type(error).__name__, "message": str(error)}
        row |= {"delivered": job.delivered, "worker": self.consumer}
        failures = names_of(self.client).failures
        self.client.lpush(failures, json.dumps(row))
        self.client.ltrim(failures, 0, KEPT_FAILURES - 1)
