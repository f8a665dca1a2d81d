"""Stream a language model's answer through Redis Streams, and watch it in a notebook."""

from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:  # for editors and type checkers; they know this name
    from llmstream_nb import checks, plots, tables, tutorial
    from llmstream_nb.answers.aread import aread_answer
    from llmstream_nb.answers.ask import Answer, ask, ask_without_stream, clear
    from llmstream_nb.answers.connection import connect
    from llmstream_nb.answers.produce import Writing
    from llmstream_nb.answers.read import read_answer
    from llmstream_nb.pool.groups import claim, read_answer_group
    from llmstream_nb.pool.worker import Worker, enqueue
    from llmstream_nb.protocol import Timing
    from llmstream_nb.web import WebServer
    from llmstream_nb.widgets import AnswerView, AskPanel, Monitor

# Loaded on first use, so that `import llmstream_nb` costs nothing and the set-up can run on a bare Python.
_HOMES = {
    "connect": "answers.connection",
    "ask": "answers.ask",
    "ask_without_stream": "answers.ask",
    "Answer": "answers.ask",
    "clear": "answers.ask",
    "Timing": "protocol",
    "Writing": "answers.produce",
    "read_answer": "answers.read",
    "aread_answer": "answers.aread",
    "read_answer_group": "pool.groups",
    "claim": "pool.groups",
    "enqueue": "pool.worker",
    "Worker": "pool.worker",
    "AnswerView": "widgets",
    "AskPanel": "widgets",
    "Monitor": "widgets",
    "WebServer": "web",
    "checks": "",
    "plots": "",
    "tables": "",
    "tutorial": "",
}
__all__ = [
    "Answer",
    "AnswerView",
    "AskPanel",
    "Monitor",
    "Timing",
    "WebServer",
    "Worker",
    "Writing",
    "aread_answer",
    "ask",
    "ask_without_stream",
    "checks",
    "claim",
    "clear",
    "connect",
    "enqueue",
    "plots",
    "read_answer",
    "read_answer_group",
    "tables",
    "tutorial",
]
__version__ = "0.1.0"


def __getattr__(name):  # no annotations: this file must parse on a Python too old for the rest
    if name not in _HOMES:
        raise AttributeError("module 'llmstream_nb' has no attribute %r" % name)
    if not _HOMES[name]:
        return import_module("llmstream_nb." + name)
    return getattr(import_module("llmstream_nb." + _HOMES[name]), name)


def __dir__():
    return __all__
