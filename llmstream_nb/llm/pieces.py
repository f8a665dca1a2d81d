"""Put together what endpoints send in pieces: tool calls, and reasoning between <think> tags. Does no I/O."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llmstream_nb.protocol.parts import LONG, MAX_PART, Reasoning, ToolCall
from llmstream_nb.protocol.wire import clean, printable

MOST_CALLS = 1_000  # of an answer
NAME = 200  # characters of a tool's name
LOOKED = 16_000_000  # characters of arguments that are parsed, again and again, to see whether they are whole
OPEN, CLOSE = "<think>", "</think>"
BLANK = 1_000  # characters of white space that may stand before the tag


@dataclass
class _Call:
    index: str
    id: str
    name: str
    pieces: list[str] = field(default_factory=list)  # of the arguments
    size: int = 0  # characters of them
    parsed: tuple[int, bool] = 0, False  # how many were parsed, and whether they were an object
    given: bool = False  # whether it was handed over


class Calls:
    """The tool calls of an answer, from their pieces: each is handed over once it is complete, in order.

    A call whose arguments are a JSON object is complete when another begins, or text, or the model ends. With any
    others it may go on until `rest` is taken, as pieces of several calls may come by turns, and text between them;
    but behind text, what has no index and no id begins a call. `too_much` says what goes beyond the limits, once
    something does; then nothing more is handed over.
    """

    def __init__(self) -> None:
        self.too_much = ""
        self._calls: list[_Call] = []
        self._given = 0  # so many of them were handed over
        self._ids = set[str]()
        self._looked = 0

    def __bool__(self) -> bool:
        return bool(self._calls)

    def take(self, told: Any) -> Iterator[ToolCall]:
        """Take in what a message tells of calls, pieces or whole ones; the calls that are complete now."""
        pieces = told if isinstance(told, list) else [told]
        for at, piece in enumerate(pieces):
            place = str(at) if len(pieces) > 1 else ""  # where no index tells them apart
            if isinstance(piece, dict) and not self.too_much and self._begins(piece, place):
                yield from self.whole(len(self._calls) - 1)

    def whole(self, end: int | None = None, *, text: bool = False) -> Iterator[ToolCall]:
        """The next calls whose arguments are an object, of the first `end`, or of all; also what `text` ends."""
        for call in self._calls[self._given : end]:
            marked = not text or call.index or call.id  # then more of it can be told from another
            if self.too_much or (marked and not self._is_whole(call)):
                return
            yield self._hand_over(call)

    def rest(self) -> Iterator[ToolCall]:
        """All calls that were not handed over, as they stand."""
        for call in [] if self.too_much else self._calls[self._given :]:
            yield self._hand_over(call)

    def _begins(self, piece: dict[str, Any], place: str) -> bool:
        """Take in a piece; whether it was the first of a call."""
        named = (piece.get(name) for name in ("function", "custom"))  # a custom tool takes any text as its input
        inner = next((told for told in named if isinstance(told, dict)), piece)
        index, call_id = _word(piece.get("index")) or place, _word(piece.get("id"))[:LONG]
        name = printable(_word(inner.get("name"))[:LONG])[:NAME]
        told = inner.get("arguments", inner.get("input"))  # some send them as an object
        text = told if isinstance(told, str) else "" if told is None else json.dumps(told, ensure_ascii=False)
        if not (call_id or name or text):
            return False
        call = self._found(index, call_id, name, text)
        begins = call is None
        if call is None:
            if len(self._calls) == MOST_CALLS:
                self.too_much = f"more than {MOST_CALLS:,} tool calls"
                return False
            self._calls.append(call := _Call(index, call_id, name))
        call.index, call.id = call.index or index, call.id or call_id
        call.name = call.name if name == call.name else (call.name + name)[:NAME]
        call.pieces.append(text)
        call.size += len(text)
        if call.size > MAX_PART:
            self.too_much = f"a tool call with more than {MAX_PART:,} characters of arguments"
        return begins

    def _found(self, index: str, call_id: str, name: str, text: str) -> _Call | None:
        """The call that a piece belongs to; None if it begins one: index or id, or both, may be missing or repeated."""
        fits = (call for call in reversed(self._calls) if _agree(index, call.index) and _agree(call_id, call.id))
        call = next(fits, None)
        if call is None:
            return None
        if not _agree(name, call.name):  # the name may come in pieces, as the arguments do
            return call if index and call.id and not (call.size or call.given) else None
        if name and not (index or call.index or call_id or call.id or call.size or text):
            return None
        if call.given and (text.strip() or (name and not call_id)):
            return None
        if name and not (call_id and call.id) and text.lstrip().startswith("{"):
            return None if self._is_whole(call) else call
        return call

    def _is_whole(self, call: _Call) -> bool:
        if call.parsed[0] != call.size and self._looked < LOOKED:
            self._looked += call.size
            try:
                call.parsed = call.size, isinstance(json.loads("".join(call.pieces)), dict)
            except (ValueError, RecursionError):
                call.parsed = call.size, False
        return call.parsed[1]

    def _hand_over(self, call: _Call) -> ToolCall:
        self._given = number = self._given + 1
        call_id = clean(call.id)
        while not call_id or call_id in self._ids:  # results are told apart by it
            call_id, number = f"call_{number}", number + 1
        self._ids.add(call_id)
        arguments = clean("".join(call.pieces))
        call.pieces, call.given = [], True
        return ToolCall(call_id, call.name, arguments if arguments.strip() else "{}")


def _word(told: Any) -> str:
    return str(told) if isinstance(told, (str, int)) else ""


def _agree(one: str, other: str) -> bool:
    return one == other or not (one and other)


class Thinking:
    """Text that may begin with <think>…</think>: what stands between the tags is reasoning, to the end if need be."""

    def __init__(self) -> None:
        self._tag = OPEN  # which may come next
        self._edge = ""  # the beginning of it, perhaps

    def take(self, text: str) -> Iterator[str | Reasoning]:
        """What `text`, cut anywhere, adds; the tags are left out, and white space before the first."""
        text, self._edge = self._edge + text, ""
        if self._tag == OPEN:
            begun = text.lstrip()
            may = len(text) - len(begun) < BLANK
            if may and begun != OPEN and OPEN.startswith(begun):
                self._edge = text
                return
            self._tag = CLOSE if may and begun.startswith(OPEN) else ""
            text = begun.removeprefix(OPEN) if self._tag else text
        if self._tag == CLOSE:
            thought, closed, text = text.partition(CLOSE)
            if closed:
                self._tag = ""
            else:
                edge = next(n for n in range(len(CLOSE) - 1, -1, -1) if thought.endswith(CLOSE[:n]))
                thought, self._edge = thought[: len(thought) - edge], CLOSE[:edge]
            if thought:
                yield Reasoning(thought)
        if text:
            yield text

    def rest(self) -> Iterator[str | Reasoning]:
        """What was held back, now that no more text follows it."""
        edge, self._edge = self._edge, ""
        if edge:
            yield Reasoning(edge) if self._tag == CLOSE else edge
            self._tag = self._tag.removeprefix(OPEN)
