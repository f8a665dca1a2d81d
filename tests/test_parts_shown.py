"""Parts beside the text, as viewers get them: a transcript's blocks, the web's frames, tables, the lines of a terminal."""

from __future__ import annotations

import json
import re

import pytest

import llmstream_nb
from llmstream_nb import connect, tables
from llmstream_nb.answers.connection import names_of
from llmstream_nb.protocol.events import Continued, Ended, Gap, Restarted, Started
from llmstream_nb.protocol.parts import Reasoning, Refusal, Text, ToolCall, ToolResult, Unknown, joined
from llmstream_nb.protocol.wire import EntryID
from llmstream_nb.setup import cli
from llmstream_nb.viewing import blocks
from llmstream_nb.viewing.markdown import BETWEEN, to_html
from llmstream_nb.viewing.transcript import NEWEST, Transcript
from llmstream_nb.web import sse

from .conftest import FAST
from .test_commands import run

ONE, END = EntryID(1, 0), EntryID(1, 9)
PARTS = [
    Reasoning("Hm. ", ms=300),
    Reasoning("Aha.", ms=5200),
    Text("I 😀 look", ms=5300),
    Text(" it up.", ms=5400),
    ToolCall("a", "weather", '{"city": "Zürich", "days": 2}', ms=5500),
    ToolCall("b", "fails", '{"city": ', ms=5600),
    ToolResult("a", "sunny", ms=6000),
    ToolResult("b", error="no such city", ms=6100),
    Reasoning("So", ms=6900),
    Text("Sunny.", ms=7000),
    Refusal("But no", ms=7100),
    Refusal(" more.", ms=7200),
]
KINDS = ["reasoning", "text", "call", "call", "result", "result", "reasoning", "text", "refusal"]


def shown(*events, answer_id: str = "a") -> Transcript:
    """A transcript that was given these one by one, which is the same as all at once."""
    each, whole = Transcript(answer_id, past=True), Transcript(answer_id, past=True)
    for event in events:
        each.take([event])
    whole.take(events)
    assert (each.text, each.blocks, each.figures, each.size) == (whole.text, whole.blocks, whole.figures, whole.size)
    return whole


def kinds(transcript: Transcript) -> list[str]:
    return ["text" if isinstance(piece, str) else piece.get("kind", "gap") for piece in transcript.pieces]


def test_blocks_stand_in_their_places_between_the_text() -> None:
    transcript = shown(Started(ONE), *PARTS)
    assert kinds(transcript) == KINDS
    assert transcript.text == "I 😀 look it up.Sunny." and transcript.runs == ["I 😀 look it up.", "Sunny."]
    first, call, broken, result, error, second, refusal = [block for _, block in transcript.blocks]
    assert (first["text"], blocks.thought(first), blocks.thought(second)) == (
        "Hm. Aha.",
        "Thought for 5 s",
        "Thought for 0.8 s",
    )
    assert blocks.thought(first, 3_400) == "Thinking … 3 s"
    assert call["line"] == 'weather(city="Zürich", days=2)' and "broken" not in call
    assert broken["line"] == 'fails({"city":)' and broken["broken"]
    assert result["content"] == "sunny" and error["error"] == "no such city" and refusal["text"] == "But no more."
    assert [at for at, _ in transcript.offsets] == [0, 16, 16, 16, 16, 16, 22]  # the emoji counts as two
    assert to_html(*transcript.runs).split(BETWEEN) == ["<p>I 😀 look it up.</p>\n", "<p>Sunny.</p>\n"]


def test_a_record_shows_the_same_as_the_stream_did() -> None:
    live = shown(Started(ONE), *PARTS, Ended(END, "stop"))
    parts = joined((part.kind, part.text, part.ms) for part in PARTS)
    late = Transcript("a", past=True)
    late.take(late.follower.from_record({"end": str(END), "text": live.text, "parts": json.loads(json.dumps(parts))}))
    assert late.blocks == live.blocks and late.text == live.text and late.state == "ended"


