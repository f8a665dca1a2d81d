"""Turns, messages and parameters: what the model is told, over real HTTP, and what is refused before it costs anything."""

from __future__ import annotations

import io
import json
import logging
import threading
from contextlib import suppress

import pytest
import redis
from fastapi.testclient import TestClient

from llmstream_nb.answers import turns
from llmstream_nb.answers.ask import Answer, ask, ask_without_stream, clear
from llmstream_nb.answers.connection import RedisUnusable, names_of
from llmstream_nb.answers.record import new_record, register
from llmstream_nb.answers.turns import MAX_SAID, MAX_TURNS, said_before
from llmstream_nb.llm import scripted
from llmstream_nb.llm.messages import MAX_REQUEST
from llmstream_nb.llm.own import OwnSource
from llmstream_nb.llm.sources import complete, deltas_of
from llmstream_nb.pool.queue import enqueue
from llmstream_nb.pool.worker import Worker
from llmstream_nb.protocol.wire import BadAnswerId, BadQuestion, BrokenChain, Timing
from llmstream_nb.web import create_app

from .conftest import FAST
from .model import Model, record_of, wait_for
from .model import start as produce

pytestmark = pytest.mark.slow

SYSTEM = "You answer questions. Be correct, brief and plain; if you don't know, say so."
ABOUT = "You are an expert in answering questions about tea. Be correct, brief and plain; if you don't know, say so."
QUICK = "scripted:pace=0,long="  # and so many words


@pytest.fixture
def heard(monkeypatch) -> list[dict]:
    """What the scripted endpoint has received, request by request."""
    requests, do_post = [], scripted._Handler.do_POST

    def noting(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        requests.append(json.loads(body))
        self.rfile = io.BytesIO(body)
        do_post(self)

    monkeypatch.setattr(scripted._Handler, "do_POST", noting)
    return requests


@pytest.fixture
def worker(client):
    """Starts a worker; it ends with the test."""
    started = []

    def start(**options) -> Worker:
        started.append(Worker(client=client, timing=FAST, **options).start())
        return started[-1]

    yield start
    for one in started:
        one.stop(within=1)


def put(question: str | None, words: int = 1, asks=ask, **options) -> Answer:
    return asks(question, timing=FAST, **{"model": f"{QUICK}{words}", "source": "scripted"} | options)


def record_at_end(answer: Answer) -> dict:
    """The record once it tells the end, which a worker writes after the stream's."""
    answer.wait(60)
    wait_for(lambda: "end" in answer.record)
    return answer.record


def said(request: dict) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in request["messages"]]


def written(client, answer_id: str, text: str | None = "so", **fields) -> str:
    """Put an ended answer into Redis, by hand."""
    record = new_record(answer_id, f"{answer_id}?", None, "", "") | fields
    register(client, record, FAST)
    keys = names_of(client).answer(answer_id)
    client.set(keys.question, json.dumps(record | {"text": text, "end": "1-2", "reason": "stop"}))
    return answer_id


# ------------------------------------------------------------------------------------------ turns


def test_the_model_is_told_all_turns_from_the_first_on(client, heard):
    first = put("What?", 1, topic="tea").wait(60)
    second = put("And why?", 2, follows=first).wait(60)
    third = put("Since when?", 3, follows=second.id).wait(60)
    assert said(heard[2]) == [
        ("system", ABOUT),
        ("user", "What?"),
        ("assistant", "0 "),
        ("user", "And why?"),
        ("assistant", "0 1 "),
        ("user", "Since when?"),
    ]
    assert (third.text, third.record["follows"], third.record["topic"]) == ("0 1 2 ", second.id, "tea")
    assert third.record["follows_nonce"] == second.record["nonce"]
    assert "follows" not in first.record and "request" not in third.record
    fourth = put("And coffee?", follows=third, topic="coffee").wait(60)
    assert "about coffee" in said(heard[3])[0][1] and fourth.record["topic"] == "coffee"


