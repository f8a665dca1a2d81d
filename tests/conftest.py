"""What all tests share: the Redis backends, fast timing, and no skipping in CI."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator

import pytest

for name in ("REDIS_URL", "LLMSTREAM_PREFIX", "LLMSTREAM_LLM", "OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL"):
    os.environ.pop(name, None)  # a test must not talk to the developer's own Redis, nor spend a key

import redis

from llmstream_nb.answers import connection, embedded
from llmstream_nb.faults import servers
from llmstream_nb.protocol.wire import Timing

from .model import wait_for

# redis-server is skipped with a reason where it is absent; Valkey, packaged for few systems, is taken where it is.
BACKENDS = ["fake", "fake-tcp", "redis-server", *(["valkey-server"] if "valkey-server" in servers.available() else [])]
FAST = Timing(lease=1.0, tick=0.05, ttl=600.0, give_up=8.0, patience=2.0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI a skipped test is a failed test: everything that tests need is installed there."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def real_servers() -> Iterator[dict[str, servers.RedisServer]]:
    """One process per server program that is on PATH, shared by all tests that don't break it."""
    started = {program: servers.RedisServer(program) for program in servers.available()}
    yield started
    for server in started.values():
        server.stop()


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
    name = request.param
    if name.endswith("-server") and name not in servers.available():
        pytest.skip(f"{name} is not on PATH")
    return name


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
    yield
    wait_for(
        lambda: not [t for t in threading.enumerate() if t.name.startswith(("llmstream write", "llmstream model"))]
    )
