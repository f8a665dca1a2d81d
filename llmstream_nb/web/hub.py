"""One reader for all viewers: reads each watched answer once, however many watch it."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import suppress
from math import inf
from operator import attrgetter
from typing import Any, NamedTuple

import redis

from llmstream_nb.answers.connection import LOST, async_client, is_passing, names_of, unusable
from llmstream_nb.answers.read import asend, asend_all
from llmstream_nb.protocol.events import Event
from llmstream_nb.protocol.follow import Follower
from llmstream_nb.protocol.round import COUNT, Round
from llmstream_nb.protocol.wire import ORIGIN, AnswerNotFound, EntryID, Signs, Timing
from llmstream_nb.viewing.broken import explained
from llmstream_nb.web.sse import Frame, Wire

TICK = 0.02  # seconds between two rounds while something changes
SLOWEST = 0.1  # the same when nothing has changed for a few seconds
RETRY = 0.5  # seconds between tries to reach a lost Redis
WINDOW = 256_000  # bytes of an answer's newest frames that are kept for its viewers
PAGE = 64_000  # bytes written to a viewer at once; it has to take them before it gets more
CATCH_UP = 3  # connections for all viewers who are behind
HEALTHY = 3.0  # seconds in which a Redis that is well says so
FEW = 100  # entries in a viewer's first read; the next ones are as large as what it takes at once


class View(NamedTuple):
    """Which answer is watched, on which wire, and from where on that has to know its entries."""

    answer_id: str
    wire: type[Wire] = Wire
    start: EntryID = ORIGIN  # for a wire that needs an attempt from its first entry on
    seen: int = -1  # the last number that the viewer has, where the wire counts
    record: Mapping[str, Any] = {}
    question: str = ""  # the question's nonce: who watches another one of the same id has nothing in common

    @property
    def key(self) -> tuple[Any, ...]:
        """What viewers have in common who can be served together."""
        return self.answer_id, self.wire, self.start, self.question

    def writer(self) -> Wire:
        """What writes its frames."""
        return self.wire(self.answer_id, self.record)


class Page(NamedTuple):
    """What a viewer has read for itself: the frames, of how many entries, and the last one of these."""

    frames: list[Frame]
    entries: int
    top: EntryID


class Channel:
    """One answer that somebody watches, on one wire: its newest frames, for all viewers in common."""

    def __init__(self, one: Round, wire: Wire) -> None:
        self.round, self.follower, self.wire = one, one.follower, wire
        self.viewers = 0
        self.dead_since = 0.0  # monotonic time since when it is interrupted; 0: it is not
        self.last: Frame | None = None  # what ends it
        self.state = ""  # queued, streaming or interrupted, once it is known
        self._base = self.top  # who has seen this entry, or a later one, goes on from the frames
        self._frames: list[Frame] = []
        self._size = 0
        self.news = asyncio.Event()  # there is something to look at

    @property
    def top(self) -> EntryID:
        """The last entry that was read."""
        return self.follower.cursor.after

    def take(self, events: list[Event]) -> None:
        """Add what was read, let go of the oldest frames, and wake the viewers."""
        for made in self.wire.frames(events):
            if made.final:
                self.last = made
                continue
            self._frames.append(made)
            self._size += len(made.data)
        while self._size > WINDOW:
            oldest = self._frames.pop(0)
            self._base = oldest.id  # who has not seen it has to read for itself
            self._size -= len(oldest.data)
        self.wake()

    def after(self, place: EntryID) -> list[Frame] | None:
        """The frames for a viewer at this place, but for the last one; None if it has to read for itself first."""
        return None if place < self._base else self._frames[bisect_right(self._frames, place, key=attrgetter("id")) :]

    def wake(self) -> None:
        """Let all viewers look."""
        self.news.set()
        self.news = asyncio.Event()


class Viewer:
    """One who watches an answer, and has seen everything up to `place`.

    It first reads for itself what it lacks. Then it goes on with all others from the channel's frames. One who does
    not take what is sent falls behind, and must read for itself again: nothing is kept for it.
    """

    def __init__(self, hub: Hub, view: View, place: EntryID, top: EntryID) -> None:
        self.hub, self.view, self.place, self._top = hub, view, place, top
        self.wire = view.writer()
        self._own: tuple[Wire, EntryID] | None = None  # with which it reads for itself, and how far it has come
        self.done, self._told = False, view.seen >= 0  # whether it has anything of the answer
        self.channel: Channel | None = None
        self._state = ""  # the last one that was sent
        self._count = FEW  # entries that it reads for itself
        self._lost = False  # Redis was out of reach when it read for itself
        self._sent = self._moved = time.monotonic()  # when it was given anything, and when it was given entries

    async def next(self) -> bytes:
        """Wait for what comes next, and return it; empty when it is time to look again."""
        ready, most = self._waiting(), float(PAGE)
        if not ready and (ready := await self._read()):
            most = inf if self.wire.whole else PAGE  # what it leaves it had to translate again, from the first on
        ready = ready or self._waiting()
        now = time.monotonic()
        if ready:
            count, size = 0, 0
            if self._is_void(ready[0]):
                self.done = True
                return self.wire.again(ready[0].id).data
            # An entry's frames go together: its ID stands for all of them.
            while count < len(ready) and (size < most or ready[count].id == ready[count - 1].id):
                size += len(ready[count].data)
                count += 1
            self.place, self.done, self._sent, self._moved = ready[count - 1].id, ready[count - 1].final, now, now
            self._told = True
            return b"".join(one.data for one in ready[:count])
        if last := self._last(now):
            self.done = True
            return last
        state = self.channel.state if self.channel and not (self.hub.away or self._lost) else "away"
        if state and state != self._state:
            self._state, self._sent = state, now
            return self.wire.state(state)
        if now - self._sent >= self.hub.keep_alive:
            self._sent = now
            return self.wire.alive
        if self.channel and self._waiting() is not None:
            await self.channel.news.wait()
        return b""

    def _waiting(self) -> list[Frame] | None:
        """What the channel has for it; None where it has to read for itself."""
        waiting = self.channel.after(self.place) if self.channel else None
        return waiting and [one for one in waiting if one.number > self.view.seen]

    async def _read(self) -> list[Frame]:
        """Read for itself, where the channel can't serve it."""
        view, channel = self.view, self.channel
        if self.wire.whole and not channel:
            self.channel = self.hub.join(view, view.start)
        if self._waiting() is not None:
            self._lost, self._own = False, None
            return []
        wire, at = (self._own or (view.writer(), view.start)) if self.wire.whole else (self.wire, self.place)
        page = await self.hub.page(view.answer_id, at, count := self._count, wire)
        self._lost = page is None
        found, read, top = page or Page([], 0, at)
        self._own = (wire, top) if page else self._own
        if found:
            # At least 2: a start that goes on makes no frame before the entry behind it is read, too.
            self._count = max(2, min(COUNT, PAGE * read // sum(len(one.data) for one in found)))
        if not channel and page and len(found) < count:
            self.channel = self.hub.join(view, min(found[-1].id if found else self.place, self._top))
        elif not (found or read):
            await asyncio.sleep(RETRY)  # Redis is away, or this viewer waits for what Redis has lost
        return [one for one in found if one.number > view.seen and one.id > self.place]

    def _is_void(self, made: Frame) -> bool:
        """Whether it belongs to an attempt, or another question, that does not go on from what the viewer has seen."""
        return self._told and made.begun > self.place.attempt

    def _last(self, now: float) -> bytes | None:
        """What ends the stream, if it is at its end."""
        channel = self.channel
        if not channel:
            return None
        ahead = self.place > channel.top
        if not ahead and self._waiting() is not None:
            if channel.last and self._is_void(channel.last):
                return self.wire.again(channel.last.id).data
            return channel.last.data if channel.last else None
        if self.hub.away or self._lost:
            self._moved = now
        if (ahead and channel.last) or now - self._moved > self.hub.timing.patience:  # Redis lacks what it waits for
            nothing = f"this answer has nothing at {self.place}: reload it from its beginning"
            return self.wire.failure("Ahead", nothing, self.place, self.view.seen).data
        return None


class Hub:
    """Reads for all viewers of a process, on one connection, and on a few more for those who are behind."""

    def __init__(
        self, client: redis.Redis, timing: Timing, keep_alive: float, at_end: Callable[[], Awaitable[None]]
    ) -> None:
        self.client, self.timing, self.keep_alive = client, timing, keep_alive
        self.names = names_of(client)
        self.viewers = 0  # streams that are open
        self.closing = False
        self.away = False  # Redis was out of reach at the last try
        self._channels: dict[tuple[Any, ...], Channel] = {}  # by answer, wire and start
        self._line, self._pool = async_client(client, 1), async_client(client, CATCH_UP)
        self._turn = asyncio.Semaphore(CATCH_UP)
        self._task: asyncio.Task[None] | None = None
        self.life = asyncio.create_task(self._live(at_end))

    def end(self) -> None:
        """End all viewers' streams; browsers come back by themselves."""
        self.closing = True
        self._wake_all()

    async def close(self) -> None:
        """Stop reading, and give the connections back."""
        self.life.cancel()
        await asyncio.wait([self.life])

    async def _live(self, at_end: Callable[[], Awaitable[None]]) -> None:
        """Wait for `close`, or for the end of the event loop, which cancels all its tasks."""
        try:
            await asyncio.Event().wait()
        finally:
            self.end()
            if self._task:
                self._task.cancel()
                await asyncio.wait([self._task])
            for line in (self._line, self._pool):
                with suppress(*LOST):
                    await line.aclose()
            await at_end()

    async def answers(self) -> bool:
        """Whether Redis answers, and in time."""
        with suppress(*LOST):
            async with asyncio.timeout(HEALTHY), self._turn:
                await self._pool.ping()
                return True
        return False

    # For each viewer

    async def place(self, answer_id: str, seen: EntryID = ORIGIN) -> tuple[EntryID, bool, Signs]:
        """Where an answer stands, for one who has seen so much: its last entry, whether that is its end, and the look.

        Raises AnswerNotFound, NotAnAnswer, RedisUnusable.
        """
        one = Round(self.names.answer(answer_id), Follower(answer_id, seen))
        try:
            async with self._turn:
                signs = Signs.parse(await asend(self._pool, one.look()))
        except LOST as error:
            raise unusable(error, self.client) from None
        top, record = signs.top, signs.record or {}
        if not top and signs.record is None:
            raise AnswerNotFound(f"there is no answer {answer_id!r}: never asked, cleared, or expired")
        end = record.get("end") or ""
        last, final = (top.id, top.final) if top else (EntryID.parse(end or str(ORIGIN)), bool(end))
        return last, final, signs

    async def stream(self, view: View, after: EntryID, top: EntryID) -> AsyncGenerator[bytes]:
        """What to send to a viewer who has seen `after`, until the end. `top` is the last entry that `place` saw."""
        viewer = Viewer(self, view, after, top)
        try:
            yield viewer.wire.hello
            while not (viewer.done or self.closing):
                piece = await viewer.next()
                for at in range(0, len(piece), PAGE):  # a viewer has to take one before it gets the next
                    yield piece[at : at + PAGE]
            if not viewer.done:
                yield viewer.wire.cut()
        except Exception as error:  # noqa: BLE001 - whatever an entry brought about, its viewers must see it
            yield self._failed(viewer.wire, error, view.answer_id, viewer.place, view.seen).data
        finally:
            if viewer.channel:
                viewer.channel.viewers -= 1

    # What viewers use

    async def page(self, answer_id: str, place: EntryID, count: int, wire: Wire) -> Page | None:
        """The next entries after this place, at most `count`, as frames; None while Redis is away."""
        one = Round(self.names.answer(answer_id), Follower(answer_id, place), count)
        try:
            async with self._turn:
                replies = await asend(self._pool, [one.read()])
                if not one.entries(replies[0]):
                    replies += await asend(self._pool, one.look())
        except LOST as error:
            if is_passing(error):
                return None
            raise unusable(error, self.client) from None
        made = list(wire.frames(one.hear(replies, time.monotonic())))
        return Page(made, len(one.entries(replies[0])), one.follower.cursor.after)

    def join(self, view: View, place: EntryID) -> Channel:
        """The answer's channel on this wire; a new one reads on from this place."""
        channel = self._channels.get(view.key)
        if channel is None:
            one = Round(self.names.answer(view.answer_id), Follower(view.answer_id, place, self.timing))
            channel = self._channels[view.key] = Channel(one, view.writer())
        channel.viewers += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return channel

    # For all of them

    async def _run(self) -> None:
        changed = woken = time.monotonic()
        try:
            while self._channels:
                now = time.monotonic()
                if now - woken >= self.keep_alive / 2:
                    woken = now
                    self._wake_all()
                pause = min(SLOWEST, TICK + (now - changed) / 50)
                try:
                    changed = now if await self._round() else changed
                except LOST as error:  # what concerns one answer alone is not raised
                    if not is_passing(error):
                        raise unusable(error, self.client) from None
                    changed, pause, self.away = now, RETRY, True
                    self._wake_all()
                self._channels = {key: one for key, one in self._channels.items() if one.viewers and not one.last}
                await asyncio.sleep(pause)
        except Exception as error:  # noqa: BLE001 - those who watch must learn of it; the next viewer starts it anew
            for channel in self._channels.values():
                channel.last = self._failed(channel.wire, error, "all that is watched", channel.top)
            self._wake_all()
            self._channels = {}
        self.away = False  # nobody asks any more

    def _wake_all(self) -> None:
        for channel in self._channels.values():
            channel.wake()

    async def _round(self) -> bool:
        """Read once for each channel; whether there was news."""
        now, channels = time.monotonic(), list(self._channels.values())
        replies = await asend_all(self._line, [channel.round.ask(now) for channel in channels])
        if self.away:
            self.away = False
            for channel in channels:
                channel.follower.reconnected(time.monotonic())
                channel.wake()
        news = [self._tell(channel, reply) for channel, reply in zip(channels, replies, strict=True)]
        return any(news)

    def _tell(self, channel: Channel, replies: list[Any]) -> bool:
        """Give a channel what was read for it; whether there was news."""
        follower, state = channel.follower, channel.state
        try:
            events = channel.round.hear(replies, time.monotonic())
            now, dead = time.monotonic(), follower.state == "interrupted"
            channel.dead_since = (channel.dead_since or now) if dead else 0.0
            if dead and now - channel.dead_since > self.timing.patience:
                gone = "its producer died, and nobody took over: stop it to keep the text, or ask again"
                channel.last = channel.wire.failure("Interrupted", gone, channel.top)
            if not follower.done and (dead or not follower.suspect):
                channel.state = follower.state
            if events or channel.state != state or channel.last:
                channel.take(events)
            return bool(events)
        except Exception as error:  # noqa: BLE001 - it ends this answer's streams, and no other's
            channel.last = self._failed(channel.wire, error, follower.answer_id, channel.top)
            channel.wake()
            return True

    def _failed(self, wire: Wire, error: Exception, what: str, place: EntryID, seen: int = -1) -> Frame:
        """What ends the streams of an answer after this error."""
        told = explained(error, self.client, what)
        return wire.failure(type(told).__name__, str(told), place, seen)
