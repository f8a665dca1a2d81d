"""What a check requires, and what it says of what came instead, with a hint for that mistake."""

import html
import re
import reprlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

tries: defaultdict[str, list[str]] = defaultdict(list)  # the hints given at each exercise since it was last solved
SEVERAL = 5  # hints, after which a mistake made before leads to the last one
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
    """The exercise is solved; a later try begins with the first hints again."""
    tries.pop(name, None)
    return Verdict(True, text)


def wrong(name: str, text: str, hints: dict[str, list[str]]) -> Verdict:
    """The exercise is not solved; the hint belongs to the mistake, which the words in `text` tell.

    `hints` holds two for each mistake, by a pattern for these words, and under "" two for any other, and the last: a
    line of the solution. A mistake that comes again gets its next hint.
    """
    mistake = next((words for words in hints if words and re.search(words, text)), "")
    ladder, given = [*hints[mistake][:2], hints[""][2]], tries[name]
    unread = [hint for hint in ladder if hint not in given] or ladder[-1:]
    hint = unread[-1 if len(given) >= SEVERAL and ladder[0] in given else 0]
    given.append(hint)
    more = "\nThe whole of it stands below, under Solution." if hint == ladder[-1] else ""
    return Verdict(False, text, f"Hint {ladder.index(hint) + 1} of {len(ladder)}: {hint}{more}")


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
