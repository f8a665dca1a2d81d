"""Reading an answer through a consumer group, on every backend: what a consumer gets, owes, and is told."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import redis

from llmstream_nb.answers import attempt as attempts
from llmstream_nb.answers import produce
from llmstream_nb.answers.ask import ask, clear, stop_answer
from llmstream_nb.answers.connection import RedisUnusable, connect, environment_of, names_of
from llmstream_nb.answers.read import look
from llmstream_nb.answers.record import new_record, register
from llmstream_nb.faults import servers
from llmstream_nb.pool import groups
from llmstream_nb.pool.groups import BadName, GroupGone, claim, read_answer_group
from llmstream_nb.protocol import round as rounds
from llmstream_nb.protocol.round import StillWaiting
from llmstream_nb.protocol.wire import AnswerNotFound, BadAnswerId, Entry, LLMStreamError, NotAnAnswer, Timing

from .conftest import FAST
from .model import Model, record_of, start, stream_of, text_in, wait_for
from .network import Proxy

QUICK = replace(FAST, lease=0.3, patience=0.4)


class Commands:
    """The commands that this process has sent: name and last argument."""

    def __init__(self, patch) -> None:
        self.sent: list[str] = []
        single, pipe = redis.Redis.execute_command, redis.client.Pipeline.execute

        def execute_command(client, *args, **options):
            self.sent.append(f"{args[0]} {args[-1]}")
            return single(client, *args, **options)

        def execute(pipeline, *args, **options):
            self.sent.append("pipeline")
            return pipe(pipeline, *args, **options)

        patch.setattr(redis.Redis, "execute_command", execute_command)
        patch.setattr(redis.client.Pipeline, "execute", execute)


@pytest.fixture
def commands(monkeypatch) -> Commands:
    return Commands(monkeypatch)


@pytest.fixture
def short_blocks(monkeypatch) -> None:
    """Reads that last a tenth of a second at most, where it is not the waiting that is tested."""
    monkeypatch.setattr(rounds, "BLOCK", 0.1)
    monkeypatch.setattr(rounds.Patience.pause, "__defaults__", (0.1,))


class Reader(threading.Thread):
    """A consumer in a thread: the batches it got, and the error that ended it."""

    def __init__(self, client, group: str = "g", consumer: str = "c", timing: Timing = FAST, **options) -> None:
        super().__init__(daemon=True)
        self.batches: list[list[Entry]] = []
        self.error: LLMStreamError | None = None
        self._read = read_answer_group("a", group, consumer, client=client, timing=timing, **options)
        self.start()

    @property
    def entries(self) -> list[Entry]:
        return [entry for batch in list(self.batches) for entry in batch]

    @property
    def text(self) -> str:
        return "".join(entry.text for entry in self.entries if entry.kind == "text")

    def run(self) -> None:
        try:
            for batch in self._read:
                self.batches.append(batch)
        except LLMStreamError as error:
            self.error = error

    def end(self) -> Reader:
        """Wait until it has ended, and see that it ended by itself."""
        wait_for(lambda: not self.is_alive())
        return self

    def fail(self) -> LLMStreamError:
        """Wait until it has ended, and return the error."""
        self.end()
        assert self.error, "it ended without an error"
        return self.error


def chunks(client) -> str:
    return names_of(client).answer("a").chunks


def pending(client, group: str = "g", consumer: str | None = None) -> list[str]:
    """The IDs of a group's pending entries."""
    rows = client.xpending_range(chunks(client), group, "-", "+", 1000, consumername=consumer)
    return [row["message_id"] for row in rows]


def ids(entries: list[Entry]) -> list[str]:
    return [str(entry.id) for entry in entries]


def answered(client, *texts: str) -> list[Entry]:
    """An answer that has ended, and its entries."""
    wait_for(start(client, Model(*texts, end=True), FAST).done.is_set)
    return stream_of(client)


