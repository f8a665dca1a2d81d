"""Connections that Redis Sentinel leads to the current primary, and that leave it once another one is named."""

import asyncio
import time
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qsl, urlencode

import redis
import redis.asyncio as aredis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.retry import Retry
from redis.sentinel import Sentinel

PAUSE = 0.25  # seconds between two questions to the Sentinels, for all connections of a client together
TIMEOUT = 0.5  # seconds that a Sentinel has for its answer
PORT = 26379  # where Sentinels usually listen


def pool(url: str, settings: dict[str, Any]) -> redis.ConnectionPool:
    """Connections to the primary of `redis+sentinel://[user:password@]host:port,host:port/name/db?…`.

    With `rediss+sentinel` it and the Sentinels are spoken to by TLS. Raises ValueError for a malformed URL.
    """
    scheme, _, rest = url.partition("+sentinel://")
    rest, _, query = rest.partition("?")
    login, at, rest = rest.rpartition("@")
    nodes, name, db = (*rest.split("/"), "", "")[:3]
    asked = dict(parse_qsl(query))
    own: dict[str, Any] = {word: asked.pop(f"sentinel_{word}", None) for word in ("username", "password")}
    settings = settings | dict(parse_url(f"{scheme}://{login}{at}host/{db}?{urlencode(asked)}"))
    tls = settings.pop("connection_class", None) is not None
    if tls:
        own |= {"ssl": True} | {word: value for word, value in settings.items() if word.startswith("ssl_")}
    kind: Any = _SSLConnection if tls else _Connection
    return redis.ConnectionPool(kind, **settings, guide=Guide(nodes, name, own))


def async_pool(guide: "Guide", **settings: Any) -> Any:
    """Connections to the same primary for asyncio."""
    kind = _AsyncSSLConnection if guide.tls else _AsyncConnection
    return aredis.BlockingConnectionPool(connection_class=kind, guide=guide, **settings)


class Guide(Sentinel):
    """Sentinels that are asked who is the primary of this name; `nodes` is `host:port,host:port`."""

    def __init__(self, nodes: str, name: str, own: dict[str, Any]) -> None:
        if not (nodes and name):
            raise ValueError("no Sentinels, or no name")
        own |= {"socket_timeout": TIMEOUT, "socket_connect_timeout": TIMEOUT, "retry": Retry(NoBackoff(), 0)}
        found = [parse_url(f"redis://{node}") for node in nodes.split(",")]
        places = [(node["host"], node.get("port", PORT)) for node in found]
        super().__init__(places, sentinel_kwargs=own | {"decode_responses": True})  # type: ignore[no-untyped-call]
        self._name, self.tls = name, "ssl" in own
        self._address: Any = None  # the primary's, as far as is known
        self._ask_at = 0.0  # monotonic time

    def primary(self) -> Any:
        """Ask for its host and port; raises MasterNotFoundError, a ConnectionError, while it is down."""
        began = time.monotonic()
        self._ask_at = began + PAUSE  # for other threads
        listed = self.discover_master(self._name)  # type: ignore[no-untyped-call]
        # While the Sentinels replace it, this tells it earlier than their list does.
        self._address = self.sentinels[0].sentinel_get_master_addr_by_name(self._name) or listed
        now = time.monotonic()
        self._ask_at = now + PAUSE + 4 * (now - began)  # Sentinels that take long must not hold up everybody
        return self._address

    def is_due(self) -> bool:
        """Whether it is time to ask again."""
        return time.monotonic() >= self._ask_at

    def check(self, connection: Any) -> None:
        """Raise ConnectionError where a connection leads to another server.

        When Sentinels hand over on demand, the old primary takes writes for some ten seconds more: all are lost.
        """
        if self._address != (connection.host, connection.port):
            raise redis.ConnectionError("the Sentinels name another primary")


class _Guided:
    """A connection that asks its guide at each connecting, and now and then before a command."""

    def __init__(self, *, guide: Guide, **options: Any) -> None:
        self.guide = guide
        super().__init__(**options)


class _Led(_Guided):
    def _connect(self: Any) -> Any:
        self.host, self.port = self.guide.primary()
        return super()._connect()  # type: ignore[misc]

    def check_health(self: Any) -> None:
        if self.guide.is_due():
            with suppress(redis.RedisError):  # nobody knows better: it stays
                self.guide.primary()
        self.guide.check(self)
        super().check_health()  # type: ignore[misc]


class _AsyncLed(_Guided):
    async def _connect(self: Any) -> Any:
        self.host, self.port = await asyncio.to_thread(self.guide.primary)
        return await super()._connect()  # type: ignore[misc]

    async def check_health(self: Any) -> None:
        if self.guide.is_due():
            with suppress(redis.RedisError):
                await asyncio.to_thread(self.guide.primary)
        self.guide.check(self)
        await super().check_health()  # type: ignore[misc]


class _Connection(_Led, redis.Connection):
    pass


class _SSLConnection(_Led, redis.SSLConnection):
    pass


class _AsyncConnection(_AsyncLed, aredis.Connection):
    pass


class _AsyncSSLConnection(_AsyncLed, aredis.SSLConnection):
    pass
