"""Studies by name, and running one: configuration → model → rows → figures → MLflow."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from dop_search.app.config import SearchConfig
from dop_search.app.report.studies import draw_study
from dop_search.app.results import ResultFile
from dop_search.app.study_settings import check_settings, row_settings
from dop_search.app.tracking.store import log_study
from dop_search.app.workbench import Workbench
from dop_search.models.fast_linear import fast_linear
from dop_search.models.loading import load
from dop_search.studies.additive_vs_exact import additive_vs_exact
from dop_search.studies.claims import claims
from dop_search.studies.compare import compare
from dop_search.studies.depthwise_vs_free import depthwise_vs_free
from dop_search.studies.failures import failures
from dop_search.studies.long_answers import long_answers
from dop_search.studies.objective import objective
from dop_search.studies.selectors import selectors
from dop_search.studies.solver import solver
from dop_search.studies.split_attention import split_attention
from dop_search.studies.text_operations import text_operations
from dop_search.studies.transfer import transfer
from dop_search.studies.validation import validation_seed, validation_size, validation_source
from dop_search.studies.vision_tower import vision_tower
from dop_search.utils.errors import ConfigError
from dop_search.utils.extensions import import_modules
from dop_search.utils.files import check_writable
from dop_search.utils.progress import Progress, SilentProgress

Measure = Callable[..., None]
"""``measure(bench, results, **options)`` adds the rows that are missing."""

STUDIES: Mapping[str, Measure] = MappingProxyType(
    {
        "additive_vs_exact": additive_vs_exact,
        "claims": claims,
        "compare": compare,
        "depthwise_vs_free": depthwise_vs_free,
        "failures": failures,
        "long_answers": long_answers,
        "objective": objective,
        "selectors": selectors,
        "solver": solver,
        "split_attention": split_attention,
        "text_operations": text_operations,
        "transfer": transfer,
        "validation_seed": validation_seed,
        "validation_size": validation_size,
        "validation_source": validation_source,
        "vision_tower": vision_tower,
    }
)
"""The options of a study are its keyword arguments."""


def run_study(config: SearchConfig, progress: Progress) -> dict[str, Any]:
    """Measure what ``config.study`` lacks, draw its figures and log it; a finished study measures nothing.

    Returns:
        The content of ``result.json``.

    Raises:
        ConfigError: on an unknown study or option, a setting that studies do not heed, or a folder with a result of
            another setup.
        DopError: on anything else that a user can mend.
    """
    study = config.study
    assert study is not None
    import_modules(config.imports)
    measure = _find(study.name, study.options)
    check_settings(config)
    if study.workers > 1:
        config = config.model_copy(update={"num_threads": config.num_threads or 1})
    with _helpers(config, study.workers - 1):
        results = _measure(config, measure, progress)
    results.refresh()  # a helper may have been the last to write
    folder = Path(study.folder)
    draw_study(results.data, folder)
    log_study(config.tracking, results.data, folder)
    return results.data


def _measure(config: SearchConfig, measure: Measure, progress: Progress) -> ResultFile:
    assert config.study is not None
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    check_writable(Path(config.cache_dir), "cache_dir")
    check_writable(Path(config.study.folder), "study.folder")
    with progress.task(f"load {config.model.name_or_path}"):
        transformers_logging.disable_progress_bar()
        loaded = load(**config.model.model_dump())
    bench = Workbench(config, loaded, progress)
    setup = bench.setup() | row_settings(config, STUDIES[config.study.name])
    results = ResultFile(Path(config.study.folder), config.study.name, setup)
    with fast_linear(loaded.model):
        measure(bench, results, **config.study.options)
    return results


@contextmanager
def _helpers(config: SearchConfig, count: int) -> Iterator[None]:
    """Processes that measure rows of the same study and end with the context; what a dead one left, another takes."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_help, args=(config,), daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.terminate()


def _help(config: SearchConfig) -> None:
    assert config.study is not None
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import_modules(config.imports)
    _measure(config, STUDIES[config.study.name], SilentProgress())


def _find(name: str, options: Mapping[str, Any]) -> Measure:
    if name not in STUDIES:
        near = get_close_matches(name, STUDIES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"unknown study {name!r}; {hint}there are {', '.join(STUDIES)}")
    known = list(inspect.signature(STUDIES[name]).parameters)[2:]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ConfigError(f"study {name!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    return STUDIES[name]


def _end_with_parent() -> None:
    """A parent that is killed cannot end its helpers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
