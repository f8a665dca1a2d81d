"""One answer of an OpenAI-compatible endpoint: iterate over its text, close it from any thread."""

from __future__ import annotations

import queue
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from llmstream_nb.protocol.wire import LLMStreamError

if TYPE_CHECKING:  # importing openai takes half a second and 40 MB, so it waits for the first question
    import httpx2
    import openai

# HTTP status: the name to show, and what to do.
REFUSALS = {
    400: ("BadRequest", "change the question or the model"),
    401: ("Unauthorized", "check OPENAI_API_KEY"),
    403: ("Forbidden", "see what the key may use"),
    404: ("ModelNotFound", "choose another model, or see the address"),
    429: ("RateLimited", "ask again, or see your quota"),
    500: ("ServerError", "ask again, or choose another source"),
}


class ModelError(LLMStreamError):
    """A model that gave no answer, or only a part of one.

    `error` is a short name to show (`RateLimited`, `Stalled`, …); `str()` says what happened and what to
    do. Neither holds a key or a password.
    """

    def __init__(self, error: str, message: str) -> None:
        super().__init__(message)
        self.error = error


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible API, and how to speak of it in messages."""

    source: str
    title: str
    model: str
    url: Callable[[], str]  # may start the server behind it
    key: str = "none"
    secrets: tuple[str, ...] = ()  # never to be shown
    loopback: bool = True  # on this machine, so never through a proxy


@cache
def _certificates(trust_env: bool) -> ssl.SSLContext:
    """The authorities to trust, read once: each reading takes 25 ms and 1 MB."""
    import httpx2

    return httpx2.create_ssl_context(trust_env=trust_env)


class Completion:
    """An answer as it is written: iterate over it for its deltas, non-empty strings; ModelError if it fails.

    `source` and `model` say who writes. `finish_reason` (`stop`, `length`, `content_filter`, …) and `usage`
    (prompt_tokens, completion_tokens, total_tokens) are known once the iteration is exhausted. A delta may
    hold one half of a surrogate pair, when the model's tokens cut an emoji in two.
    """

    def __init__(self, endpoint: Endpoint, request: dict[str, Any], timeout: float) -> None:
        self.source, self.model = endpoint.source, endpoint.model
        self.finish_reason: str | None = None
        self.usage: dict[str, int] | None = None
        self._endpoint, self._request, self._timeout = endpoint, request, timeout
        self._opened: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._closed = False
        self._deltas = self._read()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._deltas)

    def close(self) -> None:
        """End the request, from any thread and at any moment; an iteration going on ends without an error.

        The endpoint sees its client leave, and stops. Closing twice, or after the end, does nothing.
        """
        with self._lock:
            self._closed = True
            self._hang_up()
        self._opened.put(None)

    def _hang_up(self) -> None:
        if self._socket is not None:
            with suppress(OSError):  # it may have ended already
                self._socket.shutdown(socket.SHUT_RDWR)  # unlike close(), this also wakes a thread that reads
            self._socket.close()
            self._socket = None

    def _read(self) -> Iterator[str]:
        error = client = None
        written = False
        try:
            client, answer = self._open()
            for text in self._texts(answer):
                if self._closed:
                    break
                written = True
                yield text
            if self.finish_reason is None:
                error = self._fault("ConnectionDropped", "broke off in the middle of its answer: ask again")
            elif self.finish_reason == "stop" and not written:
                error = self._fault("EmptyAnswer", "answered nothing: ask again, or in other words")
        except Exception as problem:  # noqa: BLE001 - whatever it is, the viewer must see it
            error = self._explain(problem)
        finally:
            left = self._closed
            self.close()
            if client is not None:
                client.close()
        if error is not None and not left:  # raised here, so that the request and its key don't hang on it
            raise error

    def _open(self) -> tuple[openai.OpenAI, Any]:
        """Make the request, in a thread of its own, since connecting can't be interrupted.

        `close()` leaves that thread behind; it ends by itself, at the latest after the timeout.
        """
        if not self._closed:
            threading.Thread(target=self._connect, name="open-completion", daemon=True).start()
        opened = self._opened.get()
        if opened is None:
            raise ConnectionAbortedError("closed before it was open")
        if isinstance(opened, Exception):
            raise opened
        return opened

    def _connect(self) -> None:
        import openai

        http = None
        try:
            url = self._endpoint.url()
            http = self._http_client(url)
            client = openai.OpenAI(
                api_key=self._endpoint.key,
                base_url=url,
                http_client=http,
                timeout=self._timeout,
                max_retries=0,  # whoever watches is to see an error at once; they can ask again
            )
            opened: Any = client, client.chat.completions.create(**self._request)
        except Exception as problem:  # noqa: BLE001 - handed to the thread that iterates
            opened = problem
        self._opened.put(opened)
        if http is not None and (self._closed or isinstance(opened, Exception)):
            http.close()

    def _http_client(self, url: str) -> httpx2.Client:
        import httpx2

        trust_env = not self._endpoint.loopback
        plain = self._endpoint.loopback and url.startswith("http:")  # no TLS anywhere on the way
        hooks = {"request": [lambda request: request.extensions.update(trace=self._keep_socket)]}
        try:
            verify = False if plain else _certificates(trust_env)
            return httpx2.Client(verify=verify, trust_env=trust_env, timeout=self._timeout, event_hooks=hooks)
        except (OSError, ValueError, ImportError):
            raise self._fault("BadSettings", "needs other settings: see SSL_CERT_FILE, HTTPS_PROXY") from None

    def _keep_socket(self, event: str, info: dict[str, Any]) -> None:
        """Keep a handle on the connection for `close()`; httpcore calls this at each step of a request."""
        if event.endswith("connect_tcp.complete"):
            with self._lock:
                # A duplicate: TLS replaces the original, and httpcore may close it at any time.
                self._socket = info["return_value"].get_extra_info("socket").dup()
                if self._closed:
                    self._hang_up()

    def _texts(self, answer: Any) -> Iterator[str]:
        """The non-empty texts in `answer`, a stream of chunks or one whole completion."""
        stream = self._request["stream"]
        for part in answer if stream else [answer]:
            if part.usage:
                names = ("prompt_tokens", "completion_tokens", "total_tokens")
                self.usage = {name: getattr(part.usage, name) for name in names}
            for choice in part.choices[:1]:  # the chunk that brings the usage has none
                self.finish_reason = choice.finish_reason or self.finish_reason
                if text := (choice.delta if stream else choice.message).content:
                    yield text

    def _fault(self, error: str, message: str) -> ModelError:
        for secret in self._endpoint.secrets:
            message = message.replace(secret, "***")
        return ModelError(error, f"{self._endpoint.title} {message}.")

    def _explain(self, problem: Exception) -> ModelError:
        """What to show for `problem`: in words of its own, as the endpoint's may quote the key."""
        import httpx2
        import openai

        match problem:
            case ModelError():
                return problem
            case openai.APITimeoutError():
                return self._fault("Stalled", f"was silent for {self._timeout:g} s: ask again, or wait")
            case openai.APIConnectionError(__cause__=httpx2.RemoteProtocolError() | httpx2.ReadError()):
                return self._fault("ConnectionDropped", "dropped the connection: ask again")
            case openai.APIConnectionError():
                return self._fault("Unreachable", "can't be reached: see whether it runs, and its address")
            case openai.APIError():
                return self._explain_refusal(problem)
        return self._fault("BadAnswer", "sent what is not a chat completion: check its address")

    def _explain_refusal(self, problem: openai.APIError) -> ModelError:
        status = getattr(problem, "status_code", 500)  # an error in the middle of a stream has none
        if "context_" in f"{problem.code} {problem.type}":  # in OpenAI's codes, in llama.cpp's types
            return self._fault("BadRequest", f"finds the question too long for {self.model!r}: shorten it")
        error, advice = REFUSALS.get(status) or REFUSALS[500 if status >= 500 else 400]
        body = problem.body.get("message") if isinstance(problem.body, dict) else problem.body
        said = f", {' '.join(str(body or '').split())[:300]!r}" if status != 401 else ""  # may quote the key
        if wait := status == 429 and problem.response.headers.get("Retry-After"):
            advice = f"wait {wait} s, then {advice}"
        return self._fault(error, f"answered {status}{said}: {advice}")
