"""AnswerView: one answer in a notebook, live while it is written, as Markdown once it is complete."""

import time
from typing import Any

import anywidget
import redis
import traitlets as t

from llmstream_nb.answers.ask import Answer
from llmstream_nb.viewing.markdown import to_html
from llmstream_nb.viewing.transcript import LABELS, utf16_length
from llmstream_nb.widgets.bundle import bundle
from llmstream_nb.widgets.plain_view import PlainAnswerView
from llmstream_nb.widgets.watched import RATE, Watched

KEYFRAME = 10.0  # seconds between two messages with the whole state; a page that missed something asks for it earlier


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
    _esm = bundle("elements.js", "blocks.js", "paper.js", "kernel.js", "sight.js", "answer_view.js")
    _css = bundle("states.css", "text.css", "kernel.css", "answer_view.css")

    text = t.Unicode(help="The text so far.").tag(sync=True)
    version = t.Int(help="Grows when the text begins anew.").tag(sync=True)
    blocks: t.List[Any] = t.List(help="What is between the text: [UTF-16 units before, part or gap].").tag(sync=True)
    state = t.Enum(list(LABELS), "waiting").tag(sync=True)
    label = t.Unicode(LABELS["waiting"], help="The state as people call it.").tag(sync=True)
    note = t.Unicode(help="A sentence on the state, where it needs one.").tag(sync=True)
    attempts = t.Int(1, help="How many workers began an answer to the question, as far as was seen.").tag(sync=True)
    worker = t.Unicode(help="Who writes the last of them, if the pool does.").tag(sync=True)
    html = t.Unicode(help="Once complete: the text as Markdown, sanitised.").tag(sync=True)
    chunks = t.Int(help="How many entries have come with parts.").tag(sync=True)
    first_part_ms = t.Int(None, allow_none=True, help="Milliseconds to the first of them.").tag(sync=True)
    first_ms = t.Int(None, allow_none=True, help="And to the first with text.").tag(sync=True)
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
        """Send what is new: a delta while only the parts grow, else the whole state."""
        whole, self.unseen, self.whole_wanted = self.whole_wanted, False, False
        now, transcript, old = time.monotonic(), self.transcript, self._trait_values
        numbers = ("version", "chunks", "first_part_ms", "first_ms", "ms")
        figures = {name: getattr(transcript, name) for name in numbers}
        state = {name: getattr(transcript, name) for name in ("state", "note", "attempts", "worker")}
        state["label"] = LABELS[transcript.state]
        new = figures | state | {"text": transcript.text, "blocks": transcript.offsets}
        if transcript.settled and not transcript.missing:  # Markdown with a hole in it would mean something else
            new["html"] = self.html or to_html(*transcript.runs)
        seen, blocks = self.text, self.blocks
        only_grown = all(old.get(name) == new[name] for name in ("version", *state))
        grown = {name: value for name, value in figures.items() if name == "version" or old.get(name) != value}
        old.update(new)  # past the traits' own sync, which would send the whole text each time
        if only_grown and now < self._keyframe_at and not (whole or transcript.settled):
            grown |= {"offset": utf16_length(seen), "added": transcript.text[len(seen) :]}
            self.send(grown | _grown(blocks, self.blocks))
        else:
            self._keyframe_at = now + KEYFRAME + transcript.size / RATE
            self.send_state(list(new))
        self.live = transcript.live


def _grown(old: list[list[Any]], new: list[list[Any]]) -> dict[str, Any]:
    """What a page lacks that has the old blocks: those from number `kept` on, the first of them from `skip` on."""
    kept = len(old)
    if old and (text := old[-1][1].get("text")) and text != new[kept - 1][1]["text"]:
        at, block = new[kept - 1]
        rest = [[at, block | {"text": block["text"][len(text) :]}], *new[kept:]]
        return {"kept": kept - 1, "skip": utf16_length(text), "blocks": rest}
    return {"kept": kept, "blocks": new[kept:]} if new[kept:] else {}
