"""Rows of Hugging Face data sets, local or from the hub, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dop_search.data.sources import LOCAL_BUILDERS, Location
from dop_search.utils.errors import DataError
from dop_search.utils.network import hub_is_reachable, offline

if TYPE_CHECKING:
    from datasets import Dataset

_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
_OF_SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")
"""One of them is in a folder that ``save_to_disk`` wrote."""


def load_table(where: Location, split: str) -> Dataset:
    """One split of a data set; of a single local file, any name will do. DataError if it cannot be had."""
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the HTTP client that the hub uses

    check_reachable(where)
    path, without_network = where.path, not where.is_local and not hub_is_reachable()
    try:
        with quiet(), offline(without_network):
            if where.is_file:
                return load_dataset(_BUILDERS[Path(path).suffix], data_files={split: path}, split=split)
            if not where.is_local and where.data_files is not None:
                return _chosen_files(where, split, without_network)
            if not any((Path(path) / name).is_file() for name in _OF_SAVED):
                files = _absolute(where.data_files, where.base) if path in LOCAL_BUILDERS else where.data_files
                return load_dataset(path, where.name, split=split, revision=where.revision, data_files=files)
            saved = load_from_disk(path)
    except ConnectionError as error:
        raise _unreachable(where) from error
    except (DatasetsError, HTTPError, OSError, ValueError) as error:
        raise DataError(
            f"cannot load the data set {where.shown}, split {split!r}: {str(error).splitlines()[0]}; check "
            "its path, configuration, split and revision"
        ) from error
    if not isinstance(saved, dict):
        return saved
    if split not in saved:
        raise DataError(f"the data set {path!r} has no split {split!r}; it has {sorted(saved)}")
    return saved[split]


def _chosen_files(where: Location, split: str, without_network: bool) -> Dataset:
    """Some files of a hub data set, through the hub's cache: ``datasets`` finds its own again only with a network."""
    from datasets import load_dataset
    from huggingface_hub import snapshot_download

    patterns = where.files_of(split)
    folder = snapshot_download(
        where.path,
        repo_type="dataset",
        revision=where.revision,
        allow_patterns=patterns,
        local_files_only=without_network,
    )
    files = sorted(str(file) for pattern in patterns for file in Path(folder).glob(pattern))
    if not files or Path(files[0]).suffix not in _BUILDERS:
        raise DataError(
            f"the data set {where.path!r} has no files {patterns} of the kinds {sorted(_BUILDERS)}; check data_files"
        )
    return load_dataset(_BUILDERS[Path(files[0]).suffix], data_files={split: files}, split=split)


def check_reachable(where: Location) -> None:
    """A hub data set that is neither cached nor reachable is a DataError now, not after a minute of retries."""
    if where.is_local or where.is_file:
        return
    import datasets
    from datasets.naming import camelcase_to_snakecase
    from huggingface_hub import constants

    *owner, name_only = where.path.split("/")
    folder = "___".join([*owner, camelcase_to_snakecase(name_only)])
    caches = (
        Path(datasets.config.HF_DATASETS_CACHE) / folder,
        Path(constants.HF_HUB_CACHE) / f"datasets--{where.path.replace('/', '--')}" / "snapshots",
    )
    is_cached = any(cache.is_dir() for cache in caches)
    if not is_cached and (datasets.config.HF_HUB_OFFLINE or not hub_is_reachable()):
        raise _unreachable(where)


def need_columns(table: Dataset, columns: Mapping[str, str | None], where: str) -> None:
    """Check that the columns of a mapping ``field -> column`` are there; DataError naming what is missing."""
    missing = {field: column for field, column in columns.items() if column and column not in table.column_names}
    if missing:
        raise DataError(f"{where} has no columns for {missing}; it has {table.column_names}")


def _unreachable(where: Location) -> DataError:
    return DataError(
        f"the data set {where.shown} is not in the local cache and the hub cannot be reached; point HF_HOME (or "
        "HF_HUB_CACHE and HF_DATASETS_CACHE) to a cache that holds it, give a local copy "
        "(dataset_path=/path/to/folder), or use the rendered samples: data=pocket"
    )


def _absolute(files: Any, base: Path | None) -> Any:
    if isinstance(files, dict):
        return {split: _absolute(value, base) for split, value in files.items()}
    if isinstance(files, (list, tuple)):
        return [_absolute(value, base) for value in files]
    return files if files is None else str((base or Path()) / files)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's own progress bars."""
    import datasets

    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()
