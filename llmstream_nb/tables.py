"""What lies in Redis, as pandas tables: the same columns, types and order on every backend."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import pandas as pd
import redis
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from llmstream_nb.answers.ask import Answer
from llmstream_nb.answers.connection import current, names_of, unusable
from llmstream_nb.answers.read import look_and_events
from llmstream_nb.protocol import wire
from llmstream_nb.protocol.events import Ended, Failed, Restarted
from llmstream_nb.protocol.parts import Part, Text

# pandas escapes HTML, but leaves $…$ to be typeset; a table is to show what the model wrote.
pd.set_option("display.html.use_mathjax", False)

TIME = "datetime64[ms, UTC]"
PAGE = 1000  # entries a command: a long list must not hold up the server, nor anyone else's reads
A_CLOCK = 10**12  # milliseconds; an ID that begins with less (September 2001) does not tell the time


# ------------------------------------------------------------------------------------------------- answers


def entries(answer: Answer | str, *, client: redis.Redis | None = None) -> pd.DataFrame:
    """The entries of an answer's stream (XRANGE), all attempts, oldest first.

    `ms` counts from the attempt's start; `time` is its start by the producer's clock, plus `ms`; `gap` is the
    milliseconds since the attempt's previous entry. What is unknown is empty.

    Raises AnswerNotFound, NotAnAnswer, BadAnswerId or RedisUnusable.
    """
    with _answer(answer, client) as (client, keys):
        _check_answer(client, keys)
        found = wire.parse_entries(client.xrange(keys.chunks))  # type: ignore[arg-type]
    rows, began = [], None
    for entry in found:
        if entry.id.seq == 0:
            began = _number((wire.parse_record(entry.text) or {}).get("at"), 1000)
        ms = _number(entry.ms)
        time = None if began is None or ms is None else began + ms
        rows.append([str(entry.id), *entry.id, time, ms, entry.kind, entry.text])
    ids = {"id": "str", "attempt": "uint64", "seq": "uint64"}
    frame = _frame(rows, **ids, time=TIME, ms="Int64", kind="str", text="str")
    frame["gap"] = frame.groupby("attempt")["ms"].diff()
    return frame


def answers(*, client: redis.Redis | None = None) -> pd.DataFrame:
    """All answers of this prefix, in the order in which they were asked, and what has become of them.

    `status` is that of `Answer.status`, or `unreadable` where the keys hold something else; `reason` is why
    the answer ended, or the name of the error. Raises RedisUnusable.
    """
    with _redis(client) as client:
        index = names_of(client).answers
        _there(client, index, "zset")
        ids: Any = client.zrange(index, 0, -1)
    return _frame(
        filter(None, (_summary(answer_id, client) for answer_id in ids)),
        id="str", status="str", question="str", source="str", model="str", asked=TIME, chunks="Int64",
        characters="Int64", first_token_ms="Int64", total_ms="Int64", reason="str",
    )  # fmt: skip


def _summary(answer_id: str, client: redis.Redis) -> dict[str, Any]:
    """A row of `answers`; empty for an answer that has expired."""
    try:
        _check_answer(client, names_of(client).answer(answer_id))
        now, events = look_and_events(answer_id, client)
    except wire.AnswerNotFound:
        return {}
    except (wire.NotAnAnswer, wire.BadAnswerId, wire.BadEntryID):
        return {"id": answer_id, "status": "unreadable"}
    data, parts = now.record, list[Any]()
    for event in events:
        if isinstance(event, Restarted):
            parts.clear()
        elif isinstance(event, Part) and events[0].id != now.top:  # else all is from the record, each in one piece
            parts.append(event)
        elif isinstance(event, (Ended, Failed)):
            data = data | event.data
    first = next((part.ms for part in parts if isinstance(part, Text)), None)
    data = {"chunks": len(parts), "first_token_ms": first} | data
    numbers = {name: _number(data.get(name)) for name in ("chunks", "first_token_ms", "total_ms")}
    numbers |= {"asked": _number(data.get("asked"), 1000), "characters": len(now.text)}
    reason = data.get("error") or data.get("reason")
    return data | numbers | {"id": answer_id, "status": now.status, "reason": reason}


def record(answer: Answer | str, *, client: redis.Redis | None = None) -> pd.DataFrame:
    """The JSON record of an answer (GET), a row for each field. Raises as `entries` does."""
    with _answer(answer, client) as (client, keys):
        _check_answer(client, keys)
        fields = wire.parse_record(client.get(keys.question)) or {}  # type: ignore[arg-type]
    return _frame(fields.items(), field="str", value="str")


def keys(answer: Answer | str, *, client: redis.Redis | None = None) -> pd.DataFrame:
    """The keys that an answer has, with type (TYPE), length, and the seconds until they expire (PTTL).

    `length` is in entries (XLEN) or bytes (STRLEN). Raises AnswerNotFound, BadAnswerId or RedisUnusable.
    """
    with _answer(answer, client) as (client, names):
        rows = [row for key in _possible_keys(client, names) if (row := _key(client, key))]
    if not rows:
        raise wire.AnswerNotFound(_no_answer(names))
    return _frame(rows, key="str", type="str", length="Int64", ttl="Float64")


def keyspace(*, client: redis.Redis | None = None) -> pd.DataFrame:
    """Every key of the kit under this prefix: the index of answers, the pool's, and the keys of each answer.

    The pool's are its queue, its failures, and for each worker a sign of life, which outlives it by a day.

    The columns are those of `keys`, where a list's length is LLEN and a sorted set's ZCARD; and `bytes`, what the
    key takes of the server's memory (MEMORY USAGE), empty where the server does not tell; for a stream `groups`
    and `pending`, how many of its entries are pending with any of them (XINFO GROUPS). Raises RedisUnusable.
    """
    rows = []
    with _redis(client) as client:
        names = names_of(client)
        found = [names.answers, names.questions, names.failures]
        # No queue, no group; the second is fakeredis' word for another type.
        with suppress(ResponseError, AttributeError):
            workers: Any = client.xinfo_consumers(names.questions, wire.POOL)
            found += [names.worker(worker["name"]) for worker in workers]
        ids: Any = client.zrange(names.answers, 0, -1) if client.type(names.answers) == "zset" else ()
        for answer_id in ids:
            with suppress(wire.BadAnswerId):  # somebody else's
                found += _possible_keys(client, names.answer(answer_id))
        for key, kind, length, ttl in filter(None, [_key(client, key) for key in found]):
            shared: Any = [None, None]
            if kind == "stream":
                groups: Any = client.xinfo_groups(key)
                shared = [len(groups), sum(group["pending"] for group in groups)]
            rows.append([key, kind, length, _memory(client, key), ttl, *shared])
    counts = dict.fromkeys(("groups", "pending"), "Int64")
    return _frame(rows, key="str", type="str", length="Int64", bytes="Int64", ttl="Float64", **counts)


def _key(client: redis.Redis, key: str) -> list[Any]:
    """A row of `keys`; empty where there is no such key."""
    kind: Any = client.type(key)
    left: Any = client.pttl(key)
    lengths = {"stream": client.xlen, "string": client.strlen, "zset": client.zcard, "list": client.llen}
    length = lengths.get(kind, lambda _: None)(key)
    return [] if kind == "none" else [key, kind, length, left / 1000 if left >= 0 else None]


def _memory(client: redis.Redis, key: str) -> int | None:
    with suppress(ResponseError):  # fakeredis does not know the command, and not every user may give it
        return client.memory_usage(key, samples=0)
    return None


def _possible_keys(client: redis.Redis, names: wire.AnswerKeys) -> list[str]:
    """Derived from the answer, since SCAN would walk over all keys of the database."""
    top: Any = client.xrevrange(names.chunks, count=1) if client.type(names.chunks) == "stream" else []
    newest = wire.EntryID.parse(top[0][0]).attempt if top else 0
    leases = [names.lease(attempt) for attempt in range(max(0, newest - 2), newest + 2)]
    return [names.chunks, names.question, names.cancel, *leases]


# ------------------------------------------------------------------------------------------------- streams


def stream(key: str, *, client: redis.Redis | None = None) -> pd.DataFrame:
    """The entries of any stream (XRANGE), oldest first, with a column for each field.

    `time` is that of the server's clock, which Redis puts into the IDs it chooses; empty for other IDs. A
    field called `id` or `time` stands under `id (field)` or `time (field)`. Raises as `info` does.
    """
    with _stream(key, client) as (client, key):
        found: Any = client.xrange(key)
    rows = []
    for raw_id, fields in found:
        ms = wire.EntryID.parse(raw_id).attempt  # in an ID that Redis chose
        row = {"id": raw_id, "time": ms if ms > A_CLOCK else None}
        rows.append(row | {f"{name} (field)" if name in row else name: fields[name] for name in fields})
    return _frame(rows, **{"id": "str", "time": TIME} | {name: "str" for row in rows for name in list(row)[2:]})


def info(of: Answer | str, *, client: redis.Redis | None = None) -> pd.DataFrame:
    """One row about a stream (XINFO STREAM): its length, its number of groups, its first and last entry.

    `of` is an answer, the key of a stream, or an answer's id; so in the tables below. All of them raise
    AnswerNotFound if there is no such stream, NotAnAnswer if the key holds something else, RedisUnusable.
    """
    with _stream(of, client) as (client, key):
        found: Any = client.xinfo_stream(key)
    ends = [(found[name] or [None])[0] for name in ("first-entry", "last-entry")]
    row = [key, found["length"], found["groups"], *ends, found["last-generated-id"]]
    types = {"first_id": "str", "last_id": "str", "last_generated_id": "str"}
    return _frame([row], key="str", length="int64", groups="int64", **types)


def groups(of: Answer | str, *, client: redis.Redis | None = None) -> pd.DataFrame:
    """The consumer groups of a stream (XINFO GROUPS), by name.

    `lag` is how many entries the group has not been given yet: those after its last-delivered ID, counted here
    (XRANGE), because XINFO's own lag is missing before Redis 7.0, and empty once an entry was deleted.
    """
    with _stream(of, client) as (client, key):
        found: Any = client.xinfo_groups(key)
        for g in found:
            g["lag"] = sum(1 for _ in _range(client, key, g["last-delivered-id"]))
    rows = sorted([g["name"], g["consumers"], g["pending"], g["last-delivered-id"], g["lag"]] for g in found)
    return _frame(rows, group="str", consumers="int64", pending="int64", last_delivered_id="str", lag="int64")


def consumers(of: Answer | str, group: str, *, client: redis.Redis | None = None) -> pd.DataFrame:
    """The consumers of a group (XINFO CONSUMERS), by name; `idle` in milliseconds.

    Raises LLMStreamError if there is no such group.
    """
    with _stream(of, client) as (client, key):
        _check_group(client, key, group)
        found: Any = client.xinfo_consumers(key, group)
    rows = sorted([c["name"], c["pending"], c["idle"]] for c in found)
    return _frame(rows, consumer="str", pending="int64", idle="int64")


def pending(of: Answer | str, group: str, *, client: redis.Redis | None = None) -> pd.DataFrame:
    """The entries that a group's consumers took and have not acknowledged (XPENDING), oldest first.

    `idle` is the milliseconds since an entry was last delivered, `delivered` how often it was. Raises
    LLMStreamError if there is no such group.
    """
    with _stream(of, client) as (client, key):
        _check_group(client, key, group)
        rows = _pending(client, key, group)
    return _frame(rows, id="str", consumer="str", idle="int64", delivered="int64")


# ---------------------------------------------------------------------------------------------------- pool


def queue(*, client: redis.Redis | None = None) -> pd.DataFrame:
    """The questions in the pool's queue (XRANGE, XPENDING), oldest first; no rows where there is no queue yet.

    `state` is `waiting`, or `taken` by `worker`, who last gave a sign of life `idle` milliseconds ago; `done` is
    what was acknowledged, but not deleted. `delivered` is how often the question was taken, `entry` its ID in the
    queue. What is unknown is empty, as in an entry that is no question. Raises NotAnAnswer or RedisUnusable.
    """
    rows = []
    with _redis(client) as client:
        key = names_of(client).questions
        there = _there(client, key, "stream")
        found = dict(_range(client, key) if there else ())
        # In this order: else what is taken meanwhile would be shown as done.
        groups: Any = client.xinfo_groups(key) if there else ()
        given = [wire.EntryID.parse(g["last-delivered-id"]) for g in groups if g["name"] == wire.POOL]
        taken = {row[0]: row[1:] for row in _pending(client, key, wire.POOL)} if given else {}
        for entry in sorted({*found, *taken}, key=wire.EntryID.parse):
            answer = _text(found.get(entry, {}).get("answer"))
            waits = wire.EntryID.parse(entry) > max(given, default=wire.ORIGIN)
            free = ["waiting", None, None, 0] if waits else ["done", None, None, None]
            state = ["taken", *taken[entry]] if entry in taken else free
            rows.append([answer, _question(client, answer), *state, entry])
    types = {"state": "str", "worker": "str", "idle": "Int64", "delivered": "Int64", "entry": "str"}
    return _frame(rows, answer="str", question="str", **types)


def failures(*, client: redis.Redis | None = None) -> pd.DataFrame:
    """The questions that the pool gave up (LRANGE), newest first, each entry of the queue once.

    `error` is a short name, `message` says more, `delivered` how often the question was taken, `worker` who gave
    it up. What is unknown is empty; of a row that the pool did not write, `message` shows the text. Raises
    NotAnAnswer or RedisUnusable.
    """
    texts = ("answer", "question", "error", "message", "worker", "entry")
    with _redis(client) as client:
        key = names_of(client).failures
        found: Any = client.lrange(key, 0, -1) if _there(client, key, "list") else ()
    rows: dict[Any, dict[str, Any]] = {}
    for number, text in enumerate(found):
        data = {"message": text} | (wire.parse_record(text) or {})
        row: dict[str, Any] = {name: _text(data.get(name)) for name in texts}
        row |= {"time": _number(data.get("at"), 1000), "delivered": _number(data.get("delivered"))}
        # An entry is given up again when its worker is killed after it wrote this, but before it acknowledged.
        rows.setdefault(row["entry"] or number, row)
    types = {"time": TIME} | dict.fromkeys(texts[:4], "str") | {"delivered": "Int64"}
    return _frame(rows.values(), **types, worker="str", entry="str")


def _question(client: redis.Redis, answer_id: Any) -> str | None:
    """The text of a question, from the answer's record; None where it can't be known."""
    with suppress(wire.BadAnswerId, ResponseError):  # no answer's id at all; another type under its key
        found: Any = client.get(names_of(client).answer(answer_id).question)
        return _text((wire.parse_record(found) or {}).get("question"))
    return None


# ------------------------------------------------------------------------------------------------- helpers


def _frame(rows: Iterable[Any], /, **columns: str) -> pd.DataFrame:
    """Rows under columns of these types; times are given in milliseconds."""
    frame = pd.DataFrame(list(rows), columns=pd.Index(columns, dtype="str"), dtype=object)
    for name, kind in columns.items():
        if kind == TIME:
            frame[name] = pd.to_datetime(pd.to_numeric(frame[name]), unit="ms", utc=True, errors="coerce")
    return frame.astype(columns)


def _after(last: str, read: Callable[[str], Any]) -> Iterator[Any]:
    """What lies after the ID `last`, page by page; `read` gives a page of rows that begin with their ID.

    Ranges here include their start, which is then left out: the largest ID of all can't be excluded by `(`.
    """
    while page := [row for row in read(last) if row[0] != last]:
        yield from page
        last = page[-1][0]


def _range(client: redis.Redis, key: str, after: str = "-") -> Iterator[Any]:
    """ID and fields of a stream's entries after that ID (XRANGE)."""
    return _after(after, lambda start: client.xrange(key, start, count=PAGE))


