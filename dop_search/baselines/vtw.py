"""VTW (Lin et al., AAAI 2025, arXiv 2405.05803): all visual tokens leave the decoder at layer K.

Published: ``K`` is the first layer from 5 on at which the mean KL(pruned ‖ full) of 20 samples at the last token of the
prompt is at most ``eta`` (:data:`PUBLISHED_ETA_NATS`), see :func:`withdrawal_layer`. At equal FLOPs the budget decides
``K`` instead: the smallest whose cost reaches it; what is too much is taken off by entering with fewer tokens, chosen
by the context's selector.
"""

from __future__ import annotations

from dataclasses import dataclass

from dop_search.baselines.at_prompt import Evaluate
from dop_search.baselines.base import FitContext, FittedMethod, Method
from dop_search.baselines.equal_flops import solve_layers
from dop_search.strategy import Strategy
from dop_search.utils.errors import DopError

PUBLISHED_ETA_NATS = {"llava-1.5-7b": 0.003, "llava-1.5-13b": 5e-4, "llava-v1.6-7b": 1e-4}


@dataclass(frozen=True)
class Vtw(Method):
    """Solved for ``K`` and the number of tokens that enter."""

    name = "vtw"
    uses_selector = True

    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        layers, visual = context.num_layers, context.num_visual

        def strategy(exit_layer: int, kept: int) -> Strategy:
            return Strategy.depthwise(layers, exit_layer, exit_layer, exit_layer, **context.entering(kept))

        exit_layer, kept, notes = solve_layers(
            lambda k, n: context.pricing.ratio(strategy(k, n)), layers, visual, flops_ratio, "VTW with K={}"
        )
        facts = {"K": exit_layer, "num_visual_tokens": kept}
        return self.fitted(context, flops_ratio, strategy(exit_layer, kept), facts, notes)


def withdrawal_layer(evaluate: Evaluate, num_layers: int, eta_nats: float, first: int = 5) -> int:
    """The paper's choice of ``K``: the first layer from ``first`` on whose mean KL is at most ``eta_nats``; DopError if
    no layer is.

    Args:
        evaluate: ``evaluate_at_prompt`` of a :class:`FitContext`, whose values the published ``eta`` are.
        eta_nats: the most that may be lost, such as one of :data:`PUBLISHED_ETA_NATS`.
        first: the first layer that is considered.
    """
    candidates = range(first, num_layers)
    scores = evaluate([Strategy.depthwise(num_layers, k, k, k) for k in candidates])
    for layer, score in zip(candidates, scores, strict=True):
        if score <= eta_nats:
            return layer
    raise DopError(
        f"no layer from {first} on keeps the KL at or below `eta_nats`={eta_nats}; the lowest is {min(scores):.4f}"
    )