def test_a_worker_tells_them_too(client, heard, worker):
    first = put("What?", topic="tea").wait(60)
    second = put("And why?", asks=enqueue, follows=first)
    assert second.status == "queued"
    worker()
    second.wait(60)
    assert said(heard[1]) == [("system", ABOUT), ("user", "What?"), ("assistant", "0 "), ("user", "And why?")]
    assert second.record["follows"] == first.id


def test_one_that_was_stopped_or_has_failed_counts_with_its_text(client, heard):
    produced = produce(client, model := Model("Half a "), FAST, "stopped", "What?")
    wait_for(lambda: Answer("stopped", timing=FAST).text)
    assert Answer("stopped", timing=FAST).stop() == "ended" and produced.done.wait(60)
    model = Model("It was")
    produce(client, model, FAST, "failed", "And then?")
    model.break_off(OSError("no"))
    Answer("failed", timing=FAST).wait(60)
    for name, text in (("stopped", "Half a "), ("failed", "It was")):
        put("Go on", follows=name).wait(60)
        assert said(heard[-1])[2:] == [("assistant", text), ("user", "Go on")]


@pytest.mark.parametrize("asks", [ask, enqueue])
def test_what_can_not_be_followed_is_refused_before_anything_is_written(client, asks):
    produce(client, model := Model("so"), FAST, "open")
    wait_for(lambda: Answer("open", timing=FAST).text)
    produce(client, Model(end=True), FAST, "mute").done.wait(60)
    enqueue("why?", id="queued", timing=FAST)
    for follows, words in {
        "never": "never asked, cleared, or expired",
        "open": "has not ended: wait for it",
        "queued": "has not ended: wait for it",
        "mute": "without a text",
        "new": "another id",
    }.items():
        with pytest.raises(BrokenChain, match=words):
            put("And?", asks=asks, follows=follows, id="new")
        assert not client.exists(names_of(client).answer("new").question)
    with pytest.raises(BadAnswerId):
        put("And?", asks=asks, follows="a b")
    assert client.xlen(names_of(client).questions) == 1
    model.end()
    Answer("open", timing=FAST).wait(60)
    if asks is ask:
        put("And?", follows="open", id="new").wait(60)


def test_an_end_that_the_record_does_not_tell_yet_counts(client, heard):
    produce(client, Model("so", end=True), FAST, "a").done.wait(60)
    record = record_of(client)
    told = {name: record[name] for name in ("id", "question", "topic", "asked", "nonce", "first", "attempt")}
    client.set(names_of(client).answer("a").question, json.dumps(told))
    put("And?", follows="a").wait(60)
    assert said(heard[0])[1:] == [("user", "why?"), ("assistant", "so"), ("user", "And?")]


def test_an_id_that_was_used_again_is_another_answer(client, heard):
    put("What?", id="one").wait(60)
    put("And?", id="two", follows="one").wait(60)
    put("Else?", id="one", replace=True).wait(60)
    with pytest.raises(BrokenChain, match="'one' is another answer"):
        put("And then?", follows="two")
    clear("one")
    with pytest.raises(BrokenChain, match="there is no answer 'one'"):
        put("And then?", follows="two")
    with pytest.raises(BrokenChain, match="another id"):  # it would delete what it follows
        put("And then?", id="two", follows="two", replace=True)
    assert Answer("two").text == "0 "


def test_a_notebooks_cells_run_twice(client, heard):
    for _ in range(2):
        first = put("What?", id="one", replace=True).wait(60)
        put("And?", id="two", follows=first, replace=True).wait(60)
        assert said(heard[-1])[1:] == [("user", "What?"), ("assistant", "0 "), ("user", "And?")]


