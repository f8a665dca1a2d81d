"""A source of one's own: whatever a function of (question, topic) gives becomes an iterator over deltas."""

import asyncio
import inspect
import threading
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from llmstream_nb.protocol.events import flat_numbers
from llmstream_nb.protocol.parts import written

Deltas = Iterable[str | None] | AsyncIterable[str | None] | str
Source = Callable[[str, str | None], Deltas | Awaitable[Deltas]]

NOTHING = object()


class OwnSource:
    """An answer of such a function: iterate over it, in one thread, for deltas; `close` it from any thread.

    The function is called by the first `next`. It may return text, yield it, or do either asynchronously, in an event
    loop that runs for it alone. Deltas that are None or empty are passed over, as a chat completion's chunks have
    them. With `stream=False` all of the text is one delta. Iterating raises what the function raises, and TypeError
    for what is no text.
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
        self._function, self._asked, self._messages = function, (question, topic), messages
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

    def __iter__(self) -> Iterator[str]:
        return self._deltas() if self._stream else iter(["".join(self._deltas())])

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

    def _deltas(self) -> Iterator[str]:
        self._made = self._function(*self._asked)
        awaited = inspect.isawaitable(self._made) or hasattr(self._made, "__aiter__")
        for delta in self._awaited() if awaited else _each(self._made):
            if self._closed:
                return
            if isinstance(delta, str):
                if text := str.__str__(delta):  # a plain one, whatever its class makes of it
                    yield text
            elif delta is not None:
                written(delta)  # raises TypeError for what is none
                yield delta

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


def _quietly(close: Callable[[], object]) -> None:
    with suppress(BaseException):  # the answer has ended, whatever this does
        close()


def _each(given: Any) -> Iterable[Any]:
    if isinstance(given, str):
        return [given]
    if isinstance(given, Iterable):
        return given
    raise TypeError(f"a source returns text, or yields it; this one returned {type(given).__name__}")
