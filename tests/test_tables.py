"""The tables: the same frame on every backend, whatever lies in Redis."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pandas as pd
import pytest
import redis

from llmstream_nb import Answer, ask, tables
from llmstream_nb.answers.connection import RedisUnusable
from llmstream_nb.protocol.wire import POOL, AnswerNotFound, BadAnswerId, LLMStreamError, NotAnAnswer
from llmstream_nb.tables import TIME

from .conftest import FAST

START = {"model": "m", "source": "s", "at": 1700000000.5}  # 2023-11-14 22:13:20.5 UTC
ENTRIES = {
    "id": "str",
    "attempt": "uint64",
    "seq": "uint64",
    "time": TIME,
    "ms": "Int64",
    "kind": "str",
    "text": "str",
    "gap": "Int64",
}


@pytest.fixture(autouse=True)
def cleared(client):
    yield
    for name in client.scan_iter(match=f"{client.names.prefix}:*"):
        client.delete(name)


@pytest.fixture
def key(client):
    """The key of a stream of this test's own."""
    name = f"{client.names.prefix}:own"
    yield name
    client.delete(name)


def write(client, answer_id, *entries, record=None, lease=None):
    """Put an answer into Redis as a producer would: entries are (id, kind, text or JSON, ms)."""
    keys = client.names.answer(answer_id)
    for entry_id, kind, text, ms in entries:
        fields = {"kind": kind, "text": text if isinstance(text, str) else json.dumps(text), "ms": ms}
        client.xadd(keys.chunks, fields, id=entry_id)
    if record is not None:
        client.set(keys.question, json.dumps(record))
    if lease:
        client.set(keys.lease(lease), "x", px=60_000)
    client.zadd(client.names.answers, {answer_id: client.zcard(client.names.answers)})
    return keys


def two_attempts(client, answer_id="a"):
    return write(
        client,
        answer_id,
        ("1-0", "start", START, 0),
        ("1-1", "text", "lost", 40),
        ("2-0", "start", START | {"at": 1700000010}, 0),
        ("2-1", "text", "Hi ", 100),
        ("2-2", "text", "there", 250),
        ("2-3", "end", {"reason": "stop", "chunks": 2, "first_token_ms": 100, "total_ms": 300}, 300),
        record={"id": answer_id, "question": "?", "source": "s", "model": "m", "asked": 1700000000.25},
    )


def types_of(frame):
    return {name: str(kind) for name, kind in frame.dtypes.items()}


def values(frame):
    """The rows as plain Python: None for what is missing."""
    return [[None if pd.isna(v) else v for v in row] for row in frame.itertuples(index=False)]


# ------------------------------------------------------------------------------------------------ entries


def test_entries_of_an_answer(client):
    two_attempts(client)
    frame = tables.entries("a")
    assert types_of(frame) == ENTRIES
    assert list(frame.index) == [0, 1, 2, 3, 4, 5]
    assert frame["id"].tolist() == ["1-0", "1-1", "2-0", "2-1", "2-2", "2-3"]
    assert frame["attempt"].tolist() == [1, 1, 2, 2, 2, 2]
    assert frame["seq"].tolist() == [0, 1, 0, 1, 2, 3]
    assert frame["kind"].tolist() == ["start", "text", "start", "text", "text", "end"]
    assert frame["text"].tolist()[1:2] + frame["text"].tolist()[3:5] == ["lost", "Hi ", "there"]
    assert frame["ms"].tolist() == [0, 40, 0, 100, 250, 300]
    assert values(frame[["gap"]]) == [[None], [40], [None], [100], [150], [50]]
    times = ["20.500", "20.540", "30.000", "30.100", "30.250", "30.300"]
    assert frame["time"].tolist() == [pd.Timestamp(f"2023-11-14 22:13:{t}Z") for t in times]


def test_entries_take_an_answer_and_its_own_client(client):
    two_attempts(client)
    answer = Answer("a", client=client)
    pd.testing.assert_frame_equal(tables.entries(answer), tables.entries("a", client=client))


