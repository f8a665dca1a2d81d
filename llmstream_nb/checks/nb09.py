"""What the exercise of notebook 09 checks: what a person should see of an agent's answer."""

from collections.abc import Callable, Iterable
from typing import Any

from llmstream_nb.checks.case import Case
from llmstream_nb.checks.running import exercise
from llmstream_nb.checks.verdict import require, show
from llmstream_nb.protocol.events import Continued, Ended, Event, Interrupted, Restarted, Started
from llmstream_nb.protocol.parts import Reasoning, Text, ToolCall, ToolResult, Unknown
from llmstream_nb.protocol.wire import EntryID


@exercise
def visible(case: Case, function: Callable[[Iterable[Event]], tuple[str, list[tuple[str, str | None]]]]) -> str:
    """Exercise of notebook 09: `visible(events)`: the text, and each call's tool with what it gave back.

    The calls stand in their order, as pairs of a name and a result's `content` or `error`, or None without a result.
    """
    start, end = Started(EntryID(1, 0)), Ended(EntryID(1, 99), "stop")
    anew, goes_on = Restarted(EntryID(2, 0)), Continued(EntryID(2, 1))
    one, two = ToolCall("a", "XLEN"), ToolCall("b", "TTL")
    twelve, sixty = ToolResult("a", "12"), ToolResult("b", "60")
    for events, text, calls, about in (
        ([start, Text("Hi"), Text(" you"), end], "Hi you", [], "when there is only text"),
        ([start, Reasoning("Hm. "), Text("Hi"), end], "Hi", [], "when the model reasons first"),
        ([start, one, twelve, Text("12")], "12", [("XLEN", "12")], "when a tool was called"),
        ([start, one, ToolResult("a", error="no")], "", [("XLEN", "no")], "when a tool failed"),
        ([start, one, twelve, two], "", [("XLEN", "12"), ("TTL", None)], "while a tool runs"),
        ([start, one, two, sixty, twelve], "", [("XLEN", "12"), ("TTL", "60")], "when the second result comes first"),
        ([one, ToolCall("b", "XLEN"), sixty], "", [("XLEN", None), ("XLEN", "60")], "when a tool was called twice"),
        ([start, Unknown("picture", "{}"), Text("Hi")], "Hi", [], "when there is a part of an unknown kind"),
        ([Text("Hi"), one, anew, two, Text("Ho")], "Ho", [("TTL", None)], "when it begins anew"),
        ([Text("Hi"), Interrupted(EntryID(1, 1)), goes_on, Text(" you")], "Hi you", [], "when another goes on"),
        ([one, twelve, goes_on, Text("12")], "12", [("XLEN", "12")], "when another goes on after a call"),
    ):
        result: Any = case.call(function, about, iter(events))
        case.require_form("the text and the list of calls", "two things: the text and the list of calls", tuple)
        require(len(result) == 2, f"{case.got}: return two things, the text and the list of calls.")
        require(result[0] == text, f"{case.got}: the text should be {show(text)}.")
        require(result[1] == calls, f"{case.got}: the calls should be {show(calls)}.")
    return "the text, and each call with its result."
