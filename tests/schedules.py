"""Seeded schedules of faults: an answer is written and read while its network, its Redis and its producers fail.

    with Lab() as lab:
        Run(lab, drawn(seed=17)).play()    # AssertionError where a promise is broken

A schedule is a list of steps, taken one after the other, against one answer under a prefix of its own. What is true is
known from the models, whose texts are unique, and from the producers, which keep what they have written; all readers
are held against that in the end.

A few orders are never drawn, since nothing is promised there: Redis loses data only while a producer lives that can
write them again, and until it has, nobody takes over and no zombie wakes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import psutil
import redis

from llmstream_nb.answers.ask import clear, stop_answer
from llmstream_nb.answers.attempt import last_entry
from llmstream_nb.answers.connection import RedisUnusable, connect, names_of
from llmstream_nb.answers.produce import Producer, Writing
from llmstream_nb.answers.read import Look, look, read_answer
from llmstream_nb.answers.record import new_record, register
from llmstream_nb.faults import servers
from llmstream_nb.llm.endpoint import Disagrees
from llmstream_nb.pool.groups import GroupGone, read_answer_group
from llmstream_nb.protocol.events import (
    Continued,
    Ended,
    Event,
    Failed,
    Gap,
    Interrupted,
    Restarted,
    Text,
    text_of,
)
from llmstream_nb.protocol.round import StillWaiting
from llmstream_nb.protocol.wire import (
    ORIGIN,
    AnswerNotFound,
    Deleted,
    Entry,
    EntryID,
    Fenced,
    NotAnAnswer,
    Timing,
    parse_entries,
)

from .model import Model
from .network import Proxy
from .versions import VARIABLE, program_of

TIMING = Timing(lease=0.4, tick=0.04, ttl=600.0, give_up=8.0, patience=8.0)
SHORT = 0.5  # seconds of patience where nobody takes over
BOUND = 10.0  # seconds after the end in which everyone must be through


# ------------------------------------------------------------------------------------------------- schedules


class Step(NamedTuple):
    """One thing to do: the name of a method of Run, and its arguments."""

    name: str
    args: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(repr, self.args))})"


def step(name: str, *args: Any) -> Step:
    return Step(name, args)


@dataclass(frozen=True)
class Schedule:
    """What happens in one run. Models begin anew, or they go on from a text, or try to and find that they disagree."""

    steps: tuple[Step, ...]
    writing: Writing = field(default_factory=Writing)
    timing: Timing = TIMING
    models: str = "begin anew"

    def __str__(self) -> str:
        told = f"{self.writing}, patience={self.timing.patience:g}, models {self.models}: "
        return told + " ".join(map(str, self.steps))


def braid(dice: random.Random, *strands: list[Step]) -> list[Step]:
    """The steps of all strands in random order; those of one strand stay in theirs."""
    order = [number for number, strand in enumerate(strands) for _ in strand]
    dice.shuffle(order)
    sources = [iter(strand) for strand in strands]
    return [next(sources[number]) for number in order]


def network_fault(dice: random.Random) -> list[Step]:
    """Something that happens between clients and server."""
    when = dice.choice(["XADD", "XADD", "XREAD", "EXEC", "WATCH", ""])
    return dice.choice(
        [
            [step("cut")],
            [step("cut_mid_reply", dice.randint(1, 12), when)],
            [step("drop_reply", dice.choice([1, 1, 2]), when, dice.random() < 0.85)],
            [step("drop_request", dice.choice([1, 1, 2]), when)],
            [step("delay", dice.randint(5, 30)), step("rest", dice.randint(10, 60)), step("heal", False)],
            [step("blackhole"), step("rest", dice.choice([10, 40, 150])), step("heal", dice.random() < 0.5)],
            [step("refuse"), step("cut"), step("rest", dice.choice([5, 40, 150])), step("heal", False)],
        ]
    )


def server_fault(dice: random.Random) -> list[Step]:
    """Something that happens to the server; `older` and `wipe` lose data."""
    return dice.choice(
        [
            [step("kill", dice.choice([0, 30, 100]))],
            [step("freeze_server", dice.choice([20, 100]))],
            [step("snapshot"), step("older")],
            [step("wipe")],
            [step("delete")],
        ]
    )


def talk(dice: random.Random) -> list[Step]:
    """The model goes on, and people come and look."""
    says = [step("say", dice.randint(1, 6), dice.choice([0, 0, 2, 5])) for _ in range(dice.randint(2, 4))]
    who = [
        step("join", round(dice.choice([0.0, dice.random()]), 2), dice.random() < 0.7, dice.choice([0, 0, 8]))
        for _ in range(dice.choice([1, 1, 2]))
    ]
    if dice.random() < 0.3:
        who.append(step("join_group", dice.random() < 0.7))
    if dice.random() < 0.5:
        who.append(step("look"))
    return braid(dice, says, who)


PLOTS = {  # what becomes of the answer, and in how many of a hundred schedules
    "ends": 26,
    "fails": 6,
    "stopped": 12,
    "taken over": 10,
    "zombie": 12,
    "dies at the end": 4,
    "cleared": 6,
    "asked anew": 18,
    "closed": 4,
    "left": 2,
}


def drawn(seed: int) -> Schedule:
    """The schedule of this seed."""
    dice = random.Random(f"schedule {seed}")
    plot = dice.choices(list(PLOTS), list(PLOTS.values()))[0]
    faults = [network_fault(dice) for _ in range(dice.choice([0, 1, 1, 2, 2, 3]))]
    server = server_fault(dice) if dice.random() < 0.25 or not faults else []
    trims = [step("trim", dice.choice([0, 1, 3, 6]))] if dice.random() < 0.12 else []
    trims += [step("pick_out", dice.randint(1, 4))] if dice.random() < 0.06 else []
    writing = Writing(
        coalesce_ms=dice.choice([0, 0, 0, 0, 3, 30]), maxlen=dice.randint(2, 12) if dice.random() < 0.08 else None
    )
    loses = any(it.name in ("older", "wipe", "delete") for it in server)
    heir = [step("take_over", dice.random() < 0.7)]
    ends = [step("end")]
    story = {
        "ends": ends,
        "fails": [step("fail", dice.choice(["ValueError", "ValueError", "SystemExit"]))],
        "stopped": [step("stop", dice.choice(["here", "elsewhere", "elsewhere"]))],
        "taken over": [step("leave"), step("lapse"), *heir, *ends],
        "zombie": [step("freeze", dice.choice(["checked", "sent"])), step("lapse"), *heir],
        "dies at the end": [step("freeze", "ended"), step("lapse"), *heir, step("thaw")],
        "cleared": [step("clear")],
        "asked anew": asked_anew(dice),
        "closed": [step("leave"), step("stop", "elsewhere")],
        "left": [step("leave")],
    }[plot]
    if plot in ("stopped", "cleared") and dice.random() < 0.3:
        story = [step("freeze", dice.choice(["checked", "sent"])), *story, step("thaw")]
    if plot == "zombie":
        if dice.random() < 0.15:
            story.insert(1, step("take_over", True))  # its lease still lives: refused
        if loses:
            story += [step("settle"), *server, step("settle")]
        story += ends
        story.insert(
            dice.randint(len(story) - 1 if loses else story.index(step("lapse")) + 1, len(story)), step("thaw")
        )
    half = dice.randint(0, len(faults))
    first = braid(dice, talk(dice), *faults[:half], trims, *([server] if loses and plot != "zombie" else []))
    if loses and plot not in ("ends", "fails", "zombie"):
        first.append(step("settle"))
    second = braid(dice, story, talk(dice), *faults[half:], *([] if loses else [server]))
    timing = replace(TIMING, patience=SHORT) if plot == "left" else TIMING
    models = dice.choices(["begin anew", "go on", "disagree"], [55, 33, 12])[0]
    return Schedule((step("say", 2, 0), step("join", 0.0, True, 0), *first, *second), writing, timing, models)


def asked_anew(dice: random.Random) -> list[Step]:
    """The same id is used again, once or twice, while producers and readers of the older questions live on."""
    story: list[Step] = []
    if dice.random() < 0.6:
        story.append(step("freeze", dice.choice(["checked", "sent"])))
        if dice.random() < 0.4:
            story += [step("lapse"), step("take_over", dice.random() < 0.5)]
            if dice.random() < 0.5:
                story.append(step("freeze", dice.choice(["checked", "sent"])))
    elif dice.random() < 0.3:
        story.append(step("leave"))
    if dice.random() < 0.3:
        story.append(step("foreign", dice.choice(["deep", "fields", "end"])))
    for _ in range(dice.choice([1, 1, 2])):
        story += [step("ask_anew", dice.random() < 0.5), *talk(dice)[:3]]
    ends = dice.choice(
        [
            [step("end")],
            [step("end")],
            [step("fail", "SystemExit")],
            [step("settle"), step("stop", "elsewhere")],
            [step("settle"), step("freeze", "sent"), step("lapse"), step("take_over", False), step("end")],
        ]
    )
    at = dice.randint(len(story) // 2, len(story))
    return [*story[:at], step("thaw"), *story[at:], *ends]


# ---------------------------------------------------------------------------------------------------- models


class Counting(Model):
    """It counts from where it is asked to go on, a word each time that it is told to speak, and signs each word."""

    def __init__(self, sign: str, disagrees: bool) -> None:
        super().__init__()
        self.kept, self._sign, self._disagrees, self._has_disagreed = "", sign, disagrees, False

    def goes_on(self, text: str) -> bool:
        self.kept = "" if self._has_disagreed else text
        return bool(self.kept)

    def words(self) -> Iterator[str]:
        """What it says after what is kept."""
        return (f"{n}{self._sign} " for n in itertools.count(len(re.findall(r"\d+\w ", self.kept))))

    def __iter__(self) -> Iterator[str]:
        if self.kept and self._disagrees:
            self._has_disagreed = True
            yield "?? "
            raise Disagrees
        yield from (word for word, _ in zip(self.words(), super().__iter__(), strict=False))


def in_order(text: str) -> bool:
    """Whether such models count in a text from 0 on, no number is missing or there twice, and nobody speaks late."""
    words = re.findall(r"(\d+)(\w) ", text)
    counted, signs = [int(number) for number, _ in words], [sign for _, sign in words]
    return (
        counted == list(range(len(words)))
        and signs == sorted(signs)
        and text == "".join(map("{0[0]}{0[1]} ".format, words))
    )


# --------------------------------------------------------------------------------------------------- readers


class Reader(threading.Thread):
    """Reads an answer from an entry on, as it grows; `slow`: milliseconds it takes over each event."""

    def __init__(self, client: redis.Redis, after: EntryID, timing: Timing, slow: int = 0) -> None:
        super().__init__(name=f"reader from {after}", daemon=True)
        self.after, self.events, self.slow = after, list[Event](), slow
        self.error: Exception | None = None
        self._events = read_answer("a", str(after), client=client, timing=timing)
        self.start()

    def run(self) -> None:
        try:
            for event in self._events:
                self.events.append(event)
                if self.slow:
                    time.sleep(self.slow / 1000)
        except Exception as error:
            self.error = error


class GroupReader(threading.Thread):
    """Reads an answer as the only consumer of a group."""

    def __init__(self, client: redis.Redis, group: str, timing: Timing) -> None:
        super().__init__(name=f"group {group}", daemon=True)
        self.entries: list[Entry] = []
        self.error: Exception | None = None
        self._batches = read_answer_group("a", group, "c", client=client, timing=timing)
        self.start()

    def run(self) -> None:
        try:
            for batch in self._batches:
                self.entries += batch
        except Exception as error:
            self.error = error


def audit(
    who: str, after: EntryID, events: list[Event], written: Mapping[int, Sequence[tuple[str, str]]] | None
) -> list[EntryID]:
    """Hold a reader's events against what was written, kind and text of each attempt's entries; return what it saw.

    Every entry comes once, in order, as it was written, and between two of them all that lies there is told missing.
    With None nothing is known but the order.
    """
    place, missing, seen = after, 0, list[EntryID]()
    for event in events:
        if isinstance(event, Gap):
            missing += event.missing
        ours = isinstance(event, (Interrupted, Gap)) or (isinstance(event, Failed) and event.error == "Deleted")
        # Where an attempt's start is gone, or it is nothing but an end from outside, the entry itself follows.
        if ours or (isinstance(event, Restarted) and (event.id.seq or (written and event.id.attempt not in written))):
            continue
        at_the_end = isinstance(event, (Ended, Failed)) and event.id == after and not seen  # where it joined
        assert event.id > place or at_the_end, f"{who}: {event.id} again, after {place}"
        if written is not None and isinstance(event, Continued):
            (_, start), (_, kept), *_ = written[event.id.attempt]
            assert json.loads(start)["continues"] == str(place), f"{who}: {event} comes after {place}"
            standing = "".join(text for _, text in written[place.attempt][1 : place.seq + 1])
            assert kept == standing, f"{who}: {event.id} keeps {kept!r}, where {standing!r} stood"
        elif written is not None:
            outside = isinstance(event, (Ended, Failed)) and event.id.seq == 0
            number = max((n for n in written if n < event.id.attempt), default=0) if outside else event.id.attempt
            own = written.get(number, ())
            between = sum(place < EntryID(number, seq) < event.id for seq in range(len(own)))
            assert missing == between, f"{who}: {between} entries lie between {place} and {event.id}, told {missing}"
            if isinstance(event, Text):
                assert own[event.id.seq] == ("text", event.text), f"{who}: {event} was never written"
        place, missing = event.id, 0
        seen.append(event.id)
    return seen


def is_part(text: str, whole: str) -> bool:
    """Whether all words of a text stand in the other one, in this order."""
    words = iter(whole.split())
    return all(word in words for word in text.split())


# ------------------------------------------------------------------------------------------------------- runs


class Restorable(servers.RedisServer):
    """A server that can be given older data back, as one that comes back without its last moments."""

    def snapshot(self) -> None:
        """Keep a copy of the data as they are now."""
        self.client().save()
        shutil.rmtree(self.folder / "snapshot", ignore_errors=True)
        shutil.copytree(self.data, self.folder / "snapshot")

    def restore_snapshot(self) -> None:
        """Kill the server, and let it come back with the data of the last snapshot(), and no later ones."""
        self.kill()
        shutil.rmtree(self.data)
        shutil.copytree(self.folder / "snapshot", self.data)
        self.start()


class Lab:
    """The server and the proxy that all runs share."""

    def __init__(self, name: str) -> None:
        self.server = Restorable(program_of(name) or name)
        self.again = f"{VARIABLE}={name}"  # the same server, where others are drawn
        self.proxy = Proxy("127.0.0.1", self.server.port)
        self.admin = self.server.client()
        self.processes, self._threads = processes(), threads()  # what other tests have left

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.proxy.close()
        self.server.stop()

    def connections(self) -> list[str]:
        """Who is connected to the server, but for the lab itself: last command and age in seconds."""
        own = self.admin.client_id()
        return [f"{row['cmd']} {row['age']}" for row in self.admin.client_list() if int(row["id"]) != own]

    def threads(self) -> list[str]:
        """The kit's threads that the runs have left, or are at work."""
        return [thread.name for thread in threads() - self._threads]

    def clean_up(self, run: Run) -> None:
        """End what a broken run has left."""
        for reader in (*run.readers, *run.group_readers):
            reader.join(BOUND)
        self.admin.client_kill_filter(_type="normal", skipme=True)


