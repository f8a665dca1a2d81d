"""One attempt at an answer, in Redis: opened, written, and mended after every loss."""

import json
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import redis
from redis.exceptions import RedisError, ResponseError, WatchError

from llmstream_nb.answers.connection import Line, RedisUnusable, is_passing, milliseconds, names_of, said
from llmstream_nb.answers.read import Backoff, longest_block, look, look_and_events
from llmstream_nb.answers.record import add_to_index
from llmstream_nb.protocol.events import parts_of
from llmstream_nb.protocol.parts import joined
from llmstream_nb.protocol.wire import (
    ORIGIN,
    BadEntryID,
    Deleted,
    Entry,
    EntryID,
    Fenced,
    Timing,
    cleared_attempt,
    first_attempt,
    newest_attempt,
    parse_entries,
    parse_record,
    same_question,
)

Json = dict[str, Any]
BATCH = 500  # entries in one MULTI: enough to be fast, small enough not to hold up other clients


class Attempt:
    """One attempt at one answer, in Redis: opened, written, and mended after every loss. For one thread at a time.

    `entries[n]` is the entry `<attempt>-<n>`, kept until the end is confirmed; those below `sent` are in Redis.
    """

    def __init__(self, client: redis.Redis, record: dict[str, Any], timing: Timing, maxlen: int | None = None) -> None:
        self.client, self.record, self.timing, self.maxlen = client, record, timing, maxlen
        self.keys = names_of(client).answer(record["id"])
        self.nonce = secrets.token_hex(8)
        self.number = self.sent = 0  # the number is chosen when the attempt is opened
        self.entries: list[tuple[str, str, int]] = []  # kind, text, ms
        self._opened_with = 1  # so many entries are its opening
        self.cancelled = False
        self.ended_before: Entry | None = None  # the end that someone else has written: nothing is left to answer
        self._line = Line(client, self.keys.chunks)
        self._leased = self._ticked = float("-inf")  # monotonic times when the lease was set, and of the last tick
        self._goes_on: Callable[[str], bool] | None = None  # whether the source goes on from a text
        self._whole = False  # the attempt's start stands in the stream, as far as is known
        self.took = 0.0  # seconds that the last batch took

    @property
    def text(self) -> str:
        """All text of this attempt, sent or not."""
        return "".join(text for kind, text, _ in self.entries if kind == "text")

    @property
    def continues(self) -> bool:
        """Whether it began with the text of the attempt before."""
        return self._opened_with > 1

    @property
    def whole(self) -> Json:
        """All of this attempt, as the record keeps it."""
        return _whole(self.text, [entry for entry in self.entries if entry[0] not in ("start", "end", "error")])

    @property
    def tick_in(self) -> float:
        """Seconds until the next tick is due."""
        return self._ticked + self.timing.tick - time.monotonic()

    def insist(self, action: Callable[[], None]) -> None:
        """Do it, and after every passing error reconnect, find out what Redis has, and do it again.

        Raises Fenced, Deleted, or the Redis error when it does not pass within `give_up` seconds.
        """
        retry, failed = Backoff(self.timing), False
        while True:
            try:
                if failed:
                    self._line.reopen()
                    self.synchronise()
                return action()
            except (RedisError, OSError, RedisUnusable) as problem:  # the last is what `look` makes of the others
                error: Any = (isinstance(problem, RedisUnusable) and problem.__context__) or problem
                unclear = isinstance(error, WatchError) or "equal or smaller" in said(error)
                if not (unclear or is_passing(error, self._line.worked)) or not retry.sleep():
                    raise error from None
                failed = True

    def open(
        self, opening: Callable[[EntryID], tuple[str, dict[str, Any]]], goes_on: Callable[[str], bool] | None = None
    ) -> None:
        """Begin with the entry that `opening` makes of the last ID before it, unless the answer has ended.

        `goes_on` is told the text of the attempt before, or that there is none; if true, this one begins with it.
        """
        self._opening, self._goes_on = opening, goes_on
        self.insist(self.synchronise)
        if self.ended_before:
            self.insist(self._repair)

    def synchronise(self) -> None:
        """Bring `sent` in line with the stream, and begin the attempt if it isn't there.

        All of it under WATCH, so nobody can begin another attempt, or delete the answer, in between. Raises Fenced when
        another has taken over, Deleted when the answer was cleared, WatchError when something changed meanwhile.
        """
        keys, name = self.keys, self.record["id"]
        with self._line.redis.pipeline(transaction=True) as pipe:
            pipe.watch(keys.chunks, keys.question, keys.cleared)
            stood = self._check_question(pipe)
            top, last = last_entry(pipe, keys.chunks)
            if last.attempt < first_attempt(self.record):
                top, last = None, ORIGIN  # what came late, of a question that was deleted
            newest = max(last.attempt, stood)  # somebody may have deleted the stream, but not the record
            if not self.sent and not newest >= self.number > 0:  # not opened: judge (again)
                if self.ended_before:
                    return
                if top and top.final:
                    self.ended_before = top
                    return
                if newest and pipe.exists(keys.lease(newest)):
                    raise Fenced(f"{name}: the producer of attempt {newest} is alive")
                self.number = max(newest + 1, first_attempt(self.record))
                kind, data = self._opening(last)
                kept = self._standing(pipe, last) if self._goes_on and newest == last.attempt else ""
                if self._goes_on and self._goes_on(kept):
                    data["continues"] = str(last)
                self.entries = [(kind, json.dumps(data | {"nonce": self.nonce}), 0)]
                self.entries += [("text", kept, 0)] if "continues" in data else []
                self._opened_with = len(self.entries)
            if newest > self.number:
                raise Fenced(f"{name}: attempt {newest} has taken over from {self.number}")
            if top and top.final and top.id.attempt < self.number and self.sent:
                raise Fenced(f"{name}: attempt {top.id.attempt} has ended the answer")
            if last.attempt < self.number:
                self._begin(pipe)
            elif not self._is_own(pipe, top, last):
                raise Fenced(f"{name}: another producer has opened attempt {self.number}")
            elif self._lost_its_start(pipe):
                self.number += 1
                self._begin(pipe)
            else:
                self.sent = last.seq + 1

    def _standing(self, pipe: Any, last: EntryID) -> str:
        """The text of the attempt before, as far as that got; none where some of it is gone, or is no text."""
        entries = parse_entries(pipe.xrange(self.keys.chunks, f"{last.attempt}-0", str(last)))
        kinds, seqs = [entry.kind for entry in entries], [entry.id.seq for entry in entries]
        whole = seqs == list(range(last.seq + 1)) and kinds == ["start", *["text"] * last.seq]
        return "".join(entry.text for entry in entries[1:]) if whole else ""

    def begin_anew(self) -> None:
        """Give this attempt up for the next one, which asks `goes_on` again. Raises Fenced if another has ended it."""
        self.release()
        self.number = self.sent = 0
        self.insist(self.synchronise)
        if self.ended_before:
            raise Fenced(f"{self.record['id']}: attempt {self.ended_before.id.attempt} has ended the answer")

    def _check_question(self, pipe: Any) -> int:
        """Whether the question is still the one to answer; return the newest attempt that its record tells of."""
        name, (text, cleared) = self.record["id"], pipe.mget(self.keys.question, self.keys.cleared)
        found = parse_record(text)
        if cleared_attempt(cleared) >= first_attempt(self.record):
            raise Deleted(f"{name} was deleted")
        if found is None:
            return 0
        if not same_question(found, self.record):
            raise Fenced(f"{name}: another question is asked under this id")
        if found.get("end") and not self.sent:
            with suppress(BadEntryID):
                self.ended_before = Entry(EntryID.parse(found["end"]), "end", "{}", 0)
        return newest_attempt(found)

    def _is_own(self, pipe: Any, top: Entry | None, last: EntryID) -> bool:
        """Whether the entries of this attempt's number are this producer's, and none of them is foreign."""
        if last.seq >= len(self.entries):
            return False
        if top is None or top.id.attempt != self.number:  # somebody has deleted all of them: the lease tells
            return pipe.get(self.keys.lease(self.number)) in (None, self.nonce)
        if self.entries[top.id.seq : top.id.seq + 1] != [(top.kind, top.text, top.ms)]:
            return False
        start = parse_entries(pipe.xrange(self.keys.chunks, f"{self.number}-0", f"{self.number}-0"))
        return not start or start[0].data.get("nonce") == self.nonce  # it may have been trimmed away

    def _lost_its_start(self, pipe: Any) -> bool:
        """Whether the stream was deleted and made anew by another, so that entries of this attempt are missing."""
        oldest = parse_entries(pipe.xrange(self.keys.chunks, count=1))
        self._whole = bool(oldest) and oldest[0].id == EntryID(self.number, 0)
        # Trimming takes the oldest first: what stands before this attempt was not there when it began.
        return (
            bool(oldest)
            and oldest[0].id.attempt < self.number
            and not pipe.xrange(self.keys.chunks, f"{self.number}-0", f"{self.number}-0")
        )

    def _begin(self, pipe: Any) -> None:
        """Write `<attempt>-0`, in MULTI, with the lease before it and the number of the attempt in the record.

        Where the attempt goes on, the text that it keeps comes with it: whoever knows nothing of that has it, too.
        """
        pipe.multi()
        pipe.set(self.keys.lease(self.number), self.nonce, px=milliseconds(self.timing.lease))
        pipe.delete(self.keys.lease(0))
        record = self.record | {"attempt": self.number}
        pipe.set(self.keys.question, json.dumps(record), px=milliseconds(self.timing.ttl))
        for seq in range(self._opened_with):
            self._queue_xadd(pipe, seq, create=seq == 0)
        pipe.pexpire(self.keys.chunks, milliseconds(self.timing.ttl))
        pipe.execute()
        self.sent, self._whole, self._leased = self._opened_with, True, time.monotonic()
        add_to_index(self.client, self.record)

    def _queue_xadd(self, pipe: Any, seq: int, create: bool = False) -> None:
        kind, text, ms = self.entries[seq]
        options = (() if create else ("NOMKSTREAM",)) + (("MAXLEN", self.maxlen) if self.maxlen else ())
        fields = ("kind", kind, "text", text, "ms", ms)
        pipe.execute_command("XADD", self.keys.chunks, *options, f"{self.number}-{seq}", *fields)

    def flush(self) -> None:
        """Send the next batch, and tick if it is time: lease, expiry, and a look for a cancel. All or nothing."""
        now = time.monotonic()
        if now - self._leased > self.timing.lease:
            self.synchronise()  # this process slept beyond its lease: is the answer still ours?
        first, last = self.sent, min(self.sent + BATCH, len(self.entries))
        tick, start = now - self._ticked >= self.timing.tick, f"{self.number}-0"
        ends = first < last == len(self.entries) and self.entries[-1][0] in ("end", "error")
        with self._line.redis.pipeline(transaction=tick or last - first > 1) as pipe:  # one XADD needs no MULTI
            if ends and self._whole and not self.maxlen:  # nobody must take an end for that of a whole text
                pipe.watch(self.keys.chunks)
                if not pipe.xrange(self.keys.chunks, start, start):
                    raise WatchError("the start of the attempt is gone")
                pipe.multi()
            for seq in range(first, last):
                self._queue_xadd(pipe, seq)
            if tick:
                pipe.set(self.keys.lease(self.number), self.nonce, px=milliseconds(self.timing.lease))
                pipe.pexpire(self.keys.question, milliseconds(self.timing.ttl))
                pipe.xrange(self.keys.chunks, start, start)
                pipe.pexpire(self.keys.chunks, milliseconds(self.timing.ttl))
                pipe.exists(self.keys.cancel)
            replies = pipe.execute()
        if None in replies[: last - first] or (tick and not replies[-2]):
            raise WatchError("the stream is gone")  # look again at what Redis holds
        if tick and self._whole and not self.maxlen and not replies[-3]:
            raise WatchError("the start of the attempt is gone")
        self.sent, self.took = last, time.monotonic() - now
        if tick:
            self._leased, self._ticked, self.cancelled = now, now, bool(replies[-1])

    def finish(self, whole: Json | None = None) -> None:
        """Once the end is confirmed: complete the record, and give up the lease. `whole`: `standing`, from outside."""
        while self.sent < len(self.entries):  # done again, at a Redis that lacks some of it
            self.flush()
        end = EntryID(self.number, len(self.entries) - 1)
        self._save(self.record, json.loads(self.entries[-1][1]), end, whole or self.whole)
        if "guide" in self.client.get_connection_kwargs():
            # Before Sentinels name another primary, the old one takes writes that are lost; afterwards the next command
            # raises. So wait for a standby to have this, or for so long as they may need.
            wait = int(500 * longest_block(self.client))
            any(self._line.redis.wait(1, wait) for _ in range(2000 // wait))

    def _repair(self) -> None:
        """Complete the record where a producer has ended the answer and died before it could write that down."""
        now = look(self.record["id"], self._line.redis)
        if now.record and not same_question(now.record, self.record):
            return  # deleted and asked anew meanwhile
        if self.ended_before and not now.record.get("end"):
            closing = self.ended_before.data | ({"missing": now.missing} if now.missing else {})
            whole = standing(self.record["id"], self._line.redis)
            self._save(now.record or self.record, closing, self.ended_before.id, whole, repair=True)

    def _save(self, record: Json, closing: Json, end: EntryID, told: Json, repair: bool = False) -> None:
        """Write the record, unless it has been deleted, belongs to a newer question, or needs no repair any more."""
        told = {name: value for name, value in closing.items() if name != "nonce"} | told
        whole = record | told | {"attempt": end.attempt, "start": f"{end.attempt}-0", "end": str(end)}
        with self._line.redis.pipeline(transaction=True) as pipe:
            pipe.watch(self.keys.question, self.keys.cleared)
            found = parse_record(pipe.get(self.keys.question)) or record  # type: ignore[arg-type]
            if not same_question(found, record):
                return
            cleared = cleared_attempt(pipe.get(self.keys.cleared)) >= first_attempt(record)
            pipe.multi()
            if not (cleared or (repair and "end" in found)):
                pipe.set(self.keys.question, json.dumps(whole), px=milliseconds(self.timing.ttl))
                pipe.pexpire(self.keys.chunks, milliseconds(self.timing.ttl))
            pipe.delete(self.keys.lease(end.attempt))
            pipe.execute()

    def confess(self) -> None:
        """Write what is left, an error at its end, as plainly as can be: where MULTI or a new connection is refused."""
        self.number = self.number or first_attempt(self.record)  # each ID is refused if it isn't the next one
        with suppress(RedisError, OSError), self.client.pipeline(transaction=False) as pipe:
            for seq in range(self.sent, len(self.entries)):
                self._queue_xadd(pipe, seq, create=seq == 0)
            pipe.pexpire(self.keys.chunks, milliseconds(self.timing.ttl))
            pipe.execute()

    def release(self) -> None:
        """Give up the lease before its time, so that another producer may take over at once."""
        with suppress(RedisError, OSError):
            self._line.redis.delete(self.keys.lease(self.number))

    def close(self) -> None:
        """Close the connection."""
        self._line.close()


def standing(answer_id: str, client: redis.Redis) -> Json:
    """All of an answer that stands, as the record keeps it."""
    now, events = look_and_events(answer_id, client)
    return _whole(now.text, [(part.kind, part.text, part.ms) for part in parts_of(events)])


def _whole(text: str, parts: list[tuple[str, str, int]]) -> Json:
    """The text; and all parts, where there are others."""
    return {"text": text} | ({"parts": joined(parts)} if any(part[0] != "text" for part in parts) else {})


def last_entry(pipe: Any, key: str) -> tuple[Entry | None, EntryID]:
    """The last entry of a stream, and the last ID that it ever had: who deletes entries leaves that behind."""
    try:
        info = pipe.xinfo_stream(key)
    except ResponseError as error:
        if "no such key" not in said(error):
            raise
        return None, ORIGIN
    newest = parse_entries([info["last-entry"]] if info["last-entry"] else [])
    return newest[0] if newest else None, EntryID.parse(info["last-generated-id"])
