"""The benchmarks measure what they say, exactly; no test looks at how fast anything was."""

from __future__ import annotations

import json

import matplotlib.pyplot as plt
import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import harness, plot
from benchmarks.harness import Line, Result, Row, interleave, judge, measure, report
from llmstream_nb.faults import servers

needs_redis = pytest.mark.skipif(not servers.available(), reason="neither redis-server nor valkey-server is on PATH")
benchmarks.load()


@needs_redis
@pytest.mark.parametrize("name", ["produce", "read", "latency", "memory", "llm", "askers", "web"])
def test_a_row_is_measured_and_every_text_is_exact(name: str) -> None:
    row = harness.ROWS[name]
    result = measure(row, quick=True)
    assert not (result.failed or result.skipped)
    assert result.sizes
    for line in row.lines:
        if line.side != "redis-benchmark" and line.beside != "redis-benchmark":
            assert result.samples[line.side][line.figure]
    for side, figures in result.samples.items():
        for figure, values in figures.items():
            if figure.startswith("exact") and (side, name) != ("the tutorial", "askers"):
                assert values == [100.0] * len(values)
    json.dumps(result.samples)


def test_sides_run_in_turn() -> None:
    calls: list[str] = []
    samples = interleave({side: lambda side=side: calls.append(side) or {"n": len(calls)} for side in "abc"}, 2)
    assert calls == list("abcabc")
    assert samples == {"a": {"n": [1, 4]}, "b": {"n": [2, 5]}, "c": {"n": [3, 6]}}


SAMPLES = {"kit": {"n": [6.0, 8.0, 1.0]}, "plain": {"n": [3.0, 2.0, 1.0]}}


@pytest.mark.parametrize(
    ("line", "met", "shown"),
    [
        (Line("n", "kit", "plain", (">=", 2)), True, {"ratio": [2, 1, 4]}),  # of each round, not of the medians
        (Line("n", "kit", "plain", (">=", 2), always=True), False, {"ratio": [2, 1, 4]}),
        (Line("n", "kit", "plain", ("<=", 3), "difference"), True, {"difference": [3, 0, 6]}),
        (Line("n", "kit", "plain", ("<=", 3), "value"), False, {"value": [6, 1, 8], "other": [2, 1, 3]}),
        (Line("n", "kit", goal=("<=", 7)), True, {"value": [6, 1, 8]}),
        (Line("n", "kit", goal=("<=", 7), always=True), False, {"value": [6, 1, 8]}),
        (Line("n", "kit", "absent", ("<=", 7)), None, {"other": None}),
        (Line("other", "kit", goal=("<=", 7)), None, {"value": None}),
    ],
)
def test_goals_are_judged(line: Line, met: bool | None, shown: dict) -> None:
    judged = judge(line, SAMPLES)
    assert judged.get("met") is met
    assert judged.items() >= shown.items()


def test_what_is_missing_is_skipped_with_its_reason() -> None:
    line = Line("n", "kit", "plain", (">=", 3))
    done = Result("fast", "how fast", "3 runs", 1.0, SAMPLES, [judge(line, SAMPLES)])
    skipped = Result("browser", "in a browser", skipped="no browser is installed")
    text = report({"Python": "3.x"}, [done, skipped])
    assert "0 of 1 goals met" in text
    assert (
        "| [fast](#fast-how-fast) | n | kit | 6 (1 to 8) | plain | 2 (1 to 3) | 2 (1 to 4) | ≥ 3 | **missed** |" in text
    )
    assert "## browser: in a browser\n\nSkipped: no browser is installed." in text
    assert "Measured with Python 3.x." in text


def test_a_row_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    row = harness.ROWS["nbval"]
    result = measure(Row(row.name, row.title, row.measure, row.lines, 0.5), quick=True)
    assert result.failed == "not done within 0.5 seconds"


def test_rows_are_named() -> None:
    with pytest.raises(SystemExit):
        benchmarks.main(["no-such-row"])


def test_the_kept_results_are_what_one_whole_run_found() -> None:
    data = json.loads((benchmarks.HERE / "results.json").read_text("utf-8"))
    results = [Result(**row) for row in data["rows"]]
    assert [result.name for result in results] == list(harness.ROWS)
    for result in results:
        assert not (result.failed or result.skipped)
        assert result.lines == [judge(line, result.samples) for line in harness.ROWS[result.name].lines]
    assert (benchmarks.HERE / "RESULTS.md").read_text("utf-8") == report(data["about"], results)


def found(*rows: str) -> dict:
    """Results as the benchmarks write them, where each side of these rows was measured in three runs."""
    kept = [(row, name, sides) for row, name, _, sides in plot.PANELS if row in rows]
    return {
        "rows": [
            {"name": row, "samples": {side: {name: [n + 1.0, n + 3.0, n + 2.0]} for n, side in enumerate(sides)}}
            for row, name, sides in kept
        ]
    }


def test_what_the_benchmarks_measured() -> None:
    figure = plot.measured(found(*(row for row, *_ in plot.PANELS)))
    assert [axes.get_title(loc="left") for axes in figure.axes] == [title for _, _, title, _ in plot.PANELS]
    first = figure.axes[0]
    assert [bar.get_width() for bar in first.patches] == [2, 3, 4]  # medians
    assert [label.get_text() for label in first.get_yticklabels()] == ["tutorial", "redis-py", "kit"]
    assert [text.get_text() for text in first.texts] == ["2.00", "3.00", "4.00"]
    assert plt.get_fignums() == []


def test_rows_that_were_skipped_are_left_out() -> None:
    results = found("produce", "memory")
    results["rows"].append({"name": "jupyter", "samples": {}})
    figure = plot.measured(results)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [plot.PANELS[0][2], plot.PANELS[4][2]]
    with pytest.raises(ValueError, match="python -m benchmarks"):
        plot.measured(found())
