"""Rows of Hugging Face data sets, local or from the hub, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dop_search.data.sources import LOCAL_BUILDERS, DataFiles, is_file
from dop_search.utils.errors import DataError
from dop_search.utils.network import hub_is_reachable, offline

if TYPE_CHECKING:
    from datasets import Dataset

_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


def load_table(
    path: str,
    name: str | None,
    split: str,
    *,
    revision: str | None = None,
    data_files: DataFiles | None = None,
    base: Path | None = None,
) -> Dataset:
    """One split of a data set.

    Args:
        path: hub id, local folder, local file, or the name of a file format with ``data_files``.
        name: configuration of the data set.
        split: which split; of a single local file, any name will do.
        revision: commit of a hub data set.
        data_files: as in ``datasets.load_dataset``; relative paths are taken from ``base``.
        base: folder of the file that names the data set.

    Raises:
        DataError: if there is no such data set, configuration or split, or no way to reach it.
    """
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the HTTP client that the hub uses

    check_reachable(path, name)
    is_local = path in LOCAL_BUILDERS or Path(path).exists()
    without_network = not is_local and not hub_is_reachable()
    try:
        with _quiet(), offline(without_network):
            if is_file(path):
                return load_dataset(_BUILDERS[Path(path).suffix], data_files={split: path}, split=split)
            if not is_local and data_files is not None:
                chosen = data_files.get(split, ()) if isinstance(data_files, Mapping) else data_files
                return _chosen_files(
                    path, [chosen] if isinstance(chosen, str) else list(chosen), split, revision, without_network
                )
            if not (Path(path).is_dir() and _is_saved(Path(path))):
                files = _absolute(data_files, base) if path in LOCAL_BUILDERS else data_files
                return load_dataset(path, name, split=split, revision=revision, data_files=files)
            saved = load_from_disk(path)
    except ConnectionError as error:
        raise DataError(_offline(path, name)) from error
    except (DatasetsError, HTTPError, OSError, ValueError) as error:
        raise DataError(
            f"cannot load the data set {_shown(path, name)}, split {split!r}: {str(error).splitlines()[0]}; check "
            "its path, configuration, split and revision"
        ) from error
    if not isinstance(saved, dict):
        return saved
    if split not in saved:
        raise DataError(f"the data set {path!r} has no split {split!r}; it has {sorted(saved)}")
    return saved[split]


def _chosen_files(path: str, patterns: list[str], split: str, revision: str | None, without_network: bool) -> Dataset:
    """Some files of a hub data set, through the hub's cache: ``datasets`` finds its own again only with a network."""
    from datasets import load_dataset
    from huggingface_hub import snapshot_download

    folder = Path(
        snapshot_download(
            path, repo_type="dataset", revision=revision, allow_patterns=patterns, local_files_only=without_network
        )
    )
    files = sorted(str(file) for pattern in patterns for file in folder.glob(pattern))
    if not files or Path(files[0]).suffix not in _BUILDERS:
        raise DataError(
            f"the data set {path!r} has no files {patterns} of the kinds {sorted(_BUILDERS)}; check data_files"
        )
    return load_dataset(_BUILDERS[Path(files[0]).suffix], data_files={split: files}, split=split)


def check_reachable(path: str, name: str | None) -> None:
    """A hub data set that is neither cached nor reachable is an error now, not after a minute of retries.

    Raises:
        DataError: naming the cache variables and the data that needs no network.
    """
    if path in LOCAL_BUILDERS or Path(path).exists() or is_file(path):
        return
    import datasets
    from datasets.naming import camelcase_to_snakecase
    from huggingface_hub import constants

    *owner, name_only = path.split("/")
    folder = "___".join([*owner, camelcase_to_snakecase(name_only)])
    caches = (
        Path(datasets.config.HF_DATASETS_CACHE) / folder,
        Path(constants.HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}" / "snapshots",
    )
    is_cached = any(cache.is_dir() for cache in caches)
    if not is_cached and (datasets.config.HF_HUB_OFFLINE or not hub_is_reachable()):
        raise DataError(_offline(path, name))


def need_columns(table: Dataset, columns: Mapping[str, str | None], where: str) -> None:
    """Check that the columns of a mapping ``field -> column`` are there.

    Raises:
        DataError: naming what is missing and what is there.
    """
    missing = {field: column for field, column in columns.items() if column and column not in table.column_names}
    if missing:
        raise DataError(f"{where} has no columns for {missing}; it has {table.column_names}")


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json"))


def _offline(path: str, name: str | None) -> str:
    return (
        f"the data set {_shown(path, name)} is not in the local cache and the hub cannot be reached; point HF_HOME (or "
        "HF_HUB_CACHE and HF_DATASETS_CACHE) to a cache that holds it, give a local copy "
        "(dataset_path=/path/to/folder), or use the rendered samples: data=pocket"
    )


def _shown(path: str, name: str | None) -> str:
    return repr(path) if name is None else f"{path!r} ({name})"


def _absolute(files: Any, base: Path | None) -> Any:
    if isinstance(files, dict):
        return {split: _absolute(value, base) for split, value in files.items()}
    if isinstance(files, (list, tuple)):
        return [_absolute(value, base) for value in files]
    return files if files is None else str((base or Path()) / files)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's own progress bars."""
    import datasets

    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()
