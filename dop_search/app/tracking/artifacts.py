"""Strategies that MLflow keeps: ``runs:/RUN/strategy.json``, and the registered ``models:/NAME/VERSION``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from dop_search.utils.errors import ConfigError
from dop_search.utils.extras import check_extras

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from dop_search.app.record import Record, Result

STRATEGY_FILE = "strategy.json"
_MODEL = re.compile(r"models:/(?P<name>[^/@]+)(/(?P<version>\d+)|@(?P<alias>[^/]+))")


def download(address: str, folder: Path) -> Path:
    """Copy a strategy from MLflow's store, ``MLFLOW_TRACKING_URI`` or what MLflow takes without it, into a folder;
    MissingExtraError without mlflow, ConfigError if the address names nothing there."""
    check_extras(f"the address {address!r}", "search")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    store = mlflow.get_tracking_uri()
    try:
        client = MlflowClient(store, registry_uri=store)
        run, file = _run_of(client, address)
        return Path(client.download_artifacts(run, file, str(folder)))
    except (MlflowException, OSError, ValueError) as error:
        raise ConfigError(
            f"{address!r} cannot be opened in {store!r}: {str(error).splitlines()[0]}; give "
            "runs:/RUN/strategy.json or models:/NAME/VERSION, and set MLFLOW_TRACKING_URI to the store"
        ) from error


def register(client: MlflowClient, run: str, record: Record, result: Result) -> None:
    """Make the strategy of a run the next version of the registered one of its model and budget."""
    from mlflow.exceptions import MlflowException

    name = re.sub(r"[^\w.]+", "-", f"{record.model.name}-{result.budget.name} {result.budget.value:g}").strip("-")
    tags = {"space": record.space.name, "kl_heldout": f"{result.kl_heldout:.4g}", "flops": f"{result.flops_ratio:.4g}"}
    try:
        client.create_registered_model(name, tags={"kind": "strategy"})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"{client.get_run(run).info.artifact_uri}/{STRATEGY_FILE}"
    client.create_model_version(name, source, run, tags=tags, description=result.strategy.describe())


def _run_of(client: MlflowClient, address: str) -> tuple[str, str]:
    model = _MODEL.fullmatch(address)
    if model is None:
        run, _, file = address.partition(":/")[2].strip("/").partition("/")
        return run, file or STRATEGY_FILE
    if model["version"]:
        version = client.get_model_version(model["name"], model["version"])
    else:
        version = client.get_model_version_by_alias(model["name"], model["alias"])
    return str(version.run_id), STRATEGY_FILE
