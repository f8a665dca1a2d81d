"""What lies in Redis, as pandas tables: the same columns, types and order on every backend."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pandas as pd
from redis.exceptions import RedisError

from llmstream_nb.answer import Answer
from llmstream_nb.connection import current, names_of, unusable
from llmstream_nb.protocol import (
    AnswerKeys,
    AnswerNotFound,
    BadAnswerId,
    BadEntryID,
    Entry,
    EntryID,
    LLMStreamError,
    NotAnAnswer,
    parse_entries,
)
from llmstream_nb.read import look, parse_record

if TYPE_CHECKING:
    import redis

# pandas escapes HTML, but leaves $…$ to be typeset; a table is to show what the model wrote.
pd.set_option("display.html.use_mathjax", False)

TIME = "datetime64[ms, UTC]"
A_CLOCK = 10**12  # milliseconds; an ID that begins with less (September 2001) does not tell the time


# ------------------------------------------------------------------------------------------------- answers


def entries(answer: Answer | str, *, client: redis.Redis | None = None) -> pd.DataFrame:
    """The entries of an answer's stream (XRANGE), all attempts, oldest first.

    `ms` counts from the attempt's start; `time` is its start by the producer's clock, plus `ms`; `gap` is the
    milliseconds since the attempt's previous entry. What is unknown is empty.

    Raises AnswerNotFound, NotAnAnswer, BadAnswerId or RedisUnusable.
    """
    client, keys = _answer(answer, client)
    rows, began = [], None
    for entry in _entries(client, keys):
        if entry.id.seq == 0:
            began = _number((parse_record(entry.text) or {}).get("at"), 1000)
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
    client = client or current()
    index = names_of(client).answers
    with _redis(client):
        _there(client, index, "zset")
        ids: Any = client.zrange(index, 0, -1)
    return _frame(
        filter(None, (_summary(answer_id, client) for answer_id in ids)),
        id="str", status="str", question="str", source="str", model="str", asked=TIME, chunks="Int64",
        characters="Int64", first_token_ms="Int64", total_ms="Int64", reason="str",
    )  # fmt: skip


def _summary(answer_id: str, client: redis.Redis) -> list[Any]:
    """A row of `answers`; empty for an answer that has expired."""
    try:
        found = _entries(client, names_of(client).answer(answer_id))
        now = look(answer_id, client)
    except AnswerNotFound:
        return []
    except (NotAnAnswer, BadAnswerId, BadEntryID):
        return [answer_id, "unreadable", *[None] * 9]
    data = now.record | (found[-1].data if found and found[-1].final else {})
    # An attempt without a start only closes the answer from outside: the text is that of the one before.
    attempt = max((entry.id.attempt for entry in found if entry.kind == "start"), default=0)
    times = [entry.ms for entry in found if entry.kind == "text" and entry.id.attempt == attempt]
    data = {"chunks": len(times), "first_token_ms": times[0] if times else None} | data
    return [
        answer_id,
        now.status,
        *(data.get(name) for name in ("question", "source", "model")),
        _number(data.get("asked"), 1000),
        _number(data.get("chunks")),
        len(now.text),
        *(_number(data.get(name)) for name in ("first_token_ms", "total_ms")),
        data.get("error") or data.get("reason"),
    ]


def record(answer: Answer | str, *, client: redis.Redis | None = None) -> pd.DataFrame:
    """The JSON record of an answer (GET), a row for each field. Raises as `entries` does."""
    client, keys = _answer(answer, client)
    with _redis(client):
        _check_answer(client, keys)
        fields = parse_record(client.get(keys.question)) or {}  # type: ignore[arg-type]
    return _frame(fields.items(), field="str", value="str")


def keys(answer: Answer | str, *, client: redis.Redis | None = None) -> pd.DataFrame:
    """The keys that an answer has, with type (TYPE), length, and the seconds until they expire (PTTL).

    `length` is in entries (XLEN) or bytes (STRLEN). Raises AnswerNotFound, BadAnswerId or RedisUnusable.
    """
    client, names = _answer(answer, client)
    rows = []
    with _redis(client):
        for key in _possible_keys(client, names):
            kind: Any = client.type(key)
            left: Any = client.pttl(key)
            length = {"stream": client.xlen, "string": client.strlen}.get(kind, lambda _: None)(key)
            if kind != "none":
                rows.append([key, kind, length, left / 1000 if left >= 0 else None])
    if not rows:
        raise AnswerNotFound(_no_answer(names))
    return _frame(rows, key="str", type="str", length="Int64", ttl="Float64")


def _possible_keys(client: redis.Redis, names: AnswerKeys) -> list[str]:
    """Derived from the answer, since SCAN would walk over all keys of the database."""
    top: Any = client.xrevrange(names.chunks, count=1) if client.type(names.chunks) == "stream" else []
    newest = EntryID.parse(top[0][0]).attempt if top else 0
    leases = [names.lease(attempt) for attempt in range(max(1, newest - 2), newest + 2)]
    return [names.chunks, names.question, names.cancel, *leases]


# ------------------------------------------------------------------------------------------------- streams


def stream(key: str, *, client: redis.Redis | None = None) -> pd.DataFrame:
    """The entries of any stream (XRANGE), oldest first, with a column for each field.

    `time` is that of the server's clock, which Redis puts into the IDs it chooses; empty for other IDs. A
    field called `id` or `time` stands under `id (field)` or `time (field)`. Raises as `info` does.
    """
    key, client = _stream(key, client)
    with _redis(client):
        found: Any = client.xrange(key)
    rows = []
    for raw_id, fields in found:
        ms = EntryID.parse(raw_id).attempt  # in an ID that Redis chose
        row = {"id": raw_id, "time": ms if ms > A_CLOCK else None}
        rows.append(row | {f"{name} (field)" if name in row else name: fields[name] for name in fields})
    return _frame(rows, **{"id": "str", "time": TIME} | {name: "str" for row in rows for name in list(row)[2:]})


def info(of: Answer | str, *, client: redis.Redis | None = None) -> pd.DataFrame:
    """One row about a stream (XINFO STREAM): its length, its number of groups, its first and last entry.

    `of` is an answer, the key of a stream, or an answer's id; so in the tables below. All of them raise
    AnswerNotFound if there is no such stream, NotAnAnswer if the key holds something else, RedisUnusable.
    """
    key, client = _stream(of, client)
    with _redis(client):
        found: Any = client.xinfo_stream(key)
    ends = [(found[name] or [None])[0] for name in ("first-entry", "last-entry")]
    row = [key, found["length"], found["groups"], *ends, found["last-generated-id"]]
    types = {"first_id": "str", "last_id": "str", "last_generated_id": "str"}
    return _frame([row], key="str", length="int64", groups="int64", **types)


def groups(of: Answer | str, *, client: redis.Redis | None = None) -> pd.DataFrame:
    """The consumer groups of a stream (XINFO GROUPS), by name."""
    key, client = _stream(of, client)
    with _redis(client):
        found: Any = client.xinfo_groups(key)
    rows = sorted([g["name"], g["consumers"], g["pending"], g["last-delivered-id"]] for g in found)
    return _frame(rows, group="str", consumers="int64", pending="int64", last_delivered_id="str")


def consumers(of: Answer | str, group: str, *, client: redis.Redis | None = None) -> pd.DataFrame:
    """The consumers of a group (XINFO CONSUMERS), by name; `idle` in milliseconds.

    Raises LLMStreamError if there is no such group.
    """
    key, client = _stream(of, client)
    with _redis(client):
        _check_group(client, key, group)
        found: Any = client.xinfo_consumers(key, group)
    rows = sorted([c["name"], c["pending"], c["idle"]] for c in found)
    return _frame(rows, consumer="str", pending="int64", idle="int64")


def pending(of: Answer | str, group: str, *, client: redis.Redis | None = None) -> pd.DataFrame:
    """The entries that a group's consumers took and have not acknowledged (XPENDING), oldest first.

    `idle` is the milliseconds since an entry was last delivered, `delivered` how often it was. Raises
    LLMStreamError if there is no such group.
    """
    key, client = _stream(of, client)
    with _redis(client):
        _check_group(client, key, group)
        found: Any = client.xpending_range(key, group, "-", "+", 1_000_000)
    fields = ("message_id", "consumer", "time_since_delivered", "times_delivered")
    rows = [[taken[name] for name in fields] for taken in found]
    return _frame(rows, id="str", consumer="str", idle="int64", delivered="int64")


# ------------------------------------------------------------------------------------------------- helpers


def _frame(rows: Iterable[Any], /, **columns: str) -> pd.DataFrame:
    """Rows under columns of these types; times are given in milliseconds."""
    frame = pd.DataFrame(list(rows), columns=pd.Index(columns, dtype="str"), dtype=object)
    for name in (name for name, kind in columns.items() if kind == TIME):
        frame[name] = pd.to_datetime(pd.to_numeric(frame[name]), unit="ms", utc=True, errors="coerce")
    return frame.astype(columns)


def _number(value: Any, factor: int = 1) -> int | None:
    """What a clock or a counter gave, times `factor`; None for whatever else JSON may hold."""
    return round(value * factor) if isinstance(value, (int, float)) and abs(value) < 2**43 else None


def _answer(answer: Answer | str, client: redis.Redis | None) -> tuple[redis.Redis, AnswerKeys]:
    if isinstance(answer, Answer):
        client, answer = client or answer.client, answer.id
    client = client or current()
    return client, names_of(client).answer(answer)


def _entries(client: redis.Redis, keys: AnswerKeys) -> list[Entry]:
    with _redis(client):
        _check_answer(client, keys)
        return parse_entries(client.xrange(keys.chunks))  # type: ignore[arg-type]


def _check_answer(client: redis.Redis, keys: AnswerKeys) -> None:
    there = [_there(client, keys.chunks, "stream"), _there(client, keys.question, "string")]
    if not any(there):
        raise AnswerNotFound(_no_answer(keys))


def _no_answer(keys: AnswerKeys) -> str:
    return f"there is no {keys.chunks!r}: never asked, cleared, or expired; answers() lists what is there"


def _stream(of: Answer | str, client: redis.Redis | None) -> tuple[str, redis.Redis]:
    """The key of the stream that is meant."""
    if isinstance(of, Answer):
        client, of = client or of.client, names_of(client or of.client).answer(of.id).chunks
    client = client or current()
    candidates = [of] if isinstance(of, str) else []
    with suppress(BadAnswerId):
        candidates.append(names_of(client).answer(of).chunks)
    with _redis(client):
        for key in candidates:
            if _there(client, key, "stream"):
                return key, client
    raise AnswerNotFound(f"there is no stream {of!r}: XADD makes one, answers() lists what is there")


def _check_group(client: redis.Redis, key: str, group: str) -> None:
    found: Any = client.xinfo_groups(key)
    names = sorted(each["name"] for each in found)
    if group not in names:
        raise LLMStreamError(f"{key!r} has no group {group!r}, it has {names}: xgroup_create makes one")


def _there(client: redis.Redis, key: str, wanted: str) -> bool:
    """Whether the key exists. Raises NotAnAnswer if it holds another type, on which backends don't agree."""
    kind = str(client.type(key))
    if kind not in (wanted, "none"):
        raise NotAnAnswer(f"the key {key!r} holds a {kind}, not a {wanted}: use another, or delete it")
    return kind == wanted


@contextmanager
def _redis(client: redis.Redis) -> Iterator[None]:
    """Turn an error of Redis into one that says what to do."""
    try:
        yield
    except (RedisError, OSError) as error:
        raise unusable(error, client) from None
