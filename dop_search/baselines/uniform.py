"""Any selector that ranks before the decoder, with uniform reduction: the kept tokens have all operations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dop_search.baselines.base import FitContext, FittedMethod, Method
from dop_search.baselines.equal_flops import solve_integer
from dop_search.strategy import Strategy


@dataclass(frozen=True)
class UniformReduction(Method):
    """The literature's token pruning before the decoder; solved for the number of tokens ``n_v``.

    Args:
        name: the selector's name, which is also the method's.
        options: of the selector.
    """

    name: str  # type: ignore[misc]
    options: dict[str, Any] = field(default_factory=dict)

    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        """See base class."""
        num_layers = context.num_layers

        def strategy(kept: int) -> Strategy:
            return Strategy.full(
                num_layers, num_visual_tokens=kept, selector=self.name, selector_options=dict(self.options)
            )

        kept = solve_integer(
            lambda n: context.pricing.ratio(strategy(n)),
            0,
            context.num_visual,
            flops_ratio,
            f"uniform reduction by {self.name}",
        )
        return self.fitted(context, flops_ratio, strategy(kept), {"num_visual_tokens": kept})
