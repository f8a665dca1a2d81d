"""Write an answer into its stream: what a model says, exactly, whatever happens on the way."""

import json
import math
import threading
import time
from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import redis
from redis.exceptions import RedisError

from llmstream_nb.answers.attempt import Attempt
from llmstream_nb.answers.connection import is_passing, unusable
from llmstream_nb.answers.log import Log
from llmstream_nb.llm.endpoint import Disagrees, ModelError
from llmstream_nb.protocol.parts import DELTAS, Yielded, written
from llmstream_nb.protocol.wire import (
    EntryID,
    Joiner,
    LLMStreamError,
    Timing,
)

log = Log(__name__)
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


class Producer:
    """Two threads: one takes deltas from the model, the other writes them, so neither holds up the other.

    A pen goes between them: who holds it may use the attempt. The writing thread lays it down only to rest, and
    then the model's thread may write what has just come: to wake the other first would make it late.

    A source whose `goes_on(text)` says yes begins with that text of the attempt before: what it yields comes behind it.
    Should it find that it can't, it raises Disagrees, and is iterated over once more in the next attempt.

    `writing` is how often and how much to keep; `silence` how many seconds a source may be silent that doesn't look
    after that itself, before its first delta and after it; `about` goes into the start entry, beside model and source.
    """

    def __init__(
        self,
        client: redis.Redis,
        record: dict[str, Any],
        deltas: Iterable[Yielded],
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
        self._stop = self._left = self._closed = self._anew = False  # closed: no entry may follow
        self._changed, self._pen = threading.Condition(), threading.Lock()
        self._pause = writing.coalesce_ms / 1000  # seconds between two entries
        self._silence = silence  # seconds that the source may be silent, before its first delta and after it
        self._clear()

    def _clear(self) -> None:
        """Nothing has come yet."""
        self._held, self._kind = "", "text"  # deltas for the next entry, and their kind
        self._began = self._next = time.monotonic()  # the next entry may be written from then on
        self._last = self._began  # when the model was asked for the next delta
        self._first_part: int | None = None  # milliseconds until the first part of any kind, and until the first text
        self._first_token: int | None = None

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
        joiner, kind = Joiner(), "text"
        try:
            for part in self._deltas:
                came, text = ("text", part) if type(part) is str else written(part)
                if came != kind:
                    if not self._add(kind, joiner.flush()):
                        return
                    kind = came
                if not self._add(kind, joiner.push(text) if kind in DELTAS else text):
                    return
            self._add(kind, joiner.flush())
            if not self._stop:
                reason = getattr(self._deltas, "finish_reason", None) or "stop"
                self._close("end", reason=reason, usage=getattr(self._deltas, "usage", None))
        except Disagrees as error:
            if self.attempt.continues:
                self._note(_anew=True)
            else:  # it has begun anew already
                self._fail(error, "Disagrees", "The source disagrees with a text that it was not asked to go on from.")
        except ModelError as error:
            self._fail(error, error.error, str(error))
        except BaseException as error:  # noqa: BLE001 - a source may be anybody's code: it may also exit, or be cancelled
            # What it says may hold anything, and the entry is for all to see.
            self._fail(error, type(error).__name__, f"The source raised {type(error).__name__}: see answer.exception.")

    def _fail(self, error: BaseException, name: str, message: str) -> None:
        self.exception = self.exception or error
        self._close("error", error=name, message=message)

    def _add(self, kind: str, text: str) -> bool:
        """Take in a part, to be written by this thread or the other; waits while too much is unsent.

        False when no more is wanted.
        """
        attempt, came, mine = self.attempt, time.monotonic(), False
        with self._changed:
            while len(attempt.entries) - attempt.sent > BACKLOG and not (self._closed or self._stop):
                self._changed.wait()
            if self._closed or self._stop or self._left:
                return False
            if kind != self._kind:
                self._release(came, whole=True)
                self._kind = kind
            wake = not self._held
            self._held += text
            self._release(came, whole=kind not in DELTAS)
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

    def _release(self, now: float, whole: bool = False) -> None:
        """Make an entry of what is held, if it is time to at `now` (monotonic seconds), or if it is `whole`."""
        if self._held and (whole or now >= self._next):
            ms = self._elapsed()
            if self._first_part is None:
                self._first_part = ms
            if self._first_token is None and self._kind == "text":
                self._first_token = ms
            self.attempt.entries.append((self._kind, self._held, ms))
            self._held, self._next = "", now + self._pause

    def _close(self, kind: str, **data: Any) -> None:
        """Append the end or error entry, once; an error after a stop is but the request that was closed."""
        with self._changed:
            if self._closed or (self._stop and kind == "error"):
                return
            self._release(time.monotonic(), whole=True)
            ms = self._elapsed()
            data |= {
                "first_part_ms": self._first_part,
                "first_token_ms": self._first_token,
                "total_ms": ms,
                "chunks": max(0, len(self.attempt.entries) - 1),
            }
            self.attempt.entries.append((kind, json.dumps(data), ms))
            self._closed = True
            self._changed.notify_all()
        log.info("%s: %s: %s", self.attempt.record["id"], kind, data.get("reason") or data.get("error"))

    def _elapsed(self) -> int:
        return int((time.monotonic() - self._began) * 1000)

    # The writing thread

    def run(self) -> None:
        """Write the answer to its end; starts the model's thread once the attempt stands in Redis."""
        attempt = self.attempt
        try:
            self._pen.acquire()
            attempt.open(self._opening, getattr(self._deltas, "goes_on", None))
            if attempt.ended_before:
                self.ended = True
                return
            self._begin()
            while not (self._closed and attempt.sent == len(attempt.entries)):
                self._rest()
                if self._left and not self._closed:
                    attempt.release()
                    return
                self._decide()
                attempt.insist(attempt.flush)
                if attempt.cancelled:
                    self.stop()
                self._note()  # there is room for more
            attempt.insist(attempt.finish)
            self.ended = True
        except LLMStreamError as error:
            self.error = error
        except (RedisError, OSError) as error:
            self.error, self.lost = unusable(error, attempt.client), is_passing(error)
            if not self.lost:
                self._close("error", error=type(self.error).__name__, message=str(self.error))
                attempt.confess()
        except Exception as error:  # noqa: BLE001 - whoever waits must learn of it, whatever it is
            self.error = LLMStreamError(f"the producer broke down: {type(error).__name__}: {error}")
        finally:
            if self.error:
                log.info("%s: left: %s", attempt.record["id"], type(self.error).__name__)
            self._note(_closed=True)
            self._close_model()
            attempt.close()
            self.done.set()

    def _begin(self) -> None:
        """Let the model speak, now that its attempt stands in Redis."""
        attempt = self.attempt
        log.info("%s: attempt %s opened", attempt.record["id"], attempt.number)
        threading.Thread(target=self._take, name=f"llmstream model {attempt.record['id']}", daemon=True).start()

    def _decide(self) -> None:
        """End the answer, or begin it anew, where that is asked for or due."""
        if self._stop:
            self._close("end", reason="cancelled")
        elif self._anew:
            self._note(_anew=False)
            self._clear()
            self.attempt.begin_anew()
            self._begin()
        elif self._is_stalled():
            self._close_model()
            self._close("error", error="Stalled", message="The source has been silent for too long: ask again.")

    def _is_stalled(self) -> bool:
        """Whether the source has been silent for longer than it may; a model that waits for Redis is not."""
        limit = self._silence[self._first_part is not None]
        return self.attempt.sent == len(self.attempt.entries) and time.monotonic() - self._last > limit

    def _rest(self) -> None:
        """Lay down the pen until there is something to write, a tick is due, or the end is asked for."""
        attempt = self.attempt
        with self._changed:
            wait = min(attempt.tick_in, self._next - time.monotonic() if self._held else math.inf)
            rest = attempt.sent == len(attempt.entries) and wait > 0 and not (self._stop or self._left or self._anew)
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

    def _opening(self, _: EntryID) -> tuple[str, dict[str, Any]]:
        own = {key: self.attempt.record.get(key, "") for key in ("model", "source")}
        return "start", own | {"at": round(time.time(), 3)} | self._about
