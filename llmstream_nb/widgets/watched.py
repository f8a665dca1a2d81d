"""How views of an answer are read for: entry by entry, or through a consumer group of their own."""

from __future__ import annotations

import time
from typing import Any

import redis
import traitlets as t

from llmstream_nb.answers.ask import Answer
from llmstream_nb.answers.connection import current, names_of
from llmstream_nb.answers.read import queue_look, take_look
from llmstream_nb.answers.record import parse_record
from llmstream_nb.pool.groups import GroupGone, check_name, create_group, is_gone
from llmstream_nb.protocol.wire import ORIGIN, AnswerNotFound, EntryID, LLMStreamError, RawEntry, parse_entries
from llmstream_nb.viewing.transcript import Transcript
from llmstream_nb.widgets.live import Live, Reader, execute

COUNT = 2000  # entries a read
LOOK = 0.25  # seconds between looks at the signs of life of an answer that is silent
CONSUMER = "view"  # the one consumer of a view's group


def _is_whole(record: Any) -> bool:
    """Whether a record has all of an ended answer."""
    return bool(record and record.get("end") and isinstance(record.get("text"), str) and not record.get("missing"))


class AnswerReader(Reader):
    """Reads with XREAD, and looks for signs of life where nothing comes."""

    at_once = True  # an ended answer is shown from its record, however many entries it has

    def ask(self, line: redis.Redis, views: list[Watched]) -> list[tuple[Any, list[Any]]]:
        """For each view: the reply to its read, and if a look was due, the four replies to that."""
        now = time.monotonic()
        looks = [now >= view.look_at and not view.transcript.settled for view in views]
        with line.pipeline(transaction=False) as pipe:
            for view, look in zip(views, looks, strict=True):
                self.queue(pipe, view)
                if look:
                    view.look_at = now + LOOK
                    queue_look(pipe, view.redis_keys, view.transcript.follower)
            rest = iter(execute(pipe))
        return [(next(rest), [next(rest) for _ in range(4 * look)]) for look in looks]

    def queue(self, pipe: Any, view: Watched) -> None:
        """Queue the command whose reply `entries` takes."""
        pipe.xread({view.redis_keys.chunks: str(view.transcript.follower.cursor.after)}, count=COUNT)

    def entries(self, _: Watched, reply: Any) -> list[RawEntry]:
        """The entries in that reply, as redis-py gives them."""
        return reply[0][1] if reply else []

    def tell(self, view: Watched, reply: tuple[Any, list[Any]]) -> None:
        """Feed the view's transcript."""
        transcript, follower = view.transcript, view.transcript.follower
        if self.lost:
            follower.reconnected(time.monotonic())
        found, signs = reply
        for part in (found, *signs):
            if isinstance(part, Exception):
                raise part
        before = transcript.state, transcript.note
        transcript.away = False
        entries, record = self.entries(view, found), parse_record(signs[2]) if signs else None
        if self.at_once and _is_whole(record) and follower.cursor.after == ORIGIN:
            events = follower.from_record(record)
        else:
            events = follower.feed(entries) if entries else take_look(signs, follower) if signs else []
        transcript.take(events)
        if follower.done and not transcript.settled and signs and not events:
            transcript.mend(record, leased=bool(signs[1]))
            view.unseen = True
        if events or before != (transcript.state, transcript.note):
            view.unseen = True


