"""The record of a question: what was asked, from whom; the end adds how it went, and the whole text."""

import json
import secrets
import time
from contextlib import suppress
from typing import Any

import redis
from redis.exceptions import RedisError, ResponseError, WatchError

from llmstream_nb.answers.connection import milliseconds, names_of, unusable
from llmstream_nb.protocol.wire import (
    AnswerExists,
    AnswerKeys,
    NotAnAnswer,
    Timing,
    clean,
    cleared_attempt,
    is_answer_id,
    parse_record,
    same_question,
)

SAMPLE = 20  # ids in the index that are looked at when another is added: those whose answer has expired go


def new_record(
    answer_id: str, question: str, topic: str | None, source: str, model: str, owner: str | None = None
) -> dict[str, Any]:
    """The JSON record of a question that has just been asked; `asked` is Unix time in seconds.

    `nonce` tells it from other questions under the same id, also from one asked in the same millisecond.
    """
    record = {
        "id": answer_id,
        "topic": clean(topic or ""),
        "question": question,
        "source": source,
        "model": model,
        "asked": round(time.time(), 3),
        "nonce": secrets.token_hex(4),
    }
    return record | ({"owner": owner} if owner else {})


def register(client: redis.Redis, record: dict[str, Any], timing: Timing) -> None:
    """Write the record, a first lease and the index; raises AnswerExists, NotAnAnswer or RedisUnusable.

    Adds to the record what only Redis knows: the time by its clock, and the number of the `first` attempt.
    """
    keys = names_of(client).answer(record["id"])
    try:
        with suppress(ResponseError):  # not every user may ask; but the clocks of many askers don't agree
            now: Any = client.time()
            if isinstance(now, tuple):
                record["asked"] = round(now[0] + now[1] / 1e6, 3)
        while not _register(client, record, keys, timing):
            pass
        add_to_index(client, record)
        _forget_expired(client)
    except (RedisError, OSError) as error:
        raise unusable(error, client) from None


def _register(client: redis.Redis, record: dict[str, Any], keys: AnswerKeys, timing: Timing) -> bool:
    """Write what must stand together, under WATCH; False if somebody asked or cleared meanwhile: look again."""
    with client.pipeline(transaction=True) as pipe, suppress(WatchError):
        pipe.watch(keys.question, keys.cleared)
        kind: Any = pipe.type(keys.chunks)
        if kind not in ("none", "stream"):
            raise NotAnAnswer(f"{keys.chunks!r} holds a {kind}, not a stream: use another id, or delete that key")
        text: Any = pipe.get(keys.question)
        cleared: Any = pipe.get(keys.cleared)  # no MGET: redis-py has none in a pipeline to a cluster
        if text and same_question(parse_record(text) or {}, record):
            return True  # it has come, and its reply was lost
        if kind == "stream" or text is not None:
            raise AnswerExists(
                f"there is an answer {record['id']!r} already: replace=True puts the new one in its place, "
                f"clear({record['id']!r}) deletes it, or use another id"
            )
        record["first"] = cleared_attempt(cleared) + 1
        pipe.multi()
        pipe.set(keys.question, json.dumps(record), px=milliseconds(timing.ttl))
        pipe.delete(keys.cancel)
        if not record.get("pooled"):
            pipe.set(keys.lease(0), "asked", px=milliseconds(timing.lease))
        pipe.execute()
        return True
    return False


def add_to_index(client: redis.Redis, record: dict[str, Any]) -> None:
    """Put the answer into the sorted set of answers, by the time when it was asked."""
    asked = record.get("asked")
    client.zadd(names_of(client).answers, {record["id"]: asked if isinstance(asked, (int, float)) else 0})


def _forget_expired(client: redis.Redis) -> None:
    """Of some ids in the index, take out those whose answer has expired. A few at a time: it costs always the same."""
    names = names_of(client)
    found: Any = client.zrandmember(names.answers, SAMPLE)
    some = {answer_id: names.answer(answer_id) for answer_id in found if is_answer_id(answer_id)}
    with client.pipeline(transaction=False) as pipe:
        for keys in some.values():
            pipe.exists(keys.question)
            pipe.exists(keys.chunks)
        there = pipe.execute()
    gone = [answer_id for answer_id, *signs in zip(some, there[::2], there[1::2], strict=True) if not any(signs)]
    if gone:
        client.zrem(names.answers, *gone)
