"""The unmodified openai package against the web server: it asks, is cut off, resumes, stops, and has the exact text."""

from __future__ import annotations

import asyncio
import json
import random
import re
from contextlib import closing
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmstream_nb import Answer, Worker, connect
from llmstream_nb.answers.connection import names_of
from llmstream_nb.faults import Proxy
from llmstream_nb.llm import local, prepared
from llmstream_nb.protocol.events import Continued, Ended, Failed, Gap, Interrupted, Restarted, Started
from llmstream_nb.protocol.parts import Reasoning, Refusal, Text, ToolCall, ToolResult, Unknown
from llmstream_nb.protocol.wire import EntryID
from llmstream_nb.web import Limits, hub
from llmstream_nb.web.admission import reading_token
from llmstream_nb.web.chat import Chat
from llmstream_nb.web.openai_api import LARGEST
from llmstream_nb.web.responses import Responses, entry_of, number_of

from .conftest import FAST
from .model import wait_for
from .test_web import hub_of, says, serve  # noqa: F401 - fixtures
from .web import TOKEN, Parser, Watcher, Writer, call, until

QUESTION = "What is Redis?"
WHOLE = prepared.reply(QUESTION)
MODELS = ["scripted:pace=0", "scripted:pace=100", "scripted:reason=6,pace=0", "scripted:refuse,pace=0"]
MODELS += ["scripted:long=40,pace=0", "scripted:long=400,pace=100", "scripted:long=9,length=4,pace=0"]
MODELS += ["scripted:status=429", "scripted:drop=3,pace=0"]
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}
TERMINAL = ("response.completed", "response.incomplete", "response.failed")


@pytest.fixture
def backend() -> str:
    return "fake"


@pytest.fixture
def server(serve):  # noqa: F811
    return serve(models={"scripted": MODELS})


def client_of(server, port: int = 0, kind=openai.OpenAI):
    return kind(base_url=f"http://127.0.0.1:{port or server.port}/v1", api_key=TOKEN, max_retries=0)


@pytest.fixture
def llm(server):
    with client_of(server) as made:
        yield made


def text_of(events) -> str:
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


# ------------------------------------------------------------------------------------------------- translation

PARTS = st.one_of(
    st.builds(Text, st.text(max_size=4)),
    st.builds(Reasoning, st.text(max_size=4)),
    st.builds(Refusal, st.text(max_size=4)),
    st.builds(ToolCall, st.sampled_from(["", "a", "b"]), st.just("f"), st.sampled_from(["{}", '{"a": 1}'])),
    st.builds(ToolResult, st.sampled_from(["a", "b"]), st.text(max_size=4)),
    st.builds(Unknown, st.just("later"), st.just("{}")),
)
ENDS = st.sampled_from(["stop", "length", "tool_calls", "cancelled"])


def answer(parts, reason="stop", attempt=1, ended=True):
    """The events of an answer of these parts."""
    for seq, part in enumerate(parts, 1):
        part.id = EntryID(attempt, seq)
    end = [Ended(EntryID(attempt, len(parts) + 1), reason)] if ended else []
    return [Started(EntryID(attempt, 0), {"model": "m", "at": 1}), *parts, *end]


def sent(events) -> list[dict]:
    """What is sent for these events, as a client reads it."""
    frames = list(Responses("x", {}).frames(events))
    told = [json.loads(event.data) for event in Parser().feed(b"".join(frame.data for frame in frames))]
    assert [event["sequence_number"] for event in told] == [frame.number for frame in frames]
    assert [frame.final for frame in frames] == [event["type"] in TERMINAL for event in told]
    return told


def output_of(events) -> list[dict]:
    """The items that a client puts together from deltas alone."""
    items: list[dict] = []
    for event in deepcopy(events):
        match event["type"]:
            case "response.output_item.added":
                assert event["output_index"] == len(items)
                items.append(event["item"])
            case "response.content_part.added":
                items[event["output_index"]]["content"].append(event["part"])
            case "response.output_text.delta" | "response.reasoning_text.delta":
                items[event["output_index"]]["content"][0]["text"] += event["delta"]
            case "response.refusal.delta":
                items[event["output_index"]]["content"][0]["refusal"] += event["delta"]
            case "response.function_call_arguments.delta":
                items[event["output_index"]]["arguments"] += event["delta"]
            case "response.output_item.done":
                items[event["output_index"]]["status"] = event["item"]["status"]
                assert items[event["output_index"]] == event["item"]
    return items


