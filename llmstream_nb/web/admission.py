"""What every request has to pass, and what every reply carries: size, host, origin, who may; security headers."""

from __future__ import annotations

import hmac
import inspect
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmstream_nb.answers.connection import RedisUnusable
from llmstream_nb.answers.log import Log
from llmstream_nb.llm.endpoint import ModelError
from llmstream_nb.protocol.round import StillWaiting
from llmstream_nb.protocol.wire import AnswerNotFound, LLMStreamError, NotAnAnswer

Action = Literal["ask", "read", "stop"]
Authorize = Callable[[Request, str, Action], bool | Awaitable[bool]]

# The page's own files hold nothing secret, and what a page loads can't carry its token.
OPEN = ("/page.js", "/answer.js", "/paper.js", "/blocks.js", "/elements.js", "/page.css", "/states.css", "/text.css")
HEALTH = "/healthz"  # for those who watch over the server: they know neither the token nor its name
LOCAL = ("127.0.0.1", "localhost", "[::1]")
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
POLICY += "base-uri 'none'; form-action 'none'; frame-ancestors "
PAGE = Path(__file__).parent / "page"
PROXY = "behind a proxy, let it pass on the header Host that it was sent"
# What to answer when the kit says no. A ValueError is the asker's: a bad id, a bad question.
STATUS: dict[Any, int] = {AnswerNotFound: 404, NotAnAnswer: 409, RedisUnusable: 503, StillWaiting: 504}
STATUS |= {(ModelError, ValueError): 422}
OPENAI = "/v1/"  # below it, errors have the form that OpenAI's clients know


class Invalid(HTTPException):
    """A request's field is not what it should be."""

    def __init__(self, status: int, message: str, param: str) -> None:
        super().__init__(status, message)
        self.param = param


class TooLarge(HTTPException):
    """The body has too many bytes."""


class ForeignOrigin(HTTPException):
    """Another site's page sent it."""


class ForeignHost(HTTPException):
    """It was sent to another name than this server's."""


class Broken(HTTPException):
    """The server has a fault."""


class NoToken(HTTPException):
    """The address holds no token, or a wrong one."""


