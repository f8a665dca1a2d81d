"""What all wires share: who is asked, and how much; how an answer is stopped, looked at, waited for and watched."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import anyio
import redis
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from llmstream_nb.answers import ask as answers
from llmstream_nb.answers.connection import RedisUnusable, names_of, unusable
from llmstream_nb.answers.read import Look, look_and_events
from llmstream_nb.answers.turns import chain
from llmstream_nb.llm.sources import check_source, default_source
from llmstream_nb.pool.queue import enqueue
from llmstream_nb.protocol.events import Event
from llmstream_nb.protocol.round import StillWaiting
from llmstream_nb.protocol.wire import ORIGIN, AnswerNotFound, Timing
from llmstream_nb.web.admission import Authorize, ask_who
from llmstream_nb.web.hub import Hub

T = TypeVar("T")
Models = Mapping[str, Sequence[str]]  # the names that may be asked for, by source
ATTEMPTS = 10**9  # no answer has so many, but a clock's number is larger: such an ID is of something else
STOPS = 64  # answers that are being stopped at the same time; one whose producer hangs takes two leases


class TooLong(HTTPException):
    """The question has too many characters."""


class NotOffered(HTTPException):
    """This model can't be asked for here."""


class Busy(HTTPException):
    """Too many answers are being written."""


class Full(HTTPException):
    """Too many are watching."""


@dataclass(frozen=True)
class Limits:
    """What one server takes on; beyond it a request is refused with a status that says so."""

    answers: int = 16  # written at the same time by this process (429)
    queue: int = 200  # questions in the pool's queue (429)
    viewers: int = 2_000  # open event streams (503)
    body: int = 64_000  # bytes of a request's body (413)
    question: int = 8_000  # characters (422)
    keep_alive: float = 15.0  # seconds of silence after which `alive` is sent; the page misses it after 40


