"""StreamView without a browser: what it tells of a key, how little it sends, what it survives."""

from __future__ import annotations

import json
from typing import Any

import pytest
import redis

from llmstream_nb import Answer, AnswerView, StreamView
from llmstream_nb.answers import connection
from llmstream_nb.answers.connection import names_of
from llmstream_nb.faults import servers
from llmstream_nb.protocol.wire import BadEntryID, EntryID
from llmstream_nb.widgets import stream_view
from llmstream_nb.widgets.live import hub

from .conftest import FAST
from .model import Model, start, wait_for
from .test_widgets import INJECTIONS, LOG, recorded, settled, threads  # noqa: F401 - recorded is a fixture


@pytest.fixture
def key(client) -> str:
    """A key that no other test uses."""
    return f"{names_of(client).prefix}:story"


@pytest.fixture
def looks(monkeypatch) -> list[list[list[Any]]]:
    """The replies of every round."""
    taken: list[list[list[Any]]] = []
    ask = stream_view.StreamReader.ask

    def noted(self: Any, *arguments: Any) -> Any:
        taken.append(ask(self, *arguments))
        return taken[-1]

    monkeypatch.setattr(stream_view.StreamReader, "ask", noted)
    return taken


class Page:
    """A page that holds one view's model, as stream_view.js does."""

    def __init__(self, view: StreamView, skip: int | None = None) -> None:
        self.entries: dict[str, list[str]] = {}
        self.marks: dict[str, Any] = {}
        self.version, self.lacks = 0, False
        for at, data in enumerate(data for _, comm_id, data in LOG if comm_id == view.model_id):
            if at != skip:
                self.take(data)

    def take(self, data: dict[str, Any]) -> None:
        state = data.get("state", {})
        if "version" in state:
            self.entries = {entry[0]: entry for entry in state["entries"]}
            self.marks, self.version, self.lacks = state["marks"], state["version"], False
        delta = data.get("content", {})
        if "version" in delta and delta["version"] > self.version:
            if delta["version"] > self.version + 1:
                self.lacks = True
                return
            self.version = delta["version"]
            self.marks |= delta["marks"]
            for entry_id in delta["gone"]:
                del self.entries[entry_id]
            self.entries |= {entry[0]: entry for entry in delta["added"]}

    @property
    def shown(self) -> list[list[str]]:
        return [self.entries[entry_id] for entry_id in sorted(self.entries, key=EntryID.parse)]


def words(view: StreamView) -> list[str]:
    return [text for _, _, text, _ in view.entries]


def tell(client: redis.Redis, key: str, text: str, start: int = 1) -> None:
    for number, word in enumerate(text.split(), start):
        client.xadd(key, {"word": word}, id=f"1-{number}")


def still(view: StreamView) -> None:
    """Wait until what is known has been sent: the kernel's state is a moment ahead of the message."""
    wait_for(
        lambda: not view.unseen and view._known == (view.entries, view.marks) and Page(view).version == view.version
    )


def group(view: StreamView, name: str) -> dict[str, Any]:
    return next(each for each in view.marks["groups"] if each["name"] == name)


# ------------------------------------------------------------------------------------------ what it tells


def test_a_key_comes_grows_goes_and_comes_anew(client, key) -> None:
    view = StreamView(key)
    wait_for(lambda: view.marks)
    assert (view.entries, view.marks["note"]) == ([], "No such key yet.")
    tell(client, key, "Once upon")
    wait_for(lambda: words(view) == ["Once", "upon"])
    assert view.entries[0] == ["1-1", "", "Once", ""]
    assert (view.marks["note"], view.marks["length"], view.marks["first"]) == ("", 2, "1-1")
    client.delete(key)
    wait_for(lambda: not view.entries)
    assert view.marks["note"] == "The key is gone: deleted, or expired."
    tell(client, key, "There was")
    wait_for(lambda: words(view) == ["There", "was"])
    tell(client, key, "a time", 3)
    wait_for(lambda: len(view.entries) == 4)
    with client.pipeline() as both:  # anew between two looks, with the same IDs and the same ends
        both.delete(key)
        for number, word in enumerate(["There", "is", "no", "time"], 1):
            both.xadd(key, {"word": word}, id=f"1-{number}")
        both.execute()
    wait_for(lambda: words(view) == ["There", "is", "no", "time"])
    still(view)
    assert Page(view).shown == view.entries


