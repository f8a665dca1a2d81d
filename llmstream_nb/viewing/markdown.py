"""Markdown to HTML that is safe to show: no scripts, no raw HTML, nothing loaded from anywhere."""

from collections.abc import Sequence
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.token import Token

LONGEST = 100_000  # characters; parsing more would hold up the kernel, so it stays plain text
BETWEEN = "<!-- -->"  # where other parts stand between two runs of text: no other comment gets through

_INLINE = {"a", "br", "code", "em", "s", "strong"}
_BLOCKS = {"blockquote", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "ul"}
_TABLES = {"table", "tbody", "td", "th", "thead", "tr"}


def _image_in_words(_: Any, tokens: Sequence[Token], index: int, *__: Any) -> str:
    """Show what an image is about instead of loading it: a request tells its host who reads, and when."""
    return f"[image: {nh3.clean_text(tokens[index].content)}]"


_markdown = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
_markdown.add_render_rule("image", _image_in_words)


def to_html(*runs: str) -> str:
    """Render runs of Markdown, each by itself; HTML in it comes out as text. Empty for more text than LONGEST.

    markdown-it already escapes all HTML. The allowlist of nh3 is the second wall: it holds whatever the first
    one may let through.
    """
    return "" if sum(map(len, runs)) > LONGEST else BETWEEN.join(map(_to_html, runs))


def _to_html(text: str) -> str:
    return nh3.clean(
        _markdown.render(text),
        tags=_INLINE | _BLOCKS | _TABLES,
        attributes={"*": set(), "a": {"href"}, "ol": {"start"}},
        url_schemes={"http", "https", "mailto"},
        url_relative="deny",  # relative to the notebook server, where links can act
        link_rel="noopener noreferrer",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )
