"""StreamView: a stream's key, live: a box for each entry, how far readers and groups are, what is pending with whom."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import islice
from typing import Any

import anywidget
import redis
import traitlets as t

from llmstream_nb.answers.ask import Answer
from llmstream_nb.answers.connection import current, names_of
from llmstream_nb.answers.read import passing_raised
from llmstream_nb.protocol.wire import EntryID, LLMStreamError
from llmstream_nb.viewing.transcript import NOTES
from llmstream_nb.widgets.bundle import bundle
from llmstream_nb.widgets.live import Live, Reader
from llmstream_nb.widgets.survey import LONGEST, fit
from llmstream_nb.widgets.watched import Watched

MOST = 60  # entries drawn
GROUPS = 8  # groups drawn
FIELDS = 20  # fields told of an entry that has many
FAST = 200  # entries a second that a page is sent; what is faster goes by unread
RATE = 3_000_000  # characters a second that a view reads, so that large entries are looked at less often
# `gone` is how many were trimmed or deleted, as Redis 7 and newer count.
NOTHING: dict[str, Any] = {"length": 0, "first": None, "last": None, "gone": 0, "groups": [], "note": ""}


class StreamReader(Reader):
    """Looks at the streams of all views in one round trip."""

    def ask(self, line: redis.Redis, views: list[StreamView]) -> list[list[Any]]:
        """For each view the replies to its commands; none while it is not due."""
        with line.pipeline(transaction=False) as pipe:
            counts = [view.look(pipe) for view in views]
            replies = iter(passing_raised(pipe.execute(raise_on_error=False)))
        return [list(islice(replies, count)) for count in counts]

    def tell(self, view: StreamView, reply: list[Any]) -> None:
        """Let the view draw it."""
        view.learn(reply)


class StreamView(Live, anywidget.AnyWidget):
    """Draws a stream as it is now, entry by entry, until `close`: `StreamView("a-key")` at the end of a cell.

    Beneath the boxes it shows how far readers are (see `cursor`), and each consumer group with its pending entries.

    Args:
        of: an `Answer`, or the key of any stream; it need not be there yet.
        newest: how many entries are drawn, 1 to 60; all are counted.
        colour: the field by whose value boxes are coloured, as `questionId` where many ask in one stream.
        readers: views whose place is shown, by their names: `{"late": AnswerView("…")}`.
        client: the Redis where the key is to be found; else that of the last `connect()`.

    Raises:
        ValueError, TypeError: `newest` is out of its range; a reader is no AnswerView.
        RedisUnusable: `client` is not given, and connecting fails.
    """

    _esm = bundle("elements.js", "kernel.js", "sight.js", "stream_view.js")
    _css = bundle("kernel.css", "stream_view.css")
    reader = StreamReader

    key = t.Unicode(help="The stream's.").tag(sync=True)
    entries: t.List[Any] = t.List(help="The newest, oldest first: ID, kind, text, its colour's value.").tag(sync=True)
    marks: t.Dict[str, Any] = t.Dict(help="What lies beside and beneath them: `NOTHING`, and readers.").tag(sync=True)
    version = t.Int(help="Counts the messages, so that a page knows when it has missed one.").tag(sync=True)

    def __init__(
        self,
        of: Answer | str,
        *,
        newest: int = 30,
        colour: str | None = None,
        readers: Mapping[str, Watched] | None = None,
        client: redis.Redis | None = None,
    ) -> None:
        if not 1 <= newest <= MOST:
            raise ValueError(f"a stream's view draws 1 to {MOST} entries, not {newest}")
        if wrong := [name for name, view in (readers or {}).items() if not isinstance(view, Watched)]:
            raise TypeError(f"of these readers views are wanted: {wrong}; any other tells its place with cursor()")
        client = of.client if isinstance(of, Answer) else client or current()
        self.newest, self.colour, self._views = newest, colour, dict(readers or {})
        self._cursors: dict[str, tuple[EntryID, list[list[str]]]] = {}  # of readers: last ID, and what `$` passed over
        self._known: tuple[list[list[str]], dict[str, Any]] = [], NOTHING  # entries and marks, as of the last look
        self._groups: list[str] = []  # those with pending entries
        self._due = 0.0  # monotonic time of the next look
        super().__init__(client, key=names_of(client).answer(of.id).chunks if isinstance(of, Answer) else of)

    def __repr__(self) -> str:
        """The same at every run: saved outputs hold it, and strict nbval compares it."""
        return "<StreamView: run the cell to see the stream>"

    def cursor(self, name: str, at: EntryID | str) -> str:
        """Show how far a reader is, and return that ID. A loop that reads calls it with each last ID.

        Args:
            name: the reader's.
            at: the last ID that it has read. `$` becomes the ID of the newest entry at this moment: call it so before
                each XREAD with `$`, and the entries which that passes over, unread, are marked.

        Raises BadEntryID; with `$`, what redis-py raises.
        """
        jumps = at == "$"
        if jumps:  # the ID that XREAD would take, also where the newest entry was deleted
            info: Any = self.client.xinfo_stream(self.key) if self.client.exists(self.key) else {}
            at = info.get("last-generated-id", "0-0")
        new = EntryID.parse(str(at) if "-" in str(at) else f"{at}-0")
        old, passed = self._cursors.get(name, (new, []))
        if jumps and old < new:
            passed = [*passed, [str(old), str(new)]][-MOST:]
        self._cursors[name] = new, passed if old <= new else []  # else it begins again
        return str(new)

    def look(self, pipe: Any) -> int:
        """Put the commands of one round into the pipeline, and return how many; 0 while no look is due."""
        if time.monotonic() < self._due:
            return 0
        oldest = self._known[0][0][0] if self._known[0] else "-"
        pipe.type(self.key)
        pipe.xinfo_stream(self.key)
        pipe.xrevrange(self.key, count=self.newest)
        pipe.xinfo_groups(self.key)
        for group in self._groups:
            pipe.xpending_range(self.key, group, oldest, "+", MOST)
        return 4 + len(self._groups)

    def learn(self, replies: list[Any]) -> None:
        """Take the replies to `look`; errors among them are raised, other than those of a key that is no stream."""
        entries, marks = self._known
        if replies and replies[0] == "stream":
            entries, marks = self._drawn(*replies[1:])
        elif replies:
            gone = "The key is gone: deleted, or expired." if marks["last"] else "No such key yet."
            other = f"The key holds a {replies[0]}, which is no stream."
            note = gone if replies[0] == "none" else other
            entries, marks = [], NOTHING | {"note": note, "last": marks["last"]}
        views = {name: (view.round.follower.cursor.after, list[list[str]]()) for name, view in self._views.items()}
        places = [(name, *place) for name, place in (views | self._cursors).items()]
        self._keep(entries, marks | {"readers": [[fit(name), str(at), passed] for name, at, passed in places]})

    def _drawn(self, info: Any, newest: Any, groups: Any, *pending: Any) -> tuple[list[list[str]], dict[str, Any]]:
        for reply in (info, newest, groups):
            if isinstance(reply, Exception):
                raise reply
        self._due = time.monotonic() + sum(len(value) for _, each in newest for value in each.values()) / RATE
        held = dict(zip(self._groups, pending, strict=True))
        self._groups = [group["name"] for group in groups if group["pending"]][:GROUPS]
        return [[entry_id, *_told(fields, self.colour)] for entry_id, fields in reversed(newest)], {
            "length": info["length"],
            "first": (info["first-entry"] or [None])[0],
            "last": info["last-generated-id"],
            "gone": max(0, info.get("entries-added", 0) - info["length"]),
            "groups": [_group(group, held.get(group["name"])) for group in groups[:GROUPS]],
            "note": "" if len(groups) <= GROUPS else f"{len(groups) - GROUPS} more groups are not drawn.",
        }

    def _keep(self, entries: list[list[str]], marks: dict[str, Any]) -> None:
        self._known = entries, marks
        self.unseen = self.unseen or self._known != (self.entries, self.marks)

    def lose(self) -> None:
        """Redis is away: what was known stands."""
        self._keep(self._known[0], self._known[1] | {"note": NOTES["away"]})

    def fail(self, error: LLMStreamError) -> None:
        """Say why there is nothing to see; the next look tries again."""
        self._keep([], NOTHING | {"note": str(error)})

    def show(self) -> None:
        """Send the entries that are new and the marks that have changed, or all of it to a page that asked."""
        whole, self.unseen, self.whole_wanted = self.whole_wanted, False, False
        (entries, marks), version = self._known, self.version + 1
        old, there = {entry[0]: entry for entry in self.entries}, {entry[0] for entry in entries}
        added = [entry for entry in entries if old.get(entry[0]) != entry]
        gone = [entry_id for entry_id in old if entry_id not in there]
        changed = {name: value for name, value in marks.items() if name not in self.marks or self.marks[name] != value}
        # Past the traits' own sync, which would send all of it each time.
        self._trait_values.update(entries=entries, marks=marks, version=version)
        if whole:
            self.send_state(["entries", "marks", "version"])
        else:
            self.send({"version": version, "added": added, "gone": gone, "marks": changed})
        self.pause = len(added) / FAST + sum(len(entry[2]) for entry in added) * 10 / RATE


def _told(fields: Mapping[str, str], colour: str | None) -> list[str]:
    """An entry's kind, its text and what it is coloured by."""
    rest = {name: value for name, value in islice(fields.items(), FIELDS) if name != colour}
    text = " ".join(f"{name[:LONGEST]}={value[:LONGEST]}" for name, value in rest.items())
    if "text" in fields or len(rest) == 1:
        text = fields.get("text", next(iter(rest.values()), ""))
    return [fit(fields.get("kind", "")), fit(text, LONGEST), fit(fields.get(colour or "", ""))]


def _group(group: Mapping[str, Any], held: Any) -> dict[str, Any]:
    """A consumer group, and its pending entries among those that are drawn: ID, consumer, times delivered."""
    held = [] if isinstance(held, Exception) else held or []  # an error: the group was deleted just now
    return {
        "name": fit(group["name"]),
        "at": group["last-delivered-id"],
        "pending": group["pending"],
        "held": [[each["message_id"], fit(each["consumer"]), each["times_delivered"]] for each in held],
    }