def test_what_an_entry_says(client, key) -> None:
    fields: list[dict[Any, Any]] = [
        {"kind": "text", "text": " of ", "ms": "3"},
        {"kind": "text", "text": "", "ms": "3"},
        {"word": "alone"},
        {"n": "1", "word": "two"},
        {"questionId": "A", "chunkOutput": "red "},
        {"questionId": "A"},
        {"word": b"\xff\xfe"},
    ]
    view = StreamView(key, colour="questionId")
    for number, each in enumerate(fields, 1):
        client.xadd(key, each, id=f"1-{number}")
    wait_for(lambda: len(view.entries) == len(fields))
    assert [entry[1:] for entry in view.entries] == [
        ["text", " of ", ""],
        ["text", "", ""],
        ["", "alone", ""],
        ["", "n=1 word=two", ""],
        ["", "red ", "A"],
        ["", "", "A"],
        ["", "\\xff\\xfe", ""],
    ]


def test_the_newest_are_drawn_and_all_are_counted(client, backend, key) -> None:
    for number in range(1, 101):
        client.xadd(key, {"n": number}, id=f"1-{number}")
    few, many = StreamView(key, newest=3), StreamView(key, newest=60)
    wait_for(lambda: words(few) == ["98", "99", "100"] and len(many.entries) == 60)
    assert few.marks["length"] == many.marks["length"] == 100
    client.xtrim(key, maxlen=50, approximate=False)
    client.xdel(key, "1-99", "1-100")
    wait_for(lambda: words(few) == ["96", "97", "98"] and len(many.entries) == 48)
    gone = 0 if backend == "redis-6.2" else 52  # which does not count what was added
    assert few.marks | {"readers": 0} == {
        "length": 48, "first": "1-51", "last": "1-100", "gone": gone, "groups": [], "note": "", "readers": 0,
    }  # fmt: skip
    client.xtrim(key, maxlen=0)
    wait_for(lambda: not many.entries)
    assert (many.marks["length"], many.marks["first"], many.marks["last"]) == (0, None, "1-100")
    for wrong in (0, 61):
        with pytest.raises(ValueError, match="1 to 60"):
            StreamView(key, newest=wrong)


def test_an_answer_s_stream(client) -> None:
    start(client, Model("Once", " upon", end=True), FAST).done.wait(60)
    view = StreamView(Answer("a", client=client))
    wait_for(lambda: len(view.entries) == 4)
    assert view.key == names_of(client).answer("a").chunks
    assert [kind for _, kind, _, _ in view.entries] == ["start", "text", "text", "end"]


def test_a_group_s_place_and_what_is_pending_with_whom(client, key) -> None:
    tell(client, key, "Redis remembers what it gave")
    client.xgroup_create(key, "viewers", id="0")
    view = StreamView(key)
    wait_for(lambda: view.marks and view.marks["groups"])
    assert group(view, "viewers") == {"name": "viewers", "at": "0-0", "pending": 0, "held": []}
    client.xreadgroup("viewers", "c1", {key: ">"}, count=3)
    wait_for(lambda: group(view, "viewers")["held"])
    assert group(view, "viewers")["held"] == [[f"1-{n}", "c1", 1] for n in (1, 2, 3)]
    assert (group(view, "viewers")["at"], group(view, "viewers")["pending"]) == ("1-3", 3)
    client.xack(key, "viewers", "1-1")
    wait_for(lambda: group(view, "viewers")["pending"] == 2)
    client.xclaim(key, "viewers", "c2", 0, ["1-3"])  # changes no count of XINFO
    wait_for(lambda: group(view, "viewers")["held"] == [["1-2", "c1", 1], ["1-3", "c2", 2]])
    client.xgroup_create(key, "other", id="$")
    wait_for(lambda: len(view.marks["groups"]) == 2)
    assert group(view, "other")["at"] == "1-5"
    client.xgroup_destroy(key, "viewers")
    wait_for(lambda: [each["name"] for each in view.marks["groups"]] == ["other"])


def test_only_what_is_pending_in_sight_is_asked_for(client, key, looks) -> None:
    for number in range(1, 201):
        client.xadd(key, {"n": number}, id=f"1-{number}")
    for number in range(10):
        client.xgroup_create(key, f"g{number}", id="0")
        client.xreadgroup(f"g{number}", "c", {key: ">"})
    view = StreamView(key, newest=5)
    wait_for(lambda: view.marks and all(each["held"] for each in view.marks["groups"]))
    still(view)
    assert view.marks["note"] == "2 more groups are not drawn."
    assert [each[0] for each in group(view, "g0")["held"]] == [f"1-{n}" for n in range(196, 201)]
    assert all(len(each) <= 60 for each in looks[-1][0][4:])


