"""A widget's script and its style, each as one text: anywidget loads no second file."""

import re
from pathlib import Path

FOLDERS = (Path(__file__).parent, Path(__file__).parents[1] / "viewing" / "browser")


def bundle(*names: str) -> str:
    """Join these files; what JavaScript modules among them import from each other, they have then in one scope."""
    paths = [next(path for folder in FOLDERS if (path := folder / name).exists()) for name in names]
    text = "\n".join(path.read_text("utf-8") for path in paths)
    return re.sub(r"^import .*\n|^export (?!default)", "", text, flags=re.MULTILINE)
