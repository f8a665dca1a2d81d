"""An OpenAI-compatible endpoint, and how its errors are told: in its own words, and never with a secret."""

import base64
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from itertools import groupby
from urllib.parse import quote

from llmstream_nb.llm.chunks import Fault
from llmstream_nb.protocol.wire import LLMStreamError

# HTTP status: the name to show, and what to do.
REFUSALS = {
    300: ("BadAnswer", "check its address"),
    400: ("BadRequest", "change the question or the model"),
    401: ("Unauthorized", "check OPENAI_API_KEY"),
    402: ("PaymentRequired", "see the account of the key"),
    403: ("Forbidden", "see what the key may use"),
    404: ("ModelNotFound", "choose another model, or see the address"),
    405: ("BadAddress", "check its address"),
    429: ("RateLimited", "ask again, or see your quota"),
    500: ("ServerError", "ask again, or choose another source"),
}
RUN = 12  # so many characters of a secret in a row are never shown
HINT = 8  # so many may be what an endpoint quotes of a key that it refuses
STARRED = re.compile(r"sk-[\w-]*[*.…•]|\S[*•]{2}")  # a key of which it hides a part itself
QUOTED = 300  # characters of the endpoint's words
ECHO = 24  # so many letters and digits of the request in a row are not shown of them


class Disagrees(Exception):
    """A model that was to go on from a text, and does not: it has to begin anew."""


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
    think_tags: bool = False  # its text may begin with <think>…</think>, which is reasoning
    goes_on: bool = False  # it goes on from a last message that is the assistant's

    def error(self, error: str, message: str) -> ModelError:
        """The error of that name, with a message that begins with the endpoint's title."""
        return ModelError(error, f"{self.mask(self.title)} {message}.")

    def refusal(self, fault: Fault, asked: object, status: int = 0, retry_after: str = "") -> ModelError:
        """What to show for an error that the endpoint told, with an HTTP status or, as 0, in an answer's place.

        What it quotes of `asked`, the request's messages and parameters, is hidden: more people see the error.
        """
        if fault.too_long:
            return self.error("BadRequest", f"finds the question too long for {self.model!r}: shorten it")
        code = status or fault.code or 500
        error, advice = REFUSALS.get(code) or REFUSALS[500 if code >= 500 else code // 100 * 100]
        advice = advice if status or fault.code else "see what it says, and its address"
        # Masked first: a cut inside a secret would hide it from the mask.
        words = _without_echo(self.mask(fault.words), json.dumps(asked, ensure_ascii=False))[:QUOTED]
        hint = code == 401 and (STARRED.search(fault.words) or self.mask(fault.words, HINT) != fault.words)
        said = f", {words!r}" if words and not hint else ""
        happened = f"answered {status}" if status else "reported an error"
        return self.error(error, f"{happened}{said}: {_wait(retry_after)}{advice}")

    def mask(self, text: str, run: int = RUN) -> str:
        """`text` with stars in place of each secret, however it is written, and of each part of `run` characters."""
        hidden = set()
        lower = "".join(char.lower() if char.isascii() else char for char in text)  # the others may change in number
        for secret in self.secrets if len(text) >= HINT else ():
            size = min(run, len(secret))
            parts = {form[at : at + size] for form in _forms(secret) for at in range(len(form) - size + 1)}
            found = (at for at in range(len(text) - size + 1) if lower[at : at + size] in parts)
            hidden |= {at + n for at in found for n in range(size)}
        runs = groupby(range(len(text)), lambda at: at in hidden)
        return "".join("***" if secret else "".join(text[at] for at in run) for secret, run in runs)


def _without_echo(words: str, asked: str) -> str:
    """`words` with stars for what they quote of `asked`, JSON, with whatever quotes, spaces and escapes around it."""
    places = [at for at, char in enumerate(words) if char.isalnum()]
    said, asked = ("".join(filter(str.isalnum, text)) for text in (words, asked + asked.replace(r"\n", "")))
    runs = [said[at : at + ECHO] for at in range(len(said) - ECHO + 1)]
    echoes = set(runs).intersection(asked[at : at + ECHO] for at in range(len(asked) - ECHO + 1))
    hidden = {n for at, run in enumerate(runs) if run in echoes for n in range(places[at], places[at + ECHO - 1] + 1)}
    return re.sub("\0+", "***", "".join("\0" if at in hidden else char for at, char in enumerate(words)))


def _forms(secret: str) -> list[str]:
    """`secret` as headers, addresses and dumps write it, in lower case."""
    raw = secret.encode()
    # Each of base64's characters holds six bits: what is before the secret, as a user and a colon, shifts it.
    coded = [base64.b64encode(bytes(shift) + raw).decode().rstrip("=")[shift and shift + 1 :] for shift in range(3)]
    coded += [form.replace("+", "-").replace("/", "_") for form in coded]
    return [form.lower() for form in (secret, quote(secret, safe=""), raw.hex(), "%" + raw.hex("%"), *coded)]


def _wait(retry_after: str) -> str:
    """The advice in a Retry-After header: seconds or a date; nothing if it is neither."""
    if re.fullmatch(r"\d{1,6}(\.\d{1,3})?", retry_after):
        return f"wait {retry_after} s, then "
    try:
        return f"wait until {parsedate_to_datetime(retry_after).astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC, then "
    except (ValueError, OverflowError):
        return ""