class Admission:
    """ASGI middleware. It refuses with 401, 403 or 413, and adds its headers to every reply.

    A request that changes something must come from a page of this server: its Origin must name the host that it was
    sent to. Only the host is compared, as TLS may end before it gets here. Where nobody is asked who they are, the
    host must be this machine, too: else another site's page could come here under a name of its own, which it lets
    lead to 127.0.0.1.

    People who may not come are refused, too, but see the page: it can do nothing, and tells them why.
    """

    def __init__(
        self, app: ASGIApp, *, authorize: Authorize | None, hosts: Collection[str], body: int, frame_ancestors: str
    ) -> None:
        self.app, self.authorize, self.hosts, self.body = app, authorize, hosts, body
        self.headers = {
            "content-security-policy": POLICY + frame_ancestors,
            "referrer-policy": "no-referrer",  # the address holds the token
            "x-content-type-options": "nosniff",
            "cross-origin-resource-policy": "same-origin",
            "cache-control": "no-store",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through, or refuse it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        begun = False

        async def reply(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
                if message["status"] >= 400:  # without the query, which holds the token
                    Log(__name__).info("%s %s: refused with %s", scope["method"], scope["path"], message["status"])
            await send(message)

        headers, path = Headers(scope=scope), _path(scope)
        try:
            self._check(scope, headers)
            if path not in (*OPEN, HEALTH):
                await self._ask_who(scope)
            await self.app(scope, receive, reply)
        except (HTTPException, LLMStreamError) as error:
            answer: Response = told(error, scope)
            if answer.status_code in (401, 403) and path == "/" and "text/html" in headers.get("accept", ""):
                answer = HTMLResponse((PAGE / "index.html").read_bytes(), answer.status_code)
            await answer(scope, receive, reply)
        except Exception as error:
            if begun:
                raise
            # Neither its words nor the query: they may hold a model's text, a secret, the token.
            Log(__name__).error("%s %s: %s", scope["method"], scope["path"], type(error).__name__)
            broken = Broken(500, "the server could not do this: its log says why")
            await told(broken, scope)(scope, receive, reply)

    def _check(self, scope: Scope, headers: Mapping[str, str]) -> None:
        length, host, origin = headers.get("content-length", "0"), headers.get("host", ""), headers.get("origin")
        if not length.isdigit() or int(length) > self.body:
            raise TooLarge(413, f"a request may have {self.body:,} bytes")
        if scope["method"] not in ("GET", "HEAD") and origin and origin.partition("://")[2] != host:
            raise ForeignOrigin(403, f"another site's page may not do this; {PROXY}")
        local = [f"{name}:{port}" for name in LOCAL for _, port in [scope.get("server") or ("", 80)]]
        if not self.authorize and host not in (*local, *self.hosts) and _path(scope) != HEALTH:
            advice = f"name it in create_app(hosts=[…]), or give the server a token; {PROXY}"
            raise ForeignHost(403, f"this server does not go by that name: {advice}")

    async def _ask_who(self, scope: Scope) -> None:
        """`ask_who` for what this request is about."""
        if not self.authorize:
            return
        # As the router will find it: a guess at it could be another.
        matches = (route.matches(scope) for route in scope["app"].routes)
        found: Any = next((found for match, found in matches if match.value), {})
        answer_id = found.get("path_params", {}).get("answer_id", "")
        changes, asks = scope["method"] in ("POST", "DELETE"), _path(scope).startswith(("/sources", f"{OPENAI}models"))
        action: Action = "stop" if changes and answer_id else "ask" if changes or asks else "read"
        await ask_who(self.authorize, Request(scope), answer_id, action)


async def ask_who(authorize: Authorize, request: Request, answer_id: str, action: Action) -> None:
    """Raise HTTPException if they may not do this; what else the host's own function raises is passed on."""
    may: Any = partial(authorize, request, answer_id, action)
    # One that is not asynchronous may look into Redis, for which others shall not wait.
    may = may() if inspect.iscoroutinefunction(authorize) else await anyio.to_thread.run_sync(may)
    if not (await may if inspect.isawaitable(may) else may):
        raise HTTPException(403, "you may not do this here")


def _path(scope: Scope) -> str:
    """The path below that at which the application is mounted."""
    return str(scope["path"].removeprefix(scope.get("root_path", "")))


def by_token(token: str) -> Authorize:
    """Let those do all who bring the token, and let read an answer who bring the one for it, of `reading_token`.

    It comes in the address (`?token=…`), since an EventSource can't set headers, or as `Authorization: Bearer`.
    """

    async def authorize(request: Request, answer_id: str, action: Action) -> bool:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = request.query_params.get("token", "")
        if hmac.compare_digest(given.encode(), token.encode()):
            return True
        readable = given.rpartition(".")[0]
        if not hmac.compare_digest(given.encode(), reading_token(token, readable).encode()):
            raise NoToken(401, "this address lacks its token: use the link that the server printed")
        return action == "read" and answer_id in ("", readable)

    return authorize


def reading_token(token: str, answer_id: str) -> str:
    """A token that lets its holder read this answer, and from which the server's own can't be had."""
    return f"{answer_id}.{hmac.new(token.encode(), answer_id.encode(), 'sha256').hexdigest()[:32]}"


def problem(status: int, error: str, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error as JSON."""
    return JSONResponse({"error": error, "message": message}, status, headers)


def told(error: Exception, scope: Scope) -> JSONResponse:
    """An error of the kit, or one of HTTP, as JSON; below OPENAI in the form of its API."""
    status = getattr(error, "status_code", None)
    status = status or next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)
    name = type(error).__name__.removesuffix("Exception")
    message, headers = getattr(error, "detail", str(error)), getattr(error, "headers", None)
    if not _path(scope).startswith(OPENAI):
        return problem(status, name, message, headers)
    status = 400 if status == 422 else status  # as that API has it
    kind = "server_error" if status >= 500 else "invalid_request_error"
    param = getattr(error, "param", "").removeprefix("body.") or None
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": name}}, status, headers)