@given(st.lists(PARTS, max_size=12), ENDS)
def test_numbers_grow_and_the_deltas_make_what_the_end_says(parts, reason):
    told = sent(answer(parts, reason))
    numbers = [event["sequence_number"] for event in told]
    assert all(one < other for one, other in pairwise(numbers))
    assert told[-1]["type"] in TERMINAL and told[-1]["response"]["output"] == output_of(told)
    status = {"cancelled": "cancelled", "length": "incomplete"}.get(reason, "completed")
    assert told[-1]["response"]["status"] == status
    texts = [
        item["content"][0]["text"]
        for item in output_of(told)
        if item["id"].startswith("msg") and "text" in item["content"][0]
    ]
    assert "".join(texts) == "".join(part.text for part in parts if isinstance(part, Text))
    calls = [item["call_id"] for item in told[-1]["response"]["output"] if item["type"] == "function_call"]
    assert len(calls) == len(set(calls)) == sum(isinstance(part, ToolCall) for part in parts) and all(calls)


@given(st.lists(PARTS, max_size=12), st.data())
def test_every_cut_and_every_number_resumes_exactly(parts, data):
    events = answer(parts)
    whole = b"".join(frame.data for frame in Responses("x", {}).frames(events))
    told = sent(events)
    at = data.draw(st.integers(0, len(whole)))
    first = [json.loads(event.data) for event in Parser().feed(whole[:at])]
    seen = first[-1]["sequence_number"] if first else -1
    rest = [event for event in told if event["sequence_number"] > seen]
    assert first + rest == told
    if first:
        assert entry_of(seen) in [event.id for event in events]


@given(st.lists(PARTS, min_size=1, max_size=12), st.data())
def test_an_event_has_the_same_number_where_the_entries_before_are_gone(parts, data):
    events = answer(parts)
    gone = data.draw(st.integers(1, len(parts)))
    kept = [event for event in events if event.id.seq >= gone]
    trimmed = sent([Gap(kept[0].id, gone), *kept])
    numbers = {
        (entry_of(event["sequence_number"]), event["type"]): event["sequence_number"]
        for event in sent(events)
        if event["type"].endswith(("delta", "completed"))
    }
    for event in trimmed:
        key = entry_of(event["sequence_number"]), event["type"]
        if event["type"].endswith("delta"):
            assert numbers[key] == event["sequence_number"]
    assert trimmed[2]["type"] == "llmstream.gap" and trimmed[-1]["type"] == "response.incomplete"
    assert trimmed[-1]["response"]["incomplete_details"] == {"reason": "entries_gone"}
    # Who has seen the last entry that is gone is not told of a gap.
    assert trimmed[2]["sequence_number"] == number_of(EntryID(1, gone - 1), 7) < trimmed[3]["sequence_number"]


def test_where_an_attempt_begins_anew_the_stream_fails_and_where_it_goes_on_it_goes_on():
    one, two = answer([Text("a "), Text("b ")], ended=False), EntryID(2, 0)
    anew = sent([*one, Interrupted(EntryID(1, 2)), Restarted(two, {"model": "m"}), Text("c", EntryID(2, 1))])
    assert anew[-1]["type"] == "response.failed" and anew[-1]["response"]["error"]["code"] == "restarted"
    assert anew[-1]["sequence_number"] > anew[-2]["sequence_number"]
    more = [Text("c", EntryID(2, 2)), Ended(EntryID(2, 3), "stop")]
    on = sent([*one, Continued(EntryID(2, 1), {}), *more])
    assert on[-1]["response"]["output"][0]["content"][0]["text"] == "a b c"
    failed = sent([*one, Failed(EntryID(1, 3), "Broke", "no")])
    assert failed[-1]["response"]["error"] == {"code": "Broke", "message": "no"}


# ------------------------------------------------------------------------------------------------- the client


def test_it_asks_and_all_its_events_have_types(llm):
    model = "scripted:reason=6,pace=0"
    events = list(llm.responses.create(model=model, input=QUESTION, stream=True))
    assert all(type(event).__module__.startswith("openai.types.responses.") for event in events)
    assert text_of(events) == WHOLE == events[-1].response.output_text
    waited = llm.responses.create(model=model, input=[{"role": "user", "content": QUESTION}], instructions="Be brief.")
    assert (waited.status, waited.output_text, waited.model) == ("completed", WHOLE, model)
    assert [item.type for item in waited.output] == ["reasoning", "message"]
    assert waited.usage.output_tokens == waited.usage.total_tokens - waited.usage.input_tokens > 100
    assert llm.responses.retrieve(waited.id).to_dict() == waited.to_dict()
    with llm.responses.stream(model=model, input=QUESTION) as stream:
        assert stream.get_final_response().output_text == WHOLE
    refused = llm.responses.create(model="scripted:refuse,pace=0", input=QUESTION)
    assert refused.output[0].content[0].refusal == prepared.refusal() and refused.output_text == ""
    cut = llm.responses.create(model="scripted:long=9,length=4,pace=0", input=QUESTION)
    assert (cut.status, cut.incomplete_details.reason, cut.output_text) == (
        "incomplete",
        "max_output_tokens",
        "0 1 2 3 ",
    )
    names = [one.id for one in llm.models.list()]
    assert names[0] == "scripted" and names[-len(MODELS) :] == MODELS
    assert llm.models.retrieve(MODELS[1]).owned_by == "scripted"


