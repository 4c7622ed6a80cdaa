"""Any selector that ranks before the decoder, with uniform reduction: the kept tokens have all operations."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from dop_search.baselines.base import FitContext, FittedMethod, Method
from dop_search.baselines.equal_flops import nested_strategy, solve_integer
from dop_search.strategy import Strategy


@dataclass(frozen=True)
class UniformReduction(Method):
    """The literature's token pruning before the decoder; solved for the number of tokens ``n_v``.

    Where so few tokens are left that one is a larger step than the tolerance, the last one by rank leaves the decoder
    at the layer that comes nearest.

    Args:
        name: the selector's name, which is also the method's.
        options: of the selector.
    """

    name: str  # type: ignore[misc]
    options: dict[str, Any] = field(default_factory=dict)

    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        num_layers = context.num_layers
        ranked: dict[str, Any] = {"selector": self.name, "selector_options": dict(self.options)}

        def strategy(kept: int) -> Strategy:
            return Strategy.full(num_layers, num_visual_tokens=kept, **ranked)

        def leaving(depth: int, kept: int) -> Strategy:
            return nested_strategy(num_layers, [depth], [kept, kept - 1], num_visual_tokens=kept, **ranked)

        def ratio(item: Strategy) -> float:
            return context.pricing.ratio(item)

        kept = solve_integer(
            lambda n: ratio(strategy(n)), 0, context.num_visual, flops_ratio, f"uniform reduction by {self.name}"
        )
        whole = strategy(kept)
        if num_layers == 1 or not context.pricing.distance_note(ratio(whole), flops_ratio):
            return self.fitted(context, flops_ratio, whole, {"num_visual_tokens": kept})
        if ratio(whole) < flops_ratio:
            kept += 1
        depth = min(range(1, num_layers), key=lambda layer: abs(ratio(leaving(layer, kept)) - flops_ratio))
        facts = {"num_visual_tokens": kept, "last_token_leaves_at": depth}
        note = f"one token is a larger step than the tolerance: token {kept} of {kept} leaves at layer {depth}"
        return self.fitted(context, flops_ratio, leaving(depth, kept), facts, [note])


@dataclass(frozen=True)
class Uniform(Method):
    """Uniform reduction by the context's selector."""

    name = "uniform"
    uses_selector = True

    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        chosen = UniformReduction(context.selector, dict(context.selector_options))
        return replace(chosen.fit(context, flops_ratio), method=self.name)


@dataclass(frozen=True)
class Full(Method):
    """The full model, whatever it may cost."""

    name = "full"

    def fit(self, context: FitContext, flops_ratio: float = 1.0) -> FittedMethod:
        whole = self.fitted(context, 1.0, Strategy.full(context.num_layers), {})
        return replace(whole, flops_ratio=1.0, notes=())  # scored as it is, with the operations that reach no text
