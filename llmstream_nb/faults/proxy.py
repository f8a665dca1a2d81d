"""A loopback TCP proxy between a Redis client and a server, with network faults on cue.

    with Proxy("127.0.0.1", 6379) as proxy:
        client = redis.Redis(port=proxy.port)    # tries again by default; Redis.from_url() does not
        proxy.drop_reply(when=b"XADD")           # the next XADD works, but nobody hears of it
        client.xadd("stream", {"text": "once?"})
        assert client.xlen("stream") == 2        # the client's retry has added it again

A *request* is what a client sends in one go: one command, or a whole pipeline with its MULTI and EXEC. Its
*reply* is all that the server answers to it. The handshake of a new connection (HELLO, AUTH, CLIENT, SELECT)
is no request: faults let it pass, so that `drop_reply(2)` meets a command and its retry.
"""

import contextlib
import re
import select
import socket
import threading
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

import hiredis
from redis import Redis

from llmstream_nb.answers.connection import environment_of

HANDSHAKE = {b"HELLO", b"AUTH", b"CLIENT", b"SELECT"}
QUIET = 0.02  # seconds without a byte after which a whole request has no more to come
PATIENCE = 2.0  # seconds to wait for the rest of half a command, or for the EXEC to a MULTI
INCOMPLETE = object()
_before: dict[str, Any] = {}  # the proxies that `Proxy.before` has made, by the URL of their server


@dataclass(frozen=True)
class Fault:
    """The next request that contains `when` loses its reply."""

    when: bytes  # a regular expression; case doesn't matter


@dataclass(eq=False)
class Link:
    """One client's connection, its twin to the server, and how many of its commands are still unanswered."""

    client: socket.socket
    server: socket.socket | None = None
    unanswered: int = 0
    fault: Fault | None = None
    lost: bytes = b""  # what has come of the reply that is to be lost
    requests: hiredis.Reader = field(default_factory=lambda: hiredis.Reader(notEnoughData=INCOMPLETE))
    replies: hiredis.Reader = field(default_factory=lambda: hiredis.Reader(notEnoughData=INCOMPLETE))

    def close(self) -> None:
        """End both connections; a thread that reads from one of them wakes up."""
        for sock in filter(None, (self.client, self.server)):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