@pytest.mark.parametrize("change", ["cleared", "asked anew", "expired"])
def test_a_worker_that_finds_the_chain_broken_says_so_in_the_answer(client, worker, heard, change):
    put("What?", id="one").wait(60)
    answer = put("And?", asks=enqueue, follows="one")
    if change == "expired":
        client.delete(names_of(client).answer("one").question, names_of(client).answer("one").chunks)
    else:
        clear("one")
    if change == "asked anew":
        put("Else?", id="one").wait(60)
    requests = len(heard)
    worker()
    record = record_at_end(answer)
    assert record["error"] == "BrokenChain" and "'one'" in record["message"]
    wait_for(lambda: not client.xlen(names_of(client).questions))
    assert len(heard) == requests


def test_a_worker_waits_for_a_redis_that_went_away_while_it_read_the_turns(client, worker, heard, monkeypatch):
    """A question is not to blame for that, and not given up."""
    put("What?", id="one").wait(60)
    answer, gone = put("And?", asks=enqueue, follows="one"), []

    def gone_once(answer_id, of):
        if not gone:
            gone.append(answer_id)
            try:
                raise redis.ConnectionError("gone")
            except redis.ConnectionError as error:
                raise turns.unusable(error, of) from None
        return ended(answer_id, of)

    ended = turns._ended
    monkeypatch.setattr(turns, "_ended", gone_once)
    worker()
    assert record_at_end(answer)["reason"] == "stop" and gone


def test_no_question_is_told_with_the_answer_of_another_that_takes_its_id(client):
    """One thread asks under the same id again and again; what another then tells a model belongs together."""

    def asking():
        for number in range(15):
            clear("one", timing=FAST)
            produce(client, Model(f"{number}", end=True), FAST, "one", f"{number}").done.wait(60)

    thread, told = threading.Thread(target=asking), set()
    thread.start()
    while thread.is_alive():
        with suppress(BrokenChain):
            question, answer = said_before({"id": "two", "question": "And?", "topic": "", "follows": "one"}, client)[
                "turns"
            ]
            told.add((question["content"], answer["content"]))
    assert told and all(question == answer for question, answer in told)


def test_the_record_and_the_text_are_of_one_question(client, monkeypatch):
    """It is cleared and asked anew just after its end was read from the stream."""
    produce(client, Model("old", end=True), FAST, "one", "old?").done.wait(60)
    keys, look = names_of(client).answer("one"), turns.look
    record = record_of(client, "one")
    client.set(keys.question, json.dumps({name: record[name] for name in record if name not in ("end", "text")}))

    def late(answer_id, of):
        found = look(answer_id, of)
        return found._replace(record=found.record | {"question": "new?", "nonce": "another"})

    monkeypatch.setattr(turns, "look", late)
    with pytest.raises(BrokenChain, match="cleared"):
        put("And?", follows="one")


def test_expired_turns_are_gone(client, heard):
    short = Timing(lease=0.2, tick=0.05, ttl=0.3, patience=2.0)
    ask("What?", id="one", source="scripted", model=f"{QUICK}1", timing=short).wait(60)
    wait_for(lambda: Answer("one").status == "missing")
    with pytest.raises(BrokenChain, match="expired"):
        put("And?", follows="one")


def test_hand_written_chains_end(client, heard):
    written(client, "a", follows="c")
    written(client, "b", follows="a")
    written(client, "c", follows="b")
    for odd, value in {"d": 7, "e": ["a"], "f": "no id!", "g": {"a": 1}}.items():
        written(client, odd, follows=value)
    written(client, "h", text=None)
    written(client, "i", request="[")
    written(client, "j", request=json.dumps({"messages": [7]}))
    written(client, "k", question=7)
    client.rpush(names_of(client).answer("l").question, "no string")
    for follows in "abcdefghijkl":
        with pytest.raises((BrokenChain, BadQuestion, RedisUnusable)):
            put("And?", follows=follows)
    with pytest.raises(BrokenChain, match="follow itself"):
        put("And?", follows="c")
    assert not heard


