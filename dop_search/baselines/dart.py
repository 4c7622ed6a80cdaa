"""DART (Wen et al., EMNLP 2025, arXiv 2502.11494): keep pivots and the tokens that duplicate them least, at layer K =
2.

Criterion: :class:`dop_search.pruning.in_decoder.DartSelector`. Policy as FastV's: the others leave at layer ``K``,
after having had all operations below it. Published: K = 2, 4 + 4 pivots, reduction .667 / .778 / .889 of 576 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from dop_search.baselines.base import FitContext, FittedMethod, Method
from dop_search.baselines.equal_flops import nested_strategy, solve_integer
from dop_search.strategy import Strategy


@dataclass(frozen=True)
class Dart(Method):
    """Solved for the number of tokens kept from layer ``layer`` on."""

    name = "dart"
    layer: int = 2
    num_pivots: int = 4

    def strategy(self, num_layers: int, num_visual: int, kept: int) -> Strategy:
        """Keep ``kept`` of ``num_visual`` tokens from layer ``K`` on."""
        return nested_strategy(
            num_layers,
            [num_layers, self.layer],
            [kept, num_visual - kept],
            num_visual,
            selector="dart",
            selector_options={"stages": [self.layer], "num_pivots": self.num_pivots},
        )

    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        """See base class."""
        layers, visual = context.num_layers, context.num_visual
        kept = solve_integer(
            lambda n: context.pricing.ratio(self.strategy(layers, visual, n)),
            0,
            visual,
            flops_ratio,
            f"DART with K={self.layer}",
        )
        return self.fitted(
            context, flops_ratio, self.strategy(layers, visual, kept), {"K": self.layer, "kept_tokens": kept}
        )
