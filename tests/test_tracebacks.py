"""How errors look in a notebook: the learner's own lines and what to do, and all of it by `%tb`."""

from __future__ import annotations

import re
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from llmstream_nb.setup.redis_server import child_environment

TWICE = """
from llmstream_nb import ask, connect

redis = connect(prefix="errors")
ask("?", source="scripted", id="tour").stop()
"""
FUNCTION = """\
def again():
    answer = ask("?", source="scripted", id="tour")
    return answer
"""
MUTE = """\
from llmstream_nb import LLMStreamError


class Mute(LLMStreamError):
    def __str__(self):
        raise RuntimeError("no")


raise Mute
"""
CELLS = {
    "first": TWICE,
    "function": FUNCTION,
    "kit": "# a comment\nagain()",
    "whole": "%tb",
    "awaited": "from llmstream_nb import aread_answer\n\nasync for event in aread_answer('nobody'):\n    print(event)",
    "redis": "redis.set('text', 'word')\nredis.xlen('text')",
    "lost": "import redis as library\n\nlibrary.Redis(port=9).ping()",
    "lost, whole": "%tb",
    "name": "1 + 1\nundefined",
    "mute": MUTE,
    "after the mute": "undefined",
    "elsewhere": "import json\n\njson.loads('{')",
    "expected": "connect('nonsense')",
    "broken": "from llmstream_nb.viewing import tracebacks\n\ntracebacks.brief = None\nagain()",
    "well": "print('well')",
}


@pytest.fixture(scope="module")
def shown() -> dict[str, str]:
    """What a notebook shows below each of these cells."""
    cells = {name: nbformat.v4.new_code_cell(source) for name, source in CELLS.items()}
    cells["expected"].metadata["tags"] = ["raises-exception"]
    notebook = nbformat.v4.new_notebook(cells=list(cells.values()))
    client = NotebookClient(notebook, timeout=60, kernel_name="python3", allow_errors=True)
    client.execute(env=child_environment(LLMSTREAM_LLM="scripted", REDIS_URL=None, LLMSTREAM_PREFIX=None))
    texts = {}
    for name, cell in cells.items():
        parts = [part for output in cell.outputs for part in output.get("traceback") or [output.get("text", "")]]
        texts[name] = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(parts))
    return texts


def test_an_error_of_the_kit_shows_the_learners_lines(shown) -> None:
    assert not shown["first"]
    message, *rest = shown["kit"].splitlines()
    assert message.startswith("AnswerExists: there is an answer 'tour' already: replace=True")
    assert rest == [
        "Cell In[3], line 2: again()",
        'Cell In[2], line 2: answer = ask("?", source="scripted", id="tour")',
        "%tb shows the whole traceback.",
    ]


def test_tb_shows_the_whole_traceback(shown) -> None:
    assert "Traceback (most recent call last)" in shown["whole"] and "take_id" in shown["whole"]
    assert "answers/ask.py" in shown["whole"].replace("\\", "/")
    assert "ConnectionRefusedError" in shown["lost, whole"] or "OSError" in shown["lost, whole"]


def test_awaited_cells_do_too(shown) -> None:
    assert shown["awaited"].startswith("AnswerNotFound: ")
    assert "Cell In[5], line 3: async for event in aread_answer('nobody'):" in shown["awaited"]
    assert "read.py" not in shown["awaited"]


def test_errors_of_redis_do_too(shown) -> None:
    assert shown["redis"].startswith("ResponseError: WRONGTYPE")
    assert "Cell In[6], line 2: redis.xlen('text')" in shown["redis"]
    assert shown["lost"].startswith("ConnectionError: ") and "Does Redis run?" in shown["lost"]
    assert "line 3: library.Redis(port=9).ping()" in shown["lost"] and ".py" not in shown["lost"]


def test_a_missing_name_says_what_to_run_first(shown) -> None:
    assert shown["name"].startswith("NameError: name 'undefined' is not defined\nIs it made in a cell above?")
    assert "Cell In[9], line 2: undefined" in shown["name"]


def test_an_error_whose_text_can_not_be_had_costs_others_nothing(shown) -> None:
    assert "Mute: its text can't be shown." in shown["mute"] and "unregistering" not in shown["mute"]
    assert shown["after the mute"].startswith("NameError: name 'undefined' is not defined\nIs it made")


def test_other_errors_look_as_ever(shown) -> None:
    assert "Traceback (most recent call last)" in shown["elsewhere"] and "decoder.py" in shown["elsewhere"]


def test_a_cell_that_is_meant_to_fail_does(shown) -> None:
    assert shown["expected"].startswith("RedisUnusable: ")


def test_if_it_can_not_be_shown_briefly_it_is_shown_at_length(shown) -> None:
    assert "AnswerExists" in shown["broken"] and "take_id" in shown["broken"]
    assert "TypeError" not in shown["broken"]
    assert shown["well"] == "well\n"


def test_outside_of_notebooks_nothing_is_loaded() -> None:
    code = (
        "import llmstream_nb, sys; print([name for name in sys.modules if name in ('redis', 'IPython', 'traceback')])"
    )
    said = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"
