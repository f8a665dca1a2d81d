"""What an endpoint sends, read with tolerance: bytes in, parts out, and how it ended. Does no I/O."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llmstream_nb.llm.pieces import Calls, Thinking
from llmstream_nb.protocol.events import flat_numbers
from llmstream_nb.protocol.parts import Reasoning, Refusal, ToolCall
from llmstream_nb.protocol.wire import printable

MOST = 16_000_000  # bytes of one event, or of a body that is no stream
LINES = 100_000  # of one event, or of such a body
WORDS = 20_000  # characters of an error, or of a refusal, that are looked at
TELLING = ("error", "message", "detail", "msg", "errors", "reason", "title", "type", "code")  # where words may stand
THOUGHTS = ("reasoning_content", "reasoning", "reasoning_details", "thinking")  # several may hold the same reasoning
# Of parts in a list, by their type; or where none is given, by where their words stand.
KINDS = {"text": "text", "output_text": "text", "content": "text", "refusal": "refusal"}
KINDS |= {"thinking": "reasoning", "reasoning": "reasoning"}
SAID = ("text", "thinking", "summary", "reasoning", "refusal", "content")  # where a part may have its words
Piece = str | Reasoning | Refusal | ToolCall  # a string is text


@dataclass(frozen=True)
class Fault:
    """An error as the endpoint tells it: its words, and an HTTP status (else 0) if it names one."""

    words: str = ""
    code: int = 0
    too_long: bool = False  # it was the question, for the model's context


class Reader:
    """Takes in the body of an answer as it comes, a stream of chunks or one whole completion.

    `reason` is the finish reason, once it came; `done` is true once `[DONE]` or a whole completion came; `failed` holds
    the error that was sent instead of (more) text; `malformed` is true if this is no completion at all, or if something
    is larger than is read, which `too_much` then names. If the body ends and none of them is set, it was cut, or
    followed by a `page` for browsers. `usage` holds numbers, by name. `mask` hides what must not be shown of a
    refusal's words and of the reason. Text, reasoning and calls are not masked: a model that knows a key was told it by
    whoever asks. With `think_tags`, what stands between <think> and </think> at the beginning of the text is reasoning.
    """

    def __init__(self, mask: Callable[[str], str] = str, think_tags: bool = False) -> None:
        self.reason: str | None = None
        self.done = self.malformed = self.page = False
        self.failed: Fault | None = None
        self.too_much = ""
        self.usage: dict[str, float] = {}
        self.alive = False  # whether the last bytes were a sign of the model's life: comments and pings are none
        self.written = self.thought = self.refused = False  # text other than white space came; reasoning; a refusal
        self._rest = bytearray()  # of a line that has not ended
        self._event, self._held = "", list[str]()  # the event's name, and data that is no JSON yet: more may follow
        self._body: list[str] = []  # what is no chunk, since the last one: one whole body, or words of failure
        self._streamed, self._size = False, 0  # whether a chunk came; characters since the last one
        self.calls, self._thinking = Calls(), Thinking() if think_tags else None
        self._mask, self._refusal = mask, ""  # words of refusal: held until no more follow, to be masked as a whole
        self._kind = ""  # of the part that came last: what is held is of this kind

    def feed(self, data: bytes) -> list[Piece]:
        """Take in some bytes, cut anywhere, and return the parts that are complete with them."""
        self._rest += data
        if len(self._rest) + self._size > MOST or len(self._held) + len(self._body) > LINES:
            self._give_up(f"more than {MOST:,} bytes, or {LINES:,} lines, in one piece")
        self.alive = False
        if b"\n" not in data:
            return []
        *lines, self._rest = self._rest.split(b"\n")
        parts: list[Piece] = []
        for line in lines:
            if not self.over:
                parts.extend(self._line(line.decode(errors="replace").removesuffix("\r").lstrip("\ufeff")))
        return parts

    def finish(self, cut: bool = False) -> list[Piece]:
        """Take what is left as it stands, now that the body has ended or, by a fault or a timeout, was cut."""
        garbled = self.malformed
        parts = self.feed(b"\n\n")
        self.malformed = garbled  # what was cut in its middle is not
        if not (cut or self._streamed or self.over):
            whole = _parsed("\n".join(self._body))
            parts.extend(self._chunk(whole) if isinstance(whole, dict) and whole.get("choices") else ())
        if not (cut or self.reason or self.failed or self.malformed or (self.done and self.answered)):
            begun = self._streamed or self.done  # then a single word is no failure, but a ping
            body = "\n".join(line for line in self._body if not (begun and re.fullmatch(r"[\w-]+", line)))
            self.page, self.failed = body.startswith("<"), body_fault(body)
            self.malformed = not begun and self.failed is None
        orderly = (self.done or self.reason is not None) and self.failed is None
        return [*parts, *self._held_back(), *(self.calls.rest() if orderly else ())]

    @property
    def answered(self) -> bool:
        """Whether there is something to go by: text, the words of a refusal, or a call."""
        return self.written or bool(self.calls)

    @property
    def begun(self) -> bool:
        """Whether a part of any kind has begun."""
        return self.answered or self.thought

    @property
    def over(self) -> bool:
        """Whether nothing that may follow counts."""
        return self.done or self.malformed or self.failed is not None

    def _line(self, line: str) -> Iterator[Piece]:
        name, _, value = line.partition(":")
        self._size += len(line)
        if not line:  # the end of an event
            if self._held:
                held, self._held = "\n".join(self._held), []
                chunk = _parsed(held)
                if chunk is None:  # such as a ping, or words where no more follows
                    self.malformed |= held.startswith("{")
                    self._body.append(held)
                yield from self._chunk(chunk or held)
            self._event = ""
        elif name == "data" and value.strip().startswith("[DONE]"):
            self.done = True
        elif name == "data":
            chunk = None if self._held else _parsed(value)  # once: to try again with each line takes for ever
            if chunk is not None:
                yield from self._chunk(chunk)
            elif value.strip():
                self._held.append(value.strip())
        elif name == "event":
            self._event = value.strip()
        elif name == "error":  # as older llama.cpp writes it
            self.failed = body_fault(value)
        elif name not in ("", "id", "retry"):
            self._body.append(line)

    def _chunk(self, chunk: Any) -> Iterator[Piece]:
        if isinstance(chunk, list) and chunk:  # as some wrap their errors
            chunk = chunk[0]
        told = self._event == "error"
        if isinstance(chunk, dict):
            self.usage = flat_numbers(chunk.get("usage")) or self.usage
            choices = chunk.get("choices")
            choices = [choices] if isinstance(choices, dict) and choices else choices
            if choices:
                self._streamed, self._body, self._size = True, [], 0
            elif not chunk.keys().isdisjoint(TELLING[:5]):
                self._body.append(json.dumps(chunk))
            for choice in choices if isinstance(choices, list) else ():
                if isinstance(choice, dict) and choice.get("index") in (0, "0", None):  # who asks for one reads one
                    yield from self._choice(choice)
            told |= bool(chunk.get("error")) or "error" in (chunk.get("object"), chunk.get("type"), self.reason)
        if told:
            self.failed = self.failed or fault(chunk)

    def _choice(self, choice: dict[str, Any]) -> Iterator[Piece]:
        message, part = choice.get("message"), choice.get("delta") or choice.get("text")
        if isinstance(message, dict) and not (part or self.answered):  # else it may say once more what came
            part = message
        part = {"content": part} if isinstance(part, (str, list)) else part
        if isinstance(part, dict):
            told = {name: value for name, value in part.items() if value and name != "role"}
            self.alive |= bool(told)
            yield from self._message(told)
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason not in ("", "null"):
            self.reason = self._mask(printable(reason[:1000]))[:40] or "stop"
            yield from self.calls.whole()
        if choice.get("error"):
            self.failed = fault(choice["error"])
        self.done |= "delta" not in choice and isinstance(message, dict)

    def _message(self, told: dict[str, Any]) -> Iterator[Piece]:
        """The parts in a message, or in a piece of one, in the order in which models write them."""
        content = told.pop("content", None)
        if told:  # seldom, and this is done for each token
            self.thought |= not told.keys().isdisjoint(THOUGHTS)
            yield from self._part("reasoning", next(filter(None, (_said(told.get(name)) for name in THOUGHTS)), ""))
        for part in content if isinstance(content, list) else [content]:
            if isinstance(part, str):
                yield from self._part("text", part)
            elif isinstance(part, dict):
                kind = part.get("type") or next(filter(part.get, KINDS), "")
                yield from self._part(KINDS.get(kind, "") if isinstance(kind, str) else "", _said(part))
        if told:
            yield from self._part("refusal", _said(told.get("refusal")))
            calls = told.get("tool_calls") or told.get("function_call")  # the older name, with one call
            if calls:
                yield from self._before("call")
                yield from self.calls.take(calls)
                self._give_up(self.calls.too_much)

    def _part(self, kind: str, words: str) -> Iterator[Piece]:
        if not (kind and words):
            return
        yield from self._before(kind)
        if kind == "text":
            for piece in self._thinking.take(words) if self._thinking else [words]:
                yield self._noted(piece)
        elif kind == "reasoning":
            yield self._noted(Reasoning(words))
        else:
            self._refusal += words
            self.refused = True
            self.written |= bool(words.strip())
            if len(self._refusal) > WORDS:
                self._give_up(f"a refusal of more than {WORDS:,} characters")

    def _give_up(self, too_much: str) -> None:
        self.too_much, self.malformed = self.too_much or too_much, self.malformed or bool(too_much)

    def _noted(self, piece: str | Reasoning) -> str | Reasoning:
        if isinstance(piece, str):
            self.written |= not piece.isspace()
        else:
            self.thought = True
        return piece

    def _before(self, kind: str) -> Iterator[Piece]:
        """What was held back, now that a part of this kind follows; nothing if it is of the same."""
        if kind != self._kind:
            self._kind = kind
            yield from self._held_back()
            yield from self.calls.whole(text=True)

    def _held_back(self) -> Iterator[Piece]:
        for piece in self._thinking.rest() if self._thinking else ():
            yield self._noted(piece)
        held, self._refusal = self._refusal[:WORDS], ""
        if held:
            yield Refusal(self._mask(held))


def _said(told: Any, depth: int = 4) -> str:
    """The words of a part, in whatever shape: a text, an object that holds it, or a list of such."""
    if isinstance(told, str):
        return told
    if isinstance(told, list) and depth:
        return "".join(_said(one, depth - 1) for one in told)
    if isinstance(told, dict) and depth:
        return next(filter(None, (_said(told.get(name), depth - 1) for name in SAID)), "")
    return ""


def _parsed(text: str) -> Any:
    """`text` as JSON; None if it is none, or nested too deep to be anything sensible."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def fault(said: Any) -> Fault:
    """What `said`, parsed JSON or a text, tells of an error, in whatever shape."""
    inner = said[0] if isinstance(said, list) and said else said
    while isinstance(inner, dict) and isinstance(inner.get("error"), dict):
        inner = inner["error"]
    named = [inner.get(name) for name in ("code", "status", "type")] if isinstance(inner, dict) else []
    kinds = [str(kind) for kind in named if isinstance(kind, (str, int))]
    codes = [int(kind) for kind in kinds if len(kind) == 3 and kind.isdecimal() and kind[0] in "45"]
    return Fault(_words(said)[:WORDS], codes[0] if codes else 0, any("context_" in kind for kind in kinds))


