"""The agent of notebook 09, as its cells have it: whatever a model calls, whoever approves, and whenever it is ended."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest

from llmstream_nb import Answer, Reasoning, Text, Timing, ToolCall, ToolResult, Worker, ask, clear, enqueue, read_answer
from llmstream_nb.llm import prepared, scripted
from llmstream_nb.protocol.events import Event

from .model import wait_for
from .versions import chosen

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "09-an-agents-answer.ipynb"
# The cells that define something, by a word of each.
CELLS = ["connect(", "def lay_orders", "class NotAllowed", "def run", "def described", "def agent", "def approved"]
CELLS += ["def place_order"]
SALES, WIPE, KEEP, ORDER = prepared.agent_questions()
ANSWER = {"id": "a", "replace": True}

pytestmark = pytest.mark.usefixtures("no_leftovers")


def cells() -> dict[str, Any]:
    """What stands in the notebook's namespace when the cells that define something have run."""
    sources = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    namespace: dict[str, Any] = {}
    for word in CELLS:
        [source] = [source for source in sources if word in source]
        exec(compile(source, word, "exec", dont_inherit=True), namespace)
    return namespace


@pytest.fixture(params=["fake", *chosen()])
def backend(request) -> str:
    """The fake, and one real server, which differs from run to run."""
    return request.param


@pytest.fixture
def cafe(backend, request, monkeypatch) -> Iterator[SimpleNamespace]:
    """The notebook's names, on each of these."""
    if backend != "fake":
        url = request.getfixturevalue("fake_tcp" if backend == "fake-tcp" else "real_servers")
        monkeypatch.setenv("REDIS_URL", url if isinstance(url, str) else url[backend].url)
    namespace = cells()
    yield SimpleNamespace(**{"space": namespace} | namespace)
    clear()
    namespace["redis"].delete("nb09:orders", "nb09:approvals")
    namespace["redis"].close()


class Says:
    """A model that says these turns, one a request, the last again and again; it notes the messages it was sent.

    A turn is a text, or a list of pieces of calls: index, id, name and arguments.
    """

    def __init__(self, *turns: str | list[tuple[int, str | None, str | None, str]]) -> None:
        self.turns, self.asked = turns, list[list[dict[str, Any]]]()
        self.chat = SimpleNamespace(completions=self)

    def create(self, *, messages: list[dict[str, Any]], **_: Any) -> Any:
        turn = self.turns[min(len(self.asked), len(self.turns) - 1)]
        self.asked.append(json.loads(json.dumps(messages)))
        return nullcontext(self._chunks(turn))

    def _chunks(self, turn: str | list[tuple[int, str | None, str | None, str]]) -> Iterator[Any]:
        if isinstance(turn, str):
            yield self._chunk(content=turn)
        else:
            for index, call_id, name, arguments in turn:
                function = SimpleNamespace(name=name, arguments=arguments)
                yield self._chunk(tool_calls=[SimpleNamespace(index=index, id=call_id, function=function)])
        yield SimpleNamespace(choices=[])  # as the one with the usage

    @staticmethod
    def _chunk(**delta: Any) -> Any:
        delta = {"content": None, "tool_calls": None} | delta
        return SimpleNamespace(choices=[SimpleNamespace(delta=SimpleNamespace(**delta))])

    @property
    def results(self) -> list[str]:
        """What it was sent as results, in its last request."""
        return [message["content"] for message in self.asked[-1] if message["role"] == "tool"]


def calls(name: str, arguments: str = "{}") -> list[tuple[int, str | None, str | None, str]]:
    return [(0, "call_1", name, arguments)]


def parts(answer: Answer, *kinds: type) -> list[Any]:
    return [part for part in answer.parts if isinstance(part, kinds)]


def hears(answer: Answer, kind: type) -> Event:
    """Wait for the first event of this class."""
    return next(event for event in read_answer(answer.id) if isinstance(event, kind))


# ------------------------------------------------------------------------------------------ the scripted model


def test_the_scripted_model_tells_what_the_tools_gave_back(cafe) -> None:
    cafe.redis.xadd(cafe.ORDERS, {"drink": "tea", "euro": 2.8})  # so that no prepared number fits
    answer = ask(SALES, source=cafe.agent, **ANSWER).wait(60)
    assert [part.kind for part in answer.parts] == ["reasoning", "call", "result"] * 2 + ["reasoning", "text"]
    assert [call.name for call in parts(answer, ToolCall)] == ["redis_read", "orders_by"]
    assert [result.content for result in parts(answer, ToolResult)] == ["13", "espresso 6, tea 5, cortado 2"]
    assert answer.text == "There are **13 orders**. The table counts, by drink: espresso 6, tea 5, cortado 2."
    ids = [part.call_id for part in parts(answer, ToolCall, ToolResult)]
    assert ids[0] == ids[1] != ids[2] == ids[3]