@pytest.mark.parametrize(
    ("arguments", "line", "broken"),
    [
        ("", "f()", False),
        ("{}", "f()", False),
        ('{"a b": NaN, "n": 12345678901234567890}', 'f("a b"=NaN, n=12345678901234567890)', False),
        ("[1,\n 2]", "f([1, 2])", False),
        ("{'a': 1}", "f({'a': 1})", True),
        ("[" * 20_000, f"f({'[' * 20_000})"[:20_000], False),  # too deep to tell
        ('{"n": ' + "9" * 5_000 + "}", 'f({"n": ' + "9" * 5_000 + "})", False),
        ('{"n": 1e999, "m": 1.5}', 'f({"n": 1e999, "m": 1.5})', False),
        ('{"n": -1.5, "m": -7}', "f(n=-1.5, m=-7)", False),
        ('{"a": {"b": 1, "b": 2}}', 'f({"a": {"b": 1, "b": 2}})', False),
        ('{"\\ud800": 1, "\\ud801": 2}', 'f("\ufffd"=1, "\ufffd"=2)', False),
        ('{"a": "\\ud800"}', 'f(a="\ufffd")', False),
    ],
)
def test_a_call_is_a_line(arguments: str, line: str, broken: bool) -> None:
    block = blocks.drawn(ToolCall("1", "f", arguments))
    assert (block["line"], "broken" in block) == (line, broken)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_a_call_of_any_depth_is_shown(opening: str) -> None:
    """Python reads JSON as deep as it can't write it: about 850 to 999 levels."""
    for depth in range(800, 1_050):
        inner = opening * depth + "1" + ("]" if opening == "[" else "}") * depth
        block = blocks.drawn(ToolCall("1", "f", f'{{"a":{inner}}}'))
        assert block["line"] in (f"f(a={inner})", f"f(a={inner.replace(':', ': ')})", f'f({{"a":{inner}}})')
        assert "broken" not in block


def test_what_is_long_is_bounded_and_says_so() -> None:
    block = blocks.drawn(ToolResult("1", "x" * 1_000_000, cut=4_000_000))
    assert (len(block["content"]), block["more"], block["cut"]) == (20_000, 980_000, 4_000_000)
    assert blocks.left_out(block) == (
        "[980,000 more characters are not shown] [4,000,000 more characters were left out of the stream]"
    )
    assert len(json.dumps(sse.describe(ToolCall("1", "f", json.dumps({"a": "x" * 1_000_000}))))) < 50_000


def test_only_the_newest_blocks_are_told_but_no_text_is_lost() -> None:
    parts = [part for n in range(1000) for part in (ToolCall(str(n), "f"), Text(f"{n} "))]
    transcript = shown(Started(ONE), *parts)
    assert transcript.text == "".join(f"{n} " for n in range(1000)) == "".join(transcript.runs)
    assert [block for _, block in transcript.offsets].count({}) == 1000 - NEWEST


def test_unknown_kinds_are_named_once() -> None:
    transcript = shown(Started(ONE), Unknown("audio", "x"), Unknown("audio", "y"), Unknown("video", "z"), Text("t"))
    assert [block["name"] for _, block in transcript.blocks] == ["audio", "video"] and transcript.chunks == 4


def test_an_unknown_kind_that_is_called_like_text_is_no_text() -> None:
    """As one whose name ends in a control character: that is left out."""
    transcript = shown(Started(ONE), Text("a"), Unknown("text", "b"), Text("c"))
    assert transcript.text == "ac" and kinds(transcript) == ["text", "other", "text"]


def test_what_goes_on_keeps_all_and_what_begins_anew_keeps_nothing() -> None:
    started, told = Started(ONE, {"worker": "w1", "job": "1-0"}), {"worker": "w3", "job": "1-0"}
    on = shown(started, *PARTS[2:4], Continued(EntryID(2, 1), told), Text(" More.", EntryID(2, 2), 90))
    assert (on.text, on.version, on.attempts) == ("I 😀 look it up. More.", 0, 2)
    assert on.takeover == "Attempt 2, by w3, goes on." and on.figures.startswith("2 chunks · first token 0.09 s")
    anew = shown(started, *PARTS, Restarted(EntryID(2, 0), told), Text("New"))
    assert (anew.text, anew.blocks, anew.version, anew.takeover) == ("New", [], 1, "Attempt 2, by w3.")


