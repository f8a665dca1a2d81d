"""Monitor: what goes on under a prefix, live: the pool's queue, its workers, and the newest answers."""

from __future__ import annotations

import time
from typing import Any

import anywidget
import redis
import traitlets as t

from llmstream_nb.answers.connection import current, names_of
from llmstream_nb.protocol.wire import LLMStreamError
from llmstream_nb.viewing.transcript import NOTES
from llmstream_nb.widgets.bundle import bundle
from llmstream_nb.widgets.live import Live, Reader
from llmstream_nb.widgets.survey import Survey

EVERY = 0.5  # seconds between two samples


class Sampler(Reader):
    """Takes one sample for all monitors that use this client."""

    def __init__(self, client: redis.Redis) -> None:
        super().__init__(client)
        self._survey = Survey(client)
        self._due = 0.0

    def read(self, views: list[Monitor]) -> None:
        """Sample, if it is time to."""
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + EVERY
            super().read(views)

    def ask(self, line: redis.Redis, views: list[Monitor]) -> list[dict[str, Any]]:
        """The same sample for every monitor."""
        return [self._survey.sample(line, max(view.limit for view in views), self.lost)] * len(views)

    def tell(self, view: Monitor, reply: dict[str, Any]) -> None:
        """Each takes of it what it shows."""
        view.learn(reply | {"answers": reply["answers"][: view.limit]})


class Monitor(Live, anywidget.AnyWidget):
    """Shows the pool's queue and workers and the newest answers, twice a second, until `close`.

    Sends nothing while nothing changes; ages grow in the browser.

    Args:
        client: the Redis to watch, under its prefix; else that of the last `connect()`.
        limit: how many answers to show.

    Raises:
        ValueError: `limit` is less than 1.
        RedisUnusable: `client` is not given, and connecting fails.
    """

    _esm = bundle("elements.js", "kernel.js", "sight.js", "monitor.js")
    _css = bundle("states.css", "kernel.css", "monitor.css")
    reader = Sampler

    prefix = t.Unicode(help="First part of every key.").tag(sync=True)
    waiting = t.Int(None, allow_none=True, help="Questions in the queue that no worker has taken.").tag(sync=True)
    answering = t.Int(None, allow_none=True, help="Those that a worker holds.").tag(sync=True)
    failures = t.Int(None, allow_none=True, help="Questions given up.").tag(sync=True)
    consumers: t.List[Any] = t.List(help="The group's; see `Workers.judge`.").tag(sync=True)
    answers: t.List[Any] = t.List(help="The newest first; see `Item.row`.").tag(sync=True)
    note = t.Unicode(help="What keeps the rest from being the whole truth.").tag(sync=True)
    now = t.Float(help="Unix time in the kernel when this was sent: a browser's clock may differ.").tag(sync=True)

    def __init__(self, *, client: redis.Redis | None = None, limit: int = 20) -> None:
        if limit < 1:
            raise ValueError("a monitor shows at least 1 answer")
        client = client or current()
        self.limit = limit
        self._known: dict[str, Any] = {}  # trait -> what the last sample told
        super().__init__(client, prefix=names_of(client).prefix)

    def __repr__(self) -> str:
        """The same at every run: saved outputs hold it, and strict nbval compares it."""
        return "<Monitor: run the cell to see what goes on>"

    def learn(self, known: dict[str, Any]) -> None:
        """Take what is known now; called in the hub's thread."""
        self._known = known
        self.unseen = self.unseen or any(getattr(self, name) != value for name, value in known.items())

    def lose(self) -> None:
        """Redis is away: what was known stands, but nothing moves."""
        still = [row | {"rate": None} for row in self.answers]
        self.learn({"answers": still, "note": NOTES["away"]})

    def fail(self, error: LLMStreamError) -> None:
        """Say why there is nothing to see; the next sample tries again."""
        self.learn({"note": str(error)})

    def show(self) -> None:
        """Send what has changed, and all of it to a page that asked."""
        whole, self.unseen, self.whole_wanted = self.whole_wanted, False, False
        with self.hold_sync():
            for name, value in self._known.items():
                setattr(self, name, value)
            self.now = time.time()
        if whole:
            self.send_state([*self._known, "now"])
