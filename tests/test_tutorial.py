"""The tutorial's pattern: it works for one asker, and breaks as the tutorial's own code does."""

from __future__ import annotations

import json
import logging
import threading
import uuid

import pytest

from llmstream_nb import complete, tutorial
from llmstream_nb.llm.endpoint import ModelError

from .model import wait_for

SHORT = 0.3  # seconds until a reader that waits in vain gives up


@pytest.fixture
def stream(client):
    """A shared stream of this test's own."""
    name = f"{client.names.prefix}:OPENAI_STREAM"
    yield name
    client.delete(name)


def words(*deltas):
    """A source that answers with these deltas."""
    return lambda *_: deltas


def put(client, stream, question_id, *texts):
    """Add chunks of this question; return the last one's ID."""
    ids = [tutorial.add_item_to_stream(client, stream, {"questionId": question_id, "chunkOutput": t}) for t in texts]
    return ids[-1]


def read(client, stream, last_id, question_id, timeout=SHORT):
    """What a reader is given, without START and END, and whether it saw the END."""
    texts = []
    try:
        tutorial.read_stream(
            client,
            stream,
            last_id,
            question_id,
            lambda fields, _: texts.append(fields["chunkOutput"]),
            timeout=timeout,
        )
    except TimeoutError:
        return texts, False
    return texts, True


def test_one_asker_end_to_end(client, stream):
    """The reader starts first, as in the tutorial, and gets START, all chunks in order, and END."""
    seen, question_id = [], str(uuid.uuid4())
    last_id = tutorial.get_last_id_of_stream(client, stream)
    reader = threading.Thread(
        target=tutorial.read_stream,
        args=(client, stream, last_id, question_id, lambda fields, entry_id: seen.append((entry_id, fields))),
    )
    reader.start()
    record = tutorial.ask_question(
        client,
        question_id,
        "Redis",
        "What is a stream?",
        stream=stream,
        source="scripted",
        model="scripted:pace=0",
    )
    reader.join(60)
    assert not reader.is_alive()

    texts = [fields["chunkOutput"] for _, fields in seen]
    assert texts[0] == f"START:{question_id};"
    assert texts[-1] == f";END:{question_id}"
    whole = "".join(
        complete("What is a stream?", topic="Redis", source="scripted", model="scripted:pace=0", stream=False)
    )
    assert "".join(texts[1:-1]) == whole
    assert len(texts) > 10
    assert {fields["questionId"] for _, fields in seen} == {question_id}
    assert record == {
        "topic": "Redis",
        "topicQuestion": "What is a stream?",
        "questionId": question_id,
        "streamName": stream,
        "streamStartMessageId": seen[0][0],
        "streamEndMessageId": seen[-1][0],
    }
    key = f"questions:{question_id}"
    assert json.loads(client.get(key)) == record
    assert client.ttl(key) == client.ttl(stream) == -1  # nothing expires
    client.delete(key)


def test_the_topic_and_the_question_reach_the_source(client, stream):
    asked = []
    tutorial.ask_question(
        client,
        "q",
        "Redis",
        "Why?",
        stream=stream,
        source=lambda question, topic: asked.append((question, topic)) or ["."],
    )
    assert asked == [("Why?", "Redis")]
    client.delete("questions:q")


def test_the_last_id(client, stream):
    assert tutorial.get_last_id_of_stream(client, stream) == "0-0"
    put(client, stream, "q", "a")
    newest = put(client, stream, "q", "b")
    assert tutorial.get_last_id_of_stream(client, stream) == newest


def test_the_reader_waits_for_entries_to_come(client, stream):
    """It blocks, and goes on with what is added only then."""
    seen = []
    reader = threading.Thread(
        target=tutorial.read_stream,
        args=(client, stream, "0-0", "q", lambda fields, _: seen.append(fields["chunkOutput"])),
    )
    reader.start()
    for text in ("START:q;", "one", ";END:q"):
        put(client, stream, "q", text)
        wait_for(lambda text=text: seen[-1:] == [text])
    reader.join(60)
    assert not reader.is_alive()


def test_answers_one_after_the_other_do_not_mix(client, stream):
    put(client, stream, "a", "START:a;", "old", ";END:a")
    last_id = tutorial.get_last_id_of_stream(client, stream)
    put(client, stream, "b", "START:b;", "new", ";END:b")
    assert read(client, stream, last_id, "b") == (["START:b;", "new", ";END:b"], True)


