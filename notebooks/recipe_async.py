"""Stream an LLM's answers through Redis to browsers: redis, openai, fastapi, and nothing else.
A viewer who waits holds a connection: uvicorn recipe_async:app --limit-concurrency 500"""

import asyncio
import json
import re
import secrets
from os import environ

from fastapi import BackgroundTasks, Body, FastAPI, Header, Response
from fastapi.sse import EventSourceResponse
from openai import AsyncOpenAI
from redis.asyncio import Redis, retry
from redis.backoff import ExponentialWithJitterBackoff

options = {"decode_responses": True, "max_connections": 1_000}
options["retry"] = retry.Retry(ExponentialWithJitterBackoff(2, 0.1), 8)
redis = Redis.from_url(environ["REDIS_URL"], **options)
create, app = AsyncOpenAI(timeout=30).chat.completions.create, FastAPI()


async def answer(question, say):
    """Say (kind, text): the model's deltas as they come, and at last how it ended."""
    reason, messages = "incomplete", [{"role": "user", "content": question}]
    about = {"model": environ["OPENAI_MODEL"], "messages": messages, "stream": True}
    try:
        async for choice in (c async for part in await create(**about) for c in part.choices):
            if choice.delta.content:
                say(("text", choice.delta.content))
            reason = choice.finish_reason or reason
        say(("end", reason))
    except Exception as error:  # its message may hold what viewers shouldn't see
        say(("error", type(error).__name__))


async def write(key, number, kind, text):
    """Write an entry. Its ID is our own: sent again after a lost reply, it is not doubled."""
    pipe = redis.pipeline().xadd(key, {"kind": kind, "text": text}, id=f"1-{number}")
    for reply in await pipe.expire(key, 86_400).execute(raise_on_error=False):
        if isinstance(reply, Exception) and "equal or smaller" not in str(reply):
            raise reply


async def produce(key, question):
    """Write what the model says up to its end, and an empty text for each second of silence."""
    number, kind, said = 0, "text", asyncio.Queue()
    async with asyncio.TaskGroup() as tasks:  # whatever happens here, the model's request ends
        model = tasks.create_task(answer(question, said.put_nowait))
        while kind == "text":
            try:
                kind, text = await asyncio.wait_for(said.get(), 1)
            except TimeoutError:
                text = ""
            if await redis.exists(f"stop:{key}"):
                kind, text, _ = "end", "cancelled", model.cancel()
            await write(key, number := number + 1, kind, text)


async def read(key, last):
    """Yield the entries after `last` as server-sent events, up to the end, or to a silence."""
    while found := await redis.xread({key: last}, count=500, block=4000):
        for number, (last, entry) in enumerate(found[0][1], int(last[2:]) + 1):
            if last != f"1-{number}":
                entry = {"kind": "error", "text": f"the entry 1-{number} is missing"}
            yield f"id: {last}\ndata: {json.dumps(entry)}\n\n"
            if entry["kind"] in ("end", "error"):
                return
    yield 'data: {"kind": "error", "text": "nothing came for 4 s: is its producer dead?"}\n\n'


@app.post("/answers", status_code=201)
async def ask(later: BackgroundTasks, question: str = Body(embed=True)):
    name = secrets.token_hex(8)
    await write(f"answer:{name}", 0, "text", "")  # there at once, before the model's first word
    later.add_task(produce, f"answer:{name}", question)
    return {"id": name, "events": f"/answers/{name}/events"}


@app.get("/answers/{name}/events")
async def watch(name, last_event_id: str = Header("1-0")):
    valid = re.fullmatch("1-[0-9]{1,18}", last_event_id)
    seen = valid and await redis.xrange(f"answer:{name}", last_event_id, last_event_id)
    if not seen or seen[0][1]["kind"] in ("end", "error"):  # all is seen; unknown; no ID
        return Response(status_code=204 if seen else 404 if valid else 400)
    return EventSourceResponse(read(f"answer:{name}", last_event_id))


@app.delete("/answers/{name}", status_code=202)
async def stop(name):
    await redis.set(f"stop:answer:{name}", 1, ex=86_400)
