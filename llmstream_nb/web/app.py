"""The web application: ask, watch, stop, over HTTP and server-sent events.

POST   /answers              ask: an id and the address of its events; with `stream` false, the whole answer
GET    /answers/{id}         the record, the status and the text so far, as JSON
GET    /answers/{id}/events  the answer as server-sent events; their ids are the IDs of the stream's entries
DELETE /answers/{id}         stop it, and keep the text so far
GET    /sources              who can answer
       /v1/…                 the same for clients of OpenAI's API: see `openai_api`
GET    /                     the page
GET    /healthz              200 if Redis answers, else 503
"""

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import lru_cache, partial
from typing import Annotated, Any

import anyio
import redis
from fastapi import FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import MAX_BODY_SIZE_SCOPE_KEY
from starlette.staticfiles import StaticFiles

from llmstream_nb.answers.connection import current, environment_of
from llmstream_nb.answers.read import Look
from llmstream_nb.llm.sources import default_source, prepared_questions, sources
from llmstream_nb.protocol.events import Event
from llmstream_nb.protocol.events import told as known
from llmstream_nb.protocol.wire import ORIGIN, BadEntryID, EntryID, LLMStreamError, Timing
from llmstream_nb.viewing.markdown import to_html
from llmstream_nb.viewing.transcript import Transcript
from llmstream_nb.web.admission import HEALTH, PAGE, Admission, Authorize, Invalid, TooLarge, by_token, problem, told
from llmstream_nb.web.desk import ATTEMPTS, Desk, Limits, Models, Watching, hub_of
from llmstream_nb.web.hub import Hub, View
from llmstream_nb.web.openai_api import add_openai

RENDERED = 8  # answers whose Markdown is kept: a few MB each, at the worst
FRAME_ANCESTORS = "'self' http://127.0.0.1:* http://localhost:*"
EVENTS = {"description": "server-sent events", "content": {"text/event-stream": {"schema": {"type": "string"}}}}
OVER = {"description": "the answer has ended, and nothing follows Last-Event-ID"}


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


class Viewing:
    """Shows answers whole, with their Markdown rendered."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._html, self._rendering = lru_cache(RENDERED)(to_html), anyio.CapacityLimiter(1)

    async def show(self, answer_id: str) -> Shown:
        """The answer at this moment; raises AnswerNotFound."""
        now, events = await self.desk.look(answer_id)
        transcript = await self.desk.call(_transcript, answer_id, now, events)
        text, missing = transcript.text, transcript.missing
        done = now.status in ("ended", "failed") and not missing  # with a hole in it, Markdown means something else
        html = await anyio.to_thread.run_sync(self._html, *transcript.runs, limiter=self._rendering) if done else ""
        shown: dict[str, Any] = {"status": now.status, "text": text, "html": html, "missing": missing}
        shown["blocks"] = transcript.offsets
        record = known(now.record)
        record.pop("owner", None)  # whoever may read need not know who asked
        return Shown(id=answer_id, record=record, **shown)


def _transcript(answer_id: str, now: Look, events: list[Event]) -> Transcript:
    transcript = Transcript(answer_id)
    transcript.take(events)
    transcript.mend(now.record, leased=False)
    return transcript


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
    who = authorize or (by_token(token) if token else None)
    silence = {"timeout": timeout, "first_timeout": first_timeout}
    desk = Desk(client, pool, limits, timing, models or {}, who, **silence)

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
    app.add_middleware(Admission, authorize=who, hosts=hosts, body=limits.body, frame_ancestors=frame_ancestors)

    _add_answers(app, desk)
    _add_events(app, desk)
    add_openai(app, desk)
    app.mount("/", StaticFiles(directory=PAGE, packages=[("llmstream_nb", "viewing/browser")], html=True))
    return app


def _add_answers(app: FastAPI, desk: Desk) -> None:
    reply: Any = {"status_code": 201, "response_model": dict[str, str], "responses": {200: {"model": Shown}}}
    shown = Viewing(desk)

    @app.post("/answers", max_body_size=desk.limits.body, **reply)
    async def ask(question: Question, request: Request) -> Any:
        """Ask. The answer is written into its stream from now on, whether anybody watches or not.

        The reply holds its `id`, and the relative addresses of its record (`answer`) and of its `events`.
        """
        answer = await desk.take(request, **question.model_dump())
        if not question.stream:
            await desk.end(answer.id, request)
            return JSONResponse((await shown.show(answer.id)).model_dump())
        place = f"answers/{answer.id}"
        return JSONResponse({"id": answer.id, "answer": place, "events": f"{place}/events"}, 201, {"Location": place})

    @app.get("/answers/{answer_id}")
    async def show(answer_id: str) -> Shown:
        """The record, the status and the text so far."""
        return await shown.show(answer_id)

    @app.delete("/answers/{answer_id}")
    async def stop(answer_id: str) -> dict[str, str]:
        """Stop it, wherever it is written, and keep the text so far. Also what has ended may be stopped."""
        return {"id": answer_id, "status": await desk.stop(answer_id)}

    @app.get("/sources")
    async def list_sources() -> dict[str, Any]:
        """Who can answer, and the questions for which the scripted source has an answer."""
        listed = [asdict(one) | {"models": list(desk.models.get(one.name, ()))} for one in sources()]
        return {"sources": listed, "default": default_source(), "prepared": prepared_questions()}


def _add_events(app: FastAPI, desk: Desk) -> None:
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
        desk.room(request.app)
        view = View(answer_id, question=str((signs.record or {}).get("nonce")))
        # Who has watched another question under this id begins anew.
        return Watching(hub, hub.stream(view, seen if seen.attempt >= signs.first else ORIGIN, top))

    @app.get(HEALTH, include_in_schema=False)
    async def health(request: Request) -> Response:
        """Whether it can do its work; tells nothing else, as anybody may ask."""
        return Response(status_code=200 if await hub_of(request.app).answers() else 503)


# ------------------------------------------------------------------------------------------------- errors


async def _invalid(request: Request, error: Any) -> JSONResponse:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return told(Invalid(422, f"{place}: {first['msg']}", place), request.scope)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    if getattr(error, "status_code", 0) == 413:  # of a body that did not say its size in advance
        error = TooLarge(413, f"a request may have {request.scope[MAX_BODY_SIZE_SCOPE_KEY]:,} bytes")
    return told(error, request.scope)
