"""What the exercises of notebook 03 check: answers are read while they are written."""

from collections.abc import Callable

from llmstream_nb.checks.case import Case, Noting
from llmstream_nb.checks.running import exercise
from llmstream_nb.checks.verdict import require, show


@exercise
def read(case: Case, function: Callable[..., str]) -> str:
    """Exercise of notebook 03: `read(client, stream, last_id, question_id)`, one answer's text among others.

    It reads on from `last_id`, takes only entries with its own `questionId`, waits for those to come, stops
    at `;END:<question_id>`, and returns the text without START and END.
    """
    opening, end = [("a", "START:a;"), ("a", "Hi "), ("a", "there")], ("a", ";END:a")
    mixed = [("b", "START:b;"), *opening, ("b", "blue"), ("a", " you"), ("b", ";END:b"), ("a", " all"), end]
    words = [*opening, ("a", " at END:"), ("a", ";END:b"), ("a", ";END:a is"), ("a", " the end"), end]
    said = "Hi there at END:;END:b;END:a is the end"
    coming = [("a", " you"), ("a", " all"), ("b", "blue")], [("a", " and"), ("b", "seas")], [("a", " me"), end]
    for before, entries, later, right, about in case.each(
        ([], [*opening, end], (), "Hi there", "when the answer lies there complete"),
        ([("a", "old"), ("b", "old")], [*opening, end], (), "Hi there", "when there are entries up to `last_id`"),
        ([], mixed, (), "Hi there you all", "when another asker's entries lie between yours"),
        ([], words, (), said, "when the answer itself speaks of the end"),
        ([], [*opening, end, ("a", "after"), ("b", "after")], (), "Hi there", "when more entries follow the end"),
        ([], opening, coming, "Hi there you all and me", "when the entries come while it reads"),
    ):
        last_id = case.add(before)
        case.add(entries)
        case.trickle(*later, add=case.add)
        noting = Noting(case.client)
        result = case.call(function, about, noting, case.stream, last_id, "a")
        case.require_form("the text that it has read", "the text as one string")
        marked = "START:a;" in result or result.endswith(";END:a")
        require(not marked, "your text holds START or END: they only mark where an answer lies; leave them out.")
        case.require_result(right)
        case.require(not noting.again, "reads the same entries again: remember the ID of each, also of others'.")
    return "your words, all of them, and nobody else's."


@exercise
def read_many(case: Case, function: Callable[..., dict[str, str]]) -> str:
    """Optional exercise of notebook 03: `read_many(client, keys)`, several answers of the kit by one XREAD at a time.

    It reads the streams under `keys` from their beginnings until each has its entry of the kind `end`, and returns
    a dictionary: for each key the text.
    """
    texts = {"two": ["end", " it"], "three": [" "], "one": ["red ", "green "]}  # in the order of their ends
    right = {name: "".join(texts[name]) for name in ("one", "two", "three")}
    keys = {name: case.other(name) for name in right}
    entries = []
    for name, pieces in texts.items():
        entries += [(name, (f"1-{number}", "text", piece)) for number, piece in enumerate(pieces, 1)]
        entries.append((name, (f"1-{len(pieces) + 1}", "end", '{"reason": "stop"}')))

    def write(entry: tuple[str, tuple[str, str, str]]) -> None:
        case.write([entry[1]], keys[entry[0]])

    for there, later, about in case.each(
        (entries, [], "when three answers lie there"),
        ([], entries, "when three answers are being written"),
    ):
        for entry in [*((name, ("1-0", "start", '{"model": "m"}')) for name in keys), *there]:
            write(entry)
        case.trickle(*later, add=write)
        noting = Noting(case.client)
        result = case.call(function, about, noting, list(keys.values()))
        require(isinstance(result, dict), f"{case.got}: return a dictionary.")
        named = {name: result.get(key) for name, key in keys.items()}
        got = f"{about}, the texts of your function are {show(named)}"
        require('": "' not in str(named), f"{got}: only entries of the kind `text` belong to them.")
        require(named == right, f"{got}, not {show(right)}.")
        together = any(isinstance(streams, dict) and len(streams) == 3 for streams, _ in noting.calls)
        case.require(together, "reads one stream at a time: give all of them to one XREAD.")
        case.require(not noting.again, "reads the same entries again: remember the last ID of each stream.")
    return "all of them, with one read at a time."
