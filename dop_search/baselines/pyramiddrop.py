"""PyramidDrop (Xing et al., CVPR 2025, arXiv 2410.17247): drop tokens in steps, each by the last token's attention.

Criterion: :class:`dop_search.pruning.in_decoder.PyramidDropSelector`, computed anew at each stage. Policy: at layers
``L/4, L/2, 3L/4`` the fraction ``lambda`` of the tokens goes on (published: 0.5, so that 15/32 of the tokens are kept
on average). Here ``lambda`` is solved for FLOPs; where less than :data:`SMALLEST_LAMBDA` would be needed, the stages
move forward together (``first, 2 first, 3 first``) until it is not, as papers do that re-tune the method.

Not reproduced: the published code renumbers the positions after each stage; here they stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from dop_search.baselines.base import FitContext, FittedMethod, Method
from dop_search.baselines.equal_flops import nested_strategy, solve_real
from dop_search.strategy import Strategy

SMALLEST_LAMBDA = 0.25
NUM_STAGES = 3


@dataclass(frozen=True)
class PyramidDrop(Method):
    """Solved for ``lambda``, the share of tokens that goes on at each stage."""

    name = "pyramiddrop"

    def strategy(self, num_layers: int, num_visual: int, share: float, first: int) -> Strategy:
        """Stages at ``first``, ``2 first`` and ``3 first``."""
        stages = [first * (index + 1) for index in range(NUM_STAGES)]
        counts = [int(num_visual * share**index + 1e-9) for index in range(NUM_STAGES + 1)]
        return nested_strategy(num_layers, stages, counts, selector="pyramiddrop", selector_options={"stages": stages})

    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        layers, visual = context.num_layers, context.num_visual

        def ratio(share: float, first: int) -> float:
            return context.pricing.ratio(self.strategy(layers, visual, share, first))

        published = max(1, layers // 4)
        first = next((f for f in range(published, 1, -1) if ratio(SMALLEST_LAMBDA, f) <= flops_ratio), 1)
        low = 0.0 if first == 1 else SMALLEST_LAMBDA
        make, what = partial(self.strategy, layers, visual, first=first), f"PyramidDrop with its first stage at {first}"
        share, strategy = context.solve(make, low, 1.0, flops_ratio, what, solve_real)
        notes = [] if first == published else [f"first stage at layer {first} instead of {published}"]
        return self.fitted(context, flops_ratio, strategy, {"lambda": share, "stages": list(strategy.stages)}, notes)
