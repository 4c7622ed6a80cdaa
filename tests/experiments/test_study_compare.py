"""``experiment=compare`` on a handful of samples: equal FLOPs, reasons, figure, MLflow, a rerun that is none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from support.small_studies import StudyRunner, check_that_a_rerun_measures_nothing, study_config

from dop_search.app.results import ResultFile
from dop_search.app.workbench import Workbench
from dop_search.baselines import plain_answers
from dop_search.evaluation.accuracy import correct_answers
from dop_search.models.loading import load
from dop_search.strategy import Strategy
from dop_search.utils.errors import ConfigError
from dop_search.utils.progress import Progress
from experiments.compare import page
from experiments.compare.study import Compare, relative_family_mean, summarize

METHODS = ("dop_split@divprune", "gsop@uniform_grid", "divprune", "fastv", "trim")
GIVEN = ("budget=[0.3,0.12]", f"study.options.methods=[{','.join(METHODS)}]", "study.options.num_timing_rounds=1")


@pytest.mark.drawn
def test_rows_reasons_figure_tracking_and_a_rerun_that_measures_nothing(
    run_small_study: StudyRunner, tmp_path: Path
) -> None:
    store = f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}"
    result = run_small_study("compare", *GIVEN, "tracking=mlflow", store, "tracking.experiment=compared")
    rows = {(row["method"], row["budget"]): row for row in result["rows"]}
    assert {name for name, _ in rows} == set(METHODS)
    for name in METHODS[:3]:
        for budget in (0.3, 0.12):
            row = rows[name, budget]
            assert row["flops_ratio"] == pytest.approx(budget, rel=0.01)
            assert row["kl_ci95"][0] <= row["kl_heldout"] <= row["kl_ci95"][1]
            assert 0.0 < row["prefill_ms_ratio"] < 2.0
            assert row["selection_ms"] > 0.0
            assert row["counted_over_closed_form"] == 1.0
    assert "cannot go below" in rows["fastv", 0.12]["infeasible"]
    assert "text encoder" in rows["trim", 0.3]["infeasible"]
    for name in METHODS[:3]:
        saved = Strategy.load(tmp_path / "out" / "strategies" / f"{name}-0.3.json")
        assert saved.provenance["flops_ratio"] == rows[name, 0.3]["flops_ratio"]
        assert saved.provenance["hyperparameters"] == rows[name, 0.3]["hyperparameters"]
    assert set(result["summary"]["mean_rank"]) == {name for name, _ in rows}
    assert (tmp_path / "out" / "pareto.png").stat().st_size > 10_000
    table = Compare.table(result)
    assert table.row_count == len(METHODS)

    check_that_a_rerun_measures_nothing(
        run_small_study, tmp_path, "compare", *GIVEN, "tracking=mlflow", store, "tracking.experiment=compared"
    )
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("compared")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    assert len(runs) == 1 + len(rows)
    logged = next(run for run in runs if run.data.params.get("method") == "divprune" and "0.3" in run.info.run_name)
    assert logged.data.metrics["kl_heldout"] == pytest.approx(rows["divprune", 0.3]["kl_heldout"])


@pytest.mark.slow
def test_accuracy_of_what_changed_is_the_accuracy_of_all(tmp_path: Path) -> None:
    config = study_config("compare", tmp_path, "data.num_heldout=12")
    bench = Workbench(config, load("pocket"), Progress())
    strategy = Strategy.full(bench.num_layers, num_visual_tokens=12, selector="uniform_grid")
    outcome = bench.outcome(strategy)
    samples = bench.data("heldout").samples
    answers = plain_answers(bench.loaded, samples, strategy)
    full = plain_answers(bench.loaded, samples, Strategy.full(bench.num_layers))
    assert 1 < outcome.same_answer.sum() < 11
    assert outcome.same_answer.tolist() == [a == b for a, b in zip(answers, full, strict=True)]
    assert bench.correct_after(strategy, outcome).tolist() == correct_answers(answers, samples).tolist()


def test_unknown_methods_and_options_are_refused_with_what_there_is(run_small_study: StudyRunner) -> None:
    with pytest.raises(ConfigError, match="unknown method 'dop_splitt'; did you mean 'dop_split'"):
        run_small_study("compare", "study.options.methods=[dop_splitt]")
    with pytest.raises(ConfigError, match="'fastv' has no selector to choose"):
        run_small_study("compare", "study.options.methods=[fastv@divprune]")
    with pytest.raises(ConfigError, match=r"study\.options\.method: unknown key; did you mean 'methods'"):
        run_small_study("compare", "+study.options.method=[vtw]")
    with pytest.raises(ConfigError, match="unknown study 'comparee'; did you mean 'compare'"):
        run_small_study("compare", "study.name=comparee")


def test_ranks_share_ties_and_differences_are_paired(tmp_path: Path) -> None:
    results = ResultFile(tmp_path, "compare", {})
    noise = np.linspace(0.0, 5.0, 64)
    for budget in (0.5, 0.1):
        for name, level in (("dop_search", 0.0), ("a", 0.1), ("b", 0.1)):
            results.add({"method": name, "budget": budget}, {"kl_heldout": level}, noise + level)
        results.add({"method": "c", "budget": budget}, {"infeasible": "too low"})
    summary = summarize(results, (0.5, 0.1))
    assert summary["mean_rank"] == {"dop_search": 1.0, "a": 2.5, "b": 2.5, "c": 4.0}
    found = summary["differences"]["0.5"]["a"]
    assert found["ci95"] == pytest.approx((0.1, 0.1), abs=1e-4)
    assert (found["mean"], found["num_dominant"]) == (pytest.approx(0.1, abs=1e-4), 58)
    assert found["p"] == pytest.approx(4 * 2e-4), "the least of 9999 flips, of four tests in the table"
    assert "c" not in summary["differences"]["0.5"]


def test_the_page_says_what_the_rows_say(tmp_path: Path) -> None:
    """Its numbers are written between two marks, and the rest of the page stays; without ``dop_search`` the reference
    is uniform reduction by the best selector."""
    results, noise = ResultFile(tmp_path, "compare", {}), np.linspace(0.0, 5.0, 64)
    for name, level in (("dop_split", 0.0), ("uniform_search", 0.1), ("a", 0.1), ("b", 0.5)):
        values = {"kl_heldout": level, "relative_mean": 100 - 10 * level}
        results.add({"method": name, "budget": 0.5}, values, noise + level)
    results.add({"method": "c", "budget": 0.5}, {"infeasible": "too low"})
    summary = {"full": {"accuracy": 0.99}, **summarize(results, (0.5,))}
    assert summary["reference"] == "uniform_search"
    result = {"setup": {"samples": {"search": 9, "heldout": 64}}, "summary": summary, "rows": results.rows}
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "result.json").write_text(json.dumps(result))
    readme = tmp_path / "page" / "README.md"
    readme.write_text(f"before\n{page.BEGIN}old{page.END}after\n")
    page.write(tmp_path / "page")
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| **dop_split** | 1.0 | 0.000, 100 |" in text
    assert "| c | 5.0 | – |" in text
    said = " ".join(text.split())
    assert "5 methods on 64 held-out samples" in said
    assert "`uniform_search` (0.100): 1 of 3 are worse, better `dop_split`." in said
    assert "Within a point of the highest accuracy (100 %): `dop_split`, `uniform_search`, `a`." in said
    page.write(tmp_path / "page")
    assert readme.read_text() == text


def test_the_committed_page_is_made_from_the_committed_rows() -> None:
    committed = json.loads((page.FOLDER / "result.json").read_text())
    assert page.numbers(committed) in (page.FOLDER / "README.md").read_text(), "python -m experiments.compare.page"


def test_failures_have_no_rank_and_a_budget_of_few_methods_does_not_count(tmp_path: Path) -> None:
    results = ResultFile(tmp_path, "compare", {})
    for budget in (0.5, 0.1):
        results.add({"method": "a", "budget": budget}, {"kl_heldout": 0.1})
        results.add({"method": "b", "budget": budget}, {"kl_heldout": 0.2})
        results.add({"method": "c", "budget": budget}, {"failed": "OutOfMemoryError"})
    results.add({"method": "b", "budget": 0.3}, {"kl_heldout": 0.2})
    assert results.budgets == [0.5, 0.3, 0.1]
    assert summarize(results, results.budgets)["mean_rank"] == {"a": 1.0, "b": 2.0}


def test_relative_mean_weighs_families_alike() -> None:
    right = np.array([True, False, True, True, False])
    full = np.array([True, True, True, True, False])
    assert relative_family_mean(right, full, ["a", "a", "b", "b", "never"]) == pytest.approx(75.0)
    assert np.isnan(relative_family_mean(full[4:], full[4:], ["never"]))
