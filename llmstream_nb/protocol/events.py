"""What a reader is told of an answer: the events that its entries mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmstream_nb.protocol.wire import EntryID

FIGURES = ("first_token_ms", "total_ms", "chunks")  # of an end or error entry: whole numbers, or null
NAME, MESSAGE = 200, 2_000  # characters shown of a finish reason or an error's name, and of its message


@dataclass(frozen=True, slots=True)
class Started:
    """The first attempt has begun; `data` tells model, source and wall-clock time."""

    id: EntryID
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Restarted:
    """A newer attempt has begun: throw away the text so far."""

    id: EntryID
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)  # frozen, each would take twice as long to make, and there is one for every token
class Text:
    """The next piece of the text; `ms` since the attempt's start."""

    id: EntryID
    text: str
    ms: int = 0


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


Event = Started | Restarted | Text | Gap | Interrupted | Ended | Failed


def closing_event(entry_id: EntryID, data: Mapping[str, Any]) -> Ended | Failed:
    """The event of an end or error entry's data, or of the record of an ended answer: fit to show, whoever wrote it."""
    told = {name: value for name, value in data.items() if name not in FIGURES or _is_figure(value)}
    if data.get("error"):
        error, message = str(data["error"])[:NAME], str(data.get("message") or "")[:MESSAGE]
        return Failed(entry_id, error, message, told | {"error": error, "message": message})
    reason = str(data.get("reason") or "stop")[:NAME]
    return Ended(entry_id, reason, told | {"reason": reason})


def _is_figure(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)


def text_of(events: Iterable[Event], text: str = "") -> str:
    """The text a viewer holds after these events."""
    for event in events:
        if isinstance(event, Text):
            text += event.text
        elif isinstance(event, Restarted):
            text = ""
    return text