def test_entries_of_a_real_answer(client):
    answer = ask("What is a stream?", source=lambda *_: ["one ", "two"], id="real", timing=FAST).wait(60)
    frame = tables.entries(answer)
    assert frame["kind"].tolist() == ["start", "text", "text", "end"]
    assert "".join(frame.loc[frame["kind"] == "text", "text"]) == "one two" == answer.text
    assert frame["time"].is_monotonic_increasing
    assert abs(frame["time"].iloc[0] - pd.Timestamp.now("UTC")) < pd.Timedelta("1 min")


def test_a_queued_answer_has_an_empty_frame(client):
    write(client, "queued", record={"id": "queued"})
    frame = tables.entries("queued")
    assert len(frame) == 0
    assert types_of(frame) == ENTRIES


def test_what_is_unknown_is_empty(client):
    """A trimmed start, a start without a clock, odd numbers: no time, and no error."""
    write(
        client,
        "a",
        ("1-1", "text", "x", 5),
        ("1-2", "text", "y", 10**17),
        ("2-0", "start", "no JSON", 0),
        ("3-0", "start", {"at": "noon"}, 0),
        ("4-0", "start", {"at": 1e300}, 0),
        ("5-0", "end", {"reason": "stop"}, 0),
        (f"{2**64 - 1}-{2**64 - 1}", "text", "z", -4),
    )
    frame = tables.entries("a")
    assert types_of(frame) == ENTRIES
    assert frame["time"].isna().all()
    assert values(frame[["ms"]]) == [[5], [None], [0], [0], [0], [0], [-4]]
    assert frame["seq"].tolist()[-1] == 2**64 - 1


# ------------------------------------------------------------------------------------------------ answers


def test_answers(client):
    two_attempts(client, "ended")
    write(client, "queued", record={"question": "q", "asked": 1700000001, "pooled": True})
    write(
        client,
        "streaming",
        ("1-0", "start", START, 0),
        ("1-1", "text", "abc", 30),
        ("1-2", "text", "def", 60),
        record={"question": "q", "asked": 1700000002},
        lease=1,
    )
    write(client, "interrupted", ("1-0", "start", START, 0), record={"question": "q", "asked": 1700000003})
    write(
        client,
        "failed",
        ("1-0", "start", START, 0),
        ("1-1", "error", {"error": "RateLimited", "message": "wait", "chunks": 0, "total_ms": 9}, 9),
        record={"question": "q", "asked": 1700000004},
    )
    write(
        client,
        "stopped",
        ("1-0", "start", START, 0),
        ("1-1", "text", "ab", 7),
        ("2-0", "end", {"reason": "cancelled", "closes": "1-1"}, 0),
        record={"question": "q", "asked": 1700000005},
    )
    expired = {
        "question": "q",
        "asked": 1700000006,
        "reason": "length",
        "text": "whole",
        "end": "1-3",
        "chunks": 2,
    }
    write(client, "expired", record=expired)
    client.zadd(client.names.answers, {"gone": 9})

    frame = tables.answers()
    assert types_of(frame) == {
        "id": "str",
        "status": "str",
        "question": "str",
        "source": "str",
        "model": "str",
        "asked": TIME,
        "chunks": "Int64",
        "characters": "Int64",
        "first_token_ms": "Int64",
        "total_ms": "Int64",
        "reason": "str",
    }
    assert values(frame[["id", "status", "chunks", "characters", "first_token_ms", "total_ms", "reason"]]) == [
        ["ended", "ended", 2, 8, 100, 300, "stop"],
        ["queued", "queued", 0, 0, None, None, None],
        ["streaming", "streaming", 2, 6, 30, None, None],
        ["interrupted", "interrupted", 0, 0, None, None, None],
        ["failed", "failed", 0, 0, None, 9, "RateLimited"],
        ["stopped", "ended", 1, 2, 7, None, "cancelled"],
        ["expired", "ended", 2, 5, None, None, "length"],
    ]
    assert values(frame.loc[:1, ["question", "source", "model", "asked"]]) == [
        ["?", "s", "m", pd.Timestamp("2023-11-14 22:13:20.250Z")],
        ["q", None, None, pd.Timestamp("2023-11-14 22:13:21Z")],
    ]


def test_no_answers(client):
    frame = tables.answers()
    assert (len(frame), len(frame.columns)) == (0, 11)
    assert str(frame["asked"].dtype) == TIME


