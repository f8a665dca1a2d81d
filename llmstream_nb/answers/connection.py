"""Connections to Redis: the one you name, or a fake one inside this process; and errors that say what to do."""

import os
from typing import Any

import hiredis
import redis
import redis.asyncio as aredis
from redis import Redis  # inside Line, `redis` is its client
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import (
    AskError,
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    InvalidResponse,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
)
from redis.retry import Retry

from llmstream_nb.answers.log import Log
from llmstream_nb.extras import needed
from llmstream_nb.protocol.wire import LLMStreamError, Names

log = Log(__name__)
LOST = (RedisError, RedisClusterException, OSError, AttributeError)  # the last: how fakeredis meets a wrong type
OLDEST = (6, 2)  # XAUTOCLAIM and XADD … NOMKSTREAM came with Redis 6.2


class RedisUnusable(LLMStreamError):
    """Redis can't be reached, or can't be used for this."""


_current: redis.Redis | None = None


def connect(url: str | None = None, *, prefix: str | None = None, **options: Any) -> redis.Redis:
    """Connect to Redis, make this the connection that the kit uses where none is given, and return it.

    What comes back is redis-py's client, set so that replies are text, not bytes: `connect().xlen("a-stream")`.

    Args:
        url: `redis://[user:password@]host:port/db`, `rediss://…` for TLS, `unix://…`; else REDIS_URL;
            else a fakeredis of this process, which other processes can join (`environment_of`).
        prefix: first part of every key; else LLMSTREAM_PREFIX, else `llmstream`.
        options: passed on to `redis.Redis`, e.g. `socket_timeout` in seconds.

    Raises:
        ValueError: the prefix is empty, or holds white space, braces or one of `*?[]`.
        RedisUnusable: the URL is malformed, nobody answers, the password is wrong, the server is older than
            Redis 6.2 or a read-only replica. The message never holds the password.
        MissingExtra: there is no URL, and fakeredis is not installed.
    """
    global _current
    url = url or os.environ.get("REDIS_URL", "").strip() or None
    names = Names(prefix or os.environ.get("LLMSTREAM_PREFIX", "").strip() or "llmstream")
    settings: dict[str, Any] = {
        "decode_responses": True,
        "encoding_errors": "backslashreplace",  # foreign bytes in the database must not raise
        "protocol": 2,
        "retry": Retry(ExponentialBackoff(cap=0.5, base=0.02), 4),
    } | options
    if url is None:
        with needed("notebook", "set REDIS_URL, or use the Redis inside Python, which"):
            from llmstream_nb.answers import embedded

        client: redis.Redis = embedded.client(settings)
    else:
        try:
            client = KitRedis.from_url(url, **settings)
        except ValueError:  # its text may quote a piece of the password
            raise RedisUnusable(f"the URL {masked(url)!r} should look like redis://127.0.0.1:6379/0") from None
        client.where = masked(url)  # type: ignore[attr-defined]
        info = _check_server(client)
        version = info.get("valkey_version") or info.get("redis_version", "")
        client.made = f"{info.get('server_name', 'Redis').capitalize()} {version}".strip()  # type: ignore[attr-defined]
        if info.get("cluster_enabled"):
            try:
                client = KitCluster.from_url(url, **settings)  # type: ignore[assignment]
            except (RedisError, RedisClusterException, OSError) as error:
                raise RedisUnusable(f"{masked(url)} is of a cluster that can't be used now: {said(error)}") from None
            client.where = f"cluster at {masked(url)}"  # type: ignore[attr-defined]
        client.url = url  # type: ignore[attr-defined]
    client.names = names  # type: ignore[attr-defined]
    _current = client
    return client


def current() -> redis.Redis:
    """The connection of the last `connect()`; the first call connects."""
    return _current or connect()


def names_of(client: redis.Redis) -> Names:
    """The keys that this client works on; a client that `connect` did not make uses LLMSTREAM_PREFIX."""
    return getattr(client, "names", None) or Names(os.environ.get("LLMSTREAM_PREFIX", "").strip() or "llmstream")


class _Named:
    """A client that says which server it talks to, in a repr that is the same at every run."""

    where, made = "", "Redis"

    def __repr__(self) -> str:
        return f"<{self.made}: {self.where}>"


class KitRedis(_Named, redis.Redis):
    """redis-py's client with that repr."""


class KitCluster(_Named, redis.RedisCluster):
    """redis-py's client for a Redis Cluster with that repr; its errors are those of other clients."""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """As redis-py does, whose RedisClusterException is no RedisError."""
        try:
            return super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        except RedisClusterException as error:
            raise redis.ConnectionError(str(error)) from None


