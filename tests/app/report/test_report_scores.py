"""Benchmark scores in the terminal and on the page."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from support.records import example_record
from support.score_records import FULL, example_evaluation, example_scores, scored

from dop_search.app.cli.finished import report as main
from dop_search.app.record import RECORD_FILE, RelativeMean
from dop_search.app.report.page import page
from dop_search.app.report.scores import against_uniform, eval_summary, relative_scores, score_rows, score_summary
from dop_search.app.report.write import figures
from dop_search.strategy import Strategy


def printed(what: object, width: int = 80) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width).print(what)
    return stream.getvalue().splitlines()


def test_the_table_says_it_all_within_80_columns() -> None:
    lines = printed(score_summary(scored(example_record())))
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if line.startswith("budget")] == [
        "budget 0.5: 49.8 % of the FLOPs",
        "budget 0.3: 29.8 % of the FLOPs",
        "budget 0.15: 14.8 % of the FLOPs",
    ]
    kept = 1.0 - 0.05 * (1.0 - 0.148)
    mme = next(line for line in reversed(lines) if line.startswith("mme")).split()
    change = kept * 1800 - 1800
    expected = ["1800.0", f"{1800 * kept:.1f}", f"{change - 18:+.1f}…{change + 18:+.1f}", f"{1800 * (kept - 0.04):.1f}"]
    assert mme == ["mme", "(points)", *expected, f"{100 * kept:.1f}", f"{100 * (kept - 0.04):.1f}"]
    mean = next(line for line in reversed(lines) if line.startswith("mean ")).split()
    assert mean == ["mean", f"{100 * kept:.1f}", f"{100 * (kept - 0.04):.1f}"]
    assert score_summary(example_record()) is None


def test_the_verdict_follows_the_paired_intervals() -> None:
    assert against_uniform(example_scores(0.9, 0.8)) == ["Against uniform (paired): better on gqa, pope, mme."]
    assert against_uniform(example_scores(0.8, 0.9)) == ["Against uniform (paired): worse on gqa, pope, mme."]
    assert against_uniform(example_scores(0.9, 0.9)) == ["Against uniform (paired): no difference shown on 3."]
    assert against_uniform(example_scores(0.9)) == []


def test_an_evaluation_without_uniform_and_without_strategies() -> None:
    one = printed(eval_summary(example_evaluation({"a": (Strategy.depthwise(12, 3, 8, 2, 72), 0.15, 0.9)})))
    assert one[0] == "a: q≤3 kv≤8 mlp≤2 n_v=72, 15.0 % of the FLOPs"
    assert not any("uniform" in line for line in one)
    none = printed(eval_summary(example_evaluation({})))
    assert next(line for line in none if line.startswith("mme")).split() == ["mme", "(points)", "1800.0", "100"]


def test_what_cannot_be_said_is_a_dash() -> None:
    zero = {"a": example_scores(0.9)["gqa"].model_copy(update={"full": 0.0, "ci95": None})}
    assert score_rows(zero, RelativeMean(pruned=None))[0][1:] == ("0.0", "55.8", "–", "–", "–", "–")
    assert score_rows(zero, RelativeMean(pruned=None))[1][-2:] == ("–", "–")


def test_the_figure_shows_the_record(recwarn: pytest.WarningsRecorder) -> None:
    record = scored(example_record())
    figure = relative_scores(record)
    figure.canvas.draw()
    assert len(figure.axes) == 3
    for axis, result in zip(figure.axes, record.results, strict=True):
        found, uniform = axis.lines[1], axis.lines[2]
        expected = [item.relative_pruned for item in result.scores.values()]
        assert np.allclose(found.get_ydata(), [*expected, result.relative_mean.pruned])
        assert np.allclose(uniform.get_ydata()[-1], result.relative_mean.uniform)
    assert [text.get_text() for text in figure.axes[-1].get_xticklabels()] == [*FULL, "mean"]
    assert not [w for w in recwarn if issubclass(w.category, (UserWarning, RuntimeWarning))]


@pytest.mark.slow
def test_the_page_and_the_command_show_scores_where_there_are_any(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = scored(example_record())
    html = page(record, {})
    for text in ("<h2>Benchmarks</h2>", "pocket13, at most 100 samples each", "1723.3", "better on gqa"):
        assert text in html
    assert "Benchmarks" not in page(example_record(), {})
    assert set(figures(record, None)) - set(figures(example_record(), None)) == {"relative_scores"}
    record.save(tmp_path / RECORD_FILE)
    assert main([str(tmp_path)]) == 0
    assert "mme (points)" in capsys.readouterr().out
    assert (tmp_path / "plots" / "relative_scores.png").exists()
