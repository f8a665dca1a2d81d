"""Write an answer into its stream: what a model says, exactly, whatever happens on the way."""

from __future__ import annotations

import json
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import redis
from redis.exceptions import RedisError, ResponseError, WatchError

from llmstream_nb.answers.connection import Line, RedisUnusable, is_passing, milliseconds, names_of, said, unusable
from llmstream_nb.answers.read import Backoff, look
from llmstream_nb.answers.record import add_to_index
from llmstream_nb.llm.endpoint import ModelError
from llmstream_nb.protocol.wire import (
    ORIGIN,
    BadEntryID,
    Deleted,
    Entry,
    EntryID,
    Fenced,
    Joiner,
    LLMStreamError,
    Timing,
    cleared_attempt,
    first_attempt,
    newest_attempt,
    parse_entries,
    parse_record,
    same_question,
)

log = logging.getLogger(__name__)
Json = dict[str, Any]
BATCH = 500  # entries in one MULTI: enough to be fast, small enough not to hold up other clients
BACKLOG = 5_000  # unsent entries before the model has to wait


@dataclass(frozen=True)
class Writing:
    """How an answer is written; raises ValueError for a number that makes no sense.

    `coalesce_ms` is the least time between two entries, in milliseconds; what the model says meanwhile goes into one.
    A little saves entries, memory and round trips, and costs smoothness. The first entry is never held back.

    `maxlen` is how many of the newest entries the stream keeps (XADD … MAXLEN); None keeps all. It bounds the memory
    of a long answer, and costs latecomers its beginning until the answer has ended and the record has it.
    """

    coalesce_ms: float = 0  # at least so long between two text entries; what comes meanwhile goes into one
    maxlen: int | None = None  # keep only so many of the newest entries in the stream (XADD … MAXLEN)

    def __post_init__(self) -> None:
        whole = self.maxlen is None or (type(self.maxlen) is int and 0 < self.maxlen < 2**53)
        if not (0 <= self.coalesce_ms < math.inf and whole):
            raise ValueError(f"{self}: coalesce_ms is at least 0, and maxlen a whole number from 1 on")


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
        self.cancelled = False
        self.ended_before: Entry | None = None  # the end that someone else has written: nothing is left to answer
        self._line = Line(client, self.keys.chunks)
        self._leased = self._ticked = float("-inf")  # monotonic times when the lease was set, and of the last tick
        self._whole = False  # the attempt's start stands in the stream, as far as is known
        self.took = 0.0  # seconds that the last batch took

    @property
    def text(self) -> str:
        """All text of this attempt, sent or not."""
        return "".join(text for kind, text, _ in self.entries if kind == "text")

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
                if not (unclear or is_passing(error)) or not retry.sleep():
                    raise error from None
                failed = True

    def open(self, opening: Callable[[Entry | None], tuple[str, dict[str, Any]]]) -> None:
        """Begin with the entry that `opening` makes of the stream's last entry, unless the answer has ended."""
        self._opening = opening
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
                kind, data = self._opening(top)
                self.entries = [(kind, json.dumps(data | {"nonce": self.nonce}), 0)]
            if newest > self.number:
                raise Fenced(f"{name}: attempt {newest} has taken over from {self.number}")
            if top and top.final and top.id.attempt < self.number and self.sent:
                raise Fenced(f"{name}: attempt {top.id.attempt} has ended the answer")
            if last.attempt < self.number:
                self._begin(pipe)
            elif not self._is_own(pipe, top, last):
                raise Fenced(f"{name}: another producer has opened attempt {self.number}")
            elif self._lost_its_start(pipe):
                self.number, self.sent = self.number + 1, 0
                self._begin(pipe)
            else:
                self.sent = last.seq + 1

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
        """Write `<attempt>-0`, in MULTI, with the lease before it and the number of the attempt in the record."""
        pipe.multi()
        pipe.set(self.keys.lease(self.number), self.nonce, px=milliseconds(self.timing.lease))
        pipe.delete(self.keys.lease(0))
        record = self.record | {"attempt": self.number}
        pipe.set(self.keys.question, json.dumps(record), px=milliseconds(self.timing.ttl))
        self._queue_xadd(pipe, 0, create=True)
        pipe.pexpire(self.keys.chunks, milliseconds(self.timing.ttl))
        pipe.execute()
        self.sent, self._whole, self._leased = 1, True, time.monotonic()
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

    def finish(self, text: str | None = None) -> None:
        """Once the end is confirmed: complete the record, and give up the lease."""
        end = EntryID(self.number, len(self.entries) - 1)
        self._save(self.record, json.loads(self.entries[-1][1]), end, self.text if text is None else text)

    def _repair(self) -> None:
        """Complete the record where a producer has ended the answer and died before it could write that down."""
        now = look(self.record["id"], self._line.redis)
        if now.record and not same_question(now.record, self.record):
            return  # deleted and asked anew meanwhile
        if self.ended_before and not now.record.get("end"):
            closing = self.ended_before.data | ({"missing": now.missing} if now.missing else {})
            self._save(now.record or self.record, closing, self.ended_before.id, now.text, repair=True)

    def _save(self, record: Json, closing: Json, end: EntryID, text: str, repair: bool = False) -> None:
        """Write the record, unless it has been deleted, belongs to a newer question, or needs no repair any more."""
        told = {name: value for name, value in closing.items() if name != "nonce"}
        whole = record | told | {"attempt": end.attempt, "start": f"{end.attempt}-0", "end": str(end), "text": text}
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

    def release(self) -> None:
        """Give up the lease before its time, so that another producer may take over at once."""
        with suppress(RedisError, OSError):
            self._line.redis.delete(self.keys.lease(self.number))

    def close(self) -> None:
        """Close the connection."""
        self._line.close()


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


