"""What a model that goes on from a text brings beyond it; what it says again is held against what stands."""

import re
from collections.abc import Iterator

from llmstream_nb.llm.endpoint import Disagrees, ModelError
from llmstream_nb.protocol.parts import Yielded, written

UNWILLING = ("BadRequest", "ServerError", "EmptyAnswer")  # errors that need not come again where it begins anew


def head(text: str) -> str:
    """What of `text` a model is given: all before the last white space, for after a white space it would go wrong."""
    found = re.fullmatch(r"(.*\S)\s+\S*", text, re.DOTALL)
    return found[1] if found else ""


def behind(text: str, parts: Iterator[Yielded]) -> Iterator[Yielded]:
    """What `parts` bring beyond `text`, of a model that was given its head.

    Such a model says the rest again, others all of it; only what follows is passed on. Raises Disagrees, before
    anything is, where it says something else, or something that is no text, or refuses.
    """
    due, said = [_units(text[len(head(text)) :]), _units(text)], b""
    while not any(said.startswith(known) for known in due):
        kind, more = _next(parts)
        if kind == "end" and any(not _text(known[len(said) :]).strip() for known in due):
            return
        said += _units(more)
        due = [known for known in due if known.startswith(said) or said.startswith(known)]
        if kind != "text" or not due:
            raise Disagrees
    known = next(known for known in due if said.startswith(known))
    if said != known:
        yield _text(said[len(known) :])
    yield from parts


def _next(parts: Iterator[Yielded]) -> tuple[str, str]:
    """Kind and text of the next part; `end` where there is none, or the model refuses to go on."""
    try:
        return written(next(parts))
    except StopIteration:
        return "end", ""
    except ModelError as error:
        if error.error not in UNWILLING:
            raise
        return "end", ""


def _units(text: str) -> bytes:
    """`text` in UTF-16, of which a delta may hold one half of an emoji."""
    return text.encode("utf-16-le", "surrogatepass")


def _text(units: bytes) -> str:
    return units.decode("utf-16-le", "surrogatepass")
