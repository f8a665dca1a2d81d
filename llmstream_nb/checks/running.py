"""Runs a check in a thread of its own: what the learner wrote may raise, or never return."""

import ast
import ctypes
import inspect
import json
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import update_wrapper
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import redis

from llmstream_nb.answers.connection import current
from llmstream_nb.checks.case import Case
from llmstream_nb.checks.verdict import Verdict, WrongError, right, wrong
from llmstream_nb.protocol.wire import LLMStreamError

HINTS = json.loads(Path(__file__).with_name("hints.json").read_text("utf-8"))  # by the check's name; "*": of any check
TIMEOUT = 6.0  # seconds that a check waits for one call of the learner's code


class Interrupted(SystemExit):
    """Raised inside the learner's function when its time is up; a thread may end with it silently."""


def exercise(examine: Callable[..., str]) -> Callable[..., Verdict]:
    """Make a check of a function that examines what the learner gave, and returns what is right about it.

    That function takes a `Case` and what the learner gave; it raises WrongError where that is wrong. The check takes
    what the learner gave and a `client`, by default the current one. Its verdicts give hints that stand under its name
    in hints.json, by what was wrong.
    """
    own = HINTS[examine.__name__]
    hints = own | HINTS["*"] | own  # its own come first, and instead of those of any check

    def check(*mine: Any, client: redis.Redis | None = None, **more: Any) -> Verdict:
        signature.bind(*mine, **more)  # here a wrong call raises TypeError; in the thread it would be the learner's

        if any(map(_untouched, [*mine, *more.values()])):
            return Verdict(None, "Not started yet: replace the `...`")
        return _run(examine.__name__, lambda case: examine(case, *mine, **more), hints, client)

    whole = inspect.signature(examine)
    shown = list(whole.parameters.values())[1:]  # without the case
    signature = whole.replace(parameters=shown, return_annotation=Verdict)
    update_wrapper(check, examine)
    check.__signature__ = signature  # type: ignore[attr-defined]
    return check


def _run(name: str, judge: Callable[[Case], str], hints: dict[str, list[str]], client: redis.Redis | None) -> Verdict:
    """Judge what the learner wrote, each call within TIMEOUT: what is right, or wrong, with a hint."""
    try:
        case = Case(client or current())
    except (LLMStreamError, redis.RedisError, ValueError) as error:
        return Verdict(False, f"this can't be checked now: {error}")
    verdicts: SimpleQueue[Verdict] = SimpleQueue()

    def work() -> None:
        try:
            verdicts.put(right(name, judge(case)))
        except WrongError as error:
            verdicts.put(wrong(name, str(error), hints))
        except Interrupted:
            pass
        except (LLMStreamError, redis.RedisError) as error:
            verdicts.put(Verdict(False, f"this can't be checked now: {error}"))
        except BaseException as error:  # noqa: BLE001 - even SystemExit must not pass without a word
            verdicts.put(wrong(name, f"{case.about}, your code raises {type(error).__name__}.", hints))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (left := case.called + TIMEOUT - time.monotonic()) > 0:
            with suppress(Empty):
                return verdicts.get(timeout=left)
        return wrong(name, f"{case.about}, your function does not return: does its loop end?", hints)
    finally:  # also where the check itself is interrupted
        _end(thread, case)
        with suppress(redis.RedisError):
            case.close()


def _end(thread: threading.Thread, case: Case) -> None:
    """End the learner's loop, if it still runs: else it would go on in the kernel until that is restarted."""
    stop = ctypes.pythonapi.PyThreadState_SetAsyncExc
    # Without its stream most loops end by an error. An exception from outside may meet a library that holds a lock (so
    # fakeredis), and then the thread waits for that lock for ever.
    with suppress(redis.RedisError):
        case.clear()
    for _ in range(10):
        thread.join(0.1)
        if thread.is_alive():
            stop(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Interrupted))
            with suppress(redis.RedisError):
                case.add([("a", ";END:a")])  # wakes a read that blocks without a limit


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
