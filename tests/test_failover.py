"""A primary that goes: readers and producers go on at the one that takes its place, and lose nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import redis

from llmstream_nb.answers.ask import ask
from llmstream_nb.answers.connection import connect
from llmstream_nb.answers.read import aread_answer, read_answer
from llmstream_nb.faults import servers
from llmstream_nb.pool.groups import read_answer_group
from llmstream_nb.protocol.events import Event, text_of
from llmstream_nb.protocol.wire import ORIGIN
from llmstream_nb.web.hub import Hub
from llmstream_nb.widgets import AnswerView

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
            hub = Hub(client, FAST)
            try:
                return b"".join([frame async for frame in hub.stream(answer_id, ORIGIN, ORIGIN)]).decode()
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
    assert answer.wait(20).status == "ended"
    readers.check("one-word two-words ", ["one-word", "two-words"])
    client.close()
