"""The main table: models × methods × budgets × benchmarks, every method at the same FLOPs; a row per cell.

Every method is fitted on search samples, then asked by lmms-eval's own task code. ``full`` is the full model. Finished
benchmarks are kept in ``cache_dir``, finished cells in ``study.folder``: a killed run continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import NonNegativeInt, PrivateAttr, field_validator
from rich.table import Table

from dop_search.app.config import ModelConfig, SearchConfig
from dop_search.app.config.parse import parse_section
from dop_search.app.config.section import Listed
from dop_search.app.results import FAILED, INFEASIBLE, ResultFile, Row
from dop_search.app.scoring import EVALUATION_FOLDER, SuiteJudge
from dop_search.app.study import Measured, Result, Study, save_strategy
from dop_search.app.workbench import Workbench
from dop_search.baselines import FittedMethod, known_methods
from dop_search.evaluation.scores import SuiteScores, difference_ci95
from dop_search.models.loading import load
from dop_search.utils.conf import config_dir
from dop_search.utils.errors import ConfigError, DopError
from dop_search.utils.extras import check_extras
from dop_search.utils.intervals import holm, sign_flip_p
from dop_search.utils.registry import unknown
from experiments.compare.overhead import prefill_times
from experiments.main_table.tables import cells, markdown, tables

FULL = "full"
SHOWN = frozenset({"model", "method", "budget", "FLOPs %", "mean %", "95 % CI", "p", "prefill"})
"""Columns of the table in a terminal."""
TIMED_SAMPLES = 4
"""Prompts of the batch whose prefill is timed."""


@dataclass
class _Judged:
    """A method at a budget on all benchmarks, or why it cannot be."""

    key: tuple[str, str, float]
    fitted: FittedMethod | None = None
    scores: SuiteScores | None = None
    times: Mapping[str, float] | None = None
    error: DopError | None = None


class MainTable(Study):
    """Fit, score and gather; see the module."""

    question = "What is left of the scores on every benchmark, method by method, at the same FLOPs?"
    rows = "cells of the main table"
    reads = ("search",)
    group = ("model", "method")
    uses = frozenset({"eval"})
    adds_rows = frozenset({"models", "methods"})

    models: Listed[str] = ()
    """Options of ``model=``, one after the other; none: the configured model alone."""
    methods: Listed[str] = ("uniform", "fastv", "dop_split")
    """Names as for ``dop-eval method=…``; the full model is always there."""
    reference: str = "dop_split"
    """The method that the others are tested against."""
    num_timing_rounds: NonNegativeInt = 3
    """Paired measurements of the prefill per method and budget; 0: no times."""

    _bench: Workbench | None = PrivateAttr(default=None)
    _judge: SuiteJudge | None = PrivateAttr(default=None)
    _judge_name: str = PrivateAttr(default="")
    _judged: _Judged | None = PrivateAttr(default=None)

    _are_known = field_validator("methods")(known_methods)

    def check(self, config: SearchConfig) -> None:
        """See base class."""
        if not config.eval.benchmarks:
            raise ConfigError(f"the main table needs benchmarks, but got eval={config.eval.name}; give eval=dop13")
        check_extras(f"eval={config.eval.name}", "eval")
        for name in self.models:
            _model_config(name)

    def settings(self, config: SearchConfig) -> dict[str, Any]:
        """See base class."""
        return {**super().settings(config), "suite": {"name": config.eval.name, "limit": config.eval.limit}}

    def keys(self, bench: Workbench) -> list[dict[str, Any]]:
        """See base class."""
        states = [(FULL, 1.0), *((name, budget) for name in self.methods for budget in bench.budgets)]
        return [
            {"model": model, "method": method, "budget": budget, "benchmark": benchmark.name}
            for model in self.models or (bench.config.model.name_or_path,)
            for method, budget in states
            for benchmark in bench.config.eval.benchmarks
        ]

    def row(self, bench: Workbench, model: str, method: str, budget: float, benchmark: str) -> Measured:
        """See base class."""
        judge = self._judge_of(bench, model)
        if self._judged is None or self._judged.key != (model, method, budget):
            self._judged = self._judge_method((model, method, budget), judge)
        judged = self._judged
        if judged.error is not None or judged.fitted is None or judged.scores is None:
            raise judged.error or DopError(f"{method} at {budget:g} was not scored")
        ours, full = judged.scores.scores[benchmark], judge.scores(None).scores[benchmark]
        return {
            "score": ours.score,
            "unit": ours.unit,
            "num_samples": ours.num_samples,
            "relative": 100.0 * ours.score / full.score if full.score else None,
            "difference_ci95": difference_ci95(ours, full, bench.config.seed, smoothed=False),
            "flops_ratio": judged.fitted.flops_ratio,
            **(judged.times or {}),
            "hyperparameters": dict(judged.fitted.hyperparameters),
            "notes": list(judged.fitted.notes),
        }, np.array([sample.value for sample in ours.samples])

    def summarize(self, bench: Workbench, results: ResultFile) -> dict[str, Any]:
        """See base class."""
        return summarize(results, self.reference)

    @staticmethod
    def texts(result: Result) -> dict[str, str]:
        """``table.md``, ``table.tex``, ``table.csv``, and the published numbers, ``published.md``."""
        return tables(result)

    @staticmethod
    def table(result: Result) -> Table:
        """A line per model, method and budget, as far as a terminal is wide; ``table.md`` has every benchmark."""
        head, lines = cells(result)
        shown = [index for index, name in enumerate(head) if name in SHOWN]
        made = Table(title=markdown.__doc__, title_justify="left")
        for index in shown:
            made.add_column(head[index], justify="right")
        for line in lines:
            made.add_row(*(line[index] for index in shown))
        return made

    # -- one model, one method ----------------------------------------------------------------------

    def _judge_of(self, bench: Workbench, model: str) -> SuiteJudge:
        """What scores a model; the one before it is let go."""
        if self._judge is None or self._judge_name != model or self._bench is None:
            config = bench.config
            if model == config.model.name_or_path:
                self._bench = bench
            else:
                config = config.model_copy(update={"model": _model_config(model)})
                self._bench = self._judge = None
                self._bench = Workbench(config, load(**config.model.model_dump()), bench.progress)
            folder = Path(config.cache_dir) / EVALUATION_FOLDER
            self._judge = SuiteJudge(self._bench.loaded, config.eval, folder, bench.progress)
            self._judge_name = model
        return self._judge

    def _judge_method(self, key: tuple[str, str, float], judge: SuiteJudge) -> _Judged:
        bench, (model, method, budget) = self._bench, key
        if bench is None:
            raise ConfigError(f"no model {model!r} is loaded")
        try:
            fitted = bench.fit(method, budget)
            save_strategy(bench.config, f"{Path(model).name}-{method}-{budget:g}", fitted)
            times = None
            if self.num_timing_rounds and method != FULL:
                samples = bench.data("search").samples[:TIMED_SAMPLES]
                times = prefill_times(bench.loaded, samples, fitted, self.num_timing_rounds)
            return _Judged(key, fitted, judge.scores(fitted), times)
        except DopError as error:
            return _Judged(key, error=error)


def _model_config(name: str) -> ModelConfig:
    path = config_dir() / "model" / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(unknown("model", name, [item.stem for item in sorted(path.parent.glob("*.yaml"))]))
    return parse_section(yaml.safe_load(path.read_text(encoding="utf-8")), ModelConfig, "model")


# -- all rows --------------------------------------------------------------------------------------


def summarize(results: ResultFile, reference: str) -> dict[str, Any]:
    """Per model, method and budget: relative mean, FLOPs, prefill time and the test against ``reference``.

    ``relative_mean``: mean over the benchmarks of the per cent of the full model's score; only where all are measured.
    ``ci95``: of that mean, from the benchmarks' own intervals, which are of independent samples. ``p``: of the paired
    difference to ``reference`` at the same budget in what the questions were worth, every benchmark weighted alike, by
    sign flips; adjusted by Holm over the table of a model.
    """
    groups: dict[tuple[str, str, float], list[Row]] = {}
    for row in results.rows:
        groups.setdefault((row["model"], row["method"], row["budget"]), []).append(row)
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in results.rows))
    found: list[Row] = []
    for (model, method, budget), rows in groups.items():
        whole = [row for row in rows if row.get("relative") is not None]
        item: Row = {"model": model, "method": method, "budget": budget}
        if reason := next((row[name] for row in rows for name in (INFEASIBLE, FAILED) if name in row), None):
            item["reason"] = reason
        elif len(whole) == len(benchmarks):
            item |= _relative_mean(whole) | {"flops_ratio": whole[0]["flops_ratio"]}
            item["prefill_ms_ratio"] = whole[0].get("prefill_ms_ratio")
            item["p"] = _p_value(results, item, reference, benchmarks)
        found.append(item)
    for model in dict.fromkeys(item["model"] for item in found):
        tested = [item for item in found if item["model"] == model and item.get("p") is not None]
        for item, p_value in zip(tested, holm([item["p"] for item in tested]), strict=True):
            item["p"] = p_value
    return {"reference": reference, "benchmarks": benchmarks, "methods": found}


def _relative_mean(rows: list[Row]) -> Row:
    mean = float(np.mean([row["relative"] for row in rows]))
    errors = []
    for row in rows:
        low, high = row["difference_ci95"]
        full = 100.0 * row["score"] / row["relative"] if row["relative"] else row["score"]
        errors.append(100.0 * (high - low) / (2 * 1.96) / full if full else 0.0)
    half = 1.96 * float(np.sqrt(np.sum(np.square(errors)))) / len(rows)
    return {"relative_mean": mean, "ci95": (mean - half, mean + half)}


def _p_value(results: ResultFile, item: Row, reference: str, benchmarks: list[str]) -> float | None:
    """The unadjusted p-value of a method against the reference; ``None`` where there is nothing to compare."""
    if item["method"] in (reference, FULL):
        return None
    key = {name: item[name] for name in ("model", "method", "budget")}
    differences = []
    for benchmark in benchmarks:
        theirs = results.per_sample({**key, "benchmark": benchmark})
        ours = results.per_sample({**key, "method": reference, "benchmark": benchmark})
        if theirs is None or ours is None or len(theirs) != len(ours):
            return None
        differences.append((theirs - ours) / len(theirs))
    return sign_flip_p(np.concatenate(differences))