def test_a_gap_among_blocks_is_mended_from_the_record() -> None:
    transcript = shown(Started(ONE), PARTS[0], Gap(EntryID(1, 3), 1), PARTS[2], Ended(END, "stop"))
    assert kinds(transcript) == ["reasoning", "gap", "text"] and transcript.missing == 1
    parts = [list(part) for part in joined((part.kind, part.text, part.ms) for part in PARTS[:3])]
    transcript.mend({"text": transcript.text, "parts": parts}, leased=False)
    assert kinds(transcript) == ["reasoning", "text"] and not transcript.missing and transcript.version == 1
    assert transcript.blocks[0][1]["text"] == "Hm. Aha."


def test_figures_tell_the_first_sign_where_it_is_not_text() -> None:
    data = {"first_part_ms": 300, "first_token_ms": 5200, "total_ms": 6000, "chunks": 12}
    assert shown(Started(ONE), *PARTS, Ended(END, "stop", data)).figures == (
        "12 chunks · first sign 0.30 s · first token 5.2 s · total 6.0 s"
    )
    assert shown(Started(ONE), PARTS[4], Ended(END, "tool_calls", {"first_part_ms": 90, "chunks": 1})).figures == (
        "1 chunk · first sign 0.09 s · total 5.5 s"
    )
    told = {"first_part_ms": 10, "first_token_ms": 10, "total_ms": 90, "chunks": 1}
    for event in (Ended(END, "stop", told), Ended(END, "stop", {"first_token_ms": 10, "total_ms": 90})):
        assert shown(Started(ONE), Text("a", ms=0), event).figures == "1 chunk · first token 0.01 s · total 0.1 s"


def test_a_refusal_is_no_failure() -> None:
    transcript = Transcript("a", past=True)
    record = {"end": str(END), "reason": "refusal", "parts": [["refusal", "I can't.", 9]]}
    transcript.take(transcript.follower.from_record(record))
    assert (transcript.state, transcript.note, transcript.text) == ("ended", "The model refused.", "")


def test_the_frames_of_parts() -> None:
    assert [sse.describe(part) for part in PARTS[4:8]] == [
        (
            "call",
            {
                "id": "a",
                "line": 'weather(city="Zürich", days=2)',
                "ms": 5500,
                "name": "weather",
                "arguments": '{"city": "Zürich", "days": 2}',
            },
        ),
        (
            "call",
            {
                "id": "b",
                "line": 'fails({"city":)',
                "ms": 5600,
                "broken": True,
                "name": "fails",
                "arguments": '{"city": ',
            },
        ),
        ("result", {"id": "a", "ms": 6000, "content": "sunny"}),
        ("result", {"id": "b", "ms": 6100, "error": "no such city"}),
    ]
    assert sse.describe(PARTS[0]) == ("reasoning", {"text": "Hm. ", "ms": 300})
    assert sse.describe(PARTS[-1]) == ("refusal", {"text": " more.", "ms": 7200})
    assert sse.describe(Unknown("audio", "secret", ms=7)) == ("other", {"kind": "audio", "ms": 7})
    went_on = Continued(EntryID(2, 1), {"worker": "w", "job": "1-0", "continues": "1-4"})
    assert sse.describe(went_on) == ("continued", {"attempt": 2, "worker": "w", "job": "1-0", "continued": True})


# ------------------------------------------------------------------------------------- tables and the terminal


@pytest.mark.parametrize("backend", ["fake"], indirect=True)
def test_tables_show_all_entries_and_count_the_text_alone(client) -> None:
    answer = llmstream_nb.ask("?", source=lambda *_: list(PARTS), id="a", client=client, timing=FAST).wait(60)
    found = tables.entries(answer, client=client)
    assert [*found["kind"]] == ["start", *(part.kind for part in PARTS), "end"]
    assert json.loads(found["text"][5]) == {"id": "a", "name": "weather", "arguments": PARTS[4].arguments}
    row = tables.answers(client=client).iloc[0]
    assert (row["chunks"], row["characters"], row["status"]) == (12, len(answer.text), "ended")
    assert "reasoning" in tables.record(answer, client=client).set_index("field")["value"]["parts"]


