"""The base install brings what asking and reading need; for the rest, the error names the extra to install."""

from collections.abc import Iterator
from contextlib import contextmanager

from llmstream_nb.protocol.wire import LLMStreamError


class MissingExtra(LLMStreamError, ModuleNotFoundError):
    """A package is not installed that an extra of the kit brings."""


@contextmanager
def needed(extra: str, what: str) -> Iterator[None]:
    """Import inside this what `extra` brings ("": nothing); `what` is what needs it, as the error calls it.

    Raises MissingExtra in place of ModuleNotFoundError.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if not extra or (error.name or "").startswith("llmstream_nb"):
            raise
        told = f'{what} needs {error.name}: pip install "llmstream-nb[{extra}]"'
        raise MissingExtra(told, name=error.name) from None