def test_the_scripted_model_tells_what_went_wrong(cafe) -> None:
    answer = ask(WIPE, source=cafe.agent, **ANSWER).wait(60)
    [result] = parts(answer, ToolResult)
    assert result.error == "FLUSHALL is not one of XLEN, XRANGE, TYPE, TTL"
    assert result.error in answer.text and answer.record["reason"] == "stop"
    assert cafe.redis.xlen(cafe.ORDERS) == 12


def says(question: str, tools: list[str] | None = None, *results: str, model: str = "scripted:pace=0") -> Any:
    """The scripted model's choice, in one piece."""
    from openai import OpenAI

    messages: list[Any] = [{"role": "user", "content": question}]
    for result in results:
        messages += [{"role": "assistant"}, {"role": "tool", "tool_call_id": "x", "content": result}]
    offered: Any = [{"type": "function", "function": {"name": name}} for name in tools or ()]
    with OpenAI(base_url=scripted.server().url, api_key=scripted.server().key) as client:
        options = {"tools": offered} if offered else {}
        return client.chat.completions.create(model=model, messages=messages, **options).choices[0]


def test_the_scripted_model_calls_only_what_is_offered() -> None:
    call = says(SALES, ["redis_read"])
    assert call.finish_reason == "tool_calls" and call.message.reasoning_content
    assert json.loads(call.message.tool_calls[0].function.arguments) == {"command": "XLEN", "key": "orders"}
    missing = says(SALES, ["redis_read"], "12")
    assert missing.finish_reason == "stop" and "`orders_by`" in missing.message.content
    assert not missing.message.tool_calls
    assert says("What is Redis?", ["redis_read"]).message.content == prepared.reply("What is Redis?")
    assert "scripted source" in says(SALES).message.content  # nothing is offered, so nothing can be known
    assert says(SALES, ["shell"], "{0} {1}").message.content.count("`orders_by`") == 1


def test_the_scripted_model_thinks_aloud_and_refuses() -> None:
    thinks = says("What is Redis?", model="scripted:pace=0,reason=5").message
    assert len(thinks.reasoning_content.split()) == 5 and thinks.content == prepared.reply("What is Redis?")
    refuses = says("What is Redis?", model="scripted:pace=0,refuse,reason").message
    assert refuses.refusal == prepared.refusal() and refuses.content == "" and refuses.reasoning_content
    assert says("What is Redis?", model="scripted:pace=0,reason=40,length=10").finish_reason == "length"


# ------------------------------------------------------------------------------------- whatever a model calls


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("redis_read", '{"command": "XLEN", "key', "JSONDecodeError"),
        ("redis_read", "[" * 100_000, "RecursionError"),
        ("redis_read", "null", "TypeError"),
        ("redis_read", '{"command": ["XLEN"], "key": "orders"}', "TypeError"),
        ("redis_read", '{"command": "XLEN", "key": "orders", "more": 1}', "TypeError"),
        ("redis_read", '{"command": "xlen", "key": "orders"}', "xlen is not one of XLEN, XRANGE, TYPE, TTL"),
        ("redis_read", '{"command": "EVAL", "key": "orders"}', "EVAL is not one of XLEN, XRANGE, TYPE, TTL"),
        ("redis_read", '{"command": "XLEN", "key": "text"}', "ResponseError"),
        ("orders_by", '{"column": "__class__", "how": "sum"}', "column is drink or euro; how is count, sum or mean"),
        ("orders_by", '{"column": "drink", "how": "eval"}', "column is drink or euro; how is count, sum or mean"),
        ("keep_newest", '{"key": "approvals", "count": 0}', "nobody approved it"),
        ("shell", '{"command": "ls"}', "there is no tool 'shell'"),
        ("", "", "there is no tool ''"),
        ("secretive", "{}", "RuntimeError"),
        ("exits", "{}", "SystemExit"),
    ],
)
def test_a_call_that_fails_is_an_error_that_the_model_gets(cafe, name, arguments, error) -> None:
    def secretive() -> None:
        raise RuntimeError("the password is hunter2")

    model = Says(calls(name, arguments), "So be it.")
    cafe.space.update(model=model, PATIENCE=0)
    cafe.space["described"] = lambda tool: None  # these two have no signature to describe
    cafe.TOOLS.update(secretive=secretive, exits=sys.exit)
    cafe.redis.set("nb09:text", "no stream", ex=60)
    answer = ask("Try!", source=cafe.agent, **ANSWER).wait(60)
    [call], [result] = parts(answer, ToolCall), parts(answer, ToolResult)
    assert (call.name, call.arguments) == (name, arguments)
    backends_differ = error == "ResponseError" and cafe.redis.xlen(cafe.ORDERS) == 12
    assert result.error == error or (backends_differ and result.error in ("AttributeError", "ResponseError"))
    assert result.call_id == call.call_id and not result.content
    assert (answer.text, answer.record["reason"]) == ("So be it.", "stop")
    assert model.results == [f"error: {result.error}"]
    assert "hunter2" not in "".join(map(str, cafe.redis.xrange("nb09:{a}:chunks"))) + json.dumps(model.asked)


