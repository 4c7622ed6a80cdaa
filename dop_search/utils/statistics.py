"""Bootstraps of medians, ratios and scores, and rank correlation; of means: :mod:`dop_search.utils.intervals`.

SciPy is imported by the functions that use it: ``dop-bench`` runs where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DRAWS_AT_ONCE = 20_000_000


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN if one side is constant."""
    from scipy import stats

    return float(stats.spearmanr(a, b).statistic)


def stratified_bootstrap_ci95(
    values: NDArray[Any],
    strata: NDArray[Any],
    statistic: Callable[[NDArray[Any]], NDArray[Any]],
    seed: int = 0,
    num_resamples: int = 2000,
) -> tuple[float, float]:
    """95 % percentile interval of a function of the column sums of ``values`` (``[num_units, n]``).

    Units are drawn within each of ``strata`` (``[num_units]``), one fewer than there are where there are several, which
    makes the variance of a mean the right one. ``statistic`` takes the sums of all resamples, ``[num_resamples, n]``,
    and returns ``[num_resamples]``.
    """
    rng = np.random.default_rng(seed)
    sums = np.zeros((num_resamples, values.shape[1]))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        size = max(1, len(members) - 1)
        step = max(1, _DRAWS_AT_ONCE // len(members))
        for start in range(0, num_resamples, step):
            rows = min(step, num_resamples - start)
            drawn = rng.integers(0, len(members), size=(rows, size))
            offsets = np.arange(rows)[:, None] * len(members)
            counts = np.bincount((drawn + offsets).ravel(), minlength=rows * len(members)).reshape(rows, -1)
            sums[start : start + rows] += counts @ values[members] * (len(members) / size)
    return percentiles95(statistic(sums))


def percentiles95(draws: NDArray[Any]) -> tuple[float, float]:
    """The ends of the middle 95 % of ``draws``."""
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(low), float(high)


@dataclass(frozen=True)
class Spread:
    """The median of some measurements, its 95 % bootstrap interval and the quartiles."""

    median: float
    ci95: tuple[float, float]
    quartiles: tuple[float, float]
    num_readings: int


def spread(values: Sequence[float], seed: int = 0, num_resamples: int = 2000) -> Spread:
    """Median, percentile bootstrap of the median and quartiles of ``values``."""
    data = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(data), (num_resamples, len(data)))
    first, third = np.percentile(data, [25, 75])
    ci95 = percentiles95(np.median(data[drawn], axis=1))
    return Spread(float(np.median(data)), ci95, (float(first), float(third)), len(data))


def paired_ratio(values: Sequence[float], references: Sequence[float], seed: int = 0) -> Spread:
    """Spread of ``value / reference`` of the same round: what the rounds have in common cancels."""
    return spread([value / reference for value, reference in zip(values, references, strict=True)], seed)
