"""The exercises' checks: they tell right from wrong, explain, and survive whatever they are given."""

from __future__ import annotations

import ast
import builtins
import json
import os
import re
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import openai  # noqa: F401 - it takes a while, which is not the learner's
import pytest
import redis

from llmstream_nb import Answer, Continued, Reasoning, Restarted, Text, ToolCall, ToolResult, ask, checks

from .conftest import FAST
from .model import wait_for
from .versions import SERVERS

NOTEBOOKS = sorted(Path(__file__).parents[1].glob("notebooks/0*.ipynb"))


@pytest.fixture(autouse=True)
def fresh(client):
    """Each test begins with the first hint, and leaves no key of a check behind."""
    checks.verdict.tries.clear()
    yield
    assert not list(client.scan_iter(match=f"{client.names.prefix}:check:*"))


def item(question_id, text):
    return {"questionId": question_id, "chunkOutput": text}


def explained(verdict, *words):
    """Whether this is a failure that says these words, in its text and in both representations."""
    assert verdict.passed is False
    assert not verdict
    assert repr(verdict).startswith("✗ Not yet: ")
    assert "✗ Not yet: " in verdict._repr_html_()
    assert "Hint 1 of 3: " in repr(verdict)
    for word in words:
        assert word in verdict.text
    assert ":check:" not in repr(verdict)  # a key that differs from run to run
    return True


# -------------------------------------------------------------------------------------------- right solutions


def right_get_last_id(client, stream):
    entries = client.xrevrange(stream, count=1)
    return entries[0][0] if entries else "0-0"


def right_produce(client, stream, question_id, chunks):
    try:
        for chunk in chunks:
            client.xadd(stream, item(question_id, chunk))
    finally:
        client.xadd(stream, item(question_id, f";END:{question_id}"))


def shouts(question, topic):
    for number, word in enumerate(question.upper().split()):
        yield f" {word}" if number else word


def poller(read=lambda client, stream, last: client.xrange(stream, f"({last}"), final=("end", "error")):
    def poll(client, stream, last):
        entries = read(client, stream, last)
        text = "".join(entry["text"] for _, entry in entries if entry["kind"] == "text")
        return text, entries[-1][0] if entries else last, any(entry["kind"] in final for _, entry in entries)

    return poll


def by_xread(client, stream, last):
    return [entry for _, entries in client.xread({stream: last}) for entry in entries]


def produce_with_start(client, stream, question_id, chunks):
    client.xadd(stream, item(question_id, f"START:{question_id};"))
    right_produce(client, stream, question_id, chunks)


def reader(*, count=None, block=1000, stop=None, mine=True, follow=True, text=lambda t: t, start="", once=False):
    """A reader of the exercise, right by default."""

    def read(client, stream, last_id, question_id):
        end, words = f";END:{question_id}", []
        last_id = start or last_id
        while True:
            reply = client.xread({stream: last_id}, count=count, block=block)
            if once and not reply:
                return "".join(words)
            for entry_id, fields in reply[0][1] if reply else []:
                if follow:
                    last_id = entry_id
                if mine and fields["questionId"] != question_id:
                    continue
                if (stop or (lambda t: t == end))(fields["chunkOutput"]):
                    return text("".join(words))
                if fields["chunkOutput"] != f"START:{question_id};":
                    words.append(fields["chunkOutput"])

    return read


def claimer(*, idle=0, count=None, ack=True, follow=True, text=lambda entries: [f["text"] for _, f in entries]):
    """A claimer of the exercise, right by default."""

    def take_over(client, stream, group, consumer):
        cursor, found = "0-0", []
        while True:
            cursor, entries, *_ = client.xautoclaim(stream, group, consumer, idle, cursor, count)
            for entry_id, _ in entries if ack else []:
                client.xack(stream, group, entry_id)
            found += entries
            if cursor == "0-0" or not follow:
                return text(found)

    return take_over


def claims_until_nothing_is_left(client, stream, group, consumer):
    texts = []
    while entries := client.xautoclaim(stream, group, consumer, 0)[1]:
        texts += [fields["text"] for _, fields in entries]
        client.xack(stream, group, *[entry_id for entry_id, _ in entries])
    return texts


def xpending_and_xclaim(client, stream, group, consumer):
    pending = client.xpending_range(stream, group, "-", "+", 1000)
    ids = [entry["message_id"] for entry in pending]
    entries = client.xclaim(stream, group, consumer, 0, ids) if ids else []
    for entry_id, _ in entries:
        client.xack(stream, group, entry_id)
    return [fields["text"] for _, fields in entries]


def claims_and_reads_its_own(client, stream, group, consumer):
    """XCLAIM first, and then what is pending with oneself."""
    while pending := client.xpending_range(stream, group, "-", "+", 10):
        if all(entry["consumer"] == consumer for entry in pending):
            break
        client.xclaim(stream, group, consumer, 0, [e["message_id"] for e in pending], justid=True)
        found = client.xreadgroup(group, consumer, {stream: "0"})[0][1]
        client.xack(stream, group, *[entry_id for entry_id, _ in found])
        yield from (fields["text"] for _, fields in found)


def then_removes_the_dead(client, stream, group, consumer):
    texts = claimer()(client, stream, group, consumer)
    client.xgroup_delconsumer(stream, group, "worker-1")
    return texts


def resumer(*, block=1000, count=None, start=("start",), final=("end", "error"), kinds=("text",), anew="", empty=False):
    """A reader of the exercise of notebook 06, right by default."""

    def resume(client, stream, after, text):
        text = "" if empty else text
        while True:
            for _, entries in client.xread({stream: after}, count=count, block=block):
                for entry_id, entry in entries:
                    after = entry_id
                    if entry["kind"] in start:
                        text = anew
                    elif entry["kind"] in final:
                        return text
                    elif entry["kind"] in kinds:
                        text += entry["text"]

    return resume


def resumes_by_xrange(client, stream, after, text):
    while True:
        for entry_id, entry in client.xrange(stream, f"({after}", "+"):
            after = entry_id
            text = {"start": "", "text": text + entry["text"]}.get(entry["kind"], text)
            if entry["kind"] in ("end", "error"):
                return text
        time.sleep(0.02)


def last_id(event, headers):
    return {"Last-Event-ID": event["id"]} if "id" in event else headers


def text_of(event):
    return json.loads(event["data"])["text"]


def watcher(*, keep=last_id, begin=None, anew="", final=("end", "failed"), kinds=("text",), text=text_of):
    """A viewer of the exercise of notebook 08, right by default."""

    def watch(get):
        shown, headers = "", begin or {}
        while True:
            for event in get(headers):
                headers = keep(event, headers)
                if event["event"] == "start":
                    shown = shown if anew is None else anew
                elif event["event"] in final:
                    return shown
                elif event["event"] in kinds:
                    shown += text(event)

    return watch


def pager(*, size=None, after=lambda last: f"({last}", pages=lambda found: found):
    """A solution of the pages, and with other values of what is easily got wrong the wrong ones."""

    def all_pages(client, stream, count):
        found, begin = [], "-"
        while page := client.xrange(stream, begin, "+", count=size or count):
            found.append(page)
            begin = after(page[-1][0])
            if len(found) > 20:
                break
        return pages(found)

    return all_pages


def pages_by_xread(client, stream, size):
    last_id = "0-0"
    while reply := client.xread({stream: last_id}, count=size):
        yield reply[0][1]
        last_id = reply[0][1][-1][0]


def collector(*, least=1, per_read=False, limit=True, first=None, patient=False):
    """A solution of the reader that gives up, and with other values of what is easily got wrong the wrong ones."""

    def collect(client, stream, last_id, wanted, seconds):
        deadline, last_id, found = time.monotonic() + seconds, first or last_id, []
        while True:
            left = seconds if per_read else deadline - time.monotonic()
            count = wanted - len(found) if limit else None
            for _, entries in client.xread({stream: last_id}, count=count, block=max(least, int(left * 1000))):
                found += [fields["word"] for _, fields in entries]
                last_id = entries[-1][0]
                break
            else:
                if per_read:
                    return found
            if (len(found) >= wanted and not patient) or (time.monotonic() >= deadline and not per_read):
                return found

    return collect


def rebuilder(*, mine=True, whole=False, ends=slice(1, -1)):
    """A solution of the text by its record, and with other values of what is easily got wrong the wrong ones."""

    def rebuild(client, key):
        record = json.loads(client.get(key))
        start, end = record["streamStartMessageId"], record["streamEndMessageId"]
        entries = client.xrange(record["streamName"], *(() if whole else (start, end)))
        me = record["questionId"]
        return "".join([f["chunkOutput"] for _, f in entries if not mine or f["questionId"] == me][ends])

    return rebuild


def rebuilds_by_words(client, key):
    return rebuilder(ends=slice(None))(client, key).replace("START:a;", "").replace(";END:a", "")


def many_reader(*, together=True, kinds=("text",), final="end", of="kind"):
    """A solution of the several answers, and with other values of what is easily got wrong the wrong ones."""

    def read(client, last_ids):
        texts = dict.fromkeys(last_ids, "")
        while last_ids:
            for key, entries in client.xread(last_ids, block=1000):
                for entry_id, fields in entries:
                    last_ids[key] = entry_id
                    if fields["kind"] in kinds:
                        texts[key] += fields["text"]
                    if fields[of] == final:
                        del last_ids[key]
                        break
        return texts

    def read_many(client, keys):
        if together:
            return read(client, dict.fromkeys(keys, "0-0"))
        return {key: read(client, {key: "0-0"})[key] for key in keys}

    return read_many


def sees(*, texts=Text, anew=Restarted, key=lambda call: call.call_id, given=lambda r: r.error or r.content, by=list):
    """What a person should see of an answer, right by default."""

    def visible(events):
        text, names, results = "", {}, {}
        for event in events:
            if isinstance(event, anew):
                text, names, results = "", {}, {}
            elif isinstance(event, texts):
                text += event.text
            elif isinstance(event, ToolCall):
                names[key(event)] = event.name
            elif isinstance(event, ToolResult):
                results[event.call_id] = given(event)
        return text, by((name, results.get(call_id)) for call_id, name in names.items())

    return visible