def threads() -> set[threading.Thread]:
    """The kit's threads in this process."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("llmstream")}


def processes() -> int:
    """How many child processes there are; a restarted server counts as one, as before."""
    return len(psutil.Process().children(recursive=True))


def reach(url: str, **options: Any) -> redis.Redis:
    """Connect; on a machine with much to do, the first answer may take longer than the schedule's short timeouts."""
    for _ in range(9):
        with contextlib.suppress(RedisUnusable):
            return connect(url, **options)
    return connect(url, **options)


class Run:
    """One schedule, run."""

    def __init__(self, lab: Lab, schedule: Schedule, bound: float = BOUND) -> None:
        self.lab, self.schedule, self.bound = lab, schedule, bound
        self.timing = schedule.timing
        prefix = f"t{uuid.uuid4().hex[:8]}"
        self.direct = reach(lab.server.url, prefix=prefix, socket_timeout=1)
        self.client = reach(lab.proxy.url, prefix=prefix, socket_timeout=0.5)
        self.keys = names_of(self.direct).answer("a")
        self.record = new_record("a", "why?", None, "test", "test")
        self.models: list[Model] = []
        self.said: list[list[str]] = []  # by each of the models
        self.producers: list[Producer] = []
        self.readers: list[Reader] = []
        self.group_readers: list[GroupReader] = []
        self.looks: list[Look] = []
        self.gates: list[threading.Event] = []  # each holds up a producer
        self.silent: list[Producer] = []  # who has left, or is held up
        self.ending: Callable[[Model], None] | None = None
        self.kept = ""  # what was confirmed when Stop was pressed
        self.given_up: dict[int, tuple[list[tuple[str, str]], int]] = {}  # attempts of who disagreed; how much was sent
        # Of the questions before this one under the same id: how many producers, readers and group readers there were,
        # and whether somebody else wrote into their streams.
        self.old, self.old_readers, self.old_groups, self.spoiled = 0, 0, 0, False
        self.cleared = self.lossy = self.holed = self.stopped = self.deleted = False
        self.trimmed = schedule.writing.maxlen is not None

    def play(self) -> None:
        """Take all steps, end everything, and check what must hold."""
        try:
            register(self.direct, self.record, self.timing)
            self.produce(self.client)
            for name, args in self.schedule.steps:
                getattr(self, name)(*args)
            self.finish()
            self.check()
            self.wait_for_none_of(self.lab.threads, "threads of the kit")
        finally:
            self.tidy_up()
        self.wait_for_none_of(self.lab.connections, "connections")
        assert processes() == self.lab.processes, "a process is left over"

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        until = time.monotonic() + self.bound
        while not condition():
            assert time.monotonic() < until, f"not within {self.bound:g} s: {what}"
            time.sleep(0.003)

    def wait_for_none_of(self, found: Callable[[], list[str]], what: str) -> None:
        until = time.monotonic() + self.bound
        while left := found():
            assert time.monotonic() < until, f"{what} are left over: {left}"
            time.sleep(0.003)

    # Steps: the model, and who reads

    def produce(self, client: redis.Redis) -> None:
        """One more producer, with a model of its own."""
        counts = self.schedule.models != "begin anew"
        sign = chr(ord("a") + len(self.models))
        self.models.append(Counting(sign, self.schedule.models == "disagree") if counts else Model())
        self.said.append([])
        producer = Producer(client, self.record, self.models[-1], self.timing, self.schedule.writing)
        self.producers.append(producer)
        attempt, begin_anew = producer.attempt, producer.attempt.begin_anew

        def kept_in_mind() -> None:
            self.given_up[attempt.number] = [(kind, text) for kind, text, _ in attempt.entries], attempt.sent
            begin_anew()

        attempt.begin_anew = kept_in_mind  # type: ignore[method-assign]
        producer.start()

    def whole(self, number: int) -> str:
        """All that a model was told to say, behind what it goes on from."""
        model, said = self.models[number], self.said[number]
        if isinstance(model, Counting):
            return model.kept + "".join(itertools.islice(model.words(), len(said)))
        return "".join(said)

    def say(self, count: int, pause: int) -> None:
        """Each model says so many words, none of which is ever said again."""
        if self.ending:
            return
        for _ in range(count):
            for number, (model, said) in enumerate(zip(self.models, self.said, strict=True)):
                said.append(f"{number}.{len(said)} ")
                model.say(said[-1])
            time.sleep(pause / 1000)

    def rest(self, pause: int) -> None:
        time.sleep(pause / 1000)

    def join(self, part: float, proxied: bool, slow: int) -> None:
        """One more reader, from the beginning or from an entry that the first reader has seen."""
        seen = [event.id for event in self.readers[0].events if isinstance(event, Text)] if self.readers else []
        after = seen[int(part * (len(seen) - 1))] if part and seen else ORIGIN
        self.readers.append(Reader(self.client if proxied else self.direct, after, self.timing, slow))

    def join_group(self, proxied: bool) -> None:
        client = self.client if proxied else self.direct
        # As in `delete`, where the producer has not noticed that yet.
        self.trimmed |= self.deleted and not self.direct.exists(self.keys.chunks)
        self.group_readers.append(GroupReader(client, f"g{len(self.group_readers)}", self.timing))

    def look(self) -> None:
        with contextlib.suppress(NotAnAnswer) if self.spoiled else contextlib.nullcontext():
            self.looks.append(look("a", self.direct))

    # Steps: faults

    def cut(self) -> None:
        self.lab.proxy.cut()

    def cut_mid_reply(self, keep: int, when: str) -> None:
        self.lab.proxy.cut_mid_reply(keep, when.encode())

    def drop_reply(self, count: int, when: str, cut: bool) -> None:
        self.lab.proxy.drop_reply(count, when.encode(), cut=cut)

    def drop_request(self, count: int, when: str) -> None:
        self.lab.proxy.drop_request(count, when.encode())

    def delay(self, pause: int) -> None:
        self.lab.proxy.delay(pause / 1000)

    def blackhole(self) -> None:
        self.lab.proxy.blackhole()

    def refuse(self) -> None:
        self.lab.proxy.refuse()

    def heal(self, late: bool) -> None:
        self.lab.proxy.heal(late=late)

    def kill(self, pause: int) -> None:
        """The server dies, and comes back with its data."""
        self.lab.server.kill()
        self.say(1, pause)
        self.lab.server.start()

    def freeze_server(self, pause: int) -> None:
        self.lab.server.pause()
        self.say(1, pause)
        self.lab.server.resume()

    def snapshot(self) -> None:
        self.lab.server.snapshot()

    def older(self) -> None:
        """The server dies, and comes back with the data of the snapshot."""
        self.lossy = True
        self.lab.server.restore_snapshot()

    def wipe(self) -> None:
        self.lossy = True
        self.lab.server.wipe()

    def trim(self, length: int) -> None:
        self.trimmed = True
        self.direct.xtrim(self.keys.chunks, maxlen=length, approximate=False)

    def pick_out(self, count: int) -> None:
        """Somebody deletes some of the newest entries, but no opening and no end."""
        self.trimmed = self.holed = True
        if some := [str(e.id) for e in self.stream() if e.kind == "text"][-count:]:
            self.direct.xdel(self.keys.chunks, *some)

    def delete(self) -> None:
        """Somebody deletes the stream."""
        self.lossy = self.deleted = True
        # A group may make an empty stream before the producer notices: then it is as if its entries were trimmed.
        self.trimmed |= bool(self.group_readers)
        self.direct.delete(self.keys.chunks)

    def foreign(self, what: str) -> None:
        """Somebody writes into the stream."""
        self.spoiled = True
        deep = {"kind": "end", "text": "[" * 100_000, "ms": "1"}
        fields = {"deep": deep, "fields": {"a": "b"}, "end": {"kind": "end", "text": "{}", "ms": "1", "more": "x"}}
        with contextlib.suppress(redis.ResponseError):  # once more, in the same millisecond
            self.direct.xadd(self.keys.chunks, fields[what])

    # Steps: what becomes of the producer

    def end(self) -> None:
        self.ending = lambda model: model.end("length")
        for model in self.models:
            model.end("length")

    def fail(self, kind: str) -> None:
        error = {"ValueError": ValueError, "SystemExit": SystemExit}[kind]
        self.ending = lambda model: model.break_off(error("out of words"))
        for model in self.models:
            self.ending(model)

    def stop(self, where: str) -> None:
        attempt = self.producers[-1].attempt
        self.kept = "".join(text for kind, text, _ in attempt.entries[: attempt.sent] if kind == "text")
        self.stopped = True
        if where == "here":
            self.producers[-1].stop()
        else:
            stop_answer("a", client=self.direct, timing=self.timing)

    def clear(self) -> None:
        self.cleared = True
        clear("a", client=self.direct, timing=self.timing)

    def ask_anew(self, proxied: bool) -> None:
        """Clear it, and ask another question under the same id."""
        clear("a", client=self.direct, timing=self.timing)
        self.old, self.old_readers, self.old_groups = map(len, (self.producers, self.readers, self.group_readers))
        self.stopped, self.holed, self.deleted, self.ending, self.kept = False, False, False, None, ""
        self.trimmed = self.schedule.writing.maxlen is not None
        self.record = new_record("a", "why not?", None, "test", "test")
        register(self.direct, self.record, self.timing)
        self.produce(self.client if proxied else self.direct)

    def leave(self) -> None:
        self.silent.append(self.producers[-1])
        self.producers[-1].leave()

    def freeze(self, point: str) -> None:
        """Hold up the last producer's thread: all is checked and a batch is about to be sent, or just was, or the end."""
        producer, gate, there = self.producers[-1], threading.Event(), threading.Event()
        self.gates.append(gate)
        self.silent.append(producer)
        name = {"checked": "_queue_xadd", "sent": "flush", "ended": "finish"}[point]
        method = getattr(producer.attempt, name)

        def held(*args: Any, **options: Any) -> None:
            if point == "sent":
                method(*args, **options)
            there.set()
            gate.wait()
            if point != "sent":
                method(*args, **options)

        setattr(producer.attempt, name, held)
        self.lab.proxy.heal()  # so that it gets there
        if point == "ended":
            self.end()
        self.say(1, 0)
        self.wait(lambda: there.is_set() or producer.done.is_set(), "the producer is held up")

    def lapse(self) -> None:
        """Wait until the lease of who has left or is held up is gone."""
        attempts = [producer.attempt for producer in self.silent]

        def gone() -> bool:
            return all(self.direct.get(self.keys.lease(a.number)) != a.nonce for a in attempts)

        self.wait(gone, "the lease runs out")

    def thaw(self) -> None:
        for gate in self.gates:
            gate.set()

    def take_over(self, proxied: bool) -> None:
        """Another producer tries; it says something else."""
        self.produce(self.client if proxied else self.direct)
        self.say(2, 0)

    def settle(self) -> None:
        """Wait until all that the last model has said is in Redis."""
        self.lab.proxy.heal()
        producer = self.producers[-1]

        def settled() -> bool:
            attempt, said = producer.attempt, self.whole(-1)
            last = (attempt.number, len(attempt.entries) - 1)
            # Not the last entry: somebody may have trimmed it.
            return last_entry(self.direct, self.keys.chunks)[1] == last and attempt.text == said

        self.wait(
            lambda: all(each.done.is_set() or each.attempt.sent or each in self.silent for each in self.producers),
            "each producer has begun or was refused",
        )
        self.wait(lambda: producer.done.is_set() or settled(), "the last producer has written everything")

    # The end

    def stream(self) -> list[Entry]:
        return parse_entries(self.direct.xrange(self.keys.chunks))

    def finish(self) -> None:
        """Let everyone come to an end."""
        self.thaw()
        for number, model in enumerate(self.models):
            if not self.stopped or number < self.old:
                (self.ending or Model.end)(model)
        for producer in self.producers:
            self.wait(producer.done.is_set, "the producers end")
        if self.orphaned and not self.cleared:
            self.lapse()
            self.take_over(False)  # who tried before came too early
            self.models[-1].end()
            self.wait(self.producers[-1].done.is_set, "the heir ends")
        self.join(0.0, False, 0)
        self.join(0.5, False, 0)
        until = time.monotonic() + self.bound
        for reader in (*self.readers, *self.group_readers):
            reader.join(until - time.monotonic())
            assert not reader.is_alive(), f"a {reader.name} waits {self.bound:g} s after the end"

    def tidy_up(self) -> None:
        """End what a failed run has left, and close the run's own connections."""
        self.lab.proxy.heal()
        self.thaw()
        for producer in self.producers:
            producer.leave()
        for model in self.models:
            model.close()
        self.client.close()
        self.direct.close()

    # What must hold

    def check(self) -> None:
        self.entries = self.stream()
        self.check_producers()
        if self.cleared:
            assert not self.direct.exists(self.keys.chunks, self.keys.question), "a deleted answer is back"
        else:
            self.check_stream()
        for reader in self.readers:
            self.check_reader(reader)
        for reader in self.group_readers:
            self.check_group_reader(reader)
        for now in self.looks:
            self.check_look(now)
        if not self.cleared:
            self.check_record()

    @property
    def current(self) -> list[Producer]:
        """The producers of the question that stands."""
        return self.producers[self.old :]

    @property
    def written(self) -> dict[int, list[tuple[str, str]]]:
        """Kind and text of all entries of each attempt, as its producer has them."""
        starts = {entry.id.attempt: entry.data.get("nonce") for entry in self.entries if entry.kind == "start"}
        found = {number: own for number, (own, _) in self.given_up.items()}
        for place, producer in enumerate(self.producers):
            attempt = producer.attempt
            number, nonce = attempt.number, starts.get(attempt.number)
            if place < self.old:  # of a question before
                if number < self.first and (attempt.sent or number not in found):
                    found[number] = [(kind, text) for kind, text, _ in attempt.entries]
            elif number and (nonce == attempt.nonce if nonce else attempt.sent):
                assert number not in found, f"two producers have written attempt {number}"
                found[number] = [(kind, text) for kind, text, _ in attempt.entries]
        return found

    @property
    def first(self) -> int:
        """The number that the question's attempts begin with."""
        return self.record.get("first", 1)

    def check_producers(self) -> None:
        """Who did not end the answer has a good reason, and says it."""
        for producer in self.producers[: self.old]:
            right = isinstance(producer.error, (Deleted, Fenced)) or (self.spoiled and producer.error)
            assert right or producer.error is None, f"{type(producer.error).__name__}: {producer.error}"
        for producer in self.current:
            error, attempt = producer.error, producer.attempt
            if isinstance(error, Deleted):
                assert self.cleared, "a producer takes a lost answer for a deleted one"
            elif isinstance(error, Fenced):
                assert len(self.current) > 1 or self.stopped or self.cleared, "a lonely producer is fenced"
            else:
                assert error is None, f"{type(error).__name__}: {error}"
            if error is None and producer.ended and not attempt.ended_before and not self.cleared:
                assert self.entries[-1].id == (attempt.number, len(attempt.entries) - 1), (
                    "its end is not the last entry"
                )

    def check_stream(self) -> None:
        """One end, no holes, and every entry as its producer has it."""
        written = self.written
        assert all(not entry.final for entry in self.entries[:-1]), "an end, and entries after it"
        assert self.entries, "the answer is gone"
        assert self.entries[0].id.attempt >= self.first, f"{self.entries[0]} is of an older question"
        for attempt in sorted({entry.id.attempt for entry in self.entries}):
            own = [entry for entry in self.entries if entry.id.attempt == attempt]
            first = own[0].id.seq
            assert self.holed or [entry.id.seq for entry in own] == list(range(first, first + len(own))), (
                f"holes in attempt {attempt}"
            )
            assert first == 0 or self.trimmed, f"attempt {attempt} begins with {first}"
            if own[0].kind == "start" and "continues" in own[0].data:
                self.check_continues(own)
            if attempt in written:
                for entry in own:
                    assert (entry.kind, entry.text) == written[attempt][entry.id.seq], f"{entry.id} is another's"
            else:
                assert len(own) == 1 and own[0].final, f"nobody has written attempt {attempt}"

    def check_continues(self, own: list[Entry]) -> None:
        """It keeps all that stood when it began, of the attempt right before it."""
        before = [entry for entry in self.entries if entry.id < own[0].id]
        if not (self.trimmed or self.lossy):
            assert own[0].data["continues"] == str(before[-1].id), f"{own[0]} comes after {before[-1].id}"
            standing = "".join(e.text for e in before if e.id.attempt == before[-1].id.attempt and e.kind == "text")
            assert own[1].text == standing, f"{own[1].id} keeps {own[1].text!r}, where {standing!r} stood"

    def check_record(self) -> None:
        """An ended answer: the record has its whole text, which is what the model has said, or its beginning."""
        last = self.entries[-1]
        now = look("a", self.direct)
        if not last.final:
            assert self.timing.patience == SHORT, "the answer has not ended"
            assert now.status == "interrupted", f"nobody writes, and it is {now.status}"
            return
        assert now.status == ("failed" if last.kind == "error" else "ended")
        record, number = now.record, self.text_attempt(last)
        assert record.get("end") == str(last.id), "the record does not tell the end"
        text = "".join(text for kind, text in self.written.get(number, ()) if kind == "text")
        outside = last.id.attempt != number
        if outside:
            assert text.startswith(record["text"]) or self.trimmed, "the record has another text"
        else:
            assert record["text"] == text, "the record has another text"
        assert now.text == record["text"], "a look shows another text than the record"
        said = [self.whole(number) for number in range(self.old, len(self.models))]
        if self.schedule.models != "begin anew":
            assert in_order(text.replace("?? ", "")), f"words are missing, or come twice or late: {text!r}"
            said += ["".join(text for kind, text in own if kind == "text") for own, _ in self.given_up.values()]
        if record.get("reason") == "cancelled":
            assert self.stopped, "nobody pressed Stop"
            assert any(words.startswith(text) for words in said), "not what the model has said"
            assert record["text"].startswith(self.kept) or self.trimmed or self.given_up, "Stop has lost text"
        else:
            assert text in said, "not what the model has said"
            assert record.get("reason") in ("length", "stop") or record.get("error") in ("ValueError", "SystemExit"), (
                record
            )

    @property
    def orphaned(self) -> bool:
        """Whether every producer has left or been refused, although someone was to take over."""
        return len(self.current) > 1 and all(not producer.ended for producer in self.current)

    def text_attempt(self, last: Entry) -> int:
        """The attempt whose text an answer with this last entry has."""
        numbers = self.written
        if last.id.attempt in numbers:
            return last.id.attempt
        return max((number for number in numbers if self.first <= number < last.id.attempt), default=0)

    def check_reader(self, reader: Reader) -> None:
        """Every entry once, in order, as it was written; what is missing is told; and the end, once."""
        who, old = reader.name, reader in self.readers[: self.old_readers]
        if old and (reader.error or self.has_ended_before(reader)):
            allowed = AnswerNotFound if not self.spoiled else (AnswerNotFound, NotAnAnswer)
            assert reader.error is None or isinstance(reader.error, allowed), f"{who}: {reader.error!r}"
            if not self.spoiled:
                audit(who, reader.after, reader.events, self.stood())
            return
        if isinstance(reader.error, StillWaiting) and self.timing.patience == SHORT:
            return  # it came when nobody was there any more
        if reader.error:
            early = not reader.events and reader.after == ORIGIN
            assert isinstance(reader.error, AnswerNotFound), f"{who}: {type(reader.error).__name__}: {reader.error}"
            assert self.cleared or (self.lossy and early), f"{who} has not found the answer"
            return
        self.check_end(reader, audit(reader.name, reader.after, reader.events, None if self.cleared else self.stood()))
        gaps = [event for event in reader.events if isinstance(event, Gap) and event.id.attempt >= self.first]
        assert self.trimmed or not gaps, f"{who}: {gaps}, untrimmed"

    def has_ended_before(self, reader: Reader) -> bool:
        """Whether it was told of the end of an older question, or that it was deleted."""
        last = reader.events[-1] if reader.events else None
        return isinstance(last, (Ended, Failed)) and last.id.attempt < self.first

    def stood(self) -> dict[int, list[tuple[str, str]]]:
        """What each attempt has written that ever stood in Redis."""
        tops = {entry.id.attempt: entry.id.seq + 1 for entry in self.entries}
        sent = {number: count for number, (_, count) in self.given_up.items()}
        sent |= {producer.attempt.number: producer.attempt.sent for producer in self.producers if producer.attempt.sent}
        return {
            n: own if n < self.first else own[: max(tops.get(n, 0), sent.get(n, 0))] for n, own in self.written.items()
        }

    def check_end(self, reader: Reader, seen: list[EntryID]) -> None:
        who, events = reader.name, reader.events
        ends = [event for event in events if isinstance(event, (Ended, Failed))]
        assert len(ends) <= 1 and ends == events[len(events) - len(ends) :], f"{who} has seen {ends}"
        if self.cleared:
            assert ends, f"{who} was not told of the end"
            return
        if not self.entries[-1].final:
            assert not ends, f"{who} was told of an end that is not there"
            return
        assert ends, f"{who} was not told of the end: {events[-3:]}"
        assert ends[0].id == self.entries[-1].id, f"{who} ends with {ends[0].id}, not with {self.entries[-1].id}"
        number = self.text_attempt(self.entries[-1])
        texts = {EntryID(number, seq): text for seq, (kind, text) in enumerate(self.written.get(number, ()))
                 if kind == "text"}  # fmt: skip
        whole = "".join(text for place, text in texts.items() if place in seen)
        # Who keeps what it has, had already what came before it joined.
        goes_on = any(isinstance(event, Continued) for event in events)
        had = [
            text for kind, text in self.written.get(reader.after.attempt, ())[: reader.after.seq + 1] if kind == "text"
        ]
        shown = text_of(events, "".join(had) if goes_on else "")
        assert shown == whole, f"{who} shows {shown!r}, not {whole!r}"
        if not self.trimmed and ends[0].id.seq:
            due = [place for place in texts if place > reader.after]
            assert [place for place in seen if place in texts] == due, f"{who} lacks entries, and was not told"

    def check_group_reader(self, reader: GroupReader) -> None:
        """At least once, and everything that stands in the stream."""
        if reader in self.group_readers[: self.old_groups] and (self.spoiled or reader.error is None):
            return
        if isinstance(reader.error, (GroupGone, AnswerNotFound)):
            assert self.lossy or self.cleared or self.old, f"{reader.name}: {reader.error}"
            return
        if not self.cleared and self.entries[-1].final:
            assert reader.error is None, f"{reader.name}: {type(reader.error).__name__}: {reader.error}"
            lacks = {entry.id for entry in self.entries} - {entry.id for entry in reader.entries}
            assert not lacks, f"{reader.name} was not given {sorted(lacks)}"
        for entry in reader.entries:
            own = self.written.get(entry.id.attempt)
            if own and entry.id.attempt >= self.first:
                assert own[entry.id.seq] == (entry.kind, entry.text), f"{reader.name}: {entry} was never written"

    def check_look(self, now: Look) -> None:
        """The beginning of an attempt's text, or a part of it where some is said to be missing."""
        if now.status == "missing":
            assert self.cleared or self.lossy or self.old, "an answer was not found"
            return
        texts = ["".join(text for kind, text in own if kind == "text") for own in self.written.values()]
        if now.missing:
            assert self.trimmed or self.old, f"{now} although nothing was trimmed"
            assert any(is_part(now.text, text) for text in texts), f"never written: {now.text!r}"
        elif not (self.cleared or self.spoiled):
            texts += [producer.attempt.text for producer in self.producers[: self.old]]
            assert any(text.startswith(now.text) for text in [*texts, ""]), f"never written: {now.text!r}"
