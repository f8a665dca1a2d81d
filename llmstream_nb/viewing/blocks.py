"""Parts of an answer other than its text, as its viewers draw them: bounded, and in words."""

import json
from math import isinf
from typing import Any

from llmstream_nb.protocol.parts import Part, ToolCall, ToolResult, Unknown
from llmstream_nb.protocol.wire import clean

LONGEST = 20_000  # characters of a call, or of a result, that are drawn
BEGINNING = 300  # characters in sight of what is folded
LINES = 4  # that are not yet folded


def drawn(part: Part) -> dict[str, Any]:
    """A part, as browsers are told of it."""
    match part:
        case ToolCall(call_id=call_id, name=name):
            line, valid = _call(name or "unnamed", clean(part.arguments))
            broken = {} if valid else {"broken": True}
            return {"kind": part.kind, "id": call_id, "line": line[:LONGEST], "ms": part.ms} | broken | _more(line)
        case ToolResult(call_id=call_id, content=content, error=error, cut=cut):
            words = clean(error or content)
            said = {"error" if error else "content": words[:LONGEST]} | ({"cut": cut} if cut else {})
            return {"kind": part.kind, "id": call_id, "ms": part.ms} | said | _more(words)
        case Unknown(kind=kind):
            return {"kind": "other", "name": kind, "ms": part.ms}
    return {"kind": part.kind, "text": part.text, "ms": part.ms}


def _more(words: str) -> dict[str, int]:
    return {"more": len(words) - LONGEST} if len(words) > LONGEST else {}


def _call(name: str, arguments: str) -> tuple[str, bool]:
    """A call in one line, as in Python where its arguments are an object; and whether they are JSON at all.

    What Python would make something else of, or can't take apart, stands there as it was written.
    """
    raw = f"{name}({' '.join(arguments.split())})"
    if not arguments.strip() or len(arguments) > LONGEST:
        return raw, True  # nothing, or too much to be looked at
    try:
        value = json.loads(arguments, object_pairs_hook=_object, parse_int=_number, parse_float=_number)
        if not isinstance(value, dict):
            return raw, True
        given = [f"{key if key.isidentifier() else _json(key)}={_json(one)}" for key, one in value.items()]
    except (OverflowError, KeyError, RecursionError):
        return raw, True
    except ValueError:
        return raw, False
    return f"{name}({', '.join(given)})", True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(value := dict(pairs)) < len(pairs):
        raise KeyError("twice")
    return value


def _number(text: str) -> float:
    if isinf(float(text)):
        raise OverflowError
    return int(text) if text.lstrip("-").isdecimal() else float(text)


def _json(value: Any) -> str:
    return clean(json.dumps(value, ensure_ascii=False))


def thought(block: dict[str, Any], now: int | None = None) -> str:
    """How long reasoning took; or, with `now` in milliseconds since the attempt's start, that it goes on."""
    ms = max(0, (block["ms"] if now is None else now) - block["since"])
    seconds = f"{ms / 1000:.{1 if ms < 1000 else 0}f} s"
    return f"Thought for {seconds}" if now is None else f"Thinking … {seconds}"


def left_out(block: dict[str, Any]) -> str:
    """How much of a call or a result is not drawn, in words."""
    more = f"[{block['more']:,} more characters are not shown]" if "more" in block else ""
    cut = f"[{block['cut']:,} more characters were left out of the stream]" if "cut" in block else ""
    return " ".join(filter(None, [more, cut]))


def beginning(text: str) -> str:
    """What is in sight of a text that is folded; all of it where it is short."""
    short = len(text) <= BEGINNING and text.count("\n") < LINES
    return text if short else f"{text.partition(chr(10))[0][:BEGINNING]} …"
