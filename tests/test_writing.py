"""How an answer is written, and what of it is left to read: larger entries, a bounded stream, a time to live, replay."""

from __future__ import annotations

import time

import pytest

from llmstream_nb import AnswerView
from llmstream_nb.answers.ask import Answer, ask, clear, stop_answer
from llmstream_nb.answers.attempt import Attempt
from llmstream_nb.answers.connection import connect, names_of
from llmstream_nb.answers.produce import Producer, Writing
from llmstream_nb.answers.read import look, read_answer
from llmstream_nb.answers.record import new_record, register
from llmstream_nb.faults.proxy import Proxy
from llmstream_nb.protocol.events import Gap, text_of
from llmstream_nb.protocol.wire import AnswerNotFound, Fenced, Timing

from .conftest import FAST
from .model import Model, record_of, start, stream_of, text_in, wait_for

HOUR = 3_600_000  # milliseconds: nothing is written because of the time


def write(client, says: Model, writing: Writing, timing: Timing = FAST) -> Producer:
    record = new_record("a", "why?", None, "test", "test")
    register(client, record, timing)
    producer = Producer(client, record, says, timing, writing)
    producer.start()
    return producer


def texts(client) -> list[str]:
    return [entry.text for entry in stream_of(client) if entry.kind == "text"]


# ------------------------------------------------------------------------------------------- larger entries


def test_the_first_entry_comes_at_once_and_the_rest_together(client) -> None:
    says = Model("first")
    producer = write(client, says, Writing(coalesce_ms=HOUR))
    wait_for(lambda: texts(client) == ["first"])
    says.say(" and", " the", " rest")
    says.end()
    wait_for(producer.done.is_set)
    assert texts(client) == ["first", " and the rest"]
    assert look("a").record["chunks"] == 2 and look("a").text == "first and the rest"


def test_what_is_held_is_written_when_it_is_due_though_the_model_is_silent(client) -> None:
    says = Model("first")
    producer = write(client, says, Writing(coalesce_ms=150))
    wait_for(lambda: texts(client) == ["first"])
    says.say(" and", " more")
    wait_for(lambda: text_in(client) == "first and more")
    assert len(texts(client)) <= 3  # " and" may have been due just then
    says.end()
    wait_for(producer.done.is_set)


def test_what_is_held_does_not_wait_for_the_next_tick(client) -> None:
    says = Model("first")
    producer = write(client, says, Writing(coalesce_ms=50), Timing(lease=600, tick=300))
    wait_for(lambda: texts(client) == ["first"])
    says.say(" and more")
    wait_for(lambda: text_in(client) == "first and more")
    says.end()
    wait_for(producer.done.is_set)


@pytest.mark.parametrize("how", ["stop", "error"])
def test_what_is_held_is_kept_when_the_answer_ends_early(client, how: str) -> None:
    says = Model("first")
    producer = write(client, says, Writing(coalesce_ms=HOUR))
    wait_for(lambda: texts(client) == ["first"])
    says.say(" and", " more")
    wait_for(lambda: producer._held == " and more")
    if how == "stop":
        stop_answer("a", timing=FAST)
    else:
        says.break_off(RuntimeError("gone"))
    wait_for(producer.done.is_set)
    assert look("a").text == "first and more" and look("a").record.get("reason", "error") in ("cancelled", "error")


def test_far_fewer_entries_and_the_same_text(client) -> None:
    words = [f"{n} " for n in range(3_000)]
    for coalesce_ms, answer_id in ((0, "a"), (50, "b")):
        source = lambda question, topic: iter(words)  # noqa: E731
        ask("many", source=source, id=answer_id, writing=Writing(coalesce_ms=coalesce_ms)).wait(60)
    assert look("a").text == look("b").text == "".join(words)
    assert len(stream_of(client, "a")) == 3_002 and len(stream_of(client, "b")) < 300


