"""The pattern of the Redis tutorial "Streaming LLM Output Using Redis Streams", ported: as simple, as frail.

All answers share one stream. A START entry stands before an answer's chunks and an END entry after them, and
a reader passes on what lies between the two. For one asker at a time that works. The comments that begin with
"Breaks when" say where it doesn't; `ask` and `read_answer` are what to use instead.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import redis
from redis.exceptions import RedisError

from llmstream_nb.llm.sources import complete

OPENAI_STREAM = "OPENAI_STREAM"  # Breaks when two ask at once: everybody's chunks lie in this one stream
BLOCK = 1000  # milliseconds; the tutorial's 0 waits for ever

Source = str | Callable[[str, str | None], Iterable[str]] | None
OnChunk = Callable[[dict[str, str], str], object]  # takes an entry's fields and its ID

_log = logging.getLogger(__name__)

# Breaks when many read: all blocking reads queue for one connection. In the tutorial that is how the client
# treats isolated commands; redis-py gives each its own connection, so a lock stands for it.
_connection = threading.Lock()


def start_chunk(question_id: str) -> str:
    """The text that stands before an answer."""
    return f"START:{question_id};"


def end_chunk(question_id: str) -> str:
    """The text that stands after an answer."""
    return f";END:{question_id}"


# -------------------------------------------------------------------------------------------------- writing


def add_item_to_stream(client: redis.Redis, stream: str, item: Mapping[str, str]) -> str:
    """XADD `item` under an ID that Redis chooses, and return this ID; "" if it failed."""
    try:
        # Breaks when only the reply is lost: the client sends it again, and then it stands there twice.
        return str(client.xadd(stream, dict(item), id="*"))  # type: ignore[arg-type]
    except (RedisError, UnicodeError) as error:
        _log.warning("add_item_to_stream: %s", error)  # Breaks when Redis refuses: this chunk is just gone
        return ""


def set_json_item(client: redis.Redis, key: str, value: Mapping[str, Any]) -> None:
    """SET `key` to `value` as JSON."""
    client.set(key, json.dumps(value))  # Breaks when months pass: neither records nor stream ever expire


def ask_question(
    client: redis.Redis,
    question_id: str,
    topic: str | None,
    question: str,
    *,
    stream: str = OPENAI_STREAM,
    source: Source = None,
    model: str | None = None,
) -> dict[str, Any]:
    """Ask a model, write its answer to `stream` between START and END, and return the record.

    Returns when the answer is complete: run it in a thread to read meanwhile. The record also goes under the
    key `questions:<question_id>`. `source` and `model` are those of `ask`.

    Raises ModelError, or what an own source raises.
    """
    if callable(source):
        deltas: Iterable[str] = source(question, topic)
    else:
        deltas = complete(question, topic=topic, source=source, model=model)

    def add(text: str) -> str:
        return add_item_to_stream(client, stream, {"questionId": question_id, "chunkOutput": text})

    start = add(start_chunk(question_id))
    for delta in deltas:  # Breaks when the model fails: END is never written, and the reader waits for it
        add(delta)  # Breaks when the model is fast: a round trip for each chunk, each awaited
    end = add(end_chunk(question_id))
    record = {
        "topic": topic,
        "topicQuestion": question,
        "questionId": question_id,
        "streamName": stream,
        "streamStartMessageId": start,
        "streamEndMessageId": end,
    }
    set_json_item(client, f"questions:{question_id}", record)
    return record


# -------------------------------------------------------------------------------------------------- reading


def get_last_id_of_stream(client: redis.Redis, stream: str) -> str:
    """The ID of the newest entry, "0-0" where there is none: XREVRANGE `stream` + - COUNT 1.

    Take it before asking, and read from there on. Breaks when `$` is used instead: it means the newest entry
    at the moment of each XREAD, so a loop loses what comes between two reads.
    """
    entries: Any = client.xrevrange(stream, "+", "-", count=1)
    return entries[0][0] if entries else "0-0"


def read_stream(
    client: redis.Redis, stream: str, last_id: str, question_id: str, on_chunk: OnChunk, *, timeout: float = 30.0
) -> None:
    """XREAD the entries after `last_id`, and give those from START to END, both included, to `on_chunk`.

    Raises TimeoutError when END has not come within `timeout` seconds; the tutorial's reader never gives up.
    """
    reading, deadline = False, time.monotonic() + timeout
    while True:  # Breaks when the viewer leaves: nothing but END stops this loop
        with _turn(deadline, f"{end_chunk(question_id)} in {stream}") as ms:
            # Breaks when there is much to read: COUNT 1 is a round trip for each chunk.
            reply: Any = client.xread({stream: last_id}, count=1, block=ms)
        for entry_id, fields in reply[0][1] if reply else []:
            text = fields.get("chunkOutput", "")
            # Breaks when another's chunk comes before START: last_id stands still, so the next XREAD brings
            # the same entry again, at full speed and without end.
            reading = reading or text.startswith(start_chunk(question_id))
            if reading:
                last_id = entry_id
                on_chunk(fields, entry_id)  # Breaks when another asks meanwhile: whose chunk is it?
                if text.endswith(end_chunk(question_id)):
                    return  # Breaks when the model writes just that: START and END are ordinary text


@contextmanager
def _turn(deadline: float, awaited: str) -> Iterator[int]:
    """Wait for the one connection, and give the milliseconds that a read may block; or raise TimeoutError."""
    if not _connection.acquire(timeout=max(0.0, deadline - time.monotonic())):
        raise TimeoutError(f"{awaited} did not come in time: the connection is taken by other readers")
    try:
        left = int((deadline - time.monotonic()) * 1000)
        if left <= 0:
            raise TimeoutError(f"{awaited} did not come in time")
        yield min(BLOCK, left)
    finally:
        _connection.release()