def test_a_poisoned_record_ends_its_own_answer_and_not_the_worker(client, worker, heard):
    client.rpush(names_of(client).answer("l").question, "no string")
    answers = []
    for name, fields in {
        "a": {"follows": "a"},
        "b": {"follows": ["x"]},
        "c": {"follows": "l"},
        "d": {"request": "["},
        "e": {"request": 7},
        "f": {"request": json.dumps({"params": {"stream": False}})},
        "g": {"request": json.dumps({"messages": []})},
    }.items():
        record = new_record(name, "why?", None, "scripted", f"{QUICK}1") | {"pooled": True} | fields
        register(client, record, FAST)
        client.xadd(names_of(client).questions, {"answer": name, "nonce": record["nonce"]})
        answers.append(Answer(name, timing=FAST))
    at_work = worker()
    good = put("why?", asks=enqueue)
    assert record_at_end(good)["reason"] == "stop"
    assert {record_at_end(answer)["error"] for answer in answers} == {"BrokenChain", "BadQuestion", "RedisUnusable"}
    assert not heard[1:] and at_work.error is None


def test_a_chain_has_its_limits(client, heard):
    before = None
    for number in range(MAX_TURNS + 1):
        before = written(client, f"a{number}", **({"follows": before} if before else {}))
    with pytest.raises(BrokenChain, match=f"more than {MAX_TURNS} turns"):
        put("And?", follows=before)
    put("And?", follows=f"a{MAX_TURNS - 1}").wait(60)
    assert len(heard[0]["messages"]) == 1 + 2 * MAX_TURNS + 1
    question = "x" * 100
    size = MAX_SAID - 100 - len("b?")
    put(question, follows=written(client, "b", "x" * size)).wait(60)
    with pytest.raises(BrokenChain, match="more than 400,000 characters"):
        put(question + "x", follows="b")
    with pytest.raises(BrokenChain, match="more than 400,000 characters"):
        put("x", follows=written(client, "c", "x" * size, follows="b"))


# -------------------------------------------------------------------------- messages and parameters

