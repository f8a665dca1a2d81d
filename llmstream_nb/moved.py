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
    "llmstream_nb.workers": "llmstream_nb.pool.process",
    "tests.faults": "llmstream_nb.faults",
    "tests.servers": "llmstream_nb.faults",
}


class Finder:
    """Finds the module of today where its old name, in this package, is asked for."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, *_: Any) -> Any:
        """As importlib calls it."""
        ours = name in MOVED and name.startswith(self.package)
        return ModuleSpec(name, self) if ours else None  # type: ignore[arg-type]  # it loads, too

    def create_module(self, spec: Any) -> Any:
        """Import the module under its new name; None would make a new, empty one."""
        found = import_module(MOVED[spec.name])
        spec.loader_state = found.__spec__
        return found

    def exec_module(self, module: Any) -> None:
        """Nothing: it was executed under its own name, which importlib has just written over."""
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Ask before all others for our own names, after all others for `tests`, which may be somebody else's.

    Where a newer kit was copied over an older one, the older one's files still lie about, under these very names.
    """
    sys.meta_path[:] = [Finder("llmstream_nb."), *sys.meta_path, Finder("tests.")]


def of_the_package(name: str) -> Any:
    """A name that stood in a package of this name before, and is a name of `llmstream_nb` today."""
    package = sys.modules["llmstream_nb"]
    if name not in package.__all__:
        raise AttributeError(name)
    return getattr(package, name)