def _pending(client: redis.Redis, key: str, group: str) -> list[list[Any]]:
    """ID, consumer, idle time and number of deliveries of a group's pending entries (XPENDING), by ID."""
    fields = ("message_id", "consumer", "time_since_delivered", "times_delivered")

    def read(start: str) -> list[list[Any]]:
        found: Any = client.xpending_range(key, group, start, "+", PAGE)
        return [[taken[name] for name in fields] for taken in found]

    return list(_after("-", read))


def _number(value: Any, factor: int = 1) -> int | None:
    """What a clock or a counter gave, times `factor`; None for whatever else JSON may hold."""
    return round(value * factor) if isinstance(value, (int, float)) and abs(value) < 2**43 else None


def _text(value: Any) -> str | None:
    """A text that is not empty; None for whatever else JSON may hold."""
    return value if value and isinstance(value, str) else None


@contextmanager
def _answer(answer: Answer | str, client: redis.Redis | None) -> Iterator[tuple[redis.Redis, wire.AnswerKeys]]:
    """The client, and the keys of the answer that is meant; errors as of `_redis`."""
    if isinstance(answer, Answer):
        client, answer = client or answer.client, answer.id
    with _redis(client) as client:
        yield client, names_of(client).answer(answer)


def _check_answer(client: redis.Redis, keys: wire.AnswerKeys) -> None:
    there = [_there(client, keys.chunks, "stream"), _there(client, keys.question, "string")]
    if not any(there):
        raise wire.AnswerNotFound(_no_answer(keys))


