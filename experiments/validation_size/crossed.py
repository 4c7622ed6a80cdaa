"""An interval for repeated searches that are scored on the same samples."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from dop_search.utils.statistics import percentiles95


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
    return percentiles95(means)
