"""The notebooks keep to their template: links lead somewhere, outputs are saved, exercises have working solutions."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from llmstream_nb.lab import child_environment

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]-*.ipynb"))
TEMPLATE = ROOT / "tests" / "template.ipynb"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
# Cells whose output may differ from run to run: the connection line, IDs by the clock, timings, a plot, a race.
MAY_DIFFER = {
    "00-ask": 0,
    "01-stream-commands": 2,
    "02-produce": 3,
    "03-read-live": 2,
    "04-groups": 3,
    "06-break-it": 3,
    "07-fast-and-slow": 8,
    "08-to-the-browser": 6,
}
SKIPPING = ("NBVAL_", "nbval-skip", "nbval-raises-exception", "raises-exception")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code" and cell.source.strip()]


def prose(path: Path) -> str:
    return "\n\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def test_all_notebooks_are_known() -> None:
    assert [path.stem for path in NOTEBOOKS] == list(MAY_DIFFER)


@every_notebook
def test_every_code_cell_is_saved_executed_and_without_error(path: Path) -> None:
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in code_cells(path) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


@every_notebook
def test_only_the_counted_cells_may_differ_and_none_is_skipped(path: Path) -> None:
    marked = [cell for cell in code_cells(path) if "nbval-ignore-output" in tags(cell)]
    assert len(marked) == MAY_DIFFER[path.stem]
    for cell in code_cells(path):
        assert not any(word in cell.source or word in tags(cell) for word in SKIPPING), cell.source


@every_notebook
def test_a_notebook_opens_and_closes_like_the_others(path: Path) -> None:
    text, number = prose(path), path.stem[:2]
    assert text.startswith(f"# {number} · ")
    parts = ["minutes ·", "(glossary.ipynb)", "**You'll do:**", "**You'll learn:**", "**You need:**"]
    for part in [*parts, "\n## Summary\n", "**What would break in production?**", "**Next:**"]:
        assert part in text, f"{part!r} is missing"
    first = code_cells(path)[0].source
    assert f'connect(prefix="nb{number}")' in first and "clear()" in first


@every_notebook
def test_neighbours_link_to_each_other(path: Path) -> None:
    targets = {target.partition("#")[0] for _, _, target in LINK.findall(prose(path))}
    at = NOTEBOOKS.index(path)
    for neighbour in [*NOTEBOOKS[at - 1 : at], *NOTEBOOKS[at + 1 : at + 2]]:
        assert neighbour.name in targets, f"no link to {neighbour.name}"


@pytest.mark.parametrize(
    "path", [*NOTEBOOKS, FOLDER / "glossary.ipynb", ROOT / "README.md"], ids=lambda path: path.stem
)
def test_links_and_pictures_lead_somewhere(path: Path) -> None:
    text = prose(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    found = LINK.findall(text)
    assert found
    for picture, label, target in found:
        if picture and not target.startswith("https://mybinder.org/"):
            assert len(label) > 20, f"{target} needs a text for those who don't see it"
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        assert there.exists(), f"{target} does not exist"
        if anchor:
            lines = (prose(there) if there.suffix == ".ipynb" else there.read_text(encoding="utf-8")).splitlines()
            # JupyterLab keeps the case of a heading in its anchor, GitHub doesn't: headings are in lower case.
            headings = [
                re.sub(r"[^\w -]", "", line.lstrip("#")).strip().replace(" ", "-")
                for line in lines
                if line.startswith("#")
            ]
            assert anchor in headings or (there.suffix == ".md" and anchor in [h.lower() for h in headings]), target


@every_notebook
def test_a_prediction_stands_before_a_collapsed_surprise(path: Path) -> None:
    cells = read(path).cells
    predictions = [n for n, cell in enumerate(cells) if cell.cell_type == "markdown" and "**Predict" in cell.source]
    assert predictions
    for at in predictions:
        assert all(f"- ({letter}) " in cells[at].source for letter in "abc")
        assert cells[at + 1].metadata.get("jupyter", {}).get("outputs_hidden") is True
        answer = next(cell.source for cell in cells[at + 2 :] if cell.cell_type == "markdown")
        assert re.match(r"\*\*\([abc]\)\.\*\*", answer), "the next text says which one is right"
    collapsed = sum(cell.metadata.get("jupyter", {}).get("outputs_hidden", False) for cell in cells)
    assert collapsed == len(predictions)


@every_notebook
def test_an_exercise_waits_for_the_learner_and_has_a_solution(path: Path) -> None:
    cells = read(path).cells
    exercises = [n for n, cell in enumerate(cells) if "exercise" in tags(cell)]
    assert exercises
    for at in exercises:
        assert re.search(r"= \.\.\.|^    \.\.\.$", cells[at].source, re.MULTILINE), "no placeholder"
        assert "Not started" in str(cells[at].outputs[0])
        assert cells[at - 1].source.startswith("## Exercise: ")
        assert "solution" in tags(cells[at + 1]) and cells[at + 1].source.startswith(
            "<details><summary>Solution</summary>"
        )


def run_in_kernel(sources: list[str], prefix_of: str) -> list[nbformat.NotebookNode]:
    """Run these cells in a kernel as a notebook of that name would; return the outputs of the last one."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    client = NotebookClient(notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}})
    client.execute(env=child_environment(LLMSTREAM_LLM="scripted", REDIS_URL=None, LLMSTREAM_PREFIX=None))
    return notebook.cells[-1].outputs


@every_notebook
def test_the_solution_solves_the_exercise(path: Path) -> None:
    cells = read(path).cells
    before = [cell.source for cell in code_cells(path) if "tour = ask(" in cell.source or "tour.wait" in cell.source]
    for at in (n for n, cell in enumerate(cells) if "exercise" in tags(cell)):
        solution = re.search(r"```python\n(.*?)```", cells[at + 1].source, re.DOTALL)
        assert solution
        imports = "\n".join(re.findall(r"^(?:from|import) .*$", cells[at].source, re.MULTILINE))
        outputs = run_in_kernel([code_cells(path)[0].source, *before, f"{imports}\n{solution[1]}"], path.stem)
        shown = str([output.get("data", {}).get("text/plain", output.get("text")) for output in outputs])
        assert "✓" in shown, shown


def test_the_moderated_stream_lets_no_masked_word_through() -> None:
    path = FOLDER / "04-groups.ipynb"
    own = re.search(r"One way to do it</summary>\n\n```python\n(.*?)```", prose(path), re.DOTALL)
    assert own
    outputs = run_in_kernel([code_cells(path)[0].source, own[1], "print(clean.wait(60).text)"], path.stem)
    assert "█████" in outputs[0].text and "Redis" not in outputs[0].text


def test_the_template_is_what_the_notebooks_follow() -> None:
    headings = [line for line in prose(TEMPLATE).splitlines() if line.startswith("#")]
    assert headings[0].startswith("# NN · ") and "## Summary" in headings
    assert any(heading.startswith("## Exercise: ") for heading in headings)


def test_the_glossary_is_in_order_and_knows_every_linked_term() -> None:
    terms = [line[4:] for line in prose(FOLDER / "glossary.ipynb").splitlines() if line.startswith("### ")]
    assert terms == sorted(terms, key=str.lower) and len(terms) == len(set(terms)) > 20
