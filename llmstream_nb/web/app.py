"""The web application: ask, watch, stop, over HTTP and server-sent events.

POST   /answers              ask: an id and the address of its events; with `stream` false, the whole answer
GET    /answers/{id}         the record, the status and the text so far, as JSON
GET    /answers/{id}/events  the answer as server-sent events; their ids are the IDs of the stream's entries
DELETE /answers/{id}         stop it, and keep the text so far
GET    /sources              who can answer
GET    /                     the page
GET    /healthz              200 if Redis answers, else 503
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Annotated, Any, TypeVar

import anyio
import redis
from fastapi import FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import MAX_BODY_SIZE_SCOPE_KEY
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from llmstream_nb.answers import ask as answers
from llmstream_nb.answers.connection import RedisUnusable, current, environment_of, names_of, unusable
from llmstream_nb.answers.read import Look, look_and_events
from llmstream_nb.answers.turns import chain
from llmstream_nb.llm.sources import check_source, default_source, prepared_questions, sources
from llmstream_nb.pool.queue import enqueue
from llmstream_nb.protocol import events as entries
from llmstream_nb.protocol.wire import ORIGIN, AnswerNotFound, BadEntryID, EntryID, LLMStreamError, Timing
from llmstream_nb.viewing.markdown import to_html
from llmstream_nb.viewing.transcript import Transcript
from llmstream_nb.web.admission import HEALTH, PAGE, Admission, Authorize, ask_who, by_token, problem, told
from llmstream_nb.web.hub import Hub

T = TypeVar("T")
Models = Mapping[str, Sequence[str]]  # the names that may be asked for, by source
ATTEMPTS = 10**9  # no answer has so many, but a clock's number is larger: such an ID is of something else
STOPS = 64  # answers that are being stopped at the same time; one whose producer hangs takes two leases
RENDERED = 8  # answers whose Markdown is kept: a few MB each, at the worst
FRAME_ANCESTORS = "'self' http://127.0.0.1:* http://localhost:*"
EVENTS = {"description": "server-sent events", "content": {"text/event-stream": {"schema": {"type": "string"}}}}
OVER = {"description": "the answer has ended, and nothing follows Last-Event-ID"}


@dataclass(frozen=True)
class Limits:
    """What one server takes on; beyond it a request is refused with a status that says so."""

    answers: int = 16  # written at the same time by this process (429)
    queue: int = 200  # questions in the pool's queue (429)
    viewers: int = 2_000  # open event streams (503)
    body: int = 64_000  # bytes of a request's body (413)
    question: int = 8_000  # characters (422)
    keep_alive: float = 15.0  # seconds of silence after which `alive` is sent; the page misses it after 40


class Question(BaseModel, extra="forbid"):
    """What POST /answers takes."""

    question: str = Field(min_length=1, max_length=20_000)
    follows: str | None = Field(None, max_length=64, description="the id of an ended answer, from which to ask on")
    topic: str | None = Field(None, max_length=200, description="what the model shall be an expert in")
    source: str | None = Field(None, max_length=40, description="who answers: one of GET /sources")
    model: str | None = Field(None, max_length=200, description="one of those that GET /sources lists for it")
    stream: bool = Field(True, description="false: wait, and get the whole answer in one piece")


class Shown(BaseModel):
    """An answer at one moment."""

    id: str
    status: str = Field(description="queued, streaming, interrupted, ended or failed")
    text: str = Field(description="the text so far")
    html: str = Field(description="once it has ended: the text as Markdown, rendered and sanitised")
    blocks: list[Any] = Field(description="other parts as they are drawn: [UTF-16 units of the text before, part]")
    missing: int = Field(description="entries that are gone and could not be had from the record")
    record: dict[str, Any] = Field(description="question, topic, source, model, times, finish reason, usage")


class Problem(BaseModel):
    """Every error."""

    error: str
    message: str


class Desk:
    """Takes questions and stops answers; what waits for Redis does so in a thread."""

    def __init__(self, client: redis.Redis, pool: bool, limits: Limits, timing: Timing, **silence: Any) -> None:
        self.client, self.pool, self.limits, self.timing = client, pool, limits, timing
        self.silence = silence  # how long a model may be silent, in seconds
        self._calls, self._stopping = anyio.CapacityLimiter(4), anyio.CapacityLimiter(STOPS)
        self._stops: dict[str, asyncio.Future[str]] = {}  # those that are waited for, by the answer's id
        self._html, self._rendering = lru_cache(RENDERED)(to_html), anyio.CapacityLimiter(1)
        self._own: list[answers.Answer] = []  # written by this process
        self._asking = 0  # questions on their way

    async def _call(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        return await anyio.to_thread.run_sync(partial(function, *args, **options), limiter=self._calls)

    async def full(self) -> bool:
        """Whether no more questions are taken at the moment."""
        if self.pool:
            try:
                waiting: Any = await self._call(self.client.xlen, names_of(self.client).questions)
            except (RedisError, OSError) as error:
                raise unusable(error, self.client) from None
            return bool(waiting >= self.limits.queue)
        self._own = [answer for answer in self._own if answer.at_work]
        return len(self._own) + self._asking >= self.limits.answers

    async def ask(self, question: Question, owner: str | None) -> answers.Answer:
        """Put the question, to a model or into the pool's queue."""
        options = question.model_dump(include={"follows", "topic", "source", "model"})
        options |= {"client": self.client, "timing": self.timing, "owner": owner}
        if self.pool:
            return await self._call(enqueue, question.question, **options)
        self._asking += 1
        try:
            options |= self.silence | {"stream": question.stream}
            answer = await self._call(answers.ask, question.question, **options)
            self._own.append(answer)
        finally:
            self._asking -= 1
        return answer

    async def turns(self, follows: str) -> list[str]:
        """The ids of the answers of which a model is told where a question follows this one; raises BrokenChain."""
        turns = chain({"id": "", "follows": follows}, self.client)
        return await self._call(lambda: [turn["id"] for turn in turns])

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

    async def show(self, answer_id: str) -> Shown:
        """The answer at this moment; raises AnswerNotFound."""
        now, transcript = await self._call(self._look, answer_id)
        if now.status == "missing":
            raise AnswerNotFound(f"there is no answer {answer_id!r}: never asked, cleared, or expired")
        text, missing = transcript.text, transcript.missing
        done = now.status in ("ended", "failed") and not missing  # with a hole in it, Markdown means something else
        html = await anyio.to_thread.run_sync(self._html, *transcript.runs, limiter=self._rendering) if done else ""
        shown: dict[str, Any] = {"status": now.status, "text": text, "html": html, "missing": missing}
        shown["blocks"] = transcript.offsets
        record = entries.told(now.record)
        record.pop("owner", None)  # whoever may read need not know who asked
        return Shown(id=answer_id, record=record, **shown)

    def _look(self, answer_id: str) -> tuple[Look, Transcript]:
        now, events = look_and_events(answer_id, self.client)
        transcript = Transcript(answer_id)
        transcript.take(events)
        transcript.mend(now.record, leased=False)
        return now, transcript

    async def whole(self, answer_id: str, request: Request) -> JSONResponse:
        """Wait for an answer's end, and return all of it; stop it when the asker goes away."""
        hub = hub_of(request.app)
        seen, alive = ORIGIN, time.monotonic()
        while True:
            now = time.monotonic()
            with suppress(RedisUnusable):  # it may come back
                top, final, signs = await hub.place(answer_id, seen)
                if final and ((signs.record or {}).get("end") or now - alive > 2 * self.timing.lease):
                    return JSONResponse((await self.show(answer_id)).model_dump())
                if signs.leased or top != seen:
                    seen, alive = top, now
            if await request.is_disconnected():
                await self.stop(answer_id)
            if now - alive > self.timing.patience or hub.closing:
                return problem(504, "StillWaiting", f"{answer_id} has not ended in time; it may go on")
            await asyncio.sleep(0.1)

    async def leave(self) -> None:
        """End the answers that this process writes: nobody else can. All at once: each may have to wait for Redis."""
        limiter = anyio.CapacityLimiter(len(self._own) + 1)
        stops = (anyio.to_thread.run_sync(answer.stop, limiter=limiter) for answer in self._own if answer.at_work)
        await asyncio.gather(*stops, return_exceptions=True)


