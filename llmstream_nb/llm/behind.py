"""What a model that goes on from a text brings beyond it; what it says again is held against what stands."""

import re
from collections.abc import Iterator

from llmstream_nb.llm.endpoint import Disagrees, ModelError
from llmstream_nb.protocol.parts import Yielded, written

UNWILLING = ("BadRequest", "ServerError")  # errors that need not come again where it begins anew


def head(text: str) -> str:
    """What of `text` a model is given: all before the last white space, for after a white space it would go wrong."""
    found = re.fullmatch(r"(.*\S)\s+\S*", text, re.DOTALL)
    return found[1] if found else ""


def behind(text: str, parts: Iterator[Yielded]) -> Iterator[Yielded]:
    """What `parts` bring beyond `text`, of a model that was given its head.

    Such a model says the rest again, others all of it; only what follows is passed on. While both may be meant, it is
    held back. Raises Disagrees, before anything is passed on, where the model says something else, or something that
    is no text, or refuses.
    """
    whole, tail, said = _units(text), _units(text[len(head(text)) :]), b""
    while not said.startswith(whole) and (whole.startswith(said) or not said.startswith(tail)):
        kind, more = _next(parts)
        if kind == "end" and said.startswith(tail):
            break  # it only looked as if all were said again
        if kind == "end" and not _text(tail[len(said) :]).strip() and tail.startswith(said):
            return
        said += _units(more)
        if kind != "text" or not any(each.startswith(said) or said.startswith(each) for each in (whole, tail)):
            raise Disagrees
    known = whole if said.startswith(whole) else tail
    if said != known:
        yield _text(said[len(known) :])
    yield from parts


def _next(parts: Iterator[Yielded]) -> tuple[str, str]:
    """Kind and text of the next part; `end` where the model has nothing to say. Raises Disagrees if it refuses."""
    try:
        return written(next(parts))
    except StopIteration:
        return "end", ""
    except ModelError as error:
        if error.error == "EmptyAnswer":
            return "end", ""
        if error.error in UNWILLING:
            raise Disagrees from error
        raise


def _units(text: str) -> bytes:
    """`text` in UTF-16, of which a delta may hold one half of an emoji."""
    return text.encode("utf-16-le", "surrogatepass")


def _text(units: bytes) -> str:
    return units.decode("utf-16-le", "surrogatepass")