def sees_by_order(events):
    """Takes the first result for that of the first call."""
    events = list(events)
    names = [event.name for event in events if isinstance(event, ToolCall)]
    given = [event.error or event.content for event in events if isinstance(event, ToolResult)]
    text = "".join(event.text for event in events if isinstance(event, Text))
    return text, list(zip(names, given + [None] * (len(names) - len(given)), strict=True))


def knows_all_kinds(events):
    """Takes for a result what is nothing else."""
    for event in (events := list(events)):
        if not isinstance(event, (Text, Reasoning, ToolCall, Restarted)):
            assert event.content
    return sees()(events)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "solution"),
    [
        (checks.get_last_id, right_get_last_id),
        (checks.pages, pager()),
        (checks.pages, pages_by_xread),
        (checks.collect, collector()),
        (checks.rebuild, rebuilder()),
        (checks.rebuild, rebuilds_by_words),
        (checks.read_many, many_reader()),
        (checks.produce, right_produce),
        (checks.produce, produce_with_start),
        (checks.read, reader()),
        (checks.read, reader(count=1)),
        (checks.read, reader(block=20)),
        (checks.read, reader(block=0)),
        (checks.claim, claimer()),
        (checks.claim, claimer(count=1)),
        (checks.claim, claimer(count=1000)),
        (checks.claim, claims_until_nothing_is_left),
        (checks.claim, xpending_and_xclaim),
        (checks.claim, lambda *args: list(claims_and_reads_its_own(*args))),
        (checks.claim, then_removes_the_dead),
        (checks.resume, resumer()),
        (checks.resume, resumer(count=1)),
        (checks.resume, resumer(block=20)),
        (checks.resume, resumes_by_xrange),
        (checks.source, shouts),
        (checks.source, lambda question, topic: list(shouts(question, topic))),
        (checks.poll, poller()),
        (checks.poll, poller(by_xread)),
        (checks.poll, lambda *args: list(poller()(*args))),
        (checks.visible, sees()),
        (checks.last_event_id, watcher()),
        (checks.last_event_id, watcher(begin={"last-event-id": "0-0"})),
        (
            checks.last_event_id,
            watcher(
                keep=lambda event, headers: headers | {"LAST-EVENT-ID": event.get("id", headers.get("LAST-EVENT-ID"))}
            ),
        ),
    ],
)
def test_right_solutions(client, check, solution):
    verdict = check(solution)
    assert verdict.passed, verdict
    assert verdict
    assert repr(verdict).startswith("✓ Right: ")
    assert "✓ Right: " in verdict._repr_html_()
    assert "Hint" not in repr(verdict)
    assert repr(check(solution)) == repr(verdict)


# ------------------------------------------------------------------------------------ the optional exercises


def test_stopped(client):
    def slowly(question, topic):
        for _ in range(2000):
            yield "word "
            time.sleep(0.005)

    def cut(answer, least):
        wait_for(lambda: len(answer.text) >= least)
        answer.stop()
        return checks.stopped(answer)

    half = ask("?", source=slowly, id="half", timing=FAST)
    wait_for(lambda: half.status == "streaming")
    assert explained(checks.stopped(half), "'half'", "still being written")
    checks.verdict.tries.clear()
    assert cut(half, 10).passed
    quick = ask("?", source=lambda *_: ["one"], id="quick", timing=FAST).wait(60)
    assert explained(checks.stopped(quick), "'quick'", "'stop'", "not 'cancelled'")
    checks.verdict.tries.clear()
    silent = ask("?", source=lambda *_: (time.sleep(0.3) or "" for _ in range(9)), id="silent", timing=FAST)
    assert explained(cut(silent, 0), "before the first piece")
    checks.verdict.tries.clear()
    assert explained(checks.stopped("half"), "what `ask` gave you", "'half'")


@pytest.mark.parametrize(
    ("check", "solution", "words"),
    [
        (checks.pages, pager(size=1000), ["fetches 7 entries at once", "ask for 3"]),
        (checks.pages, pager(after=lambda last: last), ["9-2", "not"]),
        (checks.pages, pager(after=lambda last: f"({last.partition('-')[0]}"), ["not"]),
        (checks.pages, pager(pages=lambda found: found[:-1]), ["not"]),
        (checks.pages, pager(pages=lambda found: [*found, []]), ["[]]"]),
        (checks.pages, pager(pages=lambda found: [[(i,) for i, _ in page] for page in found]), ["pairs of an ID"]),
        (checks.pages, lambda *_: None, ["TypeError"]),
        (checks.collect, lambda *_: None, ["returns None, not ['b', 'c', 'd']"]),
        (checks.collect, collector(first="0-0"), ["returns ['a', 'b', 'c'], not ['b', 'c', 'd']"]),
        (checks.collect, collector(limit=False), ["returns ['b', 'c', 'd', 'e'], not ['b', 'c', 'd']"]),
        (
            checks.collect,
            lambda c, s, last, n, _: collector()(c, s, last, n, 0),
            ["returns ['a'], not ['a', 'b', 'c']"],
        ),
        (checks.collect, collector(per_read=True), ["words keep coming", "all of its reads together"]),
        (checks.collect, collector(patient=True, limit=None), ["not"]),
        (checks.collect, collector(least=0), ["does not return"]),
        (checks.rebuild, lambda *_: None, ["returns None"]),
        (checks.rebuild, rebuilder(mine=False), ["another's", "not 'Redis keeps order.'"]),
        (checks.rebuild, rebuilder(whole=True), ["an older try"]),
        (checks.rebuild, rebuilder(ends=slice(None)), ["START:a;"]),
        (checks.rebuild, rebuilder(ends=slice(1, None)), [";END:a"]),
        (checks.read_many, lambda *_: None, ["return a dictionary"]),
        (checks.read_many, lambda *_: {}, ["not {'one': 'red green '"]),
        (checks.read_many, many_reader(together=False), ["one stream at a time"]),
        (checks.read_many, many_reader(kinds=("start", "text")), ["model"]),
        (checks.read_many, many_reader(final="stop"), ["does not return"]),
    ],
)
@pytest.mark.parametrize("backend", ["fake"], indirect=True)  # the judge is tried here, not Redis
def test_wrong_solutions_of_the_optional_exercises(client, monkeypatch, check, solution, words):
    # A reader that never ends is to be given up soon, one that ends late is to be let end.
    monkeypatch.setattr(checks.running, "TIMEOUT", 1.5 if "does not return" in words else 6.0)
    assert explained(check(solution), *words)


# -------------------------------------------------------------------------------------------- count_entries


@pytest.fixture
def answer(client):
    return ask("?", source=lambda *_: ["one ", "two"], id="counted", timing=FAST).wait(60)


def test_count_entries(client, answer):
    key = client.names.answer("counted").chunks
    verdict = checks.count_entries(answer, key, 4)
    assert verdict.passed
    assert repr(verdict) == "✓ Right: 4 entries under that key."


@pytest.mark.parametrize(
    ("key", "count", "word"),
    [
        ("chunks", 2, "2 is only the text"),
        ("chunks", 5, "not 5 entries"),
        ("chunks", "4", "whole number"),
        ("chunks", [1, 2, 3, 4], "whole number"),
        ("chunks", None, "whole number"),
        ("chunks", True, "whole number"),
        ("question", 4, "does not lie under"),
        ("counted", 4, "does not lie under 'counted'"),
        (None, 4, "does not lie under None"),
    ],
)
def test_a_wrong_key_or_count(client, answer, key, count, word):
    key = getattr(client.names.answer("counted"), key, key) if key else key
    assert explained(checks.count_entries(answer, key, count), word)


def test_braces_that_python_has_filled(client, answer):
    assert explained(checks.count_entries(answer, f"nb00:{answer}:chunks", 4), "without `f`")


def test_count_entries_of_something_else(client, answer):
    assert explained(checks.count_entries(None, "k", 4), "what `ask` gave you; this is None")
    assert explained_later(checks.count_entries("counted", "k", 4), "this is 'counted'")
    gone = checks.count_entries(Answer("gone"), client.names.answer("gone").chunks, 4)
    assert explained_later(gone, "still grows")


def explained_later(verdict, word):
    return verdict.passed is False and word in verdict.text


# --------------------------------------------------------------------------------------------- get_last_id


@pytest.mark.parametrize(
    ("solution", "word"),
    [
        (lambda c, s: c.xrevrange(s, count=1)[0][0], "does not exist, your function raises IndexError"),
        (
            lambda c, s: (c.xrevrange(s, count=1) or [[None]])[0][0],
            "does not exist, your function returns None",
        ),
        (lambda c, s: (c.xrange(s, count=1) or [["0-0"]])[0][0], "returns '9-0', not '10-1'"),
        (lambda c, s: max([i for i, _ in c.xrange(s)], default="0-0"), "returns '9-0', not '10-1'"),
        (lambda c, s: (c.xrevrange(s) or [["0-0"]])[-1][0], "returns '9-0', not '10-1'"),
        (lambda c, s: c.xrevrange(s, count=1)[0], "more than an ID"),
        (lambda c, s: c.xrevrange(s, count=1), "more than an ID"),
        (lambda c, s: right_get_last_id(c, s).encode(), "bytes"),
        (lambda c, s: print(right_get_last_id(c, s)), "returns None, not '5-0'"),
        (lambda *_: "$", "returns '$', not '5-0'"),
        (lambda c, s: int(right_get_last_id(c, s)[0]), "returns 5, not '5-0'"),
        (lambda: "5-0", "raises TypeError"),
    ],
)
def test_wrong_last_ids(client, solution, word):
    assert explained(checks.get_last_id(solution), word)


# ------------------------------------------------------------------------------------------------- produce


def no_end(client, stream, question_id, chunks):
    for chunk in chunks:
        client.xadd(stream, item(question_id, chunk))