def masked(url: str) -> str:
    """The URL without login and query, where passwords stand; also of a URL too odd for a parser."""
    scheme, mark, rest = url.partition("://")
    if not mark or not scheme.isalpha():
        return "…"  # not a URL at all: any part of it may be a password
    _, at, place = rest.partition("?")[0].rpartition("@")
    if place.count(":") > 1 and "[" not in place:
        return f"{scheme}://…"  # the `@` was forgotten, it seems
    return f"{scheme}://{'***@' if at else ''}{place}"


def _check_server(client: redis.Redis) -> dict[str, Any]:
    """Ask the server once whether it answers, how old it is and whether it takes writes; without retries."""
    line = Line(client)
    try:
        line.redis.ping()
        info: Any = line.redis.info()
    except NoPermissionError:
        return {}  # an ACL user limited to its keys can't ask; the first write will tell
    except (RedisError, OSError, ValueError, TypeError) as error:  # the last two: what a URL's odd host or query brings
        if "unknown command" in str(error).lower():
            return {"server_name": "fakeredis"}  # over TCP, where it has no INFO
        raise unusable(error, client) from None
    finally:
        line.close()
    version = str(info.get("redis_version", "0"))
    if tuple(int(n) for n in version.split(".")[:2] if n.isdigit()) < OLDEST:
        raise RedisUnusable(f"{where(client)} is Redis {version}: the kit needs 6.2 or newer, or Valkey")
    if info.get("role") == "slave" and info.get("slave_read_only", 1):
        raise RedisUnusable(f"{where(client)} is a read-only replica: point REDIS_URL at its primary")
    return dict(info)


# ------------------------------------------------------------------------------------------------ errors


def where(client: redis.Redis) -> str:
    """The server's address, fit to show."""
    usual = {"host": "localhost", "port": 6379}
    return getattr(client, "where", "") or "{host}:{port}".format_map(usual | client.connection_pool.connection_kwargs)


def unusable(error: Exception, client: redis.Redis) -> RedisUnusable:
    """Say in one line what a Redis error means here and what to do about it; never with a password."""
    text, place = said(error), where(client)
    for kind, words, advice in _ADVICE:
        if isinstance(error, kind) or text.startswith(words):
            return RedisUnusable(f"{place} {advice}")
    return RedisUnusable(f"{place} answered with an error: {text}")


def is_passing(error: Exception) -> bool:
    """Whether trying again may help: after a lost connection, a restart, a full memory, a failover."""
    if isinstance(error, (AuthenticationError, NoPermissionError)):
        return False
    lost = (redis.ConnectionError, redis.TimeoutError, RedisClusterException, OSError, OutOfMemoryError, ReadOnlyError)
    moved = (ClusterDownError, AskError)  # MovedError is an AskError
    return isinstance(error, lost + moved) or said(error).startswith(("MISCONF", "TRYAGAIN", "CLUSTERDOWN"))


def said(error: Exception) -> str:
    """What the server said; redis-py puts the command before it in a pipeline, a model's words included."""
    text = str(error).rpartition(" of pipeline caused error: ")[2]
    # How fakeredis meets a key of the wrong type.
    return "WRONGTYPE" if text.endswith(("has no attribute 'irange'", "has no attribute 'group_get'")) else text


# redis-py gives the common error codes classes of their own and strips the code; the rest is told by its text.
_ADVICE: tuple[tuple[Any, tuple[str, ...], str], ...] = (
    ((), ("Authentication required", "NOAUTH", "HELLO must be"), "wants a password: REDIS_URL=redis://:PASSWORD@host:port/0"),
    (AuthenticationError, ("WRONGPASS",), "refused the user name or password: check REDIS_URL"),
    (NoPermissionError, ("NOPERM",), "does not let this user do that: widen the permissions of its ACL"),
    (OutOfMemoryError, ("OOM ",), "is out of memory: raise its maxmemory, or free some with clear()"),
    (ReadOnlyError, ("READONLY",), "is a read-only replica: point REDIS_URL at its primary"),
    (BusyLoadingError, ("LOADING",), "is still loading its data: try again in a moment"),
    ((), ("MISCONF",), "can't save its data and so refuses writes: look at its disk and its log"),
    ((), ("WRONGTYPE",), "holds another type under a key of this answer: use another id, or delete that key"),
    ((), ("max number of clients",), "has no free connection left: raise its maxclients"),
    (redis.TimeoutError, (), "does not answer in time: is the address right, and the network up?"),
    ((redis.ConnectionError, RedisClusterException, UnicodeError), (),
     "can't be reached: start a Redis there, or unset REDIS_URL to use the one inside Python"),
    (InvalidResponse, (), "is no Redis: what listens there speaks another protocol"),
    ((TypeError, ValueError), (), "can't be reached with this URL: it should look like redis://127.0.0.1:6379/0"),
)  # fmt: skip


