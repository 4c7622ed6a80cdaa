"""Intervals and tests for means of heavy-tailed samples, such as KL per sample.

A few samples carry most of a mean KL, and a percentile bootstrap is then too narrow: drawn from this project's own
rows it covers 73 to 95 % instead of 95 %. The studentized bootstrap (P. Hall, *Theoretical Comparison of Bootstrap
Confidence Intervals*, Annals of Statistics 16, 1988) covers 94 to 98 % with a thousand samples, and with 192 wherever
more than a handful of samples carry the mean, see :func:`num_dominant`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

NUM_RESAMPLES = 2000
MIN_RESAMPLED = 20
"""From so many samples on intervals are by bootstrap."""
MIN_DOMINANT = 8
"""With fewer samples than these carrying a mean (:func:`num_dominant`), its interval is likely to be too narrow."""


def mean_ci95(values: ArrayLike, seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> tuple[float, float] | None:
    """95 % bootstrap-t interval of the mean of ``values`` (``[num_samples]``); ``None`` below two samples.

    For a paired comparison pass the differences per sample. Below :data:`MIN_RESAMPLED` samples it is Student's, as
    resamples that miss the few large values have almost no spread. No limit is outside the range of the values, from
    :data:`MIN_RESAMPLED` on, and none is below 0 where no value is. Equal values give an interval of width 0.
    """
    data = np.asarray(values, dtype=np.float64)
    num = len(data)
    if num < 2:
        return None
    mean, error = float(data.mean()), float(data.std(ddof=1)) / float(np.sqrt(num))
    if error == 0.0:
        return mean, mean
    lowest, highest = (0.0 if data.min() >= 0.0 else -np.inf), np.inf
    if num < MIN_RESAMPLED:
        low, high = stats.t.ppf((0.025, 0.975), num - 1)
    else:
        low, high = np.percentile(_studentized(data, mean, seed, num_resamples), (2.5, 97.5))
        lowest, highest = data.min(), data.max()
    return float(max(mean - high * error, lowest)), float(min(mean - low * error, highest))


def _studentized(data: NDArray[np.float64], mean: float, seed: int, num_resamples: int) -> NDArray[np.float64]:
    """``(mean of a resample - mean) / its standard error``, of the resamples that have one."""
    rng, num = np.random.default_rng(seed), len(data)
    found = []
    block = max(1, 2_000_000 // num)
    for start in range(0, num_resamples, block):
        drawn = data[rng.integers(0, num, (min(block, num_resamples - start), num))]
        means, errors = drawn.mean(axis=1), drawn.std(axis=1, ddof=1) / np.sqrt(num)
        varied = errors > 0.0
        found.append((means[varied] - mean) / errors[varied])
    return np.concatenate(found)


def sign_flip_p(differences: ArrayLike, seed: int = 0, num_resamples: int = 9999) -> float:
    """Two-sided p-value that paired ``differences`` (``[num_samples]``) are symmetric around 0, by flipping signs.

    Exact where all ``2 ** num_samples`` flips are fewer than ``num_resamples``. NaN below two samples.
    """
    data = np.asarray(differences, dtype=np.float64)
    data = data[data != 0.0]  # flipping a zero changes nothing
    if len(data) < 2:
        return 1.0 if len(np.atleast_1d(differences)) > 1 else float("nan")
    exact = 2 ** len(data) <= num_resamples
    if exact:
        null = np.array(list(product((1.0, -1.0), repeat=len(data)))) @ data
    else:
        null = _random_flips(data, seed, num_resamples)
    observed = data.sum()
    tolerance = 100 * np.finfo(np.float64).eps * abs(observed)  # values that are equal but for rounding are equal
    tail = min(np.sum(null <= observed + tolerance), np.sum(null >= observed - tolerance))
    return float(min(1.0, 2 * (tail + (not exact)) / (len(null) + (not exact))))


def _random_flips(data: NDArray[np.float64], seed: int, num_resamples: int) -> NDArray[np.float64]:
    """Sums under random signs, those that ``scipy.stats.permutation_test`` draws, which takes ten times as long."""
    rng, block = np.random.default_rng(seed), max(1, 2_000_000 // len(data))
    sums = []
    for start in range(0, num_resamples, block):
        drawn = rng.integers(0, 1 << 32, (min(block, num_resamples - start), len(data)), dtype=np.uint32) & 1
        sums.append(2.0 * (drawn @ data) - data.sum())
    return np.concatenate(sums)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for a table of tests (S. Holm, 1979), in the order given; the familywise error holds."""
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values)
    adjusted = np.empty_like(values)
    factors = np.arange(len(values), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * factors))
    return [float(value) for value in adjusted]


def num_dominant(values: ArrayLike, share: float = 0.9) -> int:
    """How many samples, the largest first, carry ``share`` of the mean of ``|values|``; 0 if all are 0."""
    sizes = np.sort(np.abs(np.asarray(values, dtype=np.float64)))[::-1]
    total = sizes.sum()
    return 0 if total == 0.0 else int(np.searchsorted(np.cumsum(sizes), share * total * (1 - 1e-12))) + 1