def test_one_odd_answer_does_not_hide_the_others(client):
    two_attempts(client, "good")
    client.zadd(client.names.answers, {"foreign": 0, "string": 0, "list": 0, "a b": 0, "closes": 0})
    keys = {name: client.names.answer(name) for name in ("foreign", "string", "list", "closes")}
    client.xadd(keys["foreign"].chunks, {"other": "fields"})
    client.set(keys["string"].chunks, "text")
    client.rpush(keys["list"].question, "x")
    write(client, "closes", ("1-0", "end", {"closes": "nonsense"}, 0))
    frame = tables.answers()
    assert dict(zip(frame["id"], frame["status"], strict=True)) == {
        "a b": "unreadable", "foreign": "unreadable", "list": "unreadable", "string": "unreadable",
        "closes": "unreadable", "good": "ended",
    }  # fmt: skip
    client.zrem(client.names.answers, "a b")


def test_a_record_that_holds_odd_values(client):
    odd = {
        "question": {"a": 1},
        "model": [1],
        "asked": "noon",
        "chunks": "x",
        "total_ms": 1.6,
        "source": None,
    }
    write(client, "a", ("1-0", "end", {"reason": "stop"}, 0), record=odd)
    row = tables.answers().iloc[0]
    assert (row["question"], row["model"], row["total_ms"]) == ("{'a': 1}", "[1]", 2)
    assert row[["asked", "chunks", "source"]].isna().all()


# ------------------------------------------------------------------------------------------ record and keys


def test_record(client):
    two_attempts(client)
    frame = tables.record("a")
    assert types_of(frame) == {"field": "str", "value": "str"}
    assert dict(values(frame)) == {
        "id": "a",
        "question": "?",
        "source": "s",
        "model": "m",
        "asked": "1700000000.25",
    }


def test_an_answer_without_a_record(client):
    write(client, "a", ("1-0", "start", START, 0))
    frame = tables.record("a")
    assert len(frame) == 0
    assert types_of(frame) == {"field": "str", "value": "str"}


def test_keys(client):
    names = two_attempts(client)
    client.set(names.lease(2), "nonce", px=50_000)
    client.pexpire(names.chunks, 90_000)
    frame = tables.keys("a")
    assert types_of(frame) == {"key": "str", "type": "str", "length": "Int64", "ttl": "Float64"}
    assert values(frame[["key", "type", "length"]]) == [
        [names.chunks, "stream", 6],
        [names.question, "string", client.strlen(names.question)],
        [names.lease(2), "string", 5],
    ]
    assert 80 < frame["ttl"][0] <= 90
    assert frame["ttl"].isna().tolist() == [False, True, False]


def test_keys_show_what_does_not_belong_there(client):
    names = client.names.answer("a")
    client.rpush(names.chunks, "x")
    assert values(tables.keys("a")) == [[names.chunks, "list", 1, None]]
    client.delete(names.chunks)


def test_keyspace(client, backend):
    names, other = two_attempts(client), client.names.answer("b")
    client.set(names.lease(2), "nonce", px=50_000)
    client.set(other.question, "text", px=90_000)
    client.zadd(client.names.answers, {"b": 9, "gone": 10, "no answer's id": 11})
    for name in ("g", "h"):
        client.xgroup_create(names.chunks, name, "0")
        client.xreadgroup(name, "c", {names.chunks: ">"}, count=2)
    client.xadd(client.names.questions, {"answer": "a"})
    client.xgroup_create(client.names.questions, POOL, "0")
    for name in ("w1", "w2"):
        client.xgroup_createconsumer(client.names.questions, POOL, name)
    client.set(sign := client.names.worker("w1"), "5000", px=95_000)
    client.lpush(client.names.failures, "one", "two")
    client.set(f"{client.names.prefix}:foreign", "nobody's")
    frame = tables.keyspace()
    counts = dict.fromkeys(("bytes", "groups", "pending"), "Int64")
    wanted = {"key": "str", "type": "str", "length": "Int64", "ttl": "Float64"} | counts
    assert types_of(frame) == wanted
    assert list(frame) == ["key", "type", "length", "bytes", "ttl", "groups", "pending"]
    assert values(frame.drop(columns=["bytes", "ttl"])) == [
        [client.names.answers, "zset", 4, None, None],
        [client.names.questions, "stream", 1, 1, 0],
        [client.names.failures, "list", 2, None, None],
        [sign, "string", 4, None, None],
        [names.chunks, "stream", 6, 2, 4],
        [names.question, "string", client.strlen(names.question), None, None],
        [names.lease(2), "string", 5, None, None],
        [other.question, "string", 4, None, None],
    ]
    ttl = dict(zip(frame["key"], frame["ttl"], strict=True))
    assert 80 < ttl.pop(other.question) <= 90 < ttl.pop(sign) and 40 < ttl.pop(names.lease(2)) <= 50
    assert all(pd.isna(left) for left in ttl.values())
    told = values(frame[["bytes"]])
    if backend.startswith("fake"):
        assert told == [[None]] * 8
    else:
        assert told == [[client.memory_usage(key, samples=0)] for key in frame["key"]] and min(told)[0] > 0


