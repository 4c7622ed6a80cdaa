"""MLflow: one run per search, a nested run per budget; one run per strategy of an evaluation.

Imports mlflow only when it logs.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
    ScoreComparison,
    StrategyScores,
)
from dop_search.app.report.write import PAGE_FILE, PLOTS_FOLDER, load_curves
from dop_search.app.tracking import values
from dop_search.app.tracking.artifacts import STRATEGY_FILE, register
from dop_search.app.tracking.connection import connected
from dop_search.app.tracking.system import read_system_metrics
from dop_search.strategy import Strategy

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput
    from mlflow.tracking import MlflowClient

SCORE_TABLE = "score_table.json"
"""Artifact with a row per benchmark, shown by MLflow as a table."""

_MAX_METRICS = 1000
"""What MLflow takes in one batch."""


def log_search(config: TrackingConfig, record: Record, run_dir: Path) -> str | None:
    """Log a finished search with the files of its run directory; the id of the parent run, ``None`` without tracking.

    That holds what all budgets share, the divergence curves as stepped metrics, and the artifacts; each nested run has
    the same names whatever the space or solver, so that runs can be compared in the UI.
    """
    if config.backend == "none":
        return None
    tags, shared = values.search_tags(record), values.shared_params(record)
    start = values.started_ms(record.provenance)
    times = (start, start + int(1000 * record.seconds))  # what is logged later has its own times
    with connected(config, run_dir) as (client, experiment):
        store = _Store(client, experiment, times)
        with store.run(
            config.run_name or values.run_name(record), tags, shared, values.shared_metrics(record)
        ) as parent:
            curves = load_curves(run_dir)
            store.log_metrics(parent, [] if curves is None else values.curve_points(curves))
            store.log_metrics(parent, read_system_metrics(run_dir))
            client.log_inputs(parent, data_sets(record))
            store.log_files(parent, run_dir, (RECORD_FILE, CURVES_FILE, SAMPLES_FILE, PAGE_FILE, PLOTS_FOLDER))
            for result in record.results:
                its = {**tags, "mlflow.parentRunId": parent, "strategy_key": values.strategy_key(result.strategy)}
                params = {**shared, **values.result_params(result)}
                with store.run(values.run_name(record, result), its, params, values.result_metrics(result)) as run:
                    client.log_inputs(run, data_sets(record))
                    store.log_strategy(run, result.strategy, result.scores)
                    register(client, run, record, result)
    return parent


def log_evaluation(config: TrackingConfig, record: EvalRecord, run_dir: Path) -> list[str]:
    """Log an evaluation: a run per strategy, tagged with the search run that made it where the store has that.

    Without strategies there is one run with the full model's scores. Returns the runs' ids, none without tracking.
    """
    if config.backend == "none":
        return []
    shared = {"model": record.model.name, "suite": record.suite.suite, "limit": str(record.suite.limit)}
    tags = {
        "kind": "evaluation",
        "model_fingerprint": record.model.fingerprint,
        **values.provenance_tags(record.provenance),
    }
    full = {f"score_full/{name}": value for name, value in record.full.items()}
    made, start = [], values.started_ms(record.provenance)
    with connected(config, run_dir) as (client, experiment):
        store = _Store(client, experiment, (start, start + int(1000 * record.seconds)))
        scored: list[StrategyScores | None] = [*record.strategies]
        for item in scored or [None]:
            name, link = FULL_FOLDER if item is None else item.name, {}
            params, metrics = {"strategy": FULL_FOLDER}, full
            if item is not None:
                params, metrics = values.evaluated_params(item), {**full, **values.evaluated_metrics(item)}
                link = {} if item.strategy is None else _search_tags(client, experiment, item.strategy)
            title = config.run_name or f"{record.model.name} {record.suite.suite} {name}"
            with store.run(title, {**tags, **link}, {**shared, **params}, metrics) as run:
                if item is not None:
                    store.log_strategy(run, item.strategy, item.scores)
                store.log_files(run, run_dir, (SCORES_FILE, *(f"{SAMPLES_FOLDER}/{n}" for n in {FULL_FOLDER, name})))
            made.append(run)
    return made


def log_study(config: TrackingConfig, result: Mapping[str, Any], folder: Path) -> str | None:
    """Log a study: a run with its files, and a nested run per row with the same names of metrics for all rows.

    ``result`` is the content of ``result.json`` in ``folder``; one that the store has already is not logged again.
    Returns the id of the parent run, or ``None`` if nothing was logged.
    """
    if config.backend == "none":
        return None
    said = json.dumps([result["rows"], result["summary"]], sort_keys=True)
    digest = hashlib.sha256(said.encode()).hexdigest()[:16]
    shared = {"study": result["study"], "model": str(result["setup"]["model"])}
    with connected(config, folder) as (client, experiment):
        if client.search_runs([experiment], f"tags.digest = '{digest}'", max_results=1):
            return None
        store, name = _Store(client, experiment), config.run_name or f"{shared['model']} {shared['study']}"
        with store.run(name, {"kind": "study", **shared}, shared, {"num_rows": len(result["rows"])}) as parent:
            store.log_files(
                parent, folder, [file.name for file in folder.iterdir() if file.suffix in (".json", ".png")]
            )
            tags = {**shared, "kind": "study_row", "mlflow.parentRunId": parent}
            for row in result["rows"]:
                params, metrics = values.study_row_values(row)
                with store.run(" ".join(params.values())[:200], tags, {**shared, **params}, metrics):
                    pass
            client.set_tag(parent, "digest", digest)  # at the end: what was interrupted is logged anew
    return parent


def log_benchmark(config: TrackingConfig, data: Mapping[str, Any]) -> str | None:
    """Log a comparison of ``dop-bench`` (its JSON): one run, metrics by variant; returns the run's id."""
    if config.backend == "none":
        return None
    params, metrics = values.benchmark_values(data)
    with (
        connected(config) as (client, experiment),
        _Store(client, experiment).run(config.run_name or "dop-bench", {}, params, metrics) as run,
    ):
        client.log_dict(run, dict(data), "benchmark.json")
    return run