class Desk:
    """Takes questions and stops answers; what waits for Redis does so in a thread."""

    def __init__(
        self,
        client: redis.Redis,
        pool: bool,
        limits: Limits,
        timing: Timing,
        models: Models,
        who: Authorize | None,
        **silence: Any,
    ) -> None:
        self.client, self.pool, self.limits, self.timing = client, pool, limits, timing
        self.models, self.who = models, who
        self.silence = silence  # how long a model may be silent, in seconds
        self._calls, self._stopping = anyio.CapacityLimiter(4), anyio.CapacityLimiter(STOPS)
        self._stops: dict[str, asyncio.Future[str]] = {}  # those that are waited for, by the answer's id
        self._own: list[answers.Answer] = []  # written by this process
        self._asking = 0  # questions on their way

    async def call(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        """Let this wait for Redis in a thread."""
        return await anyio.to_thread.run_sync(partial(function, *args, **options), limiter=self._calls)

    async def full(self) -> bool:
        """Whether no more questions are taken at the moment."""
        if self.pool:
            try:
                waiting: Any = await self.call(self.client.xlen, names_of(self.client).questions)
            except (RedisError, OSError) as error:
                raise unusable(error, self.client) from None
            return bool(waiting >= self.limits.queue)
        self._own = [answer for answer in self._own if answer.at_work]
        return len(self._own) + self._asking >= self.limits.answers

    async def take(
        self,
        request: Request,
        question: str,
        *,
        source: str | None = None,
        model: str | None = None,
        follows: str | None = None,
        stream: bool = True,
        **more: Any,
    ) -> answers.Answer:
        """Put a question that was sent, to a model or into the pool's queue; raises what says why it is not taken."""
        if len(question) > self.limits.question:
            raise TooLong(422, f"a question may have {self.limits.question:,} characters here")
        offered = self.models.get(check_source(source or default_source()), ())
        if model is not None and model not in offered:
            choice = " or ".join([*offered, "none"])
            raise NotOffered(422, f"this model can't be asked for here: choose {choice}")
        if follows and self.who:
            await ask_who(self.who, request, follows, "read")  # first: else errors tell who may not read it
            for turn in await self.turns(follows):
                await ask_who(self.who, request, turn, "read")
        if await self.full():
            raise Busy(429, "too many answers are being written: ask again in 5 s", {"Retry-After": "5"})
        owner = getattr(request.state, "owner", None)
        about = {"follows": follows, "source": source, "model": model, "owner": owner} | more
        return await self._ask(None if "messages" in more else question, stream, about)

    async def _ask(self, question: str | None, stream: bool, options: dict[str, Any]) -> answers.Answer:
        options |= {"client": self.client, "timing": self.timing}
        if self.pool:
            return await self.call(enqueue, question, **options)
        self._asking += 1
        try:
            answer = await self.call(answers.ask, question, stream=stream, **options, **self.silence)
            self._own.append(answer)
        finally:
            self._asking -= 1
        return answer

    def room(self, app: FastAPI) -> Hub:
        """The application's reader, if one more may watch; raises Full."""
        hub = hub_of(app)
        if hub.closing or hub.viewers >= self.limits.viewers:
            raise Full(503, "too many are watching: come back in a moment", {"Retry-After": "5"})
        return hub

    async def turns(self, follows: str) -> list[str]:
        """The ids of the answers of which a model is told where a question follows this one; raises BrokenChain."""
        turns = chain({"id": "", "follows": follows}, self.client)
        return await self.call(lambda: [turn["id"] for turn in turns])

    async def stop(self, answer_id: str) -> str:
        """Stop an answer, wherever it is written; return its status.

        However many stop the same one, a single thread waits for it: else they would keep others from stopping theirs.
        """
        stop = self._stops.get(answer_id)
        if stop is None:
            own = next((answer for answer in self._own if answer.id == answer_id and answer.at_work), None)
            answer = own or answers.Answer(answer_id, client=self.client, timing=self.timing)
            stop = asyncio.ensure_future(anyio.to_thread.run_sync(answer.stop, limiter=self._stopping))
            stop.add_done_callback(lambda _: self._stops.pop(answer_id))
            self._stops[answer_id] = stop
        return await asyncio.shield(stop)  # one who goes away does not end it for the others

    async def clear(self, answer_id: str) -> None:
        """Stop an answer, wherever it is written, and delete it."""
        await anyio.to_thread.run_sync(
            partial(answers.clear, answer_id, client=self.client, timing=self.timing), limiter=self._stopping
        )

    async def look(self, answer_id: str) -> tuple[Look, list[Event]]:
        """The answer at this moment, and the events that tell it; raises AnswerNotFound."""
        now, events = await self.call(look_and_events, answer_id, self.client)
        if now.status == "missing":
            raise AnswerNotFound(f"there is no answer {answer_id!r}: never asked, cleared, or expired")
        return now, events

    async def end(self, answer_id: str, request: Request) -> None:
        """Wait for an answer's end; stop it when the asker goes away. Raises StillWaiting."""
        hub = hub_of(request.app)
        seen, alive = ORIGIN, time.monotonic()
        while True:
            now = time.monotonic()
            with suppress(RedisUnusable):  # it may come back
                top, final, signs = await hub.place(answer_id, seen)
                if final and ((signs.record or {}).get("end") or now - alive > 2 * self.timing.lease):
                    return
                if signs.leased or top != seen:
                    seen, alive = top, now
            if await request.is_disconnected():
                await self.stop(answer_id)
            if now - alive > self.timing.patience or hub.closing:
                raise StillWaiting(f"{answer_id} has not ended in time; it may go on")
            await asyncio.sleep(0.1)

    async def leave(self) -> None:
        """End the answers that this process writes: nobody else can. All at once: each may have to wait for Redis."""
        limiter = anyio.CapacityLimiter(len(self._own) + 1)
        stops = (anyio.to_thread.run_sync(answer.stop, limiter=limiter) for answer in self._own if answer.at_work)
        await asyncio.gather(*stops, return_exceptions=True)


def hub_of(app: FastAPI) -> Hub:
    """The reader of this event loop: an application that is mounted is not told that it starts, nor in which."""
    hub: Hub | None = app.state.hub
    if hub is None or hub.life.done() or hub.life.get_loop() is not asyncio.get_running_loop():
        hub = app.state.hub = app.state.start()
    return hub


class Watching(StreamingResponse):
    """A viewer's stream: it counts as a viewer from here on until it is gone, however it goes."""

    def __init__(self, hub: Hub, stream: AsyncGenerator[bytes]) -> None:
        # A proxy that gathers events would hold them up.
        super().__init__(stream, headers={"X-Accel-Buffering": "no"}, media_type="text/event-stream")
        self.hub, self.stream = hub, stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; a viewer who vanishes while it is being sent leaves the generator in the middle."""
        self.hub.viewers += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.hub.viewers -= 1
            await self.stream.aclose()
