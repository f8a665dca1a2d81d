"""The site that `export` makes, opened from disk in Chromium without a network: no error, no request, nothing runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from llmstream_nb.setup import export as exporting
from tests.test_export import checkout, site  # noqa: F401 - fixtures

if TYPE_CHECKING:
    from playwright.sync_api import Page


@pytest.fixture
def offline(browser) -> Iterator[Page]:
    """A page in a browser without a network; `bad` of it lists what went wrong."""
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 720})
    page = context.new_page()
    page.bad = []
    page.on("console", lambda message: page.bad.append(message.text))
    page.on("pageerror", lambda error: page.bad.append(str(error)))
    page.on("requestfailed", lambda request: page.bad.append(request.url))

    def only_from_disk(route) -> None:
        if not route.request.url.startswith(("file:", "data:")):
            page.bad.append(route.request.url)
            route.abort()
        else:
            route.continue_()

    context.route("**/*", only_from_disk)
    yield page
    context.close()


def every_page(folder: Path) -> list[str]:
    found = sorted(path.as_uri() for path in folder.rglob("*.html"))
    assert found
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_opens_from_disk(offline, site, scheme) -> None:  # noqa: F811
    offline.emulate_media(color_scheme=scheme)
    for url in every_page(site):
        offline.goto(url)
        blank = "() => [...document.images].filter((image) => !image.naturalWidth || !image.alt).length"
        assert offline.evaluate(blank) == 0, url
        wide = "() => document.documentElement.scrollWidth > innerWidth"
        assert not offline.evaluate(wide), f"{url} is wider than its window"
    assert offline.bad == []


def test_a_page_fits_a_phone(offline, site) -> None:  # noqa: F811
    offline.set_viewport_size({"width": 390, "height": 800})
    for url in every_page(site):
        offline.goto(url)
        assert not offline.evaluate("() => document.documentElement.scrollWidth > innerWidth"), url


def test_paper_is_white_and_shows_what_is_folded(offline, site) -> None:  # noqa: F811
    offline.goto((site / "notebooks" / "04-groups.html").as_uri())
    answer = offline.locator("details p").first
    assert not answer.is_visible()
    offline.locator("summary").nth(0).click()
    offline.locator("summary").nth(0).click()
    offline.emulate_media(media="print", color_scheme="dark")
    assert answer.is_visible()
    assert not offline.locator("nav").first.is_visible()
    assert offline.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert offline.evaluate("() => getComputedStyle(document.body).color") == "rgb(0, 0, 0)"


def test_a_link_to_a_word_leads_to_it(offline, site) -> None:  # noqa: F811
    offline.goto((site / "notebooks" / "04-groups.html").as_uri())
    offline.locator("a[href='glossary.html#lag']").first.click()
    assert offline.url.endswith("/notebooks/glossary.html#lag")
    assert offline.locator("h2:target, h3:target").inner_text().startswith("lag")
    offline.get_by_role("link", name="Contents").click()
    offline.get_by_role("link", name="03 · Read live").click()
    offline.locator("nav [rel=next]").first.click()
    assert offline.url.endswith("/notebooks/04-groups.html")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_an_output_holds_does_not_run(offline, checkout) -> None:  # noqa: F811
    exporting.export(checkout / "site")
    offline.goto((checkout / "site" / "notebooks" / "00-a.html").as_uri())
    for link in offline.get_by_role("link", name="x", exact=True).all():
        link.click()
    assert offline.title() == "A <b> · llmstream-nb"
    assert not [url for url in offline.bad if url.startswith("http")]
    assert any("Content Security Policy" in message for message in offline.bad), "it was tried"
