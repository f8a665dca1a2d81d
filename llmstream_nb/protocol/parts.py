"""The parts of an answer, as sources yield them and readers get them: text, reasoning, a refusal, calls, results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

from llmstream_nb.protocol.wire import ORIGIN, Entry, EntryID, clean, printable

SHORT, LONG = 60, 1_000  # characters of a name, and of what it names
MAX_PART = 1_000_000  # characters of a call's arguments, or of a result; more of a result is cut off, and counted


# Frozen, each would take twice as long to make, and there is one for every token.
@dataclass(slots=True)
class Text:
    """The next piece of the text; `ms` since the attempt's start."""

    text: str
    id: EntryID = ORIGIN  # of its entry; a source has none to give
    ms: int = 0
    kind: ClassVar[str] = "text"


@dataclass(slots=True)
class Reasoning:
    """The next piece of what the model thinks before it answers, or between two calls."""

    text: str
    id: EntryID = ORIGIN
    ms: int = 0
    kind: ClassVar[str] = "reasoning"


@dataclass(slots=True)
class Refusal:
    """The next piece of the words in which the model refuses."""

    text: str
    id: EntryID = ORIGIN
    ms: int = 0
    kind: ClassVar[str] = "refusal"


@dataclass(slots=True)
class ToolCall:
    """The model wants a tool to be called. `arguments` are as it wrote them: JSON, as a rule, and perhaps broken."""

    call_id: str
    name: str
    arguments: str = "{}"
    id: EntryID = ORIGIN
    ms: int = 0
    kind: ClassVar[str] = "call"

    @property
    def text(self) -> str:
        """The JSON object of its entry."""
        return _written(id=_word(self.call_id)[:LONG], name=_word(self.name)[:LONG], arguments=_word(self.arguments))


@dataclass(slots=True)
class ToolResult:
    """What a tool gave back for the call of that id: `content`, or in `error` what went wrong.

    `cut` characters of it, beyond the first million, are not in the stream.
    """

    call_id: str
    content: str = ""
    error: str = ""
    cut: int = 0
    id: EntryID = ORIGIN
    ms: int = 0
    kind: ClassVar[str] = "result"

    @property
    def text(self) -> str:
        """The JSON object of its entry."""
        error = str(self.error) or type(self.error).__name__ if self.error else ""  # an exception may have no words
        name, words = ("error", error) if error else ("content", _word(self.content))
        cut = self.cut + max(0, len(words) - MAX_PART)
        return _written(id=_word(self.call_id)[:LONG], **{name: words[:MAX_PART]}, **({"cut": cut} if cut else {}))


@dataclass(slots=True)
class Unknown:
    """An entry of a kind that this version does not know: a later one may have written it."""

    kind: str
    text: str
    id: EntryID = ORIGIN
    ms: int = 0


Part = Text | Reasoning | Refusal | ToolCall | ToolResult | Unknown
Yielded = str | Text | Reasoning | Refusal | ToolCall | ToolResult  # by a source: a string is text
DELTAS: Mapping[str, type[Text | Reasoning | Refusal]] = {each.kind: each for each in (Text, Reasoning, Refusal)}
KNOWN = {*DELTAS, "call", "result", "start", "end", "error"}


def written(part: Any) -> tuple[str, str]:
    """Kind and text of the entry for what a source yields; raises TypeError for anything else."""
    if isinstance(part, str):
        return "text", str.__str__(part)  # a plain one, whatever its class makes of it
    if isinstance(part, (Text, Reasoning, Refusal, ToolCall, ToolResult)) and isinstance(text := part.text, str):
        return part.kind, text
    raise TypeError(f"a source yields text or parts of an answer, and this one yielded {type(part).__name__}")


def part_of(entry: Entry) -> Part:
    """The part that an entry holds; raises NotAnAnswer where it should be a JSON object and is none."""
    if delta := DELTAS.get(entry.kind):
        return delta(entry.text, entry.id, entry.ms)
    if entry.kind == "call":
        said = _words(entry.data, "id", "name", "arguments")
        return ToolCall(said["id"], printable(said["name"]), said["arguments"], entry.id, entry.ms)
    if entry.kind == "result":
        said, cut = _words(entry.data, "id", "content", "error"), entry.data.get("cut")
        cut = cut if type(cut) is int and cut > 0 else 0
        return ToolResult(said["id"], said["content"], said["error"], cut, entry.id, entry.ms)
    name = printable(entry.kind)[:SHORT]  # which must not make it one of those that are known
    return Unknown(f"“{name}”" if name in KNOWN or not name else name, entry.text, entry.id, entry.ms)


def joined(parts: Iterable[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """Kind, text and ms of parts; deltas of a kind that follow each other become one, with the ms of the last."""
    whole: list[tuple[str, str, int]] = []
    for kind, group in groupby(parts, lambda part: part[0]):
        if kind in DELTAS:
            texts, times = zip(*((text, ms) for _, text, ms in group), strict=True)
            whole.append((kind, "".join(texts), times[-1]))
        else:
            whole.extend(group)
    return whole


def parts_of_record(record: Mapping[str, Any], end: EntryID) -> list[Part]:
    """The parts of an ended answer, from its record: what `joined` made, or where that is not there, the text."""
    parts, text = record.get("parts"), record.get("text")
    told = [part for part in parts if _is_part(part)] if isinstance(parts, list) else []
    if isinstance(text, str) and text and not any(part[0] == "text" for part in told):  # whatever stands there
        told.append(["text", text, 0])
    return [part_of(Entry(end, *part)) for part in told]


def _is_part(part: Any) -> bool:
    match part:
        case [str(), str(text), int()]:
            return bool(text)
    return False


def _words(data: Mapping[str, Any], *names: str) -> dict[str, str]:
    """These fields of a call or a result, as text: anybody may have written it."""
    found = {name: data.get(name) for name in names}
    return {name: _word(value) for name, value in found.items()}


def _word(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def _written(**fields: Any) -> str:
    return clean(json.dumps(fields, ensure_ascii=False))
