"""What MLflow holds of benchmark scores: stable names, tables, and the way back to the search."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from support.forked import forked
from support.records import example_record
from support.score_records import FULL, example_evaluation, example_scores, scored

from dop_search.app.config import TrackingConfig
from dop_search.app.record import RECORD_FILE, SCORES_FILE
from dop_search.app.tracking.store import log_evaluation, log_search
from dop_search.app.tracking.values import score_columns, score_metrics, strategy_key
from dop_search.strategy import Strategy


def log(config: TrackingConfig, run_dir: Path) -> None:
    """A search with scores and four evaluations; what is said meanwhile goes to a file."""
    with (run_dir.parent / "said").open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        sys.stdout = sys.stderr = said
        record = scored(example_record())
        assert record.provenance is not None
        record = record.model_copy(
            update={"provenance": record.provenance.model_copy(update={"search_id": "0123456789ab"})}
        )
        record.save(run_dir / RECORD_FILE)
        parent = log_search(config, record, run_dir)
        (run_dir / "samples" / "cheap").mkdir(parents=True)
        (run_dir / "samples" / "cheap" / "gqa.parquet").write_bytes(b"PAR1")
        made = replace(record.results[2].strategy, provenance={"search_id": "0123456789ab"})
        plain = Strategy.depthwise(12, 9, 9, 4)
        evaluations = (
            {"cheap": (made, 0.15, 0.93), "good": (plain, 0.29, 0.97)},
            {"best_but_dear": (Strategy.depthwise(12, 11, 11, 9), 0.61, 0.999)},
            {"bad": (Strategy.depthwise(12, 2, 2, 2), 0.2, 0.71)},
        )
        runs = {}
        for strategies in evaluations:
            evaluation = example_evaluation(strategies)
            evaluation.save(run_dir / SCORES_FILE)
            runs |= dict(zip(strategies, log_evaluation(config, evaluation, run_dir), strict=True))
        runs["full"] = log_evaluation(config, example_evaluation({}), run_dir)[0]
        (run_dir / "runs.json").write_text(json.dumps({"parent": parent, **runs}))


@dataclass(frozen=True)
class Logged:
    client: Any
    runs: dict[str, str]
    experiment: str


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Logged:
    folder = tmp_path_factory.mktemp("scores")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    process = forked(log, TrackingConfig(uri=uri), folder / "run")
    process.join()
    assert (process.exitcode, (folder / "said").read_text()) == (0, "")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    runs = json.loads((folder / "run" / "runs.json").read_text())
    return Logged(client, runs, client.get_experiment_by_name("dop-search").experiment_id)


def test_the_best_relative_mean_under_a_flops_ratio_is_one_query(logged: Logged) -> None:
    found = logged.client.search_runs(
        [logged.experiment],
        "metrics.flops_ratio <= 0.3 and tags.kind = 'evaluation'",
        order_by=["metrics.`relative/mean` DESC"],
    )
    assert [run.info.run_id for run in found] == [logged.runs[name] for name in ("good", "cheap", "bad")]
    assert found[0].data.metrics["relative/mean"] == pytest.approx(97.0)
    any_kind = logged.client.search_runs(
        [logged.experiment], "metrics.flops_ratio <= 0.3", order_by=["metrics.`relative/mean` DESC"], max_results=1
    )
    assert any_kind[0].info.run_id == logged.runs["good"]  # above the searched results at 0.298 and 0.148


def test_scores_have_the_same_names_in_searches_and_evaluations(logged: Logged) -> None:
    names = {f"{kind}/{name}" for kind in ("score", "relative", "score_full") for name in FULL} | {"relative/mean"}
    nested = logged.client.search_runs([logged.experiment], f"tags.`mlflow.parentRunId` = '{logged.runs['parent']}'")
    for run in [*nested, logged.client.get_run(logged.runs["good"])]:
        assert names <= set(run.data.metrics)
    good = logged.client.get_run(logged.runs["good"]).data
    assert good.metrics["score/mme"] == pytest.approx(0.97 * 1800)
    assert (good.params["D_A"], good.params["suite"], good.params["limit"]) == ("9", "pocket13", "100")
    full = logged.client.get_run(logged.runs["full"]).data
    assert full.metrics == {f"score_full/{name}": score for name, (score, _) in FULL.items()}


def test_an_evaluation_leads_back_to_the_search_that_made_the_strategy(logged: Logged) -> None:
    tags = logged.client.get_run(logged.runs["cheap"]).data.tags
    assert tags["search_id"] == "0123456789ab"
    made = logged.client.get_run(tags["search_run_id"]).data
    assert made.tags["mlflow.parentRunId"] == logged.runs["parent"]
    assert made.params["budget"] == "0.15"
    assert tags["strategy_key"] == strategy_key(example_record().results[2].strategy)
    other = logged.client.get_run(logged.runs["good"]).data.tags
    assert not {"search_id", "search_run_id"} & set(other)


def test_tables_and_answers_are_artifacts(logged: Logged) -> None:
    cheap = logged.runs["cheap"]
    names = {item.path for item in logged.client.list_artifacts(cheap)}
    assert {"scores.json", "strategy.json", "score_table.json", "samples"} <= names
    assert [item.path for item in logged.client.list_artifacts(cheap, "samples/cheap")] == ["samples/cheap/gqa.parquet"]
    path = logged.client.download_artifacts(cheap, "score_table.json")
    table = json.loads(Path(path).read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["benchmark"] for row in rows] == list(FULL)
    assert rows[0]["pruned"] == pytest.approx(0.93 * 62.0)
    assert rows[0]["difference_ci_high"] == pytest.approx(0.93 * 62.0 - 62.0 + 0.62)


def test_metrics_hold_only_what_was_measured(tmp_path: Path) -> None:
    scores = example_scores(0.9)
    assert not [name for name in score_metrics(scores, None) if "uniform" in name or name == "relative/mean"]
    assert set(score_metrics(example_scores(0.9, 0.8), None)) > set(score_metrics(scores, None))
    columns = score_columns(scores)
    assert columns["uniform"] == [None] * 3
    assert {len(values) for values in columns.values()} == {3}
    assert log_evaluation(TrackingConfig(backend="none"), example_evaluation({}), tmp_path) == []
