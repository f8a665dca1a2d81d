"""What somebody with a type checker writes: test_types.py has it checked, and nobody runs it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, assert_never, assert_type

from fastapi import FastAPI

from llmstream_nb import (
    Answer,
    Continued,
    Ended,
    Failed,
    Gap,
    Interrupted,
    LLMStreamError,
    Reasoning,
    Refusal,
    Restarted,
    Started,
    Text,
    Timing,
    ToolCall,
    ToolResult,
    Unknown,
    Worker,
    Writing,
    aread_answer,
    ask,
    connect,
    create_app,
    enqueue,
    read_answer,
    text_of,
)


def shout(question: str, topic: str | None) -> Iterator[str]:
    """A source of one's own."""
    yield question.upper()
    yield topic or "!"


def asked() -> Answer:
    answer = ask("What is XADD?", source=shout, timing=Timing(ttl=3600), writing=Writing(coalesce_ms=100, maxlen=1000))
    assert_type(answer, Answer)
    assert_type(answer.id, str)
    assert_type(answer.status, str)
    assert_type(answer.wait(20).text, str)
    assert_type(answer.record, dict[str, Any])
    return answer


def followed(answer_id: str) -> str:  # noqa: C901 - one case for each event
    text = ""
    for event in read_answer(answer_id, timeout=30):
        match event:
            case Text(text=piece, ms=ms):
                assert_type(piece, str)
                assert_type(ms, int)
                text += piece
            case Reasoning(text=thought) | Refusal(text=thought):
                assert_type(thought, str)
            case ToolCall(call_id=call, name=name, arguments=arguments):
                assert_type(f"{call} {name}{arguments}", str)
            case ToolResult(content=content, error=error, cut=cut):
                assert_type(f"{content}{error}", str)
                assert_type(cut, int)
            case Unknown(kind=kind):
                assert_type(kind, str)
            case Continued(id=entry):
                assert_type(str(entry), str)
            case Restarted():
                text = ""
            case Started(data=data):
                assert_type(data, dict[str, Any])
            case Gap(missing=missing):
                assert_type(missing, int)
            case Interrupted(id=entry):
                assert_type(str(entry), str)
            case Ended(reason=reason):
                assert_type(reason, str)
            case Failed(error=error, message=message):
                assert_type(f"{error}: {message}", str)
            case _:
                assert_never(event)
    assert_type(text_of(read_answer(answer_id)), str)
    return text


async def followed_in_asyncio(answer_id: str) -> list[str]:
    return [event.text async for event in aread_answer(answer_id) if isinstance(event, Text)]


def pooled() -> Answer:
    client = connect("redis://127.0.0.1:6379/0", prefix="mine")
    worker = Worker(source=shout, client=client, slots=2).start()
    try:
        return enqueue("What is XADD?", client=client).wait(20)
    except LLMStreamError:
        worker.stop(within=5)
        raise


def served() -> FastAPI:
    app = create_app(token="secret", pool=True, timing=Timing(lease=2))
    assert_type(app, FastAPI)
    return app


# What is wrong is found; else the checker says that these comments are not needed.
def mistaken() -> None:
    ask(42)  # type: ignore[arg-type]
    ask("?", source=lambda question: [question])  # type: ignore[arg-type, misc]
    Worker(source=lambda question, topic: 42)  # type: ignore[arg-type, return-value]
    enqueue("?", source=shout)  # type: ignore[arg-type]
    create_app(tokens=["secret"])  # type: ignore[call-arg]