def create_app(
    client: redis.Redis | None = None,
    *,
    token: str = "",
    authorize: Authorize | None = None,
    hosts: Collection[str] = (),
    pool: bool = False,
    limits: Limits | None = None,
    timing: Timing | None = None,
    models: Models | None = None,
    timeout: float | None = None,
    first_timeout: float | None = None,
    frame_ancestors: str = FRAME_ANCESTORS,
) -> FastAPI:
    """Build the application.

    It may be mounted into another one, which need not tell it that it starts and ends: it starts with its first
    request, and ends with the event loop. What it writes then is stopped.

    Args:
        client: of `connect`; else that of the last `connect()`.
        token: what every request must bring, but those for the page's own files; empty lets everybody in who calls
            the server 127.0.0.1, localhost or [::1], with its port, or by one of `hosts`.
        authorize: in place of the token, says who may: of the request, the answer's id and `ask`, `read` or `stop`.
            The id is empty where no answer is meant: to ask, and to read the page. False is 403, and what it raises as
            HTTPException is passed on. May be asynchronous; else it is called in a thread. What it sets as
            `request.state.owner` (text) is kept in the record of what is asked, as `owner`, and shown to nobody.
        hosts: other names of this server (with the port, if it is not usual), for browsers that need no token.
        pool: answers are written by workers elsewhere (`enqueue`), not by this process.
        limits, timing: how much, and how long.
        models: which model names may be asked for, by source, as `{"openai": ["gpt-5.4-mini"]}`; else a source's own
            default answers, and none may be named. A name of the scripted source is a script: offer no costly one.
        timeout, first_timeout: seconds a model may be silent; see `complete`. Workers of a pool have their own.
        frame_ancestors: which pages may show this one in a frame (Content-Security-Policy).
    """
    client, limits, timing = client or current(), limits or Limits(), timing or Timing()
    environment_of(client)  # raises where the hub, which has connections of its own, could not follow
    desk = Desk(client, pool, limits, timing, timeout=timeout, first_timeout=first_timeout)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        hub = hub_of(app)
        try:
            yield
        finally:
            await hub.close()

    problems: Any = {code: {"model": Problem} for code in (400, 401, 403, 404, 409, 413, 422, 429, 500, 503, 504)}
    refusals: Any = {LLMStreamError: _refused, RequestValidationError: _invalid, HTTPException: _refused}
    about: Any = {"title": "llmstream-nb", "version": "1", "docs_url": None, "redoc_url": None}
    app = FastAPI(lifespan=lifespan, responses=problems, exception_handlers=refusals, **about)
    app.state.hub, app.state.start = None, partial(Hub, client, timing, limits.keep_alive, desk.leave)
    who = authorize or (by_token(token) if token else None)
    app.add_middleware(Admission, authorize=who, hosts=hosts, body=limits.body, frame_ancestors=frame_ancestors)

    _add_answers(app, desk, limits, models or {}, who)
    _add_events(app, limits)
    app.mount("/", StaticFiles(directory=PAGE, packages=[("llmstream_nb", "viewing/browser")], html=True))
    return app