def dead(client, *texts: str) -> None:
    """An answer whose producer has died after these texts."""
    attempt = attempts.Attempt(client, {"id": "a", "asked": 0.0, "question": "?"}, QUICK)
    attempt.open(lambda top: ("start", {}))
    attempt.entries += [("text", text, 1) for text in texts]
    attempt.flush()
    attempt.close()
    client.delete(attempt.keys.lease(1))


def reading(client, consumer: str = "c", group: str = "g", **options) -> Iterator[list[Entry]]:
    return read_answer_group("a", group, consumer, client=client, timing=FAST, **options)


# -------------------------------------------------------------------------------------------- taking and acking


def test_a_batch_is_acknowledged_when_the_next_is_asked_for(client, short_blocks) -> None:
    says = Model()
    producer = start(client, says, FAST)
    read, got = reading(client), []
    wait_for(lambda: len(stream_of(client)) == 1)
    for text in ("one ", "two ", "three"):
        got.append(next(read))
        assert pending(client) == ids(got[-1])
        says.say(text)
        wait_for(lambda: text_in(client).endswith(text))
    got.append(next(read))
    says.end()
    wait_for(producer.done.is_set)
    got += list(read)
    assert [entry for batch in got for entry in batch] == stream_of(client)
    assert pending(client) == []


def test_batches_are_no_larger_than_asked_for(client, short_blocks) -> None:
    answered(client, *"abcdefg")
    assert [len(batch) for batch in reading(client, count=4)] == [4, 4, 1]


def test_after_a_crash_ones_own_pending_entries_come_first(client, short_blocks) -> None:
    every = answered(client, *"abcdefg")
    crashed = reading(client, count=5)
    next(crashed)
    crashed.close()
    assert pending(client) == ids(every[:5])
    again = list(reading(client, count=2))  # in pages, and then what is new
    assert [entry for batch in again for entry in batch] == every
    assert [len(batch) for batch in again] == [2, 2, 1, 2, 2]
    assert pending(client) == []


def test_an_error_of_the_caller_acknowledges_nothing(client, short_blocks) -> None:
    every = answered(client, *"abc")

    def crash() -> None:
        for batch in reading(client):
            raise ZeroDivisionError(batch)

    with pytest.raises(ZeroDivisionError):
        crash()
    assert pending(client) == ids(every)


def test_two_consumers_of_a_group_share_the_entries(client, short_blocks) -> None:
    says = Model()
    producer = start(client, says, FAST)
    wait_for(lambda: len(stream_of(client)) == 1)
    consumers = [reading(client, "one"), reading(client, "two")]
    taken: list[list[Entry]] = [[], []]
    for turn in range(8):
        taken[turn % 2] += next(consumers[turn % 2])  # while the other is busy with its last batch
        says.say(f"{turn} ")
        wait_for(lambda: text_in(client).endswith(f"{turn} "))
    says.end()
    wait_for(producer.done.is_set)
    for consumer, entries in zip(consumers, taken, strict=True):
        entries += [entry for batch in consumer for entry in batch]
    assert sorted(taken[0] + taken[1]) == stream_of(client)  # each once
    assert min(len(entries) for entries in taken) >= 4
    assert pending(client) == []


def test_consumers_at_once_get_each_entry_once_and_all_end(client, short_blocks) -> None:
    says = Model()
    producer = start(client, says, FAST)
    readers = [Reader(client, consumer=f"c{n}") for n in range(3)]
    for n in range(40):
        says.say(f"{n} ")
    wait_for(lambda: len(stream_of(client)) == 41)
    says.end()
    wait_for(producer.done.is_set)
    assert sorted(entry for reader in readers for entry in reader.end().entries) == stream_of(client)
    assert not any(reader.error for reader in readers) and pending(client) == []


