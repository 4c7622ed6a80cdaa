"""Interval and test for repeated searches that are scored on the same samples."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from dop_search.utils.intervals import mean_ci95, sign_flip_p


class Crossed(NamedTuple):
    """Of a mean over draws and samples: its 95 % interval, and the p-value that it is 0."""

    ci95: tuple[float, float] | None
    p: float


def crossed(values: ArrayLike) -> Crossed:
    """Of ``values`` ``[num_draws, num_samples]``, where another set of either would give another mean.

    Student's, with the variances of the draws' means and of the samples' means added, and Satterthwaite's degrees of
    freedom; percentiles of a bootstrap of both are too narrow with few draws. One draw is a sample of means.
    """
    data = np.asarray(values, dtype=np.float64)
    if len(data) == 1 or data.shape[1] < 2:
        samples = data.mean(axis=0)
        return Crossed(mean_ci95(samples), sign_flip_p(samples))
    return crossed_means(data.mean(axis=1), data.mean(axis=0))


def crossed_means(of_draws: ArrayLike, of_samples: ArrayLike) -> Crossed:
    """:func:`crossed` from the mean of every draw and of every sample, two at least of each."""
    sides = [np.asarray(side, dtype=np.float64) for side in (of_draws, of_samples)]
    parts = [float(side.var(ddof=1)) / len(side) for side in sides]
    mean, total = float(sides[0].mean()), sum(parts)
    if total == 0.0:
        return Crossed((mean, mean), float(mean == 0.0))
    freedom = total**2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, sides, strict=True))
    error = total**0.5
    half = float(stats.t.ppf(0.975, freedom)) * error
    return Crossed((mean - half, mean + half), 2.0 * float(stats.t.sf(abs(mean) / error, freedom)))