def end_in_the_loop(client, stream, question_id, chunks):
    for chunk in chunks:
        client.xadd(stream, item(question_id, chunk))
        client.xadd(stream, item(question_id, f";END:{question_id}"))


def all_in_one(client, stream, question_id, chunks):
    client.xadd(stream, item(question_id, "".join(chunks)))
    client.xadd(stream, item(question_id, f";END:{question_id}"))


def collects(client, stream, question_id, chunks):
    right_produce(client, stream, question_id, list(chunks))


def one_pipeline(client, stream, question_id, chunks):
    with client.pipeline() as pipe:
        right_produce(pipe, stream, question_id, chunks)
        pipe.execute()


def other_fields(client, stream, question_id, chunks):
    for chunk in chunks:
        client.xadd(stream, {"id": question_id, "text": chunk})


def wrong_id(client, stream, question_id, chunks):
    right_produce(client, stream, "q1", chunks)


def plain_end(client, stream, question_id, chunks):
    no_end(client, stream, question_id, chunks)
    client.xadd(stream, item(question_id, "END"))


def skips_the_first(client, stream, question_id, chunks):
    next(chunks, None)
    right_produce(client, stream, question_id, chunks)


def clears_first(client, stream, question_id, chunks):
    client.delete(stream)
    right_produce(client, stream, question_id, chunks)


def trims(client, stream, question_id, chunks):
    right_produce(client, stream, question_id, chunks)
    client.xtrim(stream, maxlen=6, approximate=False)


def no_repeats(client, stream, question_id, chunks):
    last = None
    for chunk in chunks:
        if chunk != last:
            client.xadd(stream, item(question_id, chunk))
        last = chunk
    client.xadd(stream, item(question_id, f";END:{question_id}"))


def end_only_with_chunks(client, stream, question_id, chunks):
    some = False
    for chunk in chunks:
        some = bool(client.xadd(stream, item(question_id, chunk)))
    if some:
        client.xadd(stream, item(question_id, f";END:{question_id}"))


def forgets_the_break(client, stream, question_id, chunks):
    no_end(client, stream, question_id, chunks)
    client.xadd(stream, item(question_id, f";END:{question_id}"))


def hides_the_break(client, stream, question_id, chunks):
    try:
        no_end(client, stream, question_id, chunks)
    except Exception:
        pass
    client.xadd(stream, item(question_id, f";END:{question_id}"))


@pytest.mark.parametrize(
    ("solution", "word"),
    [
        (no_end, "no entry holds the end"),
        (forgets_the_break, "must be written all the same"),
        (hides_the_break, "hides the error"),
        (end_in_the_loop, "before the last chunk"),
        (all_in_one, "the entries hold ['Redis streams keep keep order.']"),
        (collects, "collects before it writes"),
        (one_pipeline, "collects before it writes"),
        (other_fields, "has the fields ['id', 'text']"),
        (wrong_id, "has the `questionId` 'q1'"),
        (plain_end, "the last: 'END'"),
        (skips_the_first, "the entries hold ['streams ', 'keep ', 'keep ', 'order.']"),
        (clears_first, "is gone: only add"),
        (trims, "is gone: only add"),
        (no_repeats, "given the chunks"),
        (end_only_with_chunks, "adds nothing"),
        (lambda *_: None, "adds nothing"),
    ],
)
def test_wrong_producers(client, solution, word):
    assert explained(checks.produce(solution), word)


# ---------------------------------------------------------------------------------------------------- read


def reads_once(client, stream, last_id, question_id):
    words = [f["chunkOutput"] for _, f in client.xread({stream: last_id})[0][1] if f["questionId"] == question_id]
    return "".join(words).replace(f"START:{question_id};", "").partition(f";END:{question_id}")[0]


def ends_with_the_batch(client, stream, last_id, question_id):
    words, ended = [], False
    while not ended:
        reply = client.xread({stream: last_id}, block=1000)
        for entry_id, fields in reply[0][1] if reply else []:
            last_id = entry_id
            if fields["questionId"] == question_id and not fields["chunkOutput"].startswith("START:"):
                words.append(fields["chunkOutput"])
        ended = f";END:{question_id}" in words
    words.remove(f";END:{question_id}")
    return "".join(words)


@pytest.mark.parametrize(
    ("solution", "word"),
    [
        (ends_with_the_batch, "more entries follow the end"),
        (
            reader(mine=False),
            "another asker's entries lie between yours, your function returns 'Hi thereSTART"[:40],
        ),
        (reader(stop=lambda t: "END" in t), "speaks of the end"),
        (reader(stop=lambda t: t.startswith(";END:")), "speaks of the end"),
        (reader(stop=lambda t: ";END:a" in t), "speaks of the end"),
        (reader(start="0-0"), "up to `last_id`"),
        (reader(text=lambda _: None), "returns None"),
        (reader(text=list), "as one string"),
        (reader(text=str.encode), "as one string"),
        (reader(text=lambda t: "START:a;" + t), "holds START or END"),
        (reader(text=lambda t: t + ";END:a"), "holds START or END"),
        (reader(once=True, block=None), "while it reads"),
        (reads_once, "speaks of the end"),
    ],
)
def test_wrong_readers(client, solution, word):
    assert explained(checks.read(solution), word)


@pytest.mark.slow
@pytest.mark.parametrize(
    "solution",
    [
        reader(stop=lambda _: False),  # never stops
        reader(start="$", block=50),  # loses what is there already
        reader(follow=False, block=50, mine=True, stop=lambda _: False, count=1),  # the same entry again and again
    ],
)
def test_readers_that_never_return(client, solution, monkeypatch):
    monkeypatch.setattr(checks.running, "TIMEOUT", 1.0)
    assert explained(checks.read(solution), "does not return: does its loop end?")
    wait_for(lambda: not running(solution.__code__))


def running(code):
    """Whether a thread is inside this code."""
    frames = [frame for ident, frame in sys._current_frames().items() if ident != threading.get_ident()]
    while frames:
        frame = frames.pop()
        if frame.f_code is code:
            return True
        if frame.f_back:
            frames.append(frame.f_back)
    return False


# --------------------------------------------------------------------------------------------------- claim


def also_reads_new_ones(client, stream, group, consumer):
    texts = claimer()(client, stream, group, consumer)
    client.xreadgroup(group, consumer, {stream: ">"})
    return texts


def only_reads_its_own(client, stream, group, consumer):
    return [fields["text"] for _, fields in client.xreadgroup(group, consumer, {stream: "0"})[0][1]]


def acks_without_a_claim(client, stream, group, consumer):
    pending = [e["message_id"] for e in client.xpending_range(stream, group, "-", "+", 1000)]
    texts = [client.xrange(stream, entry_id, entry_id)[0][1]["text"] for entry_id in pending]
    for entry_id in pending:
        client.xack(stream, group, entry_id)
    return texts


def reads_in_the_name_of_the_dead(client, stream, group, consumer):
    entries = client.xreadgroup(group, "worker-1", {stream: "0"})[0][1]
    for entry_id, _ in entries:
        client.xack(stream, group, entry_id)
    return [fields["text"] for _, fields in entries]


def deletes(client, stream, group, consumer):
    entries = client.xautoclaim(stream, group, consumer, 0, count=1000)[1]
    for entry_id, _ in entries:
        client.xack(stream, group, entry_id)
        client.xdel(stream, entry_id)
    return [fields["text"] for _, fields in entries]


def every_group(client, stream, group, consumer):
    return [text for g in client.xinfo_groups(stream) for text in claimer()(client, stream, g["name"], consumer)]


def claims_in_another_group(client, stream, group, consumer):
    client.xautoclaim(stream, "readers", consumer, 0, count=1, justid=True)
    return claimer()(client, stream, group, consumer)


def all_entries(client, stream, group, consumer):
    claimer()(client, stream, group, consumer)
    return [fields["text"] for _, fields in client.xrange(stream)][:-2]


def xpending_without_a_look(client, stream, group, consumer):
    ids = [e["message_id"] for e in client.xpending_range(stream, group, "-", "+", 1000)]
    entries = client.xclaim(stream, group, consumer, 0, ids)
    client.xack(stream, group, *ids)
    return [fields["text"] for _, fields in entries]


def begins_anew(client, stream, group, consumer):
    texts = claimer(ack=False)(client, stream, group, consumer)
    client.xgroup_destroy(stream, group)
    return texts


def moves_the_group(client, stream, group, consumer):
    client.xgroup_setid(stream, group, "$")
    return claimer()(client, stream, group, consumer)


@pytest.mark.parametrize(
    ("solution", "word"),
    [
        (claimer(ack=False), "when five entries are pending, 5 of them still are after your function"),
        (claimer(follow=False), "when 150 entries are pending, your function returns 100 texts: go on until"),
        (claimer(count=2, follow=False), "when five entries are pending, your function returns 2 texts: go on until"),
        (claimer(idle=60_000), "returns []: is the minimum idle time 0"),
        (only_reads_its_own, "returns []: is the minimum idle time 0"),
        (claimer(text=lambda _: None), "returns None: return the list of texts"),
        (claimer(text=lambda entries: None if not entries else [f["text"] for _, f in entries]), "returns None"),
        (claimer(text=lambda entries: entries), "return a list of the texts alone"),
        (claimer(text=lambda entries: [f for _, f in entries]), "return a list of the texts alone"),
        (claimer(text=lambda entries: "".join(f["text"] for _, f in entries)), "return a list of the texts alone"),
        (claimer(text=lambda entries: (f["text"] for _, f in entries)), "return a list of the texts alone"),
        (claimer(text=dict), "return a list of the texts alone"),
        (claimer(text=lambda entries: [i for i, _ in entries]), "returns ['2-0', '3-0', '5-0', '9-0', '10-0'], not"),
        (claimer(text=lambda entries: [f["text"] for _, f in sorted(entries)]), "in the order of their IDs"),
        (claimer(text=lambda entries: [f["text"] for _, f in entries[::-1]]), "in the order of their IDs"),
        (claimer(text=lambda entries: [f["text"] for _, f in entries] * 2), "'text 10', 'text 2', ...], not ['text 2'"),
        (also_reads_new_ones, "takes new entries too: claim, don't read with `>`"),
        (moves_the_group, "takes new entries too"),
        (deletes, "changes the stream: XACK, and leave the entries"),
        (lambda c, s, *_: c.delete(s), "changes the stream: XACK, and leave the entries"),
        (every_group, "changes another group: claim only in `group`"),
        (claims_in_another_group, "changes another group: claim only in `group`"),
        (begins_anew, "makes or destroys a group"),
        (all_entries, "some of these had been acknowledged"),
        (acks_without_a_claim, "claims nothing for the consumer that it is given"),
        (reads_in_the_name_of_the_dead, "claims nothing for the consumer that it is given"),
        (xpending_without_a_look, "when nothing is pending, your function raises"),
        (lambda c, s, g, n: claimer()(c, s, "other", n), "No such key '…' or consumer group 'other'"),
        (lambda *_: [], "returns []: is the minimum idle time 0"),
        (lambda *_: ["text 2", "x"], "returns ['text 2', 'x'], not ['text 2', 'text 3'"),
    ],
)
def test_wrong_claimers(client, solution, word):
    assert explained(checks.claim(solution), word)