def test_no_key_outside_the_notebook_can_be_read(cafe) -> None:
    cafe.redis.set("secret", "hunter2", ex=60)
    for key in ("secret", "../secret", "*", "nb09:orders", "x secret"):
        made = cafe.run(ToolCall("x", "redis_read", json.dumps({"command": "TYPE", "key": key})))
        assert made.content == "none"


def test_a_large_result_is_cut_and_says_so(cafe) -> None:
    page = "<script>alert(1)</script>" + "x" * 5_000_000
    model = Says(calls("page"), "Long.")
    cafe.space.update(model=model, described=lambda tool: None)
    cafe.TOOLS["page"] = lambda: page
    answer = ask("Read it!", source=cafe.agent, **ANSWER).wait(60)
    [result] = parts(answer, ToolResult)
    assert result.content == page[:1_000_000] and result.cut == len(page) - 1_000_000
    assert model.results == [page[:10_000]] and answer.text == "Long."


def test_calls_in_pieces_that_mix_and_have_the_same_id(cafe) -> None:
    pieces = [(0, "call_1", "redis_read", '{"command": '), (1, "call_1", "orders_by", "{"), (0, None, None, '"XLEN", ')]
    pieces += [(1, None, None, '"column": "drink", "how": "mean"}'), (0, None, None, '"key": "orders"}')]
    cafe.space["model"] = Says(pieces, "Both.")
    answer = ask("Both!", source=cafe.agent, **ANSWER).wait(60)
    one, twelve, two, means = parts(answer, ToolCall, ToolResult)
    assert (twelve.content, means.content) == ("12", "cortado 3.2, tea 2.8, espresso 2.4")
    assert one.call_id == twelve.call_id != two.call_id == means.call_id


def test_a_model_that_calls_for_ever_is_ended(cafe) -> None:
    cafe.space["model"] = model = Says(calls("orders_by", '{"column": "drink", "how": "sum"}'))
    answer = ask("Go on!", source=cafe.agent, **ANSWER).wait(60)
    assert answer.status == "failed" and len(model.asked) == 8 == len(parts(answer, ToolResult))


def test_who_joins_in_the_middle_has_all_parts(cafe) -> None:
    answer = ask(SALES, source=cafe.agent, **ANSWER)
    hears(answer, ToolResult)
    late = [event for event in read_answer("a") if isinstance(event, (Reasoning, Text, ToolCall, ToolResult))]
    assert [(event.kind, event.text) for event in late if isinstance(event, (ToolCall, ToolResult))] == [
        (part.kind, part.text) for part in parts(answer, ToolCall, ToolResult)
    ]
    assert "".join(event.text for event in late if isinstance(event, Text)) == answer.text


# -------------------------------------------------------------------------------------------------- approvals


def asked_to_keep(cafe, patience: float = 20) -> tuple[Answer, ToolCall]:
    """An answer whose call waits for an approval."""
    cafe.space["PATIENCE"] = patience
    answer = ask(KEEP, source=cafe.agent, **ANSWER)
    call = hears(answer, ToolCall)
    assert isinstance(call, ToolCall) and call.name == "keep_newest"
    return answer, call


def test_an_approved_call_is_run_once_however_often_it_is_approved(cafe) -> None:
    answer, call = asked_to_keep(cafe)
    assert cafe.redis.xlen(cafe.ORDERS) == 12
    for _ in range(3):
        cafe.approve(call)
    assert answer.wait(60).text == "The tool says: 7 entries removed. The stream has 5 entries now."
    cafe.approve(call)
    assert len(parts(answer, ToolCall)) == 2 and cafe.redis.xlen(cafe.ORDERS) == 5


@pytest.mark.parametrize("other", [None, "call_1", "", "*"])
def test_a_call_that_nobody_approves_is_not_run(cafe, other) -> None:
    answer, _ = asked_to_keep(cafe, 0.5)
    if other is not None:
        cafe.approve(ToolCall(other, "keep_newest"))
        cafe.redis.xadd(cafe.APPROVALS, {"call_id": other})
    answer.wait(60)
    assert parts(answer, ToolResult)[0].error == "nobody approved it" and cafe.redis.xlen(cafe.ORDERS) == 12


def test_an_approval_is_not_good_for_the_same_call_of_another_answer(cafe) -> None:
    answer, call = asked_to_keep(cafe)
    cafe.approve(call)
    answer.wait(60)
    cafe.lay_orders()
    again, other = asked_to_keep(cafe, 0.5)
    assert other.arguments == call.arguments and other.call_id != call.call_id
    again.wait(60)
    assert parts(again, ToolResult)[0].error == "nobody approved it" and cafe.redis.xlen(cafe.ORDERS) == 12


