"""What all tests share: the Redis backends, fast timing, and no skipping in CI."""

from __future__ import annotations

import os
import threading
import uuid
import zlib
from collections.abc import Iterator

import pytest

for name in (
    "REDIS_URL",
    "LLMSTREAM_PREFIX",
    "LLMSTREAM_LLM",
    "OPENAI_API_KEY",
    "OPENAI_BASE_URL",
    "OPENAI_MODEL",
    "OPENAI_GOES_ON",
):
    os.environ.pop(name, None)  # a test must not talk to the developer's own Redis, nor spend a key

import redis

from llmstream_nb.answers import connection, embedded
from llmstream_nb.faults.servers import RedisServer
from llmstream_nb.protocol.wire import Timing

from .model import wait_for
from .versions import SERVERS, chosen, missing, program_of

BACKENDS = ["fake", "fake-tcp", *SERVERS]
# The last two are bounds: a test that waits for them says how long.
FAST = Timing(lease=1.0, tick=0.05, ttl=600.0, give_up=60.0, patience=60.0)


# Their tests are few and slow: files are dealt out in this order, so that none of these is begun last.
LONG = [
    "environment",
    "binder",
    "ends",
    "workers",
    "web",
    "checks",
    "resilience",
    "pool",
    "redis_server",
    "failover",
    "package",
    "room",
    "workshop",
    # In a browser:
    "notebooks_in_lab",
    "widgets_in_lab",
    "page",
]


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "slow: on the fake and on one real server, which differs from run to run")


def pytest_report_header() -> str:
    return f"fault schedules on {', '.join(chosen())}"


def pytest_collection_modifyitems(config, items) -> None:
    """Quick tests run on every server; of the slow ones each case on one, unless all are chosen. Long files come first."""
    rank = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))
    if chosen() != SERVERS:
        passed_over = [item for item in items if item.get_closest_marker("slow") and not is_dealt(item)]
        config.hook.pytest_deselected(items=passed_over)
        left = set(passed_over)
        items[:] = [item for item in items if item not in left]


def is_dealt(item: pytest.Item) -> bool:
    """Whether a slow test's case is to run on this server: the cases are dealt to all, beginning with the chosen one."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    name = next((params[key] for key in ("backend", "program", "shared") if key in params), "fake")
    if name in SERVERS:
        number = zlib.crc32(item.nodeid.replace(name, "").encode()) + SERVERS.index(chosen()[0])
        return name == SERVERS[number % len(SERVERS)]
    return name == "fake"  # over TCP it would be slow once more


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI a skipped test is a failed test: everything that tests need is installed there."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report


class Started(dict[str, RedisServer]):
    """The real servers by name, each started when it is first wanted; the test is skipped where it is missing."""

    def __missing__(self, name: str) -> RedisServer:
        self[name] = RedisServer(found(name))
        return self[name]


def found(name: str) -> str:
    """The program of this server; skips the test where it is missing."""
    if program := program_of(name):
        return program
    pytest.skip(missing(name))


@pytest.fixture(scope="session")
def real_servers() -> Iterator[Started]:
    """A process of each real server, shared by all tests that don't break it."""
    started = Started()
    yield started
    for server in started.values():
        server.stop()


@pytest.fixture(scope="session", params=SERVERS)
def program(request) -> str:
    """The program of each real server in turn, for a test that starts its own, to break it."""
    return found(request.param)


@pytest.fixture(params=SERVERS)
def shared(real_servers, request) -> RedisServer:
    """Each real server in turn, which other tests use too."""
    return real_servers[request.param]


@pytest.fixture(scope="session", params=chosen())
def drawn_server(request) -> str:
    """The name of the server for fault schedules, which differs from run to run, or of each that was chosen."""
    found(request.param)
    return request.param


@pytest.fixture(scope="session")
def fake_tcp() -> Iterator[str]:
    """The URL of a fakeredis that is reached over TCP alone."""
    server = embedded.serve()
    yield f"redis://127.0.0.1:{server.server_address[1]}/0"
    server.shutdown()
    server.server_close()


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    """The name of each backend in turn."""
    return request.param


@pytest.fixture
def client(backend, request) -> Iterator[redis.Redis]:
    """A client of the backend under a prefix of its own, and the kit's current one."""
    url = None
    if backend == "fake-tcp":
        url = request.getfixturevalue("fake_tcp")
    elif backend != "fake":
        url = request.getfixturevalue("real_servers")[backend].url
    made = connection.connect(url, prefix=f"t{uuid.uuid4().hex[:10]}")
    yield made
    made.close()


@pytest.fixture
def no_leftovers() -> Iterator[None]:
    """The test leaves no thread of the kit behind."""
    before = set(threading.enumerate())
    yield
    kinds = ("llmstream write", "llmstream model")
    wait_for(lambda: not [t for t in set(threading.enumerate()) - before if t.name.startswith(kinds)])
