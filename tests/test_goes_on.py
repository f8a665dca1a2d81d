"""Sources that go on from the text of an attempt before: one's own, the scripted model, endpoints, the local model.

LLMSTREAM_CUTS sets at how many places the local model's answer is cut (1): each takes its time.
"""

from __future__ import annotations

import json
import os
import random
import threading

import pytest

from llmstream_nb import Disagrees, read_answer
from llmstream_nb.answers.ask import stop_answer
from llmstream_nb.answers.produce import Producer, Writing
from llmstream_nb.llm import local, prepared
from llmstream_nb.llm import sources as llm
from llmstream_nb.llm.behind import behind, head
from llmstream_nb.llm.completion import Completion
from llmstream_nb.llm.endpoint import ModelError
from llmstream_nb.llm.own import OwnSource
from llmstream_nb.llm.scripted import Server, server
from llmstream_nb.llm.sources import complete
from llmstream_nb.protocol.events import Continued, Ended, Failed, Restarted, text_of
from llmstream_nb.protocol.parts import Reasoning, Text
from llmstream_nb.protocol.wire import EntryID

from .conftest import FAST
from .model import record_of, stream_of, wait_for
from .web import Writer

QUESTION = "What is a consumer group?"
WHOLE = prepared.reply(QUESTION)
CUTS = int(os.environ.get("LLMSTREAM_CUTS", "1"))
pytestmark = pytest.mark.slow


# ------------------------------------------------------------------------------------------ what comes behind a text


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("The quick brown", "The quick"),
        ("The quick ", "The quick"),
        ("The quick\n\n", "The quick"),
        ("The quick\n\n  br", "The quick"),
        ("The", ""),
        ("\n The", ""),
        ("", ""),
    ],
)
def test_a_model_is_given_all_before_the_last_white_space(text: str, given: str) -> None:
    assert head(text) == given


@pytest.mark.parametrize(
    ("kept", "said", "new"),
    [
        ("The quick br", [" brown", " fox"], "own fox"),
        ("The quick br", [" ", "b", "r", "own", " fox"], "own fox"),
        ("The quick ", [" brown"], "brown"),
        ("The quick br", [" br"], ""),  # all is said again, and nothing more
        ("The quick ", [], ""),  # nothing but white space is not said again: it was all
        ("The quick\n\n", ["\n"], ""),
        ("\n\nHi.\n\n", ["\n\n", "Hi.\n\nMore"], "More"),  # all is said again, and begins as the rest does
        (" the cat sat on the", [" the", " cat sat on the mat"], " mat"),
        (" the cat sat on the", [" the", " cat"], " cat"),  # it only looked so
        (" the cat sat on the", [" the", " cat", " slept"], " cat slept"),
        ("The quick br", ["The ", "quick brown"], "own"),  # of one that begins at the beginning, and agrees
        ("The", ["Th", "e quick"], " quick"),
        ("is \U0001f600\U0001f600", [" \ud83d", "\ude00\ud83d", "\ude00\ud83d", "\ude00!"], "\U0001f600!"),
        ("The quick br", [Text(" brown"), Reasoning("hm")], "own"),
    ],
)
def test_what_agrees_is_said_once(kept: str, said: list, new: str) -> None:
    parts = list(behind(kept, iter(said)))
    texts = [getattr(part, "text", part) for part in parts if not isinstance(part, Reasoning)]
    assert "".join(texts).encode("utf-16", "surrogatepass").decode("utf-16") == new and all(texts)


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ("The quick br", [" black"]),
        ("Step one.\n\n", ["\n", Reasoning("hm")]),
        ("The quick br", ["own fox"]),
        ("The quick br", [" b"]),
        ("The quick br", []),
        ("The quick ", ["brown"]),
        ("The quick br", ["The slow"]),
        ("The quick br", ["The quick"]),
        ("The quick br", [Reasoning("hm"), " brown"]),
    ],
)
def test_what_disagrees_raises_before_anything_is_passed_on(kept: str, said: list) -> None:
    new = []
    with pytest.raises(Disagrees):
        new.extend(behind(kept, iter(said)))
    assert not new