PARTS = [{"type": "text", "text": "What is"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
PARTS += [{"type": "text", "text": "on it?"}]
MESSAGES = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": PARTS},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "see"}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "a cup"},
]
PARAMS = {"temperature": 0, "max_tokens": 9, "tools": [{"type": "function", "function": {"name": "see"}}], "top_k": 3}


@pytest.mark.parametrize("asks", [ask, ask_without_stream, enqueue])
def test_messages_and_parameters_come_to_the_endpoint_as_they_are(client, heard, worker, asks):
    if asks is enqueue:
        worker()
    answer = put(None, asks=asks, messages=MESSAGES, params=PARAMS).wait(60)
    assert heard[0]["messages"] == MESSAGES
    assert {name: heard[0][name] for name in PARAMS} == PARAMS
    assert heard[0]["model"] == f"{QUICK}1" and heard[0]["stream"] is (asks is not ask_without_stream)
    assert answer.record["question"] == "What is\non it?"
    assert json.loads(answer.record["request"]) == {"messages": MESSAGES, "params": PARAMS}
    put("And?", follows=answer).wait(60)
    assert heard[1]["messages"] == [
        *MESSAGES,
        {"role": "assistant", "content": "0 "},
        {"role": "user", "content": "And?"},
    ]
    assert "temperature" not in heard[1]


def test_complete_takes_them_too(heard):
    text = "".join(complete(messages=MESSAGES, params=PARAMS, source="scripted", model=f"{QUICK}2"))
    assert text == "0 1 " and heard[0]["messages"] == MESSAGES and heard[0]["top_k"] == 3
    list(complete("Why?", params={"seed": 1}, source="scripted", model=f"{QUICK}1"))
    assert said(heard[1]) == [("system", SYSTEM), ("user", "Why?")] and heard[1]["seed"] == 1
    for wrong, options in ((TypeError, {"topic": "tea"}), (BadQuestion, {"params": {"n": 2}})):
        with pytest.raises(wrong):
            complete(messages=MESSAGES, **options)


def test_a_questions_parameters_come_before_the_workers_own(client, heard, worker):
    worker(params={"temperature": 1, "seed": 7})
    put("Why?", asks=enqueue, params={"temperature": 0}).wait(60)
    put("Why?", asks=enqueue).wait(60)
    assert [(request["temperature"], request["seed"]) for request in heard] == [(0, 7), (1, 7)]
    with pytest.raises(BadQuestion, match="model"):
        Worker(client=client, params={"model": "x"})


WRONG = {
    "a reserved name": (ValueError, "stream, n:", {"params": {"stream": False, "n": 2, "seed": 1}}),
    "the client's own": (ValueError, "extra_headers", {"params": {"extra_headers": {"a": "b"}}}),
    "no JSON": (TypeError, "JSON", {"params": {"seed": {1, 2}}}),
    "no number": (TypeError, "JSON", {"params": {"temperature": float("nan")}}),
    "no dict": (ValueError, "dict", {"params": ["temperature"]}),
    "too long": (BadQuestion, "1,000,000", {"params": {"stop": "x" * MAX_REQUEST}}),
    "a question beside": (TypeError, "in place of", {"messages": MESSAGES, "question": "Why?"}),
    "a topic beside": (TypeError, "in place of", {"messages": MESSAGES, "topic": "tea"}),
    "follows beside": (TypeError, "in place of", {"messages": MESSAGES, "follows": "a"}),
    "no messages": (BadQuestion, "not empty", {"messages": []}),
    "one message": (BadQuestion, "list of dicts", {"messages": MESSAGES[0]}),
    "texts": (BadQuestion, "list of dicts", {"messages": ["Why?"]}),
    "nobody asks": (BadQuestion, "a user's", {"messages": MESSAGES[:1]}),
    "no text": (BadQuestion, "a user's", {"messages": [{"role": "user", "content": PARTS[1:2]}]}),
    "nothing": (BadQuestion, "empty", {}),
}


@pytest.mark.parametrize("asks", [ask, enqueue])
@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("backend", ["fake"], indirect=True)
def test_what_can_not_be_asked_is_refused_at_once(client, asks, name):
    error, words, options = WRONG[name]
    with pytest.raises(error, match=words):
        asks(source="scripted", id="new", **options)
    assert not client.keys(f"{names_of(client).prefix}*")


@pytest.mark.parametrize("backend", ["fake"], indirect=True)
def test_halves_of_surrogate_pairs_and_long_questions_do_no_harm(client, heard):
    long = [{"role": "user", "content": "\ud83d" + "x" * 30_000}]
    answer = put(None, messages=long, params={"stop": "\udc00"}).wait(60)
    assert heard[0]["messages"][0]["content"] == "\ufffd" + "x" * 30_000 and heard[0]["stop"] == "\ufffd"
    assert len(answer.record["question"]) == 20_000


@pytest.mark.parametrize("backend", ["fake"], indirect=True)
def test_nothing_of_them_is_logged_or_told_to_viewers(client, heard, caplog):
    caplog.set_level(logging.DEBUG, "llmstream_nb")
    secret = [{"role": "user", "content": "Why? s3cret"}]
    answer = put(None, messages=secret, params={"user": "s3cret"}, model="scripted:status=400").wait(60)
    assert answer.status == "failed" and answer.record["error"] == "BadRequest"
    assert "s3cret" not in caplog.text
    from llmstream_nb.protocol.events import told

    assert "request" in answer.record and "request" not in told(answer.record)


def test_a_source_of_ones_own_is_given_them():
    given = [{"role": "user", "content": "Why?"}]
    told = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "So."}]

    def own(question, topic, messages):
        return "so"

    for options, messages in (({}, given), ({"turns": told}, [*told, *given]), ({"messages": MESSAGES}, MESSAGES)):
        source, _ = deltas_of("Why?", "tea", own, None, **options)
        assert isinstance(source, OwnSource) and source._named == {"messages": messages}


