"""The site that `export` makes: every link and anchor in it leads somewhere, and nothing in it needs a net or runs."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from llmstream_nb.setup import export as exporting
from llmstream_nb.setup.environment import SetupError

from .test_notebooks import GLOSSARY, NOTEBOOKS, OPTIONAL, REFERENCE, ROOT, is_hidden
from .test_workshop import PAGES as WORKSHOP

SOURCES = [*NOTEBOOKS, OPTIONAL, GLOSSARY, REFERENCE, *WORKSHOP, ROOT / "README.md", ROOT / "llmstream_nb/PROTOCOL.md"]
Pages = dict[str, BeautifulSoup]


def pages_of(folder: Path) -> Pages:
    return {
        path.relative_to(folder).as_posix(): BeautifulSoup(path.read_text("utf-8"), "html.parser")
        for path in folder.rglob("*.html")
    }


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the site of this checkout."""
    folder = tmp_path_factory.mktemp("site")
    assert exporting.export(folder) == 0
    return folder


@pytest.fixture(scope="module")
def pages(site) -> Pages:
    """The pages of the site, by their paths within it."""
    return pages_of(site)


def page_of(pages: Pages, source: Path) -> BeautifulSoup:
    return pages[source.relative_to(ROOT).with_suffix(".html").as_posix()]


def dead_links(folder: Path, pages: Pages) -> Iterator[str]:
    """The links that lead nowhere: to no file, to no anchor, or out, but in a form that no address has."""
    for name, page in pages.items():
        for link in page.select("a[href]"):
            url = urlsplit(str(link["href"]))
            if url.scheme:
                if url.scheme != "https" or not re.fullmatch(r"[\w-]+(\.[\w-]+)+", url.netloc) or " " in url.geturl():
                    yield f"{name}: {link['href']}"
                continue
            there = ((folder / name).parent / unquote(url.path)).resolve() if url.path else folder / name
            target = pages.get(there.relative_to(folder.resolve()).as_posix()) if there.is_file() else None
            # As a browser looks for it: as it is written, then decoded.
            anchors = [url.fragment, unquote(url.fragment)] if url.fragment else []
            if target is None or (anchors and target.find(id=anchors) is None):
                yield f"{name}: {link['href']}"


def test_every_notebook_and_every_page_about_them_is_in_the_site(pages) -> None:
    for source in SOURCES:
        page = page_of(pages, source)
        assert page.title and page.h1
        assert page.title.text == f"{page.h1.text.removesuffix('¶')} · llmstream-nb"


def test_every_link_leads_to_a_page_and_to_a_heading_on_it(site, pages) -> None:
    assert list(dead_links(site, pages)) == []
    assert sum(len(page.select("a[href*='#']")) for page in pages.values()) > 300, "anchors are among them"


def test_a_dead_link_is_found(tmp_path) -> None:
    links = ["b.html", "a.html#no", "#yes", "https://nowhere", "ftp://a.org", "https://a.org/x"]
    html = "".join(f'<a href="{link}">x</a>' for link in links) + '<p id="yes">'
    (tmp_path / "a.html").write_text(html)
    found = [line.removeprefix("a.html: ") for line in dead_links(tmp_path, pages_of(tmp_path))]
    assert found == ["b.html", "a.html#no", "https://nowhere", "ftp://a.org"]


def test_an_anchor_is_there_once(pages) -> None:
    for name, page in pages.items():
        ids = [tag["id"] for tag in page.select("main [id]")]
        assert len(ids) == len(set(ids)), name


def test_nothing_comes_from_the_net_and_nothing_runs(pages) -> None:
    for name, page in pages.items():
        assert not page.select(
            "script, iframe, object, embed, link[rel=stylesheet], [srcset]:not([srcset^='data:'])"
        ), name
        assert all(str(tag["src"]).startswith("data:image/") for tag in page.select("[src]")), name
        assert not [tag for tag in page.find_all(True) for attribute in tag.attrs if attribute.startswith("on")], name
        assert not re.search(r"url\(|@import", "".join(style.text for style in page.select("style"))), name
        assert "default-src 'none'" in str(page.select("meta[http-equiv]")[0]["content"])


def test_the_course_is_walked_from_page_to_page(pages) -> None:
    for way, order in (("next", NOTEBOOKS), ("prev", NOTEBOOKS[::-1])):
        name = order[0].stem
        for there in order[1:]:
            links = page_of(pages, ROOT / f"notebooks/{name}.ipynb").select(f"nav [rel={way}]")
            assert {link["href"] for link in links} == {f"{there.stem}.html"} and len(links) == 2
            name = there.stem


