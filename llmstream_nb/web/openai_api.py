"""The routes for clients of OpenAI's API: its `openai` package asks here, and resumes what any model has answered.

POST   /v1/responses               ask; with `stream`, as its events, which go on whoever watches
GET    /v1/responses/{id}          as it stands; with `stream=true&starting_after=N`, the events after that number
POST   /v1/responses/{id}/cancel   stop it, and keep the text so far
DELETE /v1/responses/{id}          stop it, and delete it
POST   /v1/chat/completions        ask; streamed or not
GET    /v1/models                  what may be asked for

What these routes can't do is refused, and what would have no effect is passed over.
"""

from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from llmstream_nb.answers.read import Look
from llmstream_nb.llm.messages import question_in
from llmstream_nb.llm.sources import sources
from llmstream_nb.protocol.events import Event, Failed, Gap, Restarted, Started, closing_event, parts_of, told
from llmstream_nb.protocol.parts import parts_of_record
from llmstream_nb.protocol.wire import ORIGIN, Entry, EntryID
from llmstream_nb.web.admission import Invalid
from llmstream_nb.web.chat import Chat, ChatWithUsage, completion_of
from llmstream_nb.web.desk import ATTEMPTS, Desk, NotOffered, Watching
from llmstream_nb.web.hub import View
from llmstream_nb.web.openai_requests import Asked, ChatRequest, ResponseRequest, messages_of
from llmstream_nb.web.responses import SLOTS, Responses, entry_of, number_of, response_of
from llmstream_nb.web.sse import Wire

END = 2**64 - 1  # no entry of an attempt comes after this one
LARGEST = 2**53  # numbers up to here are exact in JavaScript, too
ONE_TEXT = "with previous_response_id, `input` is one text: for more, leave it out and send all items as `input`"


class Gone(HTTPException):
    """What is asked for has been deleted or has expired."""


class ModelFailed(HTTPException):
    """The model failed."""


