"""How views of an answer are read for: entry by entry, at its old pace, or through a consumer group of their own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import redis
import traitlets as t

from llmstream_nb.answers.ask import Answer
from llmstream_nb.answers.connection import current, names_of
from llmstream_nb.answers.read import send_all
from llmstream_nb.pool.groups import GroupGone, check_name, create_group, is_gone
from llmstream_nb.protocol.events import Event
from llmstream_nb.protocol.follow import Follower
from llmstream_nb.protocol.round import Command, Round
from llmstream_nb.protocol.wire import ORIGIN, AnswerKeys, AnswerNotFound, Entry, EntryID, LLMStreamError, RawEntry
from llmstream_nb.viewing.transcript import Transcript
from llmstream_nb.widgets.live import Live, Reader

COUNT = 2000  # entries a read
CONSUMER = "view"  # the one consumer of a view's group
RATE = 300_000  # characters a second that whole answers may cost, so that long ones are sent less often


class AnswerReader(Reader):
    """Takes a round for each view of an answer, all in one round trip."""

    def ask(self, line: redis.Redis, views: list[Watched]) -> list[list[Any]]:
        """For each view the replies to its round, or the error that keeps it from its group."""
        errors: dict[Watched, LLMStreamError] = {}
        for view in views:
            try:
                if isinstance(view.round, GroupRound):
                    view.round.join(line)
            except AnswerNotFound:
                pass  # the look tells whether that is final
            except LLMStreamError as error:
                errors[view] = error
        now = time.monotonic()
        replies = send_all(line, [view.round.ask(now) for view in views])
        return [[errors[view]] if view in errors else reply for view, reply in zip(views, replies, strict=True)]

    def tell(self, view: Watched, reply: list[Any]) -> None:
        """Feed the view's transcript."""
        transcript, one = view.transcript, view.round
        if self.lost:
            one.follower.reconnected(time.monotonic())
        before = transcript.state, transcript.note, transcript.settled
        events = one.hear(reply, time.monotonic())
        transcript.away = False
        transcript.take(events)
        if one.follower.done and not transcript.settled and len(reply) > 1 and not events:
            transcript.mend(one.signs.record, one.signs.leased)
        if view.answer.failure and not (one.follower.done or events) and len(reply) > 1:
            transcript.fail(view.answer.failure)  # nobody else can tell
        if events or before != (transcript.state, transcript.note, transcript.settled):
            view.unseen = True


