"""What a viewer shows of one answer: its text, its state in words, its figures. No I/O happens here."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from llmstream_nb.protocol.events import Ended, Event, Failed, Gap, Restarted, Started
from llmstream_nb.protocol.follow import Follower
from llmstream_nb.protocol.parts import Text
from llmstream_nb.protocol.wire import AnswerNotFound, Timing, printable

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
    "away": "Redis is away, trying again.",
    "stopped": "The text so far is kept.",
    "length": "Cut off: the answer reached the model's limit on length.",
}


class Transcript:
    """One answer as its viewers show it. Feed it the events of its follower, in order."""

    def __init__(self, answer_id: str, timing: Timing | None = None, past: bool = False) -> None:
        self.follower = Follower(answer_id, timing=timing)
        self.text = ""
        self.version = 0  # grows when the text begins anew, so that offsets of before mean nothing
        self.gaps: list[tuple[int, int]] = []  # where entries are missing: (characters before, how many)
        self.chunks = 0
        self.first_ms: int | None = None  # from the attempt's start to its first text
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
        text = [self.text]
        for event in events:
            match event:
                case Started() | Restarted():
                    text.clear()
                    self.version += isinstance(event, Restarted)
                    self._begin(event)
                case Text(text=delta, ms=ms):
                    text.append(delta)
                    self._ms, self.chunks = ms, self.chunks + 1
                    self.first_ms = ms if self.first_ms is None else self.first_ms
                case Gap(missing=missing):
                    self.gaps = [*self.gaps, (sum(map(len, text)), missing)]
                case Ended(data=data) | Failed(data=data):
                    self._closing = event
                    self.chunks = data.get("chunks", self.chunks)
                    self.first_ms = data.get("first_token_ms", self.first_ms)
                    self._ms = data.get("total_ms", self._ms)
                    self.settled = not self.gaps
        self.text = "".join(text)

    def _begin(self, opening: Started | Restarted) -> None:
        """Note who writes this attempt. Numbers alone tell no takeover: they count on where an id is used again."""
        data, job = opening.data, opening.data.get("job")
        self.attempts = self.attempts + 1 if job and job == self._job else 1
        self._job, self.worker = job, printable(str(data.get("worker") or ""))
        words = NOTES["takeover"].format(opening.id.attempt, self.worker or "another worker")
        self.takeover = words if self.attempts > 1 else ""
        self.gaps, self.chunks, self.first_ms = [], 0, None
        self._ms, self._since = 0, data.get("at") or time.time()

    def mend(self, record: Mapping[str, Any] | None, leased: bool) -> None:
        """After the end, fill gaps from the record, which holds the whole text once its producer is done.

        Not so where someone closed the answer from outside: they had no more to write down than is here.
        """
        whole = record.get("text") if record else None
        if isinstance(whole, str) and len(whole) > len(self.text):
            self.text, self.gaps, self.version = whole, [], self.version + 1
        self.settled = not (self.gaps and leased)

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
        if self.gaps and self.settled:
            return f"{_are_missing(sum(missing for _, missing in self.gaps))}, lost or trimmed."
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
        """Chunks, time to first token, time so far, as text; empty before there is any."""
        if self.first_ms is None:
            return ""
        attempts = f"{self.attempts} attempts · " if self.settled and self.attempts > 1 else ""
        chunks = f"{self.chunks:,} chunk{'' if self.chunks == 1 else 's'}"
        total = "total " if self.settled else ""
        first = f"{self.first_ms / 1000:.{2 if self.first_ms < 1000 else 1}f}"
        return f"{attempts}{chunks} · first token {first} s · {total}{self.ms / 1000:.1f} s"

    @property
    def pieces(self) -> list[tuple[str, str]]:
        """The text, cut where entries are missing: (text, words on what is missing after it)."""
        cuts = [0, *(at for at, _ in self.gaps), len(self.text)]
        words = [f"[{_are_missing(n)} here]" for _, n in self.gaps]
        return [(self.text[a:b], said) for a, b, said in zip(cuts, cuts[1:], [*words, ""], strict=False)]


def _are_missing(count: int) -> str:
    return f"{count:,} {'entry is' if count == 1 else 'entries are'} missing"