@dataclass(frozen=True)
class _Store:
    """Where runs go: a client, an experiment, and when what is logged began and ended (ms since 1970; default: now)."""

    client: MlflowClient
    experiment: str
    times: tuple[int | None, int | None] = (None, None)

    @contextmanager
    def run(
        self, name: str, tags: Mapping[str, str], params: Mapping[str, str], metrics: Mapping[str, float]
    ) -> Iterator[str]:
        """The id of a new run, which is finished when the context ends without an error."""
        from mlflow.entities import Param

        made = self.client.create_run(self.experiment, start_time=self.times[0], tags=dict(tags), run_name=name)
        run = str(made.info.run_id)
        self.client.log_batch(run, params=[Param(name, value) for name, value in params.items()])
        self.log_metrics(run, [(name, value, 0, None) for name, value in metrics.items()])
        yield run
        self.client.set_terminated(run, end_time=self.times[1])

    def log_metrics(self, run: str, points: Iterable[values.Point]) -> None:
        """Numbers with their steps and times, default: now."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), at or now, step) for name, value, step, at in points]
        for first in range(0, len(metrics), _MAX_METRICS):
            self.client.log_batch(run, metrics=metrics[first : first + _MAX_METRICS])

    def log_files(self, run: str, folder: Path, names: Iterable[str]) -> None:
        """Those of the files and folders that are there, each under its name."""
        for name in sorted(names):
            if (folder / name).is_dir():
                self.client.log_artifacts(run, str(folder / name), name)
            elif (folder / name).exists():
                self.client.log_artifact(run, str(folder / name))

    def log_strategy(self, run: str, strategy: Strategy | None, scores: Mapping[str, ScoreComparison]) -> None:
        """A strategy, and a table of its scores where there are any."""
        if strategy is not None:
            self.client.log_dict(run, strategy.to_json(), STRATEGY_FILE)
        if scores:
            self.client.log_table(run, values.score_columns(scores), SCORE_TABLE)


def _search_tags(client: MlflowClient, experiment: str, strategy: Strategy) -> dict[str, str]:
    """Which search made a strategy: its id, and its run where this experiment has it."""
    tags = {"strategy_key": values.strategy_key(strategy)}
    search = strategy.provenance.get("search_id")
    if not isinstance(search, str) or not search.isalnum():
        return tags
    tags["search_id"] = search
    made = f"tags.search_id = '{search}' and tags.strategy_key = '{tags['strategy_key']}' and tags.kind = 'search'"
    found = client.search_runs([experiment], made, max_results=1)
    if found:
        tags["search_run_id"] = str(found[0].info.run_id)
    return tags


def data_sets(record: Record) -> list[DatasetInput]:
    """The sets of samples, as MLflow's column *Dataset* shows them."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = record.data
    source = json.dumps({"name": data.name, "seed": data.seed, "sources": data.sources})
    sizes = {"search": data.num_samples, "heldout": data.num_heldout, "test": data.num_test}
    sets = []
    for split, digest in data.fingerprints.items():
        profile = json.dumps({"num_samples": sizes.get(split)})
        samples = Dataset(f"{data.name} {split}", digest[:36], "dop-search", source, profile=profile)
        sets.append(DatasetInput(samples, [InputTag("mlflow.data.context", split)]))
    return sets
