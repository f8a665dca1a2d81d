"""One answer of an OpenAI-compatible endpoint: iterate over its text or its parts, close it from any thread."""

from __future__ import annotations

import asyncio
import queue
import socket
import ssl
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from llmstream_nb.llm.behind import behind, head
from llmstream_nb.llm.chunks import Fault, Piece, Reader, body_fault
from llmstream_nb.llm.endpoint import Disagrees, Endpoint, ModelError
from llmstream_nb.protocol.parts import Refusal

if TYPE_CHECKING:  # importing openai takes half a second and 40 MB, so it waits for the first question
    import httpx2
    import openai

GRACE = 2.0  # seconds after the finish reason, for the usage and [DONE]
AHEAD = 32  # pieces of the body that may wait to be iterated over; then the endpoint has to wait
PIECE = 65_536  # bytes of a body that are read in one turn of the loop
REFUSAL = 100_000, 2.0  # bytes, and seconds to wait for them, of the words that come with a refusal


@cache
def _certificates(trust_env: bool) -> ssl.SSLContext:
    """The authorities to trust, read once: each reading takes 25 ms and 1 MB."""
    import httpx2

    return httpx2.create_ssl_context(trust_env=trust_env)


async def _aside(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call `function` in a daemon thread: asyncio's own threads would hold up the end of the process."""
    outcome: Future[Any] = Future()

    def call() -> None:
        outcome.set_running_or_notify_cancel()
        try:
            outcome.set_result(function(*args, **options))
        except BaseException as problem:  # noqa: BLE001 - handed to whoever waits
            outcome.set_exception(problem)

    threading.Thread(target=call, name="open-completion", daemon=True).start()
    return await asyncio.wrap_future(outcome)


async def _small(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """`pieces` cut small, each in a turn of its own: all requests share the loop, and unpacked, one may be huge."""
    async for piece in pieces:
        for at in range(0, len(piece), PIECE):
            await asyncio.sleep(0)
            yield piece[at : at + PIECE]


class _Refused(Exception):
    """The endpoint answered with a status that is no success."""


class _LoopThread(threading.Thread):
    """The event loop of all requests, in one daemon thread."""

    current: _LoopThread | None = None

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.getaddrinfo = partial(_aside, socket.getaddrinfo)  # type: ignore[method-assign]
        super().__init__(target=self.loop.run_forever, name="completions", daemon=True)
        self.start()

    @classmethod
    def get(cls) -> _LoopThread:
        """The running one; a forked process has none, and starts its own."""
        running = cls.current
        if running is None or not running.is_alive():  # two threads at once may start two, which does no harm
            running = cls.current = cls()
        return running


class _Request:
    """A request in the event loop, which hands over lists of parts, and None when it has ended."""

    def __init__(self, endpoint: Endpoint, request: dict[str, Any], timeout: float, first_timeout: float) -> None:
        self.endpoint, self.request, self.timeout, self.first_timeout = endpoint, request, timeout, first_timeout
        self.reader, self.connection = Reader(endpoint.mask, endpoint.think_tags), None
        self.refused: tuple[int, str, bytearray] | None = None  # status, Retry-After, and how the body begins
        self.error: ModelError | None = endpoint.error("ConnectionDropped", "was asked in a loop that ended: ask again")
        self.came: queue.SimpleQueue[list[Piece] | None] = queue.SimpleQueue()
        self.room = asyncio.Event()
        self.thread = _LoopThread.get()
        self.task = asyncio.run_coroutine_threadsafe(self.run(), self.thread.loop)

    def take(self) -> list[Piece] | None:
        """Wait for what comes next, in the thread that iterates."""
        came = None
        while self.thread.is_alive():
            with suppress(queue.Empty):
                came = self.came.get(timeout=1)
                break
        if not self.room.is_set() and self.came.qsize() < AHEAD:
            self.thread.loop.call_soon_threadsafe(self.room.set)
        return came

    def cancel(self) -> None:
        """End it, in any thread; the connection is closed, and whoever waits in `take` goes on."""
        self.task.cancel()
        self.came.put(None)

    async def run(self) -> None:
        """Ask, and hand over what comes."""
        problem = None
        try:
            async with await _aside(self.client) as client, asyncio.timeout(self.first_timeout) as limit:
                await self.ask(client, limit)
        except Exception as error:  # noqa: BLE001 - whatever it is, the viewer must see it
            problem = error
        finally:
            if self.connection is not None:
                await self.connection.aclose()
        try:
            self.came.put(self.reader.finish(cut=problem is not None))
            self.error = self.fault(problem)
        finally:
            self.came.put(None)

    def client(self) -> openai.AsyncOpenAI:
        """What makes the request. Starts the server behind the endpoint, if there is one to start."""
        import httpx2
        import openai

        parts = urlsplit(self.endpoint.url())
        query = dict(parse_qsl(parts.query))  # as Azure's api-version, which belongs to each request
        hooks: dict[str, list[Callable[..., Any]]] = {"request": [self.watch], "response": [self.check]}
        trust_env = not self.endpoint.loopback
        plain = self.endpoint.loopback and parts.scheme == "http"  # no TLS anywhere on the way
        try:
            verify = False if plain else _certificates(trust_env)
            http = httpx2.AsyncClient(verify=verify, trust_env=trust_env, event_hooks=hooks, follow_redirects=True)
        except (OSError, ValueError, ImportError):
            raise self.endpoint.error("BadSettings", "needs other settings: see SSL_CERT_FILE, HTTPS_PROXY") from None
        return openai.AsyncOpenAI(
            api_key=self.endpoint.key,
            base_url=parts._replace(query="").geturl(),
            default_query=query,
            default_headers={"api-key": self.endpoint.key} if "api-version" in query else None,
            http_client=http,
            timeout=httpx2.Timeout(None, connect=self.timeout),  # the rest is timed by what comes
            max_retries=0,  # whoever watches is to see an error at once; they can ask again
        )

    async def watch(self, request: httpx2.Request) -> None:
        """Keep the connection: httpcore forgets it, open, if it is cancelled during the TLS handshake."""

        async def note(event: str, info: dict[str, Any]) -> None:
            if event == "connection.connect_tcp.complete":
                self.connection = info["return_value"]

        request.extensions["trace"] = note

    async def check(self, response: httpx2.Response) -> None:
        """Raise _Refused for a refusal, with no more of its body than anybody reads.

        Raises ModelError for a redirect to elsewhere: neither the key nor the question is for another host.
        """
        import httpx2

        if response.is_success:
            return
        if not response.has_redirect_location:
            most, patience = REFUSAL
            body = bytearray()
            self.refused = response.status_code, response.headers.get("Retry-After", ""), body
            with suppress(TimeoutError, httpx2.HTTPError):
                async with asyncio.timeout(patience):
                    async for piece in response.aiter_bytes():
                        body += piece[: most - len(body)]
                        if len(body) >= most:
                            break
            raise _Refused
        old, new = response.url, response.url.join(response.headers["Location"])
        upgrade = (old.scheme, new.scheme, new.port) == ("http", "https", None)
        same = old.host == new.host and (upgrade or (old.scheme, old.port) == (new.scheme, new.port))
        if not same or response.status_code not in (307, 308):
            moved = self.endpoint.mask(f"{new.scheme}://{new.netloc.decode()}{new.path}")[:300]
            raise self.endpoint.error("BadAddress", f"has moved to {moved}: set OPENAI_BASE_URL if you trust it")
        unread: Any = response.stream  # httpx would read all of it
        await unread.aclose()
        response.stream = httpx2.ByteStream(b"")

    async def ask(self, client: openai.AsyncOpenAI, limit: asyncio.Timeout) -> None:
        """Make the request, and again if the endpoint refuses what can be left out."""
        create = client.chat.completions.with_streaming_response.create
        while True:
            try:
                async with create(**self.request) as answer:
                    await self.receive(_small(answer.iter_bytes()), limit)
                return
            except _Refused:
                status, _, body = self.refused or (0, "", b"")
                if status not in (400, 422, 500) or not self.reduce(body.decode(errors="replace").lower()):
                    raise
                self.refused = None

    def reduce(self, words: str) -> bool:
        """Leave out what the endpoint refuses in these words; False if there is nothing to leave out."""
        if "stream_options" in words and self.request.pop("stream_options", None):
            return True
        match self.request["messages"]:
            case [{"role": "system", "content": str(part)}, {"role": "user", "content": str(question)}, *rest]:
                if "system" in words and "role" in words:
                    self.request["messages"] = [{"role": "user", "content": f"{part}\n\n{question}"}, *rest]
                    return True
        return False

    async def receive(self, pieces: AsyncIterator[bytes], limit: asyncio.Timeout) -> None:
        """Hand over the parts in `pieces`, no faster than they are taken, as long as the model shows life."""
        reader, clock, ending = self.reader, self.thread.loop.time, False
        async for piece in pieces:
            parts = reader.feed(piece)
            if parts:
                self.came.put(parts)
            if reader.over:
                return
            if self.came.qsize() >= AHEAD:
                self.room.clear()
                if self.came.qsize() >= AHEAD:  # still, now that whoever takes one must see that room is wanted
                    limit.reschedule(None)
                    await self.room.wait()
            ended = reader.reason is not None
            if parts or limit.when() is None or (not ending if ended else reader.alive):
                silence = self.timeout if reader.begun else self.first_timeout
                limit.reschedule(clock() + (GRACE if ended else silence))
            ending = ended

    def fault(self, problem: Exception | None) -> ModelError | None:
        """What to show if it failed, in words that hold no key, now that nothing more is read; None if it ended."""
        import httpx2
        import openai

        reader, error = self.reader, self.endpoint.error
        asked = self.request["messages"], self.request.get("extra_body")
        if reader.failed is not None:
            return self.endpoint.refusal(reader.failed, asked)
        if reader.too_much:
            return error("BadAnswer", f"sent {reader.too_much}: ask in other words, or check its address")
        if reader.done or reader.reason is not None:
            if reader.answered or reader.reason not in (None, "stop"):
                return None
            said = "thought, but answered nothing" if reader.thought else "answered nothing"
            return error("EmptyAnswer", f"{said}: ask again, or in other words")
        if self.refused is not None:
            status, retry_after, body = self.refused
            words = body_fault(body.decode(errors="replace")) or Fault()
            return self.endpoint.refusal(words, asked, status, retry_after)
        match problem.__cause__ if isinstance(problem, openai.APIConnectionError) else problem:
            case ModelError() as told:
                return told
            case TimeoutError() | httpx2.TimeoutException() as late:
                first = isinstance(late, TimeoutError) and not reader.begun
                silence = self.first_timeout if first else self.timeout
                return error("Stalled", f"was silent for {silence:g} s: ask again, or wait")
            case httpx2.TooManyRedirects():
                return error("BadAddress", "sends from one address to the next: check its address")
            case httpx2.RemoteProtocolError() | httpx2.ReadError():
                return error("ConnectionDropped", "dropped the connection: ask again")
            case httpx2.TransportError():
                return error("Unreachable", "can't be reached: see whether it runs, and its address")
            case None if not reader.malformed:
                happened = "sent a web page" if reader.page else "broke off"
                return error("ConnectionDropped", f"{happened} in the middle of its answer: ask again")
        return error("BadAnswer", "sent what is not a chat completion: check its address")


def _words(parts: list[Piece]) -> Iterator[str]:
    """What the parts say to whoever reads text alone."""
    for part in parts:
        if isinstance(part, (str, Refusal)):
            yield part if isinstance(part, str) else part.text


class Completion:
    """An answer as it is written: iterate over it for its deltas, non-empty strings; ModelError if it fails.

    These are its text, or the words of a refusal. With `parts`, they are all that the model sends: strings, which are
    text, Reasoning, Refusal, and ToolCall, each call in one piece.

    `source` and `model` say who writes. `finish_reason` (`stop`, `length`, `content_filter`, …) and `usage`
    (prompt_tokens, completion_tokens, total_tokens, …) are known once the iteration is exhausted. A delta may
    hold one half of a surrogate pair, when the model's tokens cut an emoji in two.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        request: dict[str, Any],
        timeout: float,
        first_timeout: float,
        *,
        parts: bool = False,
    ) -> None:
        self.source, self.model = endpoint.source, endpoint.model
        self.finish_reason: str | None = None
        self.usage: dict[str, float] | None = None
        self._asked, self._kept = request, ""  # the text that it is to go on from
        tools = {"tools", "functions"} & set(request.get("extra_body", ()))
        self._can_go_on = endpoint.goes_on and not tools and request["messages"][-1].get("role") == "user"
        self._begin = partial(_Request, endpoint, timeout=timeout, first_timeout=first_timeout)
        self._request: _Request | None = None
        self._parts = parts
        self._deltas: deque[Piece] = deque()
        self._closed = self._hung_up = False  # hung up: not ended, but closed

    def __iter__(self) -> Iterator[Any]:
        return self._behind() if self._kept else self

    def goes_on(self, text: str) -> bool:
        """Whether its iteration will go on from `text`, which it then doesn't bring: where the endpoint can.

        It does not where tools may be called, since that might be done twice. With a temperature above 0 it does,
        though the two halves may be of two minds. Where the iteration raises Disagrees, the next one begins anew.
        """
        self._kept = text if self._can_go_on else ""
        return bool(self._kept)

    def _whole_request(self) -> dict[str, Any]:
        given = head(self._kept)  # an empty message would spoil it
        more = [{"role": "assistant", "content": given}] if given else []
        return self._asked | {"messages": [*self._asked["messages"], *more]}

    def _behind(self) -> Iterator[Any]:
        try:
            yield from behind(self._kept, iter(partial(next, self), None))
        except Disagrees:
            if self._hung_up:
                return
            if self._request is not None:
                self._request.cancel()
            self._can_go_on, self._kept, self._request, self._closed = False, "", None, False
            self._deltas.clear()
            raise

    def __next__(self) -> Any:
        while not self._closed:
            if self._deltas:
                return self._deltas.popleft()
            if self._request is None:
                self._request = self._begin(request=self._whole_request())
                if self._closed:  # meanwhile, by another thread
                    self._request.cancel()
            came = self._request.take()
            if came is not None:
                self._deltas.extend(came if self._parts else _words(came))
            elif not self._closed:
                self._closed = True
                if self._request.error is not None:  # made in the loop, so that no traceback leads to the key
                    raise self._request.error
                reader = self._request.reader
                reason = reader.reason or "stop"
                self.finish_reason = "refusal" if reader.refused and reason == "stop" else reason
                self.usage = {self._request.endpoint.mask(name): count for name, count in reader.usage.items()} or None
        raise StopIteration

    def close(self) -> None:
        """End the request, from any thread and at any moment; an iteration going on ends without an error.

        The endpoint sees its client leave, and stops. Closing twice, or after the end, does nothing.
        """
        self._closed = self._hung_up = True
        if self._request is not None:
            self._request.cancel()

    def __del__(self) -> None:
        with suppress(AttributeError):  # it was never whole
            self.close()
