"""What goes on under a prefix, from a few small commands: the pool's queue, its workers, the newest answers."""

import math
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import redis

from llmstream_nb.answers.connection import names_of, said, unusable
from llmstream_nb.answers.read import passing_raised, send_all
from llmstream_nb.protocol import wire
from llmstream_nb.protocol.events import Ended, Failed
from llmstream_nb.protocol.round import Command, Round
from llmstream_nb.viewing.broken import Broken, explained
from llmstream_nb.viewing.transcript import LABELS, Transcript

SILENT = 1.5  # seconds, but at most half its lease, without a sign of life after which a worker counts as silent
QUIET = 3.0  # the same for a consumer that never gives one: since it last spoke to Redis
LISTED = 60.0  # seconds for which a worker is shown that is gone, and holds nothing
STALL = 2.0  # seconds between two samples after which Redis, or this process, must have stood still
WINDOW = 2.0  # seconds over which the rate is measured
MOST = 50  # workers shown
WORDS = LABELS | {"unreadable": "Unreadable"}
LONGEST = 1000  # characters shown of what anybody wrote; of names, a tenth


class Survey:
    """Samples of one prefix, one after the other. What has ended is not asked about again."""

    def __init__(self, client: redis.Redis) -> None:
        self._client, self._names = client, names_of(client)
        self._items: dict[str, Item] = {}
        self._workers = Workers()

    def sample(self, line: redis.Redis, limit: int, lost: bool = False) -> dict[str, Any]:
        """Ask in two pipelined round trips, and return what a Monitor shows of it.

        The cost: five small commands, two for each worker, and five for each answer among the `limit` newest that
        has not ended.

        Args:
            lost: Redis was away since the last sample. All is judged anew then, since it may have lost data.
        """
        names, notes = self._names, list[str]()
        with line.pipeline(transaction=False) as pipe:
            pipe.zrevrange(names.answers, 0, limit - 1, withscores=True)
            pipe.llen(names.failures)
            pipe.xlen(names.questions)
            pipe.xinfo_groups(names.questions)
            pipe.xinfo_consumers(names.questions, wire.POOL)
            index, failures, *queue, consumers = passing_raised(pipe.execute(raise_on_error=False))
        known = [] if isinstance(consumers, Exception) else consumers  # an error: there is no such group
        self._list(self._readable(index, names.answers, notes) or [], lost)
        items = [item for item in self._items.values() if not item.done]
        keys = [names.worker(consumer["name"]) for consumer in known]
        signs = [[("GET", key), ("PTTL", key)] for key in keys]
        replies = send_all(line, [*signs, *(item.ask() for item in items)])
        for item, reply in zip(items, replies[len(signs) :], strict=True):
            item.look(reply)
        workers = self._workers.judge(zip(known, replies, strict=False), lost)
        return self._queue(queue, workers, notes) | {
            "failures": self._readable(failures, names.failures, notes),
            "answers": [item.row() for item in self._items.values()],
            "note": " ".join(notes),
        }

    def _list(self, index: list[tuple[str, float]], lost: bool) -> None:
        """Keep the items that are still listed; one with another score was asked anew under the same id."""
        known, self._items = {} if lost else self._items, {}
        for answer_id, asked in index:
            item = known.get(answer_id)
            if not item or item.asked != asked:
                item = Item(self._client, answer_id, asked, lost)
            self._items[answer_id] = item

    def _queue(self, replies: list[Any], workers: list[dict[str, Any]], notes: list[str]) -> dict[str, Any]:
        length, groups = replies
        if length == 0 and isinstance(groups, Exception):
            groups = []  # there is no key, which XINFO calls an error
        length, groups = (self._readable(reply, self._names.questions, notes) for reply in (length, groups))
        if length is None or groups is None:
            return {"waiting": None, "answering": None, "consumers": []}
        taken = sum(group["pending"] for group in groups if group["name"] == wire.POOL)
        if len(workers) > MOST:
            notes.append(f"{len(workers) - MOST:,} more workers are not shown.")
        first = sorted(workers, key=lambda row: (row["state"] == "gone", not row["pending"]))[:MOST]
        return {
            "waiting": max(0, length - taken),
            "answering": taken,
            "consumers": sorted(first, key=lambda row: row["name"]),
        }

    def _readable(self, reply: Any, key: str, notes: list[str]) -> Any:
        """The reply; None if it is an error, which goes into the notes."""
        if not isinstance(reply, Exception):
            return reply
        if (why := _why(reply, key, self._client)) not in notes:
            notes.append(why)
        return None


