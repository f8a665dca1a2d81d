"""Ask, and hold on to an answer: what a notebook or a service calls."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import redis
from redis.exceptions import RedisError, ResponseError, WatchError

from llmstream_nb.answers.attempt import Attempt, last_entry, standing
from llmstream_nb.answers.connection import Line, current, milliseconds, names_of, unusable
from llmstream_nb.answers.produce import Producer, Writing
from llmstream_nb.answers.read import Look, look, look_and_events, read_answer
from llmstream_nb.answers.record import new_record, register
from llmstream_nb.answers.turns import checked, said_before
from llmstream_nb.llm.messages import Message
from llmstream_nb.llm.own import Source
from llmstream_nb.llm.sources import deltas_of
from llmstream_nb.protocol.events import Gap, parts_of
from llmstream_nb.protocol.parts import Part, parts_of_record
from llmstream_nb.protocol.round import StillWaiting
from llmstream_nb.protocol.wire import (
    ORIGIN,
    AnswerExists,
    AnswerKeys,
    AnswerNotFound,
    Deleted,
    EntryID,
    Fenced,
    LLMStreamError,
    NotAnAnswer,
    Timing,
    check_answer_id,
    cleared_attempt,
    first_attempt,
    is_answer_id,
    newest_attempt,
    parse_record,
    same_question,
)


def ask(
    question: str | None = None,
    *,
    follows: Answer | str | None = None,
    messages: Sequence[Message] | None = None,
    params: Mapping[str, Any] | None = None,
    topic: str | None = None,
    source: Source | str | None = None,
    model: str | None = None,
    stream: bool = True,
    id: str | None = None,
    replace: bool = False,
    client: redis.Redis | None = None,
    timing: Timing | None = None,
    writing: Writing | None = None,
    timeout: float | None = None,
    first_timeout: float | None = None,
    owner: str | None = None,
) -> Answer:
    """Ask a model, and return at once; a background thread writes the answer into its stream (XADD).

    For example `ask("What is XADD?", source="scripted").wait().text`.

    Args:
        question: 1 to 20,000 characters.
        follows: an earlier answer or its id, ended and with a text: the model is told what was asked and answered, from
            the first on. The topic is that of the first, unless you give one.
        messages: in place of question, topic and follows: all messages, as the API of chat completions takes them. What
            is shown as the question is the text of the last one of a user.
        params: what else an endpoint takes, as `{"temperature": 0, "tools": […]}`; your own function isn't told.
        topic: what the model is told to be an expert in.
        source: `scripted`, `local` or `openai` (else LLMSTREAM_LLM, else scripted), or your own function of
            (question, topic): it returns text, or yields it, or does so asynchronously. What it raises ends the
            answer; others see the class of it, and `Answer.exception` has the rest.
        model: a model's name, where the source has several.
        stream: False asks for the whole answer in one piece.
        id: the answer's id, if you want to choose it: 1 to 64 letters, digits, `.`, `_`, `~` or `-`.
        replace: an answer that has this id is stopped and cleared first; the number of the attempt counts on.
        client: a Redis client; else that of the last `connect()`.
        timing: leases and limits in seconds, the answer's time to live among them.
        writing: how to write it, as `Writing(coalesce_ms=100, maxlen=1000)`.
        timeout, first_timeout: seconds the model may be silent once text has come, and before that; see `complete`.
        owner: who asks, for the record; `create_app(authorize=…)` can ask for it.

    Raises:
        BadQuestion, BadAnswerId, ModelError: before anything is written.
        BrokenChain: so is this, where what the question follows has not ended, has no text, is gone or too long.
        TypeError: messages or params are no JSON, or messages are given with what they replace.
        AnswerExists: the id is taken, and `replace` is not wanted.
        RedisUnusable: Redis can't be reached or refuses.
    """
    client, timing = client or current(), timing or Timing()
    question, beside = checked(question, topic, follows, messages, params)
    answer_id = check_answer_id(id or secrets.token_hex(6))
    record = new_record(answer_id, question, topic, "", "", owner) | beside
    told: dict[str, Any] = said_before(record, client)
    told |= {"timeout": timeout, "first_timeout": first_timeout, "stream": stream}
    deltas, own = deltas_of(question, record["topic"] or None, source, model, **told)
    record |= {"source": deltas.source, "model": deltas.model}
    take_id(client, record, timing, replace)
    producer = Producer(client, record, deltas, timing, writing, own)
    producer.start()
    return Answer(answer_id, client=client, timing=timing, producer=producer)


def take_id(client: redis.Redis, record: dict[str, Any], timing: Timing, replace: bool) -> None:
    """`register`, with `replace` also where there is such an answer already, or somebody asks at the same moment."""
    while True:
        try:
            return register(client, record, timing)
        except AnswerExists:
            if not replace:
                raise
            clear(record["id"], client=client, timing=timing)


def ask_without_stream(question: str | None = None, **options: Any) -> Answer:
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
        self.nonce = producer.attempt.record["nonce"] if producer else ""  # of its question, where that is known

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
        if self._producer and self.failure:
            return self._producer.attempt.text  # which Redis may lack
        return self.look().text

    @property
    def parts(self) -> list[Part]:
        """All parts so far, in order: text, reasoning, a refusal, calls and their results.

        Deltas of a kind that follow each other are one part. Where entries are missing, an ended answer's record tells.
        """
        now, events = look_and_events(self.id, self.client)
        if now.record.get("end") and any(isinstance(event, Gap) for event in events):
            return parts_of_record(now.record, now.top)
        return parts_of(events)

    @property
    def record(self) -> dict[str, Any]:
        """The JSON record: question, topic, model, times, and once it has ended the reason and the whole text."""
        return self.look().record

    @property
    def exception(self) -> BaseException | None:
        """What the source raised, where this process has asked it; others see its class, and a message fit to show."""
        return self._producer.exception if self._producer else None

    @property
    def failure(self) -> LLMStreamError | None:
        """What kept this process from writing it to its end, as a Redis that refuses; None elsewhere."""
        error = self._producer.error if self._producer else None
        return None if isinstance(error, (Fenced, Deleted)) else error

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
        elif self.failure:
            raise self.failure
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
    now = meant = look(answer_id, client)
    if now.status == "missing":
        raise AnswerNotFound(f"there is no answer {answer_id!r}: never asked, cleared, or expired")
    deadline = time.monotonic() + 2 * timing.lease
    try:
        if now.status not in ("ended", "failed"):
            _set_cancel(client, keys, meant.record, timing)
        # Until the record tells the end, too: its producer writes that last, or has died before it could. But not
        # another question that is asked under this id meanwhile.
        while now.status != "missing" and same_question(now.record, meant.record) and not _is_over(now):
            if time.monotonic() >= deadline:
                break
            if not client.exists(keys.lease(now.top.attempt)):
                with suppress(Fenced, Deleted):  # somebody has just taken over, and will see it
                    close_answer(client, answer_id, timing, now=now)  # nobody is there to see the cancel key
            else:
                time.sleep(timing.tick / 5)
            now = look(answer_id, client)
    except (RedisError, OSError) as error:
        raise unusable(error, client) from None
    return now.status


def _set_cancel(client: redis.Redis, keys: AnswerKeys, record: dict[str, Any], timing: Timing) -> None:
    """Set the cancel key, under WATCH: a Stop that comes late must not meet another question under the same id."""
    while True:
        with client.pipeline(transaction=True) as pipe, suppress(WatchError):
            pipe.watch(keys.question)
            if same_question(parse_record(pipe.get(keys.question)) or {}, record):  # type: ignore[arg-type]
                pipe.multi()
                pipe.set(keys.cancel, "stop", px=milliseconds(timing.ttl))
                pipe.execute()
            return


def _is_over(now: Look) -> bool:
    return now.status in ("ended", "failed") and ("end" in now.record or not now.record)


def close_answer(
    client: redis.Redis,
    answer_id: str,
    timing: Timing,
    error: str = "",
    message: str = "",
    now: Look | None = None,
) -> None:
    """End an answer that has no living producer, from outside, keeping the text of its last attempt.

    Opens the next attempt with an `end` (or `error`) entry: that fences whoever wakes up later. `now` is how it
    stands, where that is known. Raises Fenced when a producer is alive, or another question is asked under this id.
    """
    now = now or look(answer_id, client)
    attempt = Attempt(client, (now.record or {"asked": round(time.time(), 3)}) | {"id": answer_id}, timing)

    def opening(last: EntryID) -> tuple[str, dict[str, Any]]:
        data: dict[str, Any] = {"error": error, "message": message} if error else {"reason": "cancelled"}
        missing = now.missing
        if last > now.top:  # entries were deleted at the stream's end: only its last ID tells
            missing += last.seq - (now.top.seq if now.top.attempt == last.attempt else -1)
        data |= {"missing": missing} if missing else {}  # the record's text has this hole
        return "error" if error else "end", data | ({"closes": str(last)} if last != ORIGIN else {})

    try:
        attempt.open(opening)
        if not attempt.ended_before:
            attempt.insist(lambda: attempt.finish(standing(answer_id, client)))
    finally:
        attempt.close()


def clear(*answer_ids: str, client: redis.Redis | None = None, timing: Timing | None = None) -> int:
    """Delete these answers, or without arguments all of this prefix; return how many there were.

    Live producers are stopped first. Nothing comes back, and nothing is mixed: the number of the last attempt stays
    behind, and the next question of this id counts on from it. Raises BadAnswerId or RedisUnusable.
    """
    client, timing = client or current(), timing or Timing()
    names, deadline = names_of(client), time.monotonic() + 2 * timing.lease
    try:
        ids = list(answer_ids)
        if not ids:
            ids = _known_ids(client)
            client.delete(names.questions, names.failures)  # now: what is asked from here on is not meant
        there = [i for i in ids if client.exists(names.answer(i).question, names.answer(i).chunks)]
        if gone := set(ids).difference(there):
            client.zrem(names.answers, *gone)
        for answer_id in there:
            client.set(names.answer(answer_id).cancel, "stop", px=milliseconds(timing.ttl))
        for answer_id in there:
            keys = names.answer(answer_id)
            while time.monotonic() < deadline and client.exists(keys.lease(_last_attempt(client, keys))):
                time.sleep(timing.tick / 10)
            client.zrem(names.answers, answer_id)  # first: once it is deleted, it may be asked anew
            _delete(client, keys, timing)
    except (RedisError, OSError) as error:
        raise unusable(error, client) from None
    return len(there)


def _delete(client: redis.Redis, keys: AnswerKeys, timing: Timing) -> None:
    """Delete an answer, and leave behind the number of its last attempt, for as long as anything of it may live.

    Readers who saw it have a cursor, a producer that sleeps wakes up, bytes may be on their way: the next question of
    this id begins above that number, so that all of them can tell.
    """
    line = Line(client, keys.chunks)
    try:
        while True:
            with line.redis.pipeline(transaction=True) as pipe, suppress(WatchError):
                pipe.watch(keys.chunks, keys.question, keys.cleared)
                record = _record(pipe, keys)
                before: Any = pipe.get(keys.cleared)
                last = max(_last_attempt(pipe, keys), first_attempt(record), cleared_attempt(before))
                pipe.multi()
                pipe.delete(keys.chunks, keys.question, keys.cancel, keys.lease(0), keys.lease(last))
                pipe.set(keys.cleared, last, px=milliseconds(timing.ttl))
                pipe.execute()
                return
    finally:
        line.close()


def _known_ids(client: redis.Redis) -> list[str]:
    """The ids in the index of answers; what can't be an id is taken out of it."""
    index = names_of(client).answers
    found: Any = client.zrange(index, 0, -1)
    if strange := [name for name in found if not is_answer_id(name)]:
        client.zrem(index, *strange)
    return [answer_id for answer_id in found if is_answer_id(answer_id)]


def _last_attempt(client: Any, keys: AnswerKeys) -> int:
    """The newest attempt, as the stream and the record tell it; 0 before the first."""
    try:
        last = last_entry(client, keys.chunks)[1].attempt
    except (ResponseError, NotAnAnswer):
        last = 0  # another type, or another's entries: only to be deleted
    return max(last, newest_attempt(_record(client, keys)))


def _record(client: Any, keys: AnswerKeys) -> dict[str, Any]:
    """The record; {} where there is none, or another type, which is only to be deleted."""
    with suppress(ResponseError, AttributeError):
        return parse_record(client.get(keys.question)) or {}
    return {}
