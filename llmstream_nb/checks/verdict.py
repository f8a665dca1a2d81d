"""What a check requires, and what it says of what came instead; the hint is plainer at each try."""

import html
import re
import reprlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

tries: Counter[str] = Counter()  # failed tries of each exercise, since it was last solved
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


@dataclass(frozen=True, repr=False)
class Verdict:
    """What a check found; Jupyter shows it."""

    passed: bool | None  # None: not started
    text: str
    hint: str = ""

    def __bool__(self) -> bool:
        return bool(self.passed)

    def __repr__(self) -> str:
        head = {True: "✓ Right:", False: "✗ Not yet:", None: "○"}[self.passed]
        return "\n  ".join([f"{head} {self.text}", *self.hint.splitlines()])

    def _repr_html_(self) -> str:
        lines = "<br>".join(html.escape(line) for line in repr(self).splitlines())
        shown = re.sub("`([^`<]+)`", r"<code>\1</code>", lines)
        return f'<p class="tex2jax_ignore mathjax_ignore">{shown}</p>'  # $…$ is not to be typeset


def right(name: str, text: str) -> Verdict:
    """The exercise is solved; a later try begins with the first hint again."""
    tries.pop(name, None)
    return Verdict(True, text)


def wrong(name: str, text: str, hints: tuple[str, ...]) -> Verdict:
    """The exercise is not solved; each try gets the next of these hints, and then always the last."""
    step = min(tries[name], len(hints) - 1)
    tries[name] += 1
    more = "\nThe whole of it stands below, under Solution." if step == len(hints) - 1 else ""
    return Verdict(False, text, f"Hint {step + 1} of {len(hints)}: {hints[step]}{more}")


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