@pytest.mark.slow
def test_a_claimer_that_never_returns(client, monkeypatch):
    """With a minimum idle time of 0 and no XACK, there is always something to claim."""

    def take_over(client, stream, group, consumer):
        while client.xautoclaim(stream, group, consumer, 0)[1]:
            pass

    monkeypatch.setattr(checks.running, "TIMEOUT", 0.5)
    assert explained(checks.claim(take_over), "when five entries are pending, your function does not return")
    wait_for(lambda: not running(take_over.__code__))


# -------------------------------------------------------------------------------------------------- resume


def resumes_with_the_saved_entry(client, stream, after, text):
    entries = client.xrange(stream, after)
    return text + "".join(entry["text"] for _, entry in entries if entry["kind"] == "text")


def resumes_without_waiting(client, stream, after, text):
    for _, entry in client.xrange(stream, f"({after}"):
        text = "" if entry["kind"] == "start" else text + entry["text"] if entry["kind"] == "text" else text
    return text


def empties_at_another_attempt(client, stream, after, text):
    while True:
        for _, entries in client.xread({stream: after}, block=1000):
            for entry_id, entry in entries:
                text = text if entry_id.split("-")[0] == after.split("-")[0] else ""
                after = entry_id
                if entry["kind"] in ("end", "error"):
                    return text
                text += entry["text"] if entry["kind"] == "text" else ""


def stops_at_the_word(client, stream, after, text):
    while True:
        for _, entries in client.xread({stream: after}, block=1000):
            for entry_id, entry in entries:
                after = entry_id
                if "end" in (entry["kind"], entry["text"]) or entry["kind"] == "error":
                    return text
                text = "" if entry["kind"] == "start" else text + entry["text"]


def resumes_and_trims(client, stream, after, text):
    client.xtrim(stream, minid=after, approximate=False)
    return resumer()(client, stream, after, text)


@pytest.mark.parametrize(
    ("solution", "word"),
    [
        (resumer(empty=True), "when it goes on after 1-9, your function returns '10 11 ', the rest alone"),
        (resumer(start=()), "when a second attempt begins, your function returns '1 2 3"),
        (resumer(kinds=("text", "start"), start=()), "when it begins at the beginning, your function returns '{}1 2"),
        (resumer(anew="{}"), "when it begins at the beginning, your function returns '{}1 2"),
        (resumes_with_the_saved_entry, "when it goes on after 1-9, your function returns '1 2 3 4 5 6 7 8 9 9"),
        (resumes_without_waiting, "when the entries come while it reads, your function returns '1 2 3 4 5 ', not"),
        (empties_at_another_attempt, "when the producer dies and someone presses Stop, your function returns ''"),
        (stops_at_the_word, "when the text speaks of the end, your function returns 'say ', not"),
        (resumes_and_trims, "changes the stream: reading takes nothing away"),
        (lambda *args: print(resumer()(*args)), "returns None: return the whole text"),
        (lambda *args: list(resumer()(*args)), "return one string"),
        (lambda c, s, after, text: text, "when it begins at the beginning, your function returns '', not '1 2"),
    ],
)
def test_wrong_resumers(client, solution, word):
    assert explained(checks.resume(solution), word)


@pytest.mark.slow
def test_resumers_that_never_return(client, monkeypatch):
    monkeypatch.setattr(checks.running, "TIMEOUT", 0.5)
    for missed, about in (("end", "when it begins at the beginning"), ("error", "when the answer ends in an error")):
        checks.verdict.tries.clear()
        resume = resumer(final=[kind for kind in ("end", "error") if kind != missed], block=50)
        assert explained(checks.resume(resume), f"{about}, your function does not return")
        wait_for(lambda resume=resume: not running(resume.__code__))


# ------------------------------------------------------------------------------------------ source and poll


def shouts_endlessly(question, topic):
    while True:
        yield from shouts(question, topic)


def breaks_off(question, topic):
    yield "WHY"
    raise ValueError("no more")


@pytest.mark.parametrize(
    ("solution", "word"),
    [
        (lambda question, topic: question.upper(), "returns a whole text: `yield` it"),
        (lambda question, topic: None, "returns None, and nothing can be taken from that"),
        (lambda question, topic: [question.upper()], "that is not a word at a time"),
        (lambda question, topic: iter(question.upper()), "that is not a word at a time"),
        (lambda question, topic: question.upper().split(), "one space between two words"),
        (lambda question, topic: (f"{word} " for word in question.upper().split()), "one space between two words"),
        (lambda question, topic: question.split(), "not the words ['WHY', 'STREAMS?']"),
        (lambda question, topic: question.upper().encode().split(), "only text can be streamed"),
        (shouts_endlessly, "not the words"),
        (breaks_off, "asked 'Why streams?', your function raises ValueError: no more"),
        (lambda question: None, "raises TypeError"),
    ],
)
def test_wrong_sources(client, solution, word):
    assert explained(checks.source(solution), word)
    assert not client.zcard(client.names.answers)


def poll_that_takes_every_text(client, stream, last):
    entries = client.xrange(stream, f"({last}")
    return "".join(e["text"] for _, e in entries), entries[-1][0] if entries else last, bool(entries[-1:])


@pytest.mark.parametrize(
    ("solution", "word"),
    [
        (poller(lambda c, s, last: c.xrange(s, last)), "where nothing is new, your function returns ('two'"),
        (poller(lambda c, s, last: c.xrange(s, f"({last}", count=100)), "far behind, your function returns ('xxx"),
        (poller(final=("end",)), "where the model failed, your function returns ('One', '1-2', False)"),
        (poller(final=()), "whether it is over should be True"),
        (poll_that_takes_every_text, "whether it is over should be False"),
        (lambda *args: poller()(*args)[:2], "return three things"),
        (lambda c, s, last: poller()(c, s, "0-0"), "where nothing is new"),
        (lambda c, s, last: c.xread({s: last})[0], "raises IndexError"),
    ],
)
def test_wrong_pollers(client, solution, word):
    assert explained(checks.poll(solution), word)


@pytest.mark.slow
def test_a_poller_that_waits(client, monkeypatch):
    monkeypatch.setattr(checks.running, "TIMEOUT", 0.5)
    waits = poller(lambda c, s, last: [e for _, entries in c.xread({s: last}, block=0) for e in entries])
    assert explained(checks.poll(waits), "where the stream does not exist yet, your function does not return")
    wait_for(lambda: not running(waits.__code__))


# ------------------------------------------------------------------------------------------- last_event_id


def comes_back_from_the_start(get):
    while True:
        text = ""
        for event in get({}):
            if event["event"] == "end":
                return text
            text += json.loads(event["data"]).get("text", "")


def takes_one_connection(get):
    return "".join(json.loads(event["data"]).get("text", "") for event in get({}))


def forgets_where_nothing_came(get):
    text = ""
    headers = {}
    while True:
        last = "0-0"
        for event in get(headers):
            last = event.get("id", last)
            if event["event"] == "end":
                return text
            text += json.loads(event["data"]).get("text", "")
        headers = {"Last-Event-ID": last}


def goes_on_after_the_end(get):
    text, headers = "", {}
    for _ in range(3):
        for event in get(headers):
            headers = {"Last-Event-ID": event["id"]} if "id" in event else headers
            text += json.loads(event["data"]).get("text", "")
    return text


def stops_at_a_word(get):
    text, headers = "", {}
    while True:
        for event in get(headers):
            headers = {"Last-Event-ID": event["id"]} if "id" in event else headers
            if event["event"] == "start":
                text = ""
            elif "end" in event["data"] or event["event"] in ("end", "failed"):
                return text
            else:
                text += json.loads(event["data"]).get("text", "")


