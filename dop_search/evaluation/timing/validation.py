"""How well a latency table predicts: random strategies, predicted and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from dop_search.evaluation.timing.layer_times import image_order, steady_prefill, synthetic_prompt
from dop_search.evaluation.timing.text import columns
from dop_search.evaluation.timing.timing import Clock, OnProgress, interleaved
from dop_search.models.families import adapter_for
from dop_search.pruning import pruned
from dop_search.strategy import Strategy
from dop_search.strategy.cost import CostModel, LatencyTable
from dop_search.strategy.operations import TokenCounts


@dataclass(frozen=True)
class Prediction:
    """One strategy: what the table says and what was measured, in milliseconds and relative to the full model."""

    strategy: Strategy
    flops_ratio: float
    predicted_ms: float
    measured_ms: float
    predicted_ratio: float
    measured_ratio: float

    @property
    def error(self) -> float:
        """Predicted over measured milliseconds, minus 1."""
        return self.predicted_ms / self.measured_ms - 1.0

    @property
    def ratio_error(self) -> float:
        """Predicted over measured ratio to the full model, minus 1."""
        return self.predicted_ratio / self.measured_ratio - 1.0

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        numbers = {name: value for name, value in vars(self).items() if name != "strategy"}
        return {"strategy": self.strategy.describe(), **numbers, "error": self.error, "ratio_error": self.ratio_error}


def random_strategies(
    num_layers: int, num_visual: int, number: int, seed: int = 0, shares: Sequence[float] = (1.0,)
) -> list[Strategy]:
    """Depth-wise strategies, every depth and number of visual tokens equally likely; the canonical ones."""
    draw = np.random.default_rng(seed)
    found: dict[str, Strategy] = {}
    while len(found) < number:
        depths = {name: draw.integers(0, num_layers + 1, len(shares)).tolist() for name in ("q", "kv", "mlp")}
        strategy = Strategy.depthwise(
            num_layers,
            **depths,
            shares=shares,
            num_visual_tokens=int(draw.integers(1, num_visual + 1)),
            selector="uniform_grid",
        ).canonical()
        found.setdefault(strategy.key(), strategy)
    return list(found.values())


def validate_table(
    model: PreTrainedModel,
    table: LatencyTable,
    counts: TokenCounts,
    strategies: Sequence[Strategy],
    *,
    rounds: int = 3,
    clock: Clock = "wall",
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> list[Prediction]:
    """Measure each strategy's prefill on the whole model, in turn with the full one, beside what the table says."""
    adapter, inputs = adapter_for(model), synthetic_prompt(model, counts)
    dims = adapter.dims
    flops, latency = CostModel(dims, [counts]), CostModel(dims, [counts], "latency", latency=table)
    every = [*strategies, Strategy.full(dims.num_layers)]

    def measure(index: int, before: list[float]) -> float:
        with pruned(model, every[index], rankings=[image_order(inputs, model)]):
            return steady_prefill(model, inputs, clock)

    names = ["random strategies against the table"] * len(every)
    readings = interleaved(measure, names, rounds=rounds, seed=seed, on_progress=on_progress)
    full_ms = float(np.median(readings[-1]))
    result = []
    for strategy, values in zip(strategies, readings[:-1], strict=True):
        predicted, measured = latency.absolute(strategy) / 1e6, float(np.median(values))
        ratio = latency.ratio(strategy)
        result.append(Prediction(strategy, flops.ratio(strategy), predicted, measured, ratio, measured / full_ms))
    return result


def summary(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Median and largest absolute error of the milliseconds and of the ratio, and the median signed errors."""
    errors = np.array([item.error for item in predictions])
    ratios = np.array([item.ratio_error for item in predictions])
    return {
        "num_strategies": float(len(predictions)),
        "median_absolute_error": float(np.median(np.abs(errors))),
        "largest_absolute_error": float(np.abs(errors).max()),
        "median_error": float(np.median(errors)),
        "median_absolute_ratio_error": float(np.median(np.abs(ratios))),
        "largest_absolute_ratio_error": float(np.abs(ratios).max()),
    }


def validation_text(predictions: Sequence[Prediction]) -> str:
    """A line per strategy and the errors."""
    rows = [["", "FLOPs", "predicted ms", "measured ms", "error", "predicted ratio", "measured ratio", "error"]]
    for item in sorted(predictions, key=lambda item: item.measured_ms):
        times = [f"{ms:.2f}" for ms in (item.predicted_ms, item.measured_ms)]
        ratios = [f"{ratio:.3f}" for ratio in (item.flops_ratio, item.predicted_ratio, item.measured_ratio)]
        name, errors = item.strategy.describe(), [f"{error:+.1%}" for error in (item.error, item.ratio_error)]
        rows.append([name, ratios[0], *times, errors[0], *ratios[1:], errors[1]])
    found = summary(predictions)
    said = (
        f"{len(predictions)} random strategies: median error {found['median_absolute_error']:.1%} of the time "
        f"(largest {found['largest_absolute_error']:.1%}), {found['median_absolute_ratio_error']:.1%} of the ratio "
        f"to the full model (largest {found['largest_absolute_ratio_error']:.1%}). Aim: 10 %."
    )
    return "\n".join([*columns(rows), "", said])
