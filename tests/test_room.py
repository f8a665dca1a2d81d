"""A room on one Redis, as workshop/one-redis.md sets it up: TLS, thirty users, one host whom all of them watch."""

from __future__ import annotations

import re
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import redis

from llmstream_nb import AnswerView, Monitor, tables
from llmstream_nb.answers.ask import ask, clear, stop_answer
from llmstream_nb.answers.connection import RedisUnusable, connect
from llmstream_nb.answers.read import read_answer
from llmstream_nb.faults import servers
from llmstream_nb.pool.groups import claim, read_answer_group
from llmstream_nb.pool.queue import enqueue
from llmstream_nb.pool.worker import Worker
from llmstream_nb.protocol.events import text_of
from llmstream_nb.web import WebServer

from .conftest import FAST
from .model import Model, wait_for
from .test_beyond_one import certificates  # noqa: F401
from .web import call

pytestmark = pytest.mark.skipif("redis-server" not in servers.available(), reason="redis-server is not on PATH")
PAGE = Path(__file__).parents[1] / "workshop" / "one-redis.md"
PEOPLE = 30


def cells() -> list[str]:
    """The Python of the page: the script for the day before, the host's two cells, a participant's two."""
    found = re.findall(r"(?ms)^( *)```python\n(.*?)^\1```", PAGE.read_text("utf-8"))
    return [textwrap.dedent(code) for _, code in found]


@pytest.fixture(scope="module")
def room(certificates, tmp_path_factory) -> Iterator[SimpleNamespace]:  # noqa: F811
    """A server with the page's users; the addresses on the slips."""
    folder, port = tmp_path_factory.mktemp("room"), servers.free_port()
    patch = pytest.MonkeyPatch()
    # The authority of a managed Redis is one that every system trusts; to load a system's hundred takes its time.
    patch.setenv("SSL_CERT_FILE", str(certificates / "ca.crt"))
    patch.chdir(folder)
    exec(cells()[0].replace("HOST:PORT", f"127.0.0.1:{port}"), {})
    users = folder / "users.acl"
    rules = users.read_text("utf-8").replace("user default off", "user default on nopass ~* +@all", 1)
    users.write_text(rules)  # the default user is the test's own way in, past TLS
    files = {f"tls_{name}_file": str(certificates / file) for name, file in
             [("cert", "server.crt"), ("key", "server.key"), ("ca_cert", "ca.crt")]}  # fmt: skip
    with servers.RedisServer(tls_port=port, tls_auth_clients="no", aclfile=str(users), **files) as server:
        host, *slips = (folder / "slips.txt").read_text("utf-8").split()
        yield SimpleNamespace(admin=server.client(), host=host, slips=slips)
    patch.undo()


@pytest.fixture(autouse=True)
def empty(room) -> None:
    room.admin.flushall()
    room.admin.execute_command("ACL LOG RESET")


def name_on(slip: str) -> str:
    return slip.split("//")[1].split(":", maxsplit=1)[0]


def test_thirty_people_watch_the_host_and_ask_questions_of_their_own(room) -> None:
    before = room.admin.info("clients")["connected_clients"]
    assert len(room.slips) == PEOPLE
    host = connect(room.host, prefix="host")
    says = Model("Hello ", "everybody, ")
    live = ask("one", source=lambda question, topic: says, id="live", timing=FAST, client=host)
    wait_for(lambda: live.text == "Hello everybody, ")

    watching = [connect(slip, prefix="host") for slip in room.slips]
    own = [connect(slip, prefix=name_on(slip)) for slip in room.slips]
    views = [AnswerView("live", client=client) for client in watching[1:]]
    texts: dict[int, str] = {}
    readers = [
        threading.Thread(
            target=lambda n=n: texts.update({n: text_of(read_answer("live", client=watching[n], timing=FAST))})
        )
        for n in range(0, PEOPLE, 3)
    ]
    for reader in readers:
        reader.start()
    wait_for(lambda: {view.text for view in views} == {"Hello everybody, "})

    models = [Model(f"this is {name_on(slip)}") for slip in room.slips]
    mine = [
        ask("two", source=lambda question, topic, model=model: model, id="mine", timing=FAST, client=client)
        for client, model in zip(own, models, strict=True)
    ]
    own_views = [AnswerView(answer) for answer in mine]
    wait_for(lambda: [view.text for view in own_views] == [f"this is {name_on(slip)}" for slip in room.slips])
    connections = room.admin.info("clients")["connected_clients"] - before
    late = AnswerView("live", client=watching[0])
    says.say("and goodbye")
    for model in [says, *models]:
        model.end()
    whole = "Hello everybody, and goodbye"
    assert live.wait(60).text == whole
    wait_for(lambda: {view.state for view in [late, *views, *own_views]} == {"ended"})
    for reader in readers:
        reader.join(60)
    assert {view.text for view in [late, *views]} == {whole} and late.chunks == 3
    assert set(texts.values()) == {whole} and len(texts) == len(readers)
    assert connections <= 4 * PEOPLE + len(readers) + 4  # four for each, as the page says; the rest is the host's
    assert not room.admin.execute_command("ACL LOG")  # nothing that the kit sent was refused
    for client in [host, *watching, *own]:
        client.close()


def refused(client: redis.Redis, *command: str) -> bool:
    try:
        client.execute_command(*command)
    except redis.exceptions.NoPermissionError:
        return True
    return False


