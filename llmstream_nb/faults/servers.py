"""Real redis-server and valkey-server processes for tests: kill, pause, restart with or without data."""

import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import redis

PROGRAMS = ("redis-server", "valkey-server")
FOLDER = "llmstream-server-"  # how the name of a server's temporary folder begins
START_TIMEOUT = 30.0  # seconds
DEFAULTS = {"appendonly": "yes", "appendfsync": "everysec", "save": '""', "auto-aof-rewrite-percentage": 0}


def available() -> list[str]:
    """Name the server programs that lie on PATH."""
    return [program for program in PROGRAMS if shutil.which(program)]


class RedisServer(AbstractContextManager["RedisServer"]):
    """A server process on a free port of 127.0.0.1, with a temporary folder of its own.

    `options` are those of redis.conf, with underscores for hyphens: `maxmemory="2mb"`,
    `requirepass="secret"`, `replicaof="127.0.0.1 6380"`. Unless told otherwise it keeps an append-only file,
    so what a client has got a reply to survives kill(). Change `options` between kill() and start() to come
    back differently.
    """

    READY = "Ready to accept connections"  # in its own words: whoever else has the port is not taken for it

    def __init__(self, program: str = "redis-server", **options: str | int) -> None:
        self.program = program
        self.options = DEFAULTS | {name.replace("_", "-"): value for name, value in options.items()}
        self.folder = Path(tempfile.mkdtemp(prefix=FOLDER))
        self.port = 0
        self.data = self.folder / "data"
        self._log = self.folder / "log.txt"
        # In a session of its own, so that Ctrl-C in a terminal does not end it first.
        watchdog = [sys.executable, "-I", "-S", "-X", "utf8", "-c", WATCHDOG, str(self.folder)]
        self._watchdog = subprocess.Popen(watchdog, stdin=subprocess.PIPE, start_new_session=True)
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.start()
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        """The server's address, with its password."""
        password = str(self.options.get("requirepass", ""))
        return f"redis://{':' + quote(password, safe='') + '@' if password else ''}127.0.0.1:{self.port}/0"

    def client(self, **options: Any) -> redis.Redis:
        """Make a client that returns str."""
        return redis.Redis.from_url(self.url, **{"decode_responses": True} | options)

    def start(self) -> None:
        """Start on the same port with the data of the last time; return when it has loaded them, and serves.

        Raises RuntimeError with the server's log if it does not start.
        """
        if self._process:
            raise RuntimeError(f"{self.program} on port {self.port} runs already: kill() it first")
        before = self.port
        for attempts_left in reversed(range(1 if before else 5)):
            self.port = before or free_port()
            (self.folder / f"port-{self.port}").touch()
            try:
                self._launch()
                return
            except RuntimeError:
                if not attempts_left or "in use" not in self._log.read_text(errors="replace"):
                    raise

    def kill(self) -> None:
        """End the process at once, as a crash does (SIGKILL; TerminateProcess on Windows)."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None
            (self.folder / "pid").unlink(missing_ok=True)

    def wipe(self) -> None:
        """Kill the server, and let it come back empty."""
        self.kill()
        shutil.rmtree(self.data, ignore_errors=True)
        self.start()

    def pause(self) -> None:
        """Freeze the process: its port still accepts connections, nothing answers."""
        self._ps().suspend()

    def resume(self) -> None:
        """Let a paused process go on."""
        self._ps().resume()

    def stop(self) -> None:
        """End the server and remove its folder."""
        self.kill()
        self._watchdog.communicate()  # which removes the folder

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _launch(self) -> None:
        options = self.options | {"port": self.port, "bind": "127.0.0.1"}
        config = self.folder / "redis.conf"
        config.write_text("".join(f"{name} {value}\n" for name, value in options.items()), encoding="utf-8")
        self.data.mkdir(exist_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [self.program, str(config)], cwd=self.data, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        (self.folder / "pid").write_text(str(self._process.pid))
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline and self._process.poll() is None:
            if self.READY in self._log.read_text(errors="replace"):
                return
            time.sleep(0.01)
        self.kill()
        raise RuntimeError(f"{self.program} did not start:\n{self._log.read_text(errors='replace')}")

    def _ps(self) -> psutil.Process:
        if not self._process:
            raise RuntimeError(f"{self.program} on port {self.port} does not run: start() it first")
        return psutil.Process(self._process.pid)


def free_port() -> int:
    """Find a free port below the range from which systems take the ports of outgoing connections.

    Inside that range, one of those could take the port while a server is down, and a client that tries to
    reconnect could even connect to itself. Nor is it the port of another RedisServer that is down for now.
    """
    while True:
        port = random.SystemRandom().randrange(20000, 32000)  # whatever tests may seed
        if not any(Path(tempfile.gettempdir()).glob(f"{FOLDER}*/port-{port}")):
            with suppress(OSError), socket.create_server(("127.0.0.1", port)):
                return port


# It removes the folder, and ends the server whose process id stands in it, when standard input ends: a pipe from the
# process that wanted the server, however that went.
# An atexit hook alone would miss a run that is killed.
WATCHDOG = """
import os, pathlib, shutil, signal, sys
sys.stdin.read()
folder = pathlib.Path(sys.argv[1])
try:
    os.kill(int((folder / "pid").read_text()), getattr(signal, "SIGKILL", signal.SIGTERM))
except OSError:
    pass
shutil.rmtree(folder, ignore_errors=True)
"""
