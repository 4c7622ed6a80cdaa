"""ShortV (Yuan et al., ICCV 2025, arXiv 2504.00502): visual tokens are frozen in the layers that contribute least.

``LC(l) = KL(visual tokens frozen in layer l ‖ full)`` at the last token of the prompt: no query and no MLP there, still
key and value. The layers of lowest ``LC`` are frozen together. Published: 20 samples of GQA and Flickr30k, 19 of 32
layers, 24 of 40 (:meth:`ShortV.published`). Here ``LC`` is measured on the context's validation samples. At equal FLOPs
as many layers are frozen as the budget asks for; what is still too much is taken off by entering with fewer tokens,
chosen by the context's selector.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from dop_search.baselines.at_prompt import Evaluate
from dop_search.baselines.base import FitContext, FittedMethod, Method
from dop_search.baselines.equal_flops import solve_layers
from dop_search.strategy import Strategy
from dop_search.strategy.policy import GroupPolicy

PUBLISHED_LAYERS: dict[str, tuple[int, ...]] = {
    "llava-1.5-7b": (31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19),
    "llava-1.5-13b": (*(39, 32, 28, 36, 27, 37, 29, 30, 1, 38, 25, 31, 2, 26, 23, 34, 0, 33, 35, 22, 24, 21, 20, 17),),
    "llava-v1.6-7b": (31, 29, 30, 28, 26, 27, 22, 24, 21, 23, 25, 20, 19, 17, 18, 15, 12, 0, 2),
    "llava-v1.6-13b": (
        *(39, 32, 29, 36, 27, 30, 37, 23, 25, 31, 26, 2, 28, 22, 33, 35, 34, 24, 38, 21, 20, 18, 1, 17),
    ),
}
"""Frozen layers, least contribution first."""


@dataclass(frozen=True)
class ShortV(Method):
    """Solved for the number of frozen layers and the number of tokens that enter.

    ``order``: layers to freeze, first first, instead of measuring; must name every layer.
    """

    name = "shortv"
    uses_selector = True
    order: tuple[int, ...] | None = None

    @classmethod
    def published(cls, model: str) -> Strategy:
        """What the released code freezes of a model: a name of :data:`PUBLISHED_LAYERS`."""
        return frozen_strategy(40 if "13b" in model else 32, PUBLISHED_LAYERS[model])

    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        layers, visual = context.num_layers, context.num_visual
        order = self.order or freezing_order(context)

        def strategy(running: int, kept: int) -> Strategy:
            return frozen_strategy(layers, order[: layers - running], **context.entering(kept))

        def ratio(running: int, kept: int) -> float:
            return context.pricing.ratio(strategy(running, kept))

        running, kept, notes = solve_layers(ratio, layers, visual, flops_ratio, "ShortV with {} running layers")
        facts = {"frozen_layers": list(order[: layers - running]), "num_visual_tokens": kept}
        return self.fitted(context, flops_ratio, strategy(running, kept), facts, notes)


def frozen_strategy(num_layers: int, frozen: Collection[int], **fields: object) -> Strategy:
    """No query and no MLP of visual tokens in the ``frozen`` layers, keys and values everywhere."""
    running = tuple(layer for layer in range(num_layers) if layer not in frozen)
    policy = GroupPolicy(q=running, kv=tuple(range(num_layers)), mlp=running)
    return Strategy(num_layers, (policy,), **fields)  # type: ignore[arg-type]


def layer_contributions(evaluate: Evaluate, num_layers: int) -> np.ndarray:
    """``LC`` of every layer in nats (``[num_layers]``); 0 for the last, whose visual states nobody reads.

    ``evaluate``: the ``evaluate_at_prompt`` of a :class:`FitContext`.
    """
    return evaluate([frozen_strategy(num_layers, {layer}) for layer in range(num_layers)])


def freezing_order(context: FitContext) -> tuple[int, ...]:
    """Layers from the least to the greatest contribution, measured once per context."""
    evaluate = context.needs_evaluate_at_prompt("ShortV")
    return context.once("shortv", lambda: from_least(layer_contributions(evaluate, context.num_layers)))


def from_least(contributions: Sequence[float] | np.ndarray) -> tuple[int, ...]:
    """Layers from the least to the greatest contribution; ties start at the deepest."""
    return tuple(sorted(range(len(contributions)), key=lambda layer: (contributions[layer], -layer)))
