"""What a method costs, its own rankings included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dop_search.pruning.stages import StagePlan
from dop_search.selectors import SelectionSizes, make_selector
from dop_search.strategy import Strategy
from dop_search.strategy.cost import CostModel
from dop_search.strategy.operations import ModelDims, TokenCounts

TOLERANCE = 0.01
"""How far a fitted ratio may be from its target, relative to the target, without a note."""


class Pricing:
    """Prefill FLOPs on a set of samples, relative to the full model.

    Counted as in :mod:`dop_search.strategy.cost.flops`, plus what the ranking of visual tokens computes, before the
    decoder (``Selector.selection_flops``) or inside it. The vision tower is reported beside the decoder.

    Args:
        counts: text and visual tokens of each sample.
        vision_width: channels of the vision tower; the decoder's width, mostly more, where not given.
        patches_per_token: patches of the tower that one visual token is made of.
    """

    def __init__(
        self,
        dims: ModelDims,
        counts: Sequence[TokenCounts],
        vision_width: int | None = None,
        patches_per_token: int = 1,
    ) -> None:
        self.dims = dims
        self.vision_width, self.patches_per_token = vision_width, patches_per_token
        self.cost_model = CostModel(dims, counts)
        self._unique = Counter(counts)

    def total(self, strategy: Strategy) -> int:
        """FLOPs over all samples."""
        total = self.cost_model.total(strategy)
        if strategy.stages:
            plan = StagePlan(strategy)
            total += sum(weight * plan.flops(self.dims, counts) for counts, weight in self._unique.items())
        return total + self._selection(strategy)

    def selection_ratio(self, strategy: Strategy) -> float:
        """FLOPs of choosing the tokens before the decoder, relative to all of the full model's."""
        return self._selection(strategy) / self.cost_model.full_total

    def _selection(self, strategy: Strategy) -> int:
        """A strategy that keeps all tokens in one group needs no ranking."""
        whole = strategy.num_visual_tokens is None and len(strategy.groups) == 1
        if strategy.ranked_before is None or whole:
            return 0
        selector = make_selector(*strategy.ranked_before)
        width = self.vision_width or self.dims.hidden_size
        total = 0
        for counts, weight in self._unique.items():
            for visual in strategy.parts(counts.images):
                kept = strategy.num_kept(visual)
                if kept < visual or (len(strategy.groups) > 1 and not strategy.stages):
                    sizes = SelectionSizes(visual, kept, self.dims, width, visual * self.patches_per_token)
                    total += weight * selector.selection_flops(sizes)
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
