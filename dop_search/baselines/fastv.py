"""FastV (Chen et al., ECCV 2024, arXiv 2403.06764): drop tokens at layer K by the last token's attention in layer K -
1.

Criterion: :class:`dop_search.pruning.in_decoder.FastVSelector`. Policy: the kept ``n`` tokens have all operations, the
others those of layers below ``K``. Published: K = 2 or 3 with half of the tokens; for an average of ``T`` tokens
``n`` follows from ``T = (K N + (L - K) n) / L``. Here ``n`` is solved for FLOPs and ``K`` stays 2.

Not reproduced: the published code masks instead of dropping and ranks again at each decoding step.
"""

from __future__ import annotations

from dataclasses import dataclass

from dop_search.baselines.base import FitContext, FittedMethod, Method
from dop_search.baselines.equal_flops import nested_strategy, solve_integer
from dop_search.strategy import Strategy


@dataclass(frozen=True)
class FastV(Method):
    """Solved for the number of tokens kept from layer ``layer`` (the paper's K) on."""

    name = "fastv"
    layer: int = 2

    def strategy(self, num_layers: int, num_visual: int, kept: int) -> Strategy:
        """Keep ``kept`` of ``num_visual`` tokens from layer ``K`` on."""
        return nested_strategy(
            num_layers,
            [num_layers, self.layer],
            [kept, num_visual - kept],
            num_visual,
            selector="fastv",
            selector_options={"stages": [self.layer - 1]},
        )

    def kept_for_average(self, average: float, num_layers: int, num_visual: int) -> int:
        """``n`` for an average of ``average`` tokens per layer, rounded."""
        return round((average * num_layers - self.layer * num_visual) / (num_layers - self.layer))

    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        """See base class."""
        layers, visual = context.num_layers, context.num_visual
        kept = solve_integer(
            lambda n: context.pricing.ratio(self.strategy(layers, visual, n)),
            0,
            visual,
            flops_ratio,
            f"FastV with K={self.layer}",
        )
        return self.fitted(
            context, flops_ratio, self.strategy(layers, visual, kept), {"K": self.layer, "kept_tokens": kept}
        )