def test_an_empty_keyspace(client):
    assert len(tables.keyspace()) == 0


def test_the_keyspace_shows_what_does_not_belong_there(client):
    client.set(client.names.answers, "text")
    client.hset(client.names.questions, "a", "b")
    assert values(tables.keyspace()[["type", "length"]]) == [["string", 4], ["hash", None]]


# ------------------------------------------------------------------------------------------------- streams


def test_any_stream(client, key):
    client.xadd(key, {"questionId": "q", "chunkOutput": "Hi"}, id="5-1")
    client.xadd(key, {"chunkOutput": "there", "id": "x", "time": "noon", "class": ""}, id="1700000000500-0")
    frame = tables.stream(key)
    assert types_of(frame) == {
        "id": "str", "time": TIME, "questionId": "str", "chunkOutput": "str",
        "id (field)": "str", "time (field)": "str", "class": "str",
    }  # fmt: skip
    assert values(frame) == [
        ["5-1", None, "q", "Hi", None, None, None],
        ["1700000000500-0", pd.Timestamp("2023-11-14 22:13:20.500Z"), None, "there", "x", "noon", ""],
    ]


def test_an_auto_id_tells_the_time(client, key):
    client.xadd(key, {"a": "b"})
    assert abs(tables.stream(key)["time"][0] - pd.Timestamp.now("UTC")) < pd.Timedelta("1 min")


def test_an_emptied_stream(client, key):
    client.xadd(key, {"a": "b"}, id="5-1")
    client.xdel(key, "5-1")
    frame = tables.stream(key)
    assert len(frame) == 0
    assert types_of(frame) == {"id": "str", "time": TIME}
    assert values(tables.info(key)) == [[key, 0, 0, None, None, "5-1"]]


def test_info(client, key):
    for n in range(1, 4):
        client.xadd(key, {"a": "b"}, id=f"{n}-0")
    client.xdel(key, "3-0")
    client.xgroup_create(key, "g", "0")
    frame = tables.info(key)
    assert types_of(frame) == {
        "key": "str", "length": "int64", "groups": "int64",
        "first_id": "str", "last_id": "str", "last_generated_id": "str",
    }  # fmt: skip
    assert values(frame) == [[key, 2, 1, "1-0", "2-0", "3-0"]]


def test_info_of_an_answer_by_handle_and_by_id(client):
    names = two_attempts(client)
    by_id = tables.info("a")
    assert values(by_id) == [[names.chunks, 6, 0, "1-0", "2-3", "2-3"]]
    pd.testing.assert_frame_equal(by_id, tables.info(Answer("a", client=client)))


def test_groups_consumers_and_pending(client, key):
    """Backends list consumers in different orders; here they come by name, pending entries by ID."""
    for n in (1, 2, 10, 11):
        client.xadd(key, {"a": "b"}, id=f"{n}-0")
    client.xgroup_create(key, "zeta", "0")
    client.xgroup_create(key, "alpha", "$")
    for consumer in ("walt", "ann", "walt"):
        client.xreadgroup("zeta", consumer, {key: ">"}, count=1)
    client.xgroup_createconsumer(key, "zeta", "idler")
    client.xclaim(key, "zeta", "ann", 0, ["2-0"])  # a second delivery

    frame = tables.groups(key)
    assert types_of(frame) == {
        "group": "str",
        "consumers": "int64",
        "pending": "int64",
        "last_delivered_id": "str",
        "lag": "int64",
    }
    assert values(frame) == [["alpha", 0, 0, "11-0", 0], ["zeta", 3, 3, "10-0", 1]]

    frame = tables.consumers(key, "zeta")
    assert types_of(frame) == {"consumer": "str", "pending": "int64", "idle": "int64"}
    assert values(frame[["consumer", "pending"]]) == [["ann", 1], ["idler", 0], ["walt", 2]]
    assert (frame["idle"] >= 0).all()

    frame = tables.pending(key, "zeta")
    assert types_of(frame) == {"id": "str", "consumer": "str", "idle": "int64", "delivered": "int64"}
    assert values(frame[["id", "consumer", "delivered"]]) == [
        ["1-0", "walt", 1],
        ["2-0", "ann", 2],
        ["10-0", "walt", 1],
    ]