def _no_answer(keys: wire.AnswerKeys) -> str:
    return f"there is no {keys.chunks!r}: never asked, cleared, or expired; tables.answers() lists what is there"


@contextmanager
def _stream(of: Answer | str, client: redis.Redis | None) -> Iterator[tuple[redis.Redis, str]]:
    """The client, and the key of the stream that is meant; errors as of `_redis`."""
    if isinstance(of, Answer):
        client, of = client or of.client, names_of(client or of.client).answer(of.id).chunks
    with _redis(client) as client:
        candidates = [of] if isinstance(of, str) else []
        with suppress(wire.BadAnswerId):
            candidates.append(names_of(client).answer(of).chunks)
        for key in candidates:
            # An ACL may limit this user to the prefix, and so to the last candidate.
            with nullcontext() if key == candidates[-1] else suppress(NoPermissionError):
                if _there(client, key, "stream"):
                    break
        else:
            raise wire.AnswerNotFound(f"there is no stream {of!r}: XADD makes one, answers() lists what is there")
        yield client, key


def _check_group(client: redis.Redis, key: str, group: str) -> None:
    found: Any = client.xinfo_groups(key)
    names = sorted(each["name"] for each in found)
    if group not in names:
        raise wire.LLMStreamError(f"{key!r} has no group {group!r}, it has {names}: xgroup_create makes one")


def _there(client: redis.Redis, key: str, wanted: str) -> bool:
    """Whether the key exists. Raises NotAnAnswer if it holds another type, on which backends don't agree."""
    kind = str(client.type(key))
    if kind not in (wanted, "none"):
        raise wire.NotAnAnswer(f"the key {key!r} holds a {kind}, not a {wanted}: use another, or delete it")
    return kind == wanted


@contextmanager
def _redis(client: redis.Redis | None) -> Iterator[redis.Redis]:
    """This client, or else the current one; an error of Redis becomes one that says what to do."""
    client = client or current()
    try:
        yield client
    except (RedisError, OSError) as error:
        raise unusable(error, client) from None
