"""What a method costs, its own rankings included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dop_search.cost import CostModel
from dop_search.operations import ModelDims, TokenCounts
from dop_search.pruning.stages import StagePlan
from dop_search.strategy import Strategy

TOLERANCE = 0.01
"""How far a fitted ratio may be from its target, relative to the target, without a note."""


class Pricing:
    """Prefill FLOPs on a set of samples, relative to the full model.

    Counted as in :mod:`dop_search.cost.flops`, plus what rankings inside the decoder compute. Selectors that rank
    before the decoder cost nothing here, as the vision tower does: both are reported beside the decoder.
    """

    def __init__(self, dims: ModelDims, counts: Sequence[TokenCounts]) -> None:
        self.dims = dims
        self.cost_model = CostModel(dims, counts)
        self._unique = Counter(counts)

    def total(self, strategy: Strategy) -> int:
        """FLOPs over all samples."""
        total = self.cost_model.total(strategy)
        if strategy.stages:
            plan = StagePlan(strategy)
            total += sum(weight * plan.flops(self.dims, counts) for counts, weight in self._unique.items())
        return total

    def ratio(self, strategy: Strategy) -> float:
        """FLOPs relative to the full model's."""
        return self.total(strategy) / self.cost_model.full_total

    @staticmethod
    def distance_note(ratio: float, target: float) -> tuple[str, ...]:
        """A note where the nearest achievable ratio is farther from the target than the tolerance."""
        if abs(ratio - target) <= TOLERANCE * target:
            return ()
        return (f"nearest achievable: {ratio:.4f}, {ratio / target - 1:+.1%} off the target {target:.4f}",)