def test_every_number_resumes(llm):
    events = list(llm.responses.create(model="scripted:long=40,pace=0", input=QUESTION, stream=True))
    answer_id = events[0].response.id
    for n, event in enumerate(events):
        seen = event.sequence_number
        rest = list(llm.responses.retrieve(answer_id, stream=True, starting_after=seen))
        assert [one.to_dict() for one in rest] == [one.to_dict() for one in events[n + 1 :]]
    with llm.responses.stream(response_id=answer_id, starting_after=events[9].sequence_number) as stream:
        assert [event.sequence_number for event in stream] == [event.sequence_number for event in events[10:]]


def test_it_is_cut_off_by_a_proxy_anywhere_and_resumes(server):
    proxy = Proxy.before(f"http://127.0.0.1:{server.port}")
    with client_of(server, proxy.port) as llm:
        for seed in range(6):
            chance, text, seen, answer_id, over = random.Random(seed), "", -1, "", False
            while not over:
                resumed = {"stream": True, "starting_after": seen} if seen >= 0 else {"stream": True}
                try:
                    if answer_id:
                        stream = llm.responses.retrieve(answer_id, **resumed)
                    else:
                        stream = llm.responses.create(model="scripted:pace=0", input=QUESTION, stream=True)
                    for event in stream:
                        seen = event.sequence_number
                        answer_id = answer_id or event.response.id
                        text += text_of([event])
                        over = event.type in TERMINAL
                        if chance.random() < 0.03:
                            proxy.cut()
                except (openai.APIConnectionError, httpx.TransportError):
                    pass
            assert text == WHOLE, seed


def test_the_asynchronous_client_a_second_one_and_a_third(server, client):
    async def main() -> None:
        async with client_of(server, kind=openai.AsyncOpenAI) as llm:
            asked = await llm.responses.create(model="scripted:long=400,pace=100", input=QUESTION, background=True)
            assert asked.status in ("queued", "in_progress")

            async def follow(after: int | None = None) -> list:
                given = {} if after is None else {"starting_after": after}
                return [event async for event in await llm.responses.retrieve(asked.id, stream=True, **given)]

            one, two = asyncio.create_task(follow()), asyncio.create_task(follow())
            await until(lambda: len(Answer(asked.id, client=client).text) > 20)
            third = await client_of(server, kind=openai.AsyncOpenAI).responses.cancel(asked.id)
            assert third.status == "cancelled" and third.output_text.startswith("0 1 2 3 4 ")
            for events in await asyncio.gather(one, two):
                assert text_of(events) == third.output_text
                assert (events[-1].type, events[-1].response.status) == ("response.incomplete", "cancelled")
            assert await follow(events[-1].sequence_number) == []
            assert await llm.responses.delete(asked.id) is None
            with pytest.raises(openai.NotFoundError):
                await llm.responses.retrieve(asked.id)

    asyncio.run(main())


def test_any_model_a_function_of_ones_own_in_the_pool(serve, client):  # noqa: F811
    def own(question, topic):
        yield Reasoning("hm ")
        yield from (f"{n} " for n in range(20))
        yield ToolCall("c1", "weather", '{"city": "Bern"}')
        yield ToolResult("c1", "sun")
        yield "done"

    server, worker = serve(pool=True), Worker(client=client, source=own, timing=FAST)
    worker.start()
    with closing(SimpleNamespace(close=lambda: worker.stop(0))), client_of(server) as llm:
        events = list(llm.responses.create(model="scripted", input=QUESTION, stream=True))
        last = events[-1].response
        assert [item.type for item in last.output] == [
            "reasoning",
            "message",
            "function_call",
            "function_call_output",
            "message",
        ]
        assert last.output_text == "".join(f"{n} " for n in range(20)) + "done" == text_of(events)
        assert (last.output[2].name, last.output[2].arguments, last.output[3].output) == (
            "weather",
            '{"city": "Bern"}',
            "sun",
        )
        with llm.responses.stream(response_id=last.id) as stream:
            assert stream.get_final_response().output_text == last.output_text