def hub_of(app: FastAPI) -> Hub:
    """The reader of this event loop: an application that is mounted is not told that it starts, nor in which."""
    hub: Hub | None = app.state.hub
    if hub is None or hub.life.done() or hub.life.get_loop() is not asyncio.get_running_loop():
        hub = app.state.hub = app.state.start()
    return hub


def _add_answers(app: FastAPI, desk: Desk, limits: Limits, models: Models, who: Authorize | None) -> None:
    reply: Any = {"status_code": 201, "response_model": dict[str, str], "responses": {200: {"model": Shown}}}

    @app.post("/answers", max_body_size=limits.body, **reply)
    async def ask(question: Question, request: Request) -> Any:
        """Ask. The answer is written into its stream from now on, whether anybody watches or not.

        The reply holds its `id`, and the relative addresses of its record (`answer`) and of its `events`.
        """
        if len(question.question) > limits.question:
            return problem(422, "TooLong", f"a question may have {limits.question:,} characters here")
        offered = models.get(check_source(question.source or default_source()), ())
        if question.model is not None and question.model not in offered:
            choice = " or ".join([*offered, "none"])
            return problem(422, "NotOffered", f"this model can't be asked for here: choose {choice}")
        owner = getattr(request.state, "owner", None)
        if question.follows and who:
            await ask_who(who, request, question.follows, "read")  # first: else errors tell who may not read it
            for turn in await desk.turns(question.follows):
                await ask_who(who, request, turn, "read")
        if await desk.full():
            return problem(429, "Busy", "too many answers are being written: ask again in 5 s", {"Retry-After": "5"})
        answer = await desk.ask(question, owner)
        if not question.stream:
            return await desk.whole(answer.id, request)
        place = f"answers/{answer.id}"
        return JSONResponse({"id": answer.id, "answer": place, "events": f"{place}/events"}, 201, {"Location": place})

    @app.get("/answers/{answer_id}")
    async def show(answer_id: str) -> Shown:
        """The record, the status and the text so far."""
        return await desk.show(answer_id)

    @app.delete("/answers/{answer_id}")
    async def stop(answer_id: str) -> dict[str, str]:
        """Stop it, wherever it is written, and keep the text so far. Also what has ended may be stopped."""
        return {"id": answer_id, "status": await desk.stop(answer_id)}

    @app.get("/sources")
    async def list_sources() -> dict[str, Any]:
        """Who can answer, and the questions for which the scripted source has an answer."""
        listed = [asdict(one) | {"models": list(models.get(one.name, ()))} for one in sources()]
        return {"sources": listed, "default": default_source(), "prepared": prepared_questions()}


