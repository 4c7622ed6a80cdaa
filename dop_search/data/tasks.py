"""The files and the code of lmms-eval's tasks. Reading a task's YAML does not import lmms-eval, which takes seconds."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dop_search.data.sources import Location, Origin
from dop_search.utils.errors import DataError
from dop_search.utils.extras import check_extras
from dop_search.utils.registry import did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

_TASK_LINE = re.compile(r"^task:\s*[\"']?([\w.-]+)[\"']?\s*(?:#.*)?$", re.MULTILINE)


def tasks_root() -> Path:
    """The folder of lmms-eval's own tasks, found without importing it; MissingExtraError if it is not installed."""
    check_extras("a benchmark of lmms-eval", "eval")
    found = importlib.util.find_spec("lmms_eval")
    if found is None or found.origin is None:
        raise DataError("lmms-eval is installed without the files of its tasks; install dop-search[eval] again")
    return Path(found.origin).parent / "tasks"


def task_file(task: str) -> Path:
    """The YAML file of a task, by its name among lmms-eval's tasks or by its path.

    Raises:
        DataError: if there is no such file or task, with near names.
        MissingExtraError: if a name is given and lmms-eval is not installed.
    """
    if task.endswith((".yaml", ".yml")):
        path = Path(task).resolve()
        if not path.is_file():
            raise DataError(f"no task file at {task!r}")
        return path
    known = _task_files()
    if task not in known:
        near = did_you_mean(task, known, count=3)
        raise DataError(f"lmms-eval has no task {task!r}; {near}a group of tasks cannot be a source")
    return known[task]


def task_fields(file: Path) -> dict[str, Any]:
    """A task's settings with those of the files that it includes; functions are left out."""
    data: Any = yaml.load(file.read_text(encoding="utf-8"), _PlainLoader)
    if not isinstance(data, dict):
        raise DataError(f"the task file {str(file)!r} holds no settings")
    included = data.pop("include", [])
    fields: dict[str, Any] = {}
    for path in reversed([included] if isinstance(included, str) else included):
        fields |= task_fields(Path(path) if Path(path).is_file() else file.parent / path)
    return fields | data


def scored_origin(task: str) -> Origin:
    """The data that a task scores; DataError if the task cannot be found, or names no data."""
    file = task_file(task)
    fields = task_fields(file)
    split = fields.get("test_split") or fields.get("validation_split")
    if not fields.get("dataset_path") or not split:
        raise DataError(f"the task {task!r} names no data set or split to score; see {str(file)!r}")
    return Origin.of(task_location(fields, file), split)


def task_location(fields: Mapping[str, Any], file: Path) -> Location:
    """Where a task's own data set is."""
    own = fields.get("dataset_kwargs") or {}
    path, name = fields["dataset_path"], fields.get("dataset_name")
    return Location(path, name, own.get("data_files"), own.get("revision"), file.parent)


def task_on(task: str, table: Dataset, split: str, *, run_process_docs: bool) -> Any:
    """lmms-eval's own task object with its prompts and targets, whose ``task_docs`` are the rows of ``table``, after
    the task's own ``process_docs`` if that is to run; the rows are called ``split``."""
    file = task_file(task)
    with _silent():
        from datasets import DatasetDict
        from lmms_eval.api.task import ConfigurableTask
        from lmms_eval.utils import load_yaml_config

        class SampledTask(ConfigurableTask):  # type: ignore[misc]
            """The task on rows that are there already."""

            def download(self, dataset_kwargs: Mapping[str, Any] | None = None) -> None:
                prepare = self.config.process_docs
                rows = prepare(table) if run_process_docs and prepare is not None else table
                self.dataset = DatasetDict({split: rows})
                self.dataset_no_image = self.dataset

        config = load_yaml_config(str(file), mode="full")
        unused = ("filter_list", "process_results", "fewshot_config", "fewshot_split", "training_split")
        config |= {"test_split": split, "validation_split": None, "metric_list": [], **dict.fromkeys(unused)}
        return SampledTask(config={name: value for name, value in config.items() if name not in ("tag", "group")})


@cache
def _task_files() -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(tasks_root().rglob("*.yaml")):
        found = _TASK_LINE.search(path.read_text(encoding="utf-8"))
        if found:
            files.setdefault(found[1], path)
    return files


class _PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads ``!function`` as nothing."""


_PlainLoader.add_constructor("!function", lambda loader, node: None)


@contextmanager
def _silent() -> Iterator[None]:
    from loguru import logger

    logger.disable("lmms_eval")
    try:
        yield
    finally:
        logger.enable("lmms_eval")