@pytest.mark.skipif(not local.installed(), reason="the local model's packages are not installed")
def test_the_local_model(llm):
    text, seen, answer_id = "", -1, ""
    asked = {"model": "local", "input": "What is Redis? One sentence.", "max_output_tokens": 40}
    for event in llm.responses.create(stream=True, **asked):
        answer_id, seen = answer_id or event.response.id, event.sequence_number
        text += text_of([event])
        if len(text) > 20:
            break
    text += text_of(llm.responses.retrieve(answer_id, stream=True, starting_after=seen))
    whole = llm.responses.retrieve(answer_id)
    assert text == whole.output_text and whole.model and whole.usage.output_tokens > 5


def test_turns_and_tools(llm, client):
    first = llm.responses.create(model="scripted:pace=0", input=QUESTION)
    second = llm.responses.create(model="scripted:pace=0", input="And why?", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    record = Answer(second.id, client=client).record
    assert (record["question"], record["follows"]) == ("And why?", first.id)
    call = {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"}
    items = [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}, call]
    items += [{"type": "function_call_output", "call_id": "c", "output": "sun"}]
    asked = {
        "tools": [TOOL],
        "tool_choice": "auto",
        "temperature": 0,
        "max_output_tokens": 50,
        "reasoning": {"effort": "low"},
    }
    third = llm.responses.create(model="scripted:pace=0", input=items, instructions="Be brief.", **asked)
    request = json.loads(Answer(third.id, client=client).record["request"])
    assert [message["role"] for message in request["messages"]] == ["developer", "user", "assistant", "tool"]
    assert request["messages"][2]["tool_calls"][0]["function"] == {"name": "weather", "arguments": "{}"}
    function = {key: value for key, value in TOOL.items() if key != "type"}
    assert request["params"] == {
        "temperature": 0,
        "max_completion_tokens": 50,
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "auto",
        "reasoning_effort": "low",
    }


def test_a_model_that_fails(llm):
    failed = list(llm.responses.create(model="scripted:drop=3,pace=0", input=QUESTION, stream=True))[-1]
    assert failed.type == "response.failed" and failed.response.error.message
    assert llm.responses.retrieve(failed.response.id).status == "failed"
    with pytest.raises(openai.InternalServerError):
        llm.chat.completions.create(model="scripted:status=429", messages=[{"role": "user", "content": "?"}])


def test_the_example_of_the_page_about_it_runs(server, monkeypatch, capsys):
    page = Path(__file__).parents[1] / "docs" / "with-openais-client.md"
    code = re.search(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)[1]
    monkeypatch.setenv("LLMSTREAM_WEB_URL", f"http://127.0.0.1:{server.port}")
    monkeypatch.setenv("LLMSTREAM_WEB_TOKEN", TOKEN)
    exec(compile(code, page.name, "exec"), {})
    assert capsys.readouterr().out.strip() == WHOLE.strip()


# ------------------------------------------------------------------------------------------------- takeovers


def test_who_watches_while_an_attempt_begins_anew_is_told_and_the_next_one_has_it(server, client, llm):
    writer = Writer(client, "a").say("void ", "text ")
    stream = llm.responses.retrieve("a", stream=True)
    seen = [next(stream) for _ in range(6)]
    assert text_of(seen) == "void text "
    writer.fall_silent().begin().say("right ")
    assert list(stream)[-1].response.error.code == "restarted"
    late = llm.responses.retrieve("a", stream=True)
    new = [next(late) for _ in range(5)]
    assert text_of(new) == "right "
    writer.say("text").end()
    assert text_of(late) == "text" and llm.responses.retrieve("a").output_text == "right text"
    void = list(llm.responses.retrieve("a", stream=True, starting_after=seen[-1].sequence_number))
    assert [event.type for event in void] == ["response.failed"]
    rest = llm.responses.retrieve("a", stream=True, starting_after=new[-1].sequence_number)
    assert text_of(rest) == "text"


def test_who_watches_while_an_attempt_goes_on_goes_on(server, client, llm):
    writer = Writer(client, "a").say("one ", "two ")
    stream = llm.responses.retrieve("a", stream=True)
    seen = [next(stream) for _ in range(6)]
    writer.fall_silent().begin(continues="1-2").say("one two ", "three ")
    more = next(stream)
    assert text_of([*seen, more]) == "one two three "
    resumed = llm.responses.retrieve("a", stream=True, starting_after=seen[-1].sequence_number)
    late, cut = (
        llm.responses.retrieve("a", stream=True),
        llm.responses.retrieve("a", stream=True, starting_after=more.sequence_number),
    )
    writer.say("four").end()
    assert text_of(stream) == text_of(cut) == "four" and text_of(resumed) == "three four"
    assert text_of(late) == llm.responses.retrieve("a").output_text == "one two three four"


def test_what_was_trimmed_is_told_and_the_record_has_it(server, client, llm):
    writer = Writer(client, "a").say(*"abcdef")
    client.xtrim(writer.keys.chunks, minid="1-4", approximate=False)
    writer.end()
    late = list(llm.responses.retrieve("a", stream=True))
    assert late[2].type == "llmstream.gap" and text_of(late) == "def" and late[-1].response.status == "incomplete"
    assert llm.responses.retrieve("a").output_text == "abcdef"
    seen = number_of(EntryID(1, 3), 7)
    rest = list(llm.responses.retrieve("a", stream=True, starting_after=seen))
    assert text_of(rest) == "def" and "llmstream.gap" not in [event.type for event in rest]
    client.delete(writer.keys.chunks)
    assert text_of(llm.responses.retrieve("a", stream=True)) == "abcdef"
    with pytest.raises(openai.APIStatusError) as gone:
        llm.responses.retrieve("a", stream=True, starting_after=seen)
    assert gone.value.status_code == 410


def test_one_who_reads_slowly_reads_for_itself_and_has_all(serve, client, monkeypatch):  # noqa: F811
    monkeypatch.setattr(hub, "WINDOW", 3_000)
    monkeypatch.setattr(hub, "PAGE", 1_000)
    server = serve()
    writer = Writer(client, "a").say(*(f"{n} " for n in range(50)))
    with client_of(server) as llm:
        streams = [llm.responses.retrieve("a", stream=True), llm.responses.retrieve("a", stream=True)]
        resumed = llm.responses.retrieve("a", stream=True, starting_after=number_of(EntryID(1, 20), 7))
        first = [next(streams[0]) for _ in range(9)]
        for n in range(50, 3_000, 50):
            writer.say(*(f"{m} ".ljust(100) for m in range(n, n + 50)))
        writer.end()
        assert text_of(first) + text_of(streams[0]) == text_of(streams[1]) == writer.text
        assert text_of(resumed) == writer.text[len("".join(f"{n} " for n in range(20))) :]


# ------------------------------------------------------------------------------------------------- chat completions


def test_chat_completions_streamed_or_not(llm, client):
    said = [{"role": "user", "content": QUESTION}]
    whole = llm.chat.completions.create(model="scripted:reason=6,pace=0", messages=said)
    message = whole.choices[0].message
    assert (message.content, whole.choices[0].finish_reason) == (WHOLE, "stop")
    assert message.reasoning_content == prepared.reasoning(6) and whole.usage.completion_tokens > 100
    usage = {"include_usage": True}
    chunks = list(
        llm.chat.completions.create(model="scripted:pace=0", messages=said, stream=True, stream_options=usage)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == WHOLE
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage.completion_tokens > 100
    assert Answer(chunks[0].id, client=client).text == WHOLE
    with llm.chat.completions.stream(model="scripted:pace=0", messages=said) as stream:
        assert stream.get_final_completion().choices[0].message.content == WHOLE


def test_a_chat_whose_texts_are_parts_is_answered_as_one_of_texts(llm):
    said = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    whole = llm.chat.completions.create(model="scripted:pace=0", messages=said)
    assert whole.choices[0].message.content == WHOLE


def test_a_chat_is_watched_and_stopped_from_elsewhere(llm, client):
    said = [{"role": "user", "content": QUESTION}]
    stream = llm.chat.completions.create(model="scripted:long=400,pace=100", messages=said, stream=True)
    first = next(stream)
    watched = Answer(first.id, client=client)
    wait_for(lambda: len(watched.text) > 20)
    assert llm.responses.cancel(first.id).status == "cancelled"
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == watched.text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_chat_that_breaks_raises(server, client, llm):
    frames = list(Chat("x", {}).frames([*answer([Text("a")], ended=False), Restarted(EntryID(2, 0))]))
    assert b'"error"' in frames[-1].data and frames[-1].final
    said = [{"role": "user", "content": QUESTION}]
    with pytest.raises(openai.APIError):
        list(llm.chat.completions.create(model="scripted:drop=3,pace=0", messages=said, stream=True))


# ------------------------------------------------------------------------------------------------- the door


def error_of(reply, *statuses: int) -> dict:
    assert reply.status in (statuses or range(400, 500)), reply
    error = reply.json["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["code"], reply
    return error


def test_who_may_not_is_refused_in_the_words_of_that_api(server, client):
    Writer(client, "a").say("x").end()
    for path in ("v1/responses/a", "v1/models", "v1/nothing"):
        error_of(call(server, "GET", path, token=None), 401)
    reading = reading_token(TOKEN, "a")
    assert call(server, "GET", "v1/responses/a", token=reading).status == 200
    for method, path in (("POST", "v1/responses/a/cancel"), ("DELETE", "v1/responses/a"), ("GET", "v1/models")):
        error_of(call(server, method, path, token=reading), 403)
    error_of(call(server, "GET", "v1/nothing"), 404)
    error_of(call(server, "PUT", "v1/responses/a"), 405)
    error_of(call(server, "DELETE", "v1/responses/a", origin="https://elsewhere.example"), 403)


def test_a_function_of_the_hosts_is_asked_for_what_they_are(serve, client):  # noqa: F811
    asked = []

    def authorize(request, answer_id, action):
        asked.append((answer_id, action))
        return True

    server = serve(authorize=authorize, token=None)
    Writer(client, "a").say("x").end()
    for method, path in (
        ("GET", "responses/a"),
        ("POST", "responses/a/cancel"),
        ("DELETE", "responses/a"),
        ("GET", "models"),
    ):
        assert call(server, method, f"v1/{path}").status == 200
    call(server, "POST", "v1/responses", {"model": "scripted", "input": "?", "previous_response_id": "b"})
    assert asked == [("a", "read"), ("a", "stop"), ("a", "stop"), ("", "ask"), ("", "ask"), ("b", "read")]


def test_limits_hold(serve, client):  # noqa: F811
    server = serve(limits=Limits(viewers=0, question=10))
    error_of(call(server, "POST", "v1/responses", {"model": "scripted", "input": "x" * 11}), 400)
    assert (
        error_of(call(server, "POST", "v1/responses", {"model": "scripted", "input": "x", "stream": True}), 503)["type"]
        == "server_error"
    )
    assert error_of(call(server, "POST", "v1/responses", b"x" * 70_000), 413)["code"] == "TooLarge"


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["\ud800", "scripted", "x" * 9_000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "model",
    "input",
    "messages",
    "instructions",
    "stream",
    "tools",
    "tool_choice",
    "temperature",
    "max_output_tokens",
]
FIELDS += [
    "previous_response_id",
    "background",
    "text",
    "reasoning",
    "include",
    "store",
    "n",
    "stop",
    "response_format",
]
ITEM = st.fixed_dictionaries(
    {},
    optional={"role": st.sampled_from(["user", "tool", 3]), "content": ANY, "type": ANY, "call_id": ANY, "output": ANY},
)
BODIES = st.dictionaries(st.sampled_from(FIELDS), ANY | st.lists(ITEM, max_size=3), max_size=5)
DEEP = b"[" * 30_000
RAW = st.sampled_from([b"", b"{", b"\xff", b"null", b"[]", b'"x"', DEEP, b'{"model": NaN}', b'{"input": ' + DEEP])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from(["responses", "chat/completions"]), BODIES | RAW)
def test_no_body_breaks_it(server, path, body):
    if isinstance(body, dict):
        body = json.dumps(body | {"model": body.get("model", "scripted:pace=0")}).encode()
    reply = call(server, "POST", f"v1/{path}", body)
    assert reply.status in (200, 503) or error_of(reply)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.sampled_from(["a", "b", "..", "%00", "a%2Fb", "x" * 100, "%ED%A0%80", "é"]),
    st.sampled_from(["0", "-1", "7", "x", "", "1e3", "9" * 30, str(LARGEST), "NaN", "57", "1000000000007"]),
    st.sampled_from(["true", "false", "maybe", ""]),
)
def test_no_address_breaks_it(server, client, answer_id, after, stream):
    if not client.exists("test:{a}:chunks") and not Answer("a", client=client).record:
        Writer(client, "a").say("x", "y").end()
    path = f"v1/responses/{answer_id.encode('ascii', 'ignore').decode()}"
    reply = call(server, "GET", f"{path}?stream={stream}&starting_after={after}")
    assert reply.status == 200 or error_of(reply)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_of_json_is_refused_however_deep_it_stands(server, number):
    said, odd = {"role": "user", "content": "?"}, {"x": number}
    function = {"name": "f", "parameters": odd}
    shape = {"type": "json_schema", "name": "n", "schema": odd}
    for path, body in [
        ("responses", {"input": "?", "tools": [{"type": "function"} | function]}),
        ("responses", {"input": "?", "text": {"format": shape}}),
        ("chat/completions", {"messages": [said | odd]}),
        ("chat/completions", {"messages": [said], "tools": [{"type": "function", "function": function}]}),
        ("chat/completions", {"messages": [said], "response_format": odd}),
    ]:
        reply = call(server, "POST", f"v1/{path}", {"model": "scripted:pace=0"} | body)  # written as NaN, Infinity
        assert error_of(reply, 400)["code"] == "Invalid", body


def test_what_can_not_be_had_is_named(server):
    def param(**body) -> str:
        return error_of(call(server, "POST", "v1/responses", {"model": "scripted", "input": "?"} | body), 400)["param"]

    assert param(store=False) == "store" and param(conversation="c") == "conversation"
    assert param(tools=[{"type": "web_search"}]).startswith("tools.0") and param(include=["x"]) == "include"
    image = {"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}
    assert param(input=[image]) == "input[0]" and param(temperature=3) == "temperature"
    assert param(instructions="?", previous_response_id="a") == "instructions"
    assert param(tool_choice={"type": "web_search"}).startswith("tool_choice")
    assert param(text={"format": {"type": "json_schema"}}).startswith("text")
    assert param(previous_response_id="../x") == "previous_response_id"
    assert param(input=[{"role": "user", "content": "a"}] * 2, previous_response_id="a") == "input"
    assert error_of(call(server, "POST", "v1/responses", {"model": "gpt", "input": "?"}), 404)["code"] == "NotOffered"


# ------------------------------------------------------------------------------------------------- many


@pytest.mark.parametrize("backend", ["redis-server"], indirect=True)
def test_three_hundred_on_both_wires_are_exact_over_few_connections(client, serve):  # noqa: F811
    proxy = Proxy.before(client)
    counted = connect(proxy.url, prefix=client.names.prefix)
    server, most = serve(client=counted), [0]
    writer = Writer(client, "a").say("first ")

    async def page() -> str:
        return (await Watcher(server, "a").run()).text

    async def api(llm) -> str:
        return text_of([event async for event in await llm.responses.retrieve("a", stream=True)])

    async def main() -> list[str]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=60) as http:
            llm = client_of(server, kind=openai.AsyncOpenAI).with_options(http_client=http)
            tasks = [asyncio.create_task(one) for _ in range(150) for one in (page(), api(llm))]
            await until(lambda: hub_of(server).viewers == 300)
            for n in range(100):
                writer.say(f"{n} ")
                most[0] = max(most[0], proxy.connections)
                await asyncio.sleep(0.01)
            writer.end()
            return await asyncio.gather(*tasks)

    assert set(asyncio.run(main())) == {writer.text}
    assert 0 < most[0] <= 8


# ------------------------------------------------------------------------------------------------- what broke once


def put(client, answer_id: str, *entries: tuple[str, str, str], **record):
    """An answer of these entries, as anybody may write it."""
    keys = names_of(client).answer(answer_id)
    for entry_id, kind, text in entries:
        client.xadd(keys.chunks, {"kind": kind, "text": text, "ms": 0}, id=entry_id)
    known = {"id": answer_id, "question": "why?", "asked": 1.5, "nonce": "n", "first": 1}
    client.set(keys.question, json.dumps(known | record))
    return keys


def watched(llm, answer_id: str, seen: int = -1) -> list:
    return list(llm.responses.retrieve(answer_id, stream=True, **({"starting_after": seen} if seen >= 0 else {})))


START, END = ("1-0", "start", "{}"), '{"reason": "stop"}'


def test_one_that_is_ended_from_outside_keeps_its_text_at_every_number(client, llm):
    put(client, "d", START, ("1-1", "text", "one "), ("1-2", "text", "two"))
    Answer("d", client=client, timing=FAST).stop()
    events = watched(llm, "d")
    assert text_of(events) == "one two" == events[-1].response.output_text
    for n, event in enumerate(events):
        rest = watched(llm, "d", event.sequence_number)
        assert [one.to_dict() for one in rest] == [one.to_dict() for one in events[n + 1 :]]


def test_an_attempt_that_is_gone_is_not_mixed_with_the_next(client, llm):
    more = [("2-0", "start", "{}"), ("2-1", "text", "TWO"), ("2-2", "end", END)]
    keys = put(client, "a", START, ("1-1", "text", "ONE "), *more)
    client.xdel(keys.chunks, "1-0", "1-1")
    last = watched(llm, "a", number_of(EntryID(1, 1), 7))
    assert [(event.type, event.response.error.code) for event in last] == [("response.failed", "restarted")]
    assert text_of(watched(llm, "a")) == "TWO"


def test_a_slow_viewer_never_gets_two_questions_of_one_id(serve, client, monkeypatch):  # noqa: F811
    monkeypatch.setattr(hub, "WINDOW", 3_000)
    server = serve()
    writer = Writer(client, "a").say(*("A".ljust(4_000) for _ in range(2_000)))
    with client_of(server) as llm:
        slow = llm.responses.retrieve("a", stream=True)
        first = [next(slow) for _ in range(9)]
        for key in (writer.keys.chunks, writer.keys.question):
            client.delete(key)
        Writer(client, "a", first=2).say("B").end()
        rest = list(slow)
        assert "B" not in text_of(first + rest)
        assert rest[-1].type == "response.failed" and rest[-1].response.error.code == "restarted"


def test_a_new_question_of_an_id_has_nothing_of_the_old_one(client, llm):
    put(client, "d", START, ("1-1", "text", "secret"))
    old = llm.responses.retrieve("d", stream=True)
    assert text_of([next(old) for _ in range(5)]) == "secret"
    keys = names_of(client).answer("d")
    client.delete(keys.chunks)
    client.set(keys.question, json.dumps({"question": "new", "nonce": "m", "first": 2, "pooled": True}))
    new = llm.responses.retrieve("d", stream=True)
    client.xadd(keys.chunks, {"kind": "start", "text": "{}", "ms": 0}, id="2-0")
    client.xadd(keys.chunks, {"kind": "text", "text": "public", "ms": 0}, id="2-1")
    client.xadd(keys.chunks, {"kind": "end", "text": END, "ms": 0}, id="2-2")
    assert text_of(new) == "public"


def test_a_record_with_a_hole_is_no_whole_answer(server, client, llm):
    keys = put(
        client, "b", ("1-5", "text", "tail"), ("1-6", "end", END), text="tail", missing=5, end="1-6", reason="stop"
    )
    for _ in range(2):
        whole = llm.responses.retrieve("b")
        assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "entries_gone")
        assert watched(llm, "b")[-1].type == "response.incomplete"
        assert call(server, "GET", "answers/b").json["missing"] == 5
        client.delete(keys.chunks)