@pytest.mark.parametrize("page", [2, 3, 1000])
def test_the_lag_is_counted_page_by_page(client, key, page, monkeypatch):
    """Also where the server's own is empty: after a deletion, and in a group that begins somewhere."""
    monkeypatch.setattr(tables, "PAGE", page)
    for n in range(1, 9):
        client.xadd(key, {"a": "b"}, id=f"{n}-0")
    for group, start in (("all", "0"), ("gap", "3"), ("half", "4-0"), ("last", "7-0"), ("none", "$"), ("past", "99-5")):
        client.xgroup_create(key, group, start)
    client.xreadgroup("all", "c", {key: ">"}, count=2)
    client.xdel(key, "1-0", "3-0", "7-0")
    frame = tables.groups(key)[["group", "last_delivered_id", "lag"]]
    assert values(frame) == [
        ["all", "2-0", 4], ["gap", "3-0", 4], ["half", "4-0", 3], ["last", "7-0", 1], ["none", "8-0", 0], ["past", "99-5", 0],
    ]  # fmt: skip
    client.xtrim(key, maxlen=0)
    assert tables.groups(key)["lag"].tolist() == [0] * 6


def test_a_group_at_the_largest_id(client, key):
    """No ID can come after it, so no range may begin behind it."""
    last = f"{2**64 - 1}-{2**64 - 1}"
    client.xadd(key, {"a": "b"}, id=last)
    client.xgroup_create(key, "g", "0")
    client.xreadgroup("g", "c", {key: ">"})
    assert values(tables.groups(key)) == [["g", 1, 1, last, 0]]
    assert values(tables.pending(key, "g")[["id", "consumer", "delivered"]]) == [[last, "c", 1]]


@pytest.mark.parametrize("page", [2, 3, 1000])
def test_pending_entries_come_page_by_page(client, key, page, monkeypatch):
    monkeypatch.setattr(tables, "PAGE", page)
    for n in range(1, 13):
        client.xadd(key, {"a": "b"}, id=f"{n}-0")
    client.xgroup_create(key, "g", "0")
    for n in range(12):
        client.xreadgroup("g", f"c{n % 3}", {key: ">"}, count=1)
    client.xack(key, "g", "1-0", "4-0")
    client.xdel(key, "5-0")  # still pending
    expected = [[f"{n}-0", f"c{(n - 1) % 3}", 1] for n in (2, 3, *range(5, 13))]
    assert values(tables.pending(key, "g")[["id", "consumer", "delivered"]]) == expected


def test_no_groups_consumers_or_pending(client, key):
    client.xadd(key, {"a": "b"})
    assert types_of(tables.groups(key))["lag"] == types_of(tables.groups(key))["pending"] == "int64"
    client.xgroup_create(key, "g", "0")
    for frame in (tables.consumers(key, "g"), tables.pending(key, "g")):
        assert len(frame) == 0
        assert types_of(frame)["idle"] == "int64"


# ---------------------------------------------------------------------------------------------------- pool

QUEUE = {
    "answer": "str",
    "question": "str",
    "state": "str",
    "worker": "str",
    "idle": "Int64",
    "delivered": "Int64",
    "entry": "str",
}
FAILURES = {
    "time": TIME,
    "answer": "str",
    "question": "str",
    "error": "str",
    "message": "str",
    "delivered": "Int64",
    "worker": "str",
    "entry": "str",
}


