"""MLflow: one run per search, a nested run per budget; one run per strategy of an evaluation.

The only file that imports mlflow, and only when it logs.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import socket
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dop_search.app.config import TrackingConfig
from dop_search.app.eval_record import FULL_FOLDER, SAMPLES_FOLDER, SCORES_FILE, EvalRecord, StrategyScores
from dop_search.app.record import (
    CURVES_FILE,
    RECORD_FILE,
    SAMPLES_FILE,
    Record,
    Result,
)
from dop_search.app.report.write import PAGE_FILE, PLOTS_FOLDER, load_curves
from dop_search.app.tracking.score_metrics import score_columns, score_metrics, strategy_key
from dop_search.app.tracking.values import (
    curve_points,
    provenance_tags,
    result_metrics,
    result_params,
    search_tags,
    shared_metrics,
    shared_params,
    started_ms,
    strategy_params,
    study_row_values,
)
from dop_search.strategy import Strategy
from dop_search.utils.errors import ConfigError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

SCORE_TABLE = "score_table.json"
"""Artifact with a row per benchmark, shown by MLflow as a table."""

_SQLITE = "sqlite:///"
_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
_CONNECT_TIMEOUT_S = 5.0
_MAX_METRICS = 1000
"""What MLflow takes in one batch."""


def resolve_uri(config: TrackingConfig) -> str:
    """The tracking URI with a relative SQLite path made absolute, so that it can be opened from anywhere."""
    if not config.uri.startswith(_SQLITE):
        return config.uri
    return _SQLITE + str(Path(config.uri.removeprefix(_SQLITE)).resolve())


def ui_command(config: TrackingConfig) -> str | None:
    """The line that opens the runs in a browser, or ``None`` without tracking; needs no mlflow."""
    if config.backend == "none":
        return None
    uri = resolve_uri(config)
    return uri if urlsplit(uri).scheme in ("http", "https") else f"mlflow ui --backend-store-uri {uri}"


def check_tracking(config: TrackingConfig) -> None:
    """Find out before a search, and quickly, whether it can be logged after it.

    Raises:
        ConfigError: if mlflow is missing, or the store cannot be written or reached.
    """
    if config.backend == "none":
        return
    remedy = "set another tracking.uri, or tracking=none"
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if importlib.util.find_spec("mlflow") is None:
        raise ConfigError("tracking=mlflow needs mlflow; install `dop-search[search]`, or set tracking=none")
    uri = resolve_uri(config)
    parts = urlsplit(uri)
    if parts.scheme.split("+")[0] not in _SCHEMES:
        raise ConfigError(f"tracking.uri={config.uri!r} must start with one of {', '.join(_SCHEMES)}; {remedy}")
    if uri.startswith(_SQLITE):
        try:
            _open_for_writing(Path(uri.removeprefix(_SQLITE)))
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"tracking.uri={config.uri!r} cannot be written: {error}; {remedy}") from error
    elif parts.scheme in ("http", "https"):
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((parts.hostname or "", port), timeout=_CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise ConfigError(f"tracking.uri={config.uri!r} cannot be reached: {error}; {remedy}") from error


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
    with _opened(config, str(run_dir)) as (client, experiment):
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
    with _opened(config, "--out") as (client, experiment):
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
    with _opened(config, str(folder)) as (client, experiment):
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
    name = config.run_name or f"{record.model.name} {record.space.name} {record.solver.name}"
    run = client.create_run(
        experiment, start_time=started_ms(record.provenance), tags=search_tags(record), run_name=name
    )
    identifier = str(run.info.run_id)
    _log(client, identifier, shared_params(record), shared_metrics(record))
    curves = load_curves(run_dir)
    if curves is not None:
        _log_points(client, identifier, curve_points(curves))
    for file in (RECORD_FILE, CURVES_FILE, SAMPLES_FILE, PAGE_FILE, PLOTS_FOLDER):
        path = run_dir / file
        if path.is_dir():
            client.log_artifacts(identifier, str(path), file)
        elif path.exists():
            client.log_artifact(identifier, str(path))
    for result in record.results:
        _log_result(client, experiment, identifier, record, result)
    client.set_terminated(identifier)
    return identifier


def _log_result(client: MlflowClient, experiment: str, parent: str, record: Record, result: Result) -> None:
    tags = {**search_tags(record), "mlflow.parentRunId": parent, "strategy_key": strategy_key(result.strategy)}
    name = f"{record.space.name} @ {result.budget_text}"
    run = client.create_run(experiment, start_time=started_ms(record.provenance), tags=tags, run_name=name)
    identifier = str(run.info.run_id)
    _log(client, identifier, {**shared_params(record), **result_params(result)}, result_metrics(result))
    client.log_dict(identifier, result.strategy.to_json(), "strategy.json")
    if result.scores:
        client.log_table(identifier, score_columns(result.scores), SCORE_TABLE)
    client.set_terminated(identifier)


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
    with _opened(config, str(run_dir)) as (client, experiment):
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
        params = {**shared, **strategy_params(item.strategy), "file": item.file}
        link = _search_tags(client, experiment, item.strategy)
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
            client.log_dict(identifier, strategy_scores.strategy.to_json(), "strategy.json")
            client.log_table(identifier, score_columns(strategy_scores.scores), SCORE_TABLE)
        for folder in (FULL_FOLDER, name) if strategy_scores is not None else (FULL_FOLDER,):
            if (run_dir / SAMPLES_FOLDER / folder).is_dir():
                client.log_artifacts(identifier, str(run_dir / SAMPLES_FOLDER / folder), f"{SAMPLES_FOLDER}/{folder}")
        client.set_terminated(identifier)
        identifiers.append(identifier)
    return identifiers


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


@contextmanager
def _opened(config: TrackingConfig, results: str) -> Iterator[tuple[MlflowClient, str]]:
    """The store and the experiment's id, both made if they are not there; ``results``: where those are in any case.

    Raises:
        ConfigError: if mlflow is missing, or the store refuses something.
    """
    check_tracking(config)
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with _quiet():
            with _alone(resolve_uri(config)):
                client = MlflowClient(resolve_uri(config))
                experiment = _experiment(client, config)
            yield client, experiment
    except (MlflowException, SQLAlchemyError, CommandError, OSError) as error:
        raise ConfigError(
            f"tracking.uri={config.uri!r} refused the run: {error}; the results are in {results!r} all the same; "
            "set another tracking.uri or tracking.experiment, or tracking=none"
        ) from error


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """One process at a time: MLflow makes and migrates a new database at first use, and takes no lock."""
    if urlsplit(uri).scheme in ("http", "https"):
        yield  # the server has done it
        return
    if uri.startswith(_SQLITE):
        database = Path(uri.removeprefix(_SQLITE))
        path = database.with_name(f".{database.name}.lock")
    else:  # of this machine's processes
        path = Path(tempfile.gettempdir()) / f"dop_search-{hashlib.sha256(uri.encode()).hexdigest()[:16]}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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


def _open_for_writing(path: Path) -> None:
    """Begin a transaction: MLflow itself would retry for minutes on a store that it cannot write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with tempfile.TemporaryFile(dir=path.parent):
            return  # and not the file itself, which another process may be making
    try:
        with closing(sqlite3.connect(path, timeout=_CONNECT_TIMEOUT_S)) as connection:
            connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:  # another process is writing, so that it can be written
            raise


def _experiment(client: MlflowClient, config: TrackingConfig) -> str:
    """The experiment's id; a new one keeps its artifacts beside the SQLite file."""
    existing = client.get_experiment_by_name(config.experiment)
    if existing is not None:
        return str(existing.experiment_id)
    location, uri = config.artifact_location, resolve_uri(config)
    if location is None and uri.startswith(_SQLITE):
        location = (Path(uri.removeprefix(_SQLITE)).parent / "mlartifacts").as_uri()
    return str(client.create_experiment(config.experiment, artifact_location=location))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the chatter of a new store's migrations."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
