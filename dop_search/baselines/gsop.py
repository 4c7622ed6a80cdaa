"""GSOP (Liu et al., arXiv 2507.02909v1): operations removed by greedy sorting, until the FLOPs fit.

The search is in :mod:`dop_search.search.gsop_search`. Published: the first point of the trajectory below the FLOPs
ratio. At equal FLOPs: the last point that costs at least the target, entered with as many tokens fewer as meet it
exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

from dop_search.baselines.base import FitContext, FittedMethod, Method
from dop_search.baselines.equal_flops import solve_integer
from dop_search.search.gsop_search import GsopPoint, GsopSearch


@dataclass(frozen=True)
class Gsop(Method):
    """Solved by search; the trajectory of a context is shared by its budgets."""

    name = "gsop"
    free_nats: float = 1e-3
    stride_nats: float = 0.02
    uses_selector = True

    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        evaluate, strides = context.needs_evaluate("GSOP"), (self.free_nats, self.stride_nats)
        search = context.once(
            ("gsop", *strides), lambda: GsopSearch(evaluate, context.num_layers, context.ranked(), *strides)
        )
        points = search.trajectory(lambda strategy: context.pricing.ratio(strategy) <= flops_ratio)
        point, visual = _last_above(points, context, flops_ratio), context.num_visual
        kept = solve_integer(
            lambda n: context.pricing.ratio(point.with_tokens(n)), 0, visual, flops_ratio, "GSOP with fewer tokens"
        )
        facts = {
            "operations_skipped": len(point.strategy.skipped()),
            "num_visual_tokens": kept,
            "num_evaluations": search.num_evaluations,
            "kl_search_nats": point.divergence,
        }
        notes = [] if kept == visual else [f"{kept} of {visual} tokens enter, to meet the budget exactly"]
        strategy = point.with_tokens(None if kept == visual else kept)
        return self.fitted(context, flops_ratio, strategy, facts, notes)


def _last_above(points: list[GsopPoint], context: FitContext, target: float) -> GsopPoint:
    """The cheapest point of the trajectory that still costs the target; costs fall along it."""
    above = [point for point in points if context.pricing.ratio(point.strategy) >= target]
    return above[-1] if above else points[-1]
