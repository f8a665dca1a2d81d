"""Tables in a notebook: texts at the left with their spaces, and all else as pandas shows it."""

import re

import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell

from llmstream_nb.viewing import frames


def html_of(frame: pd.DataFrame) -> str:
    shell = InteractiveShell()
    frames.install(shell)
    return shell.display_formatter.format(frame)[0]["text/html"]


@pytest.mark.parametrize("mathjax", [True, False])  # without, as `tables` sets it, pandas adds classes of its own
def test_columns_of_text_are_named_in_the_tables_own_style_counted_from_the_right(mathjax: bool) -> None:
    with pd.option_context("display.html.use_mathjax", mathjax):
        html = html_of(pd.DataFrame({"id": ["1-0", "1-1"], "ms": [0, 12], "kind": ["start", None], "gap": [1.5, None]}))
    style = re.search(r"<style>(\.text-4-2 .*?)</style>\s*<table", html, re.DOTALL)
    assert style
    assert re.findall(r"nth-last-child\((\d)\)", style[1]) == ["4", "2"]  # id and kind
    assert "pre-wrap" in style[1]
    assert re.search(r'<table[^>]* class="dataframe text-4-2\b', html)


@pd.option_context("display.max_columns", 20)
def test_other_tables_are_as_pandas_has_them() -> None:
    wide = pd.DataFrame([["x"] * 30])  # pandas leaves out the columns in the middle
    for frame in (pd.DataFrame({"n": [1, 2]}), pd.DataFrame({"mixed": ["a", 1]}), pd.DataFrame(), wide):
        assert html_of(frame) == frame._repr_html_()


def test_a_text_can_not_end_the_style_or_name_it() -> None:
    html = html_of(pd.DataFrame({"</style><script>": ['<table class="dataframe">']}))
    assert "<script" not in html
    assert html.count("text-1 tr") == 1
    assert html.count('class="dataframe text-1') == 1
