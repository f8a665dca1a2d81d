"""Connections to Redis: the one you name, or a fake one inside this process; and errors that say what to do."""

import os
import re
from inspect import signature
from typing import Any
from urllib.parse import parse_qs, urlencode

import hiredis
import redis
import redis.asyncio as aredis
from redis import Redis  # inside Line, `redis` is its client
from redis.asyncio.retry import Retry as AsyncRetry
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

from llmstream_nb.answers import sentinel
from llmstream_nb.answers.log import Log
from llmstream_nb.extras import needed
from llmstream_nb.protocol.wire import LLMStreamError, Names

log = Log(__name__)
LOST = (RedisError, RedisClusterException, OSError, AttributeError)  # the last: how fakeredis meets a wrong type
# Foreign bytes in the database must not raise, and RESP3 gives other shapes.
REPLIES: dict[str, Any] = {"decode_responses": True, "encoding_errors": "backslashreplace", "protocol": 2}
OLDEST = (6, 2)  # XAUTOCLAIM and XADD … NOMKSTREAM came with Redis 6.2
ENCODED = "in a password, @ : / ? # % are written %40 %3A %2F %3F %23 %25"


class RedisUnusable(LLMStreamError):
    """Redis can't be reached, or can't be used for this."""


_current: redis.Redis | None = None


def connect(url: str | None = None, *, prefix: str | None = None, **options: Any) -> redis.Redis:
    """Connect to Redis, make this the connection that the kit uses where none is given, and return it.

    What comes back is redis-py's client, set so that replies are text, not bytes: `connect().xlen("a-stream")`.

    Args:
        url: `redis://[user:password@]host:port/db`, `rediss://…` for TLS, `unix://…`, or for the primary that
            Sentinels name `redis+sentinel://[user:password@]host:port,host:port/name/db?sentinel_password=…`, or
            `rediss+sentinel://…`; else REDIS_URL; else a fakeredis of this process, which other processes can
            join (`environment_of`).
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
    settings: dict[str, Any] = {"retry": Retry(ExponentialBackoff(cap=0.5, base=0.02), 4)} | options | REPLIES
    if url is None:
        with needed("notebook", "set REDIS_URL, or use the Redis inside Python, which"):
            from llmstream_nb.answers import embedded

        client: redis.Redis = embedded.client(settings)
    else:
        plain = without_protocol(url)
        try:
            if "+sentinel://" in url:
                client = KitRedis.from_pool(sentinel.pool(plain, settings))
            else:
                client = KitRedis.from_url(plain, **settings)
        except ValueError:  # its text may quote a piece of the password
            usual = "redis+sentinel://127.0.0.1:26379/name/0" if "+sentinel" in url else "redis://127.0.0.1:6379/0"
            raise RedisUnusable(f"the URL {masked(url)!r} should look like {usual}; {ENCODED}") from None
        client.where = masked(url)  # type: ignore[attr-defined]
        info = _check_server(client)
        version = info.get("valkey_version") or info.get("redis_version", "")
        client.made = f"{info.get('server_name', 'Redis').capitalize()} {version}".strip()  # type: ignore[attr-defined]
        if info.get("cluster_enabled"):
            try:
                client = KitCluster.from_url(plain, **settings)  # type: ignore[assignment]
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
    """The keys that this client works on; a client that `connect` did not make uses LLMSTREAM_PREFIX.

    Raises RedisUnusable for one whose replies the kit can't read.
    """
    if found := getattr(client, "names", None):
        return found  # type: ignore[no-any-return]
    given = client.get_connection_kwargs()
    if not given.get("decode_responses") or str(given.get("protocol")) == "3":
        raise RedisUnusable(
            "this client's replies are bytes, or RESP3: use connect(), or decode_responses=True, protocol=2"
        )
    return Names(os.environ.get("LLMSTREAM_PREFIX", "").strip() or "llmstream")


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


def without_protocol(url: str) -> str:
    """The URL without what would change the shape of replies: its query goes before all other settings."""
    return re.sub(r"(?<=[?&])(protocol|decode_responses|encoding_errors)=[^&]*&?", "", url)


def masked(url: str) -> str:
    """The URL without login and query, where passwords stand; also of a URL too odd for a parser."""
    scheme, mark, rest = url.partition("://")
    if not mark or not scheme.replace("+", "").isalpha():
        return "…"  # not a URL at all: any part of it may be a password
    _, at, place = rest.partition("?")[0].rpartition("@")
    hosts = place.partition("/")[0].split(",")
    if not all(re.fullmatch(r"([^:\[]*|\[[^]]*\])(:\d{0,5})?", host) for host in hosts):
        return f"{scheme}://…"  # what stands where the port should may be a password: the `@` was forgotten, it seems
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
    beneath = f"{text} {error.__context__}"  # what the lost connection met
    for scheme, words, advice in _TLS:
        if isinstance(error, _GONE) and place.startswith(scheme) and re.search(words, beneath):
            return RedisUnusable(f"{place} {advice}")
    for kind, starts, advice in _ADVICE:
        if isinstance(error, kind) or text.startswith(starts):
            return RedisUnusable(f"{place} {advice}")
    return RedisUnusable(f"{place} answered with an error: {text}")


def is_passing(error: Exception, worked: bool = True) -> bool:
    """Whether trying again may help: after a lost connection, a restart, a full memory, a failover.

    With too many clients only for who had a connection that `worked`: who comes new must be told.
    """
    if said(error).startswith("max number of clients"):
        return worked
    if isinstance(error, (AuthenticationError, NoPermissionError)):
        return False
    lost = (redis.ConnectionError, redis.TimeoutError, RedisClusterException, OSError, OutOfMemoryError, ReadOnlyError)
    moved = (ClusterDownError, AskError)  # MovedError is an AskError
    # UNBLOCKED comes to whoever is waiting when a primary becomes a replica; of a group that is gone it says so too.
    passing = ("MISCONF", "TRYAGAIN", "CLUSTERDOWN", "UNBLOCKED force")
    return isinstance(error, lost + moved) or said(error).startswith(passing)


def said(error: Exception) -> str:
    """What the server said; redis-py puts the command before it in a pipeline, a model's words included."""
    text = str(error).rpartition(" of pipeline caused error: ")[2]
    # How fakeredis meets a key of the wrong type.
    return "WRONGTYPE" if text.endswith(("has no attribute 'irange'", "has no attribute 'group_get'")) else text


