"""Ask, and hold on to an answer: what a notebook or a service calls."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import redis
from redis.exceptions import RedisError, ResponseError

from llmstream_nb.answers.connection import current, milliseconds, names_of, unusable
from llmstream_nb.answers.produce import Attempt, Producer, Writing
from llmstream_nb.answers.read import Look, look, read_answer
from llmstream_nb.answers.record import new_record, register
from llmstream_nb.llm.sources import complete
from llmstream_nb.protocol.round import StillWaiting
from llmstream_nb.protocol.wire import (
    AnswerNotFound,
    BadAnswerId,
    Deleted,
    Entry,
    EntryID,
    Fenced,
    Timing,
    check_answer_id,
    check_question,
)

Source = str | Callable[[str, str | None], Iterable[str]] | None


def ask(
    question: str,
    *,
    topic: str | None = None,
    source: Source = None,
    model: str | None = None,
    stream: bool = True,
    id: str | None = None,
    client: redis.Redis | None = None,
    timing: Timing | None = None,
    writing: Writing | None = None,
    timeout: float = 30.0,
) -> Answer:
    """Ask a model, and return at once; a background thread writes the answer into its stream (XADD).

    For example `ask("What is XADD?", source="scripted").wait().text`.

    Args:
        question: 1 to 20,000 characters.
        topic: what the model is told to be an expert in.
        source: `scripted`, `local` or `openai` (else LLMSTREAM_LLM, else scripted), or your own function of
            (question, topic) that returns an iterable of text deltas.
        model: a model's name, where the source has several.
        stream: False asks for the whole answer in one piece.
        id: the answer's id, if you want to choose it: 1 to 64 letters, digits, `.`, `_`, `~` or `-`.
        client: a Redis client; else that of the last `connect()`.
        timing: leases and limits in seconds, the answer's time to live among them.
        writing: how to write it, as `Writing(coalesce_ms=100, maxlen=1000)`.
        timeout: seconds the model may be silent.

    Raises:
        BadQuestion, BadAnswerId, ModelError: before anything is written.
        AnswerExists: the id is taken.
        RedisUnusable: Redis can't be reached or refuses.
    """
    client, timing = client or current(), timing or Timing()
    question, answer_id = check_question(question), check_answer_id(id or secrets.token_hex(6))
    if callable(source):
        name, deltas = getattr(source, "__name__", "own"), source(question, topic)
    else:
        deltas = complete(question, topic=topic, source=source, model=model, stream=stream, timeout=timeout)
        name = deltas.source
    record = new_record(answer_id, question, topic, name, getattr(deltas, "model", "") or name)
    register(client, record, timing)
    producer = Producer(client, record, deltas, timing, writing)
    producer.start()
    return Answer(answer_id, client=client, timing=timing, producer=producer)


def ask_without_stream(question: str, **options: Any) -> Answer:
    """`ask` for comparison: the model answers in one piece, so nothing is seen before all is there.

    Options and errors are those of `ask`.
    """
    return ask(question, stream=False, **options)


class Answer:
    """A handle on an answer, from any process: `Answer("tour").text`. All it tells is read from Redis.

    `ask` and `enqueue` return one. To make it of an id asks nobody, so it never fails for want of an answer: its
    `status` is `missing` then. Raises BadAnswerId for an id that can't be one, RedisUnusable if Redis can't be
    reached, and NotAnAnswer if the key holds something else.
    """

    def __init__(
        self,
        answer_id: str,
        *,
        client: redis.Redis | None = None,
        timing: Timing | None = None,
        producer: Producer | None = None,
    ) -> None:
        self.id = check_answer_id(answer_id)
        self.client = client or current()
        self.timing = timing or Timing()
        self._producer = producer

    def __repr__(self) -> str:
        return f"<Answer {self.id}>"

    def look(self) -> Look:
        """What there is at this moment, by one look: `status`, `text`, `record`, the last ID and what is missing."""
        return look(self.id, self.client)

    @property
    def status(self) -> str:
        """How it stands: `queued`, `streaming`, `interrupted`, `ended`, `failed`, or `missing`."""
        return self.look().status

    @property
    def text(self) -> str:
        """The text so far."""
        producer = self._producer
        if producer and producer.error and not isinstance(producer.error, (Fenced, Deleted)):
            return producer.attempt.text  # which Redis may lack
        return self.look().text

    @property
    def record(self) -> dict[str, Any]:
        """The JSON record: question, topic, model, times, and once it has ended the reason and the whole text."""
        return self.look().record

    @property
    def at_work(self) -> bool:
        """Whether this process is writing it."""
        return self._producer is not None and not self._producer.done.is_set()

    def wait(self, timeout: float | None = None) -> Answer:
        """Wait for the end and return the answer itself.

        Raises StillWaiting, a TimeoutError, after `timeout` seconds; else what kept its producer from writing.
        """
        if self._producer is None:
            for _ in read_answer(self.id, client=self.client, timing=self.timing, timeout=timeout):
                pass
        elif not self._producer.done.wait(timeout):
            raise StillWaiting(f"{self.id!r} has not ended within {timeout:g} s; it goes on")
        elif self._producer.error and not isinstance(self._producer.error, (Fenced, Deleted)):
            raise self._producer.error
        return self

    def stop(self) -> str:
        """Stop the answer wherever it is produced, keep the text so far, and return the status.

        Takes up to a tick when its producer lives, and up to a lease when that has just died.
        """
        if self._producer:
            self._producer.stop()
            self._producer.done.wait(2 * self.timing.lease)
            return self.status
        return stop_answer(self.id, client=self.client, timing=self.timing)


def stop_answer(answer_id: str, *, client: redis.Redis | None = None, timing: Timing | None = None) -> str:
    """Stop an answer from any process and return its status; see `Answer.stop`."""
    client, timing = client or current(), timing or Timing()
    keys = names_of(client).answer(answer_id)
    now = look(answer_id, client)
    if now.status == "missing":
        raise AnswerNotFound(f"there is no answer {answer_id!r}: never asked, cleared, or expired")
    deadline = time.monotonic() + 2 * timing.lease
    try:
        if now.status not in ("ended", "failed"):
            client.set(keys.cancel, "stop", px=milliseconds(timing.ttl))
        # Until the record tells the end, too: its producer writes that last, or has died before it could.
        while now.status != "missing" and not _is_over(now) and time.monotonic() < deadline:
            attempt = max(1, now.top.attempt)
            if not client.exists(keys.lease(attempt)):
                with suppress(Fenced):  # somebody has just taken over, and will see it
                    close_answer(client, answer_id, timing)  # nobody is there to see the cancel key
            else:
                time.sleep(timing.tick / 5)
            now = look(answer_id, client)
    except (RedisError, OSError) as error:
        raise unusable(error, client) from None
    return now.status


def _is_over(now: Look) -> bool:
    return now.status in ("ended", "failed") and ("end" in now.record or not now.record)


def close_answer(client: redis.Redis, answer_id: str, timing: Timing, error: str = "", message: str = "") -> None:
    """End an answer that has no living producer, from outside, keeping the text of its last attempt.

    Opens the next attempt with an `end` (or `error`) entry: that fences whoever wakes up later. Raises Fenced when
    a producer is alive.
    """
    now = look(answer_id, client)
    attempt = Attempt(client, {"asked": time.time()} | now.record | {"id": answer_id}, timing)

    def opening(top: Entry | None) -> tuple[str, dict[str, Any]]:
        data: dict[str, Any] = {"error": error, "message": message} if error else {"reason": "cancelled"}
        data |= {"missing": now.missing} if now.missing else {}  # the record's text has this hole
        return "error" if error else "end", data | ({"closes": str(top.id)} if top else {})

    try:
        attempt.open(opening)
        if not attempt.ended_before:
            attempt.insist(lambda: attempt.finish(look(answer_id, client).text))
    finally:
        attempt.close()


def clear(*answer_ids: str, client: redis.Redis | None = None, timing: Timing | None = None) -> int:
    """Delete these answers, or without arguments all of this prefix; return how many there were.

    Live producers are stopped first, so that nothing comes back. The cancel key stays for a while: a producer
    that sleeps through all of this finds it when it wakes. Raises BadAnswerId or RedisUnusable.
    """
    client, timing = client or current(), timing or Timing()
    names, deadline = names_of(client), time.monotonic() + 2 * timing.lease
    try:
        ids = list(answer_ids) or _known_ids(client)
        there = [i for i in ids if client.exists(names.answer(i).question, names.answer(i).chunks)]
        for answer_id in there:
            client.set(names.answer(answer_id).cancel, "clear", px=milliseconds(max(60.0, 10 * timing.lease)))
        for answer_id in there:
            keys = names.answer(answer_id)
            while time.monotonic() < deadline and client.exists(keys.lease(max(1, _top_attempt(client, keys)))):
                time.sleep(timing.tick / 10)
            client.delete(keys.chunks, keys.question, keys.lease(max(1, _top_attempt(client, keys))))
        if ids:
            client.zrem(names.answers, *ids)
        if not answer_ids:
            client.delete(names.answers, names.questions, names.failures)
    except (RedisError, OSError) as error:
        raise unusable(error, client) from None
    return len(there)


def _known_ids(client: redis.Redis) -> list[str]:
    """The ids in the index of answers; what can't be an id there is not the kit's."""
    found: Any = client.zrange(names_of(client).answers, 0, -1)
    ids = list[str]()
    for answer_id in found:
        with suppress(BadAnswerId):
            ids.append(check_answer_id(answer_id))
    return ids


def _top_attempt(client: redis.Redis, keys: Any) -> int:
    try:
        top: Any = client.xrevrange(keys.chunks, count=1)
    except ResponseError:
        return 0  # another type: only to be deleted
    return EntryID.parse(top[0][0]).attempt if top else 0