@pytest.mark.parametrize(
    ("solution", "word"),
    [
        (comes_back_from_the_start, "breaks after 1-4, your function comes back without the header Last-Event-ID"),
        (takes_one_connection, "returns 'One ', and neither `end` nor `failed` has come"),
        (watcher(keep=lambda event, _: {"Last-Event-ID": event["id"]}), "your function raises KeyError: 'id'"),
        (
            watcher(keep=lambda event, _: {"Last-Event-ID": event.get("id")}),
            "without the header Last-Event-ID, and has seen 1-4",
        ),
        (watcher(keep=lambda event, _: {"Last_Event_ID": event.get("id")}), "without the header Last-Event-ID"),
        (watcher(keep=lambda event, _: event.get("id")), "give it a dictionary of headers"),
        (watcher(begin={"Last-Event-ID": "1-0"}), "comes with Last-Event-ID '1-0', and has seen nothing"),
        (forgets_where_nothing_came, "breaks three times, your function comes with Last-Event-ID '0-0', and has"),
        (goes_on_after_the_end, "when nothing breaks, your function comes back after the end"),
        (watcher(final=("end",)), "when the answer fails, your function comes back after the end"),
        (watcher(anew=None), "when a second attempt begins after the break, your function returns 'One “anew'"),
        (watcher(text=lambda event: event["data"]), """returns '{"text": "O"}{"text"""),
        (stops_at_a_word, "when the text speaks of the end, your function returns '', and neither `end` nor `failed`"),
        (lambda get: print(watcher()(get)), "returns None: return the whole text"),
        (lambda get: list(watcher()(get)), "return one string"),
        (lambda get: "", "returns '', and neither"),
    ],
)
def test_wrong_watchers(client, solution, word):
    assert explained(checks.last_event_id(solution), word)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solution", "word", "hint"),
    [
        (
            sees(texts=(Text, Reasoning)),
            "when the model reasons first, your function returns ('Hm. Hi', [])",
            "`isinst",
        ),
        (sees(given=lambda result: result.content), "when a tool failed", "its `content` is empty"),
        (sees_by_order, "when the second result comes first", "its `call_id` says"),
        (sees(key=lambda call: call.name), "when a tool was called, your function returns", "ask of each"),
        (knows_all_kinds, "your function raises AttributeError", "passed over"),
        (sees(anew=()), "when it begins anew, your function returns ('HiHo', ", "throw away all"),
        (sees(anew=(Restarted, Continued)), "when another goes on, your function returns (' you', [])", "keep it"),
        (sees(by=dict), "when there is only text, your function returns ('Hi you', {}): the calls should be []", ""),
        (
            lambda events: "".join(event.text for event in events if isinstance(event, Text)),
            "return two things",
            "pair",
        ),
        (lambda events: print(len(list(events))), "returns None", "`print` shows"),
    ],
)
@pytest.mark.parametrize("backend", ["fake"], indirect=True)  # nothing of it is read from Redis
def test_wrong_views_of_an_answer(client, solution, word, hint):
    verdict = checks.visible(solution)
    assert explained(verdict, word)
    assert hint in " ".join([hint_text(verdict), hint_text(checks.visible(solution))])


@pytest.mark.slow
def test_a_watcher_that_never_returns(client, monkeypatch):
    monkeypatch.setattr(checks.running, "TIMEOUT", 0.5)

    def watch(get):
        while True:
            time.sleep(0.01)

    assert explained(checks.last_event_id(watch), "when nothing breaks, your function does not return")
    wait_for(lambda: not running(watch.__code__))


# ----------------------------------------------------------------------------------------------- untouched


def untouched_get_last_id(client, stream): ...  # your code


def untouched_produce(client, stream, question_id, chunks):
    """Write it."""
    for _ in chunks:
        client.xadd(stream, ...)


def untouched_read(client, stream, last_id, question_id):
    return ...


def untouched_take_over(client, stream, group, consumer):
    for _ in client.xautoclaim(stream, group, consumer, 0)[1]:
        ...


def untouched_resume(client, stream, after, text):
    while ...:
        client.xread({stream: after})


def untouched_watch(get):
    headers = {}
    for _ in get(headers):
        ...


def annotated(client, stream) -> tuple[str, ...]:
    return right_get_last_id(client, stream)


def test_the_placeholder(client, answer):
    for verdict in (
        checks.count_entries(answer, ..., ...),
        checks.count_entries(answer, client.names.answer("counted").chunks, ...),
        checks.count_entries(None, ..., 4),
        checks.get_last_id(...),
        checks.get_last_id(untouched_get_last_id),
        checks.produce(untouched_produce),
        checks.read(untouched_read),
        checks.claim(untouched_take_over),
        checks.resume(untouched_resume),
        checks.last_event_id(untouched_watch),
        checks.stopped(...),
        checks.pages(untouched_read),
        checks.collect(untouched_read),
        checks.rebuild(untouched_read),
        checks.read_many(untouched_read),
    ):
        assert verdict.passed is None
        assert not verdict
        assert repr(verdict) == "○ Not started yet: replace the `...`"
        assert "○ Not started yet: replace the <code>...</code>" in verdict._repr_html_()
    assert checks.get_last_id(annotated)
    assert not checks.verdict.tries


# --------------------------------------------------------------------------------------------------- hints


def hint_of(verdict):
    return verdict.hint[:12]


def test_hints_grow_more_concrete_until_the_solution(client):
    verdicts = [checks.get_last_id(lambda *_: None) for _ in range(5)]
    assert [hint_of(v) for v in verdicts] == [f"Hint {n} of 3:" for n in (1, 2, 3, 3, 3)]
    assert len({verdict.hint for verdict in verdicts}) == 3
    for verdict in verdicts:  # whatever the hint, first stands what came, and what was to come
        assert "your function returns None, not '5-0'" in repr(verdict).splitlines()[0]
        assert ("Solution" in repr(verdict)) == (hint_of(verdict) == "Hint 3 of 3:")
    assert hint_of(checks.produce(lambda *_: None)) == "Hint 1 of 3:"  # each exercise counts for itself


def test_hints_begin_anew_after_success(client):
    checks.get_last_id(lambda *_: None)
    checks.get_last_id(lambda *_: None)
    assert checks.get_last_id(right_get_last_id).hint == ""
    assert hint_of(checks.get_last_id(lambda *_: None)) == "Hint 1 of 3:"


def test_code_in_a_verdict_is_shown_as_code_and_nothing_else_becomes_markup(client):
    verdict = checks.verdict.Verdict(False, "`<b>` is not `x`, nor ` alone", "Hint 1 of 3: `a < b`\n`c")
    assert "`<b>` is not `x`, nor ` alone\n  Hint 1 of 3: `a < b`\n  `c" in repr(verdict)
    shown = verdict._repr_html_()
    assert "<code>&lt;b&gt;</code> is not <code>x</code>, nor ` alone<br>" in shown
    assert "Hint 1 of 3: <code>a &lt; b</code><br>  `c</p>" in shown  # no code across lines


def test_what_is_not_started_costs_no_hint(client):
    checks.count_entries(..., ..., ...)
    assert hint_of(checks.count_entries(None, "k", 1)) == "Hint 1 of 3:"


def test_every_mistake_has_two_short_hints():
    for name, kinds in checks.running.HINTS.items():
        for words, hints in kinds.items():
            assert re.compile(words)
            assert len(hints) == (2 if words else 3), (name, words)
            assert all(20 < len(hint) < 130 for hint in hints), (name, words)
    assert {*checks.running.HINTS} == {"*", *checks.__all__}


def test_every_check_has_three_hints_in_short_lines(client):
    given = {"count_entries": (None, "k", 1), "budget": (0, 0), "capstone": (None, None, None)}
    for name in checks.__all__:
        check, limits = getattr(checks, name), LOAD | PROMISES if name == "budget" else {}
        verdicts = [check(*given.get(name, (None,)), **limits) for _ in range(3)]
        hints = [verdict.hint.splitlines()[0].partition(" of 3: ")[2] for verdict in verdicts]
        assert len(hints) == len(set(hints)) == 3, name
        assert all(20 < len(hint) < 130 for hint in hints), name
        assert "`" in hints[2], f"{name}: the last hint shows the essential line"


def hint_text(verdict):
    return verdict.hint.splitlines()[0].partition(": ")[2]


def ends_with(text):
    """A producer whose end is this text."""

    def produce(client, stream, question_id, chunks):
        no_end(client, stream, question_id, chunks)
        client.xadd(stream, item(question_id, text.format(question_id)))

    return produce


def ends_twice(client, stream, question_id, chunks):
    try:
        right_produce(client, stream, question_id, chunks)
    except Exception:
        client.xadd(stream, item(question_id, f";END:{question_id}"))
        raise


def follows_its_own(count=None, never=False):
    """A reader that goes on from the last entry of its own, or from the first one for ever."""

    def read(client, stream, last_id, question_id):
        words = []
        while True:
            words = [] if never else words
            for _, entries in client.xread({stream: last_id}, count=count, block=1000):
                for entry_id, fields in entries:
                    if fields["questionId"] != question_id:
                        continue
                    last_id = last_id if never else entry_id
                    if fields["chunkOutput"] == f";END:{question_id}":
                        return "".join(words)
                    if fields["chunkOutput"] != f"START:{question_id};":
                        words.append(fields["chunkOutput"])

    return read


def reads_all_again(client, keys):
    while True:
        texts, ended = dict.fromkeys(keys, ""), 0
        for key, entries in client.xread(dict.fromkeys(keys, "0-0"), block=1000):
            texts[key] = "".join(fields["text"] for _, fields in entries if fields["kind"] == "text")
            ended += entries[-1][1]["kind"] == "end"
        if ended == len(keys):
            return texts


def follows_text_alone(client, stream, after, text):
    while True:
        for _, entries in client.xread({stream: after}, block=1000):
            for entry_id, entry in entries:
                after = entry_id if entry["kind"] == "text" else after
                if entry["kind"] in ("end", "error"):
                    return text
                text = text + entry["text"] if entry["kind"] == "text" else ""


def without_the_words(client, key):
    text = rebuilder(ends=slice(None))(client, key)
    return re.sub("START:.;?|;END:.", "", text)


def pages_of_one_read(client, stream, size):
    entries = [entry for _, entries in client.xread({stream: "0-0"}) for entry in entries]
    return [entries[at : at + size] for at in range(0, len(entries), size)]


def waits_a_little(client, stream, last):
    return [entry for _, entries in client.xread({stream: last}, block=10) for entry in entries]


def poll_that_adds_the_end(client, stream, last):
    text, last, over = poller()(client, stream, last)
    return text + "stop" * over, last, over


def returns_late(client, stream, last_id, wanted, seconds):
    time.sleep(3.1 if seconds == 5.0 else 0)
    return collector()(client, stream, last_id, wanted, seconds)


