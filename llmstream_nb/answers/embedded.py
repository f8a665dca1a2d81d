"""A fakeredis in place of a Redis: inside this process, and for other processes over TCP."""

import argparse
import logging
import os
import threading
from contextlib import suppress
from typing import Any

from fakeredis import FakeRedis, TcpFakeServer
from fakeredis._clients._tcp_server import TCPFakeRequestHandler
from redis.exceptions import ResponseError

VERSION = (7, 0)  # what Debian and Ubuntu ship, so tables look alike on the fake and on a real server

_lock = threading.Lock()
_server: TcpFakeServer | None = None


def server() -> TcpFakeServer:
    """The fakeredis of this process, started once; it listens on a free loopback port for other processes."""
    global _server
    with _lock:
        if _server is None:
            _server = serve(0)
        return _server


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

    def finish(self) -> None:
        """Close what `setup` has opened."""
        with suppress(OSError):
            self.writer.writer.close()
        self._sender.close()
        super().finish()


def serve(port: int) -> TcpFakeServer:
    """Start a fakeredis that listens on 127.0.0.1:`port` (0: any free one) in a daemon thread; return it."""
    made = TcpFakeServer(("127.0.0.1", port), server_version=VERSION)
    made.RequestHandlerClass = Handler
    made.daemon_threads, made.block_on_close = True, False  # else it never stops while a reader is blocked
    threading.Thread(target=made.serve_forever, name="llmstream fakeredis", daemon=True).start()
    return made


def main() -> None:
    """A fakeredis of its own process, for several others: it prints `ready` and serves until it is ended."""
    parser = argparse.ArgumentParser(prog="python -m llmstream_nb.answers.embedded", description=main.__doc__)
    parser.add_argument("--serve", type=int, metavar="PORT", required=True)
    serve(parser.parse_args().serve)
    print("ready", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
