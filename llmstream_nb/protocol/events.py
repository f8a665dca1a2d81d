"""What a reader is told of an answer: the events that its entries mean."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmstream_nb.protocol.parts import LONG, SHORT, Part, Text, joined, part_of
from llmstream_nb.protocol.wire import LARGEST, MAX_QUESTION, ORIGIN, Entry, EntryID, printable

MOST = 32  # items that a viewer is told of an entry, a record or a usage
WORDS = {"question": MAX_QUESTION, "message": LONG, "reason": 200, "error": 200, "model": 200, "source": 200}
FIGURES = ("at", "first_part_ms", "first_token_ms", "total_ms", "chunks")
WHOLE = ("text", "parts", "request")  # of a record: what may be as large as an answer, and is told otherwise


@dataclass(frozen=True, slots=True)
class Started:
    """The first attempt has begun; `data` tells model, source and wall-clock time."""

    id: EntryID
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Restarted:
    """A newer attempt has begun, from its beginning: throw away the text and the other parts so far."""

    id: EntryID
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Continued:
    """A newer attempt has begun, and goes on where the one before it stopped: keep what you have."""

    id: EntryID
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Gap:
    """`missing` entries before `id` are gone from the stream: trimmed, or lost by Redis."""

    id: EntryID
    missing: int


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The producer is dead and nobody has taken over yet; the text so far stands, and may still go on."""

    id: EntryID


@dataclass(frozen=True, slots=True)
class Ended:
    """The answer is complete: `reason` is the model's finish reason (stop, length, …) or `cancelled`."""

    id: EntryID
    reason: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failed:
    """The answer ended in an error; `message` is fit to show."""

    id: EntryID
    error: str
    message: str
    data: dict[str, Any] = field(default_factory=dict)


Event = Started | Restarted | Continued | Part | Gap | Interrupted | Ended | Failed


def opening_event(entry_id: EntryID, data: Mapping[str, Any], again: bool) -> Started | Restarted:
    """The event of an attempt's first entry, or of the record where that is all; `again`: of a newer attempt."""
    return (Restarted if again else Started)(entry_id, told(data))


def closing_event(entry_id: EntryID, data: Mapping[str, Any], kind: str = "") -> Ended | Failed:
    """The event of an entry of this kind with these data; without a kind, of the record of an ended answer."""
    known = told(data)
    if kind == "error" or (not kind and known.get("error")):
        return Failed(entry_id, known.get("error", "Error"), known.get("message", ""), known)
    known.setdefault("reason", "stop")
    return Ended(entry_id, known["reason"], known)


def told(data: Mapping[str, Any]) -> dict[str, Any]:
    """What an entry or a record tells, as viewers may rely on it: anybody may have written it.

    Words are text and short, figures are numbers or absent, `usage` is flat; other lists and objects, and what
    is as large as an answer, are left out.
    """
    known: dict[str, Any] = {}
    for name, value in data.items():
        if name in WORDS:
            known |= {name: str(value)[: WORDS[name]]} if value else {}
        elif name in FIGURES:
            known |= {name: value} if type(value) in (int, float) and value >= 0 else {}
        elif name == "usage":
            known[name] = flat_numbers(value) or None
        elif len(known) < MOST and len(name) <= SHORT and name not in WHOLE:
            known |= {name: value[:LONG]} if isinstance(value, str) else {}
            known |= {name: value} if value is None or isinstance(value, (int, float)) else {}
    return known


def flat_numbers(usage: Any) -> dict[str, float]:
    """The numbers of a usage by name, at most MOST; a detail has its own name, or with its group's if it is taken."""
    found: dict[str, float] = {}
    groups = [("", usage), *(usage.items() if isinstance(usage, dict) else ())]
    for group, details in groups:
        for name, value in details.items() if isinstance(details, dict) else ():
            if type(value) in (int, float) and abs(value) < LARGEST and len(found) < MOST:
                found[printable(f"{group}_{name}" if name in found else name)[:SHORT]] = value
    return found


def parts_of(events: Iterable[Event]) -> list[Part]:
    """The parts a viewer holds after these events, deltas of a kind that follow each other as one."""
    held: list[tuple[str, str, int]] = []
    for event in events:
        if isinstance(event, Restarted):
            held.clear()
        elif isinstance(event, Part):
            held.append((event.kind, event.text, event.ms))
    return [part_of(Entry(ORIGIN, *part)) for part in joined(held)]


def text_of(events: Iterable[Event], text: str = "") -> str:
    """The text a viewer holds after these events."""
    for event in events:
        if isinstance(event, Text):
            text += event.text
        elif isinstance(event, Restarted):
            text = ""
    return text