MISTAKES = [
    (checks.get_last_id, lambda c, s: c.xrevrange(s, count=1)[0][0], "raises IndexError", "it gives an empty list"),
    (checks.get_last_id, lambda c, s: c.xrange(s)[0][0], "not '10-1'", "Read backwards"),
    (checks.pages, pages_of_one_read, "fetches 7 entries at once", "bound each read"),
    (
        checks.pages,
        lambda *args: [entry for page in pager()(*args) for entry in page],
        "each is a list of pairs",
        "A page is what XRANGE gives",
    ),
    (checks.pages, lambda *args: [["9-0"]], "your pages are [['9-0']]", "A page is what XRANGE gives"),
    (checks.collect, lambda *_: None, "returns None", "`return` gives it back"),
    (checks.collect, returns_late, "all that was wanted was there sooner", "return at once"),
    (checks.collect, collector(per_read=True), "all of its reads together", "waits `seconds` anew"),
    (checks.produce, ends_with("END"), "no entry holds the end", "`;END:` and then the question's id"),
    (checks.produce, forgets_the_break, "must be written all the same", "`finally` runs all the same"),
    (checks.produce, ends_twice, "the end comes twice", "not a second time after an error"),
    (checks.produce, other_fields, "has the fields", "`questionId` and `chunkOutput`"),
    (checks.produce, end_only_with_chunks, "given no chunks, your function adds nothing", "where no delta comes"),
    (checks.rebuild, rebuilder(mine=False), "another's", "the `questionId` of the record"),
    (checks.rebuild, without_the_words, "speaks of START and END", "Know START and END by their place"),
    (checks.rebuild, rebuilder(ends=slice(None)), "START:a;", "They have your `questionId` too"),
    (checks.read, follows_its_own(), "reads the same entries again: remember the ID", "What you pass over comes once"),
    (checks.read, follows_its_own(never=True), "reads the same entries again", "What you pass over comes once"),
    (checks.read, reader(text=lambda t: t + ";END:a"), "holds START or END", "they are no text: don't add them"),
    (checks.read, reader(mine=False), "lie between yours", "pass over each entry that has another"),
    (checks.read_many, many_reader(kinds=("text", "end")), "only entries of the kind `text`", "not the model's"),
    (checks.read_many, reads_all_again, "reads the same entries again", "Note the last ID under its stream's name"),
    (checks.poll, poll_that_adds_the_end, "the text should be 'error'", "Only what is of the kind `text` is added"),
    (checks.poll, poller(waits_a_little), "waits for entries to come: look once", "Look once and return"),
    (checks.resume, follows_text_alone, "reads the same entries again", "of whatever kind it is"),
    (checks.source, breaks_off, "raises ValueError", "Python's own message"),
]


@pytest.mark.parametrize(("check", "solution", "words", "hint"), MISTAKES)
@pytest.mark.parametrize("backend", ["fake"], indirect=True)  # the judge is tried here, not Redis
def test_a_hint_belongs_to_the_mistake(client, check, solution, words, hint):
    verdict = check(solution)
    assert explained(verdict, words)
    assert hint in hint_text(verdict)


@pytest.mark.parametrize("backend", ["fake"], indirect=True)
def test_a_reader_that_never_comes_to_its_own_entry(client, monkeypatch):
    monkeypatch.setattr(checks.running, "TIMEOUT", 1.0)
    verdict = checks.read(follows_its_own(count=1))
    assert explained(verdict, "another asker's entries lie between yours, your function does not return")
    assert "also at others'" in hint_text(verdict)


@pytest.mark.parametrize("backend", ["fake"], indirect=True)
def test_each_mistake_has_hints_of_its_own_and_the_last_one_is_shared(client):
    end, late, fields = ends_with("END"), forgets_the_break, other_fields
    given = [checks.produce(wrong) for wrong in (end, late, end, fields, late, late, end, end, fields, fields)]
    first, second = checks.running.HINTS["produce"]["no entry holds the end"]
    assert [hint_text(given[0]), hint_text(given[2])] == [first, second]
    assert [hint_of(verdict)[5] for verdict in given] == list("1121233323")
    assert [("Solution" in verdict.hint) for verdict in given] == [step == "3" for step in "1121233323"]


@pytest.mark.parametrize("backend", ["fake"], indirect=True)
def test_after_several_tries_the_last_hint_comes_unless_the_mistake_is_new(client):
    for wrong in (ends_with("END"), other_fields, forgets_the_break, hides_the_break, collects):
        assert hint_of(checks.produce(wrong)) == "Hint 1 of 3:"
    assert hint_of(checks.produce(end_in_the_loop)) == "Hint 1 of 3:"
    assert hint_of(checks.produce(collects)) == "Hint 3 of 3:"
    assert hint_of(checks.produce(collects)) == "Hint 2 of 3:"  # that one was not read yet, the last one just was


def names(code, *kinds):
    """The names that this code sets, or with `ast.Load` uses; none where it is no code of its own."""
    with suppress(SyntaxError):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Name) and isinstance(node.ctx, kinds or ast.Store):
                yield node.id
            elif isinstance(node, (ast.arg, ast.alias)) and not kinds:
                yield getattr(node, "arg", None) or node.asname or node.name


@pytest.mark.slow
def test_hints_name_what_there_is():
    """A hint's code uses what the notebook has set up to its exercise, or what another hint of the exercise sets."""
    books = [
        [c for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == "code"] for path in NOTEBOOKS
    ]
    sources = [["".join(cell["source"]) for cell in book] for book in books]
    for name, kinds in checks.running.HINTS.items():
        for book in sources:
            at = next((n for n, source in enumerate(book) if f"checks.{name}(" in source), -1)
            known = {name for source in book[: at + 1] for name in names(source)} | {*dir(builtins)}
            codes = [code for kind in kinds.values() for hint in kind for code in re.findall("`([^`]+)`", hint)]
            for code in codes:  # also of a `for …:` without its body
                known |= {*names(code), *names(f"{code} pass"), *names(f"{code}: pass")}
            used = {name for code in codes if not re.fullmatch(r"[\w-]+", code) for name in names(code, ast.Load)}
            assert at < 0 or used <= known, (name, used - known)


# ------------------------------------------------------------------------------------------------ leftovers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "solution"),
    [
        (checks.get_last_id, right_get_last_id),
        (checks.rebuild, rebuilder()),
        (checks.read, reader()),
        (checks.read_many, many_reader()),
        (checks.claim, claimer()),
        (checks.resume, resumer()),
        (checks.state, lambda client, answer: client.set(f"{answer}:chunks", "overwritten") and "queued"),
        (checks.produce, clears_first),
    ],
)
def test_what_a_killed_kernel_would_leave_expires(client, check, solution, monkeypatch):
    """Whenever the learner's function begins or has returned, each key of the check has a time to live."""
    call, lives = checks.case.Case.call, []

    def look():
        lives.extend((key, client.ttl(key)) for key in client.scan_iter(match=f"{client.names.prefix}:check:*"))

    def looking(case, *args):
        look()
        try:
            return call(case, *args)
        finally:
            look()

    monkeypatch.setattr(checks.case.Case, "call", looking)
    check(solution)
    assert lives
    assert all(0 < life <= 300 for _, life in lives), lives


def test_a_produced_answer_expires_already_while_it_is_written(client):
    def produce(client, stream, question_id, chunks):
        try:
            for chunk in chunks:
                client.xadd(stream, item(question_id, chunk))
                seen.append(client.ttl(stream))
        finally:
            client.xadd(stream, item(question_id, f";END:{question_id}"))

    seen = []
    assert checks.produce(produce)
    assert len(seen) == 6
    assert all(0 < life <= 300 for life in seen), seen


# ------------------------------------------------------------------------------------------------- hostile


class Hostile:
    """Every look at it raises."""

    def __getattribute__(self, name):
        raise RuntimeError(f"no {name}")

    def __repr__(self):
        raise RuntimeError("no repr")

    def __eq__(self, other):
        raise RuntimeError("no eq")

    __hash__ = None


class AlwaysEqual(str):
    """A string that claims to be any other."""

    __slots__ = ()

    def __eq__(self, other):
        return True

    __hash__ = str.__hash__


class UnreadableError(Exception):
    def __str__(self):
        raise RuntimeError("no str")


def raising(error):
    def function(*args):
        raise error

    return function


def deep(*args):
    return deep(*args)


async def asynchronous(*args):
    return "0-0"


HOSTILE = [
    None,
    0,
    "text",
    b"bytes",
    [],
    {},
    object(),
    Hostile(),
    Hostile,
    int,
    print,
    lambda: None,
    lambda *_: Hostile(),
    lambda *_: "<script>alert(1)</script>",
    lambda *_: "x" * 100_000,
    lambda *_: float("nan"),
    asynchronous,
    deep,
    raising(ValueError("<b>" * 1000)),
    raising(UnreadableError()),
    raising(SystemExit(3)),
    raising(KeyboardInterrupt()),
    raising(GeneratorExit()),
]


def survives_hostile_functions(check):
    for function in HOSTILE:
        checks.verdict.tries.clear()
        verdict = check(function)
        assert explained(verdict)
        assert len(repr(verdict)) < 800
        assert "<b>" not in verdict._repr_html_()
        assert "<script>" not in verdict._repr_html_()


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "check",
    [
        checks.get_last_id,
        checks.produce,
        checks.read,
        checks.claim,
        checks.source,
        checks.poll,
        checks.resume,
        checks.last_event_id,
    ],
)
def test_hostile_functions(client, check):
    survives_hostile_functions(check)


def test_hostile_values(client, answer):
    for value in HOSTILE:
        assert not checks.count_entries(value, "key", 4)
        assert not checks.count_entries(answer, value, 4)
        assert not checks.count_entries(answer, client.names.answer("counted").chunks, value)


def stubborn(*args):
    """Goes on through every exception."""
    for _ in range(3):
        try:
            while True:
                pass
        except BaseException:
            continue


def blocked(client, stream, *args):
    """Waits without a limit for what never comes."""
    client.xread({stream: "$"}, block=0)
    while True:
        pass


