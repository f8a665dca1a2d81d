"""A primary that goes: readers and producers go on at the one that takes its place, and lose nothing."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import pytest
import redis

from llmstream_nb import AnswerView, Monitor, tables
from llmstream_nb.answers.ask import ask
from llmstream_nb.answers.connection import RedisUnusable, connect, environment_of
from llmstream_nb.answers.read import aread_answer, read_answer
from llmstream_nb.faults import servers
from llmstream_nb.pool.groups import read_answer_group
from llmstream_nb.pool.queue import enqueue
from llmstream_nb.pool.worker import Worker
from llmstream_nb.protocol.events import Event, text_of
from llmstream_nb.protocol.wire import ORIGIN
from llmstream_nb.web.hub import Hub, View

from .conftest import FAST
from .model import Model, text_in, wait_for

pytestmark = pytest.mark.skipif("redis-server" not in servers.available(), reason="redis-server is not on PATH")


class Readers:
    """One of each kind, on one answer, each in a thread of its own: what they end with, by their names."""

    def __init__(self, answer_id: str, client: redis.Redis) -> None:
        self.view = AnswerView(answer_id, client=client)
        self.texts: dict[str, str] = {}
        options = {"client": client, "timing": FAST}

        async def all_of() -> list[Event]:
            return [event async for event in aread_answer(answer_id, **options)]

        async def page() -> str:

            async def nothing() -> None: ...

            hub = Hub(client, FAST, 15.0, nothing)
            try:
                return b"".join([frame async for frame in hub.stream(View(answer_id), ORIGIN, ORIGIN)]).decode()
            finally:
                await hub.close()

        def group() -> str:
            entries = [e for batch in read_answer_group(answer_id, "g", "c", **options) for e in batch]
            return "".join({entry.id: entry.text for entry in entries if entry.kind == "text"}.values())

        kinds: dict[str, Callable[[], str]] = {
            "read": lambda: text_of(read_answer(answer_id, **options)),
            "aread": lambda: text_of(asyncio.run(all_of())),
            "page": lambda: asyncio.run(page()),
            "group": group,
        }
        for name, kind in kinds.items():
            threading.Thread(target=partial(self._run, name, kind), daemon=True).start()

    def _run(self, name: str, kind: Callable[[], str]) -> None:
        try:
            self.texts[name] = kind()
        except Exception as error:
            self.texts[name] = repr(error)

    def check(self, text: str, words: list[str]) -> None:
        """All of them have seen this text, and the page each word of it once."""
        wait_for(lambda: len(self.texts) == 4 and self.view.state == "ended")
        told = self.texts | {"view": self.view.text}
        page = told.pop("page")
        assert told == dict.fromkeys(("read", "aread", "group", "view"), text)
        assert [page.count(word) for word in words] == [1] * len(words), page


@pytest.fixture
def server() -> Iterator[servers.RedisServer]:
    with servers.RedisServer() as made:
        yield made


def test_who_waits_when_the_primary_becomes_a_replica_goes_on(server) -> None:
    client = connect(server.url, prefix="over")
    says = Model("one-word ")
    answer = ask("long", source=lambda question, topic: says, id="a", client=client, timing=FAST)
    readers = Readers("a", client)
    admin = server.client()
    # Those who block: read, aread and group.
    wait_for(lambda: readers.view.text == "one-word " and admin.info("clients")["blocked_clients"] == 3)
    admin.replicaof("127.0.0.1", servers.free_port())
    wait_for(lambda: admin.info("errorstats").get("errorstat_UNBLOCKED", {}).get("count") == 3)
    says.say("two-words ")
    admin.replicaof("NO", "ONE")
    wait_for(lambda: text_in(client, "a") == "one-word two-words ")
    says.end()
    assert answer.wait(60).status == "ended"
    readers.check("one-word two-words ", ["one-word", "two-words"])
    client.close()


# ----------------------------------------------------------------------------------------------- Sentinel

SECRET = "s3cr3t/with@odd:chars"
QUOTED = "s3cr3t%2Fwith%40odd%3Achars"


class SentinelServer(servers.RedisServer):
    """A Sentinel that watches this primary, and wants a password of its own."""

    READY = "+monitor master"

    def __init__(self, primary: servers.RedisServer) -> None:
        self._primary = primary
        super().__init__()

    def _launch(self) -> None:
        program = self.folder / "redis-sentinel"  # by this name the server knows what it is to be
        if not program.exists():
            program.symlink_to(shutil.which(self._primary.program) or "")
        self.program = str(program)
        self.options = {
            "requirepass": "guide",
            "sentinel monitor main": f"127.0.0.1 {self._primary.port} 1",
            "sentinel auth-pass main": SECRET,
            "sentinel down-after-milliseconds main": 1000,  # a busy machine is not down
            "sentinel failover-timeout main": 3000,
        }
        super()._launch()

    def primary(self) -> int:
        """The port of the primary that it names."""
        return int(self.client().sentinel_get_master_addr_by_name("main")[1])


class Trio:
    """A primary, its replica, and the Sentinel that watches them."""

    def __init__(self, closing: ExitStack) -> None:
        options = {"requirepass": SECRET, "masterauth": SECRET, "repl_diskless_sync_delay": 0}
        self.old = closing.enter_context(servers.RedisServer(**options))
        self.new = closing.enter_context(servers.RedisServer(replicaof=f"127.0.0.1 {self.old.port}", **options))
        admin = self.old.client()
        admin.set("x", "y")
        wait_for(lambda: admin.wait(1, 100) == 1)  # a new replica counts as up for a second before it is sent anything
        self.sentinel = closing.enter_context(SentinelServer(self.old))
        wait_for(lambda: [each["flags"] for each in self.sentinel.client().sentinel_slaves("main")] == ["slave"])
        nobody = servers.free_port()
        hosts = f"127.0.0.1:{nobody},127.0.0.1:{self.sentinel.port}"
        self.url = f"redis+sentinel://:{QUOTED}@{hosts}/main/0?sentinel_password=guide"

    def hand_over(self) -> None:
        self.sentinel.client().execute_command("SENTINEL FAILOVER main")


def is_primary(server: servers.RedisServer) -> bool:
    """Whether it takes writes; a Sentinel that promotes it ends all its connections."""
    try:
        return bool(server.client().role()[0] == "master")
    except redis.ConnectionError:
        return False


@pytest.fixture
def trio() -> Iterator[Trio]:
    with ExitStack() as closing:
        yield Trio(closing)


@pytest.mark.parametrize("how", ["killed", "frozen", "handed over", "handed over at its end"])
def test_an_answer_goes_on_at_the_new_primary(how, trio) -> None:
    client = connect(trio.url, prefix="over", socket_timeout=1)
    assert "s3cr3t" not in repr(client) and "guide" not in repr(client)
    says, words = Model("first "), ["first "]
    answer = ask("long", source=lambda question, topic: says, id="a", client=client, timing=FAST)
    readers = Readers("a", client)
    wait_for(lambda: readers.view.text == "first " and trio.old.client().info("clients")["blocked_clients"] == 3)
    {"killed": trio.old.kill, "frozen": trio.old.pause, "handed over": trio.hand_over}.get(how, trio.hand_over)()

    def is_moved() -> bool:
        words.append(f"word-{len(words)}. ")
        says.say(words[-1])
        return trio.sentinel.primary() == trio.new.port

    if how == "handed over at its end":  # there are two primaries, and Sentinel still names the old one
        wait_for(lambda: is_primary(trio.new))
    else:
        wait_for(is_moved)
    if how == "handed over":  # it takes writes still, and each of them is lost
        assert is_primary(trio.old)
    says.say("last ")
    says.end()
    assert answer.wait(60).status == "ended"
    assert answer.text == "".join([*words, "last "])
    new = trio.new.client()
    wait_for(lambda: trio.sentinel.primary() == trio.new.port)
    new.names = client.names
    assert text_in(new, "a") == answer.text and new.role()[0] == "master"
    readers.check(answer.text, words)
    code = "from llmstream_nb import Answer; print(Answer('a').text)"
    env = os.environ | environment_of(client)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == answer.text + "\n", done.stderr
    client.close()


def test_who_works_at_a_primary_that_is_handed_over(trio) -> None:
    client = connect(trio.url, prefix="over")
    says = Model("first ")
    worker = Worker(name="w", source=lambda question, topic: says, client=client, timing=FAST).start()
    answer, monitor = enqueue("long", id="a", client=client, timing=FAST), Monitor(client=client)
    wait_for(lambda: text_in(client, "a") == "first ")
    trio.hand_over()
    wait_for(lambda: trio.sentinel.primary() == trio.new.port)
    says.say("last")
    says.end()
    assert answer.wait(60).text == "first last" and answer.look().top.attempt == 1
    wait_for(lambda: tables.queue(client=client).empty and not monitor.note)
    worker.stop()
    assert worker.error is None
    monitor.close()
    client.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [(("main", "other"), "names no primary"), (("=guide", "=wrong"), "names no primary"), ((QUOTED, "wrong"), "refused the"),
     (("/main/0", ""), r"should look like redis\+sentinel://")],
)  # fmt: skip
def test_what_is_wrong_in_a_url_of_sentinels_is_told(change, words, trio) -> None:
    with pytest.raises(RedisUnusable, match=words) as caught:
        connect(trio.url.replace(*change))
    assert "s3cr3t" not in str(caught.value) and "guide" not in str(caught.value)
