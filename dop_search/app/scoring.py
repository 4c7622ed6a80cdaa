"""Task scores of strategies: accuracy on the samples of a validation set, and the benchmarks of a suite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dop_search.app.config import EvalConfig
from dop_search.app.record import RelativeMean, Result, ScoreComparison, SuiteInfo
from dop_search.data.samples import Sample
from dop_search.evaluation import (
    SuiteScores,
    answer_questions,
    correct_answers,
    difference_ci95,
    relative,
    relative_mean,
)
from dop_search.models.loading import LoadedModel
from dop_search.strategy import Strategy
from dop_search.utils.extras import check_extras
from dop_search.utils.progress import Notify, Progress, watch

if TYPE_CHECKING:
    from dop_search.evaluation.suites import Suite

EVALUATION_FOLDER = "evaluation"
"""In the cache directory: scores and per-sample outputs of every model state, rendered rows, lmms-eval's log."""


@dataclass
class AccuracyJudge:
    """Exact match of greedy answers with the annotation; each strategy is judged once.

    Attributes:
        loaded: the model.
        samples: questions with accepted answers; none: everything is ``None``.
        batch_size: samples per generation call.
        max_new_tokens: longest answer.
    """

    loaded: LoadedModel
    samples: Sequence[Sample]
    batch_size: int
    max_new_tokens: int
    _correct: dict[str, np.ndarray] = field(default_factory=dict)

    def correct(self, strategy: Strategy | None, notify: Notify) -> np.ndarray | None:
        """Which answers are right, boolean ``[num_samples]``; ``strategy=None``: the full model."""
        if not self.samples:
            return None
        key = "" if strategy is None else strategy.key()
        if key not in self._correct:
            what = "accuracy of the full model" if strategy is None else f"accuracy of {strategy.describe()}"
            answers = answer_questions(
                self.loaded,
                self.samples,
                strategy,
                batch_size=self.batch_size,
                max_new_tokens=self.max_new_tokens,
                on_progress=partial(notify, what=what),
            )
            self._correct[key] = correct_answers(answers, self.samples)
        return self._correct[key]


@dataclass
class SuiteJudge:
    """The benchmarks of a suite; each strategy is judged once, and a finished benchmark is read back.

    Attributes:
        loaded: the model.
        suite: the benchmarks, with the limit and the batch size.
        work_dir: keeps scores and per-sample outputs by fingerprint.
        progress: where it is shown how far things are.
    """

    loaded: LoadedModel
    suite: Suite
    work_dir: Path
    progress: Progress
    _scores: dict[str, SuiteScores] = field(default_factory=dict)
    _revisions: dict[str, str] | None = None

    def scores(self, strategy: Strategy | None) -> SuiteScores:
        """The scores of a strategy; ``None``: of the full model."""
        from dop_search.evaluation.lmms.hub import check_suite, revisions_of
        from dop_search.evaluation.suite_scores import score_suite

        if self._revisions is None:  # all strategies are judged on the same data, whatever is uploaded meanwhile
            check_suite(self.suite)
            self._revisions = revisions_of(self.suite)
        key = "" if strategy is None else strategy.key()
        if key not in self._scores:
            name = "full model" if strategy is None else strategy.describe()
            with watch(self.progress, f"{self.suite.name}, {name}: ") as notify:
                self._scores[key] = score_suite(
                    self.loaded,
                    self.suite,
                    strategy,
                    work_dir=self.work_dir,
                    on_progress=notify,
                    revisions=self._revisions,
                )
        return self._scores[key]

    def info(self) -> SuiteInfo:
        """The suite's part of a record."""
        return SuiteInfo(
            suite=self.suite.name,
            limit=self.suite.limit,
            batch_size=self.suite.batch_size,
            fingerprint=self.scores(None).fingerprint,
        )

    def judge(self, results: Sequence[Result], seed: int) -> list[Result]:
        """The results with the scores of their strategies and of uniform reduction."""
        judged = []
        for result in results:
            uniform = result.uniform_strategy
            scores, mean = compare(
                self.scores(None),
                self.scores(result.strategy),
                None if uniform is None else self.scores(uniform),
                seed,
            )
            judged.append(result.model_copy(update={"scores": scores, "relative_mean": mean}))
        return judged


def compare(
    full: SuiteScores, pruned: SuiteScores, uniform: SuiteScores | None = None, seed: int = 0
) -> tuple[dict[str, ScoreComparison], RelativeMean]:
    """Benchmark by benchmark, with paired bootstrap intervals, and the relative means.

    Raises:
        DopError: if the sides were not measured on the same samples.
    """
    for side in (pruned, uniform):
        if side is not None:
            relative(side, full)  # refuses different benchmarks
    scores = {}
    for name, theirs in full.scores.items():
        ours = pruned.scores[name]
        other = None if uniform is None else uniform.scores[name]
        scores[name] = ScoreComparison(
            full=theirs.score,
            pruned=ours.score,
            uniform=None if other is None else other.score,
            ci95=difference_ci95(ours, theirs, seed),
            uniform_ci95=None if other is None else difference_ci95(ours, other, seed),
            unit=theirs.unit,
            num_samples=theirs.num_samples,
        )
    means = [None if side is None else relative_mean(side, full) for side in (pruned, uniform)]
    return scores, RelativeMean(pruned=_finite(means[0]), uniform=_finite(means[1]))


def open_suite(config: EvalConfig) -> Suite | None:
    """The suite that a configuration names, with its overrides; ``None`` for ``accuracy`` and ``none``.

    Raises:
        ConfigError: on an unknown suite or benchmark.
        MissingExtraError: without lmms-eval.
    """
    if not config.is_suite:
        return None
    check_extras(f"eval={config.name}", "eval")
    from dop_search.evaluation.suites import load_suite, make_suite

    if config.benchmarks:
        return make_suite(**config.model_dump())
    given = config.model_dump(include=config.model_fields_set - {"name", "benchmarks"})
    return replace(load_suite(config.name), **given)


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value