def test_a_reader_says_where_it_is(client, key) -> None:
    view = StreamView(key)
    assert view.cursor("loop", "$") == "0-0"  # there is nothing yet
    tell(client, key, "red green blue black")
    assert view.cursor("loop", "1-1") == "1-1"
    assert view.cursor("loop", "$") == "1-4"
    assert view.cursor("other", EntryID(1, 2)) == "1-2"
    wait_for(lambda: view.marks.get("readers") == [["loop", "1-4", [["1-1", "1-4"]]], ["other", "1-2", []]])
    tell(client, key, "white", 5)
    client.xdel(key, "1-5")
    assert view.cursor("loop", "$") == "1-5"  # as XREAD takes it: the ID, not the entry
    assert view.cursor("loop\ud800", "0") == "0-0"
    assert view.cursor("loop", "0") == "0-0"
    wait_for(lambda: view.marks["readers"][0] == ["loop", "0-0", []])  # it has begun again
    assert [name for name, *_ in view.marks["readers"]] == ["loop", "other", "loop\ufffd"]
    for wrong in ("", "+", "1-x", ">", "-1"):
        with pytest.raises(BadEntryID):
            view.cursor("loop", wrong)
    client.delete(key)
    client.set(key, "text")
    with pytest.raises(redis.RedisError):
        view.cursor("loop", "$")


def test_an_answer_view_is_a_reader(client) -> None:
    model = Model("one", " two")
    start(client, model, FAST)
    reading = AnswerView("a")
    view = StreamView(Answer("a", client=client), readers={"early": reading})
    wait_for(lambda: view.marks.get("readers") == [["early", "1-2", []]])
    model.end()
    settled(reading)
    wait_for(lambda: view.marks["readers"] == [["early", "1-3", []]])
    with pytest.raises(TypeError, match="cursor"):
        StreamView("x", readers={"early": "1-3"})  # type: ignore[dict-item]


# ------------------------------------------------------------------------------------------ how much it sends


@pytest.mark.slow
def test_nothing_is_sent_while_nothing_changes(client, key, looks) -> None:
    tell(client, key, "Once upon a time")
    client.xgroup_create(key, "g", id="0")
    client.xreadgroup("g", "c", {key: ">"}, count=2)  # idle times grow
    view = StreamView(key)
    view.cursor("loop", "1-1")
    wait_for(lambda: view.marks.get("readers") and group(view, "g")["held"])
    still(view)
    LOG.clear()
    seen = len(looks)
    wait_for(lambda: len(looks) > seen + 8)
    assert not LOG
    client.xadd(key, {"word": "there"}, id="1-5")
    wait_for(lambda: LOG)
    content = LOG[0][2]["content"]
    assert (content["added"], content["gone"]) == ([["1-5", "", "there", ""]], [])
    assert set(content["marks"]) == {"length", "last"}
    view.cursor("loop", "1-2")
    wait_for(lambda: len(LOG) > 1)
    content = LOG[1][2]["content"]
    assert (content["added"], set(content["marks"])) == ([], {"readers"})


def test_a_page_sees_what_the_kernel_sees_whatever_happens(client, key) -> None:
    view = StreamView(key, newest=6)
    for number in range(1, 60):
        client.xadd(key, {"n": number}, id=f"1-{number}", maxlen=10, approximate=False)
        if not number % 7:
            client.xdel(key, f"1-{number - 2}")
            there = [entry_id for entry_id, _ in client.xrange(key)]
            wait_for(lambda there=there: [entry[0] for entry in view.entries] == there[-6:])
            still(view)
            assert Page(view).shown == view.entries
            assert Page(view).marks == view.marks


def test_a_page_that_missed_a_message_is_told_everything(client, key) -> None:
    view = StreamView(key)
    for number, word in enumerate(("Once", "upon", "a"), 1):
        tell(client, key, word, number)
        wait_for(lambda word=word: words(view)[-1:] == [word])
        still(view)
    page = Page(view, skip=2)
    assert page.lacks
    seen = len(LOG)
    view._handle_msg({"content": {"data": {"method": "custom", "content": {"want": "all"}}}, "buffers": []})
    wait_for(lambda: len(LOG) > seen)
    page.take(LOG[-1][2])
    assert (page.lacks, page.shown, page.marks) == (False, view.entries, view.marks)


def test_views_of_one_client_share_a_round_trip(client, key, monkeypatch) -> None:
    trips: list[int] = []
    execute = redis.client.Pipeline.execute

    def noted(self: Any, **options: Any) -> Any:
        trips.append(len(self.command_stack))
        return execute(self, **options)

    tell(client, key, "Once")
    views = [StreamView(key) for _ in range(3)]
    wait_for(lambda: all(words(view) == ["Once"] for view in views))
    monkeypatch.setattr(redis.client.Pipeline, "execute", noted)
    wait_for(lambda: len(trips) > 4)
    assert set(trips[1:]) == {12}


