"""MLflow: one run per search, a nested run per budget; one run per strategy of an evaluation.

Imports mlflow only when it logs.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dop_search.app.config import TrackingConfig
from dop_search.app.record import (
    CURVES_FILE,
    FULL_FOLDER,
    RECORD_FILE,
    SAMPLES_FILE,
    SAMPLES_FOLDER,
    SCORES_FILE,
    EvalRecord,
    Record,
    Result,
    StrategyScores,
)
from dop_search.app.report.write import PAGE_FILE, PLOTS_FOLDER, load_curves
from dop_search.app.tracking.artifacts import STRATEGY_FILE, register
from dop_search.app.tracking.connection import connected
from dop_search.app.tracking.system import read_system_metrics
from dop_search.app.tracking.values import (
    curve_points,
    ended_ms,
    provenance_tags,
    result_metrics,
    result_params,
    run_name,
    score_columns,
    score_metrics,
    search_tags,
    shared_metrics,
    shared_params,
    started_ms,
    strategy_key,
    strategy_name,
    strategy_params,
    study_row_values,
)
from dop_search.strategy import Strategy

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

SCORE_TABLE = "score_table.json"
"""Artifact with a row per benchmark, shown by MLflow as a table."""

_MAX_METRICS = 1000
"""What MLflow takes in one batch."""


def log_search(config: TrackingConfig, record: Record, run_dir: Path) -> str | None:
    """Log a finished search with the files of its run directory.

    The parent run holds what all budgets share, the divergence curves as stepped metrics, and the artifacts; each
    nested run has the same names whatever the space or solver, so that runs can be compared in the UI.

    Returns:
        The id of the parent run, or ``None`` without tracking.

    Raises:
        ConfigError: if mlflow is missing or refuses the store.
    """
    if config.backend == "none":
        return None
    with connected(config, run_dir) as (client, experiment):
        return _log_search(client, experiment, config, record, run_dir)


def log_benchmark(config: TrackingConfig, data: Mapping[str, Any], name: str = "dop-bench") -> str | None:
    """Log a comparison of ``dop-bench`` (its JSON): one run, metrics by variant; returns the run's id.

    Raises:
        ConfigError: if mlflow is missing or refuses the store.
    """
    if config.backend == "none":
        return None
    params = {key: str(data[key]) for key in ("what", "text_tokens", "visual_tokens", "generated_tokens")}
    params |= {key: str(value) for key, value in data["environment"].items()}
    metrics = {}
    for row in data["rows"]:
        target = "" if row["target_ratio"] is None else f"{row['target_ratio']:g}_"
        prefix = (target + row["name"]).replace(" ", "_")
        metrics[f"{prefix}/flops_ratio"] = float(row["flops_ratio"])
        for part in ("median", "ratio"):
            for metric, value in row[part].items():
                if value is not None:
                    metrics[f"{prefix}/{metric}_{part}"] = float(value["median"])
    with connected(config) as (client, experiment):
        run = client.create_run(experiment, run_name=config.run_name or name)
        identifier = str(run.info.run_id)
        _log(client, identifier, params, metrics)
        client.log_dict(identifier, dict(data), "benchmark.json")
        client.set_terminated(identifier)
    return identifier


def log_study(config: TrackingConfig, result: Mapping[str, Any], folder: Path) -> str | None:
    """Log a study: a run with its files, and a nested run per row with the same names of metrics for all rows.

    A result that the store has already is not logged again.

    Args:
        config: where to.
        result: the content of the study's ``result.json``.
        folder: where that and the figures are.

    Returns:
        The id of the parent run, or ``None`` if nothing was logged.

    Raises:
        ConfigError: if mlflow is missing or refuses the store.
    """
    if config.backend == "none":
        return None
    said = json.dumps([result["rows"], result["summary"]], sort_keys=True)
    digest = hashlib.sha256(said.encode()).hexdigest()[:16]
    shared = {"study": result["study"], "model": str(result["setup"]["model"])}
    tags = {"kind": "study", **shared}
    with connected(config, folder) as (client, experiment):
        if client.search_runs([experiment], f"tags.digest = '{digest}'", max_results=1):
            return None
        name = config.run_name or f"{shared['model']} {shared['study']}"
        parent = str(client.create_run(experiment, tags=tags, run_name=name).info.run_id)
        _log(client, parent, shared, {"num_rows": float(len(result["rows"]))})
        for file in sorted(folder.glob("*")):
            if file.suffix in (".json", ".png"):
                client.log_artifact(parent, str(file))
        for row in result["rows"]:
            params, metrics = study_row_values(row)
            its = {**shared, "kind": "study_row", "mlflow.parentRunId": parent}
            title = " ".join(str(value) for value in params.values())[:200]
            run = str(client.create_run(experiment, tags=its, run_name=title).info.run_id)
            _log(client, run, {**shared, **params}, metrics)
            client.set_terminated(run)
        client.set_tag(parent, "digest", digest)  # at the end: what was interrupted is logged anew
        client.set_terminated(parent)
    return parent


def _log_search(client: MlflowClient, experiment: str, config: TrackingConfig, record: Record, run_dir: Path) -> str:
    name = config.run_name or run_name(record)
    run = client.create_run(
        experiment, start_time=started_ms(record.provenance), tags=search_tags(record), run_name=name
    )
    identifier = str(run.info.run_id)
    _log(client, identifier, shared_params(record), shared_metrics(record))
    curves = load_curves(run_dir)
    if curves is not None:
        _log_points(client, identifier, curve_points(curves))
    _log_data(client, identifier, record)
    _log_system(client, identifier, run_dir)
    for file in (RECORD_FILE, CURVES_FILE, SAMPLES_FILE, PAGE_FILE, PLOTS_FOLDER):
        path = run_dir / file
        if path.is_dir():
            client.log_artifacts(identifier, str(path), file)
        elif path.exists():
            client.log_artifact(identifier, str(path))
    for result in record.results:
        _log_result(client, experiment, identifier, record, result)
    client.set_terminated(identifier, end_time=ended_ms(record))
    return identifier


def _log_result(client: MlflowClient, experiment: str, parent: str, record: Record, result: Result) -> None:
    tags = {**search_tags(record), "mlflow.parentRunId": parent, "strategy_key": strategy_key(result.strategy)}
    started = started_ms(record.provenance)
    run = client.create_run(experiment, start_time=started, tags=tags, run_name=run_name(record, result))
    identifier = str(run.info.run_id)
    _log(client, identifier, {**shared_params(record), **result_params(result)}, result_metrics(result))
    _log_data(client, identifier, record)
    client.log_dict(identifier, result.strategy.to_json(), STRATEGY_FILE)
    register(
        client,
        identifier,
        str(run.info.artifact_uri),
        strategy_name(record, result),
        result.strategy.describe(),
        {"space": record.space.name, "kl_heldout": f"{result.kl_heldout:.4g}", "flops": f"{result.flops_ratio:.4g}"},
    )
    if result.scores:
        client.log_table(identifier, score_columns(result.scores), SCORE_TABLE)
    client.set_terminated(identifier, end_time=ended_ms(record))


def log_evaluation(config: TrackingConfig, record: EvalRecord, run_dir: Path) -> list[str]:
    """Log an evaluation: a run per strategy, tagged with the search run that made it where the store has that.

    Without strategies there is one run with the full model's scores.

    Returns:
        The ids of the runs, none without tracking.

    Raises:
        ConfigError: if mlflow is missing or refuses the store.
    """
    if config.backend == "none":
        return []
    with connected(config, run_dir) as (client, experiment):
        return _log_evaluation(client, experiment, config, record, run_dir)


def _log_evaluation(
    client: MlflowClient, experiment: str, config: TrackingConfig, record: EvalRecord, run_dir: Path
) -> list[str]:
    shared = {"model": record.model.name, "suite": record.suite.suite, "limit": str(record.suite.limit)}
    tags = {"kind": "evaluation", "model_fingerprint": record.model.fingerprint, **provenance_tags(record.provenance)}
    full = {f"score_full/{name}": value for name, value in record.full.items()}
    runs: list[tuple[str, dict[str, str], dict[str, str], dict[str, float], StrategyScores | None]] = []
    for item in record.strategies:
        metrics = {**full, **score_metrics(item.scores, item.relative_mean)}
        if item.flops_ratio is not None:
            metrics["flops_ratio"] = item.flops_ratio
        params = {**shared, **_method_params(item), "file": item.file}
        link = {} if item.strategy is None else _search_tags(client, experiment, item.strategy)
        runs.append((item.name, {**tags, **link}, params, metrics, item))
    if not runs:
        runs.append(("full", tags, {**shared, "strategy": "full"}, full, None))
    identifiers = []
    for name, its_tags, params, metrics, strategy_scores in runs:
        title = config.run_name or f"{record.model.name} {record.suite.suite} {name}"
        run = client.create_run(experiment, start_time=started_ms(record.provenance), tags=its_tags, run_name=title)
        identifier = str(run.info.run_id)
        _log(client, identifier, params, metrics)
        client.log_artifact(identifier, str(run_dir / SCORES_FILE))
        if strategy_scores is not None:
            if strategy_scores.strategy is not None:
                client.log_dict(identifier, strategy_scores.strategy.to_json(), STRATEGY_FILE)
            client.log_table(identifier, score_columns(strategy_scores.scores), SCORE_TABLE)
        for folder in (FULL_FOLDER, name) if strategy_scores is not None else (FULL_FOLDER,):
            if (run_dir / SAMPLES_FOLDER / folder).is_dir():
                client.log_artifacts(identifier, str(run_dir / SAMPLES_FOLDER / folder), f"{SAMPLES_FOLDER}/{folder}")
        client.set_terminated(identifier)
        identifiers.append(identifier)
    return identifiers


def _method_params(item: StrategyScores) -> dict[str, str]:
    params = {"strategy": item.description} if item.strategy is None else strategy_params(item.strategy)
    if item.method is not None:
        params |= {"method": str(item.method["method"]), "target_ratio": str(item.method["target_ratio"])}
    return params


def _search_tags(client: MlflowClient, experiment: str, strategy: Strategy) -> dict[str, str]:
    """Which search made a strategy: its id, and its run where this experiment has it."""
    tags = {"strategy_key": strategy_key(strategy)}
    search = strategy.provenance.get("search_id")
    if not isinstance(search, str) or not search.isalnum():
        return tags
    tags["search_id"] = search
    made = f"tags.search_id = '{search}' and tags.strategy_key = '{tags['strategy_key']}' and tags.kind = 'search'"
    found = client.search_runs([experiment], made, max_results=1)
    if found:
        tags["search_run_id"] = str(found[0].info.run_id)
    return tags


def _log_data(client: MlflowClient, run: str, record: Record) -> None:
    """The three sets of samples, as MLflow's column *Dataset* shows them."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data, inputs = record.data, []
    source = json.dumps({"name": data.name, "seed": data.seed, "sources": data.sources})
    sizes = {"search": data.num_samples, "heldout": data.num_heldout, "test": data.num_test}
    for split, digest in data.fingerprints.items():
        profile = json.dumps({"num_samples": sizes.get(split)})
        dataset = Dataset(f"{data.name} {split}", digest[:36], "dop-search", source, profile=profile)
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", split)]))
    if inputs:
        client.log_inputs(run, inputs)


def _log_system(client: MlflowClient, run: str, run_dir: Path) -> None:
    from mlflow.entities import Metric

    for step, moment in enumerate(read_system_metrics(run_dir)):
        at = int(moment.pop("time_ms"))
        client.log_batch(run, metrics=[Metric(f"system/{name}", value, at, step) for name, value in moment.items()])


def _log(client: MlflowClient, run: str, params: Mapping[str, str], metrics: Mapping[str, float]) -> None:
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    client.log_batch(
        run,
        metrics=[Metric(name, value, now, 0) for name, value in metrics.items()],
        params=[Param(name, value) for name, value in params.items()],
    )


def _log_points(client: MlflowClient, run: str, points: Mapping[str, Mapping[int, float]]) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [Metric(name, value, now, step) for name, curve in points.items() for step, value in curve.items()]
    for first in range(0, len(metrics), _MAX_METRICS):
        client.log_batch(run, metrics=metrics[first : first + _MAX_METRICS])
