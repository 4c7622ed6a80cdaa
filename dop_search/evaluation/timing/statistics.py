"""Medians and their spread, with NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Spread:
    """The median of some readings, its 95 % bootstrap interval and the quartiles."""

    median: float
    ci95: tuple[float, float]
    quartiles: tuple[float, float]
    num_readings: int

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


def spread(values: Sequence[float], seed: int = 0, num_resamples: int = 2000) -> Spread:
    """Median, percentile bootstrap of the median and quartiles of ``values``."""
    data = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(data), (num_resamples, len(data)))
    medians = np.median(data[drawn], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    first, third = np.percentile(data, [25, 75])
    return Spread(float(np.median(data)), (float(low), float(high)), (float(first), float(third)), len(data))


def paired_ratio(values: Sequence[float], references: Sequence[float], seed: int = 0) -> Spread:
    """Spread of ``value / reference`` of the same round: what the rounds have in common cancels."""
    return spread([value / reference for value, reference in zip(values, references, strict=True)], seed)
