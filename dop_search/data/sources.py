"""Where samples come from: splits of lmms-eval tasks and of Hugging Face data sets, plain data; those of a name are the
``sources`` of ``conf/data/NAME.yaml``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from dop_search.utils.conf import config_dir
from dop_search.utils.errors import DataError

DataFiles = str | Sequence[str] | Mapping[str, Any]
"""As in ``datasets.load_dataset(data_files=…)``."""

_CHECKED: dict[str, Any] = {"extra": "forbid"}

LOCAL_BUILDERS = frozenset({"parquet", "json", "csv", "arrow", "text", "imagefolder", "webdataset"})
"""Data set "paths" that only name a file format; the data are ``data_files``."""


@dataclass(frozen=True)
class ImageTable:
    """Images kept in a table of their own, as GQA does it.

    Attributes:
        dataset_name: configuration of the same data set that holds the images.
        split: its split.
        key: column of the question that names its image.
        id: column of the images that is named.
        image: column with the image; the question receives it under the same name.
    """

    dataset_name: str | None
    split: str
    key: str = "imageId"
    id: str = "id"
    image: str = "image"
    __pydantic_config__ = _CHECKED


@dataclass(frozen=True)
class TaskSource:
    """A split of an lmms-eval task's data set, asked with the task's own prompt.

    Attributes:
        task: name of an lmms-eval task, or the path of a task's YAML file.
        split: which split of the data set; never the one that the task scores.
        dataset_path, dataset_name, data_files: instead of the task's own.
        revision: commit of a hub data set.
        images: joins images that are kept apart; the task's own ``process_docs`` is not run then.
        target: column with the answer, where the task names none (VQA-like tasks score a list of answers).
        weight: share of the samples, relative to the other sources.
    """

    task: str
    split: str
    kind: Literal["task"] = "task"
    dataset_path: str | None = None
    dataset_name: str | None = None
    data_files: DataFiles | None = None
    revision: str | None = None
    images: ImageTable | None = None
    target: str | None = None
    weight: float = 1.0
    __pydantic_config__ = _CHECKED

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    @property
    def label(self) -> str:
        """The sample ids' prefix and the samples' family."""
        return Path(self.task).stem if self.task.endswith(".yaml") else self.task


@dataclass(frozen=True)
class DatasetSource:
    """A split of a Hugging Face data set, by columns.

    Attributes:
        path: hub id, a local folder (also one of ``save_to_disk``), or a local .parquet, .json, .jsonl or .csv file.
        split: which split.
        name: configuration of the data set.
        revision: commit of a hub data set.
        data_files: as in ``datasets.load_dataset``.
        image, question, answer: columns; an answer may be a list of accepted ones.
        id, family: columns; by default the row number and the data set's name.
        prompt: what is asked; ``{question}`` and any other column in braces is filled in.
        weight: share of the samples, relative to the other sources.
    """

    path: str
    split: str
    kind: Literal["dataset"] = "dataset"
    name: str | None = None
    revision: str | None = None
    data_files: DataFiles | None = None
    image: str = "image"
    question: str = "question"
    answer: str = "answer"
    id: str | None = None
    family: str | None = None
    prompt: str = "{question}"
    weight: float = 1.0
    __pydantic_config__ = _CHECKED

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    @property
    def label(self) -> str:
        """The sample ids' prefix and the samples' default family."""
        return Path(self.path).stem


Source = TaskSource | DatasetSource


_KINDS: dict[str, type[TaskSource | DatasetSource]] = {"task": TaskSource, "dataset": DatasetSource}


def named_sources(name: str) -> tuple[Source, ...] | None:
    """The sources of ``data=NAME``, ``None`` without any; DataError if the file lists something that is no source."""
    file = config_dir() / "data" / f"{name}.yaml"
    if not file.is_file():
        return None
    items = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("sources") or ()
    return tuple(parse_source(item, str(file)) for item in items) or None


def known_names() -> tuple[str, ...]:
    """The options with sources."""
    names = sorted(path.stem for path in (config_dir() / "data").glob("*.yaml"))
    return tuple(name for name in names if named_sources(name))


def parse_source(item: Any, where: str) -> Source:
    """A source from its mapping; DataError saying what is unknown or missing."""
    kind = item.get("kind") if isinstance(item, dict) else None
    if kind not in _KINDS:
        raise DataError(f"{where}: a source needs `kind: task` or `kind: dataset`, but got {item!r}")
    fields = dict(item)
    try:
        if fields.get("images") is not None:
            fields["images"] = ImageTable(**fields["images"])
        return _KINDS[kind](**fields)
    except TypeError as error:
        raise DataError(f"{where}: {error} in {item!r}") from error


@dataclass(frozen=True)
class Location:
    """Where a data set is.

    Attributes:
        path: hub id, local folder, local file, or the name of a file format with ``data_files``.
        name: configuration of the data set.
        data_files: as in ``datasets.load_dataset``; relative paths are taken from ``base``.
        revision: commit of a hub data set.
        base: folder of the file that names the data set.
    """

    path: str
    name: str | None = None
    data_files: DataFiles | None = None
    revision: str | None = None
    base: Path | None = None

    @property
    def is_file(self) -> bool:
        """Whether the path names a single local file."""
        return self.path.endswith((".parquet", ".json", ".jsonl", ".csv"))

    @property
    def is_local(self) -> bool:
        """Whether the hub is not asked."""
        return self.path in LOCAL_BUILDERS or Path(self.path).exists()

    @property
    def shown(self) -> str:
        """For messages."""
        return repr(self.path) if self.name is None else f"{self.path!r} ({self.name})"

    def files_of(self, split: str) -> list[str]:
        """The files of a split."""
        files = self.data_files.get(split, ()) if isinstance(self.data_files, Mapping) else self.data_files
        return [files] if isinstance(files, str) else [str(file) for file in files or ()]


@dataclass(frozen=True)
class Origin:
    """Which data a source or a benchmark reads, for telling whether two read the same.

    Attributes:
        dataset: last part of a hub id or folder, in lower case: mirrors of one data set share it.
        splits: base names of the splits, in lower case; ``all`` for everything.
        files: absolute paths where the data are local files; then they alone are compared.
        text: for messages.
    """

    dataset: str
    splits: frozenset[str]
    files: frozenset[str]
    text: str

    @classmethod
    def of(cls, where: Location, split: str) -> Origin:
        """The data of a split."""
        files: list[Path] = []
        if where.path in LOCAL_BUILDERS and where.data_files is not None:
            files = [(where.base or Path()) / file for file in where.files_of(split)]
        elif where.is_file:
            files = [Path(where.path)]
        text = f"{where.path}{f' ({where.name})' if where.name else ''}, split {split!r}"
        paths = frozenset(str(file.resolve()) for file in files)
        return cls(Path(where.path).name.lower(), base_splits(split), paths, text)

    def overlaps(self, other: Origin) -> bool:
        """Whether both read the same split of the same data set, or a common file."""
        if self.files or other.files:
            return bool(self.files & other.files)
        if self.dataset != other.dataset:
            return False
        return bool(self.splits & other.splits) or "all" in self.splits | other.splits


def base_splits(split: str) -> frozenset[str]:
    """The splits that ``train+test[:100]``, as ``datasets`` reads it, takes rows of."""
    return frozenset(part.split("[")[0].strip().lower() for part in split.split("+"))


def _check_weight(weight: float) -> None:
    if not weight > 0.0:
        raise DataError(f"`weight > 0` must hold for a source, but got {weight!r}")
