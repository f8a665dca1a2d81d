"""Asking and reading on every backend: what goes in comes out, and bad input becomes a clear error or state."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from decimal import Decimal

import pytest
import redis

from llmstream_nb.answers import attempt as attempts
from llmstream_nb.answers import produce
from llmstream_nb.answers.ask import Answer, ask, ask_without_stream, clear, stop_answer
from llmstream_nb.answers.connection import environment_of, names_of
from llmstream_nb.answers.produce import Writing
from llmstream_nb.answers.read import look, read_answer
from llmstream_nb.answers.record import new_record, register
from llmstream_nb.llm.endpoint import ModelError
from llmstream_nb.protocol.events import Ended, Failed, Gap, Interrupted, Started, Text, text_of
from llmstream_nb.protocol.round import StillWaiting
from llmstream_nb.protocol.wire import (
    AnswerExists,
    AnswerNotFound,
    BadAnswerId,
    BadEntryID,
    BadQuestion,
    LLMStreamError,
    NotAnAnswer,
    Timing,
)

from .conftest import FAST
from .model import Model, assert_whole, start, stream_of, text_in, wait_for


def say(*texts: str):
    """A source of one's own that says these texts."""
    return lambda question, topic: iter(texts)


def test_an_answer_from_question_to_record(client, no_leftovers) -> None:
    answer = ask("What is a Redis stream?", topic="Redis", source="scripted", model="scripted:pace=0", id="x1")
    assert answer.wait(60) is answer
    events = list(read_answer("x1"))
    assert isinstance(events[0], Started) and isinstance(events[-1], Ended) and events[-1].reason == "stop"
    record = answer.record
    assert record["text"] == answer.text == text_of(events) and len(answer.text) > 30
    assert (record["question"], record["topic"], record["source"]) == ("What is a Redis stream?", "Redis", "scripted")
    assert (record["start"], record["end"]) == ("1-0", f"1-{record['chunks'] + 1}")
    assert 0 <= record["first_token_ms"] <= record["total_ms"] and record["usage"]["total_tokens"] > 0
    assert answer.status == "ended" and repr(answer) == "<Answer x1>"
    assert client.zrange(names_of(client).answers, 0, -1) == ["x1"]


def test_without_stream_the_text_comes_in_one_entry(client) -> None:
    options = {"source": "scripted", "model": "scripted:pace=0"}
    whole = ask_without_stream("What is a Redis stream?", **options).wait(60)
    pieces = ask("What is a Redis stream?", **options).wait(60)
    assert whole.text == pieces.text
    assert whole.record["chunks"] == 1 < pieces.record["chunks"]


@pytest.mark.parametrize(
    "texts",
    [
        ["<b>bold</b>", "<script>alert(1)</script>", "&amp;", "<img src=x onerror=alert(1)>"],
        ["a\0b", "\r\n", "\x1b[31m", "\ufeff", "\u2028"],
        ["START:x1;", ";END:x1", "kind", "1-0"],
        ["👩‍👩‍👧‍👦", "日本語", "e\u0301"],
        ["x" * 1_000_000],
        ["a", "", "b"],
    ],
    ids=["html", "control", "tutorial", "unicode", "megabyte", "empty delta"],
)
def test_text_is_text(client, texts: list[str]) -> None:
    answer = ask("odd", source=say(*texts)).wait(60)
    assert answer.status == "ended" and answer.text == "".join(texts)
    assert_whole(client, [text for text in texts if text], answer.id)
    assert text_of(read_answer(answer.id)) == "".join(texts)


def test_an_emoji_split_over_two_chunks_is_joined_and_lone_halves_are_replaced(client) -> None:
    answer = ask("emoji", source=say("a\ud83d", "\ude00b", "\ude00", "c\ud83d")).wait(60)
    assert answer.text == "a😀b\ufffdc\ufffd"


@pytest.mark.slow
def test_a_reader_from_any_entry_gets_the_rest(client) -> None:
    texts = [f"{n} " for n in range(20)]
    answer = ask("numbers", source=say(*texts)).wait(60)
    for seq in range(22):
        rest = list(read_answer(answer.id, f"1-{seq}"))
        assert [e.text for e in rest if isinstance(e, Text)] == texts[seq:]
        assert isinstance(rest[-1], Ended)


