"""What the exercises of notebook 08 check: server-sent events, and a connection that breaks."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from llmstream_nb.checks.case import Case
from llmstream_nb.checks.running import Interrupted, exercise
from llmstream_nb.checks.verdict import require, show


class Wire:
    """A web server as a viewer meets it: sends events by `get`, and cuts the connections after so many entries each."""

    def __init__(self, entries: list[tuple[str, str, str]], cuts: list[int]) -> None:
        self.entries, self.cuts = entries, list(cuts)
        self.wrong = ""  # what the viewer has done wrong
        self.over = False  # the end was sent
        self._sent = ""  # the ID of the last entry that was sent

    def get(self, headers: dict[str, str] = {}) -> Iterator[dict[str, str]]:  # noqa: B006 - nobody changes it
        """The events of one connection."""
        self.wrong = self._judge(headers)
        if self.wrong:
            raise Interrupted
        ids = [entry_id for entry_id, _, _ in self.entries]
        rest = self.entries[ids.index(self._sent) + 1 if self._sent else 0 :]
        yield {"event": "state", "data": '{"state": "streaming"}'}
        for entry_id, kind, text in rest[: self.cuts.pop(0)] if self.cuts else rest:
            self._sent, self.over = entry_id, kind in ("end", "failed")
            yield {"id": entry_id, "event": kind, "data": json.dumps({"text": text} if text else {"attempt": 1})}
        yield {"event": "state", "data": '{"state": "away"}'}

    def _judge(self, headers: Any) -> str:
        if not isinstance(headers, dict):
            return f"gives `get` {show(headers)}: give it a dictionary of headers."
        if self.over:
            return "comes back after the end: return the text."
        given = {str(name).lower(): value for name, value in headers.items()}.get("last-event-id")
        if given == self._sent or (not self._sent and given in (None, "0-0")):
            return ""
        without = "comes back without the header Last-Event-ID"
        came = without if given is None else f"comes with Last-Event-ID {show(given)}"
        return f"{came}, and has seen {self._sent or 'nothing'}."


@exercise
def last_event_id(case: Case, function: Callable[..., str]) -> str:
    """Exercise of notebook 08: `watch(get)`, an answer's text over a connection that breaks.

    `get(headers)` connects, and yields events, dictionaries with `event`, `data` and mostly an `id`, until the
    connection ends. As long as no `end` or `failed` has come, `watch` comes back with the last `id` in the header
    `Last-Event-ID`. It returns the text, which begins anew at a `start`.
    """
    first = [("1-0", "start", ""), *((f"1-{n}", "text", word) for n, word in enumerate("One “two”\nthree.", 1))]
    whole, end = "One “two”\nthree.", ("1-18", "end", "")
    second = [("2-0", "start", ""), ("2-1", "text", "a"), ("2-2", "text", "new"), ("2-3", "end", "")]
    words = [("1-0", "start", ""), ("1-1", "text", "end"), ("1-2", "text", "failed"), ("1-3", "end", "")]
    for entries, cuts, right, about in (
        ([*first, end], [], whole, "when nothing breaks"),
        ([*first, end], [5], whole, "when the connection breaks after 1-4"),
        ([*first, end], [2, 0, 9], whole, "when the connection breaks three times"),
        ([*first, end], [17], whole, "when only the end is still to come"),
        ([*first, ("1-18", "failed", "")], [5], whole, "when the answer fails"),
        ([*first[:6], *second], [5], "anew", "when a second attempt begins after the break"),
        (words, [2], "endfailed", "when the text speaks of the end"),
    ):
        wire = Wire(entries, cuts)
        try:
            result = case.call(function, about, wire.get)
        finally:  # also when `wire.get` has ended the function
            case.require(not wire.wrong, wire.wrong)
        case.require_form("the whole text", "one string")
        early = not wire.over and right.startswith(result)
        require(not early, f"{case.got}, and neither `end` nor `failed` has come: the answer goes on.")
        case.require_result(right)
    return "the whole text, once, however often the connection breaks."


@exercise
def parse(case: Case, function: Callable[[list[str]], list[dict[str, str]]]) -> str:
    """Optional exercise of notebook 08: `parse(lines)`, the server-sent events in these lines, by the standard.

    Each event is a dictionary with `id` (the last one that came, also with an earlier event; "" before), `event`
    ("message" without one) and `data`. Source: HTML standard, section 9.2.6.
    """
    one = ["id: 1-0", "event: text", "data: Hi", ""]
    hi = {"id": "1-0", "event": "text", "data": "Hi"}
    end, plain = {"id": "1-1", "event": "end", "data": "{}"}, {"event": "message", "data": "there"}
    long = ["event: text", "data: a", "data:", "data: b", "id: 1-0", ""]
    for lines, right, about in (
        (one, [hi], "one event"),
        ([*one, "id: 1-1", "event: end", "data: {}", ""], [hi, end], "two"),
        (["data: Hi", ""], [{"id": "", "event": "message", "data": "Hi"}], "an event of `data` alone"),
        ([*one, "data: there", ""], [hi, hi | plain], "an `id` only at the first event"),
        (long, [hi | {"data": "a\n\nb"}], "three lines of data"),
        ([": still here", "", *one], [hi], "a comment"),
        (["id:1-0", "event:text", "data:  a: b", ""], [hi | {"data": " a: b"}], "spaces and colons"),
        (["retry: 1000", "", "event: state", "", *one], [hi], "lines without data"),
        ([*one, "id: 1-1", "event: text", "data: cut o"], [hi], "an event that was cut off"),
    ):
        result = case.call(function, f"given {about}", list(lines))
        case.require_form("the list of events", "a list of dictionaries", list, dict)
        got = f"{case.about}, {show(lines)}, your function returns"
        require(len(result) == len(right), f"{got} {len(result)} events, not {len(right)}.")
        for event, wanted in zip(result, right, strict=True):
            require(event == wanted, f"{got} {show(event, repr)}, not {wanted}.")
    return "events, and nothing else."
