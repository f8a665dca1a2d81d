"""An answer's events as those of OpenAI's Responses API, so that its client reads, and resumes, any answer. No I/O.

An event's number is made of its entry's ID. So every server gives it alike, and `starting_after` names an entry.
https://platform.openai.com/docs/api-reference/responses-streaming
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llmstream_nb.protocol.events import Ended, Event, Failed, Gap, Interrupted, Restarted, Started
from llmstream_nb.protocol.parts import Reasoning, Refusal, Text, ToolCall, ToolResult
from llmstream_nb.protocol.wire import ORIGIN, EntryID, clean
from llmstream_nb.web.sse import Frame, Wire, frame

# What an entry's events are, in their order, each at a place of its own: also one who lacks the entries before, which
# were trimmed, gives an event the number that it has for all.
ORDER = ["done", "content_part.done", "item.done", "created", "in_progress", "added", "content_part.added"]
ORDER += ["delta", "arguments.done", "end"]
SLOT = {name: place for place, name in enumerate(ORDER)}
SLOTS = len(ORDER)
ENTRIES = 10**9  # of one attempt
AGAIN = "a newer attempt answers from the beginning: retrieve it, or stream it anew without starting_after"
GONE = "entries_gone"  # why it is incomplete where some were trimmed; retrieved, it has what the record holds
# By kind of delta: type of the item, of its content, the content's field, and the name in events.
SHAPES = {
    Text: ("message", "output_text", "text", "output_text"),
    Refusal: ("message", "refusal", "refusal", "refusal"),
    Reasoning: ("reasoning", "reasoning_text", "text", "reasoning_text"),
}
PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}
# Why an answer that the model did not complete has ended, in the words of the API; a stopped one is `cancelled`.
INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


def number_of(entry_id: EntryID, slot: int = 0) -> int:
    """The number of an entry's event."""
    return max(0, ((entry_id.attempt - 1) * ENTRIES + entry_id.seq) * SLOTS + slot)


