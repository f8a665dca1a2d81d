"""Server-sent events: an answer's events as text, and the ID with which a browser comes back. No I/O.

The format is that of the HTML standard, https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from llmstream_nb.protocol.events import Continued, Ended, Event, Failed, Gap, Interrupted, Restarted, Started
from llmstream_nb.protocol.parts import Part, ToolCall, Unknown
from llmstream_nb.protocol.wire import ORIGIN, EntryID, clean
from llmstream_nb.viewing.blocks import LONGEST, drawn

HELLO = b"retry: 1000\n\n"  # a browser that loses its connection comes back after so many milliseconds
ALIVE = b"event: alive\ndata: {}\n\n"  # for proxies that end silent connections, and pages on dead ones


class Frame(NamedTuple):
    """One server-sent event. A viewer whose last ID is smaller than `id` has not seen it."""

    id: EntryID
    data: bytes
    final: bool = False  # nothing follows
    number: int = 0  # on a wire whose viewers count events; who has seen this number has seen it
    begun: int = 0  # on a wire that needs an attempt from the first entry on: the attempt with which it begins


def frame(name: str, data: dict[str, Any], entry_id: EntryID | None = None) -> bytes:
    """Write one event. JSON has no raw line break, so its text is one `data:` line, whatever a model writes."""
    first = f"id: {entry_id}\n" if entry_id else ""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    return f"{first}event: {name}\ndata: {text}\n\n".encode("utf-8", "replace")


class Wire:
    """How an answer's events are sent: here in the kit's own form, which goes on from any entry."""

    hello, alive = HELLO, ALIVE
    whole = False  # whether `frames` needs an attempt's events from the first on

    def __init__(self, answer_id: str, record: Mapping[str, Any]) -> None:
        """Of which answer, and what was known of it when its viewer came."""

    def frames(self, events: Iterable[Event]) -> Iterator[Frame]:
        """Write the events of an answer."""
        return frames(events)

    def state(self, state: str, /) -> bytes:
        """Tell how it stands: queued, streaming, interrupted, or that Redis is away."""
        return frame("state", {"state": state})

    def cut(self) -> bytes:
        """What a viewer is told when the server ends; a browser comes back by itself."""
        return b""

    def again(self, place: EntryID) -> Frame:
        """What ends the stream of one who has seen an earlier attempt than the one that is there now."""
        raise NotImplementedError

    def failure(self, error: str, message: str, place: EntryID, seen: int = -1) -> Frame:  # noqa: ARG002
        """What ends a stream, and not the answer: no answer's own error has the mark `server`.

        The viewer has seen all up to `place`, and events up to the number `seen`.
        """
        return Frame(place, frame("failed", {"error": error, "message": message, "server": True}), final=True)


def frames(events: Iterable[Event]) -> Iterator[Frame]:
    """Write the events of an answer; what is only a state (`Interrupted`) is left out.

    Where several events stand for one entry, as a gap and the text after it, only the last one carries the ID: a
    connection that breaks between them must not lose the text.
    """
    events = [event for event in events if not isinstance(event, Interrupted)]
    for number, event in enumerate(events):
        last = number + 1 == len(events) or events[number + 1].id != event.id
        name, data = describe(event)
        final = isinstance(event, (Ended, Failed))
        yield Frame(event.id, frame(name, data, event.id if last and event.id != ORIGIN else None), final)


def describe(event: Event) -> tuple[str, dict[str, Any]]:
    """Name and data of an event. `failed` is not `error`, which is EventSource's own word for a lost connection."""
    match event:
        case Started(id=entry_id, data=data) | Restarted(id=entry_id, data=data):
            return "start", _opening(entry_id, data)
        case Continued(id=entry_id, data=data):
            return "continued", _opening(entry_id, data) | {"continued": True}
        case Unknown(kind=kind, ms=ms):
            return "other", {"kind": kind, "ms": ms}
        case ToolCall(arguments=arguments):
            return "call", _part(event) | {"name": event.name, "arguments": clean(arguments)[:LONGEST]}
        case _ if isinstance(event, Part):
            return event.kind, _part(event)
        case Gap(missing=missing):
            return "gap", {"missing": missing}
        case Ended(reason=reason, data=data):
            return "end", {"reason": reason} | _figures(data)
        case Failed(error=error, message=message, data=data):
            return "failed", {"error": error, "message": message} | _figures(data)
    raise TypeError(event)


def _opening(entry_id: EntryID, data: dict[str, Any]) -> dict[str, Any]:
    shown = {name: data[name] for name in ("model", "source", "at", "worker", "job") if name in data}
    return {"attempt": entry_id.attempt} | shown


def _part(part: Part) -> dict[str, Any]:
    """A part as it is drawn; of a call or a result that is long, `more` characters are not there."""
    return {name: value for name, value in drawn(part).items() if name != "kind"}


def _figures(data: dict[str, Any]) -> dict[str, Any]:
    names = ("first_part_ms", "first_token_ms", "total_ms", "chunks", "usage")
    return {name: data[name] for name in names if name in data}
