"""Read an answer through a consumer group: each entry goes to one consumer, and stays pending until acknowledged."""

import time
from collections.abc import Iterator
from typing import Any

import redis
from redis.exceptions import ResponseError, WatchError

from llmstream_nb.answers.connection import LOST, Line, current, is_passing, milliseconds, names_of, said, unusable
from llmstream_nb.answers.read import Backoff, longest_block, send
from llmstream_nb.protocol import wire
from llmstream_nb.protocol.follow import Follower
from llmstream_nb.protocol.round import Patience, Round, StillWaiting

COUNT = 100  # entries a read: a batch is lost to its consumer's successor until it is claimed, so not too many
NEW = ">"  # XREADGROUP's ID for entries that no consumer of the group was given
LAST = 2**64 - 1  # the largest number that an ID can have
SOON = 0.02  # seconds to the next read, where that decides


class BadName(wire.LLMStreamError, ValueError):
    """A name that can't be a consumer group's or a consumer's."""


class GroupGone(wire.LLMStreamError):
    """The consumer group, or the stream that it belongs to, is no longer there."""


def check_name(name: str) -> str:
    """Return a consumer group's or a consumer's name, or raise BadName; Redis takes any bytes, so this does too."""
    if not isinstance(name, str) or not 0 < len(name) <= 200 or wire.clean(name) != name:
        raise BadName(f"{str(name)[:80]!r} can't name a group or a consumer: use 1 to 200 characters of text")
    return name


def read_answer_group(
    answer_id: str,
    group: str,
    consumer: str,
    *,
    count: int = COUNT,
    timeout: float | None = None,
    client: redis.Redis | None = None,
    timing: wire.Timing | None = None,
) -> Iterator[list[wire.Entry]]:
    """Yield the entries that this consumer of the group is given, in batches, until the answer has ended.

    A batch is a list of at most `count` entries, each with an `id`, a `kind` and a `text`; `timeout` is in seconds.

    Reads with XREADGROUP on a connection of its own: first what this consumer took earlier and never
    acknowledged, then new entries. A batch is acknowledged (XACK) when the caller asks for the next one, so
    what a crash interrupts comes again: at least once, not exactly once.

    Entries are neither joined nor checked for gaps, since with two consumers each gets only a part. The
    group is created at the answer's beginning when it is absent. The iteration is over when the answer has
    ended and the group was given all of it; whether others have acknowledged their part is their business.

    Raises:
        AnswerNotFound: there is no such answer.
        GroupGone: the group, or the answer, was deleted or has expired meanwhile.
        StillWaiting: the answer has not ended after `timeout` seconds; without that, nobody began to answer, or
            its producer died and nobody took over, within `timing.patience` seconds.
        RedisUnusable, NotAnAnswer, BadAnswerId, BadName: as `read_answer`.
    """
    client, timing = client or current(), timing or wire.Timing()
    line = Line(client, names_of(client).answer(answer_id).chunks)
    reads = Consumer(line, answer_id, check_name(group), check_name(consumer), timing)
    follower, retry = Follower(answer_id, timing=timing), Backoff(timing)
    patience = Patience(follower, timeout, time.monotonic)
    try:
        while not follower.done:
            try:
                reads.acknowledge()  # the caller asks for more: it is through with what it had
                patience.check()
                if patience.is_over():
                    raise StillWaiting(f"the producer of {answer_id!r} died, and nobody took over in time")
                raw = reads.read(count, patience.pause())
                if not raw and not _is_there(line.redis, follower):
                    raise GroupGone(f"the entries of {answer_id!r} were deleted, or have expired")
            except StillWaiting:  # a TimeoutError, and so an OSError
                raise
            except LOST as error:
                if is_gone(error):
                    raise GroupGone(f"the group {group!r} of {answer_id!r} was deleted, or has expired") from None
                if not is_passing(error, line.worked) or not retry.sleep():
                    raise unusable(error, client) from None
                reads.reopen()
                patience.lost()
                continue
            retry.reset()
            if entries := wire.parse_entries(raw):  # what was trimmed is pending without its fields: only to be acked
                yield entries
                follower.suspect = entries[-1].final  # nothing to wait for
            patience.heard(bool(raw))
    finally:
        line.close()


class Consumer:
    """A consumer's reads of its group: what it has pending, page by page, then what is new. Redis errors pass."""

    def __init__(self, line: Line, answer_id: str, group: str, name: str, timing: wire.Timing) -> None:
        self._line, self._id, self._group, self._name, self._timing = line, answer_id, group, name, timing
        self._key = names_of(line.redis).answer(answer_id).chunks
        self._start: str | None = None  # the ID for XREADGROUP; None until the group is there
        self._taken: list[str] = []  # IDs of the last batch

    def acknowledge(self) -> None:
        """XACK what was read last."""
        if self._taken:
            self._line.redis.xack(self._key, self._group, *self._taken)
            self._taken = []

    def read(self, count: int, seconds: float) -> list[tuple[str, dict[str, str]]]:
        """The next entries, at most `count`; waits up to so many seconds for new ones. Makes the group if need be."""
        if self._start is None:
            create_group(self._line.redis, self._id, self._group, self._timing)
            self._start = "0"
        options = self._line.redis, self._key, self._group, self._name
        raw = read_group(*options, self._start, count, seconds)
        if self._start != NEW:
            self._start = raw[-1][0] if raw else NEW
            raw = raw or read_group(*options, NEW, count, seconds)
        self._taken = [entry_id for entry_id, _ in raw]
        return raw

    def reopen(self) -> None:
        """After an error: what a lost reply held is pending by now, so begin with that."""
        self._line.reopen()
        self._start = self._start and "0"


