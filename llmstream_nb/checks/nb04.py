"""What the exercises of notebook 04 check: work that a consumer group hands out, takes over and acknowledges."""

from collections.abc import Callable
from typing import Any

from llmstream_nb.checks.case import BrokenModelError, Case
from llmstream_nb.checks.running import exercise
from llmstream_nb.checks.verdict import require, show


@exercise
def claim(case: Case, function: Callable[..., list[str]]) -> str:
    """Exercise of notebook 04: `take_over(client, stream, group, consumer)`, the work that a dead consumer left.

    It claims for `consumer` whatever is pending in the group, however short its idle time, acknowledges it, and
    returns the texts (field `text`) in the order of their IDs. It touches nothing else.
    """
    for pending, about in (
        ([2, 3, 5, 9, 10], "when five entries are pending"),
        ([], "when nothing is pending"),
        ([*range(2, 152)], "when 150 entries are pending"),
    ):
        _leave_pending(case, pending)
        lay, before = case.entries(), case.groups()
        result = case.call(function, about, case.client, case.stream, "workers", "worker-2")
        case.require(case.entries() == lay, "changes the stream: XACK, and leave the entries where they are.")
        after = case.groups()
        case.require(set(after) == set(before), "makes or destroys a group: only claim.")
        case.require(after["readers"] == before["readers"], "changes another group: claim only in `group`.")
        same = after["workers"]["last-delivered-id"] == before["workers"]["last-delivered-id"]
        case.require(same, "takes new entries too: claim, don't read with `>`.")
        _judge_claimed(case, result, [f"text {number}" for number in pending])
        left = after["workers"]["pending"]
        require(not left, f"{about}, {left} of them still are after your function: acknowledge each with XACK.")
        owners = [owner["name"] for owner in case.client.xinfo_consumers(case.stream, "workers")]
        case.require(not pending or "worker-2" in owners, "claims nothing for the consumer that it is given.")
    return "what the dead consumer left, in order, and acknowledged; the rest as it was."


def _leave_pending(case: Case, pending: list[int]) -> None:
    """Make a stream whose entries of these numbers a dead consumer of the group `workers` left pending.

    It acknowledged the others; two came after its death. Another group has pending entries of its own.
    """
    last = max(pending, default=3) + 1
    done = [number for number in range(1, last + 1) if number not in pending]
    states = dict.fromkeys(pending, "text") | dict.fromkeys(done, "done") | {last + 1: "new", last + 2: "new"}
    case.clear()
    case.put((f"{number}-0", {"text": f"{states[number]} {number}"}) for number in sorted(states))
    for group, count in (("workers", last), ("readers", 3)):
        case.client.xgroup_create(case.stream, group, "0")
        case.client.xreadgroup(group, "worker-1", {case.stream: ">"}, count=count)
    case.client.xack(case.stream, "workers", *(f"{number}-0" for number in done))


def _judge_claimed(case: Case, result: Any, right: list[str]) -> None:
    case.require_form("the list of texts", "a list of the texts alone, `fields['text']` of each entry", list, str)
    require(bool(result) or not right, f"{case.got}: is the minimum idle time 0, and does each text go into the list?")
    require(result == right or sorted(result) != sorted(right), f"{case.got}: return them in the order of their IDs.")
    case.require(not set(result) < set(right), f"returns {len(result)} texts: go on until nothing is left.")
    done = any(text.startswith("done") for text in result)
    require(not done, f"{case.got}: some of these had been acknowledged; take only what is pending.")
    case.require_result(right)


@exercise
def work(case: Case, function: Callable[..., object]) -> str:
    """Optional exercise of notebook 04: `work(client, stream, group, consumer, do)`, acknowledged after the work.

    It takes what is pending with `consumer`, then what is new, calls `do(text)` for each entry, and acknowledges
    that entry once `do` has returned. What `do` raises passes, and its entry stays pending.
    """
    for left, new, about in (
        (0, 3, "when three entries are new"),
        (2, 2, "when two entries are left over, and two are new"),
        (2, 0, "when two entries are left over"),
        (0, 0, "when there is nothing to do"),
    ):
        _hand_out(case, left, new)
        _judge_work(case, function, [f"left {n}" for n in range(left)] + [f"new {n}" for n in range(new)], about)
    _hand_out(case, 1, 3)
    first, again = ["left 0", "new 0", "new 1"], ["new 1", "new 2"]
    _judge_work(case, function, first, "when `do` raises at the third of four entries", breaks_at="new 1")
    _judge_work(case, function, again, "when it is called again, after `do` had raised")
    return "each entry is done, and acknowledged after that; what broke off comes again."


def _hand_out(case: Case, left: int, new: int) -> None:
    """Make a stream with so many entries pending with `worker-1`, one with `worker-2`, and so many new ones."""
    texts = [*(f"left {n}" for n in range(left)), "theirs", *(f"new {n}" for n in range(new))]
    case.clear()
    case.put((f"{number}-0", {"text": text}) for number, text in enumerate(texts, 1))
    case.client.xgroup_create(case.stream, "workers", "0")
    if left:
        case.client.xreadgroup("workers", "worker-1", {case.stream: ">"}, count=left)
    case.client.xreadgroup("workers", "worker-2", {case.stream: ">"}, count=1)


def _pending(case: Case, consumer: str) -> list[str]:
    """The texts of the entries that are pending with this consumer of the group `workers`."""
    ids = case.client.xpending_range(case.stream, "workers", "-", "+", 100, consumername=consumer)
    texts = {entry_id: fields["text"] for entry_id, fields in case.entries()}
    return [texts.get(entry["message_id"], "") for entry in ids]


def _judge_work(case: Case, function: Any, right: list[str], about: str, breaks_at: str = "") -> None:
    did, early = list[str](), list[str]()

    def do(text: str) -> None:
        did.append(text)
        if text not in _pending(case, "worker-1"):
            early.append(text)
        if text == breaks_at:
            raise BrokenModelError

    raised = case.breaks(function, about, case.client, case.stream, "workers", "worker-1", do)
    foreign = _pending(case, "worker-2") == ["theirs"] and "theirs" not in did
    case.require(foreign, "takes what another consumer is busy with: read, don't claim.")
    case.require(did == right, f"does {show(did)}, not {show(right)}.")
    require(not early, f"{about}, {show(early[:1])} is acknowledged before `do` has returned: a crash would lose it.")
    left = _pending(case, "worker-1")
    if breaks_at:
        require(breaks_at in left, f"{about}, that entry is acknowledged all the same: it would never be done.")
        case.require(raised, "hides the error: let it pass.")
    require(not set(left) & set(did) - {breaks_at}, f"{about}, these are done and still pending: {show(left)}.")
