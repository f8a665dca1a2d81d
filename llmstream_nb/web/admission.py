"""What every request has to pass, and what every reply carries: token, origin, size, security headers."""

import secrets
from collections.abc import Mapping
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.responses import HTMLResponse, JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmstream_nb.answers.log import Log

# The page's own files hold nothing secret, and what a page loads can't carry its token.
OPEN = ("/page.js", "/answer.js", "/paper.js", "/elements.js", "/page.css", "/states.css", "/text.css")
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
POLICY += "base-uri 'none'; form-action 'none'; frame-ancestors "
PAGE = Path(__file__).parent / "page"


class Admission:
    """ASGI middleware. It refuses with 401, 403 or 413, and adds its headers to every reply.

    The token comes in the address (`?token=…`), since an EventSource can't set headers, or as `Authorization: Bearer`.
    A request that changes something must come from a page of this server: its Origin must name the host that it was
    sent to. Only the host is compared, as TLS may end before it gets here.

    People who come without the token are refused, too, but see the page: it can do nothing, and tells them why.
    """

    def __init__(self, app: ASGIApp, *, token: str, body: int, frame_ancestors: str) -> None:
        self.app, self.token, self.body = app, token, body
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
            await self.app(scope, receive, send)
            return

        begun = False

        async def reply(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
                if message["status"] >= 400:  # without the query, which holds the token
                    Log(__name__).info("%s %s: refused with %s", scope["method"], scope["path"], message["status"])
            await send(message)

        headers = Headers(scope=scope)
        if refusal := self._refusal(scope, headers):
            visit = refusal[0] == 401 and scope["path"] == "/" and "text/html" in headers.get("accept", "")
            answer = HTMLResponse((PAGE / "index.html").read_bytes(), 401) if visit else problem(*refusal)
            await answer(scope, receive, reply)
            return
        try:
            await self.app(scope, receive, reply)
        except Exception as error:
            if begun:
                raise
            # Neither its words nor the query: they may hold a model's text, a secret, the token.
            Log(__name__).error("%s %s: %s", scope["method"], scope["path"], type(error).__name__)
            await problem(500, "Broken", "the server could not do this: its log says why")(scope, receive, reply)

    def _refusal(self, scope: Scope, headers: Mapping[str, str]) -> tuple[int, str, str] | None:
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.body:
            return 413, "TooLarge", f"a request may have {self.body:,} bytes"
        if not self._has_token(scope, headers):
            return 401, "NoToken", "this address lacks its token: use the link that the server printed"
        origin = headers.get("origin")
        if scope["method"] not in ("GET", "HEAD") and origin and origin.partition("://")[2] != headers.get("host"):
            return 403, "ForeignOrigin", "another site's page may not do this"
        return None

    def _has_token(self, scope: Scope, headers: Mapping[str, str]) -> bool:
        if not self.token or scope["path"].removeprefix(scope.get("root_path", "")) in OPEN:
            return True
        given = QueryParams(scope["query_string"]).get("token", "")
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given = bearer
        return secrets.compare_digest(given.encode(), self.token.encode())


def problem(status: int, error: str, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error as JSON."""
    return JSONResponse({"error": error, "message": message}, status, headers)