def _is_there(client: redis.Redis, follower: Follower) -> bool:
    """Look at the answer after a read that brought nothing; False if it has ended and its entries are gone."""
    one = Round(names_of(client).answer(follower.answer_id), follower)
    replies = send(client, one.look())
    one.judge(replies, time.monotonic(), glance=True)
    return bool(replies[0]) or not follower.done


def read_group(
    client: redis.Redis, key: str, group: str, consumer: str, start: str, count: int, seconds: float
) -> list[tuple[str, dict[str, str]]]:
    """The raw entries of one XREADGROUP that waits up to so many seconds for new ones. Redis errors pass.

    fakeredis does not block where a COUNT is given, so there the waiting is done here.
    """
    until = time.monotonic() + seconds
    while True:
        block = max(1, int(min(until - time.monotonic(), longest_block(client)) * 1000))
        reply: Any = client.xreadgroup(group, consumer, {key: start}, count=count, block=block)
        if reply or until - time.monotonic() < SOON:
            return reply[0][1] if reply else []
        time.sleep(SOON)


def create_group(client: redis.Redis, answer_id: str, group: str, timing: wire.Timing) -> None:
    """Create a group at the answer's beginning unless it is there (XGROUP CREATE … 0). Redis errors pass.

    Raises AnswerNotFound, GroupGone where only the record is left, NotAnAnswer for a key of another type.
    """
    key, question = names_of(client).answer(answer_id)[:2]
    pipe: Any = client.pipeline(transaction=True)
    try:
        with pipe:
            # Watched, for what is seen must still hold when the group is made: an answer may begin just now, and a
            # group must not bring back the key of one that is just deleted.
            pipe.watch(key, question)
            record = wire.parse_record(pipe.get(question))
            kind = pipe.type(key)  # after the record: where that tells an end, entries were there before
            if kind not in ("none", "stream"):
                raise wire.NotAnAnswer(f"{key!r} holds a {kind}, not a stream: use another id, or delete that key")
            if kind == "none" and record is None:
                raise wire.AnswerNotFound(f"there is no answer {answer_id!r}: never asked, cleared, or expired")
            if kind == "none" and record and record.get("end"):
                raise GroupGone(f"the entries of {answer_id!r} have expired: see Answer({answer_id!r}).text")
            if kind == "none":
                pipe.multi()
                if first := wire.first_attempt(record or {}) - 1:
                    # An empty stream would take what comes late of an earlier question: it has had its last ID.
                    last = f"{first}-{LAST}"
                    pipe.xadd(key, {"kind": ""}, last)
                    pipe.xdel(key, last)
                pipe.xgroup_create(key, group, "0", mkstream=True)
                # At once: a reply may be lost, and a key must not stay for ever.
                pipe.pexpire(key, milliseconds(timing.ttl))
                pipe.execute()
            else:
                pipe.xgroup_create(key, group, "0")  # no MULTI: it may grow meanwhile
    except WatchError:  # it begins, or goes, just now: look again
        create_group(client, answer_id, group, timing)
    except ResponseError as error:
        if not said(error).startswith("BUSYGROUP"):
            raise


def claim(
    answer_id: str, group: str, consumer: str, *, idle: float = 5.0, client: redis.Redis | None = None
) -> list[wire.Entry]:
    """Take over what the group's consumers have left pending for `idle` seconds or more (XAUTOCLAIM).

    The entries, in the order of their IDs, are pending with `consumer` now: `read_answer_group` gives them to
    it first, and acknowledges them. Idle time goes on counting while Redis is down, so don't judge right after
    a restart. Raises GroupGone, RedisUnusable, NotAnAnswer, BadAnswerId or BadName.
    """
    given: Any = client or current()
    key, group, consumer = names_of(given).answer(answer_id).chunks, check_name(group), check_name(consumer)
    cursor, found = "", list[wire.Entry]()
    try:
        while cursor != "0-0":
            cursor, raw, *_ = given.xautoclaim(key, group, consumer, int(idle * 1000), cursor or "0-0", count=COUNT)
            found += wire.parse_entries(raw)
        return found
    except LOST as error:
        if is_gone(error):
            raise GroupGone(f"the answer {answer_id!r} has no group {group!r}: read_answer_group makes one") from None
        raise unusable(error, given) from None


def is_gone(error: Exception) -> bool:
    """Whether an error means that a group or its stream is not there; the words differ from server to server."""
    return said(error).startswith(("NOGROUP", "UNBLOCKED the stream", "The XGROUP subcommand requires the key"))
