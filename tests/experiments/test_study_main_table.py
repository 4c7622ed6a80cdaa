"""``experiment=main_table`` and ``experiment=final`` on a handful of rows."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path

import numpy as np
import pytest
from support.forked import forked
from support.small_studies import StudyRunner, check_that_a_rerun_measures_nothing, study_config

from dop_search.app.config import DataConfig
from dop_search.app.config.schema import FINAL_SEED
from dop_search.app.results import ResultFile, Row, read_result
from dop_search.app.study import open_study
from dop_search.app.study_run import run_study
from dop_search.evaluation.scores import relative_mean
from dop_search.evaluation.suite_scores import score_suite
from dop_search.evaluation.suites import load_suite
from dop_search.strategy import Strategy
from dop_search.utils.errors import ConfigError
from dop_search.utils.progress import Progress
from experiments.main_table.study import summarize
from experiments.main_table.tables import published, tables

GIVEN = (
    "study.options.methods=[uniform,fastv]",
    "study.options.reference=uniform",
    "study.options.num_timing_rounds=1",
    "eval.benchmarks=[gqa,mme]",
    "eval.limit=4",
    "budget=[0.3,0.12]",
)


def killed_rows(folder: Path) -> list[Row]:
    """What a process of its own had written when it was killed with ``kill -9`` after its first row."""
    path = folder / "out" / "result.json"
    child = forked(run_study, study_config("main_table", folder, *GIVEN), Progress())
    while child.is_alive() and not (path.exists() and read_result(path)["rows"]):
        time.sleep(0.02)
    child.kill()
    child.join()
    assert child.exitcode != 0, "it was not done"
    rows: list[Row] = read_result(path)["rows"]
    return rows


def test_a_killed_table_goes_on_and_cells_are_the_scores_of_the_saved_strategies(
    run_small_study: StudyRunner, tmp_path: Path, pocket
) -> None:
    before = killed_rows(tmp_path)
    result = run_small_study("main_table", *GIVEN)
    assert [row for row in result["rows"] if row in before] == before, "none lost, none measured again"
    assert 0 < len(before) < len(result["rows"]) == 10, "none twice"
    rows = {(row["method"], row["budget"], row["benchmark"]): row for row in result["rows"]}
    assert len(rows) == 2 + 2 * 2 * 2
    assert rows["full", 1.0, "gqa"]["relative"] == 100.0
    assert "cannot go below" in rows["fastv", 0.12, "gqa"]["infeasible"]
    strategy = Strategy.load(tmp_path / "out" / "strategies" / "pocket-uniform-0.3.json")
    suite = load_suite("pocket13")
    ours, full = (
        score_suite(pocket, suite, item, work_dir=tmp_path / "cache" / "evaluation", limit=4)
        for item in (strategy, None)
    )
    for name in ("gqa", "mme"):
        assert rows["uniform", 0.3, name]["score"] == ours.scores[name].score
        assert rows["uniform", 0.3, name]["flops_ratio"] == pytest.approx(0.3, rel=0.01)
    table = list(csv.DictReader(io.StringIO((tmp_path / "out" / "table.csv").read_text())))
    assert [(line["method"], line["budget"]) for line in table] == [
        ("full", "1"),
        *(("uniform", "0.3"), ("uniform", "0.12"), ("fastv", "0.3"), ("fastv", "0.12")),
    ]
    assert table[1]["gqa"] == f"{ours.scores['gqa'].score:.1f}"
    assert table[4]["gqa"] == "–"
    for name in ("table.md", "table.tex", "published.md"):
        assert (tmp_path / "out" / name).read_text()
    means = [item["relative_mean"] for item in result["summary"]["methods"] if item["method"] == "uniform"]
    part = {name: ours.scores[name].score / full.scores[name].score for name in ("gqa", "mme")}
    assert means[0] == pytest.approx(100 * np.mean(list(part.values())))
    assert relative_mean(full, full) == 100.0
    check_that_a_rerun_measures_nothing(run_small_study, tmp_path, "main_table", *GIVEN)


def test_the_mean_its_interval_and_its_test_by_hand(tmp_path: Path) -> None:
    """Two benchmarks of 100 questions each; the other method answers 20 fewer of each."""
    results = ResultFile(tmp_path, "main_table", {})
    for method, right in (("full", 100), ("ours", 90), ("theirs", 70)):
        for benchmark in ("a", "b"):
            key = {"model": "m", "method": method, "budget": 1.0 if method == "full" else 0.3, "benchmark": benchmark}
            values = {
                "score": float(right),
                "relative": float(right),
                "flops_ratio": 0.3,
                "difference_ci95": (-4.0, 0.0),
            }
            results.add(key, values, (np.arange(100) < right).astype(float))
    results.add({"model": "m", "method": "dear", "budget": 0.3, "benchmark": "a"}, {"infeasible": "too dear"})
    found = {item["method"]: item for item in summarize(results, "ours")["methods"]}
    assert found["theirs"]["relative_mean"] == 70.0
    assert found["theirs"]["ci95"] == pytest.approx((70 - 2 / np.sqrt(2), 70 + 2 / np.sqrt(2)))
    assert found["theirs"]["p"] < 0.001
    assert (found["full"]["p"], found["ours"]["p"], found["dear"]["reason"]) == (None, None, "too dear")
    results.summarize(summarize(results, "ours"))
    assert "| m | theirs | 0.3 | 30.0 | 70.0 | 70.0 | 70.0 | 68.6 to 71.4 |" in tables(results.data)["table.md"]


def test_published_numbers_stand_with_their_source() -> None:
    text = published()
    assert "| divprune | 128 | 21.8 | 59.4 | 68.6 | 55.9 | 87.0 | 1405.1 |" in text
    assert "2606.27161" in text
    for tokens, ratio in ((128, 0.218), (64, 0.109)):  # the convention that the file names, LLaVA-1.5-7B
        d, m = 4096, 11008
        macs = [4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in (tokens, 576)]
        assert macs[0] / macs[1] == pytest.approx(ratio, abs=6e-4)


def test_the_final_set_is_measured_by_its_own_study_alone(run_small_study: StudyRunner, tmp_path: Path) -> None:
    given = ("study.options.methods=[uniform,divprune]", "study.options.num_final=6")
    result = run_small_study("final", *given)
    assert [(row["release"], row["method"]) for row in result["rows"]] == [("0.1.0", "uniform"), ("0.1.0", "divprune")]
    assert [item["method"] for item in result["summary"]["differences"]] == ["divprune"]
    check_that_a_rerun_measures_nothing(run_small_study, tmp_path, "final", *given)
    with pytest.raises(ValueError, match="the seed of the final set"):
        DataConfig(seed=FINAL_SEED)
    config = study_config("final", tmp_path, "data=mixed")
    with pytest.raises(ConfigError, match="the final set is rendered"):
        open_study(config).check(config)
