"""The arrival plot: one line an answer, told apart without colour, shown once."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest

from llmstream_nb import ask, plots
from llmstream_nb.protocol import AnswerNotFound

from .conftest import FAST


@pytest.fixture
def backend():
    return "fake"  # what is drawn comes from tables, which are tested on every backend


def test_arrival(client):
    drip = ask("?", source=lambda *_: ["one ", "two ", "three"], id="drip", timing=FAST).wait(20)
    whole = ask("?", source=lambda *_: ["all at once"], id="whole", timing=FAST).wait(20)
    figure = plots.arrival(drip, "whole")
    axes = figure.axes[0]
    curves, marks = axes.lines[::2], axes.lines[1::2]
    assert [list(curve.get_ydata()) for curve in curves] == [[0, 4, 8, 13], [0, 11]]
    assert [list(mark.get_ydata()) for mark in marks] == [[4], [11]]
    assert len({curve.get_linestyle() for curve in curves}) == len({mark.get_marker() for mark in marks}) == 2
    labels = [text.get_text() for text in axes.texts]
    assert [label.split(":")[0] for label in labels] == ["● drip", "■ whole"]
    assert all("first text after 0.0 s" in label for label in labels)
    assert axes.texts[0].xyann[1] - axes.texts[1].xyann[1] > 2.1  # farther apart than the lines' ends
    assert figure.get_facecolor() == (1, 1, 1, 1)
    assert plt.get_fignums() == []  # closed, so Jupyter shows only the returned one
    assert whole.status == "ended"


def test_an_answer_without_text(client):
    ask("?", source=lambda *_: [], id="none", timing=FAST).wait(20)
    figure = plots.arrival("none")
    assert [text.get_text() for text in figure.axes[0].texts] == ["● none:\nno text"]
    figure.canvas.draw()


def test_an_answer_that_is_not_there(client):
    with pytest.raises(AnswerNotFound):
        plots.arrival("nobody")
