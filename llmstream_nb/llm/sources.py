"""The LLM sources: `complete` asks one of them, always through the openai client, and yields text."""

import base64
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from llmstream_nb.llm import local, prepared
from llmstream_nb.llm.completion import Completion
from llmstream_nb.llm.endpoint import Endpoint, ModelError
from llmstream_nb.llm.messages import Message, asked, introduced, request_of, request_text
from llmstream_nb.llm.names import SOURCES
from llmstream_nb.llm.own import OwnSource, Source

OPENAI_URL = "https://api.openai.com/v1"
OPENAI_MODEL = "gpt-5.4-mini"
PLACEHOLDERS = ("lm-studio", "not-needed", "no-key-required", "anything")  # keys that are none
CHECKOUT = Path(__file__).parents[2]


@dataclass(frozen=True)
class SourceInfo:
    """A source as a list of choices shows it; if it is not `ready`, `note` says why and what to do."""

    name: str
    label: str
    ready: bool
    note: str


def default_source() -> str:
    """LLMSTREAM_LLM, else `scripted`: a key that merely lies in the environment spends nothing."""
    return os.environ.get("LLMSTREAM_LLM", "").strip() or "scripted"


def sources() -> list[SourceInfo]:
    """All sources and whether they are ready, judged by files and settings, without the network."""
    return [SourceInfo(name, label, not (note := _missing(name)), note) for name, label in SOURCES.items()]


def _missing(source: str) -> str:
    try:
        _endpoint(source, None)
    except ModelError as error:
        return str(error)
    return ""


def prepared_questions() -> list[str]:
    """The questions to which the scripted source has an answer."""
    return prepared.questions()


def complete(
    question: str | None = None,
    *,
    topic: str | None = None,
    messages: Sequence[Message] | None = None,
    params: Mapping[str, Any] | None = None,
    source: str | None = None,
    model: str | None = None,
    stream: bool = True,
    timeout: float | None = None,
    first_timeout: float | None = None,
    parts: bool = False,
) -> Completion:
    """Ask `question`, as about `topic`, and return an iterator over the answer's text; with `parts`, over all of it.

    Or ask `messages`, in place of the two, as the API of chat completions takes them; `params` are what else that takes
    (`temperature`, `max_tokens`, `tools`, …). BadQuestion and TypeError say which of them can't be sent.

    Returns at once: the first `next()` makes the request, so its errors come out of the iteration. Here only
    what can be known without the network raises ModelError: an unknown source, a missing key or local model.
    `timeout` is how many seconds the endpoint may be silent, while connecting and once text has come (else
    LLMSTREAM_TIMEOUT, else 30); `first_timeout` before that, when a model may still have to be loaded (else `timeout`,
    if it is given, else LLMSTREAM_FIRST_TIMEOUT, else 120). With `stream=False` the whole text comes as one delta,
    for which the model has ten minutes at least, unless one of the two is given.
    """
    first_timeout, timeout = silence(timeout, first_timeout, stream=stream)
    endpoint = _endpoint(source or default_source(), model)
    given = request_of(request_text(messages, params, question, topic))
    told = given["messages"] or introduced(asked(question or ""), topic)
    request: dict[str, Any] = {"model": endpoint.model, "messages": told, "stream": stream}
    if stream:
        request["stream_options"] = {"include_usage": True}
    if given["params"]:
        request["extra_body"] = given["params"]  # the client has no say in what an endpoint may take
    return Completion(endpoint, request, timeout, first_timeout, parts=parts)


def deltas_of(
    question: str,
    topic: str | None,
    source: Source | str | None,
    model: str | None,
    *,
    turns: Sequence[Message] = (),
    messages: list[Message] | None = None,
    params: Mapping[str, Any] | None = None,
    **limits: Any,
) -> tuple[Completion | OwnSource, tuple[float, float]]:
    """An answer of any source, and how long it may be silent: endlessly, where it looks after that itself.

    `turns` are what was said before the question; `messages` stand in place of both. `limits` are `timeout`,
    `first_timeout` and `stream`, as `complete` takes them. Raises ModelError, BadQuestion and TypeError as that does.
    """
    told = messages or asked(question, turns)
    if callable(source):
        return OwnSource(source, question, topic, stream=limits.get("stream", True), messages=told), silence(**limits)
    limits |= {"params": params, "source": source, "model": model, "parts": True}
    if messages or turns:
        return complete(messages=messages or introduced(told, topic), **limits), (math.inf, math.inf)
    return complete(question, topic=topic, **limits), (math.inf, math.inf)


def silence(
    timeout: float | None = None, first_timeout: float | None = None, *, stream: bool = True
) -> tuple[float, float]:
    """Seconds that a source may be silent, before its first text and after it; None means what `complete` says."""
    if not all(each is None or each >= 0 for each in (timeout, first_timeout)):
        raise ValueError("timeout and first_timeout are numbers of seconds")
    if first_timeout is None:
        patience = max(_seconds("LLMSTREAM_FIRST_TIMEOUT", 120.0), 0.0 if stream else 600.0)
        first_timeout = timeout if timeout is not None else patience
    return first_timeout, _seconds("LLMSTREAM_TIMEOUT", 30.0) if timeout is None else timeout