def test_the_index_lists_the_course_with_minutes_and_a_line_each(pages) -> None:
    rows = [[cell.text for cell in row.select("td")] for row in pages["index.html"].select("tbody tr")]
    assert [row[0].partition(" ")[0] for row in rows] == sorted(
        path.stem.partition("-")[0] for path in [*NOTEBOOKS, OPTIONAL]
    )
    for _, minutes, line in rows:
        assert 5 <= int(minutes) <= 30 and re.fullmatch(r"[A-Z][^`*\[]{40,}\.", line)


@pytest.mark.parametrize("path", [*NOTEBOOKS, OPTIONAL, GLOSSARY, REFERENCE], ids=lambda path: path.stem)
def test_outputs_are_shown_and_surprises_folded(path: Path, pages) -> None:
    page = page_of(pages, path)
    assert not page.select("details[open]")
    shown = [
        (picture["src"].partition(",")[2], picture["alt"], bool(picture.find_parent("details")))
        for picture in page.select(".output img")
    ]
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            if picture := output.get("data", {}).get("image/png", "").strip():
                data, alt, folded = shown.pop(0)
                assert (data, folded) == (picture, is_hidden(cell))
                assert alt == output.metadata.get("image/png", {}).get("alt", alt)


def test_no_sign_of_markdown_is_left_over(pages) -> None:
    for source in SOURCES:
        page = BeautifulSoup(str(page_of(pages, source).main), "html.parser")
        for tag in page.select("pre, code, .output"):
            tag.decompose()
        assert not re.search(r"`|\*\*|\]\(|^#", page.text, re.MULTILINE), source


def test_copied_code_is_what_the_cell_holds(pages) -> None:
    for path in NOTEBOOKS:
        blocks = [block.text.strip() for block in page_of(pages, path).select("main > .highlight")]
        cells = nbformat.read(path, as_version=4).cells
        assert blocks == [cell.source.strip() for cell in cells if cell.cell_type == "code"]


# --------------------------------------------------------------------------------- what somebody may have done


KEY = "OPENAI_API_KEY=sk-not-to-be-seen"
EVIL = '<img src="x" onerror="document.title = 1"><script>document.title = 2</script><iframe src="https://a.org">'


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A checkout with one notebook, in which all is meant badly or went wrong."""
    for name in exporting.MAIN:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# Title")
    (tmp_path / ".env").write_text(KEY)
    (tmp_path / "notebooks").mkdir()
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "a view's text"}
    outputs = [
        new_output("display_data", data={"text/html": EVIL, "text/plain": ""}),
        new_output("display_data", data={"text/markdown": f"{EVIL}\n\n[x](javascript:document.title=3)"}),
        new_output("display_data", data={"application/javascript": "document.title = 4", "text/plain": "script"}),
        new_output("display_data", data=view),
        new_output("stream", text="<b>said</b>"),
        new_output("error", ename="E", evalue="v", traceback=["\x1b[31mBroken\x1b[0m <i>"]),
    ]
    cells = [
        new_markdown_cell(f"# A <b>\n\n[keys](../.env) ![keys](../.env) [out](../../x) {EVIL}"),
        new_code_cell("", outputs=outputs),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "notebooks" / "00-a.ipynb")
    monkeypatch.setattr(exporting, "ROOT", tmp_path)
    monkeypatch.setattr(exporting, "NOTEBOOKS", tmp_path / "notebooks")
    return tmp_path


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_hidden_or_outside_is_not_taken_along(checkout) -> None:
    assert exporting.export(checkout / "site") == 0
    pages = pages_of(checkout / "site")
    assert set(pages) == {"index.html", "notebooks/00-a.html", *(f"{name[:-3]}.html" for name in exporting.MAIN)}
    for secret in (KEY, base64.b64encode(KEY.encode()).decode()[:20]):
        assert not [name for name, page in pages.items() if secret in str(page)]
    words = [block.text for block in pages["notebooks/00-a.html"].select(".output pre")]
    assert words == ["script", "a view's text", "<b>said</b>", "Broken <i>"]


def test_only_a_new_folder_or_an_earlier_site_is_written_into(checkout) -> None:
    (checkout / "mine").mkdir()
    (checkout / "mine" / "letter.txt").touch()
    with pytest.raises(SetupError, match="holds other things"):
        exporting.export(checkout / "mine")
    assert [path.name for path in (checkout / "mine").iterdir()] == ["letter.txt"]
    for _ in range(2):
        assert exporting.export(checkout / "site") == 0


def test_a_broken_notebook_is_named(checkout) -> None:
    (checkout / "notebooks" / "00-a.ipynb").write_text("{")
    with pytest.raises(SetupError, match=r"00-a\.ipynb is no notebook .* restore mends it"):
        exporting.export(checkout / "site")
