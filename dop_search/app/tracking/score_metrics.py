"""Benchmark scores under the names by which runs are compared: metrics and the columns of a table."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

from dop_search.app.record import RelativeMean, ScoreComparison
from dop_search.strategy import Strategy


def strategy_key(strategy: Strategy) -> str:
    """16 hex digits that name what a strategy computes."""
    return hashlib.sha256(strategy.key().encode()).hexdigest()[:16]


def score_metrics(scores: Mapping[str, ScoreComparison], mean: RelativeMean | None) -> dict[str, float]:
    """``score/gqa``, ``relative/gqa``, ``relative/mean`` and the same of uniform reduction; stable names."""
    values: dict[str, float | None] = {}
    for name, item in scores.items():
        values |= {
            f"score/{name}": item.pruned,
            f"score_full/{name}": item.full,
            f"score_uniform/{name}": item.uniform,
            f"relative/{name}": item.relative_pruned,
            f"relative_uniform/{name}": item.relative_uniform,
        }
        if item.ci95 is not None:
            values |= {f"difference_ci_low/{name}": item.ci95[0], f"difference_ci_high/{name}": item.ci95[1]}
    if mean is not None:
        values |= {"relative/mean": mean.pruned, "relative_uniform/mean": mean.uniform}
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def score_columns(scores: Mapping[str, ScoreComparison]) -> dict[str, list[Any]]:
    """The scores as a table, a row per benchmark; what was not measured is empty."""
    columns: dict[str, list[Any]] = {"benchmark": list(scores)}
    for field in ("full", "pruned", "uniform", "relative_pruned", "relative_uniform", "unit", "num_samples"):
        columns[field] = [getattr(item, field) for item in scores.values()]
    for name, field in (("difference", "ci95"), ("uniform_difference", "uniform_ci95")):
        for side, end in enumerate(("low", "high")):
            intervals = [getattr(item, field) for item in scores.values()]
            columns[f"{name}_ci_{end}"] = [None if interval is None else interval[side] for interval in intervals]
    return columns
