"""Make a site of the notebooks and of all that they link to: pages for reading, on which nothing runs."""

import base64
import mimetypes
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import nbformat
from bs4 import BeautifulSoup
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from pygments.lexers import find_lexer_class_for_filename
from traitlets.config import Config

from llmstream_nb.setup.environment import ROOT, SetupError, say
from llmstream_nb.setup.restore import NOTEBOOKS

MAIN = ("README.md", "llmstream_nb/PROTOCOL.md", "workshop/README.md")
WIDE = 80  # characters of a line; on a small screen fewer are to be seen
# Of what an output holds, the first of these is shown: a widget's still comes before its text, and no script is here.
SHOWN = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]


def export(folder: Path) -> int:
    """Write the site into a folder, which is new, empty, or holds a site made before."""
    if folder.exists() and not (folder / "index.html").exists() and any(folder.iterdir()):
        raise SetupError(f"{folder} holds other things: name a new folder, or one with a site made before.")
    site = Site(folder)
    for source in (ROOT, *sorted(NOTEBOOKS.glob("*.ipynb")), *(ROOT / name for name in MAIN)):
        site.place(source)
    for source in site.sources:  # it grows while pages are written, by what they link to
        site.write(source)
    say(f"{len(site.sources)} pages. Open {folder / 'index.html'} in a browser.")
    return 0


class Site:
    """A page for each file that was asked for, at the file's own place; `sources` are these files.

    A folder's page shows its modules. The page of the repository itself is the index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources: list[Path] = []
        config = Config({"NbConvertBase": {"display_data_priority": SHOWN}})
        here = str(Path(__file__).parent)
        self._exporter = HTMLExporter(
            config, template_name="site", template_file="page.html", extra_template_basedirs=[here]
        )

    def place(self, source: Path) -> Path | None:
        """The file of this source's page, which will be written; None for what is not there, hidden or elsewhere."""
        if not source.exists() or not source.is_relative_to(ROOT):
            return None
        inside = source.relative_to(ROOT)
        if any(part.startswith(".") for part in inside.parts):
            return None  # keys and passwords lie in such files
        if source not in self.sources:
            self.sources.append(source)
        if source.is_dir():
            return self.folder / inside / "index.html"
        name = source.stem if source.suffix in (".ipynb", ".md") else source.name
        return self.folder / inside.with_name(f"{name}.html")

    def write(self, source: Path) -> None:
        """Write the page of this source, whose links lead to other pages, and whose pictures are in it."""
        notebook, page = _notebook(source), self.place(source)
        assert page
        text = _prose(notebook)
        neighbours = re.findall(r"(before|after|next): \[([^\]]+)\]\((\S+?)\)", text)[:2]
        resources = {"title": _title(text), "neighbours": neighbours}
        soup = BeautifulSoup(self._exporter.from_notebook_node(notebook, resources)[0], "html.parser")
        if source.suffix == ".md":
            _name_headings_as_github(soup)
        base = source if source.is_dir() else source.parent
        for link in soup.select("a[href]"):
            link["href"] = self._link(str(link["href"]), base, page.parent)
        for picture in soup.select("img[src]:not([src^='data:']), source[srcset]"):
            name = "src" if picture.name == "img" else "srcset"
            file = base / unquote(str(picture[name]))
            kind = mimetypes.guess_type(file)[0] or ""
            if file.is_file() and kind.startswith("image/"):
                picture[name] = f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
            else:  # it lies in the net, and pages are to need none
                picture.replace_with(str(picture.get("alt", "")))
        for code in soup.select("pre"):
            if max(map(len, code.get_text().splitlines()), default=0) > WIDE:
                code["tabindex"] = "0"  # so that the keyboard can scroll it
        for box in soup.select("li input"):
            box["aria-label"] = box.find_parent("li").get_text().strip()  # type: ignore[union-attr] # selected so
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(str(soup), "utf-8")

    def _link(self, url: str, base: Path, start: Path) -> str:
        """The link to a page of the site, from the folder `start`, in place of one to a file, from `base`."""
        parts = urlsplit(url)
        if parts.scheme or not parts.path:
            return url
        path = unquote(parts.path)
        # As in JupyterLab, what begins with a slash begins at the folder that it serves.
        page = self.place(Path(os.path.normpath(ROOT / path[1:] if path[0] == "/" else base / path)))
        to = quote(Path(os.path.relpath(page, start)).as_posix()) if page else parts.path
        return parts._replace(path=to).geturl()


def _notebook(source: Path) -> Any:
    """What the page of a file or a folder shows, as a notebook."""
    if source == ROOT:
        return new_notebook(cells=[new_markdown_cell(_index())])
    if source.suffix == ".ipynb":
        try:
            return nbformat.read(source, as_version=4)
        except ValueError as error:
            raise SetupError(f"{source} is no notebook ({error}): python3 -m llmstream_nb restore mends it.") from None
    if source.suffix == ".md":
        return new_notebook(cells=[new_markdown_cell(source.read_text("utf-8"))])
    cells = [new_markdown_cell(f"# `{source.relative_to(ROOT).as_posix()}`")]
    if source.is_dir():
        rooms = sorted(path.parent.name for path in source.glob("*/__init__.py"))
        cells.append(new_markdown_cell(" · ".join(f"[{name}/]({name})" for name in rooms)))
        for path in sorted(source.glob("*.py")):
            cells += [new_markdown_cell(f"## `{path.name}`"), new_code_cell(path.read_text("utf-8"))]
    else:
        cells.append(new_code_cell(source.read_text("utf-8", errors="replace")))
    lexer = find_lexer_class_for_filename("a.py" if source.is_dir() else source.name)
    return new_notebook(cells=cells, metadata={"language_info": {"name": lexer.aliases[0] if lexer else "text"}})


def _index() -> str:
    """The list of the course in Markdown, from what the notebooks say of themselves."""
    course, others = [], []
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        text, file = _prose(_notebook(path)), path.relative_to(ROOT).as_posix()
        title, minutes = _title(text), _found(r"(\d+) minutes", text)
        does = _found(r"\*\*You'll do:\*\* (.+)", text).replace("](", "](notebooks/")
        if minutes:
            course.append(f"| [{title}]({file}) | {minutes} | {does[:1].upper()}{does[1:]} |")
        else:
            others.append(f"- [{title}]({file})")
    others += [f"- [{_title((ROOT / name).read_text('utf-8'))}]({name})" for name in MAIN]
    about = _found(r"(?m)^\*\*(.+)\*\*$", (ROOT / MAIN[0]).read_text("utf-8"))
    head = ["# Contents", f"\n{about}\n", "| notebook | minutes | you'll do |", "|---|---|---|"]
    return "\n".join([*head, *course, "", *others])


def _prose(notebook: Any) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def _title(text: str) -> str:
    return _found(r"(?m)^# (.+)", text).replace("`", "")


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""


def _name_headings_as_github(soup: BeautifulSoup) -> None:
    """Give headings the anchors that links in Markdown files mean; a notebook's are those of JupyterLab."""
    for heading in soup.select("h1, h2, h3, h4"):
        name = re.sub(r"[^\w -]", "", heading.get_text()).strip().lower().replace(" ", "-")
        heading["id"] = name
        for sign in heading.select(".anchor-link"):
            sign["href"] = f"#{name}"