# ------------------------------------------------------------------------------------------- where it breaks


def test_two_askers_mix(client, stream):
    """A reader passes on all that lies between its START and its END, the other's chunks included."""
    put(client, stream, "a", "START:a;", "red ")
    before_b = put(client, stream, "a", "roses ")
    put(client, stream, "b", "START:b;", "blue ")
    put(client, stream, "a", "are", ";END:a")
    put(client, stream, "b", "seas", ";END:b")
    assert read(client, stream, "0-0", "a") == (
        ["START:a;", "red ", "roses ", "START:b;", "blue ", "are", ";END:a"],
        True,
    )
    assert read(client, stream, before_b, "b") == (
        ["START:b;", "blue ", "are", ";END:a", "seas", ";END:b"],
        True,
    )


def test_an_asker_starves_when_anothers_chunk_comes_first(client, stream, monkeypatch):
    """Its last id stands still before START: it reads the same entry over and over, and gets nothing."""
    put(client, stream, "a", "START:a;", "red ")
    last_id = tutorial.get_last_id_of_stream(client, stream)  # b asks now
    put(client, stream, "a", "roses")  # and a's next chunk is faster than b's START
    put(client, stream, "b", "START:b;", "blue", ";END:b")
    reads, xread = [], client.xread
    monkeypatch.setattr(client, "xread", lambda *args, **kw: reads.append(args) or xread(*args, **kw))
    assert read(client, stream, last_id, "b") == ([], False)
    assert len(reads) > 2
    assert all(args == ({stream: last_id},) for args in reads)


def test_dollar_loses_what_came_between_two_reads(client, stream):
    put(client, stream, "q", "START:q;", "one")
    assert read(client, stream, "$", "q") == ([], False)


def test_a_model_that_writes_the_end_ends_its_reader(client, stream):
    source = words("The answer closes with ", ";END:q", " and goes on.")
    tutorial.ask_question(client, "q", None, "?", stream=stream, source=source)
    assert read(client, stream, "0-0", "q") == (["START:q;", "The answer closes with ", ";END:q"], True)
    client.delete("questions:q")


def test_a_model_that_fails_leaves_its_reader_waiting(client, stream):
    with pytest.raises(ModelError):
        tutorial.ask_question(client, "q", None, "?", stream=stream, source="scripted", model="scripted:pace=0,drop=2")
    texts, ended = read(client, stream, "0-0", "q")
    assert (texts[0], ended) == ("START:q;", False)
    assert not client.exists("questions:q")


def test_a_chunk_that_redis_refuses_is_lost_without_an_error(client, stream, caplog):
    """A lone surrogate can't be written as UTF-8, and an XADD to another type is refused."""
    with caplog.at_level(logging.WARNING):
        tutorial.ask_question(client, "q", None, "?", stream=stream, source=words("a", "\ud83d", "c"))
        assert read(client, stream, "0-0", "q") == (["START:q;", "a", "c", ";END:q"], True)
        client.set(f"{stream}:other", "text")
        assert tutorial.add_item_to_stream(client, f"{stream}:other", {"chunkOutput": "a"}) == ""
    assert caplog.text.count("add_item_to_stream") == 2
    client.delete("questions:q", f"{stream}:other")


@pytest.mark.slow
def test_readers_share_one_connection(client, stream):
    """While one reader blocks, another can't read, though its entries are there; and it does not hang."""
    put(client, stream, "q", "START:q;", ";END:q")
    waiting = threading.Thread(target=read, args=(client, f"{stream}:quiet", "0-0", "x", 0.5))
    waiting.start()
    wait_for(tutorial._connection.locked)
    with pytest.raises(TimeoutError, match="taken by other readers"):
        tutorial.read_stream(client, stream, "0-0", "q", print, timeout=0.05)
    waiting.join(60)
    assert read(client, stream, "0-0", "q")[1]


def test_a_reader_gives_up_in_time(client, stream):
    with pytest.raises(TimeoutError, match=r";END:nobody in .* did not come in time"):
        tutorial.read_stream(client, stream, "0-0", "nobody", print, timeout=0.2)
