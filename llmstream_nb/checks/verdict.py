"""What a check says, and which hint goes with it."""

from __future__ import annotations

import html
from collections import Counter
from dataclasses import dataclass

from llmstream_nb.checks.hints import HINTS

tries: Counter[str] = Counter()  # failed tries of each exercise, since it was last solved


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
        return f'<p class="tex2jax_ignore mathjax_ignore">{lines}</p>'  # $…$ is not to be typeset


def right(name: str, text: str) -> Verdict:
    """The exercise is solved; a later try begins with the first hint again."""
    tries.pop(name, None)
    return Verdict(True, text)


def wrong(name: str, text: str) -> Verdict:
    """The exercise is not solved; the hint is plainer at each try."""
    hints = HINTS[name]
    step = min(tries[name], len(hints) - 1)
    tries[name] += 1
    more = "\nThe whole of it stands below, under Solution." if step == len(hints) - 1 else ""
    return Verdict(False, text, f"Hint {step + 1} of {len(hints)}: {hints[step]}{more}")