def test_no_number_gives_an_empty_answer_but_that_of_the_end(client, llm):
    put(client, "c", end="1-3", text="hello", reason="stop")
    assert text_of(watched(llm, "c")) == "hello"
    put(client, "e", START, ("1-1", "text", "hello"), ("1-2", "end", END))
    assert watched(llm, "e", number_of(EntryID(1, 2), 9)) == []
    for answer_id, seen in [("c", 38), ("c", 40), ("e", 40), ("e", 10**10 + 5), ("e", LARGEST)]:
        with pytest.raises(openai.APIStatusError) as refused:
            watched(llm, answer_id, seen)
        assert refused.value.status_code in (400, 410)


def test_what_stands_before_an_entry_that_is_not_the_kits_is_told_first(client, llm):
    put(client, "m", START, *((f"1-{n}", "text", f"{n} ") for n in range(1, 30)), ("1-30", "call", "no JSON"))
    events = watched(llm, "m")
    assert text_of(events) == "".join(f"{n} " for n in range(1, 30))
    assert events[-1].type == "error" and events[-1].sequence_number >= events[-2].sequence_number


def test_the_helper_of_the_client_reads_a_trimmed_answer(client, llm):
    put(client, "t", ("1-3", "text", "c"), ("1-4", "end", END))
    with llm.responses.stream(response_id="t") as stream:
        events = list(stream)
    assert [event.type for event in events[:3]] == ["response.created", "response.in_progress", "llmstream.gap"]
    assert events[-1].response.status == "incomplete"