def test_it_is_watched_until_it_is_closed(client, key) -> None:
    view = StreamView(key)
    wait_for(lambda: view.marks)
    assert view in hub._views
    view.close()
    wait_for(lambda: "llmstream views" not in threads())


def test_the_repr_is_the_same_at_every_run(client, key) -> None:
    view = StreamView(key)
    shown = view._repr_mimebundle_()[0]["text/plain"]
    assert shown == repr(view) == "<StreamView: run the cell to see the stream>"


# ------------------------------------------------------------------------------------------ what it survives


@pytest.mark.slow
def test_whatever_lies_there_is_told_as_short_text(client, key) -> None:
    hostile = [*INJECTIONS, "\x00\x1b[31m\x07", "\u202e x", "y" * 1_000_000, "🙂" * 5_000]
    view = StreamView(key, newest=60, colour="c")
    for number, text in enumerate(hostile, 1):
        client.xadd(key, {"text": text, "kind": text, "c": text, "ms": "x"}, id=f"1-{number}")
    client.xadd(key, {f"f{n}": n for n in range(10_000)}, id="2-0")
    client.xadd(key, {"x" * 1_000_000: "y" * 1_000_000, "": ""}, id="2-1")
    client.xadd(key, {b"\xff": b"\xed\xa0\x80\x00", "a": "<b>"}, id=f"{2**64 - 1}-{2**64 - 1}")
    client.xgroup_create(key, b"<b>\xff" + b"g" * 1000, id="0")
    client.xreadgroup(b"<b>\xff" + b"g" * 1000, "<i>\x00", {key: ">"}, count=1)
    wait_for(lambda: len(view.entries) == len(hostile) + 3 and view.marks["groups"][0]["pending"])
    still(view)
    told = dict(zip(hostile, words(view), strict=False))
    assert all(told[text] == text for text in INJECTIONS)
    assert told["y" * 1_000_000] == "y" * 1000 + "…"
    assert view.entries[-3][2].startswith("f0=0 f1=1 ") and len(view.entries[-3][2]) < 300
    assert len(view.entries[-2][2]) == 1001
    assert view.entries[-1][0] == f"{2**64 - 1}-{2**64 - 1}"
    sent = [json.dumps(data, allow_nan=False, ensure_ascii=False).encode() for *_, data in LOG]
    assert max(map(len, sent)) < 200_000
    assert Page(view).shown == view.entries


def test_large_entries_are_looked_at_less_often(client, key, looks, monkeypatch) -> None:
    monkeypatch.setattr(stream_view, "RATE", 1_000)
    client.xadd(key, {"text": "y" * 10_000}, id="1-1")
    view = StreamView(key)
    wait_for(lambda: view.entries)
    seen = len(looks)
    view.cursor("loop", "1-1")
    wait_for(lambda: len(looks) > seen + 3)
    assert [reply for views in looks[seen:] for reply in views] == [[]] * (len(looks) - seen)
    assert view.marks["readers"] == [["loop", "1-1", []]]  # readers move all the same


def test_a_key_of_another_type_is_said_and_may_become_right(client, key) -> None:
    client.rpush(key, "x")
    view = StreamView(key)
    wait_for(lambda: view.marks)
    assert view.marks["note"] == "The key holds a list, which is no stream."
    client.delete(key)
    tell(client, key, "Once")
    wait_for(lambda: words(view) == ["Once"])
    assert view.marks["note"] == ""


def test_one_view_that_can_t_be_read_harms_no_other(client, key, monkeypatch) -> None:
    learn = StreamView.learn

    def broken(self: StreamView, replies: list[Any]) -> None:
        if self.key == "bad":
            raise KeyError("hunter2")
        learn(self, replies)

    monkeypatch.setattr(StreamView, "learn", broken)
    good, bad = StreamView(key), StreamView("bad")
    tell(client, key, "Once")
    wait_for(lambda: words(good) == ["Once"] and bad.marks)
    assert "KeyError" in bad.marks["note"] and "hunter2" not in bad.marks["note"]


@pytest.mark.slow
def test_a_lost_redis_is_said_and_comes_back(program) -> None:
    with servers.RedisServer(program) as server:
        client = connection.connect(server.url, prefix="lost")
        tell(client, "story", "Once upon")
        view = StreamView("story", client=client)
        wait_for(lambda: len(view.entries) == 2)
        server.kill()
        wait_for(lambda: view.marks["note"] == "Redis is away, trying again.")
        assert words(view) == ["Once", "upon"]
        server.wipe()
        tell(client, "story", "There")
        wait_for(lambda: words(view) == ["There"])
        assert view.marks["note"] == ""
