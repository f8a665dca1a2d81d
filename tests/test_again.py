"""Any cell may be run again: each runs twice in a row, and each long one also after it was interrupted in mid-run."""

from __future__ import annotations

import asyncio
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from llmstream_nb.setup.lab import child_environment

from .test_notebooks import FOLDER, NOTEBOOKS, REFERENCE, code_cells

LONG = 0.8  # seconds: a cell that takes longer is interrupted then
# An interrupted import of numpy can't be made up for in the same process, by nobody.
LOADED = """
import ipywidgets, matplotlib.pyplot, openai, pandas
import llmstream_nb

[getattr(llmstream_nb, name) for name in llmstream_nb.__all__]
"""

every_notebook = pytest.mark.parametrize("path", [*NOTEBOOKS, REFERENCE], ids=lambda path: path.stem)


class Kernel:
    """A notebook's kernel, on embedded fakeredis."""

    def __init__(self, path: Path) -> None:
        self.cells, self.wrong = code_cells(path), ""
        where = {"metadata": {"path": str(FOLDER)}}
        notebook = nbformat.v4.new_notebook(cells=self.cells)
        self.client = NotebookClient(notebook, timeout=60, kernel_name="python3", allow_errors=True, resources=where)
        environment = child_environment(LLMSTREAM_LLM="scripted", REDIS_URL=None, LLMSTREAM_PREFIX=None)
        self.started = self.client.async_setup_kernel(env=environment)

    async def run(self, cell: nbformat.NotebookNode, when: str) -> None:
        """Run a cell to its end, and note what went wrong in it, or in a thread that it left behind."""
        await self.client.async_execute_cell(cell, 0)
        for output in cell.outputs:
            if output.output_type == "error" or output.get("name") == "stderr":
                said = output.get("text") or f"{output.ename}: {output.evalue}\n"
                self.wrong += f"\n{when}, this cell says: {said}{cell.source}\n"

    async def interrupt(self, cell: nbformat.NotebookNode) -> bool:
        """Run a cell, and interrupt it if it takes long; return whether it did."""
        running = asyncio.ensure_future(self.client.async_execute_cell(cell, 0))
        await asyncio.wait([running], timeout=LONG)
        if long := not running.done():
            await self.client.km.interrupt_kernel()
        await running
        return long


@every_notebook
def test_a_cell_may_be_run_twice(path: Path) -> None:
    async def run() -> None:
        async with kernel.started:
            for cell in kernel.cells:
                await kernel.run(cell, "at first")
                await kernel.run(cell, "run again")

    kernel = Kernel(path)
    asyncio.run(run())
    assert not kernel.wrong, kernel.wrong


@every_notebook
def test_a_long_cell_may_be_interrupted_and_run_again(path: Path) -> None:
    async def run() -> None:
        async with kernel.started:
            await kernel.run(nbformat.v4.new_code_cell(LOADED), "at first")
            for cell in kernel.cells:
                if await kernel.interrupt(cell):
                    await kernel.run(cell, "run again after an interrupt")

    kernel = Kernel(path)
    asyncio.run(run())
    assert not kernel.wrong, kernel.wrong