class ReplayRound(Round):
    """Reads with XRANGE, and takes each entry when it is due: as late after its attempt's start as it was written."""

    def __init__(self, keys: AnswerKeys, follower: Follower, speed: float) -> None:
        super().__init__(keys, follower, COUNT // 10)
        self._speed = speed
        self._attempt, self._began = 0, 0.0  # the one that is shown, and the monotonic time of its start here

    def read(self, block: float | None = None) -> Command:  # noqa: ARG002 - nothing new is waited for
        """XRANGE from the cursor on."""
        return ("XRANGE", self.keys.chunks, f"({self.follower.cursor.after}", "+", "COUNT", self.count)

    def entries(self, reply: Any) -> list[RawEntry]:
        """Those that are due."""
        due, now = [], time.monotonic()
        for raw in reply:
            entry = Entry.parse(*raw)
            began = self._began if entry.id.attempt == self._attempt else now
            if entry.ms > (now - began) * 1000 * self._speed:
                break
            self._attempt, self._began = entry.id.attempt, began
            due.append(raw)
        return due


class GroupRound(Round):
    """Reads with XREADGROUP … NOACK: the group keeps the place, and nothing is pending with a view that may die.

    Who joins reads again what the group was given before (XRANGE). Whatever goes wrong while a command is on its way,
    it joins again: nobody knows then what the group has handed out.
    """

    def __init__(self, keys: AnswerKeys, follower: Follower, group: str) -> None:
        super().__init__(keys, follower, COUNT)
        self.group = check_name(group)
        self.joined = False
        self._until = self._beyond = ORIGIN  # read again up to here; the last entry when the group had nothing left
        self._asked: Command = ()

    def join(self, line: redis.Redis) -> None:
        """Become the group's one consumer, unless it is. Redis errors pass; LLMStreamError: there are others."""
        if self.joined:
            return
        create_group(line, self.follower.answer_id, self.group, self.follower.timing)
        groups: Any = line.xinfo_groups(self.keys.chunks)
        consumers: Any = line.xinfo_consumers(self.keys.chunks, self.group)
        if others := sorted({consumer["name"] for consumer in consumers} - {CONSUMER}):
            raise self._shared(f"has other consumers ({', '.join(others)[:200]})")
        if any(consumer["pending"] for consumer in consumers):  # with one that acknowledged, and died
            line.xgroup_delconsumer(self.keys.chunks, self.group, CONSUMER)
        delivered = next(each["last-delivered-id"] for each in groups if each["name"] == self.group)
        self._until, self._beyond, self.joined = EntryID.parse(delivered), ORIGIN, True

    def read(self, block: float | None = None) -> Command:  # noqa: ARG002 - a hub never waits
        """What the group was given before, then what is new to it."""
        after, key = self.follower.cursor.after, self.keys.chunks
        if not self.joined:
            self._asked = ("EXISTS", key)
        elif after < self._until:
            self._asked = ("XRANGE", key, f"({after}", str(self._until), "COUNT", self.count)
        else:
            options = ("COUNT", self.count, "NOACK", "STREAMS", key, ">")
            self._asked = ("XREADGROUP", "GROUP", self.group, CONSUMER, *options)
        self.joined = False  # until the reply is here
        return self._asked

    def entries(self, reply: Any) -> list[RawEntry]:
        """The entries in the reply to any of these."""
        if self._asked[0] == "XRANGE":
            if len(reply) < self.count:
                self._until = ORIGIN  # the rest of it was trimmed
            return list(reply)
        return super().entries(reply) if self._asked[0] == "XREADGROUP" else []

    def hear(self, replies: Sequence[Any], now: float) -> list[Event]:
        """As in other rounds; raises GroupGone, and LLMStreamError when others take what this view waits for."""
        if isinstance(replies[0], Exception) and is_gone(replies[0]):
            raise GroupGone(f"The group {self.group!r}, or the answer, was deleted or has expired meanwhile.")
        events = super().hear(replies, now)
        self.joined = self._asked[0] != "EXISTS"
        if self._asked[0] == "XREADGROUP" and not self.entries(replies[0]) and len(replies) > 1:
            if self._beyond > self.follower.cursor.after:  # it was there at the last look, and did not come
                raise self._shared("has another reader")
            self._beyond = self.signs.top.id if self.signs.top else ORIGIN
        return events

    def _shared(self, why: str) -> LLMStreamError:
        rest = "each would get only a part of the text. Give this view a group of its own."
        return LLMStreamError(f"The group {self.group!r} {why}: {rest}")


class Watched(Live):
    """A view of an answer."""

    reader = AnswerReader
    live = t.Bool(True, help="Whether text may come at any moment. Not synced: for observers in the kernel.")

    def __init__(self, answer: Answer | str, *, client: redis.Redis | None = None, **options: Any) -> None:
        group, replay = options.get("group"), options.get("replay")  # `AnswerView` has checked their names
        handle = answer if isinstance(answer, Answer) else Answer(answer, client=client or current())
        self.answer = handle
        keys = names_of(handle.client).answer(handle.id)
        self.transcript = Transcript(handle.id, handle.timing, past=bool(replay))
        follower = self.transcript.follower
        if replay:
            self.round: Round = ReplayRound(keys, follower, replay)
        elif group is None:
            self.round = Round(keys, follower, COUNT, at_once=True)
        else:
            self.round = GroupRound(keys, follower, group)
        super().__init__(handle.client)

    def __repr__(self) -> str:
        """The same at every run: saved outputs hold it, and strict nbval compares it."""
        name = self.transcript.follower.answer_id
        return f"<AnswerView {name}: run the cell to see it live; if it stays blank, try plain=True>"

    @property
    def settled(self) -> bool:
        """Whether nothing will change any more."""
        return self.transcript.settled

    def lose(self) -> None:
        """Say so, once."""
        if not self.transcript.away:
            self.transcript.away = self.unseen = True

    def fail(self, error: LLMStreamError) -> None:
        """Say so, and settle."""
        self.transcript.fail(error)
        self.unseen = True
