"""The notebooks keep to their template: links lead somewhere, outputs are saved, exercises have working solutions."""

from __future__ import annotations

import base64
import inspect
import io
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

import llmstream_nb
from llmstream_nb import tables
from llmstream_nb.setup.redis_server import child_environment

from . import home, stills

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
OPTIONAL = FOLDER / "04b-redis-8.ipynb"
NOTEBOOKS = sorted(path for path in FOLDER.glob("[0-9][0-9]*-*.ipynb") if path != OPTIONAL)
LESSONS = [path for path in NOTEBOOKS if path.stem != "05b-capstone"]  # that one is a blank page: nothing to predict
GLOSSARY, REFERENCE = FOLDER / "glossary.ipynb", FOLDER / "reference.ipynb"
TEMPLATE = ROOT / "tests" / "template.ipynb"
README, DOCS = ROOT / "README.md", sorted((ROOT / "docs").glob("*.md"))
SVG = "{http://www.w3.org/2000/svg}"
WIDTH = 100  # characters of code: more are cut off, or scroll, where the letters are large
WIDGET = "application/vnd.jupyter.widget-view+json"
FOLD = "<details><summary>Answer</summary>\n\n"  # the blank lines make what it holds Markdown
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
# Cells whose output may differ from run to run: the connection line, IDs by the clock, timings, a plot, a race.
MAY_DIFFER = {
    "00-ask": 0,
    "01-stream-commands": 2,
    "02-produce": 3,
    "03-read-live": 1,
    "04-groups": 1,
    "05-take-home": 1,
    "05b-capstone": 1,
    "06-break-it": 3,
    "07-fast-and-slow": 8,
    "08-to-the-browser": 6,
    "09-an-agents-answer": 1,
}
# Terms that a notebook links to the glossary where it first uses them, or before; each with its plural.
TERMS = [
    "chunk",
    "consumer group",
    "cursor",
    "delta",
    "entry",
    "producer",
    "question record",
    "stream",
    "viewer",
    "widget",
]
SKIPPING = ("NBVAL_", "nbval-skip", "nbval-raises-exception", "raises-exception")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
every_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code" and cell.source.strip()]


def prose(path: Path) -> str:
    return "\n\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