def test_groups_on_one_answer_are_independent(client, short_blocks) -> None:
    says = Model("one ")
    producer = start(client, says, FAST)
    quick = Reader(client, "viewer")
    slow = reading(client, group="counter", count=1)
    first = next(slow)
    says.say("two ", "three")
    says.end()
    wait_for(producer.done.is_set)
    assert quick.end().entries == stream_of(client)  # although the other has taken one entry
    assert [first, *slow] == [[entry] for entry in stream_of(client)]
    assert [group["pending"] for group in client.xinfo_groups(chunks(client))] == [0, 0]


# ------------------------------------------------------------------------------------------------------- the end


@pytest.mark.parametrize("how", ["ended", "failed", "cancelled"])
def test_it_ends_with_the_answer_however_that_ends(client, short_blocks, how: str) -> None:
    says = Model("so far ")
    producer = start(client, says, FAST)
    reader, other = Reader(client), Reader(client, consumer="other")
    wait_for(lambda: "so far " in (reader.text, other.text))
    {"ended": says.end, "failed": lambda: says.break_off(RuntimeError("it broke")),
     "cancelled": lambda: stop_answer("a", client=client, timing=FAST)}[how]()  # fmt: skip
    wait_for(producer.done.is_set)
    reader.end()
    other.end()
    assert (reader.error, other.error) == (None, None)
    last = max(reader.entries + other.entries)
    assert last.kind == ("error" if how == "failed" else "end")
    assert last.data.get("reason") == {"ended": "stop", "cancelled": "cancelled"}.get(how)


def test_whoever_took_the_end_waits_for_nothing_more(client, monkeypatch, short_blocks) -> None:
    answered(client, "one")
    waits, read = [], groups.read_group
    monkeypatch.setattr(groups, "read_group", lambda *args: waits.append(args[-1]) or read(*args))
    assert len(list(reading(client))) == 1
    assert len(waits) == 4 and max(waits[2:]) < rounds.BLOCK  # its own, the new ones; then twice, soon
    waits.clear()
    assert list(reading(client)) == []
    assert len(waits) == 3 and max(waits[2:]) < rounds.BLOCK


@pytest.mark.slow
def test_joined_late_it_gets_everything_and_once_all_is_taken_nothing(client, short_blocks) -> None:
    every = answered(client, "one ", "two")
    assert [entry for batch in reading(client) for entry in batch] == every
    assert list(reading(client)) == [] == list(reading(client, "another"))
    assert [entry for batch in reading(client, group="new") for entry in batch] == every


def test_a_second_attempt_comes_through_the_same_group(client, short_blocks) -> None:
    dead(client, "half")
    reader = Reader(client, timing=replace(FAST, lease=0.4))
    wait_for(lambda: reader.text == "half" and not client.exists(names_of(client).answer("a").lease(1)))
    record = record_of(client)
    produce.Producer(client, record, Model("whole", end=True), FAST).start()
    assert ids(reader.end().entries) == ["1-0", "1-1", "2-0", "2-1", "2-2"] and reader.error is None


# ------------------------------------------------------------------------------------------------------- waiting


def test_a_queued_question_is_waited_for(client, short_blocks) -> None:
    record = new_record("a", "why?", None, "test", "test") | {"pooled": True}
    register(client, record, FAST)
    reader = Reader(client)
    wait_for(lambda: client.exists(chunks(client)))
    wait_for(lambda: 0 < client.pttl(chunks(client)) <= FAST.ttl * 1000)  # nothing of it stays for ever
    assert look("a", client).status == "queued"
    produce.Producer(client, record, Model("so", end=True), FAST).start()
    assert ids(reader.end().entries) == ["1-0", "1-1", "1-2"] and reader.error is None


@pytest.mark.slow
def test_a_question_that_nobody_takes_wears_its_patience_out(client, commands, short_blocks) -> None:
    register(client, new_record("a", "?", None, "x", "x") | {"pooled": True}, FAST)
    with pytest.raises(StillWaiting, match="nobody began"):
        list(read_answer_group("a", "g", "c", client=client, timing=QUICK))
    assert len(commands.sent) < 100  # no hot loop
    with pytest.raises(StillWaiting, match="within 0"):
        list(read_answer_group("a", "g", "c", client=client, timing=QUICK, timeout=0.6))  # longer than its patience