def test_nobody_can_spoil_the_hosts_answer_or_look_at_another_ones(room) -> None:
    host = connect(room.host, prefix="host")
    says = Model("Hello")
    live = ask("one", source=lambda question, topic: says, id="live", timing=FAST, client=host)
    wait_for(lambda: live.text == "Hello")
    ask("two", source=lambda question, topic: iter("secret"), id="mine", timing=FAST,
        client=connect(room.slips[1], prefix="p02")).wait(60)  # fmt: skip
    guest = connect(room.slips[0], prefix="host")
    attempts = [
        lambda: stop_answer("live", client=guest, timing=FAST),
        lambda: clear("live", client=guest, timing=FAST),
        lambda: clear(client=guest, timing=FAST),
        lambda: ask("three", source=lambda question, topic: iter("no"), client=guest, timing=FAST),
        lambda: enqueue("four", client=guest, timing=FAST),
        lambda: list(read_answer_group("live", "screens", "c", client=guest, timing=FAST)),
        lambda: text_of(read_answer("mine", client=connect(room.slips[0], prefix="p02"), timing=FAST)),
    ]
    for attempt in attempts:
        with pytest.raises(RedisUnusable, match="does not let this user"):
            attempt()
    raw = connect(room.slips[0], prefix="p01")
    chunks = "host:{live}:chunks"
    for command in [
        ("XADD", chunks, "9-9", "kind", "text"), ("XDEL", chunks, "1-1"), ("XTRIM", chunks, "MAXLEN", "0"),
        ("DEL", chunks), ("SET", "host:{live}:cancel", "x"), ("PEXPIRE", chunks, "1"), ("RENAME", chunks, "p01:x"),
        ("XGROUP", "CREATE", chunks, "g", "0"), ("GET", "p02:{mine}:question"), ("XLEN", "p02:{mine}:chunks"),
        ("EXISTS", "p02:{mine}:chunks"), ("KEYS", "*"), ("SCAN", "0"), ("RANDOMKEY",), ("FLUSHALL",), ("FLUSHDB",),
        ("CONFIG", "GET", "*"), ("ACL", "LIST"), ("CLIENT", "LIST"), ("MONITOR",), ("SHUTDOWN",),
        ("EVAL", "return 1", "0"), ("SUBSCRIBE", "x"), ("PUBLISH", "x", "y"), ("SWAPDB", "0", "1"),
    ]:  # fmt: skip
        assert refused(raw, *command), command
    says.end()
    assert text_of(read_answer("live", client=guest)) == "Hello"
    with pytest.raises(RedisUnusable, match="refused the user name or password"):
        connect(room.slips[0].replace("p01:", "p02:"))


def test_everything_of_the_kit_works_under_ones_own_prefix(room) -> None:
    connect(room.slips[6], prefix="p07")
    says, monitor = Model("half "), Monitor()
    first = Worker(name="first", source=lambda question, topic: says, timing=FAST).start()
    pooled = enqueue("one", id="pooled", timing=FAST)
    wait_for(lambda: pooled.text == "half ")
    grouped = AnswerView("pooled", group="screen")
    second = Worker(name="second", source=lambda question, topic: iter(["all"]), timing=FAST).start()
    first.stop(within=0)
    assert pooled.wait(60).text == "all" and pooled.look().top.attempt == 2
    wait_for(lambda: grouped.state == "ended" and tables.queue().empty)
    batches = read_answer_group("pooled", "g", "c1", timing=FAST)
    next(batches)
    batches.close()
    assert len(claim("pooled", "g", "c2", idle=0)) == 5
    for table in (tables.entries, tables.record, tables.keys, tables.info, tables.groups):
        assert len(table("pooled"))
    assert len(tables.pending("pooled", "g")) == 5 and len(tables.consumers("pooled", "g")) == 2
    assert len(tables.keyspace()) >= 3 and tables.failures().empty and len(tables.answers()) == 1
    with WebServer(0, token="t" * 20) as server:
        asked = call(server, "POST", "answers", {"question": "two"}, token="t" * 20)
        assert asked.status == 201 and stop_answer(asked.json["id"], timing=FAST) == "ended"
    wait_for(lambda: not monitor.note and len(monitor.answers) == 2)
    monitor.close()
    second.stop()
    assert first.error is second.error is None
    assert clear(timing=FAST) == 2
    assert {each["object"] for each in room.admin.execute_command("ACL LOG")} <= {"pooled"}  # is that a key, or an id?


def test_what_the_notebooks_send_themselves_works_on_ones_own_keys_alone(room) -> None:
    own = connect(room.slips[6], prefix="p07")
    own.xadd("p07:words", {"word": "a"})
    commands = [
        ("INCRBY", "{}:count", "1"), ("EXPIRE", "{}:count", "60"), ("TTL", "{}:count"),
        ("XGROUP", "CREATE", "{}:words", "g", "0"), ("XGROUP", "DESTROY", "{}:words", "g"),
        ("XTRIM", "{}:words", "MAXLEN", "0"), ("DEL", "{}:words"),
    ]  # fmt: skip
    for command in commands:
        own.execute_command(*(word.format("p07") for word in command))
    assert not room.admin.execute_command("ACL LOG")
    for other in ("p08", "host"):
        for command in commands:
            assert refused(own, *(word.format(other) for word in command)) or (other, command[0]) == ("host", "TTL")


def test_the_cells_of_the_page(room, monkeypatch) -> None:
    host_connects, host_asks, guest_watches, guest_asks = cells()[1:]
    monkeypatch.setattr("getpass.getpass", lambda _: room.host)
    on_stage: dict = {}
    exec(host_connects, on_stage)
    exec(host_asks.replace("pace=20", "pace=400"), on_stage)
    monkeypatch.setattr("getpass.getpass", lambda _: room.slips[6])
    shown = guest_watches.replace("AnswerView(", "view = AnswerView(")
    page: dict = {}
    exec(shown, page)
    exec(guest_asks, page)
    wait_for(lambda: page["view"].state == "ended")
    assert page["view"].text == on_stage["live"].wait(60).text
    assert page["mine"].stop() == "ended"
