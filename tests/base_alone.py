"""What works with the base packages alone: a program that asks, reads, works, stops and clears, in REDIS_URL.

It is no test: test_package.py runs it where nothing else is installed, so it imports nothing of the tests.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator

from llmstream_nb import (
    Ended,
    LLMStreamError,
    Worker,
    aread_answer,
    ask,
    ask_without_stream,
    claim,
    clear,
    complete,
    connect,
    enqueue,
    prepared_questions,
    read_answer,
    read_answer_group,
    start_process,
    stop_answer,
    text_of,
    tutorial,
)
from llmstream_nb.llm import scripted

QUESTION = prepared_questions()[0]
QUICK = "scripted:pace=0"


def own(question: str, topic: str | None) -> list[str]:
    """A source of one's own."""
    return ["An ", f"answer to {question}"]


def endless(question: str, topic: str | None) -> Iterator[str]:
    """A source that never ends, to be stopped."""
    while True:
        time.sleep(0.01)
        yield "on and "


async def gathered(answer_id: str) -> str:
    """The text of an answer, as asyncio reads it."""
    return "".join([event.text async for event in aread_answer(answer_id) if hasattr(event, "text")])


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of the kit's, to its end."""
    line = [sys.executable, "-m", "llmstream_nb", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=30)


def main() -> None:
    client = connect()
    assert text_of(read_answer(ask("it", source=own).id)) == "An answer to it"

    answer = ask(QUESTION, model=QUICK)  # by the scripted source
    whole = text_of(read_answer(answer.id))
    assert whole and asyncio.run(gathered(answer.id)) == whole == "".join(complete(QUESTION, model=QUICK))

    model = scripted.server()  # any endpoint that speaks OpenAI's API
    os.environ |= {"OPENAI_BASE_URL": model.url, "OPENAI_API_KEY": model.key}
    assert ask(QUESTION, source="openai", model=QUICK).wait(60).text == whole
    assert ask_without_stream(QUESTION, source="openai", model=QUICK).wait(60).text == whole

    going = ask("on?", source=endless)
    stop_answer(going.id)
    *_, last = read_answer(going.id)
    assert isinstance(last, Ended) and last.reason == "cancelled", last

    worker = Worker(source=own).start()
    queued = enqueue("it")
    assert text_of(read_answer(queued.id)) == "An answer to it"
    worker.stop()
    assert list(read_answer_group(queued.id, "group", "one")) and claim(queued.id, "group", "two") is not None

    first = command("ask", QUESTION, "--model", QUICK)
    assert (first.returncode, first.stdout.strip()) == (0, whole.strip()), first
    answer_id = first.stderr.split()[1]
    assert command("watch", answer_id).stdout.strip() == whole.strip()
    process = start_process("another")  # which is the command `worker`; it ends with this process
    assert command("ask", "--pool", QUESTION, "--model", QUICK).stdout.strip() == whole.strip()
    process.terminate()
    assert process.wait(60) == 0
    assert command("doctor").returncode == 0
    assert tutorial.start_chunk("q") == "START:q;"
    assert clear() >= 6 and not client.keys(f"{client.names.prefix}:*question")
    try:
        list(read_answer(answer_id))
    except LLMStreamError:
        print("works")


if __name__ == "__main__":
    main()
