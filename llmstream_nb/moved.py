"""Old names of modules: a notebook that a learner has changed and kept goes on after an update."""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from typing import Any

MOVED = {
    "llmstream_nb.answer": "llmstream_nb.answers.ask",
    "llmstream_nb.connection": "llmstream_nb.answers.connection",
    "llmstream_nb.environment": "llmstream_nb.setup.environment",
    "llmstream_nb.groups": "llmstream_nb.pool.groups",
    "llmstream_nb.lab": "llmstream_nb.setup.lab",
    "llmstream_nb.llm.answers": "llmstream_nb.llm.prepared",
    "llmstream_nb.produce": "llmstream_nb.answers.produce",
    "llmstream_nb.read": "llmstream_nb.answers.read",
    "llmstream_nb.workers": "llmstream_nb.pool.worker",
    "tests.faults": "llmstream_nb.faults",
    "tests.servers": "llmstream_nb.faults",
}


class Finder:
    """Finds the module of today where its old name is asked for."""

    def find_spec(self, name: str, *_: Any) -> Any:
        """As importlib calls it."""
        return ModuleSpec(name, self) if name in MOVED else None  # type: ignore[arg-type]  # no need to import importlib.abc

    def create_module(self, spec: Any) -> Any:
        """Import the module under its new name; None would make a new, empty one."""
        found = import_module(MOVED[spec.name])
        spec.loader_state = found.__spec__
        return found

    def exec_module(self, module: Any) -> None:
        """Nothing: it was executed under its own name, which importlib has just written over."""
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Ask after all others: what is there under its own name comes first."""
    sys.meta_path.append(Finder())


def of_the_package(name: str) -> Any:
    """A name that stood in a package of this name before, and is a name of `llmstream_nb` today."""
    package = sys.modules["llmstream_nb"]
    if name not in package.__all__:
        raise AttributeError(name)
    return getattr(package, name)
