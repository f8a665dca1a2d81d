"""A fakeredis in place of a Redis: inside this process, and for other processes over TCP."""

import hmac
import logging
import os
import threading
from contextlib import suppress
from typing import Any

from fakeredis import FakeRedis, TcpFakeServer
from fakeredis._clients._tcp_server import TCPFakeRequestHandler
from fakeredis._helpers import OK, SimpleError
from redis.exceptions import ResponseError

VERSION = (7, 0)  # what Debian and Ubuntu ship, so tables look alike on the fake and on a real server

_lock = threading.Lock()
_server: TcpFakeServer | None = None
_password = os.urandom(16).hex()  # other users of this machine can reach its port, too


def server() -> TcpFakeServer:
    """The fakeredis of this process, started once; it listens on a free loopback port for other processes."""
    global _server
    with _lock:
        if _server is None:
            _server = serve(_password)
        return _server


def url() -> str:
    """Where other processes reach the fakeredis of this one, with its password."""
    return f"redis://default:{_password}@127.0.0.1:{server().server_address[1]}/0"


class KitFakeRedis(FakeRedis):
    """A client with a repr that is the same at every run."""

    where = "fakeredis in this process"

    def __repr__(self) -> str:
        return f"<Redis: {self.where}>"


def client(settings: dict[str, Any]) -> KitFakeRedis:
    """A client of the fakeredis of this process; `settings` are those of `redis.Redis`."""
    if notice := os.environ.get("LLMSTREAM_NOTICE"):  # Binder says here why there is no better one
        logging.getLogger("llmstream_nb").warning(notice)
    return KitFakeRedis(server=server().fake_server, version=VERSION, **settings)


class Handler(TCPFakeRequestHandler):
    """Answers an error as Redis does: the connection stays open. And at once: Nagle's pause costs 45 ms."""

    disable_nagle_algorithm = True

    def setup(self) -> None:
        """Make an error a reply, and let a large reply wait until the reader takes it."""
        super().setup()
        self._sender = self.connection.dup()  # the other one is non-blocking: what its buffer can't hold would be lost
        self._sender.settimeout(60)
        self.writer.writer = self._sender.makefile("wb")
        client: Any = self.current_client
        read = client.read_response

        def read_response(**options: Any) -> Any:
            try:
                return read(**options)
            except ResponseError as error:
                return error

        client.read_response = read_response
        if password := self.server.fake_server.config.get(b"requirepass"):
            self._lock(client.get_socket(), password)

    def _lock(self, socket: Any, password: bytes) -> None:
        """Refuse all commands until the password came, in AUTH or HELLO."""
        run, admitted = socket._process_command, False

        def process(fields: list[bytes]) -> None:
            nonlocal admitted
            words = [field.upper() for field in fields]
            at = words.index(b"AUTH") if words[:1] in ([b"AUTH"], [b"HELLO"]) and b"AUTH" in words else None
            if at is not None:
                *user, given = fields[at + 1 : at + 3] or [b""]
                if not (user in ([], [b"default"]) and hmac.compare_digest(given, password)):
                    socket.put_response(SimpleError("WRONGPASS invalid username-password pair"))
                    return
                admitted = True
                fields = fields[:at] + fields[at + 3 :]  # what is left of HELLO
            if not fields:
                socket.put_response(OK.value)
            elif admitted:
                run(fields)
            else:
                socket.put_response(SimpleError("NOAUTH Authentication required."))

        socket._process_command = process

    def finish(self) -> None:
        """Close what `setup` has opened."""
        with suppress(OSError):
            self.writer.writer.close()
        self._sender.close()
        super().finish()


def serve(password: str = "") -> TcpFakeServer:
    """Start a fakeredis on a free port of 127.0.0.1, in a daemon thread; return it. "": anybody may use it."""
    made = TcpFakeServer(("127.0.0.1", 0), server_version=VERSION)
    made.RequestHandlerClass = Handler
    made.daemon_threads, made.block_on_close = True, False  # else it never stops while a reader is blocked
    made.fake_server.config[b"requirepass"] = password.encode()  # which in-process clients are not asked for
    threading.Thread(target=made.serve_forever, name="llmstream fakeredis", daemon=True).start()
    return made


if __name__ == "__main__":  # for several other processes: it prints its port and serves until it is ended
    print("Ready at port", serve(os.environ["LLMSTREAM_FAKE_PASSWORD"]).server_address[1], flush=True)
    threading.Event().wait()
