"""The record of a question: what was asked, from whom; the end adds how it went, and the whole text."""

from __future__ import annotations

import json
import time
from typing import Any

import redis
from redis.exceptions import RedisError

from llmstream_nb.answers.connection import milliseconds, names_of, unusable
from llmstream_nb.protocol.wire import AnswerExists, NotAnAnswer, Timing, clean

KEPT_ANSWERS = 1_000  # ids in the index of answers


def new_record(answer_id: str, question: str, topic: str | None, source: str, model: str) -> dict[str, Any]:
    """The JSON record of a question that has just been asked; `asked` is Unix time in seconds."""
    return {
        "id": answer_id,
        "topic": clean(topic or ""),
        "question": question,
        "source": source,
        "model": model,
        "asked": round(time.time(), 3),
    }


def register(client: redis.Redis, record: dict[str, Any], timing: Timing) -> None:
    """Write the record, the index and a first lease; raises AnswerExists, NotAnAnswer or RedisUnusable."""
    names = names_of(client)
    keys = names.answer(record["id"])
    text = json.dumps(record)
    try:
        kind = str(client.type(keys.chunks))
        if kind not in ("none", "stream"):
            raise NotAnAnswer(f"{keys.chunks!r} holds a {kind}, not a stream: use another id, or delete that key")
        # A retried SET NX is refused by its own first try, so what stands there decides.
        new = kind == "none" and (
            client.set(keys.question, text, nx=True, px=milliseconds(timing.ttl)) or client.get(keys.question) == text
        )
        if not new:
            raise AnswerExists(
                f"there is an answer {record['id']!r} already: clear({record['id']!r}) first, or use another id"
            )
        client.delete(keys.cancel)
        if not record.get("pooled"):
            client.set(keys.lease(1), "asked", px=milliseconds(timing.lease))
        add_to_index(client, record, timing)
    except (RedisError, OSError) as error:
        raise unusable(error, client) from None


def add_to_index(client: redis.Redis, record: dict[str, Any], timing: Timing) -> None:
    """Put the answer into the sorted set of answers, and drop those that have expired."""
    answers = names_of(client).answers
    with client.pipeline(transaction=False) as pipe:
        pipe.zadd(answers, {record["id"]: record["asked"]})
        pipe.zremrangebyscore(answers, "-inf", record["asked"] - max(timing.ttl, Timing.ttl))
        pipe.zremrangebyrank(answers, 0, -KEPT_ANSWERS - 1)
        pipe.execute()
