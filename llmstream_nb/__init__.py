"""Stream a language model's answer through Redis Streams, and watch it in a notebook."""

import builtins
from importlib import import_module

# Where the public names live. Loaded on first use, so that `import llmstream_nb` costs nothing and the set-up can run
# on a bare Python; editors and type checkers read __init__.pyi instead.
_HOMES = {
    "": "checks faults plots tables tutorial",
    "answers.ask": "Answer ask ask_without_stream clear stop_answer",
    "answers.connection": "connect environment_of",
    "answers.produce": "Writing",
    "answers.read": "aread_answer read_answer",
    "llm.endpoint": "Disagrees",
    "llm.sources": "complete prepared_questions",
    "pool.groups": "claim read_answer_group",
    "pool.process": "start_process",
    "pool.queue": "enqueue",
    "pool.worker": "Worker",
    "protocol.events": "Continued Ended Failed Gap Interrupted Restarted Started text_of",
    "protocol.parts": "Reasoning Refusal Text ToolCall ToolResult Unknown",
    "protocol.wire": "LLMStreamError Timing",
    "web.app": "create_app",
    "web.server": "WebServer",
    "widgets.answer_view": "AnswerView",
    "widgets.ask_panel": "AskPanel",
    "widgets.monitor": "Monitor",
    "widgets.stream_view": "StreamView",
}
# By room; pyproject.toml says what each brings.
_EXTRAS = {"checks": "all", "faults": "all", "plots": "tables", "tables": "tables", "web": "web", "widgets": "notebook"}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = sorted(_HOME)
__version__ = "0.1.0"

if hasattr(builtins, "get_ipython"):  # a notebook
    for name in ("tracebacks", "frames"):
        import_module("llmstream_nb.viewing." + name).install(builtins.get_ipython())


def __getattr__(name):  # no annotations: this file must parse on a Python too old for the rest
    if name not in _HOME:
        raise AttributeError("module 'llmstream_nb' has no attribute %r" % name)
    from llmstream_nb.extras import needed

    home = _HOME[name] or name
    with needed(_EXTRAS.get(home.partition(".")[0], ""), name):
        module = import_module("llmstream_nb." + home)
    return getattr(module, name) if _HOME[name] else module


def __dir__():
    return __all__
