"""Confidence intervals by bootstrap over samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


def bootstrap_ci95(values: ArrayLike, seed: int = 0, num_resamples: int = 2000) -> tuple[float, float] | None:
    """95 % percentile interval of the mean of ``values`` (``[num_samples]``); ``None`` below two samples.

    For a paired comparison pass the differences per sample.
    """
    data = np.asarray(values, dtype=np.float64)
    if len(data) < 2:
        return None
    interval = stats.bootstrap(
        (data,), np.mean, n_resamples=num_resamples, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return float(interval.low), float(interval.high)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN if one side is constant."""
    return float(stats.spearmanr(a, b).statistic)
