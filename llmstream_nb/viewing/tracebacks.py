"""Errors in a notebook that say what to do are shown with the learner's own lines, and without the libraries'."""

import traceback
from contextlib import suppress
from types import TracebackType
from typing import Any

import redis

from llmstream_nb.protocol.wire import LLMStreamError

# What to do, where the error doesn't say so itself.
LOST = "\nDoes Redis run? The notebook's first cell connects to it."
UNKNOWN = "\nIs it made in a cell above? Run that first, or all of them by the menu: Run, Run All Above Selected Cell."
ADVICE: dict[type[BaseException], str] = {redis.ConnectionError: LOST, redis.TimeoutError: LOST, NameError: UNKNOWN}


def install(shell: Any) -> None:
    """Have this IPython show them, unless it was told already how to show errors."""
    if not shell.custom_exceptions:
        shell.set_custom_exc((LLMStreamError, redis.RedisError, NameError), show)


def show(shell: Any, kind: type[BaseException], error: BaseException, trace: TracebackType, **_: Any) -> None:
    """Show an error briefly, or as ever if that can't be done; `%tb` shows it as ever, too."""
    with suppress(Exception):
        lines = brief(shell, kind, error, trace)
        error._render_traceback_ = lambda: lines  # type: ignore[attr-defined]  # this is what IPython asks for
    try:
        shell.showtraceback((kind, error, trace), running_compiled_code=True)
    except Exception:  # noqa: BLE001 - its text is anybody's code; what is raised here would unregister this function
        shell._showtraceback(kind, "its text can't be shown", [f"{kind.__name__}: its text can't be shown."])
    vars(error).pop("_render_traceback_", None)


def brief(shell: Any, kind: type[BaseException], error: BaseException, trace: TracebackType) -> list[str]:
    """What happened, what to do, and which lines of the learner's cells did it."""
    lines = [f"\x1b[1m{kind.__name__}: {error}\x1b[0m{ADVICE.get(kind, '')}"]
    steps = [(step, shell.compile.format_code_name(step.filename)) for step in traceback.extract_tb(trace)]
    lines += [f"{' '.join(cell)}, line {step.lineno}: {step.line}" for step, cell in steps if cell]
    return [*lines, "%tb shows the whole traceback."]