def _seconds(name: str, default: float) -> float:
    """A time in the environment. Raises ModelError if it is none."""
    value = os.environ.get(name, "").strip() or default
    with suppress(ValueError):
        if 0 < float(value) <= 86_400:
            return float(value)
    raise ModelError("BadSettings", f"{name} is a number of seconds, as 60, and at most a day: set it again.")


def check_source(source: str) -> str:
    """Return the name of a source, or raise ModelError."""
    if source not in SOURCES:
        raise ModelError("UnknownSource", f"There is no source {source!r}: choose {', '.join(SOURCES)}.")
    return source


def _endpoint(source: str, model: str | None) -> Endpoint:
    """What `source` stands for now. Raises ModelError if something it needs is missing."""
    check_source(source)
    if source == "scripted":
        model = model or "scripted"
        goes_on = "goes_on" in model.partition(":")[2].split(",")  # as any endpoint, it is asked to if that is known
        return Endpoint(source, "The scripted model", model, _scripted_url, local.KEY, (local.KEY,), goes_on=goes_on)
    if source == "local":
        return _local_endpoint(model)
    return _openai_endpoint(model)


def _scripted_url() -> str:
    from llmstream_nb.llm import scripted  # a web server, which takes its time to import

    return scripted.server().url


def _local_endpoint(model: str | None) -> Endpoint:
    url = os.environ.get("LLMSTREAM_LOCAL_URL", "").strip()
    if not url and not local.installed():
        again = "in a copy of the repository `python3 -m llmstream_nb lab` installs it; or choose the source scripted"
        raise ModelError("LocalModelMissing", f"The local model is not installed: {again}.")

    def start() -> str:
        try:
            return url or local.url()
        except OSError as error:
            raise ModelError("LocalModelFailed", f"{error}: choose another source.") from None

    key = os.environ.get("LLMSTREAM_LOCAL_KEY", "") if url else local.KEY
    secrets = (key,) if key else ()
    return Endpoint("local", "The local model", model or local.MODEL, start, key or "none", secrets, goes_on=True)


def _openai_endpoint(model: str | None) -> Endpoint:
    settings = _settings()
    url = settings.get("OPENAI_BASE_URL", OPENAI_URL)
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
        shown = f"{parts.scheme}://{host}{port}{parts.path}"  # without user and password
    except ValueError:
        host = ""
    if not host or parts.scheme not in ("http", "https"):
        raise ModelError("BadAddress", "OPENAI_BASE_URL must look like http://127.0.0.1:11434/v1: set it.")
    loopback = host in ("localhost", "::1") or host.startswith("127.")
    key = settings.get("OPENAI_API_KEY", "")
    if not (key.isascii() and key.isprintable()):
        raise ModelError("NoAPIKey", "OPENAI_API_KEY holds characters that no key has: copy it again.")
    if not key and not loopback:
        into = "the environment or into a file .env, or choose the source scripted or local"
        raise ModelError("NoAPIKey", f"{shown} needs a key: put OPENAI_API_KEY into {into}.")
    password = unquote(parts.password or "")
    basic = base64.b64encode(f"{unquote(parts.username or '')}:{password}".encode()).decode()
    tokens = [value for name, value in parse_qsl(parts.query) if "version" not in name]
    secrets = (key, basic, parts.password or "", password, *tokens)
    hidden = tuple(text for text in secrets if len(text) >= 8 and text not in PLACEHOLDERS)
    model = model or settings.get("OPENAI_MODEL", OPENAI_MODEL)
    endpoint = Endpoint("openai", f"The endpoint {shown}", model, lambda: url, key or "none", hidden, loopback)
    tags, goes_on = (settings.get(name) == "1" for name in ("OPENAI_THINK_TAGS", "OPENAI_GOES_ON"))
    return replace(endpoint, think_tags=tags, goes_on=goes_on)


def _settings() -> dict[str, str]:
    """The environment and, beneath it, the files .env of the working directory and of the checkout.

    Raises ModelError where a file is no text, or names the address to which a key from elsewhere would be sent.
    """
    from dotenv import dotenv_values

    settings, beside = dict[str, str](), ""  # beside: the key in the file that names the address
    for file in (CHECKOUT / ".env", Path(".env")):
        try:
            told = dotenv_values(file, interpolate=False, encoding="utf-8-sig")
        except (OSError, UnicodeError):
            raise ModelError("BadSettings", f"{file} can't be read: save it as UTF-8 text.") from None
        found = {name: value for name, value in told.items() if value and value.strip()}  # a blank one changes nothing
        beside = found.get("OPENAI_API_KEY", "").strip() if "OPENAI_BASE_URL" in found else beside
        settings |= found
    settings |= (given := {name: value for name, value in os.environ.items() if value.strip()})
    whole = {name: value.strip() for name, value in settings.items()}
    if "OPENAI_BASE_URL" in whole.keys() - given and whole.get("OPENAI_API_KEY", beside) != beside:
        raise ModelError("BadSettings", "A .env sets OPENAI_BASE_URL: set OPENAI_API_KEY there too, and nowhere else.")
    return whole
