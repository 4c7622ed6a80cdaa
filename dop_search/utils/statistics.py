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


def crossed_bootstrap_ci95(values: ArrayLike, seed: int = 0, num_resamples: int = 2000) -> tuple[float, float] | None:
    """95 % percentile interval of the mean of ``values`` (``[num_draws, num_samples]``) with both axes resampled.

    For repeated searches that are scored on the same samples: another set of either would give another mean. One draw
    is not resampled. ``None`` below two samples.
    """
    data = np.asarray(values, dtype=np.float64)
    num_draws, num_samples = data.shape
    if num_samples < 2:
        return None
    rng = np.random.default_rng(seed)
    rows = rng.multinomial(num_draws, np.full(num_draws, 1 / num_draws), num_resamples) / num_draws
    columns = rng.multinomial(num_samples, np.full(num_samples, 1 / num_samples), num_resamples) / num_samples
    means = np.einsum("rd,ds,rs->r", rows, data, columns, optimize=True)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
