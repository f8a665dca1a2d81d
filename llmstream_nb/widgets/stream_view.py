"""StreamView: a stream's key, live: a box for each entry, how far readers and groups are, what is pending with whom."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import islice
from typing import Any

import anywidget
import redis
import traitlets as t
from redis.exceptions import ResponseError

from llmstream_nb.answers.ask import Answer
from llmstream_nb.answers.connection import current, names_of
from llmstream_nb.answers.read import passing_raised
from llmstream_nb.protocol.wire import EntryID, LLMStreamError, clean
from llmstream_nb.viewing.transcript import NOTES
from llmstream_nb.widgets.bundle import bundle
from llmstream_nb.widgets.live import Live, Reader
from llmstream_nb.widgets.watched import Watched

MOST = 60  # entries drawn
GROUPS = 8  # groups drawn
FIELDS = 20  # fields told of an entry that has many
LONGEST = 1000  # characters told of an entry; of names, a tenth
RATE = 3_000_000  # characters a second that a view reads, so that large entries are looked at less often


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
        readers: names of readers, and for each what `cursor` takes.
        client: the Redis where the key is to be found; else that of the last `connect()`.

    Raises:
        ValueError: `newest` is out of its range.
        BadEntryID: a reader is at something that is no ID.
        RedisUnusable: `client` is not given, and connecting fails.
    """

    _esm = bundle("elements.js", "stream_view.js")
    _css = bundle("stream_view.css")
    reader = StreamReader

    key = t.Unicode(help="The stream's.").tag(sync=True)
    entries: t.List[Any] = t.List(help="The newest, oldest first: ID, kind, text, what it is coloured by.").tag(
        sync=True
    )
    marks: t.Dict[str, Any] = t.Dict(help="What lies beside and beneath them; see `_marks`.").tag(sync=True)
    version = t.Int(help="Counts the messages, so that a page knows when it has missed one.").tag(sync=True)

    def __init__(
        self,
        of: Answer | str,
        *,
        newest: int = 30,
        colour: str | None = None,
        readers: Mapping[str, Watched | EntryID | str] | None = None,
        client: redis.Redis | None = None,
    ) -> None:
        if not 1 <= newest <= MOST:
            raise ValueError(f"a stream's view draws 1 to {MOST} entries, not {newest}")
        client = of.client if isinstance(of, Answer) else client or current()
        self.newest, self.colour = newest, colour
        self._readers: dict[str, tuple[Any, tuple[tuple[str, str], ...]]] = {}  # where each is, and what `$` left out
        self._known: tuple[list[list[str]], dict[str, Any]] = [], {}  # entries and marks, as of the last look
        self._groups: list[str] = []  # those with pending entries
        self._due = 0.0  # monotonic time of the next look
        super().__init__(client, key=names_of(client).answer(of.id).chunks if isinstance(of, Answer) else of)
        for name, at in (readers or {}).items():
            self.cursor(name, at)

    def __repr__(self) -> str:
        """The same at every run: saved outputs hold it, and strict nbval compares it."""
        return "<StreamView: run the cell to see the stream>"

    def cursor(self, name: str, at: Watched | EntryID | str) -> str:
        """Show how far a reader is, and return that ID. A loop of your own calls it with each ID that it has read.

        Args:
            name: the reader's.
            at: the last ID that it has read, or the `AnswerView` that reads. `$` becomes the ID of the newest entry at
                this moment; call it so before each XREAD with `$`, and the entries which that leaves out are marked.

        Raises BadEntryID; with `$`, what redis-py raises.
        """
        old, skipped = self._place(name) if name in self._readers else ("", ())
        if isinstance(at, Watched):
            self._readers[name] = at, ()
            return self._place(name)[0]
        new = _parse(self._newest_id() if at == "$" else str(at))
        if old and at == "$" and new > _parse(old):
            skipped = (*skipped[1 - MOST :], (old, str(new)))
        elif old and new < _parse(old):
            skipped = ()  # it begins again
        self._readers[name] = str(new), skipped
        return str(new)

    def _place(self, name: str) -> tuple[str, tuple[tuple[str, str], ...]]:
        at, skipped = self._readers[name]
        return str(at.round.follower.cursor.after) if isinstance(at, Watched) else at, skipped

    def _newest_id(self) -> str:
        try:
            info: Any = self.client.xinfo_stream(self.key)
        except ResponseError as error:
            if "no such key" not in str(error):
                raise
            return "0-0"
        return str(info["last-generated-id"])

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
        """Take the replies to `look`. Errors among them are raised, if they are not about a key that is no stream."""
        entries, marks = self._known
        if replies:
            kind, *rest = replies
            if kind == "stream":
                entries, marks = self._drawn(*rest)
            elif kind == "none":
                gone = "The key is gone: deleted, or expired." if marks.get("last") else "No such key yet."
                entries, marks = [], {"length": 0, "note": gone, "last": marks.get("last")}
            else:
                entries, marks = [], {"length": 0, "note": f"The key holds a {kind}, which is no stream."}
        readers = [[_cut(name), *self._place(name)] for name in list(self._readers)]
        self._keep(entries, marks | {"readers": [[name, at, [*map(list, left)]] for name, at, left in readers]})

    def _drawn(self, info: Any, newest: Any, groups: Any, *pending: Any) -> tuple[list[list[str]], dict[str, Any]]:
        for reply in (info, newest, groups):
            if isinstance(reply, Exception):
                raise reply
        self._due = time.monotonic() + sum(len(value) for _, each in newest for value in each.values()) / RATE
        held = dict(zip(self._groups, pending, strict=False))
        self._groups = [group["name"] for group in groups if group["pending"]][:GROUPS]
        added, length = info.get("entries-added"), info["length"]
        return (
            [[str(id), *_told(fields, self.colour)] for id, fields in reversed(newest)],
            {
                "length": length,
                "last": info["last-generated-id"],
                "first": (info["first-entry"] or [None])[0],
                "gone": None if added is None else max(0, added - length),  # told by Redis 7 and newer
                "groups": [_group(group, held.get(group["name"])) for group in groups[:GROUPS]],
                "note": "" if len(groups) <= GROUPS else f"{len(groups) - GROUPS} more groups are not drawn.",
            },
        )

    def _keep(self, entries: list[list[str]], marks: dict[str, Any]) -> None:
        self._known = entries, marks
        self.unseen = self.unseen or self._known != (self.entries, self.marks)

    def lose(self) -> None:
        """Redis is away: what was known stands."""
        self._keep(self._known[0], self._known[1] | {"note": NOTES["away"]})

    def fail(self, error: LLMStreamError) -> None:
        """Say why there is nothing to see; the next look tries again."""
        self._keep([], {"length": 0, "note": str(error)})

    def show(self) -> None:
        """Send the entries that are new and the marks that have changed, or all of it to a page that asked."""
        whole, self.unseen, self.whole_wanted = self.whole_wanted, False, False
        (entries, marks), version = self._known, self.version + 1
        old, new = ({entry[0]: entry for entry in each} for each in (self.entries, entries))
        delta = {
            "version": version,
            "added": [entry for entry in entries if old.get(entry[0]) != entry],
            "gone": [id for id in old if id not in new],
            "marks": {name: value for name, value in marks.items() if self.marks.get(name) != value},
            "less": [name for name in self.marks if name not in marks],
        }
        # Past the traits' own sync, which would send all of it each time.
        self._trait_values.update(entries=entries, marks=marks, version=version)
        if whole:
            self.send_state(["entries", "marks", "version"])
        else:
            self.send(delta)
        self.pause = sum(len(entry[2]) for entry in delta["added"]) * 10 / RATE


