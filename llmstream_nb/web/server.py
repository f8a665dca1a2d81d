"""Run the web application: in a thread of a notebook's kernel, or as a program of its own."""

from __future__ import annotations

import asyncio
import html
import os
import secrets
import socket
import threading
import time
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlencode

import h11
import redis
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from llmstream_nb.answers.connection import current
from llmstream_nb.extras import needed
from llmstream_nb.protocol.wire import LLMStreamError
from llmstream_nb.web.admission import reading_token
from llmstream_nb.web.app import create_app

if TYPE_CHECKING:
    from llmstream_nb.answers.ask import Answer
    from llmstream_nb.web.frame import WebFrame

START = 20.0  # seconds that starting may take
GRACE = 5  # seconds in which open requests may end when the server is stopped
ARRIVE = 10.0  # seconds that a request may take to arrive whole
MANY = 10_000  # connections at most, where the system sets no limit
QUEUE = 2_048  # connections that may wait to be accepted
AT_ONCE = 16  # accepted before one is looked at: asyncio does not get over a lack of files
_named: dict[str, Any] = {}  # the servers of this process that have a name


class NotServed(LLMStreamError):
    """The web server did not start."""


class _Server(uvicorn.Server):
    """Closes on those who owe it a request for too long: uvicorn waits for ever, and a file is open for each."""

    _owing: dict[Any, float] = {}  # noqa: RUF012 - since when, by connection and the request before

    async def on_tick(self, counter: int) -> bool:
        now, waiting = time.monotonic(), (h11.IDLE, h11.SEND_BODY)
        connections: Any = self.server_state.connections
        owing = [one for one in connections if one.conn.their_state in waiting]
        self._owing = {(one, one.cycle): self._owing.get((one, one.cycle), now) for one in owing}
        for (one, _), since in self._owing.items():
            if now - since > ARRIVE:
                one.transport.abort()
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """One number tells asyncio how many to accept at once, and the system how many may wait: change the latter."""
        await super().startup(sockets)
        for one in sockets or ():
            one.listen(QUEUE)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the event streams first: uvicorn would wait for them, and they have no end of their own."""
        self.config.app.state.hub.end()  # type: ignore[union-attr]
        await super().shutdown(sockets)


class _Connection(H11Protocol):
    """At the limit, uvicorn answers a request with 503. But it waits for that: beyond it nobody is let in."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > (self.limit_concurrency or 0) * 5 // 4:
            transport.abort()


class WebServer:
    """The web page and its server, on 127.0.0.1, in a thread of this process until `stop`.

    `server = WebServer().start()`, then open `server.link()` in a browser, or `server.frame()` in the notebook.

    Args:
        port: where it listens; a free one if 0.
        name: a server of this name in this process is stopped, and this one has its port and its token. So a cell can
            run again, and pages that are open come back by themselves.
        client: of `connect`; else that of the last `connect()`.
        token: what the link holds; else LLMSTREAM_WEB_TOKEN, else a random one. Servers that share one serve the same
            pages, and so does a server that is started again.
        options: of `create_app`, as `pool=True`, `limits=Limits(viewers=100)` or `models={"openai": ["…"]}`. With
            `authorize` there is no token.

    Raises:
        NotServed: the port is taken, or the server did not start.
        RedisUnusable: `client` is not given, and connecting fails.
    """

    def __init__(
        self,
        port: int = 0,
        *,
        name: str = "",
        client: redis.Redis | None = None,
        token: str | None = None,
        **options: Any,
    ) -> None:
        if old := _named.get(name):
            old.stop()
            port, token = port or old.port, old.token if token is None else token
        if token is None and not options.get("authorize"):
            token = os.environ.get("LLMSTREAM_WEB_TOKEN", "").strip() or secrets.token_urlsafe(16)
        self.token = token or ""
        self._app = create_app(client or current(), token=self.token, **options)
        self.port: int = port
        self._thread: threading.Thread | None = None
        self._listen()
        if name:
            _named[name] = self

    def _listen(self) -> None:
        try:
            self._socket = socket.create_server(("127.0.0.1", self.port), backlog=QUEUE)
        except (OSError, OverflowError) as error:
            again = "choose another, or 0 for any"
            raise NotServed(f"port {self.port} of 127.0.0.1 can't be used ({error}): {again}") from None
        self.port = self._socket.getsockname()[1]
        # No access log: it would hold the token.
        quiet: dict[str, Any] = {"access_log": False, "log_level": "warning", "ws": "none", "server_header": False}
        config = uvicorn.Config(self._app, http=_Connection, backlog=AT_ONCE, timeout_graceful_shutdown=GRACE, **quiet)
        self._server = _Server(config)

    def __repr__(self) -> str:
        """Constant, and without the token: saved notebooks hold it."""
        return "<WebServer>"

    @property
    def base(self) -> str:
        """The server's address without the token: on Binder and other hubs, a path that jupyter-server-proxy serves."""
        hub = os.environ.get("JUPYTERHUB_SERVICE_PREFIX")
        return f"{hub.rstrip('/')}/proxy/{self.port}/" if hub else f"http://127.0.0.1:{self.port}/"

    def link(self, answer: Answer | str = "", *, read_only: bool = False) -> str:
        """The address of the page, with the token in it; with an answer, of the page that shows it.

        With `read_only` it holds another token, by which one can read this answer, and nothing else.
        """
        answer_id: Any = getattr(answer, "id", answer)
        if read_only and not (answer_id and self.token):
            raise ValueError("only the link to an answer can be for reading alone, and of a server that has a token")
        token = reading_token(self.token, answer_id) if read_only else self.token
        given = {"token": token, "answer": answer_id}
        query = urlencode({name: value for name, value in given.items() if value})
        return f"{self.base}?{query}" if query else self.base

    def start(self) -> Self:
        """Serve in a thread; returns once requests are answered. After `stop` it serves again, on the same port."""
        if self._thread and self._thread.is_alive():
            return self
        if self._socket.fileno() < 0:
            self._listen()
        self._thread = threading.Thread(target=self.run, name="llmstream web", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + START
        while self._thread.is_alive() and not self._server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        if not self._server.started:
            raise NotServed("the web server did not start: its reason stands in the kernel's log")
        return self

    def run(self) -> None:
        """Serve in this thread until `stop`, SIGTERM or Ctrl-C."""
        self._server.config.limit_concurrency = _room()
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """End all streams and requests, and the answers that this server writes."""
        self._server.should_exit = True
        if self._thread:
            self._thread.join()
        self._socket.close()

    @contextmanager
    def in_browser(self) -> Iterator[None]:
        """Open the page in a browser.

        All users of a machine can see the command lines on it. So the browser's names no link, but a file that only
        this user can read, and that leads there. It is deleted at the end.
        """
        with TemporaryDirectory(prefix="llmstream-") as folder:  # nobody else may look into it
            page = Path(folder, "open.html")
            page.touch(0o600)
            page.write_text(f'<meta http-equiv="refresh" content="0; url={html.escape(self.link())}">', "utf-8")
            webbrowser.open(page.as_uri())
            yield

    def frame(self, answer: Answer | str = "", height: int = 520) -> WebFrame:
        """The page in the notebook, `height` pixels high. A saved notebook holds neither the page nor the token.

        Raises MissingExtra where the packages for widgets are not installed.
        """
        with needed("notebook", "WebServer.frame"):
            from llmstream_nb.web.frame import WebFrame

        return WebFrame(self.port, partial(self.link, answer), height)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _room() -> int:
    """How many connections to take: half as many as this process may open files."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return MANY
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MANY if soft == resource.RLIM_INFINITY else soft // 2
