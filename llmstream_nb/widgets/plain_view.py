"""PlainAnswerView: an answer where a notebook program can't load anywidget: HTML, written anew whenever more comes."""

import html
from typing import Any

import ipywidgets

from llmstream_nb.viewing.blocks import beginning, left_out, thought
from llmstream_nb.viewing.transcript import LABELS, Transcript
from llmstream_nb.widgets.watched import RATE, Watched

STYLE = "white-space: pre-wrap; max-height: 32em; overflow: auto"


class PlainAnswerView(Watched, ipywidgets.HTML):  # type: ignore[misc]
    """The answer as escaped text in an ipywidgets.HTML."""

    def show(self) -> None:
        """Send all of it, as this widget can't do otherwise; long answers less often."""
        self.unseen = False
        transcript = self.transcript
        self.pause = transcript.size / RATE
        state = f"<b>{LABELS[transcript.state]}</b> {_escape(transcript.note)}"
        body = "".join(_in_order(transcript))
        self.value = f'<p>{state} <small>{transcript.figures}</small></p><pre style="{STYLE}">\n{body}</pre>'
        self.live = transcript.live


def _in_order(transcript: Transcript) -> list[str]:
    """All pieces as HTML, a result with the call that it belongs to."""
    pieces, live = transcript.pieces, transcript.live
    older = pieces.count({})
    found, open_calls = [f"<mark>[{older:,} earlier parts are not shown]</mark>"] if older else [], dict[str, int]()
    for piece in pieces:
        if isinstance(piece, str):
            found.append(_escape(piece))
            continue
        shown = _block(piece, transcript.ms if live and piece is pieces[-1] else None)
        if piece.get("kind") == "result" and (at := open_calls.pop(piece["id"], None)) is not None:
            found[at] += shown
        else:
            found.append(shown)
        if piece.get("kind") == "call":
            open_calls[piece["id"]] = len(found) - 1
    for at in open_calls.values():
        found[at] += f"<div><i>no result{' yet' if live else ''}</i></div>"
    return found


def _block(block: dict[str, Any], now: int | None) -> str:
    """What stands between the text, as HTML; `now`: it goes on, so many milliseconds after the start."""
    match block:
        case {"gap": words}:
            return f"<mark>{words}</mark>"
        case {"kind": "reasoning", "text": text}:
            return f"<details><summary>{thought(block, now)}</summary>{_escape(text)}</details>"
        case {"kind": "refusal", "text": text}:
            return f"<div><b>Refused</b> {_escape(text)}</div>"
        case {"kind": "call", "line": line}:
            broken = " <i>not valid JSON</i>" if "broken" in block else ""
            return f"<div>{_fold('→ ', line)}{broken} {left_out(block)}</div>"
        case {"kind": "result"}:
            sign = "← <b>Failed</b> " if "error" in block else "← "
            return f"<div>{_fold(sign, block.get('error') or block['content'])} {left_out(block)}</div>"
        case {"kind": "other", "name": name}:
            return f"<div><small>[a part of kind {_escape(name)}, which this page doesn't know]</small></div>"
    return ""


def _fold(sign: str, text: str) -> str:
    first, whole = beginning(text), f"<bdi>{_escape(text)}</bdi>"  # it may turn no words around but its own
    return f"{sign}{whole}" if first == text else f"<details><summary>{sign}{_escape(first)}</summary>{whole}</details>"


def _escape(text: str) -> str:
    """The text as HTML; also what a parser would change: it drops NUL, and turns CR into a newline."""
    return html.escape(text).replace("\0", "\ufffd").replace("\r", "&#13;")