def test_a_reader_in_mid_answer_gets_all_of_it_while_it_grows(client) -> None:
    says = Model("one ", "two ")
    producer = start(client, says, FAST)
    wait_for(lambda: text_in(client) == "one two ")
    seen: list = []
    late = threading.Thread(target=lambda: seen.extend(read_answer("a", client=client, timing=FAST)))
    late.start()
    wait_for(lambda: text_of(list(seen)) == "one two ")
    assert look("a").status == "streaming"
    says.say("three")
    wait_for(lambda: text_of(list(seen)) == "one two three")
    says.end()
    late.join(60)
    assert isinstance(seen[-1], Ended) and producer.done.wait(60)


def test_another_process_sees_the_same(client, tmp_path) -> None:
    import os
    import subprocess
    import sys

    answer = ask("shared", source=say("one ", "two")).wait(60)
    code = f"from llmstream_nb import read_answer, text_of;print(text_of(read_answer({answer.id!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment_of(client),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "one two", done.stderr


def test_stop_keeps_the_text_and_ends_the_model(client, no_leftovers) -> None:
    for stop in (lambda: Answer("a", timing=FAST).stop(), lambda: stop_answer("a", timing=FAST)):
        says = Model("so far ")
        producer = start(client, says, FAST)
        wait_for(lambda: text_in(client) == "so far ")
        assert stop() == "ended"
        wait_for(producer.done.is_set)
        assert says.closed
        assert look("a").record["reason"] == "cancelled" and look("a").record["text"] == "so far "
        assert stop() == "ended"  # once more changes nothing
        clear("a", timing=FAST)


def test_stop_by_the_asker_itself(client) -> None:
    answer = ask("slow", source="scripted", model="scripted:stall=3")
    wait_for(lambda: len(answer.text) > 3)
    assert answer.stop() == "ended" and answer.record["reason"] == "cancelled"


@pytest.mark.slow
def test_stop_of_an_answer_whose_producer_is_gone(client) -> None:
    attempt = attempts.Attempt(client, {"id": "a", "asked": 0.0, "question": "?"}, FAST)
    attempt.open(lambda top: ("start", {}))
    attempt.entries.append(("text", "half", 1))
    attempt.flush()
    wait_for(lambda: look("a").status == "interrupted")
    events = list(read_answer("a", timing=replace(FAST, patience=1.0)))  # ends by itself after that
    assert isinstance(events[-1], Interrupted) and text_of(events) == "half"
    assert stop_answer("a", timing=FAST) == "ended"
    assert look("a").text == "half" == look("a").record["text"]
    assert text_of(read_answer("a")) == "half"


def test_clear_deletes_and_the_id_is_free_again(client) -> None:
    ask("one", source=say("x"), id="a").wait(60)
    ask("two", source=say("y"), id="b").wait(60)
    assert clear("a") == 1 and look("a").status == "missing" and look("b").status == "ended"
    assert ask("again", source=say("z"), id="a").wait(60).text == "z"
    assert clear() == 2
    left = sorted(client.scan_iter(f"{names_of(client).prefix}:*"))
    assert left == [names_of(client).answer(i).cleared for i in "ab"] and all(client.pttl(key) > 0 for key in left)
    assert client.mget(left) == ["2", "1"]  # so many attempts there were, and the next one counts on


def test_clear_passes_over_what_is_no_answer_in_the_index(client) -> None:
    ask("one", source=say("x"), id="a").wait(60)
    client.zadd(names_of(client).answers, {"no id {at} all": 0})
    assert clear() == 1 and not client.exists(names_of(client).answers)


def test_clear_copes_with_ids_that_a_clock_made(client) -> None:
    client.xadd(names_of(client).answer("a").chunks, {"by": "hand"})  # attempt 1,700,000,000,000 or so
    assert clear("a") == 1 and look("a").status == "missing"


@pytest.mark.parametrize("record", ["5", "[]", "no json", '{"reason": "stop", "text": 5}', '{"reason": {}, "end": 3}'])
def test_a_foreign_record_is_an_error_or_a_state_never_a_crash(client, record: str) -> None:
    client.set(names_of(client).answer("a").question, record)
    try:
        assert look("a").status in ("missing", "ended", "interrupted") and isinstance(look("a").text, str)
    except LLMStreamError:
        pass


def test_clear_of_a_growing_answer_stops_it_first(client) -> None:
    says = Model("one ")
    producer = start(client, says, FAST)
    wait_for(lambda: text_in(client) == "one ")
    assert clear("a", timing=FAST) == 1
    wait_for(producer.done.is_set)
    assert says.closed and look("a").status == "missing"


# ---------------------------------------------------------------------------------------- errors of the model