def entry_of(number: int) -> EntryID:
    """The entry to which an event with this number belongs."""
    attempt, seq = divmod(number // SLOTS, ENTRIES)
    return EntryID(attempt + 1, seq)


class Responses(Wire):
    """What is sent of one answer; `frames` is to be given its events from the beginning of an attempt on."""

    hello, alive, whole = b"", b": alive\n\n", True

    def __init__(self, answer_id: str, record: Mapping[str, Any]) -> None:
        beside = dict.fromkeys(("error", "incomplete_details", "instructions", "temperature", "top_p", "usage"))
        lists: dict[str, Any] = {"output": [], "tools": [], "metadata": {}}
        self.response: dict[str, Any] = {"id": answer_id, "object": "response", "created_at": 0, "status": "queued"}
        self.response |= {"model": "", "background": True, "parallel_tool_calls": True, "tool_choice": "auto"}
        self.response |= {"previous_response_id": record.get("follows")} | beside | lists
        self._begin(record)
        self._id, self._number = ORIGIN, -1
        self._open: Any = None  # the kind of delta that the last item grows by
        self._pieces: list[str] = []
        self._gap = self._over = False
        self._begun = 0

    def _begin(self, data: Mapping[str, Any]) -> None:
        created, model = data.get("asked"), data.get("model")
        self.response |= {"created_at": int(created)} if isinstance(created, (int, float)) else {}
        self.response |= {"model": model} if isinstance(model, str) else {}

    def frames(self, events: Iterable[Event]) -> Iterator[Frame]:
        """Write these events; what is told beside entries (`Interrupted`) is left out."""
        for event in events:
            for made in self.translate(event):
                final = made["type"] in ("response.completed", "response.incomplete", "response.failed")
                yield Frame(event.id, frame(made["type"], made), final, made["sequence_number"], self._begun)

    def state(self, _: str, /) -> bytes:
        """Nothing: that API has no words for it in mid-stream."""
        return b""

    def again(self, place: EntryID) -> Frame:
        """What ends the stream of one who has seen an earlier attempt."""
        self._id = place
        self.response |= {"status": "failed", "error": {"code": "restarted", "message": AGAIN}}
        return Frame(place, frame("response.failed", self._terminal("failed")), final=True)

    def failure(self, error: str, message: str, place: EntryID, seen: int = -1) -> Frame:
        """What ends a stream, and not the answer."""
        number = max(seen, number_of(place, SLOTS - 1))
        told = {"type": "error", "sequence_number": number, "code": error, "message": message}
        return Frame(place, frame("error", told | {"param": None}), final=True)

    def translate(self, event: Event) -> Iterator[dict[str, Any]]:
        """The API's events for one of the kit's; none for what it has no words for, as a kind of a later version."""
        self._id = event.id
        self._begun = self._begun or event.id.attempt
        if self._over:
            return
        if self.response["status"] == "queued" and not isinstance(event, (Started, Restarted, Gap, Interrupted)):
            yield from self._started({})  # its start was trimmed
        match event:
            case Started(data=data):
                yield from self._started(data)
            case Restarted(data=data) if self.response["status"] == "queued":  # nothing of what is void was told
                yield from self._started(data)
            case Restarted():
                self.response |= {"status": "failed", "error": {"code": "restarted", "message": AGAIN}}
                yield self._terminal("failed")
            case Gap(id=(attempt, seq), missing=missing):
                self._gap, self._id = True, EntryID(attempt, seq - 1)  # who has seen that one misses nothing
                if self.response["status"] == "queued":
                    yield from self._started({})
                yield self._event("llmstream.gap", "delta", missing=missing)
            case Text() | Refusal() | Reasoning():
                yield from self._delta(event)
            case ToolCall() | ToolResult():
                yield from self._item(event)
            case Ended(reason=reason, data=data):
                yield from self._ended(reason, data)
            case Failed(error=error, message=message):
                yield from self._close("incomplete")
                self.response |= {"status": "failed", "error": {"code": error, "message": message}}
                yield self._terminal("failed")

    def _event(self, kind: str, slot: str, **data: Any) -> dict[str, Any]:
        # Of a record all parts have one ID: there the numbers count on.
        self._number = max(number_of(self._id, SLOT[slot]), self._number + 1)
        return {"type": kind, "sequence_number": self._number} | data

    def _terminal(self, kind: str) -> dict[str, Any]:
        self._over = True
        return self._event(f"response.{kind}", "end", response=dict(self.response))

    def _started(self, data: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        self._begin(data)
        self.response["status"] = "in_progress"
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", kind, response=self.response | {"output": []})

    def _ended(self, reason: str, data: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        whole = not self._gap and reason not in (*INCOMPLETE, "cancelled")
        yield from self._close("completed" if whole else "incomplete")
        kind, why = "completed" if whole else "incomplete", GONE if self._gap else INCOMPLETE.get(reason)
        status = "cancelled" if reason == "cancelled" else kind
        details = {"reason": why} if why else None
        self.response |= {"status": status, "usage": usage_of(data.get("usage") or {}), "incomplete_details": details}
        yield self._terminal(kind)  # there is no event for what was stopped

    def _at(self) -> dict[str, Any]:
        """Where an event of the last item belongs."""
        output = self.response["output"]
        return {"item_id": output[-1]["id"], "output_index": len(output) - 1}

    def _add(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The event of a new item."""
        output = self.response["output"]
        item = {"id": f"{PREFIXES[kind]}_{len(output)}", "type": kind, "status": "in_progress"} | fields
        output.append(item)
        return self._event("response.output_item.added", "added", output_index=len(output) - 1, item=dict(item))

    def _done(self, status: str, slot: str) -> dict[str, Any]:
        """The event of the last item's end."""
        output = self.response["output"]
        output[-1]["status"] = status
        return self._event("response.output_item.done", slot, output_index=len(output) - 1, item=dict(output[-1]))

    def _delta(self, delta: Text | Refusal | Reasoning) -> Iterator[dict[str, Any]]:
        item, kind, field, name = SHAPES[type(delta)]
        if self._open is not type(delta):
            yield from self._close("completed")
            part: dict[str, Any] = {"type": kind, field: ""} | (
                {"annotations": [], "logprobs": []} if kind == "output_text" else {}
            )
            fields: dict[str, Any] = {"role": "assistant"} if item == "message" else {"summary": []}
            yield self._add(item, content=[], **fields)
            yield self._event(
                "response.content_part.added", "content_part.added", **self._at(), content_index=0, part=dict(part)
            )
            self.response["output"][-1]["content"] = [part]
            self._open, self._pieces = type(delta), []
        self._pieces.append(delta.text)
        beside: dict[str, Any] = {"logprobs": []} if kind == "output_text" else {}
        yield self._event(f"response.{name}.delta", "delta", **self._at(), content_index=0, delta=delta.text, **beside)

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        """End the item that grows, if one does."""
        if self._open is None:
            return
        _, _, field, name = SHAPES[self._open]
        part = self.response["output"][-1]["content"][0]
        part[field] = "".join(self._pieces)
        at = self._at() | {"content_index": 0}
        beside: dict[str, Any] = {"logprobs": []} if self._open is Text else {}
        self._open = None
        yield self._event(f"response.{name}.done", "done", **at, **{field: part[field]}, **beside)
        yield self._event("response.content_part.done", "content_part.done", **at, part=dict(part))
        yield self._done(status, "item.done")

    def _item(self, part: ToolCall | ToolResult) -> Iterator[dict[str, Any]]:
        """A call, or what a tool gave back: it comes in one piece."""
        yield from self._close("completed")
        if isinstance(part, ToolResult):
            output = clean(f"Error: {part.error}" if part.error else part.content)
            yield self._add("function_call_output", call_id=part.call_id, output=output)
        else:
            yield self._add("function_call", call_id=self._call_id(part), name=clean(part.name), arguments="")
            arguments = self.response["output"][-1]["arguments"] = clean(part.arguments)
            yield self._event("response.function_call_arguments.delta", "delta", **self._at(), delta=arguments)
            named = {"name": clean(part.name), "arguments": arguments}
            yield self._event("response.function_call_arguments.done", "arguments.done", **self._at(), **named)
        yield self._done("completed", "end")

    def _call_id(self, call: ToolCall) -> str:
        """The id of a call, which its client wants to be there and to be the only one."""
        output = self.response["output"]
        known = {item["call_id"] for item in output if item["type"] == "function_call"}
        return call.call_id if call.call_id and call.call_id not in known else f"call_{len(output)}"


def usage_of(flat: Mapping[str, float]) -> dict[str, Any] | None:
    """The tokens in the API's words, of the flat ones that an entry holds; None where nothing is known."""
    given, made = flat.get("input_tokens", flat.get("prompt_tokens")), flat.get("output_tokens")
    made = flat.get("completion_tokens") if made is None else made
    if given is None or made is None or min(given, made) < 0:
        return None
    return {
        "input_tokens": int(given),
        "input_tokens_details": {"cached_tokens": flat.get("cached_tokens", 0)},
        "output_tokens": int(made),
        "output_tokens_details": {"reasoning_tokens": flat.get("reasoning_tokens", 0)},
        "total_tokens": int(flat.get("total_tokens", given + made)),
    }


def response_of(answer_id: str, record: Mapping[str, Any], status: str, events: list[Event]) -> dict[str, Any]:
    """The answer as it stands, after all events of its newest attempt; `status` as `look` tells it."""
    one = Responses(answer_id, record)
    for event in events:
        for _ in one.translate(event):
            pass
    for _ in one._close("in_progress"):  # what it grows by
        pass
    if status in ("streaming", "interrupted"):
        one.response["status"] = "in_progress"
    return one.response
