"""A source of one's own: whatever a function of (question, topic) gives becomes an iterator over deltas."""

import asyncio
import inspect
import threading
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator
from contextlib import suppress
from typing import Any

from llmstream_nb.protocol.events import flat_numbers
from llmstream_nb.protocol.parts import Yielded, joined, part_of, written
from llmstream_nb.protocol.wire import ORIGIN, Entry

Deltas = Iterable[Yielded | None] | AsyncIterable[Yielded | None] | str
Source = Callable[[str, str | None], Deltas | Awaitable[Deltas]]

NOTHING = object()


class OwnSource:
    """An answer of such a function: iterate over it, in one thread, for its parts; `close` it from any thread.

    The function is called by the first `next`. It may return text, yield it, or do either asynchronously, in an event
    loop that runs for it alone; it may also yield other parts of an answer. Deltas that are None or empty are passed
    over, as a chat completion's chunks have them. With `stream=False` what follows each other of a kind is one delta.
    Iterating raises what the function raises, and TypeError for what is no part of an answer.

    A function with a parameter `prefix` can go on from a text: it is given the text so far, in a first attempt "", and
    yields only what comes behind that. One with a parameter `messages` is given these, or None where there are none.
    """

    def __init__(
        self,
        function: Source,
        question: str,
        topic: str | None,
        *,
        stream: bool = True,
        messages: list[dict[str, Any]] | None = None,
    ) -> None:
        self.source = self.model = getattr(function, "__name__", "own")
        self._function, self._asked, takes = function, (question, topic), _parameters(function)
        self._named = {name: value for name, value in {"prefix": "", "messages": messages}.items() if name in takes}
        self._begun = False
        self._made: Any = None
        self._stream, self._closed = stream, False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None

    @property
    def finish_reason(self) -> Any:
        """Why it ended, where the function returned an object that says so."""
        reason = getattr(self._made, "finish_reason", None)
        return reason if isinstance(reason, str) else None

    @property
    def usage(self) -> Any:
        """What it cost, likewise: a mapping, or pairs of a name and a number."""
        with suppress(Exception):  # it may be anything
            return flat_numbers(dict(self._made.usage)) or None
        return None

    def goes_on(self, text: str) -> bool:
        """Whether its first iteration will go on from `text`; after Disagrees, the next one begins anew."""
        goes_on = bool(text) and "prefix" in self._named and not self._begun
        if "prefix" in self._named:
            self._named["prefix"] = text if goes_on else ""
        return goes_on

    def __iter__(self) -> Iterator[Any]:
        if self._stream:
            return self._deltas()
        whole = joined((*written(delta), 0) for delta in self._deltas())
        return (text if kind == "text" else part_of(Entry(ORIGIN, kind, text, 0)) for kind, text, _ in whole)

    def close(self) -> None:
        """End it, at once: what is awaited is cancelled, what has a `close` of its own is closed, in a thread.

        A generator that runs can't be closed from outside; it ends at its next delta.
        """
        self._closed = True
        if self._loop and self._task:
            with suppress(RuntimeError):  # the loop has ended meanwhile
                self._loop.call_soon_threadsafe(self._task.cancel)
        elif not inspect.isgenerator(self._made) and hasattr(self._made, "close"):
            threading.Thread(target=_quietly, args=[self._made.close], daemon=True).start()

    def _deltas(self) -> Iterator[Yielded]:
        self._begun = True
        self._made = self._function(*self._asked, **self._named)
        awaited = inspect.isawaitable(self._made) or hasattr(self._made, "__aiter__")
        try:
            for delta in self._awaited() if awaited else _each(self._made):
                if self._closed:
                    return
                if isinstance(delta, str):
                    if text := str.__str__(delta):  # a plain one, whatever its class makes of it
                        yield text
                elif delta is not None and written(delta)[1]:  # which raises TypeError for what is no part
                    yield delta
        finally:
            if inspect.isgenerator(self._made):
                _quietly(self._made.close)  # else what it holds is kept for as long as anybody has the answer's handle

    def _awaited(self) -> Iterator[Any]:
        self._loop = asyncio.new_event_loop()
        steps = self._steps()
        try:
            while (delta := self._loop.run_until_complete(self._next(steps))) is not NOTHING:
                yield delta
        except asyncio.CancelledError:
            if not self._closed:
                raise
        finally:
            self._loop.run_until_complete(steps.aclose())  # type: ignore[attr-defined]
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    async def _steps(self) -> AsyncIterator[Any]:
        given = await self._made if inspect.isawaitable(self._made) else self._made
        if hasattr(given, "__aiter__"):
            async for delta in given:
                yield delta
        else:
            for delta in _each(given):
                yield delta

    async def _next(self, steps: AsyncIterator[Any]) -> Any:
        self._task = asyncio.current_task()
        if self._closed:  # before there was this task to cancel
            return NOTHING
        return await anext(steps, NOTHING)


def _parameters(function: Callable[..., Any]) -> Collection[str]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # as of some that are written in C
        return ()


def _quietly(close: Callable[[], object]) -> None:
    with suppress(BaseException):  # the answer has ended, whatever this does
        close()


def _each(given: Any) -> Iterable[Any]:
    if isinstance(given, str):
        return [given]
    if isinstance(given, Iterable):
        return given
    raise TypeError(f"a source returns text, or yields it; this one returned {type(given).__name__}")
