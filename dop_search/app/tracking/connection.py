"""Where runs go: the store's address, whether it takes runs, and a client for it.

MLflow makes and migrates a new database at first use without a lock, so that two processes that start together break
it: here one process at a time does that, see :func:`connected`.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dop_search.app.config import TrackingConfig
from dop_search.utils.errors import ConfigError
from dop_search.utils.network import reach

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_SQLITE = "sqlite:///"
_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
_CONNECT_TIMEOUT_S = 5.0

_LOCAL_UI = "http://127.0.0.1:5000"
_VIEW_TAG = "mlflow.sharedViewState.strategies"
_VIEW_QUERY = "workflowType=machine_learning&viewStateShareKey=strategies"
_COLUMNS = (
    *(f"params.`{name}`" for name in ("model", "space", "budget", "strategy")),
    *(f"metrics.`{name}`" for name in ("flops_ratio", "kl_heldout", "uniform_kl_heldout", "accuracy_pruned")),
)
_VIEW = json.dumps(
    {
        "selectedColumns": _COLUMNS,
        "searchFilter": "metrics.kl_heldout >= 0",
        "orderByKey": "metrics.`kl_heldout`",
        "orderByAsc": True,
    }
)
"""A view of the experiment: strategies by held-out KL, so that the first that fits a budget is the best for it."""


def resolve_uri(config: TrackingConfig) -> str:
    """The tracking URI with a relative SQLite path made absolute, so that it can be opened from anywhere."""
    if not config.uri.startswith(_SQLITE):
        return config.uri
    return _SQLITE + str(Path(config.uri.removeprefix(_SQLITE)).resolve())


def ui_command(config: TrackingConfig) -> str | None:
    """What opens the experiment's runs in a browser, a page or a command and then a page; ``None`` without tracking."""
    if config.backend == "none":
        return None
    uri, page = resolve_uri(config), ""
    if not uri.startswith(_SQLITE) or Path(uri.removeprefix(_SQLITE)).exists():
        with suppress(ConfigError), connected(config) as (_, experiment):
            page = f"/#/experiments/{experiment}/runs?{_VIEW_QUERY}"
    if urlsplit(uri).scheme in ("http", "https"):
        return uri.rstrip("/") + page
    return f"mlflow ui --backend-store-uri {uri}  # then open {_LOCAL_UI}{page}"


def check_tracking(config: TrackingConfig) -> None:
    """Find out before a search, and quickly, whether it can be logged after it; else ConfigError."""
    if config.backend == "none":
        return
    remedy = "set another tracking.uri, or tracking=none"
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # a line per run; one of ours says it
    if importlib.util.find_spec("mlflow") is None:
        raise ConfigError("tracking=mlflow needs mlflow; install `dop-search[search]`, or set tracking=none")
    uri = resolve_uri(config)
    parts = urlsplit(uri)
    if parts.scheme.split("+")[0] not in _SCHEMES:
        raise ConfigError(f"tracking.uri={config.uri!r} must start with one of {', '.join(_SCHEMES)}; {remedy}")
    if uri.startswith(_SQLITE):
        try:
            _check_writable(Path(uri.removeprefix(_SQLITE)))
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"tracking.uri={config.uri!r} cannot be written: {error}; {remedy}") from error
    elif parts.scheme in ("http", "https"):
        try:
            reach(uri)
        except OSError as error:
            raise ConfigError(f"tracking.uri={config.uri!r} cannot be reached: {error}; {remedy}") from error


@contextmanager
def connected(config: TrackingConfig, run_dir: Path | None = None) -> Iterator[tuple[MlflowClient, str]]:
    """A client for the store, which exists and is migrated, and the id of the experiment.

    Raises:
        ConfigError: if mlflow is missing, or the store cannot be used, now or while it is written; says that the
            results are in ``run_dir``, and how to log them later.
    """
    check_tracking(config)
    from alembic.util.exc import CommandError
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with _quiet():
            with _alone(config):
                client = MlflowClient(resolve_uri(config))
                experiment = _experiment(client, config)
            yield client, experiment
    except (MlflowException, SQLAlchemyError, CommandError, sqlite3.Error, OSError) as error:
        kept = "set another tracking.uri or tracking.experiment, or tracking=none"
        if run_dir is not None:
            later = f"dop-track {run_dir}"
            kept = f"the results are in {str(run_dir)!r} all the same; log them later with `{later}`, or {kept}"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"tracking.uri={config.uri!r} refused the run: {reason}; {kept}") from error


@contextmanager
def _alone(config: TrackingConfig) -> Iterator[None]:
    """One process at a time on this machine (beside an SQLite file: wherever that is seen) makes a store."""
    uri = resolve_uri(config)
    if uri.startswith(_SQLITE):
        lock = Path(uri.removeprefix(_SQLITE) + ".lock")
    else:
        lock = Path(tempfile.gettempdir()) / f"dop-search-{hashlib.sha256(uri.encode()).hexdigest()[:16]}.lock"
    with lock.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _check_writable(path: Path) -> None:
    """Begin a transaction: MLflow itself would retry for minutes on a store that it cannot write.

    A new store is not made, and one that another process writes just now is fine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with tempfile.TemporaryFile(dir=path.parent):
            return
    with closing(sqlite3.connect(path, timeout=_CONNECT_TIMEOUT_S)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise


def _experiment(client: MlflowClient, config: TrackingConfig) -> str:
    """The experiment's id; a new one keeps its artifacts beside the SQLite file."""
    existing = client.get_experiment_by_name(config.experiment)
    if existing is not None:
        if existing.tags.get(_VIEW_TAG) != _VIEW:
            client.set_experiment_tag(existing.experiment_id, _VIEW_TAG, _VIEW)
        return str(existing.experiment_id)
    location, uri = config.artifact_location, resolve_uri(config)
    if location is None and uri.startswith(_SQLITE):
        location = (Path(uri.removeprefix(_SQLITE)).parent / "mlartifacts").as_uri()
    tags = {"mlflow.experimentKind": "custom_model_development", _VIEW_TAG: _VIEW}  # opens on runs, not on traces
    return str(client.create_experiment(config.experiment, artifact_location=location, tags=tags))


@contextmanager
def _quiet() -> Iterator[None]:
    levels = {logger: logger.level for logger in map(logging.getLogger, ("mlflow", "alembic"))}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
