"""What a check requires, and how it says what came instead."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


class WrongError(Exception):
    """What is wrong, in a sentence for the learner."""


def require(condition: bool, otherwise: str) -> None:
    """Go on if this is so; else the check ends with this sentence."""
    if not condition:
        raise WrongError(otherwise)


def is_whole(value: Any) -> bool:
    """Whether this is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def show(value: Any, how: Callable[[Any], str] = _short.repr) -> str:
    """A value as text of bearable length, whatever its own methods do."""
    try:
        return how(value)[:200]
    except Exception:  # noqa: BLE001 - it is the learner's object
        return f"a {type(value).__name__}"