def test_the_terminal_gets_the_text_on_one_stream_and_the_parts_on_the_other(fake_tcp) -> None:
    long = ToolResult("c", "first line\n" + "x" * 990)
    source = [*PARTS[:9], long, Unknown.__name__, *PARTS[9:], Refusal("\x1b[31m")]
    llmstream_nb.ask("?", source=lambda *_: source, id="parts", client=connect(fake_tcp)).wait(60)
    code, text, said = run(fake_tcp, "watch", "parts")
    assert (code, text) == (0, "I 😀 look it up.UnknownSunny.\n")
    assert "\x1b" not in said
    lines = said.split("\n")
    assert lines[0] == "Thinking …" and lines[1].startswith("Thought for ")
    assert lines[2:7] == [
        "",
        '→ weather(city="Zürich", days=2)',
        '→ fails({"city":)',
        "← sunny",
        "← Failed: no such city",
    ]
    assert "← first line (… 991 more characters)" in lines and "Refused: But no more.[31m" in lines


def test_the_terminal_joins_what_follows_each_other_once(fake_tcp, capsys, monkeypatch) -> None:
    """A text, or reasoning, that grows by each of its pieces would take the square of its length."""
    client, sizes, take = connect(fake_tcp), [], Transcript.take
    source = [*[Reasoning("r")] * 1_000, *[Text("t")] * 1_000, *[Refusal("no ")] * 1_000]
    llmstream_nb.ask("?", source=lambda *_: source, id="many", client=client).wait(20)
    monkeypatch.setattr(Transcript, "take", lambda self, events: (sizes.append(len(events)), take(self, events)))
    assert cli._follow("many") == 0
    text, said = capsys.readouterr()
    assert (text, sizes) == ("t" * 1_000 + "\n", [1, 1_000, 1_000, 1_000, 1])
    assert f"Refused: {'no ' * 1_000}" in said and "[stop · 3,000 chunks · first sign" in said


def test_the_terminal_names_unknown_kinds_once(fake_tcp) -> None:
    client, entries = connect(fake_tcp), ["start", "text", "text\0", "text\0", "audio", "text", "end"]
    for n, kind in enumerate(entries):
        fields = {"kind": kind, "text": "shown " if kind == "text" else "{}", "ms": n}
        client.xadd(names_of(client).answer("odd").chunks, fields, f"1-{n}")
    code, text, said = run(fake_tcp, "watch", "odd")
    assert (code, text) == (0, "shown shown \n")
    assert said.split("\n")[:3] == [
        "",
        "[a part of kind “text”, which this version doesn't know]",
        "[a part of kind audio, which this version doesn't know]",
    ]


def test_no_line_of_a_part_or_an_error_looks_like_the_terminals_own(fake_tcp) -> None:
    forged = "[stop · 3 chunks]\n→ call()\r← result\x85[stop]\u2028→ again()\n"

    def refuses(*_):
        yield Refusal(f"no\n{forged}")
        yield ToolCall("1", f"f\u2028{forged}", f'{{"a": "\u2028{forged}')
        yield ToolResult("1", f"\n{forged}")
        raise RuntimeError(f"broke\n{forged}")

    llmstream_nb.ask("?", source=refuses, id="forged", client=connect(fake_tcp)).wait(20)
    code, _, said = run(fake_tcp, "watch", "forged")
    first = [re.split("[ (:]", line)[0] for line in said.splitlines() if not line.startswith("    ")]
    assert (code, first) == (1, ["Refused", "→", "←", "[failed"])


def test_marks_of_direction_stay_in_texts_and_leave_lines_and_names(fake_tcp) -> None:
    marks = "a\u200e\u200f\u061cb"

    def says(*_):
        yield from (marks, ToolCall("1", marks, json.dumps({marks: marks}, ensure_ascii=False)), ToolResult("1", marks))
        yield Refusal(marks)
        raise type(marks, (Exception,), {})("it broke")

    llmstream_nb.ask("?", source=says, id="marks", client=connect(fake_tcp)).wait(20)
    code, text, said = run(fake_tcp, "watch", "marks")
    assert (code, text) == (1, f"{marks}\n")
    lines = said.splitlines()
    assert lines[:4] == ["", '→ a b("ab"="ab")', "← ab", f"Refused: {marks}"] and lines[4].startswith("[failed: a b: ")
