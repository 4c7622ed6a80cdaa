"""Scores of strategies on the benchmarks of a suite, compared with the full model's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dop_search.app.record import RelativeMean, Result, ScoreComparison, SuiteInfo
from dop_search.evaluation.runnable import Runnable, strategy_of
from dop_search.evaluation.scores import SuiteScores, difference_ci95, relative_mean
from dop_search.evaluation.suites import Suite
from dop_search.models.loading import LoadedModel
from dop_search.utils.progress import Progress, watch

EVALUATION_FOLDER = "evaluation"
"""In the cache directory: scores and per-sample outputs of every model state, rendered rows, lmms-eval's log."""


@dataclass
class SuiteJudge:
    """The benchmarks of a suite; each strategy is judged once, and a finished benchmark is read back.

    ``work_dir`` keeps scores and per-sample outputs by fingerprint.
    """

    loaded: LoadedModel
    suite: Suite
    work_dir: Path
    progress: Progress
    _scores: dict[str, SuiteScores] = field(default_factory=dict)
    _revisions: dict[str, str] | None = None

    def scores(self, method: Runnable | None) -> SuiteScores:
        """The scores of a strategy or a fitted method; ``None``: of the full model."""
        from dop_search.evaluation.lmms.hub import check_suite, revisions_of
        from dop_search.evaluation.suite_scores import score_suite

        if self._revisions is None:  # all strategies are judged on the same data, whatever is uploaded meanwhile
            check_suite(self.suite)
            self._revisions = revisions_of(self.suite)
        method = strategy_of(method)
        key = "" if method is None else method.key()
        if key not in self._scores:
            name = "full model" if method is None else method.describe()
            with watch(self.progress, f"{self.suite.name}, {name}: ") as notify:
                self._scores[key] = score_suite(
                    self.loaded,
                    self.suite,
                    method,
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
            full, found = self.scores(None), self.scores(result.strategy)
            other = None if uniform is None else self.scores(uniform)
            scores, mean = compare(full, found, other, seed)
            judged.append(result.model_copy(update={"scores": scores, "relative_mean": mean}))
        return judged


def compare(
    full: SuiteScores, pruned: SuiteScores, uniform: SuiteScores | None = None, seed: int = 0
) -> tuple[dict[str, ScoreComparison], RelativeMean]:
    """Benchmark by benchmark with paired intervals, and relative means; DopError if the sides had different samples."""
    means = [None if side is None else relative_mean(side, full) for side in (pruned, uniform)]
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
    return scores, RelativeMean(pruned=_finite(means[0]), uniform=_finite(means[1]))


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value
