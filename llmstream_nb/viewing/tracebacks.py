"""Errors in a notebook that say what to do are shown with the learner's own lines, and without the libraries'."""

from __future__ import annotations

import linecache
import traceback
from types import TracebackType
from typing import Any

import redis

from llmstream_nb.protocol.wire import LLMStreamError

# What to do, where the error doesn't say so itself.
ADVICE = {
    redis.ConnectionError: "Does Redis run? The notebook's first cell connects to it.\n",
    redis.TimeoutError: "Does Redis run? The notebook's first cell connects to it.\n",
    NameError: "Run the cell that makes it first, or all above: Run › Run All Above Selected Cell.\n",
}


def install(shell: Any) -> None:
    """Have this IPython show them, unless it was told already how to show errors."""
    if not shell.custom_exceptions:
        shell.set_custom_exc((LLMStreamError, redis.RedisError, NameError), show)


def show(shell: Any, kind: type[BaseException], error: BaseException, trace: TracebackType, **_: Any) -> None:
    """Show an error briefly, or as ever if that can't be done; `%tb` shows it as ever, too."""
    try:
        lines = brief(shell, kind, error, trace)
        error._render_traceback_ = lambda: lines  # type: ignore[attr-defined]  # IPython asks for it
    except Exception:  # noqa: BLE001 - shown at length is better than not shown
        lines = []
    try:
        shell.showtraceback((kind, error, trace), running_compiled_code=True)
    finally:
        vars(error).pop("_render_traceback_", None)


def brief(shell: Any, kind: type[BaseException], error: BaseException, trace: TracebackType) -> list[str]:
    """What happened, what to do, and which lines of the learner's cells did it."""
    lines = [f"\x1b[1;31m{kind.__name__}\x1b[0m: {error}\n{ADVICE.get(kind, '')}"]
    for frame, number in traceback.walk_tb(trace):
        if cell := shell.compile.format_code_name(frame.f_code.co_filename):
            source = linecache.getline(frame.f_code.co_filename, number)
            lines.append(f"{' '.join(cell)}, line {number}: \x1b[1m{source.strip()}\x1b[0m")
    return [*lines, "\n%tb shows the whole traceback."]