def body_fault(body: str) -> Fault | None:
    """What a body that is no completion tells; None for a page of HTML, which is for browsers, and for broken JSON."""
    body = body.strip("\ufeff \r\n")
    told = _parsed(body)
    told = fault(told if told is not None or body.startswith(("<", "{", "[")) else body)
    return told if told.words else None


def _words(said: Any, depth: int = 6) -> str:
    """The words in an error: OpenAI's, vLLM's, FastAPI's with its list of places, or a plain text."""
    if isinstance(said, str):
        inner = _parsed(said) if said.startswith("{") and depth else None  # an error handed on as text
        return _words(inner, depth - 1) or printable(said[:WORDS])
    if isinstance(said, list) and depth:
        return "; ".join(filter(None, (_words(one, depth - 1) for one in said[:3])))
    if isinstance(said, dict) and depth:
        place = said.get("loc")
        where = ".".join(str(step) for step in place if isinstance(step, (str, int))) if isinstance(place, list) else ""
        told = next(filter(None, (_words(said.get(name), depth - 1) for name in TELLING)), "")
        more = said.get("metadata")  # where OpenRouter hands on what the provider said
        raw = _words(more.get("raw"), depth - 1) if isinstance(more, dict) else ""
        return ": ".join(filter(None, (where if told else "", told, raw)))
    return ""
