"""The servers of the tests: each is what its name says, private, and knows the commands that 04b says it knows."""

from __future__ import annotations

from collections.abc import Iterator

import nbformat
import psutil
import pytest
import redis

from llmstream_nb.faults.servers import RedisServer
from llmstream_nb.setup.environment import ROOT

from . import versions
from .versions import INSTALLED, SERVERS, WHEELS

NEWER = {"xackdel": (8, 2), "claim_min_idle_time=0": (8, 4), "xnack": (8, 8)}  # as the table in 04b says
CELLS = [cell for cell in nbformat.read(ROOT / "notebooks" / "04b-redis-8.ipynb", 4).cells if cell.cell_type == "code"]


def version(server: RedisServer) -> tuple[str, str]:
    with server.client() as client:
        about = client.info("server")
    return about.get("server_name", "redis"), about.get("valkey_version", about["redis_version"])


@pytest.mark.parametrize("name", WHEELS)
def test_a_server_from_a_wheel_is_what_its_name_says(real_servers, name: str) -> None:
    assert version(real_servers[name]) == (name.partition("-")[0], WHEELS[name].shows)
    assert WHEELS[name].shows.startswith(name.partition("-")[2] + ".")


def test_a_server_listens_on_loopback_alone(shared) -> None:
    with shared.client() as client:
        process = psutil.Process(client.info("server")["process_id"])
    listening = [link.laddr.ip for link in process.net_connections() if link.status == psutil.CONN_LISTEN]
    assert set(listening) == {"127.0.0.1"}


def test_what_is_chosen_for_schedules(monkeypatch) -> None:
    for said, names in [("", [INSTALLED]), ("all", SERVERS), ("redis-6.2,valkey-9.1", ["redis-6.2", "valkey-9.1"])]:
        monkeypatch.setenv(versions.VARIABLE, said)
        assert versions.chosen() == names
    monkeypatch.setenv(versions.VARIABLE, "redis-5")
    with pytest.raises(ValueError, match=r"redis-5 is none of redis-6\.2, "):
        versions.chosen()


# ------------------------------------------------------------------------------- the commands of notebook 04b


@pytest.fixture
def page(shared) -> Iterator[dict]:
    """The notebook's first cell, on a real server in place of its fakeredis."""
    space: dict = {}
    exec(CELLS[0].source, space)
    space["redis8"] = client = shared.client()
    yield space
    client.delete("finish", "take", "return")
    client.close()


def knows(shared, command: str) -> bool:
    make, number = version(shared)
    return make == "redis" and tuple(map(int, number.split(".")[:2])) >= NEWER[command]


ON_8_2 = pytest.mark.parametrize("shared", ["redis-8.2"], indirect=True)


@ON_8_2
def test_xackdel_is_on_a_real_server_as_the_notebook_shows_it(page) -> None:
    [cell] = [cell for cell in CELLS if cell.source.startswith('redis8.xackdel("finish"')]
    page["begin"]("finish")
    assert repr(eval(cell.source, page)) == cell.outputs[0].data["text/plain"] == "[1, 1, -1]"
    client = page["redis8"]
    assert [entry for entry, _ in client.xrange("finish")] == ["1-3", "1-4", "1-5", "1-6"]
    assert [row["message_id"] for row in client.xpending_range("finish", "workers", "-", "+", 9)] == ["1-3"]


@ON_8_2
def test_xackdel_and_what_the_pool_does_come_to_the_same(page) -> None:
    client, left = page["redis8"], []
    for done in (
        lambda pipe: pipe.xackdel("finish", "workers", "1-2"),
        lambda pipe: pipe.xack("finish", "workers", "1-2").xdel("finish", "1-2"),
    ):
        page["begin"]("finish")
        with client.pipeline(transaction=True) as pipe:
            done(pipe)
            pipe.execute()
        pending = client.xpending_range("finish", "workers", "-", "+", 9)
        left.append((client.xrange("finish"), [(row["message_id"], row["times_delivered"]) for row in pending]))
    assert left[0] == left[1]


@pytest.mark.parametrize(
    ("command", "refusal"),
    [("xackdel", "unknown command"), ("claim_min_idle_time=0", "(?i)syntax error|unbalanced"),
     ("xnack", "unknown command")],
)  # fmt: skip
def test_older_servers_know_none_of_the_commands(page, shared, command: str, refusal: str) -> None:
    cell = next(cell.source for cell in CELLS if command in cell.source)
    if 'begin("' not in cell:
        page["begin"]("finish" if command == "xackdel" else "take")
    if knows(shared, command):
        exec(cell, page)
    else:
        with pytest.raises(redis.ResponseError, match=refusal):
            exec(cell, page)