@pytest.mark.parametrize("bad", [{"coalesce_ms": -1}, {"maxlen": 0}, {"maxlen": -5}])
def test_numbers_that_make_no_sense(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        Writing(**bad)


# ------------------------------------------------------------------------------------------ a bounded stream


def test_a_bounded_stream_tells_latecomers_what_is_missing_until_the_record_has_it(client) -> None:
    says = Model(*[f"{n} " for n in range(50)])
    producer = write(client, says, Writing(maxlen=10))
    wait_for(lambda: producer.attempt.sent == 51)
    assert client.xlen(producer.attempt.keys.chunks) == 10
    now = look("a")
    assert now.missing == 41 and now.text == "".join(f"{n} " for n in range(40, 50))
    late = AnswerView("a")
    wait_for(lambda: late.blocks and late.text.endswith("49 "))
    says.end()
    wait_for(producer.done.is_set)
    whole = "".join(f"{n} " for n in range(50))
    assert look("a").text == whole and look("a").missing == 0
    wait_for(lambda: late.state == "ended" and late.text == whole and not late.blocks)
    events = list(read_answer("a"))
    assert [event.missing for event in events if isinstance(event, Gap)] == [42]


def test_an_opening_that_another_has_overtaken_is_not_its_own_though_the_start_is_trimmed_away(client) -> None:
    record = new_record("a", "why?", None, "test", "test")
    late = Attempt(client, record, FAST, maxlen=2)
    begin = late._begin

    def overtaken(pipe: object) -> None:
        late._begin = begin  # type: ignore[method-assign]
        wait_for(write(client, Model("said", " by", " another", end=True), Writing(maxlen=2)).done.is_set)
        raise ConnectionError("the reply was lost")

    late._begin = overtaken  # type: ignore[method-assign]
    with pytest.raises(Fenced):
        late.open(lambda _: ("start", {}))
    assert [str(entry.id) for entry in stream_of(client)] == ["1-3", "1-4"] and look("a").text == "said by another"


def test_a_reader_that_is_trimmed_past_is_told_how_much(client) -> None:
    says = Model(*[f"{n} " for n in range(5)])
    producer = write(client, says, Writing(maxlen=20))
    events = read_answer("a", timing=FAST)
    seen = [next(events) for _ in range(6)]
    says.say(*[f"{n} " for n in range(5, 105)])
    wait_for(lambda: producer.attempt.sent == 106)
    says.end()
    wait_for(producer.done.is_set)
    rest = list(events)
    assert isinstance(rest[0], Gap) and rest[0].missing == 106 + 1 - 6 - 20
    assert text_of(seen) == "0 1 2 3 4 " and text_of(rest) == "".join(f"{n} " for n in range(86, 105))


def test_another_attempt_follows_a_trimmed_one(client) -> None:
    says = Model(*"abcdef")
    first = write(client, says, Writing(maxlen=3))
    wait_for(lambda: first.attempt.sent == 7)
    first.leave()
    wait_for(first.done.is_set)
    second = Producer(client, record_of(client), Model("whole", end=True), FAST, Writing(maxlen=3))
    second.start()
    wait_for(second.done.is_set)
    assert second.error is None and look("a").text == "whole" and look("a").top.attempt == 2


def test_the_record_of_a_dead_trimmed_answer_says_what_it_lacks(client) -> None:
    says = Model(*[f"{n} " for n in range(50)])
    producer = write(client, says, Writing(maxlen=10))
    wait_for(lambda: producer.attempt.sent == 51)
    producer.leave()
    wait_for(producer.done.is_set)
    assert stop_answer("a", timing=FAST) == "ended"
    assert look("a").record["missing"] == 41
    view = AnswerView("a")
    wait_for(lambda: view.state == "stopped" and view.blocks and "41 entries are missing" in view.note)


def test_a_lost_reply_to_a_bounded_stream_leaves_no_hole(shared) -> None:
    with Proxy("127.0.0.1", shared.port) as proxy:
        client = connect(proxy.url, prefix=f"w{time.time_ns()}", socket_timeout=1)
        says = Model("one ", "two ")
        producer = write(client, says, Writing(maxlen=3))
        wait_for(lambda: producer.attempt.sent == 3)
        proxy.drop_reply(when=b"three")
        says.say("three ")
        proxy.wait_dropped()
        says.say("four")
        says.end()
        wait_for(producer.done.is_set)
        assert producer.error is None
        assert [str(entry.id) for entry in stream_of(client)] == ["1-3", "1-4", "1-5"]
        assert look("a", client).text == "one two three four"
        clear(client=client, timing=FAST)
        client.close()


# ------------------------------------------------------------------------------------- time to live, replay


@pytest.mark.slow
def test_an_answer_expires_with_all_that_belongs_to_it(client) -> None:
    short = Timing(lease=1.0, tick=0.05, ttl=1.0)
    ask("soon gone", source=lambda question, topic: iter(["Hi"]), id="a", timing=short).wait(60)
    wait_for(lambda: look("a").status == "missing")
    keys = names_of(client).answer("a")
    assert not client.exists(keys.chunks, keys.question, keys.cancel, keys.lease(1))
    with pytest.raises(AnswerNotFound):
        list(read_answer("a", timing=FAST))


def test_an_answer_that_expires_soon_takes_no_other_out_of_the_index(client) -> None:
    index = names_of(client).answers
    ask("stays", source=lambda question, topic: iter(["Hi"]), id="a").wait(60)
    client.zincrby(index, -10, "a")  # asked ten seconds ago
    ask("soon gone", source=lambda question, topic: iter(["Hi"]), id="b", timing=Timing(ttl=1.0)).wait(60)
    assert client.zrange(index, 0, -1) == ["a", "b"]


def test_an_ended_answer_opens_from_its_record(client) -> None:
    words = [f"{n} " for n in range(100)]
    ask("many", source=lambda question, topic: iter(words), id="a").wait(60)
    client.xtrim(names_of(client).answer("a").chunks, maxlen=5, approximate=False)
    seen: list[list] = []
    view = AnswerView("a")
    view.observe(lambda change: seen.append(change["new"]), "gaps")
    wait_for(lambda: view.state == "ended")
    assert view.text == "".join(words) and view.chunks == 100 and not view.blocks and seen == []
    client.delete(names_of(client).answer("a").chunks)
    assert Answer("a").text == "".join(words)


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True])
def test_a_replay_takes_its_time_and_ends_with_the_same_text(client, plain: bool) -> None:
    says = Model("one ")
    producer = start(client, says, FAST)
    for number, word in enumerate(("two ", "three ", "four")):
        wait_for(lambda sent=number + 2: producer.attempt.sent == sent)
        time.sleep(0.25)  # this is the pace that is to be seen again
        says.say(word)
    says.end()
    wait_for(producer.done.is_set)
    began = time.monotonic()
    view = AnswerView("a", replay=1.0, plain=plain)
    held: list[str] = []

    def ended() -> bool:
        if view.transcript.text not in held:
            held.append(view.transcript.text)
        return view.transcript.settled

    wait_for(ended)
    assert held[-1] == "one two three four" and {"one ", "one two ", "one two three "} <= set(held)
    assert time.monotonic() - began >= 0.7  # it can't be faster than it was
    fast = AnswerView("a", replay=100.0, plain=plain)
    wait_for(lambda: fast.transcript.settled)
    assert fast.transcript.text == "one two three four"


def test_a_replay_of_two_attempts_begins_anew_in_the_middle(client) -> None:
    first = start(client, Model("half "), FAST)
    wait_for(lambda: first.attempt.sent == 2)
    first.leave()
    wait_for(first.done.is_set)
    second = Producer(client, record_of(client), Model("all of it", end=True), FAST)
    second.start()
    wait_for(second.done.is_set)
    view = AnswerView("a", replay=5.0)
    wait_for(lambda: view.state == "ended")
    assert view.text == "all of it" and view.version == 1