async def shouts_asynchronously(*args):
    yield args[0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("function", [asynchronous, shouts_asynchronously, lambda *_: asynchronous()])
def test_an_asynchronous_function_is_told_from_a_wrong_one(client, function):
    for check in (checks.source, checks.poll):
        checks.verdict.tries.clear()
        assert explained(check(function), "your function is asynchronous: write `def`, not `async def`.")


@pytest.mark.slow
@pytest.mark.parametrize("function", [stubborn, blocked])
def test_endless_functions_are_ended(client, function, monkeypatch):
    monkeypatch.setattr(checks.running, "TIMEOUT", 0.5)
    assert explained(checks.get_last_id(function), "asked for the last ID", "does not return")
    deadline = time.monotonic() + 3  # sooner than the socket's own timeout, which ends a read as well
    while running(function.__code__):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_redis_is_away(client):
    import redis

    lost = redis.Redis(port=1, retry=None, socket_timeout=0.2)
    verdict = checks.get_last_id(right_get_last_id, client=lost)
    assert verdict.passed is False
    assert "can't be checked now" in verdict.text
    assert verdict.hint == ""


# --------------------------------------------------------------------------------------------------- budget

LOAD = {"answers_an_hour": 3_600, "entries": 100, "entry_bytes": 40, "record_bytes": 1_000}
PROMISES = {"memory": 3_000_000, "behind": 20, "back_within": 600}  # at 600 s, 100 entries would need 3,000,000


@pytest.mark.parametrize(
    ("maxlen", "ttl", "need"),
    [
        (20, 600, "600 answers alive, each with 20 entries: 1.1 MB of 3.0 MB"),
        (100, 600, "600 answers alive, each with 100 entries: 3.0 MB of 3.0 MB"),
        (None, 600.0, "each with 100 entries"),
        (10**9, 600, "each with 100 entries"),
        (50, 1000, "1,000 answers alive, each with 50 entries: 3.0 MB of 3.0 MB"),
    ],
)
def test_a_budget_that_suffices(client, maxlen, ttl, need):
    verdict = checks.budget(maxlen, ttl, **LOAD, **PROMISES)
    assert verdict.passed and need in verdict.text


@pytest.mark.parametrize(
    ("maxlen", "ttl", "word"),
    [
        (19, 600, "a viewer 20 entries behind finds 1 of them trimmed"),
        (20, 599, "who comes back after 600 s finds nothing: after 599 s the answer has expired"),
        (100, 601, "601 answers alive, each with 100 entries: 3.0 MB, and there are 3.0 MB"),
        (None, 86_400, "86,400 answers alive, each with 100 entries: 432.0 MB, and there are 3.0 MB"),
        (20, float("inf"), "inf MB"),
        (20, float("nan"), "this is nan"),
        (20, "600", "`ttl` is a number of seconds"),
        (20, 0, "`ttl` is a number of seconds"),
        (20, True, "`ttl` is a number of seconds"),
        (20, None, "`ttl` is a number of seconds"),
        (0, 600, "`maxlen` is a whole number"),
        (20.0, 600, "`maxlen` is a whole number"),
        (True, 600, "`maxlen` is a whole number"),
        ("20", 600, "`maxlen` is a whole number"),
    ],
)
def test_a_budget_that_breaks_a_limit(client, maxlen, ttl, word):
    assert explained(checks.budget(maxlen, ttl, **LOAD, **PROMISES), word)


def test_a_budget_not_begun(client):
    for maxlen, ttl in ((..., ...), (20, ...), (..., 600)):
        assert checks.budget(maxlen, ttl, **LOAD, **PROMISES).passed is None


def test_a_budget_for_short_answers(client):
    """Nobody can be further behind than the answer is long."""
    assert checks.budget(5, 600, **LOAD | {"entries": 5}, **PROMISES)


# ------------------------------------------------------------------------- optional exercises, notebooks 04-08


def worker(*, begins=("0", ">"), count=None, order="do ack", hide=False, twice=False):
    """A consumer of the exercise, right by default."""

    def work(client, stream, group, consumer, do):
        for begin in begins:
            while entries := (client.xreadgroup(group, consumer, {stream: begin}, count=count) or [[0, []]])[0][1]:
                for entry_id, fields in entries:
                    for step in order.split():
                        try:
                            (do(fields["text"]) if step == "do" else client.xack(stream, group, entry_id))
                        except Exception:
                            if not hide:
                                raise
                if begin != ">" and "ack" not in order:
                    break

    return work


def works_batch_by_batch(client, stream, group, consumer, do):
    """All of a batch, and then one XACK for it: when `do` raises, what was done comes again."""
    for begin in ("0", ">"):
        for _, entries in client.xreadgroup(group, consumer, {stream: begin}):
            for _, fields in entries:
                do(fields["text"])
            if entries:
                client.xack(stream, group, *[entry_id for entry_id, _ in entries])


def works_as_the_solution(client, stream, group, consumer, do):
    for begin in ("0", ">"):
        for _, entries in client.xreadgroup(group, consumer, {stream: begin}):
            for entry_id, fields in entries:
                do(fields["text"])
                client.xack(stream, group, entry_id)


def acks_in_a_finally(client, stream, group, consumer, do):
    for begin in ("0", ">"):
        for _, entries in client.xreadgroup(group, consumer, {stream: begin}):
            for entry_id, fields in entries:
                try:
                    do(fields["text"])
                finally:
                    client.xack(stream, group, entry_id)


def claims_from_the_living(client, stream, group, consumer, do):
    client.xautoclaim(stream, group, consumer, 0)
    worker()(client, stream, group, consumer, do)


def state_by(*, lease=lambda answer, attempt: f"{answer}:lease:{attempt}", final=None, none="queued", alive=True):
    """A teller of the exercise, right by default."""

    def state(client, answer):
        newest = client.xrevrange(f"{answer}:chunks", count=1)
        if not newest:
            return none
        [(entry_id, fields)] = newest
        ends = {"end": "ended", "error": "failed"} if final is None else final
        if fields["kind"] in ends:
            return ends[fields["kind"]]
        if alive and client.exists(lease(answer, entry_id.split("-")[0])):
            return "streaming"
        return "interrupted"

    return state


def state_by_the_lease_first(client, answer):
    if client.keys(f"{answer}:lease:*"):
        return "streaming"
    return state_by()(client, answer)


def misses(*, split=lambda entry_id: map(int, entry_id.split("-")), anew=0):
    """A finder of holes, right by default."""

    def missing(ids):
        gaps, last, due = [], None, 0
        for entry_id in ids:
            attempt, seq = split(entry_id)
            if attempt != last:
                due = seq if last is None or anew is None else anew
            gaps += [f"{attempt}-{number}" for number in range(due, seq)]
            last, due = attempt, seq + 1
        return gaps

    return missing


def misses_from_the_start(ids):
    return [f"1-{n}" for n in range(int(ids[-1].split("-")[1]) if ids else 0) if f"1-{n}" not in ids]


def lags(client, stream, group):
    place = next(info["last-delivered-id"] for info in client.xinfo_groups(stream) if info["name"] == group)
    return len(client.xrange(stream, min=f"({place}"))


def lags_by_length(client, stream, group):
    given = next(info for info in client.xinfo_groups(stream) if info["name"] == group)["last-delivered-id"]
    return client.xlen(stream) - len(client.xrange(stream, max=given))


def lags_by_the_newest_id(client, stream, group):
    given = next(info for info in client.xinfo_groups(stream) if info["name"] == group)["last-delivered-id"]
    return int(client.xinfo_stream(stream)["last-generated-id"][2:]) - int(given.split("-")[1])


def lags_of_the_first_group(client, stream, group):
    return len(client.xrange(stream, min="(" + client.xinfo_groups(stream)[0]["last-delivered-id"]))


def lags_with_its_place(client, stream, group):
    place = next(info["last-delivered-id"] for info in client.xinfo_groups(stream) if info["name"] == group)
    return len(client.xrange(stream, min=place))


def lags_by_reading(client, stream, group):
    found = client.xreadgroup(group, "me", {stream: ">"})
    return len(found[0][1]) if found else 0


def lags_as_pending(client, stream, group):
    return client.xpending(stream, group)["pending"]


def parser(*, space=True, comment=True, default="message", join="\n", rest=False, keep=True, empty=False):
    """A parser of server-sent events, right by default."""

    def parse(lines):
        events, last_id, event, data = [], "", default, []
        for line in [*lines, ""] if rest else lines:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ") if space else value.strip()
            if not line:
                if data or empty:
                    events.append({"id": last_id, "event": event, "data": join.join(data)})
                event, data, last_id = default, [], last_id if keep else ""
            elif name == "data":
                data.append(value)
            elif name == "event":
                event = value
            elif name == "id":
                last_id = value
            elif not name and not comment:
                data.append(line)
        return events

    return parse


@pytest.mark.parametrize(
    ("check", "solution"),
    [
        (checks.work, works_as_the_solution),
        (checks.work, worker()),
        (checks.work, worker(count=1)),
        (checks.state, state_by()),
        (checks.missing, misses()),
        (checks.lag, lags),
        (checks.lag, lags_by_length),
        (checks.parse, parser()),
    ],
)
def test_right_solutions_of_optional_exercises(client, check, solution):
    verdict = check(solution)
    assert verdict.passed, verdict
    assert verdict.hint == ""


@pytest.mark.parametrize(
    ("check", "solution", "word"),
    [
        (checks.work, lambda *args: None, "when three entries are new, your function does [], not ['new 0', 'new"),
        (checks.work, worker(begins=(">",)), "left over, and two are new, your function does ['new 0', 'new 1'], not"),
        (checks.work, worker(begins=("0",)), "when three entries are new, your function does [], not"),
        (checks.work, worker(begins=(">", "0")), "left over, and two are new, your function does ['new 0', 'new 1',"),
        (checks.work, worker(order="ack do"), "['new 0'] is acknowledged before `do` has returned"),
        (checks.work, worker(order="do do ack"), "your function does ['new 0', 'new 0', 'new 1', "),
        (checks.work, worker(begins=("0", ">"), order="do"), "these are done and still pending: ['new 0', 'new 1'"),
        (
            checks.work,
            works_batch_by_batch,
            "do` raises at the third of four entries, these are done and still pending",
        ),
        (checks.work, acks_in_a_finally, "that entry is acknowledged all the same"),
        (checks.work, worker(hide=True), "when `do` raises at the third of four entries"),
        (checks.work, claims_from_the_living, "takes what another consumer is busy with"),
        (checks.state, state_by(none="streaming"), "answer without an entry, your function returns 'streaming', not"),
        (checks.state, state_by(alive=False), "the lease of attempt 1, your function returns 'interrupted', not"),
        (checks.state, state_by(lease=lambda answer, _: f"{answer}:lease:1"), "in its tenth attempt, with the lease"),
        (checks.state, state_by(lease=lambda answer, n: f"{answer}:lease:{n[0]}"), "in its tenth attempt, with"),
        (checks.state, state_by(final={"end": "ended"}), "with an `error`, your function returns 'interrupted', not"),
        (checks.state, state_by_the_lease_first, "while the lease runs on, your function returns 'streaming', not"),
        (checks.missing, misses(split=lambda i: (i[0], int(i[2:3]))), "given ['1-8', '1-9', '1-12', '1-13', '1-15']"),
        (checks.missing, misses(anew=None), "given ['1-0', '1-7', '2-2'], your function returns ['1-1', '1-2', "),
        (checks.missing, misses_from_the_start, "your function returns ['1-0', '1-1', '1-2', '1-3', '1-4', '1-5',"),
        (checks.missing, lambda ids: None, "returns None"),
        (checks.missing, lambda ids: [1], "return a list of IDs"),
        (
            checks.lag,
            lags_by_the_newest_id,
            "one before the group's place and one after it, your function returns 6, not 5",
        ),
        (checks.lag, lags_of_the_first_group, "nothing of 5 entries, your function returns 1, not 5"),
        (checks.lag, lags_with_its_place, "given 9 of 12 entries, your function returns 4, not 3"),
        (checks.lag, lags_by_reading, "reads in the group's name"),
        (checks.lag, lags_as_pending, "when the group was given nothing of 5 entries, your function returns 0, not 5"),
        (checks.lag, lambda *args: str(lags(*args)), "return a whole number"),
        (checks.parse, parser(space=False), "given spaces and colons"),
        (checks.parse, parser(comment=False), "given a comment"),
        (checks.parse, parser(default="text"), "an event of `data` alone"),
        (checks.parse, parser(join=""), "given three lines of data"),
        (checks.parse, parser(rest=True), "given an event that was cut off"),
        (checks.parse, parser(keep=False), "an `id` only at the first event"),
        (checks.parse, parser(empty=True), "your function returns 2 events, not 1"),
        (checks.parse, lambda lines: parser()(lines)[0], "return a list of dictionaries"),
        (checks.parse, print, "returns None"),
        (checks.parse, lambda lines: [], "given one event, ['id: 1-0', 'event: text', 'data: Hi', ''], your function"),
    ],
)
def test_wrong_solutions_of_optional_exercises(client, check, solution, word):
    assert explained(check(solution), word)


SILLY = [checks.work, checks.state, checks.missing, checks.lag, checks.parse, checks.visible]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("check", SILLY)
@pytest.mark.parametrize("backend", ["fake"])  # what they raise comes from no server
def test_exercises_and_silly_functions(client, check, monkeypatch):
    def untouched(*args): ...  # your code

    verdict = check(untouched)
    assert verdict.passed is None
    survives_hostile_functions(check)

    def endless(*args):
        while True:
            pass

    monkeypatch.setattr(checks.running, "TIMEOUT", 0.5)
    checks.verdict.tries.clear()
    assert explained(check(endless), "your function does not return")
    wait_for(lambda: not running(endless.__code__))


@pytest.mark.skipif(os.name != "posix", reason="signals are sent otherwise there")
def test_who_interrupts_a_check_ends_the_loop_too(client):
    main, mine = threading.main_thread().ident, []

    def get_last_id(client, stream):
        mine.append(threading.current_thread())
        wait_for(lambda: sys._current_frames()[main].f_code.co_name == "_run")  # it waits
        signal.pthread_kill(main, signal.SIGINT)
        while True:
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        checks.get_last_id(get_last_id)
    wait_for(lambda: mine[0].ident not in sys._current_frames())


# ---------------------------------------------------------------------------------------------- the capstone


def teller(
    *, own=True, catch=True, end=True, gather=False, look=True, keep=True, close=True, after_stop=True, forget=False
):
    """A producer of the capstone, right by default."""

    def produce(client, key, llm, model, question):
        number, stopped = 0, False
        if forget:
            client.delete(f"{key}:stop")

        def add(kind, text):
            nonlocal number
            number += 1
            try:
                client.xadd(key, {"kind": kind, "text": text}, id=f"1-{number}" if own else "*")
            except redis.ResponseError:
                if not catch:
                    raise

        messages = [{"role": "user", "content": question}]
        parts = llm.chat.completions.create(model=model, messages=messages, stream=True)
        for part in list(parts) if gather else parts:
            if look and client.exists(f"{key}:stop"):
                stopped = True
                break
            if part.choices and part.choices[0].delta.content:
                add("text", part.choices[0].delta.content)
        if close:  # a `break` alone does not: in openai's stream is a circle of references
            parts.close()
        if stopped and not keep:
            client.delete(key)
        if end and (after_stop or not stopped):
            add("end", "")

    return produce


def follower(*, block=1000, wait=True, at_once=True, all_of_it=False, tail=None, inclusive=False, pair=True):
    """A reader of the capstone, right by default."""

    def read(client, key, after="0-0"):
        after = "0-0" if all_of_it else after
        while True:
            if inclusive:
                found = client.xrange(key, after)
            else:
                found = [entry for _, entries in client.xread({key: after}, block=block) for entry in entries]
            for after, entry in found:
                if entry["kind"] == "end":
                    if tail is not None:
                        yield after, tail
                    return
                yield (after, entry["text"]) if pair else entry["text"]
            if not wait:
                return

    return read


def returns_the_text(client, key, after="0-0"):
    return "".join(text for _, text in follower()(client, key, after))


def halt(client, key):
    client.set(f"{key}:stop", "1", ex=60)


def raises(*args):
    raise RuntimeError("not today")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fake", *SERVERS], indirect=True)
def test_a_chat_of_the_learners_own(client):
    verdict = checks.capstone(teller(), follower(), halt)
    assert verdict.passed, verdict
    assert repr(checks.capstone(teller(), follower(block=50), halt)) == repr(verdict)
    assert checks.capstone(teller(), follower(block=0), halt).passed


@pytest.mark.parametrize(
    ("produce", "read", "stop", "word"),
    [
        (teller(own=False), follower(), halt, "an XADD again, the text is '0 0 1 2 3 4 5 5 6 6 7 "),
        (
            teller(catch=False),
            follower(),
            halt,
            "an XADD again, in `produce`, your function raises ResponseError: The ID",
        ),
        (teller(end=False), follower(), halt, "'text': '.'}), your function does not return"),
        (teller(gather=True), follower(), halt, "in drill 4, Stop: 200 of 200 deltas are there. Write each at once"),
        (teller(look=False), follower(), halt, "in drill 4, Stop: 200 of 200 deltas are there"),
        (teller(keep=False), follower(), halt, "in drill 4, Stop: 0 of 200 deltas are there"),
        (teller(close=False), follower(), halt, "the model speaks on though `produce` has returned"),
        (teller(after_stop=False), follower(), halt, "in drill 4, Stop, in `read`, of a stream that ends with"),
        (teller(), follower(block=None, wait=False), halt, "there before the first entry, the text is '', not '0 1 2 "),
        (teller(), follower(all_of_it=True), halt, "who has seen 6 of 12 texts, the text is '0 1 2 "),
        (teller(), follower(inclusive=True), halt, "who has seen 6 of 12 texts, the text is '5 6 7 "),
        (teller(), follower(tail="end"), halt, "in drill 1, an answer, the text is "),
        (
            teller(),
            follower(tail=""),
            halt,
            "in drill 1, an answer, `read` yields the end itself, of a stream that ends",
        ),
        (
            teller(),
            follower(block=300, wait=False),
            halt,
            "there before the first entry, the text is '0 1 2 3 4 5 ', not",
        ),
        (
            teller(),
            follower(block=1000, wait=False),
            halt,
            "there before the first entry, the text is '0 1 2 3 4 5 ', not",
        ),
        (teller(forget=True), follower(), halt, "in drill 4, Stop: pressed before `produce` began, it was not heard"),
        (teller(), follower(pair=False), halt, "return pairs (ID, text), each by a `yield`"),
        (teller(), returns_the_text, halt, "`read` is no generator: `yield` each"),
        (teller(), None, halt, "`read` is no generator"),
        (None, follower(), halt, "give the function itself, without calling it; this is None"),
        (teller(), follower(), raises, "in drill 4, Stop, in `stop`, your function raises RuntimeError: not today"),
        (raises, follower(), halt, "in drill 1, an answer, in `produce`, your function raises RuntimeError"),
        (teller(), follower(), lambda *_: None, "in drill 4, Stop: 200 of 200 deltas are there"),
    ],
)
@pytest.mark.parametrize("backend", ["fake"], indirect=True)  # the judge is tried here, not Redis
def test_a_chat_that_is_wrong(client, monkeypatch, produce, read, stop, word):
    monkeypatch.setattr(checks.running, "TIMEOUT", 4.0)
    verdict = checks.capstone(produce, read, stop)
    assert explained(verdict, word), verdict


@pytest.mark.slow
def test_a_chat_that_is_not_begun(client):
    def untouched(client, key): ...  # your code

    assert checks.capstone(teller(), follower(), untouched).passed is None
