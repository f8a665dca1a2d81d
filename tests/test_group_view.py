"""AnswerView that reads through a consumer group: the whole text, also after a crash, and clear words where not."""

from __future__ import annotations

from typing import Any

import ipywidgets
import pytest
import redis

from llmstream_nb import AnswerView
from llmstream_nb.answers import connection
from llmstream_nb.answers.ask import clear, stop_answer
from llmstream_nb.answers.connection import names_of
from llmstream_nb.faults import servers
from llmstream_nb.pool.groups import BadName
from llmstream_nb.protocol.round import LOOK
from llmstream_nb.widgets.live import hub

from .conftest import BACKENDS, FAST
from .model import Model, start, wait_for
from .network import Proxy
from .test_widgets import LOG, Page, add, lease, recorded, settled, threads  # noqa: F401 - recorded is a fixture


def group_of(client: redis.Redis, group: str = "viewer", answer_id: str = "a") -> dict[str, Any]:
    groups: Any = client.xinfo_groups(names_of(client).answer(answer_id).chunks)
    return next(each for each in groups if each["name"] == group)


def take(client: redis.Redis, consumer: str, count: int, group: str = "viewer", start_id: str = "0") -> None:
    """Read as a consumer that dies before it can acknowledge."""
    chunks = names_of(client).answer("a").chunks
    if not [each for each in client.xinfo_groups(chunks) if each["name"] == group]:
        client.xgroup_create(chunks, group, start_id)
    client.xreadgroup(group, consumer, {chunks: ">"}, count=count)


def write(client: redis.Redis, first: int, last: int) -> None:
    """The entries `1-first` to `1-last`: a start, and numbers."""
    lease(client)
    for seq in range(first, last + 1):
        add(client, f"1-{seq}", "text" if seq else "start", f"{seq} " if seq else "{}")


def whole(last: int) -> str:
    return "".join(f"{seq} " for seq in range(1, last + 1))


def crash() -> None:
    """The kernel is gone, and a new one begins."""
    ipywidgets.Widget.close_all()
    wait_for(lambda: "llmstream views" not in threads())


def test_the_text_comes_through_the_group_and_all_is_acknowledged(client) -> None:
    model = Model("one ")
    start(client, model, FAST)
    view, plain = AnswerView("a", group="viewer"), AnswerView("a", group="other", plain=True)
    wait_for(lambda: view.text == "one ")
    for word in ("two ", "😀 ", "four"):
        model.say(word)
    model.end()
    settled(view, plain)
    assert view.text == Page(view).state["text"] == "one two 😀 four"
    assert "one two 😀 four</" in plain.value.replace("<mark>", "</")
    for group in ("viewer", "other"):
        told = group_of(client, group)
        assert (told["consumers"], told["pending"], told["last-delivered-id"]) == (1, 0, "1-5")


def test_after_a_crash_the_text_is_whole_and_nothing_stays_pending(client) -> None:
    write(client, 0, 5)
    first = AnswerView("a", group="viewer")
    wait_for(lambda: first.text == whole(5) and not group_of(client)["pending"])
    crash()
    write(client, 6, 9)
    take(client, "view", 3)  # delivered, and then the kernel died: 1-6 to 1-8 stay pending
    assert (group_of(client)["pending"], group_of(client)["last-delivered-id"]) == (3, "1-8")
    second = AnswerView("a", group="viewer")
    wait_for(lambda: second.text == whole(9))
    wait_for(lambda: group_of(client)["pending"] == 0)
    add(client, "1-10", "end", '{"reason": "stop"}')
    settled(second)
    assert (second.state, second.blocks, second.chunks) == ("ended", [], 9)
    third = AnswerView("a", group="viewer", plain=True)  # all was read: the group has no more to give
    settled(third)
    assert whole(9) in third.value and "Complete" in third.value


def test_a_crash_after_the_end_was_delivered_leaves_nothing_pending_either(client, monkeypatch) -> None:
    monkeypatch.setattr("llmstream_nb.widgets.watched.COUNT", 3)  # several pages
    write(client, 0, 8)
    add(client, "1-9", "end", '{"reason": "stop"}')
    take(client, "view", 10)
    assert group_of(client)["pending"] == 10
    view = AnswerView("a", group="viewer")
    settled(view)
    assert (view.text, view.state, group_of(client)["pending"]) == (whole(8), "ended", 0)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "fake"], indirect=True)
def test_a_lost_reply_to_xreadgroup_costs_nothing(client) -> None:
    kwargs = client.connection_pool.connection_kwargs
    with Proxy("127.0.0.1", kwargs["port"]) as proxy:
        through = connection.connect(proxy.url, prefix=names_of(client).prefix)
        write(client, 0, 2)
        view = AnswerView("a", group="viewer", client=through)
        wait_for(lambda: view.text == whole(2) and group_of(client)["pending"] == 0)
        proxy.delay(10)  # until the entries are there for the next request
        write(client, 3, 4)
        proxy.drop_reply(when=rb"XREADGROUP[\s\S]*viewer")
        proxy.refuse()
        proxy.delay(0)
        proxy.wait_dropped()
        assert (group_of(client)["last-delivered-id"], group_of(client)["pending"]) == ("1-4", 0)
        assert view.text == whole(2)
        proxy.heal()
        wait_for(lambda: view.text == whole(4))
        write(client, 5, 6)
        wait_for(lambda: view.text == whole(6))
        add(client, "1-7", "end", '{"reason": "stop"}')
        settled(view)
        assert (view.text, view.state, view.blocks) == (whole(6), "ended", [])
        assert group_of(client)["pending"] == 0
        through.close()