class Workers:
    """The pool's workers, judged by their signs of life; a consumer that never gave one, by its idle time."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}  # consumer -> Unix time of its last sign of life, once that is long ago
        self._sampled, self._away = 0.0, (0.0, 0.0)  # Unix times: of the last sample; from and to when Redis was away

    def judge(self, replies: Iterable[tuple[dict[str, Any], list[Any]]], lost: bool) -> list[dict[str, Any]]:
        """The rows of all that are shown, from what Redis says of each consumer, and of its sign of life.

        In a row `state` is `idle` or `busy`; or, with the Unix time `since` when it gave none, `silent` until its lease
        is over, then `gone`. `quiet` is a stranger that has not spoken to Redis since then: it may wait, or be gone.
        """
        now = time.time()
        if lost or now - (self._sampled or now) > STALL:
            self._away = self._sampled, now
        known, self._sampled, self._since = self._since, now, {}
        rows = (self._row(consumer, sign, now, known) for consumer, sign in replies)
        return [row for row in rows if row]

    def _row(self, consumer: dict[str, Any], sign: list[Any], now: float, known: dict[str, float]) -> dict[str, Any]:
        """What is shown of one; empty for one that is long gone, and holds nothing."""
        name, pending, (lease, left) = consumer["name"], consumer["pending"], sign
        limits, listed, last = {"quiet": QUIET}, float(wire.DAY), now - consumer["idle"] / 1000
        span = int(lease) / 1000 if isinstance(lease, str) and lease.isdecimal() and len(lease) < 16 else 0.0
        if span and isinstance(left, int) and 0 < left <= 1000 * (span + wire.DAY):
            limits, listed = {"silent": min(SILENT, span / 2), "gone": span}, span + LISTED
            last = now - (span + wire.DAY - left / 1000)
        before, back = self._away
        if last < back:  # nobody could give a sign of life then: that time does not count
            last = back - max(0.0, before - last)
        silence = now - last
        if silence > listed and not pending:
            return {}
        state, since = "busy" if pending else "idle", None
        if words := [word for word, limit in limits.items() if silence > limit]:
            # The same number at every sample, as long as it means the same: else an idle pool would be news.
            state, since = words[-1], known.get(name, 0.0)
            self._since[name] = since = since if abs(last - since) < 1 else round(last, 1)
        return {"name": fit(name), "pending": pending, "state": state, "since": since}


class Item:
    """One answer of the list, judged from its last entry and its signs of life alone."""

    def __init__(self, client: redis.Redis, answer_id: str, asked: float, lost: bool) -> None:
        self.id, self.asked = answer_id, asked
        self.done = False  # all is known that ever will be
        self._client = client
        self._transcript = Transcript(answer_id)
        self._question = self._worker = ""
        self._first = self._attempt = 1
        self._problem = ("", "")  # instead of the transcript's state: missing or unreadable, and why
        self._heard: deque[tuple[float, int]] = deque()  # (monotonic time, chunks), of little more than WINDOW
        if lost:
            self._transcript.follower.reconnected(time.monotonic())
        try:
            self._round = Round(names_of(client).answer(answer_id), self._transcript.follower)
        except wire.LLMStreamError as error:
            self._problem, self.done = ("unreadable", str(error)), True

    def ask(self) -> list[Command]:
        """The five commands whose replies `look` takes: signs of life, and the attempt's first entry."""
        first = f"{self._attempt}-0"
        return [*self._round.look(), ("XRANGE", self._round.keys.chunks, first, first)]

    def look(self, replies: list[Any]) -> None:
        """Judge the replies. Whatever they are, this raises nothing, and the row tells."""
        try:
            for at, reply in enumerate(replies):
                if isinstance(reply, Exception):
                    key = self._round.keys.question if at == 2 else self._round.keys.chunks
                    raise wire.LLMStreamError(_why(reply, key, self._client))
            self._judge(replies[:4], replies[4])
            self._problem = ("", "")
        except wire.AnswerNotFound:
            self._problem = ("missing", "Cleared or expired.")
        except Exception as error:  # noqa: BLE001 - any client may have written anything there
            told = explained(error, self._client, self.id)
            self._problem, self.done = ("unreadable", str(told)), isinstance(told, Broken)

    def _judge(self, signs: list[Any], first: Any) -> None:
        looked_at, start = self._attempt, wire.parse_entries(first)
        if not self._transcript.follower.done:
            self._follow(signs)
        if looked_at == self._attempt:
            self._worker = str((start[0].data if start else {}).get("worker") or "")
            self.done = self._transcript.follower.done

    def _follow(self, replies: list[Any]) -> None:
        transcript, follower = self._transcript, self._transcript.follower
        events = self._round.judge(replies, time.monotonic(), glance=True)
        signs = self._round.signs
        if signs.top and signs.top.final and not follower.done:
            events = follower.glance(signs, time.monotonic())  # the first has only moved on to the end
        self._question = str((signs.record or {}).get("question") or "")
        self._first = wire.first_attempt(signs.record or {})
        ended = next((event for event in events if isinstance(event, (Ended, Failed))), None)
        last = _last_text(ended) if ended else signs.top.id if signs.top else wire.EntryID(1, 0)
        attempt, chunks = max(1, last.attempt), max(0, last.seq)
        if attempt != self._attempt:
            self._attempt, self._worker = attempt, ""
            self._heard.clear()
        transcript.chunks = chunks
        transcript.take([ended] if ended else [])
        self._heard.append((time.monotonic(), chunks))
        while len(self._heard) > 2 and self._heard[-1][0] - self._heard[1][0] >= WINDOW:
            self._heard.popleft()

    def row(self) -> dict[str, Any]:
        """What is shown of it."""
        transcript, problem = self._transcript, self._problem[0]
        state = problem or transcript.state
        return {
            "id": fit(self.id),
            "question": fit(self._question, LONGEST),
            "state": state,
            "label": WORDS[state],
            "note": fit(self._problem[1] or (transcript.note if state in ("ended", "failed") else ""), LONGEST),
            "attempt": self._attempt,
            "first": self._first,
            "worker": fit(self._worker),
            "chunks": transcript.chunks if isinstance(transcript.chunks, int) and not problem else None,
            "rate": self._rate() if state == "streaming" else None,
            "asked": self.asked if math.isfinite(self.asked) else None,
        }

    def _rate(self) -> float | None:
        """Chunks a second, lately."""
        (then, before), (now, chunks) = self._heard[0], self._heard[-1]
        rate = (chunks - before) / (now - then) if now > then else None
        return rate and max(0, round(rate, None if rate >= 10 else 1))  # less than 0: written again after a loss


def _last_text(end: Ended | Failed) -> wire.EntryID:
    """Of an answer that has ended: its last entry before the end, whose `seq` is the number of chunks."""
    closes = end.data.get("closes")  # said by whoever closed it from outside
    return wire.EntryID.parse(closes) if closes else wire.EntryID(end.id.attempt, end.id.seq - 1)


def _why(error: Exception, key: str, client: redis.Redis) -> str:
    """An error of Redis as a sentence."""
    if said(error).startswith("WRONGTYPE"):
        return f"The key {key!r} holds another type than it should: delete it, or use another prefix."
    return f"{unusable(error, client)}."


def fit(text: Any, longest: int = LONGEST // 10) -> str:
    """Text of any origin, short enough and of characters that reach the browser."""
    shown = wire.clean(str(text)[: longest + 1])
    return shown if len(shown) <= longest else shown[:longest] + "…"