def enqueued(client, *fields):
    """Put these into the queue as 1-0, 2-0, …; an answer id stands for an entry of the kit's, with a record."""
    for number, of in enumerate(fields, 1):
        if isinstance(of, str):
            client.set(client.names.answer(of).question, json.dumps({"id": of, "question": f"{of}?", "pooled": True}))
        client.xadd(client.names.questions, {"answer": of} if isinstance(of, str) else of, id=f"{number}-0")


@pytest.mark.parametrize("page", [2, 1000])
def test_queue(client, page, monkeypatch):
    monkeypatch.setattr(tables, "PAGE", page)
    key = client.names.questions
    enqueued(client, "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k")
    client.xgroup_create(key, POOL, "0")
    for worker in ("w1", "w2", "w1", "w3", "w2"):
        client.xreadgroup(POOL, worker, {key: ">"}, count=1)
    client.xclaim(key, POOL, "w2", 0, ["1-0"])
    client.xclaim(key, POOL, "w2", 0, ["2-0"], justid=True)  # a holder's sign of life
    client.xack(key, POOL, "3-0")
    client.xdel(key, "3-0")  # answered
    client.xack(key, POOL, "4-0")
    client.xgroup_create(key, "another group", "0")
    client.xreadgroup("another group", "reader", {key: ">"})
    frame = tables.queue()
    assert types_of(frame) == QUEUE
    idle = frame.pop("idle")
    assert values(frame) == [
        ["a", "a?", "taken", "w2", 2, "1-0"],
        ["b", "b?", "taken", "w2", 1, "2-0"],
        ["d", "d?", "done", None, None, "4-0"],
        ["e", "e?", "taken", "w2", 1, "5-0"],
        *([name, f"{name}?", "waiting", None, 0, f"{n}-0"] for n, name in enumerate("fghijk", 6)),
    ]
    assert idle.isna().tolist() == [False, False, True, False, *[True] * 6]
    assert (idle.dropna() >= 0).all()


def test_a_queue_that_is_not_there_or_nobody_works_on(client):
    for name in (client.names.questions, client.names.failures):
        assert not client.exists(name)
    for frame, types in ((tables.queue(), QUEUE), (tables.failures(), FAILURES)):
        assert len(frame) == 0
        assert types_of(frame) == types
    enqueued(client, "a")
    waiting = [["a", "a?", "waiting", None, None, 0, "1-0"]]
    assert values(tables.queue()) == waiting  # and no group yet
    client.xgroup_create(client.names.questions, POOL, "0")
    assert values(tables.queue()) == waiting
    client.xdel(client.names.questions, "1-0")
    pd.testing.assert_frame_equal(tables.queue(), tables.queue(client=client))
    assert types_of(tables.queue()) == QUEUE


def test_a_queue_of_odd_entries(client):
    """No question, no such answer, no answer's id, bytes; and what is still pending, but was deleted."""
    key = client.names.questions
    enqueued(client, {"other": "field"}, {"answer": ""}, {"answer": "gone"}, {"answer": "a b"}, {"answer": b"caf\xe9"})
    records = {"set": None, "number": "7", "odd": '{"question": ["x"]}', "deep": "[" * 100_000, "half": '"\\ud800"'}
    for number, (answer_id, text) in enumerate(records.items(), 6):
        name = client.names.answer(answer_id).question
        client.set(name, text) if text else client.sadd(name, "x")
        client.xadd(key, {"answer": answer_id}, id=f"{number}-0")
    client.xadd(key, {"answer": "deleted"}, id="11-0")
    client.xgroup_create(key, POOL, "10-0")
    client.xreadgroup(POOL, b"w\xff", {key: ">"})
    client.xdel(key, "11-0")
    frame = tables.queue()
    assert types_of(frame) == QUEUE
    assert frame["answer"].tolist()[2:10] == ["gone", "a b", "caf\\xe9", *records]
    assert frame["answer"].isna().tolist() == [True, True, *[False] * 8, True]
    assert frame["question"].isna().all()
    assert values(frame[["worker", "delivered", "entry"]])[-1] == ["w\\xff", 1, "11-0"]
    client.delete(key)