def failing(error: str, *before: str):
    yield from before
    raise ModelError(error, "words")


@pytest.mark.parametrize(
    ("error", "before", "raises"),
    [
        ("BadRequest", [], Disagrees),  # it may refuse only to go on
        ("ServerError", [" b"], Disagrees),
        ("EmptyAnswer", [], Disagrees),
        ("RateLimited", [], ModelError),
        ("ConnectionDropped", [" brown"], ModelError),
        ("BadRequest", [" brown"], ModelError),
    ],
)
def test_a_model_that_refuses_to_go_on_is_asked_anew_other_errors_stand(error, before, raises) -> None:
    with pytest.raises(raises):
        list(behind("The quick br", failing(error, *before)))


@pytest.mark.parametrize(("error", "ends"), [("BadRequest", False), ("ServerError", False), ("EmptyAnswer", True)])
def test_a_refusal_after_white_space_is_no_end(error: str, ends: bool) -> None:
    if ends:
        assert not list(behind("Step one.\n\n", failing(error)))
        return
    with pytest.raises(Disagrees):
        list(behind("Step one.\n\n", failing(error)))


# ------------------------------------------------------------------------------------------------- one's own sources


def yields(question, topic, prefix=""):
    yield from WHOLE[len(prefix) :].splitlines(keepends=True)


def returns(question, topic, *, prefix):
    return WHOLE[len(prefix) :]


async def yields_later(question, topic, prefix=""):
    for text in WHOLE[len(prefix) :].splitlines(keepends=True):
        yield text


async def returns_later(question, topic, prefix=""):
    return [WHOLE[len(prefix) :]]


class Called:
    def __call__(self, question, topic, prefix=""):
        return iter([WHOLE[len(prefix) :]])


@pytest.mark.parametrize("function", [yields, returns, yields_later, returns_later, Called()])
@pytest.mark.parametrize("stream", [True, False])
def test_a_function_with_a_prefix_goes_on(function, stream: bool) -> None:
    for cut in (0, 1, 100, len(WHOLE)):
        source = OwnSource(function, QUESTION, None, stream=stream)
        assert source.goes_on(WHOLE[:cut]) == (cut > 0)
        assert WHOLE[:cut] + "".join(source) == WHOLE
    assert "".join(OwnSource(function, QUESTION, None, stream=stream)) == WHOLE


def test_a_function_without_does_not() -> None:
    assert not OwnSource(lambda question, topic: "so", QUESTION, None).goes_on("s")
    assert not OwnSource(lambda question, topic, **others: "so", QUESTION, None).goes_on("s")
    assert not OwnSource(dict, QUESTION, None).goes_on("s")  # written in C: nobody knows its parameters


def test_after_it_disagreed_it_begins_anew() -> None:
    given = []

    def source(question, topic, prefix=""):
        given.append(prefix)
        if prefix:
            raise Disagrees
        return "anew"

    own = OwnSource(source, QUESTION, None)
    assert own.goes_on("so ")
    with pytest.raises(Disagrees):
        list(own)
    assert not own.goes_on("so ") and list(own) == ["anew"] and given == ["so ", ""]


def test_messages_are_handed_on_to_who_wants_them() -> None:
    said = [{"role": "user", "content": "?"}]
    for messages in (said, None):
        assert list(OwnSource(lambda q, t, messages: json.dumps(messages), "?", None, messages=messages)) == [
            json.dumps(messages)
        ]
    assert list(OwnSource(lambda q, t: "so", "?", None, messages=said)) == ["so"]


def test_without_stream_parts_of_a_kind_are_one() -> None:
    own = OwnSource(lambda *_: [Reasoning("h"), Reasoning("m"), "a", Text("b")], "?", None, stream=False)
    assert list(own) == [Reasoning("hm"), "ab"]


# -------------------------------------------------------------------------------------------------------- in an answer