_GONE = (redis.ConnectionError, redis.TimeoutError)
_TLS = (
    ("rediss", "mismatch, certificate", "has a certificate for another name: use that, or ssl_check_hostname=false"),
    ("rediss", "CERTIFICATE_VERIFY", "has a certificate that is not trusted here: name its authority by ssl_ca_certs"),
    ("rediss", "No such file|NO_CERT|PEM", "can't be used: a file that the URL names is missing, or no certificate"),
    ("rediss", "handshake|WRONG_VERSION|record layer", "speaks no TLS: is it redis://, or another port?"),
    ("rediss", "SSL|violation of protocol", "broke off TLS: does it want ssl_certfile=… and ssl_keyfile=…?"),
    ("redis:", "closed by server|reset by peer", "can't be reached: it closes the connection. If it wants TLS, use rediss://"),
)  # fmt: skip

# redis-py gives the common error codes classes of their own and strips the code; the rest is told by its text.
_ADVICE: tuple[tuple[Any, tuple[str, ...], str], ...] = (
    ((), ("Authentication required", "NOAUTH", "HELLO must be"), "wants a password: REDIS_URL=redis://:PASSWORD@host:port/0"),
    (AuthenticationError, ("WRONGPASS",), f"refused the user name or password: check REDIS_URL; {ENCODED}"),
    (NoPermissionError, ("NOPERM", "EXEC without"), "does not let this user do that: widen the permissions of its ACL"),
    (OutOfMemoryError, ("OOM ",), "is out of memory: raise its maxmemory, or free some with clear()"),
    (ReadOnlyError, ("READONLY",), "is a read-only replica: point REDIS_URL at its primary"),
    (BusyLoadingError, ("LOADING",), "is still loading its data: try again in a moment"),
    ((), ("MISCONF",), "can't save its data and so refuses writes: look at its disk and its log"),
    ((), ("WRONGTYPE",), "holds another type under a key of this answer: use another id, or delete that key"),
    ((), ("max number of clients",), "has no free connection left: raise its maxclients"),
    ((), ("No master found",), "names no primary that is up: try again, or check its name, and sentinel_password"),
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
        self.worked = False  # it has been connected

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
        kwargs |= REPLIES | {
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
        self._may_connect, self.worked = False, True
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
    shared = {"username", "password", "socket_timeout", "socket_connect_timeout", "guide"}
    given = client.get_connection_kwargs()
    shared |= signature(aredis.SSLConnection).parameters.keys() - {"kwargs"}
    settings = {name: value for name, value in given.items() if name in shared}
    settings |= REPLIES
    url = without_protocol(environment_of(client)["REDIS_URL"])
    if isinstance(client, redis.RedisCluster):
        return aredis.RedisCluster.from_url(url, max_connections=connections, **settings)
    # With the other kind of Retry a connection that failed would go back to the pool as it is.
    settings |= {"max_connections": connections, "timeout": 30, "retry": AsyncRetry(NoBackoff(), 0)}
    if "guide" in given:
        pool = sentinel.async_pool(db=given.get("db", 0), **settings)
    else:
        pool = aredis.BlockingConnectionPool.from_url(url, **settings)
    return aredis.Redis.from_pool(pool)


def _whole_url(client: redis.Redis, given: dict[str, Any]) -> str:
    """The URL with what was said beside it, also of a client that `connect` did not make."""
    url = getattr(client, "url", "")
    if not url:
        if "host" not in given:
            raise RedisUnusable("how to reach the Redis of this client can't be told to others: use connect()")
        tls = issubclass(client.connection_pool.connection_class, redis.SSLConnection)
        host = f"[{given['host']}]" if ":" in given["host"] else given["host"]
        url = f"redis{'s' * tls}://{host}:{given['port']}/0"
    place, _, query = url.partition("?")
    told, wanted = parse_qs(query), {"db"} if "@" in place else {"db", "username", "password"}
    for word, value in given.items():
        said_beside = (word in wanted and value) or (word.startswith("ssl_") and isinstance(value, str))
        if said_beside or (word, value) == ("ssl_check_hostname", False):
            told.setdefault(word, [value])
    return f"{place}?{urlencode(told, doseq=True)}" if told else url


def environment_of(client: redis.Redis) -> dict[str, str]:
    """What another process needs in its environment to work on the same answers.

    The URL may hold a password: hand it to a child process, don't print it.
    """
    given = client.get_connection_kwargs()
    if "server" not in given:
        return {"REDIS_URL": _whole_url(client, given), "LLMSTREAM_PREFIX": names_of(client).prefix}
    from llmstream_nb.answers import embedded

    if given["server"] is not embedded.server().fake_server:
        raise RedisUnusable("nobody else can join a fakeredis of your own: use connect()")
    url = embedded.url()
    return {"REDIS_URL": url, "LLMSTREAM_PREFIX": names_of(client).prefix}
