"""What a viewer shows of one answer: its text and other parts, its state in words, its figures. No I/O happens here."""

import time
from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby, pairwise
from typing import Any

from llmstream_nb.protocol.events import Continued, Ended, Event, Failed, Gap, Restarted, Started
from llmstream_nb.protocol.follow import Follower
from llmstream_nb.protocol.parts import DELTAS, Part, Text, parts_of_record
from llmstream_nb.protocol.wire import ORIGIN, AnswerNotFound, Timing, printable
from llmstream_nb.viewing.blocks import drawn

LABELS = {
    "waiting": "Waiting",
    "streaming": "Streaming",
    "interrupted": "Interrupted",
    "ended": "Complete",
    "stopped": "Stopped",
    "failed": "Failed",
    "missing": "Not found",
}
NOTES = {
    "queued": "Nobody has begun to answer yet.",
    "interrupted": "Its producer died; the text so far stands.",
    "silent": "Its worker {} is silent; another may take over.",
    "takeover": "Attempt {}, by {}.",
    "continued": "Attempt {}, by {}, goes on.",
    "away": "Redis is away, trying again.",
    "stopped": "The text so far is kept.",
    "length": "Cut off: the answer reached the model's limit on length.",
    "refusal": "The model refused.",
}
NEWEST = 300  # blocks of which viewers are told more than that they are there