@pytest.mark.slow
def test_a_producer_that_died_is_told(client, commands, short_blocks) -> None:
    dead(client, "half")
    with pytest.raises(StillWaiting, match="died"):
        for batch in read_answer_group("a", "g", "c", client=client, timing=QUICK):
            assert ids(batch) == ["1-0", "1-1"]
    assert pending(client) == []  # what the caller has finished is finished
    assert len(commands.sent) < 200


@pytest.mark.slow
def test_a_timeout_is_kept_and_what_was_taken_is_acknowledged(client, short_blocks) -> None:
    says = Model("one ")
    producer = start(client, says, FAST)
    wait_for(lambda: text_in(client) == "one ")
    began = time.monotonic()
    with pytest.raises(StillWaiting, match="it goes on"):
        for _ in reading(client, timeout=0.3):
            pass
    assert 0.3 < time.monotonic() - began < 30
    stop = time.monotonic() + 0.5
    with pytest.raises(StillWaiting):
        for batch in reading(client, timeout=0.2):
            assert ids(batch) == ["1-2"], "what was finished came again"
            wait_for(lambda: time.monotonic() > stop)  # a caller that takes its time, beyond the timeout
    assert pending(client) == []
    says.end()
    wait_for(producer.done.is_set)


@pytest.mark.slow
def test_a_slow_caller_finishes_before_it_is_told_that_time_is_up(client, short_blocks) -> None:
    answered(client, *"abc")
    read = reading(client, timeout=0.5, count=2)
    next(read)
    late = time.monotonic() + 0.6
    wait_for(lambda: time.monotonic() > late)
    with pytest.raises(StillWaiting):
        list(read)
    assert not set(pending(client)) & {"1-0", "1-1"}  # it was through with these


# ------------------------------------------------------------------------------------------------- gone meanwhile


def make_another(client) -> None:
    clear("a", client=client, timing=FAST)
    register(client, new_record("a", "another?", None, "x", "x") | {"pooled": True}, FAST)


GONE = {
    "the group": lambda client: client.xgroup_destroy(chunks(client), "g"),
    "the key": lambda client: client.delete(chunks(client)),
    "the answer": lambda client: clear("a", client=client, timing=FAST),
    "for another": make_another,
}


@pytest.mark.slow
@pytest.mark.parametrize("what", GONE)
@pytest.mark.parametrize("when", ["waiting for the first entry", "waiting for more", "busy with a batch"])
def test_what_is_deleted_meanwhile_is_told(client, commands, what: str, when: str) -> None:
    if when == "waiting for the first entry":
        register(client, new_record("a", "?", None, "x", "x") | {"pooled": True}, FAST)
    else:
        dead(client, "half")
    if when == "busy with a batch":
        read = reading(client)
        next(read)
        GONE[what](client)
        before = len(commands.sent)
        with pytest.raises(GroupGone, match="'a'"):
            list(read)
    else:
        reader = Reader(client)
        wait_for(
            lambda: (reader.text or when == "waiting for the first entry") and "XREADGROUP >" in commands.sent[-1:]
        )
        GONE[what](client)
        before = len(commands.sent)
        assert isinstance(reader.fail(), GroupGone) and "'a'" in str(reader.error)
    assert len(commands.sent) - before < 20


def test_an_answer_of_which_only_the_record_is_left_is_told(client) -> None:
    answered(client, "one")
    client.delete(chunks(client))
    with pytest.raises(GroupGone, match="expired"):
        list(reading(client))
    assert not client.exists(chunks(client))


