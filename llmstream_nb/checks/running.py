"""Runs a check in a thread of its own: what the learner wrote may raise, or never return."""

from __future__ import annotations

import ast
import ctypes
import inspect
import textwrap
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from llmstream_nb.answers.connection import current
from llmstream_nb.checks.case import Case
from llmstream_nb.checks.judging import WrongError
from llmstream_nb.checks.verdict import Verdict, right, wrong
from llmstream_nb.protocol.wire import LLMStreamError

if TYPE_CHECKING:
    import redis

TIMEOUT = 6.0  # seconds that a check waits for the learner's code


class Interrupted(SystemExit):
    """Raised inside the learner's function when its time is up; a thread may end with it silently."""


def check(name: str, mine: Any, examine: Callable[[Case], str], client: redis.Redis | None) -> Verdict:
    """Examine what the learner wrote, `mine`, and say what is wrong; if nothing is, say what `examine` returns."""
    try:
        case = Case(client or current())
    except (LLMStreamError, RedisError, ValueError) as error:
        return Verdict(False, f"this can't be checked now: {error}")
    verdicts: list[Verdict] = []
    work = threading.Thread(target=_examine, args=(name, mine, examine, case, verdicts), daemon=True)
    work.start()
    work.join(TIMEOUT)
    if work.is_alive():
        verdicts.insert(0, wrong(name, f"{case.about}, your function does not return: does its loop end?"))
        _interrupt(work, case)
    with suppress(RedisError):
        case.close()
    return verdicts[0]


def _examine(name: str, mine: Any, examine: Callable[[Case], str], case: Case, verdicts: list[Verdict]) -> None:
    try:
        if any(_untouched(part) for part in (mine if isinstance(mine, tuple) else (mine,))):
            verdicts.append(Verdict(None, "Not started yet: replace the `...`"))
        else:
            verdicts.append(right(name, examine(case)))
    except WrongError as error:
        verdicts.append(wrong(name, str(error)))
    except Interrupted:
        pass
    except (LLMStreamError, RedisError) as error:
        verdicts.append(Verdict(False, f"this can't be checked now: {error}"))
    except BaseException as error:  # noqa: BLE001 - even SystemExit must not pass without a word
        verdicts.append(wrong(name, f"{case.about}, your code raises {type(error).__name__}."))


def _interrupt(work: threading.Thread, case: Case) -> None:
    """End the learner's loop, which else would go on in the kernel until that is restarted."""
    stop = ctypes.pythonapi.PyThreadState_SetAsyncExc
    for _ in range(10):
        if work.is_alive():
            stop(ctypes.c_ulong(work.ident or 0), ctypes.py_object(Interrupted))
            with suppress(RedisError):
                case.add([("a", ";END:a")])  # wakes a read that blocks without a limit
            work.join(0.1)


def _untouched(thing: Any) -> bool:
    """Whether the placeholder `...` is still there, as the value or in a function's body."""
    if thing is ...:
        return True
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    except Exception:  # noqa: BLE001 - no source, or no function at all
        return False
    # A function's annotations may hold `...`.
    body = tree.body if isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)) else [tree]
    return any(isinstance(n, ast.Constant) and n.value is ... for part in body for n in ast.walk(part))