def test_failures(client):
    given_up = {"at": 1700000000.5, "entry": "1-0", "answer": "a", "question": "?", "worker": "w1", "delivered": 3}
    told = [
        given_up | {"error": "Restarts", "message": "tried in vain"},
        given_up | {"error": "NoQuestion", "message": "no answer's id", "entry": "2-0", "answer": "", "question": ""},
        given_up | {"error": "Restarts", "message": "once more", "worker": "w2", "delivered": 4},
        given_up | {"error": "NoModel", "message": "no key", "entry": ""},
        given_up | {"error": "NoModel", "message": "no key", "entry": ""},
    ]
    for row in told:
        client.lpush(client.names.failures, json.dumps(row))
    frame = tables.failures()
    assert types_of(frame) == FAILURES
    at = pd.Timestamp("2023-11-14 22:13:20.500Z")
    assert values(frame) == [
        [at, "a", "?", "NoModel", "no key", 3, "w1", None],
        [at, "a", "?", "NoModel", "no key", 3, "w1", None],
        [at, "a", "?", "Restarts", "once more", 4, "w2", "1-0"],
        [at, None, None, "NoQuestion", "no answer's id", 3, "w1", "2-0"],
    ]


def test_odd_failures(client):
    """Whatever another program has put into the list is a row, with what can be known of it."""
    odd = [
        "no JSON", "null", '"text"', "[1]", "7", "[" * 100_000, b"caf\xe9", "1" * 5000,
        "{}", '{"answer": "a"}', '{"message": "half \\ud83d of it", "entry": ["x"], "answer": {"a": 1}, "worker": 7}',
        '{"message": "m", "at": "noon", "delivered": "3"}', '{"message": "m", "at": NaN, "delivered": Infinity}',
        '{"message": "m", "at": 1e300, "delivered": 1.0, "question": null, "error": true}',
    ]  # fmt: skip
    for row in odd:
        client.rpush(client.names.failures, row)
    frame = tables.failures()
    assert types_of(frame) == FAILURES
    assert frame["message"].tolist()[:11] == [*odd[:6], "caf\\xe9", *odd[7:10], "half \ufffd of it"]
    assert frame["message"].tolist()[11:] == ["m", "m", "m"]
    assert frame["answer"].dropna().tolist() == ["a"]
    assert frame["delivered"].dropna().tolist() == [1]
    assert frame[["time", "question", "error", "worker", "entry"]].isna().all(axis=None)
    json.dumps(frame._repr_html_()).encode()


def test_text_that_no_page_can_show(client):
    """JSON may spell half of a surrogate pair."""
    keys = two_attempts(client)
    client.set(keys.question, '{"question": "a \\ud800 b", "\\udc00": "\\udc00"}')
    assert tables.answers()["question"].tolist() == ["a \ufffd b"]
    assert values(tables.record("a")) == [["question", "a \ufffd b"], ["\ufffd", "\ufffd"]]


# -------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("table", [tables.entries, tables.record, tables.keys])
def test_no_such_answer(client, table):
    with pytest.raises(AnswerNotFound, match=r"there is no .*\{nobody\}.*: never asked, cleared, or expired"):
        table("nobody")
    for odd in ("a b", "", None, 7, ...):
        with pytest.raises(BadAnswerId):
            table(odd)


@pytest.mark.parametrize(
    "table",
    [
        tables.stream,
        tables.info,
        tables.groups,
        lambda key: tables.consumers(key, "g"),
        lambda key: tables.pending(key, "g"),
    ],
)
def test_no_such_stream(client, key, table):
    for odd in (key, client.names.questions, "nobody", "a b", "", None, 7, ...):
        with pytest.raises(AnswerNotFound, match=r"there is no stream .*: XADD makes one"):
            table(odd)
    client.set(key, "text")
    with pytest.raises(NotAnAnswer, match="holds a string, not a stream"):
        table(key)


@pytest.mark.parametrize("table", [tables.consumers, tables.pending])
def test_no_such_group(client, key, table):
    client.xadd(key, {"a": "b"})
    client.xgroup_create(key, "b", "0")
    client.xgroup_create(key, "a", "0")
    for odd in ("g", "", None, 7):
        with pytest.raises(LLMStreamError, match=r"no group .*, it has \['a', 'b'\]: xgroup_create makes one"):
            table(key, odd)