def taken_over(client, source, kept: str = WHOLE[:200], writing: Writing | None = None):
    """All events of who has seen the first attempt, after a second one by this source; its producer is done."""
    first = kept.split(" ", maxsplit=1)[0]
    Writer(client, "a").say(first, kept[len(first) :]).fall_silent()
    events = []
    reading = threading.Thread(
        target=lambda: events.extend(read_answer("a", client=client, timing=FAST, timeout=20)), daemon=True
    )
    reading.start()
    producer = Producer(client, record_of(client), source, FAST, writing)
    producer.run()
    reading.join(60)
    assert not reading.is_alive()
    return events


def told(events) -> list[type]:
    return [type(event) for event in events if isinstance(event, (Continued, Restarted, Ended, Failed))]


@pytest.mark.parametrize("made", ["own", "scripted"])
def test_an_heir_goes_on(client, made: str) -> None:
    asked = {"own": lambda: OwnSource(yields, QUESTION, None), "scripted": lambda: scripted_source("goes_on")}
    events = taken_over(client, asked[made]())
    assert told(events) == [Continued, Ended] and text_of(events) == WHOLE
    assert record_of(client)["text"] == WHOLE
    start, kept, *rest = [entry for entry in stream_of(client) if entry.id.attempt == 2]
    assert start.data["continues"] == "1-2" and kept.text == WHOLE[:200] and rest
    late = list(read_answer("a", client=client))
    assert text_of(late) == WHOLE
    resumed = list(read_answer("a", str(EntryID(1, 1)), client=client))
    assert text_of(resumed, WHOLE.split(" ")[0]) == WHOLE


def test_an_heir_that_disagrees_begins_anew(client) -> None:
    kept = "Nobody ever said so " * 8
    events = taken_over(client, scripted_source("goes_on"), kept)
    assert told(events) == [Continued, Restarted, Ended] and text_of(events) == WHOLE == record_of(client)["text"]


def test_what_an_heir_said_before_it_disagreed_is_not_in_the_next_attempt(client) -> None:
    def turncoat(question, topic, prefix=""):
        if prefix:
            yield Reasoning("LEAK ")
            yield "LEAK "
            raise Disagrees
        yield "A whole new answer."

    events = taken_over(client, OwnSource(turncoat, QUESTION, None), writing=Writing(coalesce_ms=60_000))
    assert told(events) == [Continued, Restarted, Ended] and text_of(events) == "A whole new answer."
    assert record_of(client)["text"] == "A whole new answer." and "LEAK" not in json.dumps(record_of(client))
    assert not [entry for entry in stream_of(client) if entry.id.attempt > 2 and "LEAK" in entry.text]


def test_an_heir_that_was_not_asked_to_begins_anew(client) -> None:
    events = taken_over(client, scripted_source(""))
    assert told(events) == [Restarted, Ended] and text_of(events) == WHOLE


def test_who_disagrees_with_nothing_has_failed(client) -> None:
    def stubborn(question, topic, prefix=""):
        raise Disagrees

    events = taken_over(client, OwnSource(stubborn, QUESTION, None))
    assert told(events) == [Continued, Restarted, Failed] and events[-1].error == "Disagrees"


def test_an_answer_that_somebody_ends_while_its_heir_begins_anew_stays_ended(client) -> None:
    def stubborn(question, topic, prefix=""):
        raise Disagrees

    def stopped():
        release()
        stop_answer("a", client=client, timing=FAST)

    Writer(client, "a").say("so ").fall_silent()
    producer = Producer(client, record_of(client), OwnSource(stubborn, QUESTION, None), FAST)
    release, producer.attempt.release = producer.attempt.release, stopped
    producer.run()
    assert type(producer.error).__name__ == "Fenced"
    assert [entry.id.attempt for entry in stream_of(client) if entry.final] == [3]


# ---------------------------------------------------------------------------------------- endpoints


def scripted_source(options: str, **given) -> Completion:
    return complete(QUESTION, source="scripted", model=f"scripted:pace=0,{options}".rstrip(","), **given)


