"""What is shown where a worker falls silent in mid-answer and another begins anew, and where it only looks like that."""

from __future__ import annotations

import threading

import pytest

from llmstream_nb import AnswerView
from llmstream_nb.protocol.events import Ended, Event, Restarted, Started, Text
from llmstream_nb.protocol.wire import EntryID
from llmstream_nb.setup import cli
from llmstream_nb.viewing.transcript import Transcript
from llmstream_nb.web.sse import describe

from .model import wait_for
from .test_widgets import Page, recorded, settled  # noqa: F401 - a fixture for all tests here
from .web import Writer


def begin(attempt: int, worker: str = "", job: str = "1-0") -> list[Event]:
    """An opening and one word; without a worker it is no pool's."""
    about = {"worker": worker, "job": job} if worker else {}
    kind = Started if attempt == 1 else Restarted
    return [kind(EntryID(attempt, 0), about), Text(f"{attempt} ", EntryID(attempt, 1))]


def transcript(*openings: list[Event], interrupted: bool = False) -> Transcript:
    """What has taken these, one after the other."""
    made = Transcript("a")
    made.follower.state = "interrupted" if interrupted else "streaming"
    for events in openings:
        made.take(events)
    return made


def told(made: Transcript) -> tuple[int, str, str]:
    return made.attempts, made.note, made.text


def test_an_interruption_names_the_worker_and_promises_no_other_where_there_is_none() -> None:
    pooled, alone = (transcript(begin(1, worker), interrupted=True) for worker in ("w1", ""))
    assert pooled.note == "Its worker w1 is silent; another may take over."
    assert alone.note == "Its producer died; the text so far stands."


def test_attempts_are_told_while_they_are_written_and_counted_after_the_end() -> None:
    made = transcript(begin(1, "w1"))
    assert told(made) == (1, "", "1 ")
    made.take(begin(2, "w3"))
    assert told(made) == (2, "Attempt 2, by w3.", "2 ")
    made.follower.state = "interrupted"
    assert made.note == "Its worker w3 is silent; another may take over."
    made.follower.state = "streaming"
    made.take(begin(3, "w4")[:1])
    assert (made.state, *told(made)) == ("waiting", 3, "Attempt 3, by w4.", "")
    assert "attempts" not in made.figures
    made.follower.state = "ended"
    made.take([Text("all", EntryID(3, 1)), Ended(EntryID(3, 2), "stop")])
    assert told(made) == (3, "", "all") and made.figures.startswith("3 attempts · the last: 1 chunk · ")


def test_another_question_under_the_same_id_is_no_takeover_whatever_its_number() -> None:
    assert told(transcript(begin(1, "w1"), begin(2, "w3", job="2-0"))) == (1, "", "2 ")
    assert told(transcript(begin(1, "w1"), begin(2, "w2"), begin(3, "w3", job="2-0"))) == (1, "", "3 ")
    assert told(transcript(begin(1, "w1"), begin(2))) == (1, "", "2 ")
    assert told(transcript(begin(1), begin(2))) == (1, "", "2 ")
    assert told(transcript(begin(5, "w1"), begin(6, "w2"))) == (2, "Attempt 6, by w2.", "6 ")


def test_what_anybody_wrote_as_a_workers_name_is_words_in_one_line() -> None:
    made = transcript([Started(EntryID(1, 0), {"worker": "{0}\n\x1b[31m\u202e", "job": 7})], interrupted=True)
    assert made.note == "Its worker {0} [31m is silent; another may take over."


def test_a_browser_is_told_the_worker_and_its_entry_in_the_queue() -> None:
    started = Started(EntryID(2, 0), {"worker": "w1", "job": "1-0", "nonce": "x"})
    assert describe(started) == ("start", {"attempt": 2, "worker": "w1", "job": "1-0"})


@pytest.fixture
def writer(client) -> Writer:
    """A pool's answer, in its first attempt."""
    return Writer(client, "a", begin=False).begin(worker="w1", job="1-0")


@pytest.mark.slow
def test_views_tell_it_in_the_order_in_which_it_happens(client, writer) -> None:
    writer.say("half of ")
    view, plain = AnswerView("a"), AnswerView("a", plain=True)
    wait_for(lambda: view.text == "half of ")
    writer.fall_silent()
    wait_for(lambda: view.state == "interrupted" and "<b>Interrupted</b> Its worker w1 is silent; " in plain.value)
    assert (view.note, view.text) == ("Its worker w1 is silent; another may take over.", "half of ")
    writer.begin(worker="w3", job="1-0")
    wait_for(lambda: view.attempts == 2 and "<b>Waiting</b> Attempt 2, by w3." in plain.value)
    writer.say("all of it")
    late = AnswerView("a")
    wait_for(lambda: late.text == view.text == "all of it" and "all of it" in plain.value)
    assert view.note == late.note == "Attempt 2, by w3." and late.attempts == 2
    writer.end()
    settled(view, plain, late)
    assert "<b>Complete</b>  <small>2 attempts · " in plain.value and "half" not in plain.value
    page = Page(view).state
    assert (page["text"], page["attempts"], page["worker"], page["note"]) == ("all of it", 2, "w3", "")


@pytest.mark.slow
def test_the_terminal_tells_it_beside_the_text(client, capsys, writer) -> None:
    writer.say("half of ").fall_silent()
    watching = threading.Thread(target=cli._follow, args=("a",))
    watching.start()
    said = ["", ""]

    def hears(words: str) -> bool:
        said[:] = [before + more for before, more in zip(said, capsys.readouterr(), strict=True)]
        return words in said[1]

    wait_for(lambda: hears("[Interrupted. Its worker w1 is silent; another may take over.]\n"))
    writer.begin(worker="w3", job="1-0").say("all of ")
    wait_for(lambda: hears("[Attempt 2, by w3. The answer begins anew.]\n"))
    writer.begin(worker="w4", job="2-0").say("it").end()  # another question
    watching.join(60)
    assert hears("[Another attempt. The answer begins anew.]\n") and "w4" not in said[1]
    assert said[0] == "half of all of it\n"