@pytest.mark.parametrize(
    ("model", "error", "text"),
    [
        ("status=401", "Unauthorized", ""),
        ("status=429", "RateLimited", ""),
        ("status=500", "ServerError", ""),
        ("drop=4", "ConnectionDropped", None),
        ("long=0", "EmptyAnswer", ""),
        ("silence", "Stalled", ""),
        ("stall=4", "Stalled", None),
    ],
)
def test_an_error_of_the_model_becomes_an_entry(client, monkeypatch, model: str, error: str, text: str | None) -> None:
    monkeypatch.setenv("LLMSTREAM_TIMEOUT", "0.5")
    monkeypatch.setenv("LLMSTREAM_FIRST_TIMEOUT", "20")
    # Seconds: a busy machine may be silent too, before the first delta of a model that stalls later at the latest.
    timeout = {"silence": 0.5, "stall=4": None}.get(model, 20)
    answer = ask("What is a Redis stream?", source="scripted", model=f"scripted:pace=0,{model}", timeout=timeout)
    answer.wait(40)
    *_, last = read_answer(answer.id)
    assert isinstance(last, Failed) and last.error == error and len(last.message) > 20
    assert answer.status == "failed" and answer.record["error"] == error
    assert answer.text == answer.record["text"] and (answer.text == text if text is not None else answer.text)


def test_a_source_of_ones_own_lets_go_of_what_it_holds_when_its_answer_is_stopped(client) -> None:
    said, over, ended = threading.Event(), threading.Event(), []

    def source(question, topic):
        try:
            yield "one "
            said.wait(60)
            while True:
                yield "more "
        finally:
            over.set()
            ended.append(question)

    answer = ask("?", source=source, client=client, timing=FAST)
    wait_for(lambda: answer.text == "one ")
    answer.stop()
    said.set()
    assert over.wait(60), "while somebody has the answer's handle"
    assert answer.record["reason"] == "cancelled" and ended == ["?"]


def test_an_error_in_ones_own_source_becomes_an_entry(client) -> None:
    def broken(question, topic):
        yield "so far "
        raise RuntimeError("the wheel came off")

    answer = ask("?", source=broken).wait(60)
    assert answer.status == "failed" and answer.text == "so far " and answer.record["error"] == "RuntimeError"
    assert "wheel" not in json.dumps(answer.record)  # it may hold anything, and the record is for all to see
    assert isinstance(answer.exception, RuntimeError) and str(answer.exception) == "the wheel came off"
    assert Answer(answer.id).exception is None


def test_a_source_whose_close_hangs_or_exits_holds_up_nobody(client) -> None:
    class Source:
        usage, finish_reason = {"x": Decimal(1), "y": 2}, object()  # what no JSON can hold

        def __init__(self, close) -> None:
            self.close = close

        def __iter__(self):
            yield from ["so ", "far"]

    def exits() -> None:
        raise SystemExit

    for close in (threading.Event().wait, exits):
        answer = ask("?", source=lambda *_, close=close: Source(close)).wait(60)
        assert (answer.status, answer.text, answer.stop()) == ("ended", "so far", "ended")
        assert answer.record["usage"] == {"y": 2} and answer.record["reason"] == "stop" and not answer.at_work


def test_a_source_of_nothing_but_empty_text_stalls(client) -> None:
    def nothing(question, topic):
        while True:
            yield ""

    answer = ask("?", source=nothing, timeout=0.2, timing=FAST).wait(60)
    assert (answer.status, answer.record["error"]) == ("failed", "Stalled")


@pytest.mark.parametrize("odd", [float("nan"), -1])
def test_odd_numbers_are_refused_before_anything_is_written(client, odd) -> None:
    for make in (
        lambda: Writing(coalesce_ms=odd),
        lambda: Writing(maxlen=odd),
        lambda: Timing(lease=odd),
        lambda: Timing(patience=odd),
        lambda: ask("?", source=lambda *_: "x", id="odd", timeout=odd),
    ):
        with pytest.raises(ValueError, match=r"seconds|from 1 on"):
            make()
    assert look("odd").status == "missing"


def test_clear_deletes_what_is_no_answer_too(client) -> None:
    ask("one", source=lambda *_: "x", id="a").wait(60)
    client.zadd(names_of(client).answers, {"odd": 1})
    client.lpush(names_of(client).answer("odd").question, "a list")
    assert clear() == 2 and not client.exists(names_of(client).answer("odd").question)


def test_no_key_is_said_before_anything_is_written(client, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ModelError, match="OPENAI_API_KEY"):
        answer = ask("?", source="openai", id="a").wait(60)
        raise ModelError(answer.record["error"], answer.record["message"])


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("question", ["", "  \n", "x" * 100_000])
def test_a_bad_question_is_refused(client, question: str) -> None:
    with pytest.raises(BadQuestion):
        ask(question)
    assert client.zcard(names_of(client).answers) == 0


