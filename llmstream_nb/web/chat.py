"""An answer's events as chunks of OpenAI's chat completions, for clients that know nothing of resuming. No I/O."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llmstream_nb.protocol.events import Ended, Event, Failed, Gap, Restarted
from llmstream_nb.protocol.parts import Reasoning, Refusal, Text, ToolCall
from llmstream_nb.protocol.wire import ORIGIN, EntryID, clean
from llmstream_nb.web.sse import Frame, Wire

DELTAS = {Text: "content", Refusal: "refusal", Reasoning: "reasoning_content"}
REASONS = ("stop", "length", "tool_calls", "content_filter")
ANEW = "a newer attempt answers from the beginning: ask again, or read the answer by its id"
CLOSED = "the server ends: read the answer by its id, or ask again"
LACKS = "some of its entries are gone from the stream: ask again, or read it by its id"


class Chat(Wire):
    """What is sent of one answer."""

    hello, alive, whole = b"", b": alive\n\n", True
    usage = False  # whether its asker wants to be told

    def __init__(self, answer_id: str, record: Mapping[str, Any]) -> None:
        created, model = record.get("asked"), record.get("model")
        self._head = {"id": answer_id, "object": "chat.completion.chunk", "model": str(model or "")}
        self._head["created"] = int(created) if isinstance(created, (int, float)) else 0  # type: ignore[assignment]
        self._calls, self._begun, self._called = 0, 0, False

    def frames(self, events: Iterable[Event]) -> Iterator[Frame]:
        """Write these events."""
        for event in events:
            begins, self._begun = not self._begun, self._begun or event.id.attempt
            if begins:
                yield self._chunk(event.id, {"role": "assistant", "content": ""})
            if not isinstance(event, Ended):
                self._called = isinstance(event, ToolCall)
            match event:
                case Text(text=text) | Refusal(text=text) | Reasoning(text=text):
                    yield self._chunk(event.id, {DELTAS[type(event)]: text})
                case ToolCall():
                    yield self._chunk(event.id, {"tool_calls": [{"index": self._calls} | call_of(event, self._calls)]})
                    self._calls += 1
                case Ended(reason=reason, data=data):
                    yield self._ended(event.id, reason, data.get("usage"))
                case Failed(error=error, message=message):
                    yield self.failure(error, message, event.id)
                case Restarted() if not begins:
                    yield self.again(event.id)
                case Gap():
                    yield self.failure("Gap", LACKS, event.id)
                case _:
                    pass

    def state(self, _: str, /) -> bytes:
        """Nothing: that API has no words for it."""
        return b""

    def cut(self) -> bytes:
        """What is raised where the server ends: else the client took what it has for the whole."""
        return self.failure("Ended", CLOSED, ORIGIN).data

    def again(self, place: EntryID) -> Frame:
        """What is raised where another attempt is there than the one that was seen."""
        return self.failure("Restarted", ANEW, place)

    def failure(self, error: str, message: str, place: EntryID, seen: int = -1) -> Frame:  # noqa: ARG002
        """What ends a stream, and is raised by its client."""
        return Frame(place, _data({"error": {"message": message, "type": "server_error", "code": error}}), final=True)

    def _chunk(self, entry_id: EntryID, delta: dict[str, Any], reason: str | None = None) -> Frame:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return Frame(entry_id, _data(self._head | {"choices": [choice]}), begun=self._begun)

    def _ended(self, entry_id: EntryID, reason: str, usage: Any) -> Frame:
        last = self._chunk(entry_id, {}, finish_reason(reason, self._called)).data
        told = _data(self._head | {"choices": [], "usage": usage}) if self.usage else b""
        return Frame(entry_id, last + told + b"data: [DONE]\n\n", final=True, begun=self._begun)


class ChatWithUsage(Chat):
    """The same with a last chunk that tells the tokens."""

    usage = True


def finish_reason(reason: str, called: bool = False) -> str:
    """Why it ended, in the API's words; what somebody has stopped is cut off, as at a limit. `called`: with a call."""
    if called and reason == "stop":
        return "tool_calls"
    return reason if reason in REASONS else "length" if reason == "cancelled" else "stop"


def call_of(call: ToolCall, number: int) -> dict[str, Any]:
    """A call, as that API has it."""
    function = {"name": clean(call.name), "arguments": clean(call.arguments)}
    return {"id": clean(call.call_id) or f"call_{number}", "type": "function", "function": function}


def completion_of(answer_id: str, record: Mapping[str, Any], parts: Iterable[Any]) -> dict[str, Any]:
    """The whole answer, once it has ended, in one piece."""
    parts = list(parts)
    called = bool(parts) and isinstance(parts[-1], ToolCall)
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for part in parts:
        if name := DELTAS.get(type(part)):
            message[name] = message.get(name, "") + part.text
        elif isinstance(part, ToolCall):
            calls = message.setdefault("tool_calls", [])
            calls.append(call_of(part, len(calls)))
    created, reason = record.get("asked"), finish_reason(str(record.get("reason") or "stop"), called)
    return {
        "id": answer_id,
        "object": "chat.completion",
        "created": int(created) if isinstance(created, (int, float)) else 0,
        "model": str(record.get("model") or ""),
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": record.get("usage"),
    }


def _data(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False, allow_nan=False)}\n\n".encode("utf-8", "replace")