def test_entries_trimmed_while_pending_are_passed_over_and_acknowledged(client, short_blocks) -> None:
    every = answered(client, *"abcdefgh")
    crashed = reading(client, count=6)
    next(crashed)
    crashed.close()
    client.xtrim(chunks(client), maxlen=6, approximate=False)
    got = [entry for batch in reading(client, count=2) for entry in batch]  # two batches of it are gone
    assert got == every[4:] and pending(client) == []


def test_when_all_pending_entries_are_trimmed_the_rest_is_read(client, short_blocks) -> None:
    every = answered(client, *"abc")
    crashed = reading(client, count=3)
    next(crashed)
    crashed.close()
    client.xtrim(chunks(client), maxlen=1, approximate=False)
    assert list(reading(client)) == [every[-1:]] and pending(client) == []


# ------------------------------------------------------------------------------------------------------ bad input


def test_an_unknown_answer_is_not_found_and_nothing_is_created(client) -> None:
    with pytest.raises(AnswerNotFound, match="'a'"):
        list(reading(client))
    assert not client.exists(chunks(client))
    for read in (lambda: list(read_answer_group("a b", "g", "c")), lambda: claim("{a}", "g", "c")):
        with pytest.raises(BadAnswerId):
            read()


@pytest.mark.parametrize("kind", ["string", "list"])
def test_a_key_of_another_type_is_told(client, kind: str) -> None:
    key = chunks(client)
    client.set(key, "x") if kind == "string" else client.rpush(key, "x")
    with pytest.raises(NotAnAnswer, match="not a stream"):
        list(reading(client))
    with pytest.raises(LLMStreamError, match="type"):
        claim("a", "g", "c", client=client)
    assert client.type(key) == kind


def test_a_key_that_changes_its_type_is_told(client) -> None:
    answered(client, "one")
    read = reading(client)
    next(read)
    client.delete(chunks(client))
    client.set(chunks(client), "x")
    with pytest.raises(LLMStreamError, match="type"):
        list(read)


def test_a_foreign_stream_is_told(client) -> None:
    client.xadd(chunks(client), {"questionId": "a", "chunkOutput": "hello"})
    with pytest.raises(NotAnAnswer, match="kind, text and ms"):
        list(reading(client))


