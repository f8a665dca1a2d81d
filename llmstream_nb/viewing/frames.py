"""Tables in a notebook: numbers stand at the right, as pandas has them, and texts at the left with their spaces."""

from typing import Any


def install(shell: Any) -> None:
    """Have this IPython show pandas' tables so; pandas is imported when the first is shown."""
    shell.display_formatter.formatters["text/html"].for_type_by_name("pandas", "DataFrame", show)


def show(frame: Any) -> str | None:
    """A table's HTML as pandas makes it, with a style for its columns of text."""
    import pandas as pd

    html: str | None = frame._repr_html_()
    width = frame.shape[1]  # columns are counted from the right, where heads and rows are alike
    texts = [width - at for at in range(width) if pd.api.types.is_string_dtype(frame.iloc[:, at])]
    if not html or not texts or 0 < pd.get_option("display.max_columns") < width:  # 0: all are shown
        return html
    name = "-".join(["text", *map(str, texts)])
    cells = ", ".join(f".{name} tr > :nth-last-child({at})" for at in texts)
    style = f"<style>{cells} {{ text-align: left; white-space: pre-wrap; }}</style>"
    return html.replace("<table", f"{style}\n<table", 1).replace('class="dataframe', f'class="dataframe {name}', 1)
