"""A study: a question, and the rows, the figures and the table that answer it; one class.

Its fields are its options, ``study.options`` of a configuration. Studies are found by their files in a checkout,
``experiments/NAME/study.py``; a module of ``imports`` registers others, ``STUDIES["mine"] = Mine``.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from dop_search.app.config import SearchConfig
from dop_search.app.config.parse import parse_section
from dop_search.app.config.schema import StudyConfig
from dop_search.app.config.section import Section
from dop_search.app.data_checks import check_data
from dop_search.app.results import ResultFile, Row
from dop_search.app.workbench import Workbench, flops_ratios
from dop_search.baselines import FittedMethod
from dop_search.data.validation import Split
from dop_search.selectors import make_selector
from dop_search.utils.conf import config_dir
from dop_search.utils.errors import ConfigError
from dop_search.utils.registry import Registry, unknown

Result = Mapping[str, Any]
"""The content of a study's ``result.json``."""
Measured = Row | tuple[Row, np.ndarray]
"""The values of a row, or these and an array per sample."""

STRATEGIES_FOLDER = "strategies"
EXPERIMENTS = "experiments"
"""The folder of a checkout, and the package, with a folder per study."""

UNUSED = {
    "search": "the study's own searches are told by study.options",
    "eval": "what a study judges strategies by is part of it; scores on benchmarks: experiment=main_table",
    "storage": "processes share the rows by study.folder: raise study.workers, or start the same command again",
}
"""Keys that only a search reads, and what studies have in their place."""


class Study(Section, ABC):
    """Subclass it, give every option as a field with a docstring, and say what a row is.

    Attributes:
        question: in a sentence.
        rows: what they are, for the progress display.
        reads: the samples that are measured on.
        judges: the samples whose answers are compared with the annotation.
        group: the parts of a key whose rows one process should measure, as they share work.
        uses: keys of :data:`UNUSED` that this study reads all the same.
        adds_rows: options that say which rows there are, and change none: with more of them a study goes on.
    """

    question: ClassVar[str]
    rows: ClassVar[str] = "rows"
    reads: ClassVar[tuple[Split, ...]] = ("search", "heldout")
    judges: ClassVar[Split | None] = None
    group: ClassVar[tuple[str, ...]] = ()
    uses: ClassVar[frozenset[str]] = frozenset()
    adds_rows: ClassVar[frozenset[str]] = frozenset()

    def check(self, config: SearchConfig) -> None:
        """Refuse, before a model is loaded, what this study cannot do; ConfigError naming the key and the remedy."""

    def settings(self, config: SearchConfig) -> dict[str, Any]:
        """What the rows depend on beside the model and the samples: selector, space, options, a file's content."""
        own: dict[str, Any] = {}
        if config.data.path is not None and Path(config.data.path).is_file():
            own["data_file"] = hashlib.sha256(Path(config.data.path).read_bytes()).hexdigest()[:16]
        joint = {"also"}  # of ``search=joint``, which no study goes by
        return {
            **own,
            "selector": config.selector.model_dump(mode="json", exclude=joint),
            "space": config.space.model_dump(mode="json", exclude=joint),
            "options": self.model_dump(mode="json", exclude=set(self.adds_rows)),
        }

    @abstractmethod
    def keys(self, bench: Workbench) -> list[dict[str, Any]]:
        """What the rows are about, in order; all with the same names."""

    @abstractmethod
    def row(self, bench: Workbench, *_: Any, **key: Any) -> Measured:
        """Measure the row of a key, which comes as keyword arguments."""

    def summarize(self, bench: Workbench, results: ResultFile) -> Mapping[str, Any]:
        """What all rows say together; empty: nothing."""
        return {}

    def measure(self, bench: Workbench, results: ResultFile) -> None:
        """Add the rows that are missing, and the summary."""
        keys = self.keys(bench)
        with bench.watch() as notify:
            results.measure(keys, partial(self.row, bench), notify, self.rows, group=self.group)
        results.sort(keys)
        if summary := self.summarize(bench, results):
            results.summarize(summary)

    @staticmethod
    def figures(result: Result) -> dict[str, Figure]:
        """Figures by name, drawn from ``result.json`` alone."""
        return {}

    @staticmethod
    def texts(result: Result) -> dict[str, str]:
        """Other files by name, written from ``result.json`` alone."""
        return {}

    @staticmethod
    def table(result: Result) -> Table | None:
        """What was found, for a terminal; ``None`` for studies that only draw."""
        return None