@pytest.mark.parametrize("stream", [True, False])
def test_the_scripted_model_goes_on_at_any_place(stream: bool) -> None:
    dice = random.Random(1)
    for cut in [1, len(WHOLE), *(dice.randrange(len(WHOLE)) for _ in range(20))]:
        source = scripted_source("goes_on", stream=stream)
        assert source.goes_on(WHOLE[:cut])
        assert WHOLE[:cut] + "".join(source) == WHOLE and source.finish_reason in ("stop", None)


def test_it_does_not_where_tools_may_be_called_nor_without_a_text() -> None:
    assert not scripted_source("goes_on").goes_on("")
    source = scripted_source("goes_on")
    asked = dict(source._asked)
    endpoint = llm._endpoint("scripted", "scripted:goes_on")
    for params, can in [({}, True), ({"tools": [{"type": "function"}]}, False), ({"temperature": 1.0}, True)]:
        assert Completion(endpoint, asked | {"extra_body": params}, 5, 5).goes_on("so") == can
    said = [*asked["messages"], {"role": "assistant", "content": "begin so"}]
    assert not Completion(endpoint, asked | {"messages": said}, 5, 5).goes_on("so")


@pytest.mark.parametrize(("model", "agrees"), [("scripted:pace=0,goes_on", True), ("scripted:pace=0", False)])
def test_an_endpoint_goes_on_that_is_said_to(monkeypatch, model: str, agrees: bool) -> None:
    """The second one knows nothing of it: it answers from the beginning, which is passed over while it agrees."""
    other = Server()
    monkeypatch.setenv("OPENAI_BASE_URL", other.url)
    monkeypatch.setenv("OPENAI_API_KEY", other.key)
    assert not complete(QUESTION, source="openai", model=model).goes_on(WHOLE[:99])
    monkeypatch.setenv("OPENAI_GOES_ON", "1")
    source = complete(QUESTION, source="openai", model=model)
    assert source.goes_on(WHOLE[:99]) and WHOLE[:99] + "".join(source) == WHOLE
    source = complete(QUESTION, source="openai", model=model)
    assert source.goes_on("Somebody else spoke")
    with pytest.raises(Disagrees):
        next(iter(source))
    assert not source.goes_on("Somebody else spoke") and "".join(source) == WHOLE
    other.shutdown()
    other.server_close()


def test_one_that_is_closed_while_it_agrees_is_not_asked_anew() -> None:
    source = complete(QUESTION, source="scripted", model="scripted:stall=0,goes_on,think=0")
    assert source.goes_on(WHOLE[:99])
    came = []
    reading = threading.Thread(target=lambda: came.append(list(source)), daemon=True)
    reading.start()
    wait_for(lambda: server().active)
    source.close()
    reading.join(60)
    assert came == [[]] and list(source) == []


# ---------------------------------------------------------------------------------------- the local model


@pytest.mark.skipif(not local.installed(), reason="the local model's packages are not installed")
@pytest.mark.parametrize("backend", ["fake"])
def test_the_local_model_keeps_its_words_and_goes_on(client) -> None:
    question, dice, agreed = "Why is the sky blue?", random.Random(7), 0
    few = {"params": {"max_tokens": 24}}
    whole = "".join(complete(question, source="local", **few))
    for number in range(CUTS):
        kept = whole[: dice.randrange(20, len(whole) - 20)]
        name = f"cut{number}"
        Writer(client, name).say(kept).fall_silent()
        Producer(client, record_of(client, name), complete(question, source="local", **few), FAST).run()
        text = record_of(client, name)["text"]
        starts = [entry for entry in stream_of(client, name) if entry.kind == "start"]
        agreed += len(starts) == 2
        assert record_of(client, name)["reason"] in ("stop", "length")
        assert text.startswith(kept) or len(starts) == 3, f"{kept!r} is no beginning of {text!r}"
    print(f"{agreed} of {CUTS} went on")
    assert agreed >= CUTS * 0.5 or CUTS == 1