class _Api:
    """These routes, each in the form of its API."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    async def ask(self, asked: ResponseRequest, request: Request) -> Response:
        """Ask, and stream the answer, or wait for it, or do neither."""
        messages, follows = messages_of(asked), asked.previous_response_id
        if follows is not None and asked.instructions:
            raise Invalid(400, "with previous_response_id, `instructions` can't be given", "instructions")
        if follows is not None and (len(messages) > 1 or messages[0]["role"] != "user"):
            raise Invalid(400, ONE_TEXT, "input")
        question, more = question_in(messages), asked.beside()
        if follows is None:
            more["messages"] = messages
        answer_id = await self._take(request, question, asked, follows=follows, **more)
        if asked.stream:
            return await self._watch(request, answer_id, Responses)
        if not asked.background:
            await self.desk.end(answer_id, request)
        return await self._retrieved(answer_id)

    async def retrieve(
        self,
        answer_id: str,
        request: Request,
        stream: bool = False,
        starting_after: Annotated[int | None, Query(ge=0, le=LARGEST)] = None,
    ) -> Response:
        """The answer as it stands, or its events after this number."""
        if stream:
            return await self._watch(request, answer_id, Responses, -1 if starting_after is None else starting_after)
        return await self._retrieved(answer_id)

    async def cancel(self, answer_id: str) -> Response:
        """Stop it, wherever it is written."""
        await self.desk.stop(answer_id)
        return await self._retrieved(answer_id)

    async def delete(self, answer_id: str) -> dict[str, Any]:
        """Stop it, and delete it."""
        await self.desk.look(answer_id)
        await self.desk.clear(answer_id)
        return {"id": answer_id, "object": "response", "deleted": True}

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        """Ask; the answer's id is that of its chunks."""
        messages = [message.model_dump(exclude_unset=True) for message in asked.messages]
        question = question_in(messages)
        answer_id = await self._take(request, question, asked, messages=messages, **asked.beside())
        if asked.stream:
            wants = (asked.stream_options or {}).get("include_usage") is True
            return await self._watch(request, answer_id, ChatWithUsage if wants else Chat)
        await self.desk.end(answer_id, request)
        now, events = await self.desk.look(answer_id)
        if isinstance(events[-1], Failed):
            once = {"x-should-retry": "false"}  # its client would ask, and have written, the same again
            raise ModelFailed(502, events[-1].message or "the model failed", once)
        return JSONResponse(completion_of(answer_id, told(now.record), parts_of(_whole(now, events))))

    async def models(self) -> dict[str, Any]:
        """What may be asked for: the sources that are ready, and the models that are offered for them."""
        names = [(one.name, one.name) for one in sources() if one.ready]
        names += [(name, source) for source, offered in self.desk.models.items() for name in offered]
        return {"object": "list", "data": [_model(*name) for name in names]}

    async def model(self, model: str) -> dict[str, Any]:
        """One of them."""
        return _model(model, self._source(model)[0])

    async def _take(self, request: Request, question: str, asked: Asked, **more: Any) -> str:
        if asked.stream:
            self.desk.room(request.app)
        source, model = self._source(asked.model)
        answer = await self.desk.take(request, question, source=source, model=model, **more)
        return answer.id

    def _source(self, model: str) -> tuple[str, str | None]:
        """The source that a name means, and the model."""
        if model in [one.name for one in sources()]:
            return model, None
        for source, offered in self.desk.models.items():
            if model in offered:
                return source, model
        raise NotOffered(404, f"there is no model {model[:80]!r}: choose one of GET /v1/models")

    async def _retrieved(self, answer_id: str) -> Response:
        now, events = await self.desk.look(answer_id)
        return JSONResponse(response_of(answer_id, told(now.record), now.status, _whole(now, events)))

    async def _watch(self, request: Request, answer_id: str, wire: type[Wire], seen: int = -1) -> Response:
        """The answer's events on this wire, after the number that was seen."""
        hub = self.desk.room(request.app)
        top, final, signs = await hub.place(answer_id)
        last = _last_of(signs.top) if signs.top else top  # of the newest attempt, whoever has ended it
        ends = seen >= 0 and entry_of(seen) == top
        entry = entry_of(seen) if seen >= 0 and not ends else EntryID(last.attempt, 0)
        first = max(1, signs.first)
        if final and seen == number_of(top, SLOTS - 1):
            return Response(media_type="text/event-stream")
        if final and seen >= 0 and signs.top is None:
            raise Gone(410, f"the events of {answer_id} have expired: retrieve it without `stream`")
        ahead = final and seen >= 0 and not ends and entry > last
        if ahead or (seen >= 0 and not first <= entry.attempt < ATTEMPTS):
            raise Invalid(400, f"{answer_id} has no event {seen}: stream it without starting_after", "starting_after")
        start = EntryID(entry.attempt - 1, END) if entry.attempt > first else ORIGIN
        record = told(signs.record or {})
        view = View(answer_id, wire, start, seen, record, str(record.get("nonce")))
        place = start
        if seen >= 0:  # it may lack some events of its entry
            place = last if ends and last < top else EntryID(entry_of(seen).attempt, entry_of(seen).seq - 1)
        return Watching(hub, hub.stream(view, place, top))


def add_openai(app: FastAPI, desk: Desk) -> None:
    """Add these routes to the application; whatever guards it guards them, and its limits hold."""
    api = _Api(desk)
    for method, path, route in (
        ("POST", "/v1/responses", api.ask),
        ("GET", "/v1/responses/{answer_id}", api.retrieve),
        ("POST", "/v1/responses/{answer_id}/cancel", api.cancel),
        ("DELETE", "/v1/responses/{answer_id}", api.delete),
        ("POST", "/v1/chat/completions", api.chat),
        ("GET", "/v1/models", api.models),
        ("GET", "/v1/models/{model:path}", api.model),
    ):
        options: Any = {"methods": [method], "include_in_schema": False, "max_body_size": desk.limits.body}
        app.add_api_route(path, route, response_model=None, **options)


def _last_of(top: Entry) -> EntryID:
    """The last entry of the newest attempt: one that was ended from outside is closed by an entry of the next."""
    closes = top.data.get("closes") if top.final and top.id.seq == 0 else None
    return EntryID.parse(closes) if closes else top.id


def _model(name: str, source: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": source}


def _whole(now: Look, events: list[Event]) -> list[Event]:
    """The events of the newest attempt; from the record, where that has what the stream has lost."""
    if now.status in ("ended", "failed") and not now.missing and any(isinstance(event, Gap) for event in events):
        return [Started(now.top), *parts_of_record(now.record, now.top), closing_event(now.top, now.record)]
    anew = [n for n, event in enumerate(events) if isinstance(event, Restarted)]
    return events[anew[-1] :] if anew else events
