"""Stream a language model's answer through Redis Streams, and watch it in a notebook."""

from importlib import import_module

# Loaded on first use, so that `import llmstream_nb` costs nothing and the set-up can run on a bare Python.
_HOMES = {
    "connect": "connection",
    "ask": "answer",
    "ask_without_stream": "answer",
    "Answer": "answer",
    "clear": "answer",
    "Writing": "produce",
    "read_answer": "read",
    "aread_answer": "aread",
    "read_answer_group": "groups",
    "claim": "groups",
    "enqueue": "workers",
    "Worker": "workers",
    "AnswerView": "widgets",
    "AskPanel": "widgets",
    "Monitor": "widgets",
    "WebServer": "web",
    "tables": "",
    "checks": "",
}
__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name):  # no annotations: this file must parse on a Python too old for the rest
    if name not in _HOMES:
        raise AttributeError("module 'llmstream_nb' has no attribute %r" % name)
    if not _HOMES[name]:
        return import_module("llmstream_nb." + name)
    return getattr(import_module("llmstream_nb." + _HOMES[name]), name)


def __dir__():
    return __all__
