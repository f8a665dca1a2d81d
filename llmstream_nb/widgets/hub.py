"""One thread per kernel reads Redis for all views that are live, and paces what they send to the browser."""

from __future__ import annotations

import threading
import time
import weakref
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Protocol

from llmstream_nb.connection import Line, is_passing, unusable
from llmstream_nb.protocol import LLMStreamError, parse_entries
from llmstream_nb.read import parse_record, queue_look, take_look

if TYPE_CHECKING:
    import redis

    from llmstream_nb.protocol import AnswerKeys
    from llmstream_nb.widgets.transcript import Transcript

COUNT = 2000  # entries a read
TICK = 0.05  # seconds between rounds while something changes, and at least between two messages of a view
SLOWEST = 0.25  # seconds between rounds when nothing has changed for some time
BUDGET = 60  # messages a second, of all views together: the notebook server drops what exceeds 1000
LOOK = 0.25  # seconds between looks at the signs of life of an answer that is silent
RETRY = 0.5  # seconds between tries to reach a lost Redis


class View(Protocol):
    """What the hub asks of a view."""

    client: redis.Redis
    redis_keys: AnswerKeys
    transcript: Transcript
    unseen: bool  # the transcript holds what the browser has not been sent
    look_at: float  # monotonic time of the next look at the signs of life
    show_at: float  # monotonic time before which nothing may be sent
    pause: float  # seconds that this view wants between two messages, beyond the hub's own pace

    def show(self) -> None:
        """Send one message to the browser."""


class Hub:
    """Reads for the views given to `watch`, which it holds weakly, until each of them has settled."""

    def __init__(self) -> None:
        self._views: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, view: View) -> None:
        """Read for this view, and let it show what is unseen. Starts the thread if it does not run."""
        with self._lock:
            self._views.add(view)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="llmstream views", daemon=True)
                self._thread.start()
        self._wake.set()

    def forget(self, view: View) -> None:
        """Read no more for this view."""
        with self._lock:
            self._views.discard(view)

    def _live(self) -> list[View]:
        """The views to read or to show; when there are none, the thread counts as ended."""
        with self._lock:
            for view in list(self._views):
                if view.transcript.settled and not view.unseen:
                    self._views.discard(view)
            if not self._views:
                self._thread = None
            return list(self._views)

    def _run(self) -> None:
        readers: dict[redis.Redis, _Reader] = {}
        changed = time.monotonic()
        while (news := self._round(readers)) is not None:
            changed = time.monotonic() if news else changed
            # The longer nothing happens, the more slowly it looks, down to SLOWEST after four seconds.
            self._wake.wait(min(SLOWEST, TICK + (time.monotonic() - changed) / 20))
            if self._wake.is_set():
                self._wake.clear()
                changed = time.monotonic()
        for reader in readers.values():
            reader.close()

    def _round(self, readers: dict[redis.Redis, _Reader]) -> bool | None:
        """Read once for each view, and show what is due. Whether there was news; None if no view is left.

        A method of its own, so that no local variable keeps a view alive between two rounds.
        """
        views = self._live()
        if not views:
            return None
        groups: dict[redis.Redis, list[View]] = defaultdict(list)
        for view in views:
            if not view.transcript.settled:
                groups[view.client].append(view)
        for client in readers.keys() - groups.keys():
            readers.pop(client).close()
        for client, group in groups.items():
            readers.setdefault(client, _Reader(client)).read(group)
        news = any(view.unseen for view in views)
        pace, now = max(TICK, len(views) / BUDGET), time.monotonic()
        for view in views:
            if view.unseen and now >= view.show_at:
                view.show_at = now + max(pace, view.pause)
                try:
                    view.show()
                except Exception:  # noqa: BLE001 - a view that can't send, e.g. closed just now, must not end the others
                    self.forget(view)
        return news


class _Reader:
    """Reads from one Redis, on one connection of its own, for all views that use this client."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._line: Line | None = None
        self._lost = False
        self._retry_at = 0.0

    def read(self, views: list[View]) -> None:
        """One pipelined, non-blocking round; every view learns what it brought, or that Redis is away."""
        if time.monotonic() < self._retry_at:
            return
        try:
            replies = self._ask(views)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the thread, but be seen
            self.close()
            if is_passing(error):
                self._lost, self._retry_at = True, time.monotonic() + RETRY
                for view in views:
                    if not view.transcript.away:
                        view.transcript.away = view.unseen = True
            elif len(views) > 1:  # which of them it was, each one's own round tells
                for view in views:
                    self.read([view])
            else:
                self._fail(views[0], error)
            return
        for view, (reply, signs) in zip(views, replies, strict=True):
            if self._lost:
                view.transcript.follower.reconnected(time.monotonic())
            try:
                self._tell(view, reply, signs)
            except Exception as error:  # noqa: BLE001 - one view's bad stream is no other's
                self._fail(view, error)
        self._lost = False

    def close(self) -> None:
        """Give the connection back; the next read opens another."""
        if self._line:
            self._line.close()
        self._line = None

    def _ask(self, views: list[View]) -> list[tuple[Any, list[Any]]]:
        """For each view: the reply to its XREAD, and if a look was due, the four replies to that."""
        self._line = self._line or Line(self._client)
        now = time.monotonic()
        looks = [now >= view.look_at for view in views]
        with self._line.redis.pipeline(transaction=False) as pipe:
            for view, look in zip(views, looks, strict=True):
                follower = view.transcript.follower
                pipe.xread({view.redis_keys.chunks: str(follower.cursor.after)}, count=COUNT)
                if look:
                    view.look_at = now + LOOK
                    queue_look(pipe, view.redis_keys, follower)
            replies = pipe.execute(raise_on_error=False)
        for reply in replies:
            if isinstance(reply, Exception) and is_passing(reply):
                raise reply
        rest = iter(replies)
        return [(next(rest), [next(rest) for _ in range(4 * look)]) for look in looks]

    def _tell(self, view: View, reply: Any, signs: list[Any]) -> None:
        transcript, follower = view.transcript, view.transcript.follower
        for part in (reply, *signs):
            if isinstance(part, Exception):
                raise part
        before = transcript.state, transcript.note
        transcript.away = False
        entries = parse_entries(reply[0][1]) if reply else []
        events = follower.feed(entries) if entries else take_look(signs, follower) if signs else []
        transcript.take(events)
        if follower.done and not transcript.settled and signs and not events:
            transcript.mend(parse_record(signs[2]), leased=bool(signs[1]))
            view.unseen = True
        if events or before != (transcript.state, transcript.note):
            view.unseen = True

    def _fail(self, view: View, error: Exception) -> None:
        view.transcript.fail(error if isinstance(error, LLMStreamError) else unusable(error, self._client))
        view.unseen = True


hub = Hub()