class Proxy(contextlib.AbstractContextManager["Proxy"]):
    """Pass bytes between clients of `url` and the server at `host:port`, until told to misbehave.

    A server that speaks something else than Redis' protocol needs `redis=False`; it has no requests to drop or cut.

    Counters: connections `accepted`, requests and replies `dropped`, `bytes_up` and `bytes_down` passed on to
    the server and to the clients.
    """

    def __init__(self, host: str, port: int, *, redis: bool = True) -> None:
        self.target, self._redis = (host, port), redis
        self.accepted = self.dropped = self.bytes_up = self.bytes_down = 0
        self._ordered = 0  # drops ordered so far: all have happened once `dropped` has caught up
        self._faults: list[Fault] = []
        self._delay = 0.0
        self._blackhole = self._closed = False
        self._links: set[Link] = set()
        self._changed = threading.Condition()  # guards all of the above, and wakes those who wait for a change
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    @classmethod
    def before(cls, server: Redis | str) -> Self:
        """The proxy before the server of this client of the kit's, or of an URL; `connect` reaches it by `url`.

        There is one for each server, until it is closed: a cell that runs again gets the same, healed.
        """
        url = server if isinstance(server, str) else environment_of(server)["REDIS_URL"]  # fakeredis has one too
        proxy = _before.get(url)
        if not proxy or proxy._closed:
            parts = urlsplit(url)
            proxy = _before[url] = cls(parts.hostname or "127.0.0.1", parts.port or 6379, redis=parts.scheme != "http")
            login, at, _ = parts.netloc.rpartition("@")
            proxy.url = parts._replace(netloc=f"{login}{at}127.0.0.1:{proxy.port}").geturl()
        proxy.heal()
        return proxy

    # Faults on cue

    def drop_reply(self, n: int = 1, when: bytes = b"") -> None:
        """Let the next `n` requests that contain `when` reach the server, but lose their replies.

        The server has surely done its work before the connection is cut.
        """
        self._order(n, Fault(when))

    def cut(self) -> None:
        """Close all connections now; new ones work."""
        for link in list(self._links):
            self._end(link)

    def delay(self, seconds: float) -> None:
        """Hold every request back for `seconds`."""
        self._set(_delay=seconds)

    def blackhole(self) -> None:
        """Accept everything and pass nothing on, either way, not even that the other side has gone."""
        self._set(_blackhole=True)

    def heal(self) -> None:
        """Behave again, and forget the drops that have not happened.

        Connections that met the blackhole are cut, and what fell into it is lost.
        """
        if self._blackhole:
            self.cut()
        self._faults.clear()
        self._set(_delay=0.0, _blackhole=False, _ordered=self.dropped)

    def wait_dropped(self, timeout: float = 30.0) -> None:
        """Wait until every drop ordered has happened; raise TimeoutError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.dropped >= self._ordered, timeout):
                missing = self._ordered - self.dropped
                raise TimeoutError(f"{missing} of the drops ordered have not happened within {timeout} s")

    @property
    def connections(self) -> int:
        """How many connections are open now."""
        return len(self._links)

    def close(self) -> None:
        """Close all connections and the port."""
        self._set(_closed=True)
        with contextlib.suppress(OSError):  # wakes accept() on every system
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        self.cut()

    def __exit__(self, *_: object) -> None:
        self.close()

    # How it works: one thread accepts, and each connection has a thread for either direction

    def _accept(self) -> None:
        with self._listener:
            while True:
                link = Link(self._listener.accept()[0])
                with self._changed:
                    if self._closed:
                        return link.close()
                    self.accepted += 1
                    self._links.add(link)
                threading.Thread(target=self._serve, args=(link,), daemon=True).start()

    def _serve(self, link: Link) -> None:
        # a side has gone, here (select says ValueError) or there, or doesn't speak Redis
        with contextlib.suppress(OSError, ValueError, hiredis.ProtocolError):
            if self._passes(link):
                link.server = socket.create_connection(self.target)
                for sock in (link.client, link.server):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._passes(link):  # else it was cut while the other side was not there yet
                    downstream = threading.Thread(target=self._downstream, args=(link, link.server), daemon=True)
                    downstream.start()
                    self._upstream(link, link.server)
                    downstream.join()  # a client that has sent its last word may still wait for the answer
        self._end(link)

    def _upstream(self, link: Link, server: socket.socket) -> None:
        while data := link.client.recv(65536):
            commands = parse(link.requests, data) if self._redis else []
            while self._faults and (more := rest_of_request(link, commands)):
                data += more
                commands += parse(link.requests, more)
            with self._changed:
                self._changed.wait_for(lambda: not self._delay or link not in self._links, self._delay)
            if not self._passes(link):
                return
            with self._changed:
                link.fault = self._take_fault(data, commands)
                link.unanswered += len(commands)
                self.bytes_up += len(data)
            server.sendall(data)
        if self._passes(link):
            server.shutdown(socket.SHUT_WR)

    def _downstream(self, link: Link, server: socket.socket) -> None:
        with contextlib.suppress(OSError, hiredis.ProtocolError):
            while data := server.recv(65536):
                replies = parse(link.replies, data) if self._redis else []
                answers = [reply for reply in replies if not isinstance(reply, hiredis.PushNotification)]
                with self._changed:
                    link.unanswered -= len(answers)
                if not self._passes(link):
                    return
                if not link.fault:
                    self.bytes_down += len(data)
                    link.client.sendall(data)
                    continue
                link.lost += data
                if link.unanswered <= 0:  # the server has done all that it was asked to do
                    self._drop(link)
            self._passes(link)
        self._end(link)

    def _passes(self, link: Link) -> bool:
        """Wait while there is a blackhole; return whether the connection has survived."""
        with self._changed:
            self._changed.wait_for(lambda: not self._blackhole or link not in self._links)
            return link in self._links

    def _take_fault(self, request: bytes, commands: list[list[bytes]]) -> Fault | None:
        if all(name.upper() in HANDSHAKE for name, *_ in commands):
            return None
        hits = (fault for fault in self._faults if re.search(fault.when, request, re.IGNORECASE))
        if fault := next(hits, None):
            self._faults.remove(fault)
        return fault

    def _drop(self, link: Link) -> None:
        with self._changed:
            self.dropped += 1  # before the client can notice
            self._end(link)

    def _end(self, link: Link) -> None:
        with self._changed:
            self._links.discard(link)
            link.close()
            self._changed.notify_all()

    def _order(self, n: int, fault: Fault) -> None:
        with self._changed:
            self._faults += [fault] * n
            self._ordered += n

    def _set(self, **values: Any) -> None:
        with self._changed:
            vars(self).update(values)
            self._changed.notify_all()


def parse(reader: hiredis.Reader, data: bytes) -> list[Any]:
    """Feed `data` to a RESP parser, and get the commands or replies that are complete with it."""
    reader.feed(data)
    return list(iter(reader.gets, INCOMPLETE))


def rest_of_request(link: Link, commands: list[list[bytes]]) -> bytes:
    """Get more of a request of several TCP segments; nothing once it is whole and the client quiet."""
    names = [command[0].upper() for command in commands]
    whole = not link.requests.has_data() and names.count(b"MULTI") == names.count(b"EXEC")
    readable, _, _ = select.select([link.client], [], [], QUIET if whole else PATIENCE)
    return link.client.recv(65536) if readable else b""
