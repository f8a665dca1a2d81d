"""Any cell may be run again: each runs twice in a row, and each long one also after it was interrupted in mid-run."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from llmstream_nb.setup.redis_server import child_environment

from .test_notebooks import FOLDER, NOTEBOOKS, OPTIONAL, REFERENCE, code_cells

every_notebook = pytest.mark.parametrize("path", [*NOTEBOOKS, OPTIONAL, REFERENCE], ids=lambda path: path.stem)

# Interrupts, as the stop button does, what runs longer than this, but each cell only once. The kernel does it to
# itself: from outside, it could meet a cell that has just ended. An import of numpy that was interrupted can't be
# made up for in the same process; so all is imported before.
INTERRUPT = """
def interrupt(after=0.8):
    import signal

    import ipywidgets, matplotlib.pyplot, openai, pandas

    import llmstream_nb

    def begin(cell):
        if cell.raw_cell not in seen:
            signal.setitimer(signal.ITIMER_REAL, after)
        seen.add(cell.raw_cell)

    def end(result):
        signal.setitimer(signal.ITIMER_REAL, 0)

    [getattr(llmstream_nb, name) for name in llmstream_nb.__all__]
    seen = set()
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    get_ipython().events.register("pre_run_cell", begin)
    get_ipython().events.register("post_run_cell", end)


interrupt()
"""


class Kernel:
    """A notebook's kernel, on embedded fakeredis."""

    def __init__(self, path: Path) -> None:
        self.cells, self.wrong = code_cells(path), ""

    @asynccontextmanager
    async def started(self) -> AsyncIterator[None]:
        """Run it. Ports are chosen for a kernel before it is there to take them, so that another may: then once more."""
        where, options = {"metadata": {"path": str(FOLDER)}}, {"kernel_name": "python3", "allow_errors": True}
        environment = child_environment(LLMSTREAM_LLM="scripted", REDIS_URL=None, LLMSTREAM_PREFIX=None)
        async with AsyncExitStack() as stack:
            for left in reversed(range(4)):
                notebook = nbformat.v4.new_notebook(cells=list(self.cells))
                self.client = NotebookClient(notebook, timeout=60, resources=where, **options)
                try:
                    await stack.enter_async_context(self.client.async_setup_kernel(env=environment))
                    break
                except RuntimeError as error:
                    if not left or "died" not in str(error):
                        raise
            yield

    async def run(self, cell: nbformat.NotebookNode) -> str:
        """Run a cell to its end, and return what went wrong in it, or in a thread that an earlier one left behind."""
        await self.client.async_execute_cell(cell, 0)
        said = ""
        for output in cell.outputs:
            if output.output_type == "error" or output.get("name") == "stderr":
                said += output.get("text") or f"{output.ename}: {output.evalue}\n"
        return said

    async def check(self, cell: nbformat.NotebookNode, when: str) -> None:
        """Run a cell to its end, and note what went wrong."""
        if said := await self.run(cell):
            self.wrong += f"\n{when}, this cell says: {said}{cell.source}\n"


@every_notebook
def test_a_cell_may_be_run_twice(path: Path) -> None:
    async def run() -> None:
        async with kernel.started():
            for cell in kernel.cells:
                await kernel.check(cell, "at first")
                await kernel.check(cell, "run again")

    kernel = Kernel(path)
    asyncio.run(run())
    assert not kernel.wrong, kernel.wrong


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such timer")
@every_notebook
def test_a_long_cell_may_be_interrupted_and_run_again(path: Path) -> None:
    async def run() -> None:
        async with kernel.started():
            await kernel.check(nbformat.v4.new_code_cell(INTERRUPT), "at first")
            for cell in kernel.cells:
                if said := await kernel.run(cell):
                    print(said, cell.source)
                    await kernel.check(cell, "run again after an interrupt")

    kernel = Kernel(path)
    asyncio.run(run())
    assert not kernel.wrong, kernel.wrong
