"""Stream an LLM's answer through a Redis stream, with redis and openai and nothing else."""

import os
import sys
import time
from itertools import chain

from openai import OpenAI
from redis import Redis, ResponseError
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry


def answer(llm, model, question):
    """Yield (kind, text): the model's deltas as they come, and at last how it ended."""
    reason, messages = "incomplete", [{"role": "user", "content": question}]
    try:
        for part in llm.chat.completions.create(model=model, messages=messages, stream=True):
            for choice in part.choices:
                if choice.delta.content:
                    yield "text", choice.delta.content
                reason = choice.finish_reason or reason
        yield "end", reason
    except Exception as error:
        yield "error", type(error).__name__  # the message may hold what viewers shouldn't see


def produce(redis, key, pieces, ttl=86_400):
    """Write each (kind, text) into the stream `key`, a new one; it lives for `ttl` seconds."""
    for number, (kind, text) in enumerate(chain([("text", "")], pieces)):  # 1-0: there at once
        try:  # an ID of our own: sent again after a lost reply, it is refused, not doubled
            redis.xadd(key, {"kind": kind, "text": text}, id=f"1-{number}")
        except ResponseError as error:
            if "equal or smaller" not in str(error):
                raise
        redis.expire(key, ttl)


def read(redis, key, last="0-0", patience=30):
    """Yield (ID, kind, text) of each entry after `last`, up to the end, or to a silence."""
    newest, last, heard = redis.xrevrange(key, count=1), max(last, "1-0"), time.monotonic()
    if not newest:
        raise LookupError(f"there is no answer {key}: nobody has asked, or it has expired")
    if newest[0][0] == last and newest[0][1]["kind"] in ("end", "error"):
        return  # who comes back after the end has seen all
    while time.monotonic() - heard < patience:
        for _, entries in redis.xread({key: last}, count=500, block=1000):
            heard = time.monotonic()
            for number, (last, entry) in enumerate(entries, int(last[2:]) + 1):
                if last != f"1-{number}":
                    raise LookupError(f"the entry 1-{number} is missing")
                yield last, entry["kind"], entry["text"]
                if entry["kind"] in ("end", "error"):
                    return
    raise TimeoutError(f"nothing came after {last} for {patience} s: is its producer dead?")


if __name__ == "__main__":  # recipe.py ask KEY QUESTION, or: recipe.py read KEY [LAST-ID]
    url, retry = os.environ["REDIS_URL"], Retry(ExponentialWithJitterBackoff(2, 0.1), 8)
    redis = Redis.from_url(url, decode_responses=True, retry=retry)
    job, key, *rest = sys.argv[1:]
    if job == "ask":
        produce(redis, key, answer(OpenAI(timeout=30), os.environ["OPENAI_MODEL"], rest[0]))
    else:
        for _, kind, text in read(redis, key, *rest):
            print(text if kind == "text" else f"\n[{kind}: {text}]", end="", flush=True)