def _add_events(app: FastAPI, limits: Limits) -> None:
    @app.get("/answers/{answer_id}/events", response_class=StreamingResponse, responses={200: EVENTS, 204: OVER})
    async def events(
        answer_id: str,
        request: Request,
        last_event_id: Annotated[str | None, Header(description="the ID of the last event seen")] = None,
        after: Annotated[str | None, Query(description="the same, for those who can't set a header")] = None,
    ) -> Response:
        """The answer as server-sent events, from the entry after Last-Event-ID on, until its end.

        204 says that nothing follows, and a browser does not come back. An ID that can't be read is refused (400), and
        so is one that is not of this answer (409). One ahead of the stream waits until Redis has been given again what
        it lost. A `failed` with `server` in its data tells of this connection, and not of the answer.
        """
        hub = hub_of(request.app)
        place = last_event_id or after or str(ORIGIN)
        try:
            seen = EntryID.parse(place)
        except BadEntryID as error:
            return problem(400, "BadEntryID", str(error))
        top, final, signs = await hub.place(answer_id)
        if seen.attempt >= ATTEMPTS or (final and seen > top):
            return problem(409, "ForeignID", f"{seen} is no entry of {answer_id}: watch it without Last-Event-ID")
        if final and seen == top:
            return Response(status_code=204)
        if hub.closing or hub.viewers >= limits.viewers:
            return problem(503, "Full", "too many are watching: come back in a moment", {"Retry-After": "5"})
        # Who has watched another question under this id begins anew.
        return Watching(hub, hub.stream(answer_id, seen if seen.attempt >= signs.first else ORIGIN, top))

    @app.get(HEALTH, include_in_schema=False)
    async def health(request: Request) -> Response:
        """Whether it can do its work; tells nothing else, as anybody may ask."""
        return Response(status_code=200 if await hub_of(request.app).answers() else 503)


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


# ------------------------------------------------------------------------------------------------- errors


async def _invalid(_: Request, error: Any) -> JSONResponse:
    first = error.errors()[0]
    return problem(422, "Invalid", f"{'.'.join(map(str, first['loc']))}: {first['msg']}")


async def _refused(request: Request, error: Exception) -> JSONResponse:
    if getattr(error, "status_code", 0) == 413:  # of a body that did not say its size in advance
        return problem(413, "TooLarge", f"a request may have {request.scope[MAX_BODY_SIZE_SCOPE_KEY]:,} bytes")
    return told(error)
