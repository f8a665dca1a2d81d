"""One thread per kernel reads Redis for all views that are live, and paces what they send to the browser."""

from __future__ import annotations

import threading
import time
import weakref
from collections import defaultdict
from contextlib import suppress
from typing import Any

import ipywidgets
import redis

from llmstream_nb.answers.connection import Line, is_passing
from llmstream_nb.protocol.wire import LLMStreamError
from llmstream_nb.viewing.broken import explained

TICK = 0.05  # seconds between rounds while something changes, and at least between two messages of a view
SLOWEST = 0.25  # seconds between rounds when nothing has changed for some time
BUDGET = 60  # messages a second, of all views together: the notebook server drops what exceeds 1000
RETRY = 0.5  # seconds between tries to reach a lost Redis


class Hub:
    """Reads for the views given to `watch`, which it holds weakly, until each of them has settled or is closed.

    Nothing that a widget's `close` does may take the lock: the garbage collector can call it at any moment.
    """

    def __init__(self) -> None:
        self._views: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, view: Live) -> None:
        """Read for this view, and let it show what is unseen. Starts the thread if it does not run."""
        with self._lock:
            self._views.add(view)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="llmstream views", daemon=True)
                self._thread.start()
        self._wake.set()

    def _run(self) -> None:
        readers: dict[tuple[type[Reader], redis.Redis], Reader] = {}
        changed = time.monotonic()
        try:
            while (news := self._round(readers)) is not None:
                changed = time.monotonic() if news else changed
                # The longer nothing happens, the more slowly it looks, down to SLOWEST after four seconds.
                if self._wake.wait(min(SLOWEST, TICK + (time.monotonic() - changed) / 20)):
                    self._wake.clear()
                    changed = time.monotonic()
        except Exception as error:  # noqa: BLE001 - views must not stand still unsaid; the next one starts it anew
            with self._lock:
                views, self._thread = list(self._views), None
                self._views.clear()
            for view in views:
                with suppress(Exception):
                    view.fail(explained(error, view.client, "all views"))
                    view.show()
        for reader in readers.values():
            reader.close()

    def _round(self, readers: dict[tuple[type[Reader], redis.Redis], Reader]) -> bool | None:
        """Read once for each view, and show what is due. Whether there was news; None if no view is left.

        A method of its own, so that no local variable keeps a view alive between two rounds.
        """
        with self._lock:
            for view in list(self._views):
                if view.closed or (view.settled and not view.unseen):
                    self._views.discard(view)
            views: list[Live] = list(self._views)
            if not views:
                self._thread = None  # it counts as ended
                return None
        groups: dict[tuple[type[Reader], redis.Redis], list[Live]] = defaultdict(list)
        for view in views:
            if not view.settled:
                groups[view.reader, view.client].append(view)
        for key in readers.keys() - groups.keys():
            readers.pop(key).close()
        for (kind, client), group in groups.items():
            readers.setdefault((kind, client), kind(client)).read(group)
        news = any(view.unseen for view in views)
        pace, now = max(TICK, len(views) / BUDGET), time.monotonic()
        for view in views:
            if view.unseen and now >= view.show_at:
                view.show_at = now + max(pace, view.pause)
                try:
                    view.show()
                except Exception as error:  # noqa: BLE001 - a view that can't send, e.g. closed just now, must not end the others
                    if not view.closed:
                        explained(error, view.client, repr(view))
                    view.closed = True
        return news


class Reader:
    """Reads from one Redis, on one connection of its own, for all views of a kind that use this client."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.lost = False  # Redis was away at the last try
        self._line = Line(client)
        self._retry_at = 0.0

    def read(self, views: list[Any]) -> None:
        """One round without waiting; every view learns what it brought, or that Redis is away."""
        if time.monotonic() < self._retry_at:
            return
        try:
            replies = self.ask(self._line.redis, views)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the thread, but be seen
            self._line.reopen()
            if is_passing(error, self._line.worked):
                self.lost, self._retry_at = True, time.monotonic() + RETRY
                for view in views:
                    view.lose()
            elif len(views) > 1:  # which of them it was, each one's own round tells
                for view in views:
                    self.read([view])
            else:
                self._fail(views[0], error)
            return
        for view, reply in zip(views, replies, strict=True):
            try:
                self.tell(view, reply)
            except Exception as error:  # noqa: BLE001 - one view's bad stream is no other's
                self._fail(view, error)
        self.lost = False

    def close(self) -> None:
        """Give the connection back."""
        self._line.close()

    def ask(self, line: redis.Redis, views: list[Any]) -> list[Any]:
        """Return for each view what `tell` is to be given; errors of Redis pass."""
        raise NotImplementedError

    def tell(self, view: Any, reply: Any) -> None:
        """Let a view know; what this raises is shown in that view."""

    def _fail(self, view: Live, error: Exception) -> None:
        view.fail(explained(error, self.client, repr(view)))


hub = Hub()


class Live(ipywidgets.Widget):  # type: ignore[misc]
    """A widget for which the hub reads from its first moment until it has settled, or `close`."""

    reader: type[Reader]  # what reads for all widgets of this kind

    def __init__(self, client: redis.Redis, **traits: Any) -> None:
        self.client = client
        self.unseen = True  # there is something that the browser has not been sent
        self.whole_wanted = False  # a page lacks more than that
        self.closed = False  # read for it no more
        self.show_at = 0.0  # monotonic time before which nothing may be sent
        self.pause = 0.0  # seconds that this widget wants between two messages, beyond the hub's own pace
        super().__init__(**traits)
        self.on_msg(self._asked_for_all)
        hub.watch(self)

    @property
    def settled(self) -> bool:
        """Whether nothing will change any more."""
        return False

    def show(self) -> None:
        """Send one message to the browser; this and the next two are called in the hub's thread."""

    def lose(self) -> None:
        """Redis can't be reached at the moment."""

    def fail(self, error: LLMStreamError) -> None:
        """Reading is not possible, and this is why."""

    def _asked_for_all(self, *_: Any) -> None:
        """A page that was just loaded, or that missed something, asks for the whole state."""
        self.whole_wanted = self.unseen = True
        hub.watch(self)  # only its thread sends, also once settled, so that nothing old overtakes the new

    def close(self) -> None:
        """Take the widget off the page, and stop reading for it."""
        self.closed = True
        super().close()
