"""Run the web application: in a thread of a notebook's kernel, or as a program of its own."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlencode

import redis
import uvicorn

from llmstream_nb.answers.connection import current
from llmstream_nb.extras import needed
from llmstream_nb.protocol.wire import LLMStreamError, Timing
from llmstream_nb.web.app import Limits, Models, create_app

if TYPE_CHECKING:
    from llmstream_nb.answers.ask import Answer
    from llmstream_nb.web.frame import WebFrame

START = 20.0  # seconds that starting may take
GRACE = 5  # seconds in which open requests may end when the server is stopped
_named: dict[str, Any] = {}  # the servers of this process that have a name


class NotServed(LLMStreamError):
    """The web server did not start."""


class _Server(uvicorn.Server):
    """Ends the event streams first when it shuts down: it would wait for them, and they have no end of their own."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.hub.end()  # type: ignore[union-attr]
        await super().shutdown(sockets)


class WebServer:
    """The web page and its server, on 127.0.0.1, in a thread of this process until `stop`.

    `server = WebServer().start()`, then open `server.link()` in a browser, or `server.frame()` in the notebook.

    Args:
        port: where it listens; a free one if 0.
        name: a server of this name in this process is stopped, and this one has its port and its token. So a cell can
            run again, and pages that are open come back by themselves.
        client: of `connect`; else that of the last `connect()`.
        token: what the link holds; else a random one.
        pool: leave the answers to workers elsewhere, as `enqueue` does.
        limits: how much it takes on, as `web.app.Limits(viewers=100)`.
        timing: leases and limits in seconds, as for `ask`.
        models: which model names may be asked for over HTTP, by source; none if absent.
        timeout, first_timeout: seconds a model may be silent, as for `ask`.

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
        pool: bool = False,
        limits: Limits | None = None,
        timing: Timing | None = None,
        models: Models | None = None,
        timeout: float | None = None,
        first_timeout: float | None = None,
    ) -> None:
        if old := _named.get(name):
            old.stop()
            port, token = port or old.port, old.token if token is None else token
        self.token = secrets.token_urlsafe(16) if token is None else token
        given: dict[str, Any] = {"models": models, "timeout": timeout, "first_timeout": first_timeout}
        app = create_app(client or current(), token=self.token, pool=pool, limits=limits, timing=timing, **given)
        try:
            self._socket = socket.create_server(("127.0.0.1", port), backlog=2048)
        except (OSError, OverflowError) as error:
            raise NotServed(f"port {port} of 127.0.0.1 can't be used ({error}): choose another, or 0 for any") from None
        self.port: int = self._socket.getsockname()[1]
        # No access log: it would hold the token.
        config = uvicorn.Config(
            app, access_log=False, log_level="warning", ws="none", server_header=False, timeout_graceful_shutdown=GRACE
        )
        self._server = _Server(config)
        self._thread: threading.Thread | None = None
        if name:
            _named[name] = self

    def __repr__(self) -> str:
        """Constant, and without the token: saved notebooks hold it."""
        return "<WebServer>"

    @property
    def base(self) -> str:
        """The server's address without the token: on Binder and other hubs, a path that jupyter-server-proxy serves."""
        hub = os.environ.get("JUPYTERHUB_SERVICE_PREFIX")
        return f"{hub.rstrip('/')}/proxy/{self.port}/" if hub else f"http://127.0.0.1:{self.port}/"

    def link(self, answer: Answer | str = "") -> str:
        """The address of the page, with the token in it; with an answer, of the page that shows it."""
        given = {"token": self.token, "answer": getattr(answer, "id", answer)}
        query = urlencode({name: value for name, value in given.items() if value})
        return f"{self.base}?{query}" if query else self.base

    def start(self) -> Self:
        """Serve in a thread; returns once requests are answered."""
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
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """End all streams and requests, and the answers that this server writes."""
        self._server.should_exit = True
        if self._thread:
            self._thread.join()
        self._socket.close()

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
