"""VScan (Zhang et al., TMLR 2026, arXiv 2505.22654), both of its stages.

Before the decoder :class:`dop_search.selectors.vscan.VScanSelector` chooses and merges tokens; its name as a method is
that stage alone. Halfway up the decoder a third of them stays, by the attention of the prompt's last token in the layer
that comes next, which is PyramidDrop's criterion. Published: 96 tokens, then 32 from layer 16 of 32 on, 64 on average;
on Qwen2.5-VL a third from layer 14 of 28 on. The number that enters is solved for FLOPs.

Not reproduced: positions, which the released code counts anew before the decoder and inside it, and which stay here.
"""

from __future__ import annotations

from dataclasses import dataclass

from dop_search.baselines.base import FitContext, FittedMethod, Method
from dop_search.baselines.equal_flops import nested_strategy, solve_integer
from dop_search.strategy import Strategy

SHARE = 1 / 3
"""Of the tokens that enter the decoder, those that stay in its upper half."""


@dataclass(frozen=True)
class VScan(Method):
    """Solved for the number of tokens that enter the decoder."""

    name = "vscan_two_stage"

    def strategy(self, num_layers: int, entering: int) -> Strategy:
        """``entering`` tokens below half of the layers, a third of them from there on."""
        stage = max(1, num_layers // 2)
        return nested_strategy(
            num_layers,
            [stage],
            [entering, round(SHARE * entering)],
            num_visual_tokens=entering,
            selector="pyramiddrop",
            selector_options={"stages": [stage], "before": {"selector": "vscan"}},
        )

    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        """See base class."""
        layers, visual = context.num_layers, context.num_visual
        entering = solve_integer(
            lambda n: context.pricing.ratio(self.strategy(layers, n)), 1, visual, flops_ratio, "VScan with both stages"
        )
        strategy = self.strategy(layers, entering)
        facts = {"entering_tokens": entering, "kept_tokens": round(SHARE * entering), "stages": list(strategy.stages)}
        return self.fitted(context, flops_ratio, strategy, facts)