class Producer:
    """Two threads: one takes deltas from the model, the other writes them, so neither holds up the other.

    A pen goes between them: who holds it may use the attempt. The writing thread lays it down only to rest, and
    then the model's thread may write what has just come: to wake the other first would make it late.

    `writing` is how often and how much to keep; `silence` how many seconds a source may be silent that doesn't look
    after that itself, before its first delta and after it; `about` goes into the start entry, beside model and source.
    """

    def __init__(
        self,
        client: redis.Redis,
        record: dict[str, Any],
        deltas: Iterable[str],
        timing: Timing,
        writing: Writing | None = None,
        silence: tuple[float, float] = (math.inf, math.inf),
        **about: str,
    ) -> None:
        writing = writing or Writing()
        self.attempt = Attempt(client, record, timing, writing.maxlen)
        self.done = threading.Event()  # the end is confirmed, or there is no more hope
        self.error: LLMStreamError | None = None  # what kept this producer from writing the end itself
        self.exception: BaseException | None = None  # what the source raised
        self.ended = False  # the answer has ended, and its record says so
        self.lost = False  # whether the error was a Redis out of reach: someone else may fare better
        self._deltas, self._about = deltas, about
        self._stop = self._left = self._closed = False  # closed: no entry may follow
        self._changed, self._pen = threading.Condition(), threading.Lock()
        self._held, self._pause = "", writing.coalesce_ms / 1000  # text for the next entry; seconds between two
        self._silence = silence  # seconds that the source may be silent, before its first delta and after it
        self._began = self._next = time.monotonic()  # the next entry may be written from then on
        self._last = self._began  # when the model was asked for the next delta
        self._first_token: int | None = None  # milliseconds

    def start(self) -> None:
        """Do `run` in a thread of its own."""
        threading.Thread(target=self.run, name=f"llmstream write {self.attempt.record['id']}", daemon=True).start()

    def stop(self) -> None:
        """Ask for the end, from any thread: the text so far is kept, and the model's request is closed."""
        self._note(_stop=True)
        self._close_model()  # now, not when Redis has confirmed the end: it costs money

    def leave(self) -> None:
        """Stop writing, from any thread, and leave the answer open for another producer."""
        self._note(_left=True)

    def _note(self, **flags: bool) -> None:
        """Set these, and wake both threads."""
        with self._changed:
            vars(self).update(flags)
            self._changed.notify_all()

    # The model's thread

    def _take(self) -> None:
        joiner = Joiner()
        try:
            for delta in self._deltas:
                if not self._add(joiner.push(delta)):
                    return
            self._add(joiner.flush())
            if not self._stop:
                reason = getattr(self._deltas, "finish_reason", None) or "stop"
                self._close("end", reason=reason, usage=getattr(self._deltas, "usage", None))
        except ModelError as error:
            self._fail(error, error.error, str(error))
        except BaseException as error:  # noqa: BLE001 - a source may be anybody's code: it may also exit, or be cancelled
            # What it says may hold anything, and the entry is for all to see.
            self._fail(error, type(error).__name__, f"The source raised {type(error).__name__}: see answer.exception.")

    def _fail(self, error: BaseException, name: str, message: str) -> None:
        self.exception = self.exception or error
        self._close("error", error=name, message=message)

    def _add(self, text: str) -> bool:
        """Take in text, to be written by this thread or the other; waits while too much is unsent.

        False when no more is wanted.
        """
        attempt, came, mine = self.attempt, time.monotonic(), False
        with self._changed:
            while len(attempt.entries) - attempt.sent > BACKLOG and not (self._closed or self._stop):
                self._changed.wait()
            if self._closed or self._stop or self._left:
                return False
            wake = not self._held
            self._held += text
            self._release(came)
            # Where the model is quicker than Redis, more comes meanwhile: the other thread writes it all at once.
            if came - self._last > attempt.took and attempt.sent < len(attempt.entries) and attempt.tick_in > 0:
                mine = self._pen.acquire(blocking=False)
            if wake and not mine:
                self._changed.notify_all()
        self._last = came
        if mine:
            with suppress(Exception):  # the other thread does it again, and raises what does not pass
                attempt.flush()
            self._pen.release()
            self._last = time.monotonic()
            if attempt.sent < len(attempt.entries):
                self._note()
        return True

    def _release(self, now: float = math.inf) -> None:
        """Make an entry of the text that is held, if it is time to at `now` (monotonic seconds)."""
        if self._held and now >= self._next:
            ms = self._elapsed()
            if self._first_token is None:
                self._first_token = ms
            self.attempt.entries.append(("text", self._held, ms))
            self._held, self._next = "", now + self._pause

    def _close(self, kind: str, **data: Any) -> None:
        """Append the end or error entry, once; an error after a stop is but the request that was closed."""
        with self._changed:
            if self._closed or (self._stop and kind == "error"):
                return
            self._release()
            ms = self._elapsed()
            data |= {"first_token_ms": self._first_token, "total_ms": ms, "chunks": len(self.attempt.entries) - 1}
            self.attempt.entries.append((kind, json.dumps(data), ms))
            self._closed = True
            self._changed.notify_all()

    def _elapsed(self) -> int:
        return int((time.monotonic() - self._began) * 1000)

    # The writing thread

    def run(self) -> None:
        """Write the answer to its end; starts the model's thread once the attempt stands in Redis."""
        attempt = self.attempt
        try:
            self._pen.acquire()
            attempt.open(self._opening)
            if attempt.ended_before:
                self.ended = True
                return
            threading.Thread(target=self._take, name=f"llmstream model {attempt.record['id']}", daemon=True).start()
            while not (self._closed and attempt.sent == len(attempt.entries)):
                self._rest()
                if self._left and not self._closed:
                    attempt.release()
                    return
                if self._stop:
                    self._close("end", reason="cancelled")
                elif self._is_stalled():
                    self._close_model()
                    self._close("error", error="Stalled", message="The source has been silent for too long: ask again.")
                attempt.insist(attempt.flush)
                if attempt.cancelled:
                    self.stop()
                self._note()  # there is room for more
            attempt.insist(attempt.finish)
            self.ended = True
        except LLMStreamError as error:
            self.error = error
        except (RedisError, OSError) as error:
            self.error, self.lost = unusable(error, self.attempt.client), is_passing(error)
        except Exception as error:  # noqa: BLE001 - whoever waits must learn of it, whatever it is
            self.error = LLMStreamError(f"the producer broke down: {type(error).__name__}: {error}")
        finally:
            self._note(_closed=True)
            self._close_model()
            attempt.close()
            self.done.set()

    def _is_stalled(self) -> bool:
        """Whether the source has been silent for longer than it may; a model that waits for Redis is not."""
        limit = self._silence[self._first_token is not None]
        return self.attempt.sent == len(self.attempt.entries) and time.monotonic() - self._last > limit

    def _rest(self) -> None:
        """Lay down the pen until there is something to write, a tick is due, or the end is asked for."""
        attempt = self.attempt
        with self._changed:
            wait = min(attempt.tick_in, self._next - time.monotonic() if self._held else math.inf)
            rest = attempt.sent == len(attempt.entries) and wait > 0 and not (self._stop or self._left)
            if rest:
                self._pen.release()
                self._changed.wait(wait)
        if rest:
            self._pen.acquire()
        with self._changed:
            self._release(time.monotonic())

    def _close_model(self) -> None:
        """End the model's request. A generator is let be: closing one that runs raises; it ends at its next delta."""
        close = getattr(self._deltas, "close", None)
        if close and not isinstance(self._deltas, Generator):
            try:
                close()
            except BaseException as error:  # noqa: BLE001 - it may be anybody's code, and the answer ends all the same
                log.warning("%s: closing its source raised %s", self.attempt.record["id"], type(error).__name__)

    def _opening(self, _: Entry | None) -> tuple[str, dict[str, Any]]:
        own = {key: self.attempt.record.get(key, "") for key in ("model", "source")}
        return "start", own | {"at": round(time.time(), 3)} | self._about
