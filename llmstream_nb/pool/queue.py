"""The pool's queue: how a question comes into it, and what can go wrong with one."""

from __future__ import annotations

import secrets
from contextlib import suppress

import redis
from redis.exceptions import RedisError

from llmstream_nb.answers.ask import Answer, clear
from llmstream_nb.answers.connection import current, names_of, unusable
from llmstream_nb.answers.record import new_record, register
from llmstream_nb.llm.sources import check_source, default_source
from llmstream_nb.protocol.wire import LLMStreamError, Timing, check_answer_id, check_question


class NotAQuestion(LLMStreamError):
    """An entry of the queue, or the record behind it, that `enqueue` did not write."""


class GivenUp(LLMStreamError):
    """A question that has outlived too many workers."""


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
