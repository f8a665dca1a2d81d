"""What the blank page after notebook 05 checks: a streaming chat of the learner's own, tried in four drills."""

import inspect
from typing import Any

import redis

from llmstream_nb.checks.case import Case
from llmstream_nb.checks.running import exercise
from llmstream_nb.checks.verdict import require, show
from llmstream_nb.faults import Proxy
from llmstream_nb.llm import prepared, scripted

QUESTION = "What is a consumer group?"


@exercise
def capstone(case: Case, produce: Any, read: Any, stop: Any) -> str:
    """Capstone of the core: a chat of `produce(client, key, llm, model, question)`, `read` and `stop(client, key)`.

    `produce` asks the model, and writes its deltas and an end into the stream `key`. `read(client, key, after)` yields
    an (ID, text) pair for each text after the ID `after`, until the end. `stop` makes `produce` end early.
    """
    from openai import DefaultHttpxClient, OpenAI

    def write(script: str, client: Any = case.client) -> None:
        case.call(produce, f"{drill}, in `produce`", client, case.stream, llm, f"scripted:{script}", QUESTION)

    def follow(after: str = "0-0", right: str | None = None) -> tuple[list[str], str]:
        """The IDs and the text that a reader gets."""
        there = "".join(f", of a stream that ends with {show(entry)}" for entry in case.entries()[-1:])
        pairs = case.call(lambda: [*read(case.client, case.stream, after)], f"{drill}, in `read`{there}")
        case.require_form("pairs", "pairs (ID, text), each by a `yield`", list, tuple)
        text = "".join(text for _, text in pairs)
        require(right in (None, text), f"{drill}, the text is {show(text)}, not {show(right)}.")
        ids = [entry_id for entry_id, _ in pairs]
        ends = [entry_id for entry_id, _ in case.entries()[-1:] if entry_id in ids]
        require(not ends, f"{drill}, `read` yields the end itself{there}.")
        return ids, text

    def press(model: scripted.Server) -> None:
        any(case.closed.wait(0.01) or (case.client.xlen(case.stream) > 5 and model.active) for _ in range(500))  # wait
        stop(case.client, case.stream)

    require(inspect.isgeneratorfunction(read), "`read` is no generator: `yield` each (ID, text) as soon as it comes.")
    # A proxy of the network's does not stand before this machine itself.
    model, http = scripted.server(), DefaultHttpxClient(trust_env=False)
    with OpenAI(base_url=model.url, api_key=model.key, http_client=http) as llm:
        drill = "in drill 1, an answer"
        write("pace=0")
        follow(right=prepared.reply(QUESTION))

        drill, texts = "in drill 2, where lost replies make the client send an XADD again", [f"{n} " for n in range(12)]
        case.clear()
        proxy = Proxy.before(case.client)
        for entry in (rb".*\b0 ", rb".*\b5 ", rb".*\b6 ", rb"(?!.*\d )"):  # the last one has no text: the end
            proxy.drop_reply(when=rb"(?s)XADD" + entry)
        with redis.Redis.from_url(proxy.url, decode_responses=True, retry_on_error=[redis.ConnectionError]) as lossy:
            write("long=12,pace=0", lossy)
        ids, _ = follow(right="".join(texts))

        for seen in (6, 12):
            drill = f"in drill 3, a late reader who has seen {seen} of 12 texts"
            follow(ids[seen - 1], "".join(texts[seen:]))
        drill, entries = "in drill 3, a reader who is there before the first entry", case.entries()
        case.clear()
        silence: list[Any] = [[]] * 12  # more than a second
        case.trickle(entries[:6], *silence, entries[6:], add=case.put)
        follow(right="".join(texts))

        drill, right = "in drill 4, Stop", "".join(f"{n} " for n in range(200))
        case.other("stop")  # what `stop` may set
        case.call(stop, f"{drill}, in `stop`", case.client, case.stream)
        case.clear()
        case.trickle(scripted.server(), add=press)
        write("long=200,pace=100")
        ids, text = follow()
        kept = 4 < len(ids) < 200 and right.startswith(text)
        require(kept, f"{drill}: {len(ids)} of 200 deltas are there. Write each at once, look for Stop, keep the text.")
        ended = any(case.closed.wait(0.05) or not scripted.server().active for _ in range(20))
        require(ended, f"{drill}: the model speaks on though `produce` has returned. Close its stream.")
        case.clear()
        stop(case.client, case.stream)
        write("long=200,pace=100")
        require(len(follow()[0]) < 200, f"{drill}: pressed before `produce` began, it was not heard.")
    return "exact, once each, from any ID on, and stopped when asked: a streaming chat of your own."