STUDIES: Registry[type[Study]] = Registry("study", {})
"""Those that were looked up in ``experiments/``, and those of modules of one's own."""


def find_study(name: str) -> type[Study]:
    """The study of that name; ConfigError, with a near name, if there is none."""
    folder = _folder()
    if folder is not None and (folder / name / "study.py").is_file():
        STUDIES[name] = _load(folder, name)
    elif folder is None and name not in STUDIES:
        raise ConfigError(
            f"no study {name!r}: studies lie in {EXPERIMENTS}/ of a checkout of dop-search, which this installation is "
            f"not; clone the repository, or name a module in `imports` that registers it"
        )
    elif name not in STUDIES:
        raise ConfigError(unknown("study", name, study_names()))
    return STUDIES[name]


def study_names() -> list[str]:
    """All studies that can be chosen."""
    folder = _folder()
    found = () if folder is None else (path.parent.name for path in folder.glob("*/study.py"))
    return sorted({*found, *STUDIES})


def open_study(config: SearchConfig) -> Study:
    """The study that ``config.study`` names, with its options; ConfigError if there is no such study or option."""
    chosen = study_config(config)
    return parse_section(dict(chosen.options), find_study(chosen.name), "study.options")


def study_config(config: SearchConfig) -> StudyConfig:
    """The section of a study; ConfigError if the configuration is that of a search."""
    if config.study is None:
        raise ConfigError("no study is chosen; set one, as in experiment=compare")
    return config.study


def save_strategy(config: SearchConfig, name: str, fitted: FittedMethod) -> None:
    """Keep the strategy of a row as ``strategies/NAME.json`` of the study's folder, if one expresses the method."""
    if fitted.strategy is not None:
        fitted.save(Path(study_config(config).path) / STRATEGIES_FOLDER / f"{name}.json")


def check_study(study: Study, config: SearchConfig) -> None:
    """Refuse, before a model is loaded, what a study does not read, what it cannot do, and what cannot be had."""
    name = study_config(config).name
    values, usual = (item.model_dump(mode="json", include=set(UNUSED)) for item in (config, SearchConfig()))
    for key, instead in UNUSED.items():
        if key in study.uses:
            continue
        given = _difference(key, values[key], usual[key])
        if given is not None:
            raise ConfigError(f"study {name!r} has no use for `{key}`, but got {given}; leave it out: {instead}")
    flops_ratios(config)
    if study.reads and min(config.data.num_samples, config.data.num_heldout) < 2:
        raise ConfigError(
            f"study {name!r} gives intervals over samples, but got data.num_samples={config.data.num_samples} and "
            f"data.num_heldout={config.data.num_heldout}; give at least 2 of each"
        )
    if study.judges is not None and config.data.answers != "teacher":
        raise ConfigError(
            f"study {name!r} counts the answers that stay the full model's, but got "
            f"data.answers={config.data.answers}; leave it at teacher"
        )
    make_selector(config.selector.name, config.selector.options)
    check_data(config.data, config.eval, study.reads, () if study.judges is None else (study.judges,))
    study.check(config)


def _folder() -> Path | None:
    """``experiments/`` of the checkout that the configuration files belong to; an installed package has none."""
    folder = config_dir().parent / EXPERIMENTS
    return folder if folder.is_dir() else None


def _load(folder: Path, name: str) -> type[Study]:
    if str(folder.parent) not in sys.path:
        sys.path.append(str(folder.parent))
    module = importlib.import_module(f"{EXPERIMENTS}.{name}.study")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Study)
        and value.__module__ == module.__name__
        and not inspect.isabstract(value)
    ]
    if len(found) != 1:
        raise ConfigError(f"{str(folder / name / 'study.py')!r} must define one study, but it has {len(found)}")
    return found[0]


def _difference(key: str, given: Any, usual: Any) -> str | None:
    """What differs from the usual value, as it is written on the command line; ``None``: nothing."""
    if given == usual:
        return None
    if not isinstance(given, dict):
        return f"{key}={given}"
    return next(f"{key}.{name}={value}" for name, value in given.items() if value != usual.get(name))