def test_a_key_of_the_wrong_type(client):
    names = client.names.answer("a")
    client.set(names.chunks, "text")
    for table in (tables.entries, tables.record):
        with pytest.raises(NotAnAnswer, match="holds a string, not a stream"):
            table("a")
    client.delete(names.chunks)
    client.xadd(names.chunks, {"other": "fields"})
    with pytest.raises(NotAnAnswer, match="needs the fields kind, text and ms"):
        tables.entries("a")
    client.delete(names.chunks)
    client.set(client.names.answers, "text")
    with pytest.raises(NotAnAnswer, match="holds a string, not a zset"):
        tables.answers()
    client.delete(client.names.answers)
    client.set(client.names.questions, "text")
    with pytest.raises(NotAnAnswer, match="holds a string, not a stream"):
        tables.queue()
    client.set(client.names.failures, "text")
    with pytest.raises(NotAnAnswer, match="holds a string, not a list"):
        tables.failures()


def test_redis_is_away():
    lost = redis.Redis(port=1, decode_responses=True, retry=None, socket_timeout=0.2)
    for table in (tables.entries, tables.record, tables.keys, tables.info, tables.stream):
        with pytest.raises(RedisUnusable, match="can't be reached"):
            table("a", client=lost)
    for table in (tables.answers, tables.queue, tables.failures, tables.keyspace):
        with pytest.raises(RedisUnusable, match="can't be reached"):
            table(client=lost)


# --------------------------------------------------------------------------------------------------- display


class Tags(HTMLParser):
    """The elements and attributes of a document, and its text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg/onload=alert(1)>',
    "</td></table><h1>out",
    "&lt;b&gt;",
    "nul \x00 bell \x07 escape \x1b[31m return \r end",
    "$\\href{javascript:alert(1)}{x}$",
    "\u202eleft \ufeff \U0001f600",
    "x" * 5000,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_breaks_out_of_the_html(client, key, text):
    write(
        client,
        "a",
        ("1-0", "start", START, 0),
        ("1-1", "text", text, 1),
        record={"question": text, text[:60]: text},
    )
    client.xadd(key, {text: text})
    client.xgroup_create(key, text, "0")
    client.xreadgroup(text, text, {key: ">"})
    client.xadd(client.names.questions, {"answer": "a"})
    client.xadd(client.names.questions, {"answer": text})
    client.xgroup_create(client.names.questions, POOL, "0")
    client.xreadgroup(POOL, text, {client.names.questions: ">"}, count=1)
    client.rpush(client.names.failures, json.dumps({"question": text, "message": text, "worker": text}), text)
    frames = [
        tables.entries("a"),
        tables.answers(),
        tables.record("a"),
        tables.stream(key),
        tables.groups(key),
        tables.consumers(key, text),
        tables.pending(key, text),
        tables.queue(),
        tables.failures(),
    ]
    assert frames[7]["worker"][0] == frames[7]["question"][0] == frames[7]["answer"][1] == text
    assert frames[8]["message"].tolist() == [text, text]
    assert frames[0]["text"][1] == text == frames[3][text][0] == frames[4]["group"][0]
    for frame in frames:
        html = frame._repr_html_()
        seen = Tags(html)
        assert seen.tags <= {"div", "style", "table", "thead", "tbody", "tr", "th", "td", "p"}
        assert seen.attributes <= {"border", "class", "style", "scoped"}
        assert "mathjax_ignore" in html  # else $…$ would be typeset
        assert len(html) < 10_000
        json.dumps(html)


def test_foreign_bytes(client, backend, key):
    """Bytes that are no UTF-8, as another program may have written them, are shown escaped."""
    names = client.names.answer("a")
    for name in (names.chunks, key):
        client.xadd(name, {"kind": "text", "text": b"caf\xe9", "ms": 1}, id="1-1")
    client.xgroup_create(key, b"g\xff", "0")
    client.xgroup_create(key, "g", "0")
    client.xreadgroup("g", b"c\xff", {key: ">"})
    assert values(tables.consumers(key, "g")[["consumer", "pending"]]) == [["c\\xff", 1]]
    assert tables.pending(key, "g")["consumer"].tolist() == ["c\\xff"]
    assert tables.entries("a")["text"][0] == tables.stream(key)["text"][0] == "caf\\xe9"
    assert tables.groups(key)["group"].tolist() == ["g", "g\\xff"]
