"""What viewers are told of an error; of one that nobody expected only its class, as its words may be anybody's."""

from functools import lru_cache

import redis

from llmstream_nb.answers.connection import LOST, said, unusable
from llmstream_nb.answers.log import Log
from llmstream_nb.protocol.wire import LLMStreamError


class Broken(LLMStreamError):
    """Reading or showing an answer raised what it never should."""


def explained(error: Exception, client: redis.Redis, what: str) -> LLMStreamError:
    """The error in words fit to show; `what` names the answer, or what else was read, in the log."""
    if isinstance(error, LLMStreamError):
        return error
    if isinstance(error, LOST) and (not isinstance(error, AttributeError) or said(error) == "WRONGTYPE"):
        return unusable(error, client)
    _note(what, type(error).__name__)
    return Broken(f"this can't be shown: reading it raised {type(error).__name__}")


@lru_cache(1_000)
def _note(what: str, kind: str) -> None:
    """Log it, but once: the same may come at every round."""
    Log(__name__).error("%s: reading it raised %s", what, kind)