def test_a_chat_whose_server_ends_raises(serve, client):  # noqa: F811
    server = serve(models={"scripted": MODELS})
    said = [{"role": "user", "content": QUESTION}]
    with client_of(server) as llm:
        stream = llm.chat.completions.create(model="scripted:long=400,pace=100", messages=said, stream=True)
        next(stream)
        server.stop()
        with pytest.raises((openai.APIError, httpx.TransportError)):
            list(stream)


def test_a_failed_chat_is_asked_once(server, client):
    said = [{"role": "user", "content": QUESTION}]
    before = len(client.zrange(names_of(client).answers, 0, -1))
    with client_of(server).with_options(max_retries=2) as llm:
        with pytest.raises(openai.InternalServerError):
            llm.chat.completions.create(model="scripted:status=429", messages=said)
        for wrong in ({"tools": [{"type": "function"}]}, {"messages": [{"foo": 1}]}):
            with pytest.raises(openai.BadRequestError):
                llm.chat.completions.create(**{"model": "scripted", "messages": said} | wrong)
    assert len(client.zrange(names_of(client).answers, 0, -1)) == before + 1


def test_calls_of_a_chat_end_in_their_finish_reason(serve, client):  # noqa: F811
    def own(question, topic):
        yield ToolCall("c1", "weather", "{}")

    server, worker = serve(pool=True), Worker(client=client, source=own, timing=FAST)
    worker.start()
    said = [{"role": "user", "content": QUESTION}]
    with closing(SimpleNamespace(close=lambda: worker.stop(0))), client_of(server) as llm:
        whole = llm.chat.completions.create(model="scripted", messages=said).choices[0]
        chunks = list(llm.chat.completions.create(model="scripted", messages=said, stream=True))
    assert whole.finish_reason == chunks[-1].choices[0].finish_reason == "tool_calls"
    assert whole.message.tool_calls[0].function.name == "weather"