@pytest.mark.parametrize("name", ["", "x" * 201, "\ud83d", None, 5, b"bytes"], ids=repr)
def test_a_name_that_is_none_is_refused(client, name) -> None:
    answered(client, "one")
    for call in (lambda: list(reading(client, name)), lambda: list(reading(client, group=name)),
                 lambda: claim("a", name, "c", client=client), lambda: claim("a", "g", name, client=client)):  # fmt: skip
        with pytest.raises(BadName):
            call()
    assert client.xinfo_groups(chunks(client)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two\nlines", "🦊", "\x1b[31mred", "a b", "$", ">", "\0", "x" * 200], ids=ascii)
def test_odd_names_are_names(client, short_blocks, name: str) -> None:
    every = answered(client, "one")
    crashed = reading(client, name, name)
    next(crashed)
    crashed.close()
    assert pending(client, name, name) == ids(every)
    assert [entry for batch in reading(client, name, name) for entry in batch] == every
    assert pending(client, name) == []


def test_odd_bytes_in_another_consumers_name_do_no_harm(client, short_blocks) -> None:
    every = answered(client, *"abc")
    raw = redis.Redis.from_url(environment_of(client)["REDIS_URL"], protocol=2)
    raw.xgroup_create(chunks(client), b"g", "0")
    raw.xreadgroup(b"g", b"\xff\xfe\n", {chunks(client): ">"}, count=2)
    raw.close()
    assert [entry for batch in reading(client) for entry in batch] == every[2:]
    assert claim("a", "g", "c", idle=0, client=client) == every[:2]
    assert [entry for batch in reading(client) for entry in batch] == every[:2]
    assert pending(client) == []


# ------------------------------------------------------------------------------------------------------- claiming


def test_claim_takes_over_what_has_been_idle_for_so_long(client, short_blocks) -> None:
    every = answered(client, *"abc")
    crashed = reading(client, "dead")
    next(crashed)
    crashed.close()
    assert claim("a", "g", "heir", idle=3600, client=client) == []
    assert pending(client, consumer="dead") == ids(every)
    wait_for(lambda: client.xpending_range(chunks(client), "g", "-", "+", 1)[0]["time_since_delivered"] > 50)
    assert claim("a", "g", "heir", idle=0.05, client=client) == every
    assert pending(client, consumer="heir") == ids(every) and pending(client, consumer="dead") == []
    assert [entry for batch in reading(client, "heir") for entry in batch] == every
    assert pending(client) == [] == claim("a", "g", "heir", idle=0, client=client)


def test_claim_takes_more_than_one_reply_holds_in_the_order_of_the_ids(client) -> None:
    every = answered(client, *(f"{n} " for n in range(250)))
    crashed = reading(client, "dead", count=300)
    next(crashed)
    crashed.close()
    assert claim("a", "g", "heir", idle=0, client=client) == every


def test_claim_passes_over_deleted_entries(client, short_blocks) -> None:
    every = answered(client, *"abcdef")
    crashed = reading(client, "dead")
    next(crashed)
    crashed.close()
    client.xdel(chunks(client), "1-0", "1-3")
    left = [entry for entry in every if str(entry.id) not in ("1-0", "1-3")]
    assert claim("a", "g", "heir", idle=0, client=client) == left
    assert [entry for batch in reading(client, "heir") for entry in batch] == left
    assert pending(client) == []


def test_claim_from_an_unknown_group_or_answer_is_told(client) -> None:
    answered(client, "one")
    with pytest.raises(GroupGone, match="no group 'nosuch'"):
        claim("a", "nosuch", "c", client=client)
    with pytest.raises(GroupGone, match="'nosuch'"):
        claim("nosuch", "g", "c", client=client)


# --------------------------------------------------------------------------------------- a bad network, redis-server


@pytest.fixture
def lab(shared) -> Iterator[SimpleNamespace]:
    """A redis-server, seen directly and through a proxy."""
    server, prefix = shared, f"t{uuid.uuid4().hex[:8]}"
    with Proxy("127.0.0.1", server.port) as proxy:
        direct = connect(server.url, prefix=prefix)
        client = connect(proxy.url, prefix=prefix, socket_timeout=1)
        yield SimpleNamespace(proxy=proxy, direct=direct, client=client)
        direct.close()
        client.close()


def test_a_lost_reply_to_a_read_loses_nothing(lab, short_blocks) -> None:
    says = Model("one ")
    producer = start(lab.direct, says, FAST)
    reader = Reader(lab.client)
    wait_for(lambda: reader.text == "one ")
    lab.proxy.drop_reply(when=b"XREADGROUP(.|\n)*>")
    says.say("two ")
    lab.proxy.wait_dropped()
    says.say("three")
    says.end()
    wait_for(producer.done.is_set)
    assert reader.end().entries == stream_of(lab.direct)  # each once, in order
    assert reader.error is None and pending(lab.direct) == []


@pytest.mark.parametrize("lost", ["drop_request", "drop_reply"])
def test_a_lost_acknowledgement_is_sent_again(lab, short_blocks, lost: str) -> None:
    says = Model("one ")
    producer = start(lab.direct, says, FAST)
    read, got = reading(lab.client), []
    wait_for(lambda: text_in(lab.direct) == "one ")
    got += next(read)
    says.say("two ")
    wait_for(lambda: text_in(lab.direct) == "one two ")
    getattr(lab.proxy, lost)(when=b"XACK")
    got += next(read)
    lab.proxy.wait_dropped()
    says.end()
    wait_for(producer.done.is_set)
    got += [entry for batch in read for entry in batch]
    assert got == stream_of(lab.direct)  # nothing that was finished has come again
    assert pending(lab.direct) == []


@pytest.mark.slow
def test_a_lost_reply_while_the_group_is_made_leaves_no_key_for_ever(lab, short_blocks) -> None:
    register(lab.direct, new_record("a", "?", None, "x", "x") | {"pooled": True}, FAST)
    lab.proxy.drop_reply(when=b"CREATE")
    reader = Reader(lab.client, timing=QUICK)
    lab.proxy.wait_dropped()
    reader.fail()
    assert lab.direct.pttl(chunks(lab.direct)) > 0


@pytest.mark.slow
def test_a_reader_through_one_cut_after_the_other_gets_every_entry_once(lab, short_blocks) -> None:
    says = Model()
    producer = start(lab.direct, says, FAST)
    reader = Reader(lab.client)
    for n in range(40):
        if n % 8 == 3:
            lab.proxy.drop_reply(when=b"XREADGROUP")
        if n % 8 == 7:
            lab.proxy.drop_reply(when=b"XACK")
        if n % 10 == 5:
            lab.proxy.cut()
        says.say(f"{n} ")
        wait_for(lambda: text_in(lab.direct).endswith(f"{n} ") and (n % 3 or reader.text.endswith(f"{n} ")))
    says.end()
    wait_for(producer.done.is_set)
    assert reader.end().error is None
    assert reader.entries == stream_of(lab.direct) and pending(lab.direct) == []


def test_a_redis_that_stays_away_is_told(lab) -> None:
    dead(lab.direct, "half")
    reader = Reader(lab.client, timing=replace(QUICK, give_up=0.3, patience=60))
    wait_for(lambda: reader.text == "half")
    lab.proxy.refuse()
    lab.proxy.cut()
    assert isinstance(reader.fail(), RedisUnusable)


def test_a_timeout_holds_also_while_redis_is_away(lab) -> None:
    dead(lab.direct, "half")
    reader = Reader(lab.client, timing=replace(QUICK, give_up=60, patience=60), timeout=0.5)
    wait_for(lambda: reader.text == "half")
    lab.proxy.refuse()
    lab.proxy.cut()
    assert isinstance(reader.fail(), StillWaiting)


def test_a_redis_that_is_restarted_loses_and_repeats_nothing(program, short_blocks) -> None:
    with servers.RedisServer(program, appendfsync="always") as server:
        client = connect(server.url, prefix="t")
        says = Model("one ")
        producer = start(client, says, FAST)
        reader, held = Reader(client, "steady"), reading(client, group="busy")
        first = next(held)
        wait_for(lambda: reader.text == "one ")
        server.kill()
        says.say("two ")
        server.start()
        says.say("three")
        says.end()
        wait_for(producer.done.is_set)
        rest = [entry for batch in held for entry in batch]  # busy with a batch meanwhile, acknowledged afterwards
        assert first + rest == stream_of(client) == reader.end().entries
        assert text_in(client) == "one two three" and reader.error is None
        assert pending(client, "steady") == [] == pending(client, "busy")
        client.close()


def test_what_a_reader_takes_is_json_where_it_is_not_text(client, short_blocks) -> None:
    ask("?", source=lambda question, topic: iter(["so"]), id="a", client=client).wait(60)
    first, *_, last = [entry for batch in reading(client) for entry in batch]
    assert first.data["source"] and json.loads(last.text)["reason"] == "stop"


def test_an_answer_that_is_written_while_its_group_is_made_is_read_whole(client, monkeypatch) -> None:
    record = new_record("a", "why?", None, "test", "test")
    register(client, record, FAST)
    pipeline, looks = type(client.pipeline()), []
    type_of = pipeline.type

    def slow(self, key):
        found = type_of(self, key)
        if not looks:
            produce.Producer(client, record, ["because"], FAST).run()
        looks.append(found)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "type", slow)
        batches = list(read_answer_group("a", "g", "c", client=client, timing=FAST))
    assert [entry.kind for batch in batches for entry in batch] == ["start", "text", "end"]
    assert looks == ["none", "stream"]
