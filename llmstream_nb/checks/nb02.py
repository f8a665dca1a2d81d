"""What the exercises of notebook 02 check: an answer is written into a stream, and found there again by its record."""

import json
from collections.abc import Callable, Iterator

from llmstream_nb.checks.case import LIFETIME, BrokenModelError, Case
from llmstream_nb.checks.running import exercise
from llmstream_nb.checks.verdict import require, show


@exercise
def produce(case: Case, function: Callable[..., object]) -> str:
    """Exercise of notebook 02: `produce(client, stream, question_id, chunks)`, a loop from chunks to entries.

    It adds an entry with the fields `questionId` and `chunkOutput` for each chunk, then one for the end,
    `;END:<question_id>`, also when the chunks break off with an error, which it lets pass. An entry
    `START:<question_id>;` before the first chunk is welcome.
    """
    for chunks, breaks, about in case.each(
        (["Redis ", "streams ", "keep ", "keep ", "order."], False, "given 5 chunks"),
        ([], False, "given no chunks"),
        (["half "], True, "when the model breaks off in mid-answer"),
    ):
        case.put([("1-0", {"questionId": "b", "chunkOutput": "another's"})])
        late: list[str] = []
        raised = case.breaks(function, about, case.client, case.stream, "a", _model(case, chunks, late, breaks))
        entries = case.entries()
        if breaks:
            ended = ";END:a" in [fields.get("chunkOutput") for _, fields in entries]
            require(ended, f"{about}, the end must be written all the same: else readers wait for ever.")
            case.require(raised, "hides the error: let it pass on, after the end.")
        _judge_produced(case, entries, chunks)
        require(not late, "your function collects before it writes: add each chunk as soon as it comes.")
    return "an entry for each chunk, as soon as it comes, and the end after the last."


def _model(case: Case, chunks: list[str], late: list[str], breaks: bool) -> Iterator[str]:
    """Give these chunks; `late` gets those that are not in the stream when the next one is wanted."""
    for number, chunk in enumerate(chunks, 2):
        yield chunk
        if len(case.entries()) < number:
            late.append(chunk)
    if breaks:
        raise BrokenModelError


def _judge_produced(case: Case, entries: list[tuple[str, dict[str, str]]], chunks: list[str]) -> None:
    kept = bool(entries) and entries.pop(0)[0] == "1-0"
    require(kept, "what another asker had written into the stream is gone: only add to it.")
    case.require(bool(entries), "adds nothing to the stream that it is given.")
    for _, fields in entries:
        names = sorted(fields)
        wanted = names == ["chunkOutput", "questionId"]
        require(wanted, f"an entry has the fields {show(names)}, not `questionId` and `chunkOutput`.")
        mine = fields["questionId"]
        require(mine == "a", f"given the question id 'a', an entry has the `questionId` {show(mine)}.")
    texts = [fields["chunkOutput"] for _, fields in entries]
    last = texts[-1]
    if texts[0] == "START:a;":
        texts.pop(0)
    require(";END:a" in texts, f"no entry holds the end, ';END:a' for the id 'a'; the last: {show(last)}.")
    once = texts.index(";END:a") == len(texts) - 1
    require(once, "the end comes twice, or before the last chunk: it comes once, after the loop.")
    require(texts[:-1] == chunks, f"given the chunks {show(chunks)}, the entries hold {show(texts[:-1])}.")


@exercise
def rebuild(case: Case, function: Callable[..., str]) -> str:
    """Optional exercise of notebook 02: `rebuild(client, key)`, an answer's text by the question record under `key`."""
    before, between = [("a", "START:a;"), ("a", "an older try"), ("b", "START:b;")], [("b", "another's")]
    for pieces, about in case.each(
        (["Redis ", "keeps ", "order."], "of an answer of three chunks, with another's between them"),
        (["START:", "b; and ", ";END:b"], "of an answer that speaks of START and END"),
        ([], "of an answer without a chunk"),
    ):
        case.add(before)
        start = case.add([("a", "START:a;")])
        for piece in pieces:
            case.add([*between, ("a", piece)])
        end = case.add([*between, ("a", ";END:a")])
        case.add([*between, ("a", "a later one")])
        record = {"topic": "Redis", "topicQuestion": "What is Redis?", "questionId": "a", "streamName": case.stream}
        record |= {"streamStartMessageId": start, "streamEndMessageId": end}
        case.client.set(case.other("record"), json.dumps(record), ex=LIFETIME)
        case.call(function, about, case.client, case.other("record"))
        case.require_form("the text", "the text as one string")
        case.require_result("".join(pieces))
    return "the text, by nothing but its record."