class ReplayReader(AnswerReader):
    """Reads with XRANGE, and takes each entry when it is due: as late after its attempt's start as it was written."""

    at_once = False

    def queue(self, pipe: Any, view: Watched) -> None:
        """Queue a read of the next entries."""
        pipe.xrange(view.redis_keys.chunks, f"({view.transcript.follower.cursor.after}", count=COUNT // 10)

    def entries(self, view: Watched, reply: Any) -> list[RawEntry]:
        """Those that are due."""
        due, now = [], time.monotonic()
        for raw, entry in zip(reply, parse_entries(reply), strict=True):
            attempt, began = view.clock
            if attempt != entry.id.attempt:
                began = now
            if entry.ms > (now - began) * 1000 * view.replay:
                break
            view.clock = entry.id.attempt, began
            due.append(raw)
        return due


class Place:
    """Where a view stands in its consumer group. The group remembers what it was given, and the client nothing.

    It joins, rebuilds the text up to the group's last delivered entry (XRANGE), acknowledges what an earlier view
    left pending, and then reads on. Whatever goes wrong while a command is on its way, it joins again: nobody
    knows then what the group has handed out.
    """

    def __init__(self, group: str) -> None:
        self.group = check_name(group)
        self.step = self.asked = "join"  # then rebuild, acknowledge, read; `asked` is the step on its way
        self.until = ORIGIN  # rebuild up to here
        self.taken: list[str] = []  # IDs in the transcript that the group does not know to be there
        self.beyond = ORIGIN  # the last entry at the last look, when the group had nothing for this view

    @property
    def settled(self) -> bool:
        """Whether all that was taken is acknowledged."""
        return self.step == "read" and not self.taken


class GroupReader(AnswerReader):
    """Reads with XREADGROUP, and acknowledges each batch once it is in the transcript."""

    at_once = False  # the group is to have its place at the end

    def ask(self, line: redis.Redis, views: list[Watched]) -> list[tuple[Any, list[Any]]]:
        """As for other views; the reply is an error where joining the group is not possible."""
        errors: dict[Watched, LLMStreamError] = {}
        for view in views:
            place = view.place
            place.asked, place.step = place.step, "join"
        with line.pipeline(transaction=False) as pipe:
            for view in views:
                if view.place.taken:
                    pipe.xack(view.redis_keys.chunks, view.place.group, *view.place.taken)
            execute(pipe)
        for view in views:
            view.place.taken = []
            if view.place.asked == "join":
                try:
                    self._join(line, view)
                except AnswerNotFound:
                    pass  # the look tells whether that is final
                except LLMStreamError as error:
                    errors[view] = error
        replies = super().ask(line, views)
        return [(errors.get(view, found), signs) for view, (found, signs) in zip(views, replies, strict=True)]

    def _join(self, line: redis.Redis, view: Watched) -> None:
        place, follower, key = view.place, view.transcript.follower, view.redis_keys.chunks
        create_group(line, follower.answer_id, place.group, follower.timing)
        with line.pipeline(transaction=False) as pipe:
            pipe.xinfo_groups(key)
            pipe.xinfo_consumers(key, place.group)
            groups, consumers = pipe.execute()
        if others := sorted({consumer["name"] for consumer in consumers} - {CONSUMER}):
            raise _shared(place.group, f"has other consumers ({', '.join(others)[:200]})")
        delivered = next(each["last-delivered-id"] for each in groups if each["name"] == place.group)
        place.until, place.beyond, place.asked = EntryID.parse(delivered), ORIGIN, "rebuild"

    def queue(self, pipe: Any, view: Watched) -> None:
        """Queue the command of the step that the view is at."""
        place, key, after = view.place, view.redis_keys.chunks, view.transcript.follower.cursor.after
        match place.asked:
            case "rebuild":
                pipe.xrange(key, f"({after}", str(place.until), count=COUNT)
            case "acknowledge":
                pipe.xpending_range(key, place.group, "-", "+", COUNT, consumername=CONSUMER)
            case "read":
                pipe.xreadgroup(place.group, CONSUMER, {key: ">"}, count=COUNT)
            case _:
                pipe.exists(key)

    def entries(self, view: Watched, reply: Any) -> list[RawEntry]:
        """The entries in the reply; moves on to the next step."""
        place = view.place
        match place.asked:
            case "rebuild":
                place.step = "rebuild" if len(reply) == COUNT else "acknowledge"
                return reply
            case "acknowledge":
                place.taken = [taken["message_id"] for taken in reply]
                place.step = "acknowledge" if reply else "read"
            case "read":
                raw = reply[0][1] if reply else []
                place.taken = [entry_id for entry_id, _ in raw]
                place.step = "read"
                return raw
        return []

    def tell(self, view: Watched, reply: tuple[Any, list[Any]]) -> None:
        """Feed the view's transcript; raises when others have taken what the view waits for, or all is gone."""
        found, signs = reply
        place, cursor = view.place, view.transcript.follower.cursor
        if isinstance(found, Exception) and is_gone(found):
            raise GroupGone(f"The group {place.group!r}, or the answer, was deleted or has expired meanwhile.")
        super().tell(view, reply)
        if place.asked == "read" and not found and signs:
            if place.beyond > cursor.after:  # it was there at the last look, and did not come
                raise _shared(place.group, "has another reader")
            top = parse_entries(signs[0])
            place.beyond = top[0].id if top else ORIGIN


def _shared(group: str, why: str) -> LLMStreamError:
    return LLMStreamError(
        f"The group {group!r} {why}: each would get only a part of the text. Give this view a group of its own."
    )


class Watched(Live):
    """A view of an answer."""

    live = t.Bool(True, help="Whether text may come at any moment. Not synced: for observers in the kernel.")

    def __init__(
        self,
        answer: Answer | str,
        client: redis.Redis | None = None,
        group: str | None = None,
        replay: float | None = None,
    ) -> None:
        handle = answer if isinstance(answer, Answer) else Answer(answer, client=client or current())
        self.redis_keys = names_of(handle.client).answer(handle.id)
        self.transcript = Transcript(handle.id, handle.timing, past=bool(replay))
        self.reader = ReplayReader if replay else AnswerReader if group is None else GroupReader
        self.replay, self.clock = replay or 1.0, (0, 0.0)  # speed; attempt, monotonic time of its start here
        self.place = None if group is None else Place(group)
        self.look_at = 0.0  # monotonic time of the next look at the signs of life
        super().__init__(handle.client)

    def __repr__(self) -> str:
        """The same at every run: saved outputs hold it, and strict nbval compares it."""
        name = self.transcript.follower.answer_id
        return f"<AnswerView {name}: run the cell to see it live; if it stays blank, try plain=True>"

    @property
    def settled(self) -> bool:
        """Whether the transcript is final, and the group knows it."""
        return self.transcript.settled and (self.place is None or self.place.settled)

    def lose(self) -> None:
        """Say so, once."""
        if not self.transcript.away:
            self.transcript.away = self.unseen = True

    def fail(self, error: LLMStreamError) -> None:
        """Say so, and settle."""
        self.transcript.fail(error)
        self.place, self.unseen = None, True
