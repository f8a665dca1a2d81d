"""Whatever an endpoint sends becomes parts: text, reasoning, a refusal, tool calls, in every shape that is known."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmstream_nb.llm import pieces as room
from llmstream_nb.llm.chunks import Reader
from llmstream_nb.llm.endpoint import ModelError
from llmstream_nb.llm.sources import complete, deltas_of
from llmstream_nb.protocol.parts import MAX_PART, Reasoning, Refusal, ToolCall
from tests.test_chunks import DONE, END, HI, JSON, KEY, SSE, STOP, THERE, answered, cut, data, fake, piece, whole

__all__ = ["fake"]  # a fixture
CALLED = piece({}, "tool_calls") + DONE
WEATHER, TIME = ToolCall("a", "weather", '{"in": "Rome"}'), ToolCall("b", "time", '{"at": 1}')


def calls(*told, reason=None) -> bytes:
    return piece({"tool_calls": list(told)}, reason)


def call(index=None, call_id=None, name=None, arguments=None, **more) -> dict:
    """A piece of a call; what is None is missing."""
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    told = {"index": index, "id": call_id, "function": function or None} | more
    return {key: value for key, value in told.items() if value is not None}


def joined(parts) -> list:
    """The parts, with deltas of a kind that follow each other as one."""
    whole_ones = []
    for part in parts:
        if whole_ones and type(part) is type(whole_ones[-1]) and not isinstance(part, ToolCall):
            last = whole_ones.pop()
            whole_ones.append(last + part if isinstance(part, str) else type(part)(last.text + part.text))
        else:
            whole_ones.append(part)
    return whole_ones


def read(*body: bytes, is_cut=False, **options) -> list:
    reader = Reader(**options)
    return joined([part for some in body for part in reader.feed(some)] + reader.finish(cut=is_cut))


def asked(fake, *body, kind=SSE, stream=True, **options):
    """How an answer ended, and its parts: (finish reason or error's name, parts, message)."""
    fake.replies[:] = [(200, kind, body)]
    completion, parts = complete("Why?", source="openai", parts=True, stream=stream, **{"timeout": 5.0} | options), []
    try:
        parts.extend(completion)
    except ModelError as error:
        return error.error, joined(parts), str(error)
    return completion.finish_reason, joined(parts), ""


# ---------------------------------------------------------------------------------------- reasoning

THOUGHTS = {
    "reasoning_content": {"reasoning_content": "hm"},
    "reasoning": {"reasoning": "hm"},
    "both, as vLLM": {"reasoning_content": "hm", "reasoning": "hm"},
    "null beside it": {"reasoning_content": None, "reasoning": "hm", "content": None},
    "OpenRouter's": {"reasoning": "hm", "reasoning_details": [{"type": "reasoning.text", "text": "hm"}]},
    "its details alone": {"reasoning_details": [{"type": "reasoning.text", "text": "h"}, {"text": "m"}]},
    "a summary": {"reasoning_details": [{"type": "reasoning.summary", "summary": "hm"}, {"data": "x"}]},
    "Mistral's": {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]},
    "thinking, as text": {"content": [{"type": "thinking", "thinking": "hm"}]},
    "a part of reasoning": {"content": [{"type": "reasoning", "text": "hm"}]},
    "a part without a type": {"content": [{"thinking": "hm"}]},
    "an object": {"reasoning": {"content": "hm"}},
    "Ollama's own name": {"thinking": "hm"},
}


@pytest.mark.parametrize("message", THOUGHTS.values(), ids=THOUGHTS)
def test_reasoning_has_many_names(fake, message):
    expected = ("stop", [Reasoning("hm"), "Hi there"], "")
    assert asked(fake, piece(message), HI, THERE, END) == expected
    content = [*(message.get("content") or []), {"type": "text", "text": "Hi there"}]
    assert asked(fake, whole(message | {"content": content}), kind=JSON, stream=False) == expected
    assert answered(fake, (200, SSE, [piece(message), HI, THERE, END]))[:2] == ("stop", "Hi there")


def test_what_stands_in_one_piece_keeps_the_order_of_models():
    all_of_it = {"content": "Hi", "tool_calls": [call(0, "a", "f", "{}")], "refusal": "No", "reasoning": "hm"}
    assert read(piece(all_of_it), END) == [Reasoning("hm"), "Hi", Refusal("No"), ToolCall("a", "f", "{}")]


