"""The plots: what they draw is what lies in Redis, told apart without colour, and shown once."""

from __future__ import annotations

import json

import matplotlib.pyplot as plt
import pytest

from llmstream_nb import ask, plots
from llmstream_nb.protocol.wire import AnswerNotFound, LLMStreamError

from .conftest import FAST


@pytest.fixture
def backend():
    return "fake"  # what is drawn comes from tables, which are tested on every backend


def test_arrival(client):
    drip = ask("?", source=lambda *_: ["one ", "two ", "three"], id="drip", timing=FAST).wait(60)
    whole = ask("?", source=lambda *_: ["all at once"], id="whole", timing=FAST).wait(60)
    figure = plots.arrival(drip, "whole")
    axes = figure.axes[0]
    curves, marks = axes.lines[::2], axes.lines[1::2]
    assert [list(curve.get_ydata()) for curve in curves] == [[0, 4, 8, 13], [0, 11]]
    assert [list(mark.get_ydata()) for mark in marks] == [[4], [11]]
    assert len({curve.get_linestyle() for curve in curves}) == len({mark.get_marker() for mark in marks}) == 2
    labels = [text.get_text() for text in axes.texts]
    assert [label.split(":")[0] for label in labels] == ["● drip", "■ whole"]
    firsts = [answer.record["first_token_ms"] for answer in (drip, whole)]
    assert all(f"first text after {ms / 1000:.1f} s" in label for ms, label in zip(firsts, labels, strict=True))
    assert axes.texts[0].xyann[1] - axes.texts[1].xyann[1] > 2.1  # farther apart than the lines' ends
    assert figure.get_facecolor() == (1, 1, 1, 1)
    assert plt.get_fignums() == []  # closed, so Jupyter shows only the returned one
    assert whole.status == "ended"


def test_an_answer_without_text(client):
    ask("?", source=lambda *_: [], id="none", timing=FAST).wait(60)
    figure = plots.arrival("none")
    assert [text.get_text() for text in figure.axes[0].texts] == ["● none:\nno text"]
    figure.canvas.draw()


def test_an_answer_that_is_not_there(client):
    with pytest.raises(AnswerNotFound):
        plots.arrival("nobody")


def write(client, answer_id, *texts, at=1_700_000_000, attempt=1):
    """An answer whose texts came at these milliseconds."""
    chunks = client.names.answer(answer_id).chunks
    entries = [("start", json.dumps({"at": at}), 0), *(("text", "abcd", ms) for ms in texts)]
    for seq, (kind, text, ms) in enumerate(entries):
        client.xadd(chunks, {"kind": kind, "text": text, "ms": ms}, id=f"{attempt}-{seq}")
    return chunks


def labels(axes):
    return [text.get_text() for text in axes.texts]


def test_the_lag_of_a_reader(client):
    write(client, "a", 100, 200, 300, 900)
    figure = plots.lag("a", [(1_700_000_000.25, 1), (1_700_000_000.5, 4), (1_700_000_001, 5)])
    above, below = figure.axes
    produced, read = above.lines
    assert list(produced.get_xdata()) == [0, 0.1, 0.2, 0.3, 0.9] and list(produced.get_ydata()) == [1, 2, 3, 4, 5]
    assert list(read.get_xdata()) == pytest.approx([0, 0.25, 0.5, 1]) and list(read.get_ydata()) == [0, 1, 4, 5]
    assert produced.get_linestyle() != read.get_linestyle()
    behind = below.lines[0]
    assert list(behind.get_xdata()) == pytest.approx([0, 0.1, 0.2, 0.25, 0.3, 0.5, 0.9, 1])
    assert list(behind.get_ydata()) == [1, 2, 3, 2, 3, 0, 1, 0]
    assert labels(above) == ["produced: 0.9 s", "read: 1.0 s"]
    assert labels(below) == ["at most 3\nentries behind"]
    assert plt.get_fignums() == []


def test_the_lag_of_a_reader_who_reads_ahead_of_the_clock_or_nothing(client):
    write(client, "a", 100)
    early = plots.lag("a", [(1_700_000_000.05, 2)])
    assert list(early.axes[1].lines[0].get_ydata()) == [1, 0, 0]
    never = plots.lag("a", [])
    assert labels(never.axes[1]) == ["at most 2\nentries behind"]


def test_the_lag_without_a_start(client):
    chunks = write(client, "a", 100, 200)
    client.xdel(chunks, "1-0")
    with pytest.raises(LLMStreamError, match="trimmed"):
        plots.lag("a", [])


def test_the_lag_of_an_answer_in_which_entries_are_missing(client):
    chunks = write(client, "a", 100, 200, 300)
    client.xdel(chunks, "1-1", "1-2")
    assert list(plots.lag("a", []).axes[0].lines[0].get_ydata()) == [1, 4]  # the IDs still count them


def test_pauses(client):
    write(client, "smooth", 100, 150, 200)
    write(client, "old", 100, 9_000)
    write(client, "old", 50, 700, attempt=2)  # only this attempt counts
    write(client, "one", 80)
    figure = plots.pauses("smooth", "old", "one")
    (axes,) = figure.axes
    assert [list(row.get_positions()) for row in axes.collections] == [[0.1, 0.15, 0.2], [0.05, 0.7], [0.08]]
    assert [text.split(": longest pause ") for text in labels(axes)] == [
        ["smooth", "0.05 s"],
        ["old", "0.65 s"],
        ["one", "0.00 s"],
    ]
    assert axes.yaxis_inverted()
    figure.canvas.draw()


def test_coalescing(client):
    write(client, "c0", 20, 40, 60, 80)
    write(client, "c200", 30, 230)
    write(client, "none")
    figure = plots.coalescing({0: "c0", 200: "c200", 500: "none"})
    heights = [[bar.get_height() for bar in panel.patches] for panel in figure.axes]
    assert heights[0] == [4, 2, 0]
    assert heights[1] == pytest.approx([0.02, 0.03, 0])
    assert heights[2] == pytest.approx([0.02, 0.2, 0])
    assert figure.axes[1].get_ylim() == figure.axes[2].get_ylim()  # the same seconds at the same height
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0", "200", "500"]
