"""Methods that rank once inside the decoder, and from layer K on keep the best tokens only."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dop_search.baselines.base import FitContext, FittedMethod, Method
from dop_search.baselines.equal_flops import nested_strategy, solve_integer
from dop_search.strategy import Strategy


@dataclass(frozen=True)
class OneStage(Method):
    """Solved for the number of tokens kept from layer ``layer`` (the papers' K) on; the name is also the selector's."""

    title: ClassVar[str]
    layer: int = 2

    @abstractmethod
    def selector_options(self) -> Mapping[str, Any]:
        """Options of the criterion, ``stages`` among them."""

    def strategy(self, num_layers: int, num_visual: int, kept: int) -> Strategy:
        """Keep ``kept`` of ``num_visual`` tokens from layer ``K`` on."""
        return nested_strategy(
            num_layers,
            [self.layer],
            [num_visual, kept],
            selector=self.name,
            selector_options=dict(self.selector_options()),
        )

    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        layers, visual = context.num_layers, context.num_visual
        kept = solve_integer(
            lambda n: context.pricing.ratio(self.strategy(layers, visual, n)),
            0,
            visual,
            flops_ratio,
            f"{self.title} with K={self.layer}",
        )
        return self.fitted(
            context, flops_ratio, self.strategy(layers, visual, kept), {"K": self.layer, "kept_tokens": kept}
        )