# ---------------------------------------------------------------------------------- a connection of one's own


def milliseconds(seconds: float) -> int:
    """A time span as PX and PEXPIRE take it: at least 1."""
    return max(1, int(seconds * 1000))


class Packer:
    """Makes bytes of a command as redis-py does, but without a look at each argument, which costs most of a batch."""

    def pack(self, name: str, *args: Any) -> list[bytes]:
        """The command; a name of two words, as `XINFO STREAM`, is two arguments. Raises TypeError for other types."""
        return [hiredis.pack_command((*name.split(), *args))]


class Line:
    """One connection that never reconnects unasked.

    redis-py's clients and pools reconnect silently and send again; after a restart from older data that would
    leave a hole in a stream, and nobody would know. Here every loss surfaces as an error, and only `reopen`
    allows the next connection.

    On a Redis Cluster it leads to the node that holds `key`, and so to all keys with the same hash tag. A line
    without a key is the cluster's own client there, which finds the node for each command.
    """

    def __init__(self, client: redis.Redis, key: str | None = None) -> None:
        self._client, self._key = client, key
        self._redis: redis.Redis | None = None
        self._may_connect = True
        self._again = False

    @property
    def redis(self) -> redis.Redis:
        """The client of this connection."""
        if self._redis is None:
            client: Any = self._client
            if isinstance(client, redis.RedisCluster):
                if self._key is None:
                    return self._client
                try:
                    if self._again:
                        client.nodes_manager.initialize()  # another node may hold the key by now
                    client = client.get_redis_connection(client.get_node_from_key(self._key))
                except RedisClusterException as error:
                    raise redis.ConnectionError(str(error)) from None
            self._redis = self._connect(client.connection_pool)
        return self._redis

    def _connect(self, pool: Any) -> Redis:
        kwargs = {k: v for k, v in pool.connection_kwargs.items() if not k.startswith(("maint_", "orig_", "himport_"))}
        kwargs |= {
            "decode_responses": True,
            "encoding_errors": "backslashreplace",
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
            "redis_connect_func": self._on_connect,
            "command_packer": Packer(),
        }
        own = redis.ConnectionPool(connection_class=pool.connection_class, max_connections=1, **kwargs)
        made = redis.Redis(connection_pool=own)
        made.names = names_of(self._client)  # type: ignore[attr-defined]
        return made

    def _on_connect(self, connection: Any) -> None:
        if not self._may_connect:
            raise redis.ConnectionError("the connection was lost")
        connection.on_connect()
        self._may_connect = False
        if self._again:
            log.info("%s: connected to Redis again", self._key)

    def reopen(self) -> None:
        """Drop the connection; the next command may open a new one."""
        if not self._may_connect:
            log.info("%s: lost the connection to Redis", self._key)
        self.close()
        self._may_connect = self._again = True

    def close(self) -> None:
        """Give the connection back to the system."""
        if self._redis:
            self._redis.connection_pool.disconnect()
            if isinstance(self._client, redis.RedisCluster):
                self._redis = None


def async_client(client: redis.Redis, connections: int) -> Any:
    """A redis.asyncio client of the server that `client` talks to, with at most so many connections; no retries.

    Every loss surfaces as an error, so that a reader knows when it has to wait before it declares anyone dead.
    """
    shared = {"username", "password", "socket_timeout", "socket_connect_timeout"}
    given = client.get_connection_kwargs()
    settings = {name: value for name, value in given.items() if name.startswith("ssl_") or name in shared}
    settings |= {"decode_responses": True, "encoding_errors": "backslashreplace", "protocol": 2}
    url = environment_of(client)["REDIS_URL"]
    if isinstance(client, redis.RedisCluster):
        return aredis.RedisCluster.from_url(url, max_connections=connections, **settings)
    pool = aredis.BlockingConnectionPool.from_url(
        url, max_connections=connections, timeout=30, retry=Retry(NoBackoff(), 0), **settings
    )
    return aredis.Redis.from_pool(pool)


def environment_of(client: redis.Redis) -> dict[str, str]:
    """What another process needs in its environment to work on the same answers.

    The URL may hold a password: hand it to a child process, don't print it.
    """
    url = getattr(client, "url", "") or os.environ.get("REDIS_URL", "")
    if isinstance(client, redis.Redis) and "server" in client.connection_pool.connection_kwargs:
        from llmstream_nb.answers import embedded

        url = embedded.url()
    return {"REDIS_URL": url, "LLMSTREAM_PREFIX": names_of(client).prefix}
