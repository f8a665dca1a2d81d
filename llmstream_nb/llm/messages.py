"""What a model is asked: messages, and the parameters beside them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmstream_nb.protocol.wire import MAX_QUESTION, BadQuestion, check_question, clean

Message = dict[str, Any]
MAX_REQUEST = 1_000_000  # characters of the JSON text of messages and parameters
# What the kit says itself, and what the client would take for itself.
NO_PARAMS = {"model", "messages", "stream", "stream_options", "n"}
NO_PARAMS |= {"extra_headers", "extra_query", "extra_body", "timeout"}


def asked(question: str, turns: Sequence[Message] = ()) -> list[Message]:
    """The question as a message, after the turns before it."""
    return [*turns, {"role": "user", "content": clean(question)}]


def introduced(messages: list[Message], topic: str | None) -> list[Message]:
    """These messages after one that tells the model its part, unless they begin with such a one."""
    if messages[0].get("role") in ("system", "developer"):
        return messages
    role = f"You are an expert in answering questions about {topic}." if topic else "You answer questions."
    system = f"{role} Be correct, brief and plain; if you don't know, say so."
    return [{"role": "system", "content": clean(system)}, *messages]


def request_text(messages: Sequence[Message] | None, params: Mapping[str, Any] | None, *instead: Any) -> str:
    """The JSON text of what is given of the two, as the record keeps it; empty where that is nothing.

    `instead` are the arguments in whose place messages stand. Raises TypeError where one of them is given too, or
    where something is no JSON; BadQuestion where it is no list of messages, too long, or a parameter that can't be one.
    """
    given: dict[str, Any] = {} if messages is None else {"messages": messages}
    given |= {"params": params} if params else {}
    if messages is not None and any(instead):
        raise TypeError("messages stand in place of question, topic and follows: give either them, or messages")
    try:
        text = clean(json.dumps(given, ensure_ascii=False, allow_nan=False)) if given else ""
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"messages and params must be JSON: {error}") from None
    if len(text) > MAX_REQUEST:
        raise BadQuestion(f"messages and params have {len(text):,} characters; at most {MAX_REQUEST:,} are taken")
    listed = isinstance(messages, (list, tuple)) and messages and all(isinstance(each, dict) for each in messages)
    if messages is not None and not listed:
        raise BadQuestion('messages are a list of dicts, as [{"role": "user", "content": "Why?"}], and not empty')
    if not isinstance(params or {}, dict):
        raise BadQuestion('params are a dict, as {"temperature": 0}')
    if wrong := [name for name in params or {} if name in NO_PARAMS]:
        raise BadQuestion(f"params can't hold {', '.join(wrong)}: leave it out, or see the arguments of the call")
    return text


def request_of(text: Any) -> dict[str, Any]:
    """Messages and params in such a text; raises BadQuestion where it is none, as anybody may have written it."""
    try:
        given = json.loads(text) if text else {}
        messages, params = given.get("messages"), given.get("params")
        request_text(messages, params)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadQuestion(f"the request in the record is not one that ask() wrote: {error}") from None
    return {"messages": messages, "params": params}


def question_in(messages: Sequence[Message]) -> str:
    """What is shown as the question: the text of the last user message that has one. Raises BadQuestion."""
    for message in reversed(messages):
        content = message.get("content") if message.get("role") == "user" else None
        parts = content if isinstance(content, list) else [{"text": content}]
        texts = [part.get("text") for part in parts if isinstance(part, dict)]
        text = "\n".join(text for text in texts if isinstance(text, str)).strip()
        if text:
            return check_question(text[:MAX_QUESTION])
    raise BadQuestion("none of these messages is a user's with a text: add one")