class Transcript:
    """One answer as its viewers show it. Feed it the events of its follower, in order."""

    def __init__(self, answer_id: str, timing: Timing | None = None, past: bool = False) -> None:
        self.follower = Follower(answer_id, timing=timing)
        self.text = ""
        self.version = 0  # grows when the text begins anew, so that offsets of before mean nothing
        # What stands between the text: (characters before, a gap in words, or a part as it is drawn).
        self.blocks: list[tuple[int, dict[str, Any]]] = []
        self.missing = 0  # entries
        self.size = 0  # characters of all parts
        self.chunks = 0
        self.first_part_ms: int | None = None  # from the attempt's start to its first part
        self.first_ms: int | None = None  # and to its first text
        self.attempts = 1  # at this question, as far as was seen
        self.worker = ""  # who writes this one, if the pool does
        self.takeover = ""  # the same in words, where another worker began before
        self.away = False  # Redis can't be reached at the moment
        self.settled = False  # nothing will change any more
        self._past = past  # times are those of the entries, not of now
        self._since = time.time()
        self._ms = 0
        self._job: Any = None  # the entry in the pool's queue for which this attempt is written
        self._closing: Ended | Failed | None = None
        self._error: Exception | None = None

    def take(self, events: Sequence[Event]) -> None:
        """Apply what the follower made of a read."""
        for kind, group in groupby(events, type):
            if kind in DELTAS.values():  # a joined text of many is quicker than many joined texts
                parts: Any = list(group)
                self._add(kind("".join(part.text for part in parts), ms=parts[-1].ms), parts[0].ms, len(parts))
            else:
                for event in group:
                    self._apply(event)

    def _apply(self, event: Event) -> None:
        match event:
            case Started() | Restarted():
                self.version += isinstance(event, Restarted)
                self._clear()
                self._begin(event, "takeover")
            case Continued():
                self._begin(event, "continued")
                self.chunks = 1  # what is here, as this attempt has it
            case Gap(missing=missing):
                self.missing += missing
                self.blocks.append((len(self.text), {"gap": f"[{_are_missing(missing)} here]"}))
            case Ended(data=data) | Failed(data=data):
                self._closing = event
                self.chunks = data.get("chunks", self.chunks)
                self.first_ms = data.get("first_token_ms", self.first_ms)
                self.first_part_ms = data.get("first_part_ms", self.first_ms)
                self._ms = data.get("total_ms", self._ms)
                self.settled = not self.missing
            case _ if isinstance(event, Part):
                self._add(event, event.ms, 1)

    def _add(self, part: Part, first_ms: int, chunks: int) -> None:
        """Add a part, or deltas as one, of which the first came at `first_ms`."""
        if self.first_part_ms is None:
            self.first_part_ms = first_ms
        if isinstance(part, Text):  # whatever one of an unknown kind is called
            self.text += part.text
            self.first_ms = first_ms if self.first_ms is None else self.first_ms
        else:
            block, at = drawn(part) | {"since": self._ms}, len(self.text)
            before, last = self.blocks[-1] if self.blocks else (-1, {})
            if before != at or "id" in block or any(last.get(name) != block.get(name) for name in ("kind", "name")):
                self.blocks.append((at, block))
            elif "text" in block:
                self.blocks[-1] = at, last | {"text": last["text"] + block["text"], "ms": part.ms}
        self._ms, self.chunks, self.size = part.ms, self.chunks + chunks, self.size + len(part.text)

    def _clear(self) -> None:
        self.text, self.blocks, self.missing, self.size, self._ms = "", [], 0, 0, 0

    def _begin(self, opening: Started | Restarted | Continued, words: str) -> None:
        """Note who writes this attempt. Numbers alone tell no takeover: they count on where an id is used again."""
        data, job = opening.data, opening.data.get("job")
        self.attempts = self.attempts + 1 if job and job == self._job else 1
        self._job, self.worker = job, printable(str(data.get("worker") or ""))
        takeover = NOTES[words].format(opening.id.attempt, self.worker or "another worker")
        self.takeover = takeover if self.attempts > 1 else ""
        self.chunks, self.first_part_ms, self.first_ms = 0, None, None
        self._ms, self._since = 0, data.get("at") or time.time()

    def mend(self, record: Mapping[str, Any] | None, leased: bool) -> None:
        """After the end, fill gaps from the record, which holds all parts once its producer is done.

        Not so where someone closed the answer from outside: they had no more to write down than is here.
        """
        parts = parts_of_record(record or {}, ORIGIN)
        if sum(len(part.text) for part in parts) > self.size:
            known = self.chunks, self._ms, self.first_part_ms, self.first_ms
            self._clear()
            self.take(parts)
            self.chunks, self._ms, self.first_part_ms, self.first_ms = known
            self.version += 1
        self.settled = not (self.missing and leased)

    def fail(self, error: Exception) -> None:
        """The answer can't be followed, and this is why."""
        self._error, self.settled = error, True

    @property
    def state(self) -> str:
        """One of LABELS."""
        if self._error:
            return "missing" if isinstance(self._error, AnswerNotFound) else "failed"
        if isinstance(self._closing, Ended) and self._closing.reason == "cancelled":
            return "stopped"
        state = self.follower.state
        return "waiting" if state == "queued" or (state == "streaming" and not self.chunks) else state

    @property
    def live(self) -> bool:
        """Whether text may come at any moment."""
        return self.state in ("waiting", "streaming")

    @property
    def silent(self) -> str:
        """Whose silence an interruption is, and what may follow: only the pool has others who take over."""
        return NOTES["silent"].format(self.worker) if self.worker else NOTES["interrupted"]

    @property
    def note(self) -> str:
        """What the state alone does not tell, in a sentence; often empty."""
        if self._error:
            return str(self._error)
        if isinstance(self._closing, Failed):
            return self._closing.message or self._closing.error
        if self.away:
            return NOTES["away"]
        if self.missing and self.settled:
            return f"{_are_missing(self.missing)}, lost or trimmed."
        if self.state == "ended" and self._closing:
            reason = self._closing.reason
            return "" if reason == "stop" else NOTES.get(reason, f"The model gave the reason: {reason}.")
        if self.follower.state == "queued":
            return NOTES["queued"]
        if self.live:
            return self.takeover
        return self.silent if self.state == "interrupted" else NOTES.get(self.state, "")

    @property
    def ms(self) -> int:
        """Milliseconds from the attempt's start to now, or to the last that was heard of it."""
        now = int((time.time() - self._since) * 1000)
        return max(self._ms, now) if self.live and not (self.away or self._past) else self._ms

    @property
    def figures(self) -> str:
        """Chunks, times to the first part and token, time so far, as text; empty before there is any."""
        if self.first_part_ms is None:
            return ""
        again = self.settled and self.attempts > 1  # figures are of the last one
        known = [f"{self.attempts} attempts"] if again else []
        known.append(f"{'the last: ' if again else ''}{self.chunks:,} chunk{'' if self.chunks == 1 else 's'}")
        if self.first_part_ms != self.first_ms:
            known.append(f"first sign {_seconds(self.first_part_ms)}")
        if self.first_ms is not None:
            known.append(f"first token {_seconds(self.first_ms)}")
        return " · ".join([*known, f"{'total ' if self.settled else ''}{self.ms / 1000:.1f} s"])

    @property
    def shown(self) -> list[tuple[int, dict[str, Any]]]:
        """The blocks, but of all that are not among the newest only that they are there."""
        old = [(at, block if "gap" in block else {}) for at, block in self.blocks[:-NEWEST]]
        return [*old, *self.blocks[-NEWEST:]]

    @property
    def offsets(self) -> list[list[Any]]:
        """The blocks that are shown, each with the length of the text before it as JavaScript counts."""
        cuts = [0, *(at for at, _ in self.blocks)]
        before = accumulate(utf16_length(self.text[a:b]) for a, b in pairwise(cuts))
        return [[length, block] for length, (_, block) in zip(before, self.shown, strict=True)]

    @property
    def pieces(self) -> list[str | dict[str, Any]]:
        """Runs of text, and in their places the blocks that are shown."""
        cuts = [0, *(at for at, _ in self.blocks), len(self.text)]
        runs = [self.text[a:b] for a, b in pairwise(cuts)]
        blocks: list[Any] = [*(block for _, block in self.shown), ""]
        return [piece for both in zip(runs, blocks, strict=True) for piece in both if piece != ""]

    @property
    def runs(self) -> list[str]:
        """The text, cut where blocks are."""
        return [piece for piece in self.pieces if isinstance(piece, str)]


def _seconds(ms: int) -> str:
    return f"{ms / 1000:.{2 if ms < 1000 else 1}f} s"


def _are_missing(count: int) -> str:
    return f"{count:,} {'entry is' if count == 1 else 'entries are'} missing"


def utf16_length(text: str) -> int:
    """The length of a text as JavaScript counts it, where an emoji counts as two."""
    return len(text) if text.isascii() else len(text.encode("utf-16-le")) // 2