def text_of(path: Path) -> str:
    return prose(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def test_all_notebooks_are_known() -> None:
    assert [path.stem for path in NOTEBOOKS] == list(MAY_DIFFER)


@pytest.mark.parametrize("path", [*NOTEBOOKS, OPTIONAL, REFERENCE], ids=lambda path: path.stem)
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


@pytest.mark.parametrize("path", [*NOTEBOOKS, OPTIONAL], ids=lambda path: path.stem)
def test_a_line_of_code_fits_a_projector(path: Path) -> None:
    assert [line for cell in code_cells(path) for line in cell.source.splitlines() if len(line) > WIDTH] == []


@every_notebook
def test_a_notebook_opens_and_closes_like_the_others(path: Path) -> None:
    text, number = prose(path), path.stem.partition("-")[0]
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


@pytest.mark.parametrize("path", [*NOTEBOOKS, OPTIONAL, GLOSSARY, REFERENCE, README, *DOCS], ids=lambda path: path.stem)
def test_links_and_pictures_lead_somewhere(path: Path) -> None:
    text = text_of(path)
    found = LINK.findall(text)
    assert found or path in DOCS
    for picture, label, target in found:
        if picture and not target.startswith("https://mybinder.org/"):
            assert len(label) > 20, f"{target} needs a text for those who don't see it"
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        assert there.exists(), f"{target} does not exist"
        if anchor:
            lines = text_of(there).splitlines()
            # JupyterLab keeps the case of a heading in its anchor, GitHub doesn't: headings are in lower case.
            headings = [
                re.sub(r"[^\w -]", "", line.lstrip("#")).strip().replace(" ", "-")
                for line in lines
                if line.startswith("#")
            ]
            headings += [line.lstrip("#").strip().replace(" ", "-") for line in lines if line.startswith("#")]
            assert anchor in headings or (there.suffix == ".md" and anchor in [h.lower() for h in headings]), target


def is_hidden(cell: nbformat.NotebookNode) -> bool:
    return cell.metadata.get("jupyter", {}).get("outputs_hidden") is True


@every_lesson
def test_a_prediction_stands_before_a_collapsed_surprise_and_a_folded_answer(path: Path) -> None:
    cells = read(path).cells
    predictions = [n for n, cell in enumerate(cells) if cell.cell_type == "markdown" and "**Predict" in cell.source]
    assert predictions
    for at in predictions:
        assert all(f"- ({letter}) " in cells[at].source for letter in "abc")
        answer = next(n for n in range(at + 1, len(cells)) if cells[n].cell_type == "markdown")
        between = cells[at + 1 : answer]
        assert any(is_hidden(cell) for cell in between)
        for cell in between:  # a widget shows nothing before its cell has run
            assert is_hidden(cell) or all(WIDGET in output.get("data", {}) for output in cell.outputs)
            first = "".join(output.get("text") or output.data["text/plain"] for output in cell.outputs[:1])
            shown = first.partition("\n")[0]  # JupyterLab does, of what it hides
            assert not re.search(": True|: False|Gap|seen|says|[0-9] lines", shown), shown
        assert re.match(rf"{re.escape(FOLD)}\*\*\([abc]\)\.\*\* [^<]+\n\n</details>($|\n\n)", cells[answer].source)
    # Beside the choices, a letter stands in a closed fold only: there nothing tells which one is right.
    open_prose = [
        re.sub(r"<details>.*?</details>", "", cell.source, flags=re.DOTALL)
        for n, cell in enumerate(cells)
        if cell.cell_type == "markdown" and n not in predictions
    ]
    assert not re.search(r"(?<!\w)\([abc]\)|<details [^>]*open", "\n".join(open_prose))


@every_notebook
def test_an_exercise_waits_for_the_learner_and_has_a_solution(path: Path) -> None:
    cells = read(path).cells
    exercises = [n for n, cell in enumerate(cells) if "exercise" in tags(cell)]
    assert exercises
    for at in exercises:
        assert re.search(r"= \.\.\.|^    \.\.\.$", cells[at].source, re.MULTILINE), "no placeholder"
        assert "Not started" in str(cells[at].outputs[0])
        assert cells[at - 1].source.startswith("## Exercise: ")
        heading = cells[at - 1].source.splitlines()[0]
        assert heading.endswith(" (optional)") == (at != exercises[0]), "the first is for all, the others are extras"
        assert "solution" in tags(cells[at + 1]) and cells[at + 1].source.startswith(
            "<details><summary>Solution</summary>"
        )


def run_in_kernel(sources: list[str]) -> list[list[nbformat.NotebookNode]]:
    """Run these cells in a kernel as a notebook would; return the outputs of each."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    client = NotebookClient(notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}})
    client.execute(env=child_environment(LLMSTREAM_LLM="scripted", REDIS_URL=None, LLMSTREAM_PREFIX=None))
    return [cell.outputs for cell in notebook.cells]


@every_notebook
def test_the_solutions_solve_the_exercises(path: Path) -> None:
    cells = read(path).cells
    before = [cell.source for cell in code_cells(path) if "tour = ask(" in cell.source or "tour.wait" in cell.source]
    solved = []
    for at in (n for n, cell in enumerate(cells) if "exercise" in tags(cell)):
        solution = re.search(r"```python\n(.*?)```", cells[at + 1].source, re.DOTALL)
        assert solution
        imports = "\n".join(re.findall(r"^(?:from|import) .*$", cells[at].source, re.MULTILINE))
        solved += [f"{imports}\n{solution[1]}"] * 2  # and again, as any cell may be
    outputs = run_in_kernel([code_cells(path)[0].source, *before, *solved])
    for output in outputs[-len(solved) :]:
        shown = str([part.get("data", {}).get("text/plain", part.get("text")) for part in output])
        assert "✓" in shown, shown


def test_there_is_enough_to_do() -> None:
    assert sum("exercise" in tags(cell) for path in NOTEBOOKS for cell in read(path).cells) >= 15


def test_the_moderated_stream_lets_no_masked_word_through() -> None:
    path = FOLDER / "04-groups.ipynb"
    own = re.search(r"One way to do it</summary>\n\n```python\n(.*?)```", prose(path), re.DOTALL)
    assert own
    outputs = run_in_kernel([code_cells(path)[0].source, own[1], "print(clean.wait(60).text)"])[-1]
    assert "█████" in outputs[0].text and "Redis" not in outputs[0].text


def test_the_template_is_what_the_notebooks_follow() -> None:
    headings = [line for line in prose(TEMPLATE).splitlines() if line.startswith("#")]
    assert headings[0].startswith("# NN · ") and "## Summary" in headings
    assert any(heading.startswith("## Exercise: ") for heading in headings)


def test_the_glossary_is_in_order_and_knows_every_linked_term() -> None:
    terms = glossary()
    assert terms == sorted(terms, key=str.lower) and len(terms) == len(set(terms)) > 20
    assert set(TERMS) <= set(terms)


def glossary() -> list[str]:
    return [line[4:] for line in prose(GLOSSARY).splitlines() if line.startswith("### ")]


def words_of(text: str) -> str:
    """The prose of a Markdown cell: without headings, labels, code, solutions, pictures, and names of notebooks."""
    text = re.sub(
        r"<details>.*?</details>|```.*?```|`[^`]*`|\*\*.*?\*\*|!\[[^\]]*\]\([^)]*\)", "", text, flags=re.DOTALL
    )
    text = re.sub(r"\[[^\]]*\]\(\d\db?-[^)]*\)|\]\([^)]*\)", "", text)
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


@pytest.mark.parametrize("path", [*NOTEBOOKS, OPTIONAL], ids=lambda path: path.stem)
def test_a_term_is_linked_to_the_glossary_where_it_first_appears(path: Path) -> None:
    texts = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    late = {}
    for term in TERMS:
        plural = f"{term[:-1]}ies" if term.endswith("y") else f"{term}s"
        used = re.compile(rf"(?<![\w-])(?:{term}|{plural})(?![\w-])", re.IGNORECASE)
        link = f"(glossary.ipynb#{term.replace(' ', '-')})"
        first = next((at for at, text in enumerate(texts) if at and used.search(words_of(text))), None)
        if first is not None and not any(link in text for text in texts[: first + 1]):
            late[term] = texts[first]
    assert not late


def test_the_reference_shows_every_public_name() -> None:
    code = "\n".join(cell.source for cell in code_cells(REFERENCE))
    shown: dict[str, set[str]] = {}
    for name, members in re.findall(r"^show\((\w+)(.*)\)$", code, re.MULTILINE):
        shown.setdefault(name, set()).update(re.findall(r"\w+", members))
    assert sorted(shown) == llmstream_nb.__all__
    functions = inspect.getmembers(tables, inspect.isfunction)
    public = {n for n, function in functions if function.__module__ == tables.__name__ and not n.startswith("_")}
    assert shown["tables"] == public


# ------------------------------------------------------------------------------------------------ pictures


def luminance(colour: str) -> float:
    """The relative luminance of a colour such as #1f2328, as WCAG defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted([luminance(one), luminance(other)])
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("path", sorted((FOLDER / "images").glob("*.svg")), ids=lambda path: path.stem)
def test_a_picture_can_be_read_in_a_light_and_in_a_dark_notebook(path: Path) -> None:
    """An image knows nothing of the notebook's theme: it brings a ground of its own, and writes legibly on that."""
    picture = ET.parse(path).getroot()
    ground = picture[0]
    assert ground.tag == f"{SVG}rect" and ground.get("fill", "").startswith("#") and not ground.get("opacity")
    assert [ground.get(name) for name in ("width", "height")] == picture.get("viewBox", "").split()[2:]
    assert picture.get("role") == "img" and len(picture.get("aria-label", "")) > 40
    grounds = {rect.get("fill") for rect in picture.iter(f"{SVG}rect")} - {"none"}
    for text in picture.iter(f"{SVG}text"):
        assert float(text.get("font-size") or picture.get("font-size")) >= 11, text.text
        assert min(contrast(text.get("fill"), each) for each in grounds) >= 4.5, text.text


@pytest.mark.parametrize("path", [*NOTEBOOKS, OPTIONAL], ids=lambda path: path.stem)
def test_a_widget_leaves_a_still_picture(path: Path) -> None:
    """For GitHub, for nbconvert and for a JupyterLab before the cell is run: there is no widget without its kernel."""
    data = [output.data for cell in code_cells(path) for output in cell.outputs if "data" in output]
    widget = re.compile(r"<\w+.*: run the cell to |HTML\(|\w*Box\(")
    for each in data:
        assert bool(widget.match(each["text/plain"])) or stills.WIDGET_VIEW not in each, each["text/plain"]
    for each in [each for each in data if widget.match(each["text/plain"])]:
        picture = base64.b64decode(each["image/png"])
        assert len(picture) <= stills.LIMIT
        assert not each.keys() & {"text/html", "image/svg+xml"}
        image = Image.open(io.BytesIO(picture)).convert("RGBA")
        assert image.width == stills.WIDTH and image.getpixel((0, 0)) == (255, 255, 255, 255), "a ground of its own"
        panel = each["text/plain"].startswith("<AskPanel")
        assert panel == (stills.WIDGET_VIEW in each), "the panel alone says in JupyterLab what to do"


@every_lesson
def test_a_notebook_has_a_picture(path: Path) -> None:
    assert re.search(r"!\[[^\]]+\]\(images/" + path.stem[:2] + r"-[\w-]+\.svg\)", prose(path))


def test_every_picture_is_used() -> None:
    used = {target for path in [*NOTEBOOKS, README, *DOCS] for _, _, target in LINK.findall(text_of(path))}
    used |= set(re.findall(r'src(?:set)?="([^"]+)"', README.read_text("utf-8")))
    assert {path.name for path in (FOLDER / "images").iterdir()} == {
        Path(target).name for target in used if "images/" in target
    }


def test_every_notebook_has_a_badge_that_opens_it_on_binder() -> None:
    readme = README.read_text("utf-8")
    place = re.escape(f"https://mybinder.org/v2/gh/{home.present(ROOT)}/main?urlpath=lab/tree/")
    links = dict(re.findall(rf"(?m)^\[(\w+)\]: {place}(\S+)$", readme))
    assert links.pop("binder") == f"notebooks/{NOTEBOOKS[0].name}"
    assert links == {path.stem.partition("-")[0]: f"notebooks/{path.name}" for path in NOTEBOOKS}
    assert all(readme.count(f"[![{number} on Binder][badge]][{number}]") == 1 for number in links)


def test_the_readme_is_for_newcomers_and_leads_to_all_else() -> None:
    readme = README.read_text("utf-8")
    assert len(readme.splitlines()) <= 120
    targets = {target for _, _, target in LINK.findall(readme)}
    assert {f"docs/{path.name}" for path in DOCS} | {f"notebooks/{path.name}" for path in NOTEBOOKS} <= targets
