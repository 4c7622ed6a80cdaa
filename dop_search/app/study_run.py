"""Running a study: configuration → model → rows → figures → MLflow."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from dop_search.app.begin import begin
from dop_search.app.config import SearchConfig
from dop_search.app.config.schema import StudyConfig
from dop_search.app.report.style import save_figure
from dop_search.app.results import RESULT_FILE, ResultFile, read_result
from dop_search.app.study import Result, Study, check_study, open_study, study_config
from dop_search.app.tracking.store import log_study
from dop_search.app.workbench import Workbench
from dop_search.models.fast_linear import fast_linear
from dop_search.utils.conf import config_dir
from dop_search.utils.files import write_text_atomic
from dop_search.utils.progress import Progress
from dop_search.utils.registry import import_modules


@dataclass(frozen=True)
class StudyRun:
    """What a study came to: ``result.json`` and its folder, a table for a terminal, and how many rows are published."""

    data: dict[str, Any]
    folder: Path
    table: Table | None
    num_published: int


def run_study(config: SearchConfig, progress: Progress) -> StudyRun:
    """Measure what the study's folder lacks, draw its figures and log it; a finished study measures nothing.

    Rows that were published with the repository are taken from there, if they are of the same model, samples and
    options.
    """
    import_modules(config.imports)
    study = open_study(config)
    check_study(study, config)
    place = study_config(config)
    if place.workers > 1:
        config = config.model_copy(update={"num_threads": config.num_threads or 1})
    with _workers(config, place.workers - 1):
        results = _measure(study, config, progress)
    results.refresh()  # a worker may have been the last to write
    _draw(study, results.data, results.folder)
    log_study(config.tracking, results.data, results.folder)
    published = _published(place)
    known = [] if published is None or published == results.folder.resolve() else _rows(published)
    num_published = sum(row in known for row in results.rows)
    return StudyRun(results.data, results.folder, study.table(results.data), num_published)


def _draw(study: Study, result: Result, folder: Path) -> None:
    """Write a study's figures as PNG, and its other files, into its folder; a study without rows has none."""
    if result["rows"]:
        for name, figure in study.figures(result).items():
            save_figure(figure, folder / f"{name}.png")
        for name, text in study.texts(result).items():
            write_text_atomic(folder / name, text)


def _measure(study: Study, config: SearchConfig, progress: Progress) -> ResultFile:
    loaded = begin(config, Path(study_config(config).path), "study.folder", progress)
    bench, place = Workbench(config, loaded, progress), study_config(config)
    setup = bench.setup() | study.settings(config)
    results = ResultFile(Path(place.path), place.name, setup, _published(place))
    with fast_linear(loaded.model):
        study.measure(bench, results)
    return results


def _published(place: StudyConfig) -> Path | None:
    """The folder of the published result; one without a root is in the checkout, wherever the command runs."""
    return None if place.published is None else (config_dir().parent / place.published).resolve()


def _rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / RESULT_FILE
    return read_result(path)["rows"] if path.is_file() else []


@contextmanager
def _workers(config: SearchConfig, count: int) -> Iterator[None]:
    """Processes that measure rows of the same study and end with the context; what a dead one left, another takes."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=(config,), daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.terminate()


def _work(config: SearchConfig) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import_modules(config.imports)
    _measure(open_study(config), config, Progress())


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
