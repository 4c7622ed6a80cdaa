"""The best strategy of a search space at a FLOPs ratio, what its selector computes included."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from dop_search.app.workbench import Workbench
from dop_search.baselines import FitContext, FittedMethod
from dop_search.search import rerank_all
from dop_search.strategy.cost import Budget
from dop_search.utils.errors import BudgetError

SearchSpace = Literal["dop", "dop_split", "dop_groups"]
SPACES: tuple[str, ...] = get_args(SearchSpace)


def search_space(
    bench: Workbench,
    context: FitContext,
    name: str,
    space: str,
    selector: str,
    budget: float,
    num_candidates: int,
    use_up: bool = False,
) -> FittedMethod:
    """The strategy of a search space at a FLOPs ratio that includes what its selector computes.

    ``use_up``: the best candidate within the tolerance of the budget, where there is one, and not a cheaper one.
    """
    profile = bench.profile(space, selector or None)
    overhead = 0.0
    for _ in range(3):  # what a selection costs may depend, a little, on how many tokens are kept
        left = Budget(flops_ratio=_left(budget, overhead))
        overhead = max(overhead, context.pricing.selection_ratio(profile.solve(left)))
    limit = Budget(flops_ratio=_left(budget, overhead))
    with bench.watch(f"{name} at {budget:g}: ") as notify:
        found = rerank_all(profile.problem(limit), limit, num_candidates, on_progress=notify)
    note = context.pricing.distance_note
    equal = (item for item in found if use_up and not note(context.pricing.ratio(item.strategy), budget))
    best = next(equal, found[0])
    strategy = replace(best.strategy, model_fingerprint=None)
    ratio = context.pricing.ratio(strategy)
    facts = {
        "strategy": strategy.describe(),
        "selector": strategy.selector,
        "kl_additive": best.kl_additive,
        "num_validation_runs": profile.curves.num_validation_runs + best.num_validation_runs,
    }
    return FittedMethod(name, budget, ratio, facts, note(ratio, budget), strategy=strategy)


def _left(budget: float, overhead: float) -> float:
    if overhead >= budget:
        raise BudgetError(f"the selector alone costs {overhead:.4f} of the FLOPs, but {budget:g} is asked for")
    return budget - overhead