def test_a_model_that_only_thought_has_not_answered(fake):
    failed, parts, says = asked(fake, piece({"reasoning": "hm"}), END)
    assert (failed, parts) == ("EmptyAnswer", [Reasoning("hm")])
    assert "thought, but answered nothing" in says
    hidden = piece({"reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]})
    assert "thought, but answered nothing" in asked(fake, hidden, END)[2]


def test_odd_reasoning_is_none():
    for odd in (
        1,
        True,
        {"x": "y"},
        [None, 1, [[[[["deep"]]]]]],
        {"text": {"text": {"text": {"text": {"text": "x"}}}}},
    ):
        assert read(piece({"reasoning": odd, "content": "Hi"}), END) == ["Hi"]


TAGGED = {
    "<think>hm</think>Hi": [Reasoning("hm"), "Hi"],
    "\n <think>\nhm\n</think>\n\nHi": [Reasoning("\nhm\n"), "\n\nHi"],
    "<think></think>Hi": ["Hi"],
    "<think>hm": [Reasoning("hm")],
    "<think>hm</thin": [Reasoning("hm</thin")],
    "<think>a < b </x></think>Hi <think>there</think>": [Reasoning("a < b </x>"), "Hi <think>there</think>"],
    "<thi": ["<thi"],
    "\n ": ["\n "],
    " " * 2000 + "<think>": [" " * 2000 + "<think>"],
    "<thinking>": ["<thinking>"],
    "Hi <think>hm</think>": ["Hi <think>hm</think>"],
}


@pytest.mark.parametrize(("text", "parts"), TAGGED.items(), ids=range(len(TAGGED)))
@settings(deadline=None)
@given(st.lists(st.integers(0, 9999), max_size=20))
def test_tags_are_reasoning_where_the_endpoint_is_marked_so(text, parts, places):
    body = [piece({"content": some.decode()}) for some in cut(text.encode(), places)]
    reader = Reader(think_tags=True)
    came = [part for some in body for part in reader.feed(some)] + reader.finish(cut=True)
    assert joined(came) == parts
    assert "" not in came and Reasoning("") not in came
    assert reader.written == any(isinstance(part, str) and part.strip() for part in parts)
    assert read(*body) == [text]


def test_a_call_ends_what_may_have_been_a_tag():
    body = piece({"content": "<think>hm</th"}), calls(call(0, "a", "f", "{}")), piece({"content": "ink>"}), END
    assert read(*body, think_tags=True) == [Reasoning("hm</th"), ToolCall("a", "f", "{}"), Reasoning("ink>")]
    body = piece({"content": "<thi"}), calls(call(0, "a", "f", "{}")), piece({"content": "<think>"}), END
    assert read(*body, think_tags=True) == ["<thi", ToolCall("a", "f", "{}"), "<think>"]


@pytest.mark.parametrize("marked", [False, True])
def test_the_mark_is_a_setting(fake, monkeypatch, tmp_path, marked):
    if marked:
        (tmp_path / ".env").write_text("OPENAI_THINK_TAGS=1\n")
    expected = [Reasoning("hm"), "Hi"] if marked else ["<think>hm</think>Hi"]
    assert asked(fake, piece({"content": "<think>hm</think>Hi"}), END)[:2] == ("stop", expected)
    monkeypatch.setenv("OPENAI_THINK_TAGS", "0")
    assert asked(fake, piece({"content": "<think>hm</think>Hi"}), END)[1] == ["<think>hm</think>Hi"]


# ---------------------------------------------------------------------------------------- refusals


def test_a_refusal_is_a_part_of_its_own(fake):
    body = [piece({"refusal": "I can't"}), piece({"refusal": " help."}), END]
    assert asked(fake, *body) == ("refusal", [Refusal("I can't help.")], "")
    reply = whole({"content": None, "refusal": "I can't help."})
    assert asked(fake, reply, kind=JSON, stream=False) == ("refusal", [Refusal("I can't help.")], "")
    assert read(piece({"content": [{"type": "refusal", "refusal": "No."}]}), END) == [Refusal("No.")]
    cut_off = asked(fake, HI, piece({"refusal": "I can't"}))
    assert cut_off[:2] == ("ConnectionDropped", ["Hi", Refusal("I can't")])


def test_the_key_is_hidden_in_a_refusal_and_stays_in_what_the_model_was_told(fake):
    body = [
        piece({"reasoning": KEY}),
        piece({"content": KEY}),
        calls(call(0, "a", "f", json.dumps({"key": KEY}))),
        piece({"refusal": f"Not with {KEY[:20]}"}),
        piece({"role": "assistant", "content": ""}),
        piece({"refusal": KEY[20:]}),
        END,
    ]
    called = ToolCall("a", "f", json.dumps({"key": KEY}))
    assert asked(fake, *body)[1] == [Reasoning(KEY), KEY, called, Refusal("Not with ***")]


# ---------------------------------------------------------------------------------------- calls

TWO_CALLS = {
    "in pieces": [
        calls(call(0, "a", "weather", "", type="function")),
        calls(call(0, arguments='{"in": ')),
        calls(call(0, arguments='"Rome"}')),
        calls(call(1, "b", "time", "")),
        calls(call(1, arguments='{"at": 1}')),
    ],
    "by turns": [
        calls(call(0, "a", "weather")),
        calls(call(1, "b", "time", '{"at"')),
        calls(call(0, arguments='{"in": "Ro')),
        calls(call(1, arguments=": 1}")),
        calls(call(0, arguments='me"}')),
    ],
    "by turns, in one chunk": [
        calls(call(0, "a", "weather", '{"in": '), call(1, "b", "time", "{")),
        calls(call(0, arguments='"Rome"}'), call(1, arguments='"at": 1}')),
    ],
    "whole, in one chunk": [calls(call(0, "a", "weather", '{"in": "Rome"}'), call(1, "b", "time", '{"at": 1}'))],
    "whole, without index": [calls(call(None, "a", "weather", '{"in": "Rome"}'), call(None, "b", "time", '{"at": 1}'))],
    "whole, of the same index": [
        calls(call(0, "a", "weather", '{"in": "Rome"}')),
        calls(call(0, "b", "time", '{"at": 1}')),
    ],
    "with objects": [
        calls(call(0, "a", "weather", {"in": "Rome"})),
        calls(call(0, "b", "time", {"at": 1})),
    ],
    "id and name in each piece": [
        calls(call(0, "a", "weather", '{"in": ')),
        calls(call(0, "a", "weather", '"Rome"}')),
        calls(call(1, "b", "time", '{"at": ')),
        calls(call(0, "a", "weather", "")),
        calls(call(1, "b", "time", "1}")),
        calls(call(1, "b", "time", "")),
    ],
    "ids alone": [
        calls(call(None, "a", "weather", '{"in": ')),
        calls(call(None, "b", "time", '{"at": ')),
        calls(call(None, "a", None, '"Rome"}')),
        calls(call(None, "b", None, "1}")),
    ],
    "the last one alone goes on": [
        calls(call(None, "a", "weather", '{"in": ')),
        calls(call(None, None, None, '"Rome"}')),
        calls(call(None, "b", "time", '{"at": ')),
        calls(call(None, None, None, "1}")),
    ],
    "the name, then the id": [
        calls(call(0, None, "weather", '{"in": ')),
        calls(call(0, "a", None, '"Rome"}')),
        calls(call("1", None, "time")),
        calls(call("1", "b", None, '{"at": 1}')),
    ],
    "the name in pieces": [
        calls(call(0, "a", "wea", "")),
        calls(call(0, None, "ther", "")),
        calls(call(0, arguments='{"in": "Rome"}')),
        calls(call(1, "b", "ti", "")),
        calls(call(1, "b", "me", '{"at": ')),
        calls(call(1, "b", "time", "1}")),
    ],
    "flat": [
        calls({"index": 0, "id": "a", "name": "weather", "arguments": '{"in": "Rome"}'}),
        calls({"index": 1, "id": "b", "name": "time", "arguments": {"at": 1}}),
    ],
    "with nothing among them": [
        calls(call(0, "a", "weather", '{"in": '), None, {}, call(5)),
        piece({"tool_calls": None, "content": ""}),
        piece({"tool_calls": []}),
        data({"type": "ping"}),
        calls(call(0, arguments='"Rome"}')),
        calls(call(1, "b", "time", '{"at": 1}\n')),
    ],
}


@pytest.mark.parametrize("body", TWO_CALLS.values(), ids=TWO_CALLS)
def test_calls_are_put_together(fake, body):
    reason, parts, _ = asked(fake, HI, *body, CALLED)
    assert (reason, parts[0]) == ("tool_calls", "Hi")
    assert [(part.call_id, part.name, part.arguments.strip()) for part in parts[1:]] == [
        (told.call_id, told.name, told.arguments) for told in (WEATHER, TIME)
    ]
    assert read(*body, STOP, is_cut=True) == read(*body, DONE) == parts[1:]  # it ended, in one way or the other


def test_calls_of_an_answer_that_was_not_streamed(fake):
    told = [call(None, "a", "weather", '{"in": "Rome"}'), call(None, None, "time", {"at": 1}), call(None, None, "time")]
    message = {"content": None, "reasoning_content": "hm", "tool_calls": told}
    expected = [Reasoning("hm"), WEATHER, ToolCall("call_2", "time", '{"at": 1}'), ToolCall("call_3", "time")]
    assert asked(fake, whole(message, "tool_calls"), kind=JSON, stream=False) == ("tool_calls", expected, "")
    assert answered(fake, (200, JSON, [whole(message, "tool_calls")]), stream=False)[:2] == ("tool_calls", "")


@pytest.mark.parametrize("reason", ["stop", "tool_calls", "function_call", "length"])
def test_a_model_that_only_called_has_answered(fake, reason):
    body = [calls(call(0, "a", "f", "{}")), piece({}, reason), DONE]
    assert asked(fake, *body) == (reason, [ToolCall("a", "f", "{}")], "")
    assert asked(fake, *body[:1], DONE)[:2] == ("stop", [ToolCall("a", "f", "{}")])
    assert answered(fake, (200, SSE, body))[:2] == (reason, "")


def test_the_older_function_call():
    body = [piece({"function_call": {"name": "f", "arguments": ""}}), *[piece({"function_call": {"arguments": "{}"}})]]
    assert read(*body, piece({}, "function_call"), DONE) == [ToolCall("call_1", "f", "{}")]
    assert read(whole({"function_call": {"name": "f", "arguments": "{}"}})) == [ToolCall("call_1", "f", "{}")]


def test_a_custom_tool_takes_a_text():
    told = {"id": "a", "type": "custom", "custom": {"name": "run", "input": "print(1)\n"}}
    run = ToolCall("a", "run", "print(1)\n")
    assert read(whole({"tool_calls": [told]}, "tool_calls")) == [run]
    begins = call(0, "a", type="custom", custom={"name": "run", "input": ""})
    more = [call(0, custom={"input": some}) for some in ("print", "(1)\n")]
    time = call(1, "b", "time", '{"at": 1}')
    assert read(*[calls(some) for some in (begins, *more, time)], CALLED) == [run, TIME]


def test_calls_without_id_and_index():
    f, g = call(None, None, "f", '{"a": 1}'), call(None, None, "g", "")
    assert read(*[calls(told) for told in (f, f, g, f)], END) == [
        ToolCall("call_1", "f", '{"a": 1}'),
        ToolCall("call_2", "f", '{"a": 1}'),
        ToolCall("call_3", "g", "{}"),
        ToolCall("call_4", "f", '{"a": 1}'),
    ]
    assert read(calls(g), calls(g), END) == [ToolCall("call_1", "g", "{}"), ToolCall("call_2", "g", "{}")]
    assert [part.name for part in read(calls(call(0, None, "f")), calls(call(0, None, "g")), END)] == ["f", "g"]
    parts = read(calls(g), HI, calls(g), calls(call(None, None, None, "{}")), END)
    assert parts == [ToolCall("call_1", "g", "{}"), "Hi", ToolCall("call_2", "g", "{}")]


def test_what_repeats_its_id_is_one_call():
    told = calls(call(0, "a", "f", "{}")), calls(call(0, "a", "f", '{"b": 1}'))
    assert read(*told, END) == [ToolCall("a", "f", '{}{"b": 1}')]


def test_no_two_calls_have_the_same_id():
    told = [call(0, "call_2", "f"), call(1, None, "f"), call(2, "call_2", "f"), call(3, 7, "f"), call(4, "", "f")]
    ids = [part.call_id for part in read(calls(*told), END)]
    assert ids == ["call_2", "call_3", "call_4", "7", "call_5"]


def test_a_call_comes_once_it_is_complete():
    reader = Reader()
    feed = reader.feed
    assert feed(calls(call(0, "a", "weather", '{"in": "Rome"}'))) == []
    assert feed(calls(call(1, "b", "time", '{"at": '))) == [WEATHER]
    assert feed(calls(call(1, None, None, "1}"))) == []
    assert feed(piece({"content": "Hi"})) == [TIME, "Hi"]
    assert feed(calls(call(2, "c", "f", '{"a": {}'))) == []
    assert feed(piece({"reasoning": "hm"})) == [Reasoning("hm")]  # it may go on, and does
    assert feed(calls(call(2, None, None, "}"))) == []
    assert feed(piece({"content": "Hi"})) == [ToolCall("c", "f", '{"a": {}}'), "Hi"]
    assert feed(calls(call(3, "d", "f", "{}"))) == []
    assert feed(piece({}, "tool_calls")) == [ToolCall("d", "f", "{}")]
    assert feed(DONE) == reader.finish() == []


def test_what_stands_between_its_pieces_makes_no_two_calls_of_one(fake):
    body = [
        calls(call(0, "a", "weather", '{"in": ')),
        HI,
        calls(call(1, "b", "time", '{"at"')),
        piece({"reasoning": "hm"}),
        calls(call(0, None, None, '"Rome"}')),
        THERE,
        calls(call(1, None, None, ": 1}")),
    ]
    assert asked(fake, *body, CALLED)[1] == ["Hi", Reasoning("hm"), WEATHER, " there", TIME]
    broken = calls(call(0, "a", "f", "{")), HI, calls(call(1, "b", "time", '{"at": 1}')), THERE
    assert read(*broken, CALLED) == ["Hi there", ToolCall("a", "f", "{"), TIME]  # calls keep their order


def test_a_cut_drops_what_was_begun_and_nothing_else(fake):
    body = HI, calls(call(0, "a", "weather", '{"in": "Rome"}')), calls(call(1, "b", "time", '{"at": '))
    assert asked(fake, *body)[:2] == ("ConnectionDropped", ["Hi", WEATHER])
    assert asked(fake, *body, data({"error": {"message": "Idle"}}))[:2] == ("ServerError", ["Hi", WEATHER])
    assert asked(fake, *body, 5.0, timeout=1.0, first_timeout=20.0)[:2] == ("Stalled", ["Hi", WEATHER])
    assert read(*body, is_cut=True) == ["Hi", WEATHER]
    assert read(*body, piece({}, "error"), DONE) == ["Hi", WEATHER]


def test_words_that_were_not_the_last_are_no_failure_of_a_call(fake):
    body = calls(call(0, "a", "f", "{}")), data(b"upstream is slow"), DONE
    assert asked(fake, *body) == ("stop", [ToolCall("a", "f", "{}")], "")


def test_text_among_calls_keeps_its_place():
    body = [
        calls(call(0, "a", "weather", '{"in": "Rome"}')),
        piece({"content": "And "}),
        piece({"content": "then"}),
        calls(call(1, "b", "time", '{"at": 1}')),
        piece({"refusal": "No"}),
        HI,
    ]
    assert read(*body, END) == [WEATHER, "And then", TIME, Refusal("No"), "Hi"]


BROKEN = ['{"a": ', "Rome", "[1]", '{"a": 1}}', '"x"', "{}{}", "\x00\u2028", "\ud83d", "1" * 5000]


@pytest.mark.parametrize("arguments", BROKEN, ids=range(len(BROKEN)))
def test_broken_arguments_are_kept_as_they_are(arguments):
    shown = arguments.replace("\ud83d", "\ufffd")
    told = calls(call(0, "a", "f", arguments)), calls(call(1, "b", "g", "{}"))
    assert read(*told, CALLED) == [ToolCall("a", "f", shown), ToolCall("b", "g", "{}")]


def test_an_emoji_cut_in_two_is_whole():
    told = calls(call(0, "a", "f", '{"a": "\ud83d')), calls(call(0, None, None, '\ude00"}'))
    assert read(*told, CALLED) == [ToolCall("a", "f", '{"a": "😀"}')]


def test_a_call_without_a_name_is_shown_without_one():
    assert read(calls(call(0, "a", None, "{}")), CALLED) == [ToolCall("a", "", "{}")]
    assert read(calls(call(0, "a", {"x": 1}, "{}")), CALLED) == [ToolCall("a", "", "{}")]
    assert read(calls(call(0, None, None, "")), calls({}), calls("f", 1), piece({"tool_calls": "f"}), HI, END) == ["Hi"]


def test_a_name_is_short_and_printable():
    (told,) = read(calls(call(0, "a", "get\n\x1b[1m\ud83d" + "x" * 999, "{}")), CALLED)
    assert told.name == "get [1m " + "x" * 192
    (told,) = read(calls(call(0, "i" * 2000, "f", "{}")), CALLED)
    assert len(told.call_id) == 1000


def test_a_thousand_calls_and_no_more(fake):
    told = [calls(call(n, f"id{n}", "f", f'{{"n": {n}}}')) for n in range(1001)]
    assert read(*told[:1000], CALLED) == [ToolCall(f"id{n}", "f", f'{{"n": {n}}}') for n in range(1000)]
    reader = Reader()
    for some in told:
        reader.feed(some)
    assert reader.over and reader.finish() == []
    failed, parts, says = asked(fake, *told, CALLED)
    assert (failed, len(parts)) == ("BadAnswer", 999)
    assert "sent more than 1,000 tool calls: ask" in says
    at_once = whole({"tool_calls": [call(n, f"id{n}", "f", "{") for n in range(1001)]}, "tool_calls")
    assert "more than 1,000 tool calls" in asked(fake, at_once, kind=JSON, stream=False)[2]


def test_a_megabyte_of_arguments_and_no_more(fake):
    some = [calls(call(0, "a", "f", '{"a": "')), *[calls(call(0, None, None, "x" * 1000))] * 999]
    end = MAX_PART - 7 - 999_000
    (told,) = read(*some, calls(call(0, None, None, "x" * (end - 2) + '"}')), CALLED)
    assert len(told.arguments) == MAX_PART
    assert json.loads(told.arguments)["a"].strip("x") == ""
    body = gzip.compress(b"".join([*some, calls(call(0, None, None, "x" * end + '"}')), CALLED]))
    failed, parts, says = asked(fake, body, kind=SSE | {"Content-Encoding": "gzip"})
    assert (failed, parts) == ("BadAnswer", [])
    assert "a tool call with more than 1,000,000 characters" in says


def test_arguments_too_deep_are_none_and_a_thousand_broken_ones_take_no_time(monkeypatch):
    for deep in ("[" * 100_000, *("[" * n + "]" * n for n in range(100, 1100, 2))):
        told = calls(call(0, "a", "f", "deep")).replace(b'"deep"', deep.encode())
        assert read(told, END) in ([], [ToolCall("a", "f", deep)])
    parsed, loads = [], json.loads
    monkeypatch.setattr(room.json, "loads", lambda text: parsed.append(len(text)) or loads(text))
    taken = room.Calls()
    list(taken.take(call(None, None, "f", '{"a": "' + "x" * 100_000)))
    for _ in range(10_000):
        list(taken.take(call(None, None, "f", "{}")))
    for n in range(900):
        list(taken.take(call(None, f"id{n}", "g", "{}")))
    assert sum(parsed) < 2 * room.LOOKED
    parsed.clear()
    taken = room.Calls()
    for _ in range(10_000):  # and text between the pieces
        list(taken.take(call(None, "long", "f", "x" * 50)))
        list(taken.whole(text=True))
    assert sum(parsed) < 2 * room.LOOKED


# ---------------------------------------------------------------------------------------- signs of life


@pytest.mark.parametrize("sign", [piece({"reasoning": "hm"}), calls(call(0, "a", "f", "x")), piece({"refusal": "No"})])
def test_every_part_is_life_and_after_the_first_the_shorter_time_counts(fake, sign):
    assert asked(fake, *[0.4, sign] * 5, END, timeout=1.5)[0] in ("stop", "EmptyAnswer", "refusal")
    assert asked(fake, 1.5, sign, HI, END, timeout=1.0, first_timeout=20.0)[0] in ("stop", "refusal")
    failed, _, says = asked(fake, sign, 2.0, HI, END, timeout=0.3, first_timeout=20.0)
    assert (failed, "silent for 0.3 s" in says) == ("Stalled", True)


def test_what_an_ask_gets_are_parts(fake):
    fake.replies[:] = [(200, SSE, [piece({"reasoning": "hm"}), HI, calls(call(0, "a", "f", "{}")), CALLED])]
    deltas, _ = deltas_of("Why?", None, "openai", None)
    assert list(deltas) == [Reasoning("hm"), "Hi", ToolCall("a", "f", "{}")]


def test_usage_tells_its_details(fake):
    usage = {
        "completion_tokens": 9,
        "completion_tokens_details": {"reasoning_tokens": 7},
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    told = answered(fake, (200, SSE, [HI, STOP, data({"usage": usage}), DONE]))[2]
    assert told == {"completion_tokens": 9, "reasoning_tokens": 7, "cached_tokens": 3}


# ---------------------------------------------------------------------------------------- any parts, cut anywhere

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
values = st.one_of(
    st.dictionaries(st.text(max_size=3), st.text(max_size=5) | st.integers(), max_size=3).map(json.dumps),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip),  # broken
)
parts_ = st.lists(
    st.one_of(
        texts,
        texts.map(Reasoning),
        texts.map(Refusal),
        st.lists(st.tuples(st.sampled_from(["f", "g", "get weather"]), values), min_size=1, max_size=3),
    ),
    max_size=8,
)
reasoned = st.sampled_from([lambda x: {"reasoning": x}, lambda x: {"reasoning_content": x}, lambda x: {"reasoning_details": [{"text": x}]},
                            lambda x: {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": x}]}]}])  # fmt: skip
nothing = st.sampled_from(
    [b"", b": x\n\n", piece({}), piece({"content": ""}), piece({"tool_calls": []}), data(b"ping")]
)


def halves(draw, text: str) -> list[str]:
    """`text` in pieces, cut between any two characters."""
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=3)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@st.composite
def encoded(draw):
    """Parts, and a body that tells them: calls of a group come by turns, and each piece may repeat its id and name."""
    expected, body, index = [], [], 0
    for part in draw(parts_):
        if isinstance(part, list):
            queues = []
            for name, arguments in part:
                told = ToolCall(f"id{index}", name, arguments)
                expected.append(told)
                repeated = draw(st.booleans())
                rest = [
                    call(index, told.call_id if repeated else None, name if repeated else None, some)
                    for some in halves(draw, arguments)
                ]
                queues.append([call(index, told.call_id, name, ""), *rest])
                index += 1
            begun = 0  # they begin in order
            while any(queues):
                at = draw(st.sampled_from([n for n, queue in enumerate(queues) if queue and n <= begun]))
                begun = max(begun, at + 1)
                body.append(calls(queues[at].pop(0)))
        else:
            words = part if isinstance(part, str) else part.text
            for some in halves(draw, words):
                field = {str: lambda x: {"content": x}, Refusal: lambda x: {"refusal": x}}.get(type(part)) or draw(
                    reasoned
                )
                body.append(piece(field(some)))
            expected.append(part)
        body.append(draw(nothing))
    return joined(in_order(expected)), b"".join(body)


def in_order(parts: list) -> list:
    """`parts` as they come: one of the calls that may go on, and the calls behind it, once the model ends."""
    at = next((n for n, part in enumerate(parts) if isinstance(part, ToolCall) and is_broken(part)), len(parts))
    return parts[:at] + sorted(parts[at:], key=lambda part: isinstance(part, ToolCall))


def is_broken(part: ToolCall) -> bool:
    try:
        return not isinstance(json.loads(part.arguments), dict)
    except ValueError:
        return True


@settings(deadline=None, max_examples=300)
@given(encoded(), st.lists(st.integers(0, 99_999), max_size=30), st.sampled_from([STOP + DONE, DONE, CALLED, STOP]))
@example((["x", ToolCall("id0", "f", "{")], calls(call(0, "id0", "f", "{")) + piece({"content": "x"})), [], DONE)
def test_any_parts_cut_anywhere(told, places, end):
    expected, body = told
    reader, came = Reader(), []
    for some in cut(body + end, places):
        came += reader.feed(some)
    came += reader.finish()
    assert joined(came) == expected
    if expected:
        assert reader.begun and not reader.malformed and reader.failed is None


odd = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["thinking", "text"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "content",
                    "reasoning",
                    "reasoning_details",
                    "refusal",
                    "tool_calls",
                    "function_call",
                    "function",
                    "name",
                    "arguments",
                    "id",
                    "index",
                    "type",
                    "text",
                    "thinking",
                ]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(st.lists(odd, max_size=5), st.booleans())
def test_no_message_makes_it_fail(messages, think_tags):
    reader = Reader(think_tags=think_tags)
    came = [part for message in messages for part in reader.feed(piece(message))] + reader.finish()
    for part in came:
        assert isinstance(part, (str, Reasoning, Refusal, ToolCall))
        assert part if isinstance(part, str) else part.text
        if isinstance(part, ToolCall):
            assert all(type(value) is str for value in (part.call_id, part.name, part.arguments))
            assert part.call_id and part.arguments