def test_what_was_stopped_before_it_was_approved_is_not_run(cafe) -> None:
    answer, call = asked_to_keep(cafe)
    assert answer.stop() == "ended"
    cafe.approve(call)
    wait_for(lambda: not [t for t in threading.enumerate() if t.name.startswith("llmstream model")])
    assert cafe.redis.xlen(cafe.ORDERS) == 12 and not parts(answer, ToolResult)
    assert answer.record["reason"] == "cancelled"


# ------------------------------------------------------------------------------------------ ended in mid-tool


@pytest.fixture
def hanging(cafe) -> Iterator[Callable[..., Answer]]:
    """Ask an agent whose tool hangs until the test is over."""
    free = threading.Event()

    def hang() -> str:
        free.wait(60)
        return "at last"

    def begin(**options: Any) -> Answer:
        cafe.space.update(model=Says(calls("hang"), "Done."), described=lambda tool: None)
        cafe.TOOLS["hang"] = hang
        answer = ask("Wait!", source=cafe.agent, **ANSWER, **options)
        hears(answer, ToolCall)
        return answer

    yield begin
    free.set()


def test_stop_ends_an_answer_whose_tool_hangs(cafe, hanging) -> None:
    answer = hanging()
    assert answer.stop() == "ended" and answer.record["reason"] == "cancelled"
    [call] = answer.parts
    assert call.name == "hang"


def test_what_a_tool_gives_back_after_stop_is_dropped(cafe) -> None:
    begun, free = threading.Event(), threading.Event()

    def slow() -> str:
        begun.set()
        free.wait(60)
        return "too late"

    cafe.space.update(model=Says(calls("slow"), "Done."), described=lambda tool: None)
    cafe.TOOLS["slow"] = slow
    answer = ask("Wait!", source=cafe.agent, **ANSWER)
    assert begun.wait(60) and answer.stop() == "ended"
    free.set()
    wait_for(lambda: not [t for t in threading.enumerate() if t.name.startswith("llmstream model")])
    assert [part.kind for part in answer.parts] == ["call"] and answer.text == ""


def test_an_answer_whose_tool_hangs_ends_as_stalled(cafe, hanging, monkeypatch) -> None:
    monkeypatch.setenv("LLMSTREAM_TIMEOUT", "0.5")  # and not before the call, which may come late
    answer = hanging()
    answer.wait(60)
    assert answer.status == "failed" and answer.record["error"] == "Stalled"
    assert [part.kind for part in answer.parts] == ["call"]


LEASE = Timing(lease=1.0, ttl=600.0, give_up=8.0)


def doomed() -> None:
    """A worker in a process of its own, which is killed right after its tool has placed an order."""
    namespace = cells()

    def die(_: float) -> None:
        stream = "nb09:{a}:chunks"
        wait_for(lambda: any(fields["kind"] == "call" for _, fields in namespace["redis"].xrange(stream)))
        os.kill(os.getpid(), signal.SIGKILL)

    namespace["time"] = SimpleNamespace(sleep=die, monotonic=time.monotonic)
    print("ready", flush=True)
    Worker(name="doomed", slots=1, source=namespace["agent"], timing=LEASE).run()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("backend", ["fake-tcp", *chosen()])
def test_a_worker_that_is_killed_in_a_tool_costs_no_part_and_runs_it_twice(cafe, backend) -> None:
    cafe.space["time"] = SimpleNamespace(sleep=lambda _: None, monotonic=time.monotonic)
    code = "from tests.test_agent import doomed; doomed()"
    environment = os.environ | {"LLMSTREAM_NO_VENV": "1"}
    worker = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE)
    survivor = Worker(name="survivor", slots=1, source=cafe.agent, timing=LEASE)
    try:
        assert worker.stdout.readline() == b"ready\n"
        cafe.lay_orders()  # the process has cleared all, as the notebook's first cell does
        order = enqueue(ORDER, **ANSWER, timing=LEASE)
        assert worker.wait(60) == -signal.SIGKILL
        survivor.start()
        order.wait(60)
    finally:
        worker.kill()
        worker.communicate()
        survivor.stop(0)
    assert cafe.redis.xlen(cafe.ORDERS) == 12 + 2
    assert [part.kind for part in order.parts] == ["reasoning", "call", "result", "reasoning", "text"]
    assert re.fullmatch(r"The tool says: one espresso, 2\.4 euro\. Enjoy it!", order.text)
    kinds = [fields["kind"] for _, fields in cafe.redis.xrange("nb09:{a}:chunks")]
    assert kinds.count("start") == 2 and kinds.count("call") == 2 and kinds.count("result") == 1