def test_an_endpoint_that_takes_no_system_role_is_told_all_turns_all_the_same():
    from llmstream_nb.llm.completion import _Request

    told = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    request = _Request.__new__(_Request)
    request.request = {"messages": [{"role": "system", "content": "Be brief."}, *told]}
    assert request.reduce("system role not supported")
    assert request.request["messages"] == [{"role": "user", "content": "Be brief.\n\nuser"}, *told[1:]]
    assert not request.reduce("system role not supported")


# ------------------------------------------------------------------------------------------ doors


@pytest.mark.parametrize("pool", [False, True])
def test_a_page_asks_on_from_what_it_may_read_all_turns_of_it(client, heard, worker, pool):
    """Ann's turns are hers, also where Bob may read what followed them: the model would tell."""
    worker()

    def authorize(request, answer_id, action):
        request.state.owner = request.headers.get("user")
        return not answer_id or Answer(answer_id).record.get("owner") in (request.state.owner, "all")

    written(client, "hers", owner="ann")
    written(client, "shared", owner="all", follows="hers")
    app = create_app(client, timing=FAST, pool=pool, authorize=authorize, models={"scripted": [f"{QUICK}1"]})
    with TestClient(app) as browser:
        body = {"question": "And?", "source": "scripted", "model": f"{QUICK}1"}
        for user, follows, status in (
            ("ann", "shared", 201),
            ("ann", "hers", 201),
            ("bob", "shared", 403),
            ("bob", "hers", 403),
            ("bob", "none", 403),
            ("ann", "a b", 422),
        ):
            reply = browser.post("/answers", json=body | {"follows": follows}, headers={"user": user})
            assert reply.status_code == status, (user, follows, reply.text)
            if status == 201:
                record_at_end(Answer(reply.json()["id"]))
        put("mine", id="mine", owner="bob").wait(60)
        assert browser.post("/answers", json=body | {"follows": "mine"}, headers={"user": "bob"}).status_code == 201
        produce(client, model := Model("so"), FAST, "open")
        wait_for(lambda: Answer("open").text)
    assert said(heard[0])[1:] == [
        ("user", "hers?"),
        ("assistant", "so"),
        ("user", "shared?"),
        ("assistant", "so"),
        ("user", "And?"),
    ]
    with TestClient(create_app(client, timing=FAST, pool=pool, hosts=["testserver"])) as browser:
        for follows in ("open", "none"):
            reply = browser.post("/answers", json={"question": "And?", "follows": follows})
            assert (reply.status_code, reply.json()["error"]) == (422, "BrokenChain")
    model.end()


@pytest.mark.parametrize("backend", ["fake"], indirect=True)
def test_the_command_line_asks_on(client, heard, capsys):
    from llmstream_nb.setup import cli

    put("What?", id="one").wait(60)
    asked_with = ["ask", "And?", "--follows", "one", "--source", "scripted", "--model", f"{QUICK}1"]
    assert cli._ask(cli.parser().parse_args(asked_with)) == 0
    assert "0" in capsys.readouterr().out
    assert said(heard[1])[1:] == [("user", "What?"), ("assistant", "0 "), ("user", "And?")]


@pytest.mark.parametrize("asks", [ask, enqueue])
def test_a_handle_follows_its_own_answer_alone(client, asks, worker):
    worker()
    handle = asks("What?", source="scripted", model=f"{QUICK}2", id="first").wait(10)
    ask("Something else?", source="scripted", model=f"{QUICK}3", id="first", replace=True).wait(10)
    with pytest.raises(BrokenChain, match="another answer by now"):
        ask("Why?", follows=handle, source="scripted", model=f"{QUICK}1")
    assert ask("Why?", follows="first", source="scripted", model=f"{QUICK}1").wait(10).status == "ended"
