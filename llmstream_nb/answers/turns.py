"""What is asked: a question on its own, after earlier answers, or as messages; and what was said before it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import redis

from llmstream_nb.answers.connection import LOST, names_of, unusable
from llmstream_nb.answers.read import look
from llmstream_nb.llm.messages import Message, asked, question_in, request_of, request_text
from llmstream_nb.protocol.wire import (
    BrokenChain,
    check_answer_id,
    check_question,
    is_answer_id,
    parse_record,
    same_question,
)

MAX_TURNS = 50  # earlier ones
MAX_SAID = 400_000  # characters of all of them, and of the question


def checked(
    question: str | None,
    topic: str | None,
    follows: Any,
    messages: Sequence[Message] | None,
    params: Mapping[str, Any] | None,
) -> tuple[str, dict[str, Any]]:
    """The question, and what its record holds beside it; `follows` is an answer or an id.

    Raises BadQuestion, BadAnswerId and TypeError.
    """
    text = request_text(messages, params, question, topic, follows)
    beside = {"request": text} if text else {}
    if follows is not None:
        beside["follows"] = check_answer_id(getattr(follows, "id", follows))
        if nonce := getattr(follows, "nonce", ""):  # what it is a handle on may be asked anew, or lie in another Redis
            beside["follows_nonce"] = nonce
    return check_question(question or "") if messages is None else question_in(messages), beside


def said_before(record: dict[str, Any], client: redis.Redis) -> dict[str, Any]:
    """What `deltas_of` is told beside the question: the `turns` before it, or `messages` in its place; and `params`.

    Adds to the record of a new question the nonce of the one that it follows, and the topic of the first.
    Raises BrokenChain, BadQuestion or RedisUnusable.
    """
    turns, size, topic = list[Message](), len(record["question"]), ""
    for turn in chain(record, client):
        record.setdefault("follows_nonce", turn.get("nonce"))
        earlier = request_of(turn.get("request"))["messages"] or asked(turn["question"])
        size += len(turn["text"]) + sum(len(str(message.get("content"))) for message in earlier)
        if size > MAX_SAID:
            raise BrokenChain(f"what was said before has more than {MAX_SAID:,} characters: ask without `follows`")
        turns = [*earlier, {"role": "assistant", "content": turn["text"]}, *turns]
        topic = str(turn.get("topic") or "")
    record["topic"] = record["topic"] or topic
    return request_of(record.get("request")) | {"turns": turns}


def chain(record: Mapping[str, Any], client: redis.Redis) -> Iterator[dict[str, Any]]:
    """The records of what a question follows, the newest first, each with its text. Raises as `said_before` does."""
    seen = {record["id"]}
    while answer_id := record.get("follows"):
        if not is_answer_id(answer_id):
            raise BrokenChain("the record of a turn before names no answer that it follows: ask without `follows`")
        if answer_id in seen:
            raise BrokenChain(f"{answer_id!r} would follow itself: give the new question another id")
        if len(seen) > MAX_TURNS:
            raise BrokenChain(f"more than {MAX_TURNS} turns were before: ask without `follows`")
        seen.add(answer_id)
        turn = _ended(answer_id, client)
        if record.get("follows_nonce", turn.get("nonce")) != turn.get("nonce"):
            raise BrokenChain(f"{answer_id!r} is another answer by now: it was cleared, and its id used again")
        yield turn
        record = turn


def _ended(answer_id: str, client: redis.Redis) -> dict[str, Any]:
    """The record of an answer that has ended, with its text, and under the id by which it was found."""
    try:
        raw: Any = client.get(names_of(client).answer(answer_id).question)
    except LOST as error:
        raise unusable(error, client) from None
    record = parse_record(raw) or {}
    if not record.get("end"):
        now = look(answer_id, client)  # its producer may have ended it, and not the record yet
        if now.status not in ("ended", "failed", "missing"):
            raise BrokenChain(f"{answer_id!r} has not ended: wait for it, as by answer.wait(), or stop it, then ask")
        # Else it was cleared and asked anew between the two.
        record = now.record | {"text": now.text} if same_question(record, now.record) else {}
    if not isinstance(record.get("question"), str):
        raise BrokenChain(f"there is no answer {answer_id!r} to follow: never asked, cleared, or expired")
    if not (isinstance(record.get("text"), str) and record["text"]):
        raise BrokenChain(f"{answer_id!r} ended without a text, so nothing can follow it: ask anew")
    return record | {"id": answer_id}