def test_a_long_question_is_fine(client) -> None:
    assert ask("why? " * 3_000, source=say("so")).wait(60).status == "ended"


@pytest.mark.parametrize("answer_id", ["", "a b", "{a}", "../x", "é", "x" * 100])
def test_an_odd_id_is_refused_everywhere(client, answer_id: str) -> None:
    for call in (lambda: list(read_answer(answer_id)), lambda: look(answer_id), lambda: Answer(answer_id),
                 lambda: stop_answer(answer_id), lambda: clear(answer_id)):  # fmt: skip
        with pytest.raises(BadAnswerId):
            call()
    if answer_id:
        with pytest.raises(BadAnswerId):
            ask("?", id=answer_id)


@pytest.mark.parametrize("after", ["$", "1", "x", ""])
def test_an_odd_cursor_is_refused(client, after: str) -> None:
    with pytest.raises(BadEntryID):
        list(read_answer("a", after))


@pytest.mark.slow
def test_an_unknown_answer_is_not_found(client) -> None:
    with pytest.raises(AnswerNotFound, match="nosuch"):
        list(read_answer("nosuch"))
    with pytest.raises(AnswerNotFound):
        stop_answer("nosuch")
    assert look("nosuch").status == "missing" and Answer("nosuch").status == "missing" and clear("nosuch") == 0


def test_a_taken_id_is_refused_and_what_stands_there_stays(client) -> None:
    ask("first", source=say("mine"), id="a").wait(60)
    with pytest.raises(AnswerExists, match="clear"):
        ask("second", source=say("yours"), id="a")
    assert look("a").text == "mine" and look("a").record["question"] == "first"


@pytest.mark.slow
def test_a_queued_question_wears_the_readers_patience_out(client) -> None:
    record = new_record("a", "?", None, "x", "x") | {"pooled": True}
    register(client, record, FAST)
    assert look("a").status == "queued"
    with pytest.raises(StillWaiting):
        list(read_answer("a", timing=replace(FAST, patience=1.0)))


@pytest.mark.parametrize("kind", ["string", "list", "hash", "set"])
def test_a_key_of_another_type_is_told(client, kind: str) -> None:
    key = names_of(client).answer("a").chunks
    {"string": lambda: client.set(key, "x"), "list": lambda: client.rpush(key, "x"),
     "hash": lambda: client.hset(key, "x", "y"), "set": lambda: client.sadd(key, "x")}[kind]()  # fmt: skip
    for call in (lambda: ask("?", source=say("x"), id="a"), lambda: list(read_answer("a")), lambda: look("a")):
        with pytest.raises(LLMStreamError, match=r"type|not a stream"):
            call()
    assert client.type(key) == kind  # not harmed
    assert clear("a") == 1 and look("a").status == "missing"


def test_a_foreign_stream_is_told(client) -> None:
    client.xadd(names_of(client).answer("a").chunks, {"questionId": "a", "chunkOutput": "hello"})
    with pytest.raises(NotAnAnswer, match="kind, text and ms"):
        list(read_answer("a"))
    with pytest.raises(NotAnAnswer):
        look("a")


def test_foreign_bytes_in_the_database_never_raise(client) -> None:
    raw = redis.Redis.from_url(environment_of(client)["REDIS_URL"], protocol=2)
    raw.xadd(names_of(client).answer("a").chunks, {"kind": "start", "text": "{}", "ms": 0}, id="1-0")
    raw.xadd(names_of(client).answer("a").chunks, {"kind": "text", "text": b"\xff\xfe", "ms": 0}, id="1-1")
    raw.close()
    assert look("a").text == "\\xff\\xfe"


def test_a_trimmed_stream_reports_the_gap_and_the_record_fills_it(client) -> None:
    answer = ask("numbers", source=say(*"0123456789")).wait(60)
    client.xtrim(names_of(client).answer(answer.id).chunks, maxlen=4, approximate=False)
    events = list(read_answer(answer.id))
    assert [e.missing for e in events if isinstance(e, Gap)] == [8]
    assert text_of(events) == "789" and answer.text == "0123456789"


@pytest.mark.slow
def test_what_was_missing_when_an_answer_was_closed_stays_missing(client) -> None:
    attempt = attempts.Attempt(client, {"id": "a", "asked": 0.0, "question": "?"}, FAST)
    attempt.open(lambda top: ("start", {}))
    attempt.entries += [("text", letter, 1) for letter in "abcdef"]
    attempt.flush()
    client.xtrim(names_of(client).answer("a").chunks, maxlen=2, approximate=False)
    wait_for(lambda: look("a").status == "interrupted")
    assert stop_answer("a", timing=FAST) == "ended"
    assert look("a").text == "ef" == look("a").record["text"]  # whoever closed it had no more than this
    assert look("a").missing == 5