def _parse(text: str) -> EntryID:
    """An ID as XREAD takes it: `0` is `0-0`."""
    return EntryID.parse(text if "-" in text else f"{text}-0")


def _told(fields: Mapping[str, str], colour: str | None) -> list[str]:
    """An entry's kind, its text and what it is coloured by."""
    rest = {name: value for name, value in islice(fields.items(), FIELDS + 1) if name != colour}
    if "text" in fields:
        text = fields["text"]
    elif len(rest) == 1:
        text = next(iter(rest.values()))
    else:
        text = " ".join(f"{name[:LONGEST]}={value[:LONGEST]}" for name, value in rest.items())
    return [_cut(fields.get("kind", "")), _cut(text, LONGEST), _cut(fields.get(colour or "", ""))]


def _group(group: Mapping[str, Any], held: Any) -> dict[str, Any]:
    """A consumer group, and its pending entries among those that are drawn: ID, consumer, times delivered."""
    held = [] if held is None or isinstance(held, Exception) else held  # an error: the group was deleted just now
    return {
        "name": _cut(group["name"]),
        "at": group["last-delivered-id"],
        "pending": group["pending"],
        "held": [[each["message_id"], _cut(each["consumer"]), each["times_delivered"]] for each in held],
    }


def _cut(text: str, longest: int = LONGEST // 10) -> str:
    """Text of any origin, short enough and of characters that reach the browser."""
    shown = clean(str(text)[: longest + 1])
    return shown if len(shown) <= longest else shown[:longest] + "…"
