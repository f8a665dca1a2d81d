"""AnswerView: one answer in a notebook, live while it is written, as Markdown once it is complete."""

import html
import time
from itertools import accumulate
from typing import Any

import anywidget
import ipywidgets
import redis
import traitlets as t

from llmstream_nb.answers.ask import Answer
from llmstream_nb.viewing.markdown import to_html
from llmstream_nb.viewing.transcript import LABELS, Transcript
from llmstream_nb.widgets.bundle import bundle
from llmstream_nb.widgets.watched import Watched

KEYFRAME = 10.0  # seconds between two messages with the whole state; a page that missed something asks for it earlier
RATE = 300_000  # characters a second that whole texts may cost, so that long ones are sent less often


class AnswerView(Watched, anywidget.AnyWidget):
    """Shows an answer as it grows: `AnswerView(ask("…"))` at the end of a cell.

    Its state in the kernel is always complete: reload the page, or open it twice.

    Args:
        answer: an `Answer`, or the id of one, from any process.
        plain: use nothing but ipywidgets.HTML, for notebook programs that can't load anywidget.
        client: the Redis where the id is to be found; else that of the last `connect()`.
        group: read through this consumer group, as its only consumer `view`; it is created when it is absent. Redis
            then keeps account of what was shown, and each batch is acknowledged.
        replay: show its stream again at the pace at which it was written, times this; 1 is as it was, 2 twice as fast.

    Raises:
        BadAnswerId, BadName: the id or the group's name holds odd characters.
        RedisUnusable: `client` is not given, and connecting fails.
    """

    # Their text, not their paths: those make anywidget keep every widget alive for ever.
    _esm = bundle("elements.js", "paper.js", "kernel.js", "sight.js", "answer_view.js")
    _css = bundle("states.css", "text.css", "kernel.css", "answer_view.css")

    text = t.Unicode(help="The text so far.").tag(sync=True)
    version = t.Int(help="Grows when the text begins anew.").tag(sync=True)
    gaps: t.List[Any] = t.List(help="Where entries are missing: [UTF-16 units before, words to show].").tag(sync=True)
    state = t.Enum(list(LABELS), "waiting").tag(sync=True)
    label = t.Unicode(LABELS["waiting"], help="The state as people call it.").tag(sync=True)
    note = t.Unicode(help="A sentence on the state, where it needs one.").tag(sync=True)
    attempts = t.Int(1, help="How many workers began an answer to the question, as far as was seen.").tag(sync=True)
    worker = t.Unicode(help="Who writes the last of them, if the pool does.").tag(sync=True)
    html = t.Unicode(help="Once complete: the text as Markdown, sanitised.").tag(sync=True)
    chunks = t.Int(help="How many text entries have come.").tag(sync=True)
    first_ms = t.Int(None, allow_none=True, help="Milliseconds to the first of them.").tag(sync=True)
    ms = t.Int(help="Milliseconds from the start to this message, or to the end.").tag(sync=True)

    _keyframe_at = 0.0  # monotonic time

    def __new__(
        cls,
        answer: Answer | str,
        *,
        plain: bool = False,
        client: redis.Redis | None = None,
        group: str | None = None,
        replay: float | None = None,
    ) -> Any:
        """With `plain`, this makes a widget of another class."""
        return PlainAnswerView(answer, client=client, group=group, replay=replay) if plain else super().__new__(cls)

    def show(self) -> None:
        """Send what is new: a delta while only the text grows, else the whole state."""
        whole, self.unseen, self.whole_wanted = self.whole_wanted, False, False
        now, transcript, old = time.monotonic(), self.transcript, self._trait_values
        figures = {name: getattr(transcript, name) for name in ("version", "chunks", "first_ms", "ms")}
        state = {"state": transcript.state, "label": LABELS[transcript.state], "note": transcript.note}
        who = {"attempts": transcript.attempts, "worker": transcript.worker}
        new = figures | state | who | {"text": transcript.text, "gaps": _offsets(transcript)}
        if transcript.settled and not transcript.gaps:  # Markdown with a hole in it would mean something else
            new["html"] = self.html or to_html(transcript.text)
        seen = self.text
        only_grown = all(old.get(name) == new[name] for name in ("version", "gaps", "state", "note"))
        grown = {name: value for name, value in figures.items() if name == "version" or old.get(name) != value}
        old.update(new)  # past the traits' own sync, which would send the whole text each time
        if only_grown and now < self._keyframe_at and not (whole or transcript.settled):
            self.send(grown | {"offset": utf16_length(seen), "added": transcript.text[len(seen) :]})
        else:
            self._keyframe_at = now + KEYFRAME + len(transcript.text) / RATE
            self.send_state(list(new))
        self.live = transcript.live


class PlainAnswerView(Watched, ipywidgets.HTML):  # type: ignore[misc]
    """The answer as escaped text in an ipywidgets.HTML."""

    def show(self) -> None:
        """Send all of it, as this widget can't do otherwise; long texts less often."""
        self.unseen = False
        transcript = self.transcript
        self.pause = len(transcript.text) / RATE
        text = "".join(f"{_escape(piece)}<mark>{missing}</mark>" for piece, missing in transcript.pieces)
        state = f"<b>{LABELS[transcript.state]}</b> {_escape(transcript.note)}"
        style = "white-space: pre-wrap; max-height: 32em; overflow: auto"
        self.value = f'<p>{state} <small>{transcript.figures}</small></p><pre style="{style}">\n{text}</pre>'
        self.live = transcript.live


def _offsets(transcript: Transcript) -> list[list[Any]]:
    before = accumulate(utf16_length(piece) for piece, _ in transcript.pieces)
    return [[length, missing] for length, (_, missing) in zip(before, transcript.pieces[:-1], strict=False)]


def _escape(text: str) -> str:
    """The text as HTML; also what a parser would change: it drops NUL, and turns CR into a newline."""
    return html.escape(text).replace("\0", "\ufffd").replace("\r", "&#13;")


def utf16_length(text: str) -> int:
    """The length of a text as JavaScript counts it, where an emoji counts as two."""
    return len(text) if text.isascii() else len(text.encode("utf-16-le")) // 2