@pytest.mark.slow
def test_a_redis_that_lost_everything_may_get_it_again_from_the_producer(program) -> None:
    with servers.RedisServer(program) as server:
        client = connection.connect(server.url, prefix="lost")
        write(client, 0, 3)
        view = AnswerView("a", group="viewer", client=client)
        wait_for(lambda: view.text == whole(3))
        server.kill()
        wait_for(lambda: view.note == "Redis is away, trying again.")
        server.wipe()
        wait_for(lambda: view.note == "")
        looked = view.round.look_at
        wait_for(lambda: view.round.look_at > looked + 2 * LOOK)
        assert (view.state, view.text) == ("streaming", whole(3))
        write(client, 0, 5)  # under the same IDs, as producers do
        add(client, "1-6", "end", '{"reason": "stop"}')
        settled(view)
        assert (view.state, view.text, group_of(client)["pending"]) == ("ended", whole(5), 0)
        client.close()


def test_a_group_with_other_consumers_is_refused_and_nothing_taken(client) -> None:
    write(client, 0, 4)
    take(client, "somebody", 1)
    view, plain = AnswerView("a", group="viewer"), AnswerView("a", group="viewer", plain=True)
    settled(view, plain)
    assert view.state == "failed"
    assert view.note == (
        "The group 'viewer' has other consumers (somebody): each would get only a part of the text. "
        "Give this view a group of its own."
    )
    assert "other consumers (somebody)" in plain.value
    assert group_of(client)["last-delivered-id"] == "1-0"


@pytest.mark.slow
def test_another_reader_that_comes_later_is_noticed(client) -> None:
    write(client, 0, 2)
    view = AnswerView("a", group="viewer")
    wait_for(lambda: view.text == whole(2))
    chunks = names_of(client).answer("a").chunks
    with client.pipeline(transaction=True) as pipe:  # so that the other is first
        pipe.xadd(chunks, {"kind": "end", "text": '{"reason": "stop"}', "ms": "7"}, id="1-3")
        pipe.xreadgroup("viewer", "thief", {chunks: ">"})
        pipe.execute()
    settled(view)
    assert (view.state, view.text) == ("failed", whole(2))
    assert view.note.startswith("The group 'viewer' has another reader: each would get only a part")


def test_a_group_or_an_answer_deleted_meanwhile_is_said_once(client) -> None:
    chunks = names_of(client).answer("a").chunks
    for delete in (lambda: client.xgroup_destroy(chunks, "viewer"), lambda: client.delete(chunks)):
        client.delete(chunks)
        write(client, 0, 3)
        view = AnswerView("a", group="viewer")
        wait_for(lambda view=view: view.text == whole(3))
        delete()
        settled(view)
        assert (view.state, view.text) == ("failed", whole(3))
        assert view.note == "The group 'viewer', or the answer, was deleted or has expired meanwhile."
    wait_for(lambda: "llmstream views" not in threads())  # no hot loop


@pytest.mark.slow
def test_waiting_missing_interrupted_and_cleared_as_in_other_views(client) -> None:
    missing = AnswerView("nothing", group="viewer")
    settled(missing)
    assert (missing.state, missing.label) == ("missing", "Not found")
    assert not client.exists(names_of(client).answer("nothing").chunks)
    model = Model()
    start(client, model, FAST)
    view = AnswerView("a", group="viewer")
    wait_for(lambda: view.round.joined and view.state == "waiting")
    model.say("x")
    wait_for(lambda: view.state == "streaming" and view.text == "x")
    stop_answer("a", client=client, timing=FAST)
    settled(view)
    assert (view.state, view.text) == ("stopped", "x")
    clear("a", client=client, timing=FAST)
    add(client, "1-0", "start", "{}")
    dead = AnswerView("a", group="viewer")
    wait_for(lambda: dead.state == "interrupted")
    lease(client, attempt=2)
    add(client, "2-0", "start", "{}")
    add(client, "2-1", "text", "again")
    add(client, "2-2", "end", '{"reason": "stop"}')
    settled(dead)
    assert (dead.text, dead.state, group_of(client)["pending"]) == ("again", "ended", 0)


def test_wrong_type_foreign_entries_and_odd_names(client) -> None:
    names = names_of(client)
    client.set(names.answer("string").chunks, "x")
    client.xadd(names.answer("foreign").chunks, {"chunkOutput": "Once"})
    string, foreign = AnswerView("string", group="viewer"), AnswerView("foreign", group="viewer")
    write(client, 0, 2)
    odd = AnswerView("a", group="odd\n<b>👩‍👩 *")
    settled(string, foreign)
    wait_for(lambda: odd.text == whole(2))
    assert "holds a string, not a stream" in string.note
    assert foreign.state == "failed" and "kit's: it needs the fields" in foreign.note
    for bad in ("", "x" * 300, "\ud800"):
        with pytest.raises(BadName):
            AnswerView("a", group=bad)
    wait_for(lambda: hub._views and not [view for view in hub._views if view is not odd])


def test_many_views_of_one_client_do_not_hold_each_other_up(client) -> None:
    write(client, 0, 3)
    views = [AnswerView("a", group=f"g{n}" if n % 2 else None, plain=n % 3 == 0) for n in range(8)]
    wait_for(lambda: all(view.transcript.text == whole(3) for view in views))
    add(client, "1-4", "end", '{"reason": "stop"}')
    settled(*views)
    assert {group_of(client, f"g{n}")["pending"] for n in (1, 3, 5, 7)} == {0}
