"""Skip-Vision (Zeng et al., ICCV 2025), training-free form: redundant visual tokens skip the MLP in every layer.

The tokens are cut by the context's selector into those with an MLP and the redundant rest, which keep attention.
Solved for the number of tokens with an MLP; where even none is too expensive, a quarter of the tokens has one and the
number of tokens that enter is solved.

Not reproduced: the training, the token merge and the summary tokens of the paper, and the removal of the redundant
tokens' keys before decoding, which prefill FLOPs do not see.
"""

from __future__ import annotations

from dataclasses import dataclass

from dop_search.baselines.base import FitContext, FittedMethod, Method
from dop_search.baselines.equal_flops import solve_integer
from dop_search.strategy import Strategy
from dop_search.strategy.operations import TokenGroup
from dop_search.strategy.policy import GroupPolicy

MLP_SHARE = 0.25


@dataclass(frozen=True)
class SkipVision(Method):
    """Solved for the number of tokens with an MLP, then for the number of tokens."""

    name = "skip_vision"
    uses_selector = True

    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        layers, visual = context.num_layers, context.num_visual
        everywhere = tuple(range(layers))

        def strategy(share: float, kept: int | None) -> Strategy:
            groups = [
                GroupPolicy(everywhere, everywhere, mlp, TokenGroup(part))
                for mlp, part in ((everywhere, share), ((), 1.0 - share))
                if part
            ]
            return Strategy(layers, tuple(groups), num_visual_tokens=kept, **context.ranked())

        def ratio(share: float, kept: int | None) -> float:
            return context.pricing.ratio(strategy(share, kept))

        if ratio(0.0, None) <= flops_ratio:
            with_mlp = solve_integer(lambda n: ratio(n / visual, None), 0, visual, flops_ratio, "Skip-Vision")
            facts: dict[str, float] = {"tokens_with_mlp": with_mlp, "num_visual_tokens": visual}
            return self.fitted(context, flops_ratio, strategy(with_mlp / visual, None), facts)
        kept = solve_integer(lambda n: ratio(MLP_SHARE, n), 0, visual, flops_ratio, "Skip-Vision with fewer tokens")
        facts = {"mlp_share": MLP_SHARE, "num_visual_tokens": kept}
        notes = [f"attention of all tokens alone costs {ratio(0.0, None):.4f}: {kept} of {visual} tokens enter"]
        return self.fitted(context, flops_ratio, strategy(MLP_SHARE, kept), facts, notes)