@pytest.mark.slow
def test_an_expired_stream_is_read_from_the_record(client) -> None:
    answer = ask("numbers", source=say(*"0123456789")).wait(60)
    client.delete(names_of(client).answer(answer.id).chunks)
    events = list(read_answer(answer.id))
    assert text_of(events) == "0123456789" and isinstance(events[-1], Ended)
    assert answer.status == "ended" and answer.text == "0123456789"


@pytest.mark.slow
def test_a_deleted_answer_ends_its_readers(client) -> None:
    says = Model("one ")
    producer = start(client, says, FAST)
    wait_for(lambda: text_in(client) == "one ")
    seen: list = []
    reader = threading.Thread(target=lambda: seen.extend(read_answer("a", client=client, timing=FAST)))
    reader.start()
    wait_for(lambda: len(seen) > 1)
    keys = names_of(client).answer("a")
    client.set(keys.cleared, 1)  # as `clear` does, but without waiting for the producer's end
    client.delete(keys.chunks, keys.question)
    reader.join(60)
    assert isinstance(seen[-1], Failed) and seen[-1].error == "Deleted"
    wait_for(producer.done.is_set)
    assert stream_of(client) == []


def test_a_producer_that_ends_itself_badly_tells_who_waits(client) -> None:
    says = Model("one ")
    producer = start(client, says, FAST)
    wait_for(lambda: text_in(client) == "one ")
    key = names_of(client).answer("a").chunks
    client.delete(key)
    client.set(key, "not a stream")
    says.say("two")
    wait_for(producer.done.is_set)
    with pytest.raises(LLMStreamError, match="type"):
        Answer("a", producer=producer).wait(60)
    assert Answer("a", producer=producer).text == "one two"  # nothing is lost
    assert says.closed


def test_words_of_a_model_in_an_error_are_not_taken_for_a_refused_id(client) -> None:
    attempt, tries = attempts.Attempt(client, {"id": "a", "asked": 0.0}, FAST), []

    def write() -> None:
        tries.append(1)
        raise redis.ResponseError(
            "Command # 1 (XADD k 1-1 text equal or smaller) of pipeline caused error: WRONGTYPE no"
        )

    with pytest.raises(redis.ResponseError):
        attempt.insist(write)
    attempt.close()
    assert len(tries) == 1  # it does not pass, so it is not tried again


@pytest.mark.slow
def test_a_burst_from_a_fast_source_is_exact_and_bounded(client) -> None:
    most = 0

    def fast(question, topic):
        nonlocal most
        for n in range(12_000):
            attempt = producers[0].attempt if producers else None
            most = max(most, len(attempt.entries) - attempt.sent if attempt else 0)
            yield f"{n} "

    producers: list = []
    answer = ask("count", source=fast)
    producers.append(answer._producer)
    answer.wait(60)
    assert answer.text == "".join(f"{n} " for n in range(12_000))
    assert most <= produce.BACKLOG + 1


def test_records_are_json_and_hold_no_secret(client, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-the-environment")
    answer = ask("What is a Redis stream?", source="scripted", model="scripted:pace=0").wait(60)
    raw = client.get(names_of(client).answer(answer.id).question)
    assert json.loads(raw)["id"] == answer.id and "secret-of" not in raw
    assert "secret-of" not in json.dumps([e.text for e in stream_of(client, answer.id)])


@pytest.mark.slow
def test_wait_is_bounded(client) -> None:
    says = Model("one ")
    producer = start(client, says, FAST)
    wait_for(lambda: text_in(client) == "one ")
    for answer in (Answer("a", producer=producer), Answer("a", timing=FAST)):
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            answer.wait(0.3)
        assert time.monotonic() - began < 30
    says.end()
    wait_for(producer.done.is_set)


def test_a_fenced_producer_tells_the_text_of_the_one_that_took_over(client) -> None:
    says = Model("half ")
    answer = ask("one", source=lambda question, topic: says, id="a", timing=FAST)
    wait_for(lambda: text_in(client) == "half ")
    client.xadd(names_of(client).answer("a").chunks, {"kind": "start", "text": "{}", "ms": 0}, id="2-0")
    client.xadd(names_of(client).answer("a").chunks, {"kind": "text", "text": "theirs", "ms": 1}, id="2-1")
    says.say("and on")
    answer.wait(60)
    assert answer.text == "theirs"
