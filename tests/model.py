"""A model under the test's control: it says what it is told to, when it is told to."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator

from llmstream_nb.answers.produce import Producer
from llmstream_nb.answers.record import new_record, register
from llmstream_nb.protocol.wire import Entry, Timing, parse_entries, parse_record


class Model:
    """An iterable of deltas that blocks until the test gives it something; `close()` ends it from any thread."""

    def __init__(self, *texts: str, end: bool = False) -> None:
        self._queue: queue.Queue[str | BaseException | None] = queue.Queue()
        self.closed = False
        self.finish_reason: str | None = None
        self.say(*texts)
        if end:
            self.end()

    def say(self, *texts: str) -> None:
        for text in texts:
            self._queue.put(text)

    def end(self, reason: str = "stop") -> None:
        self.finish_reason = reason
        self._queue.put(None)

    def break_off(self, error: BaseException) -> None:
        self._queue.put(error)

    def close(self) -> None:
        self.closed = True
        self._queue.put(None)

    def __iter__(self) -> Iterator[str]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item


def start(client, model, timing: Timing, answer_id: str = "a", question: str = "why?") -> Producer:
    """Register a question and produce its answer from `model`."""
    record = new_record(answer_id, question, None, "test", "test")
    register(client, record, timing)
    producer = Producer(client, record, model, timing)
    producer.start()
    return producer


def record_of(client, answer_id: str = "a") -> dict:
    """The record of the question that stands under this id, or of one that is not asked yet."""
    from llmstream_nb.answers.connection import names_of

    found = parse_record(client.get(names_of(client).answer(answer_id).question))
    return found or new_record(answer_id, "why?", None, "test", "test")


def stream_of(client, answer_id: str = "a") -> list[Entry]:
    """All entries of an answer."""
    from llmstream_nb.answers.connection import names_of

    return parse_entries(client.xrange(names_of(client).answer(answer_id).chunks))


def raw(entries: list[Entry]) -> list[tuple[str, dict[str, str]]]:
    """The entries as redis-py gives them."""
    return [(str(e.id), {"kind": e.kind, "text": e.text, "ms": str(e.ms)}) for e in entries]


def text_in(client, answer_id: str = "a", attempt: int | None = None) -> str:
    """The text in the stream, entry by entry."""
    entries = stream_of(client, answer_id)
    return "".join(e.text for e in entries if e.kind == "text" and attempt in (None, e.id.attempt))


def assert_whole(client, texts: list[str], answer_id: str = "a", attempt: int = 1, end: str = "end") -> None:
    """The attempt stands in the stream from its start to its end: every entry once, in order, without a hole."""
    entries = [e for e in stream_of(client, answer_id) if e.id.attempt == attempt]
    assert [e.id.seq for e in entries] == list(range(len(entries)))
    assert [e.kind for e in entries] == ["start", *["text"] * len(texts), end]
    assert [e.text for e in entries[1:-1]] == texts


PATIENCE = 60.0  # seconds: a bound, not an expectation


def wait_for(condition) -> None:
    """Wait for a condition; AssertionError when it does not come true in time."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"the awaited condition did not come true in {PATIENCE:g} s"
        time.sleep(0.005)
