"""A stream of a check's own, and calls of the learner's function on it."""

import inspect
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import redis

from llmstream_nb.answers.connection import names_of
from llmstream_nb.checks.verdict import WrongError, require, show

LIFETIME = 300  # seconds after which Redis forgets the keys of a check whose kernel was killed


class BrokenModelError(Exception):
    """What a check's model raises when it breaks off."""


class Case:
    """A stream of the check's own, and calls of the learner's function on it."""

    def __init__(self, client: redis.Redis) -> None:
        self.client: Any = client  # redis-py's replies are typed as those of its asynchronous client too
        self.stream = f"{names_of(client).prefix}:check:{secrets.token_hex(6)}"
        self.about, self.called = "here", time.monotonic()  # what the learner's function is busy with, since when
        self._result: Any = None  # of the last call
        self._others: set[str] = set()
        self.closed = threading.Event()
        self._writer = threading.Thread()

    def each(self, *cases: Any) -> Iterator[Any]:
        """One case after another, each with nothing left of the one before."""
        for case in cases:
            self.clear()
            yield case

    # ------------------------------------------------------------------------------- the learner's function

    def call(self, function: Any, about: str, *args: Any) -> Any:
        """Call the learner's function; what it raises becomes a sentence, except for a model that breaks off."""
        self.about, self.called = about, time.monotonic()
        require(callable(function), f"give the function itself, without calling it; this is {show(function)}.")
        try:
            self._result = function(*args)
        except BrokenModelError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever the learner's code raises
            said = show(error, lambda error: str(error).replace(self.stream, "…"))  # its key differs at every check
            raise WrongError(f"{about}, your function raises {type(error).__name__}: {said}") from None
        finally:  # let expire what the learner's function may have written
            with suppress(redis.RedisError):
                for key in (self.stream, *self._others):
                    self.client.expire(key, LIFETIME)
        if inspect.iscoroutine(self._result):
            self._result.close()  # else Python warns that nobody awaited it
        if inspect.iscoroutine(self._result) or inspect.isasyncgen(self._result):
            raise WrongError("your function is asynchronous: write `def`, not `async def`.")
        return self._result

    def breaks(self, function: Any, about: str, *args: Any) -> bool:
        """Call the learner's function; whether it lets a `BrokenModelError` pass."""
        with suppress(BrokenModelError):
            self.call(function, about, *args)
            return False
        return True

    @property
    def got(self) -> str:
        """What the last call returned, as a sentence that goes on."""
        return f"{self.about}, your function returns {show(self._result)}"

    def require(self, condition: bool, otherwise: str) -> None:
        """Go on if this is so; else the check ends with this sentence, which says what the learner's function does."""
        require(condition, f"{self.about}, your function {otherwise}")

    def require_form(self, what: str, form: str, kind: type[Iterable[Any]] = str, of: type = object) -> None:
        """Require that the last call returned `what`: something of this kind, each item in it of that one."""
        require(self._result is not None, f"your function returns None: return {what}.")
        fits = isinstance(self._result, kind) and all(isinstance(item, of) for item in self._result)
        require(fits, f"{self.got}: return {form}.")

    def require_result(self, right: Any) -> None:
        """Require that the last call returned this."""
        require(isinstance(self._result, type(right)) and self._result == right, f"{self.got}, not {show(right)}.")

    # ------------------------------------------------------------------------------------------- the stream

    def other(self, name: str) -> str:
        """One more key of the check's own."""
        key = f"{self.stream}:{name}"
        self._others.add(key)
        return key

    def entries(self) -> list[tuple[str, dict[str, str]]]:
        """What lies in the stream."""
        return list(self.client.xrange(self.stream))

    def groups(self) -> dict[str, Any]:
        """The stream's groups, by name."""
        return {group["name"]: group for group in self.client.xinfo_groups(self.stream)}

    def put(self, entries: Iterable[tuple[str, dict[str, str]]], stream: str = "") -> str:
        """Add entries of (id, fields) at once; return the last one's ID, or 0-0 without one."""
        with self.client.pipeline() as pipe:
            for entry_id, fields in entries:
                pipe.xadd(stream or self.stream, fields, id=entry_id)
            *ids, _ = pipe.expire(stream or self.stream, LIFETIME).execute()
            return ids[-1] if ids else "0-0"

    def add(self, entries: list[tuple[str, str]]) -> str:
        """Add entries of (question id, text) at once, as notebooks 02 and 03 write them; return the last one's ID."""
        return self.put(("*", {"questionId": question_id, "chunkOutput": text}) for question_id, text in entries)

    def write(self, entries: list[tuple[str, str, str]], stream: str = "") -> None:
        """Add entries of (id, kind, text) at once, as an answer of the kit has them."""
        self.put(((entry_id, {"kind": kind, "text": text, "ms": "0"}) for entry_id, kind, text in entries), stream)

    def trickle(self, *bursts: Any, add: Callable[[Any], object]) -> None:
        """Add these entries from another thread, with pauses."""

        def write() -> None:
            for burst in bursts:
                if not self.closed.wait(0.1):
                    add(burst)

        self._writer = threading.Thread(target=write, name="llmstream check", daemon=True)
        self._writer.start()

    def clear(self) -> None:
        """Delete the stream, and what else was used."""
        self.client.delete(self.stream, *self._others)

    def close(self) -> None:
        """Stop writing, and leave nothing behind."""
        self.closed.set()
        if self._writer.ident:
            self._writer.join()
        self.clear()


class Noting:
    """A Redis client that notes what the learner's function reads."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self.calls: list[tuple[Any, list[tuple[Any, str]]]] = []  # first argument, and the key and ID of each entry
        self.blocks = False  # whether a read waited

    @property
    def again(self) -> bool:
        """Whether XREAD gave an entry more than once."""
        got = [entry for streams, entries in self.calls if isinstance(streams, dict) for entry in entries]
        return len(got) > len(set(got))

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if name not in ("xread", "xrange", "xrevrange"):
            return method

        def call(*args: Any, **options: Any) -> Any:
            first = args[0] if args else options.get("streams")
            first = dict(first) if isinstance(first, dict) else first  # which the loop goes on changing
            self.blocks = self.blocks or options.get("block") is not None
            reply = method(*args, **options)
            streams = reply if name == "xread" else [(first, reply)]
            self.calls.append((first, [(key, entry_id) for key, entries in streams for entry_id, _ in entries]))
            return reply

        return call
