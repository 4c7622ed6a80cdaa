"""Our own searches as methods beside the published ones: the best strategy of spaces and selectors at a FLOPs ratio."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from dop_search.baselines.base import FitContext, FittedMethod, Method
from dop_search.baselines.pricing import Pricing
from dop_search.baselines.uniform import UniformReduction
from dop_search.divergence.profiling import MeasuredProfile
from dop_search.search import Option, gsop_option, gsop_search, joint_search
from dop_search.search.options import GSOP
from dop_search.selectors import SELECTORS
from dop_search.strategy.cost import Budget
from dop_search.utils.errors import BudgetError, CacheError, DopError, MemoryLimitError, NumericalError

SPACES = ("dop", "dop_split", "dop_groups")
"""Spaces that are methods by their names."""
SEARCHED_SPACES = ("dop_split", "gsop")
SEARCHED_SELECTORS = ("divprune_lazy", "vispruner")
"""What ``dop_search``, and ``selector=any space=any``, choose among; a model need not have all of these selectors."""
FAILURES = (NumericalError, CacheError, MemoryLimitError)
"""Measurements that failed, not choices that a model or a budget cannot have."""


@dataclass(frozen=True)
class SpaceSearch(Method):
    """One study over spaces and selectors: the surrogate's candidates, exact KL, at a ratio with the selector's cost.

    Args:
        spaces: to choose among; ``gsop`` is GSOP's trajectory with any number of tokens.
        selectors: to choose among; those that the model cannot have are left out. None: the context's.
        num_proposals: strategies that the surrogates propose.
        num_sampled: that Optuna's sampler tries after them.
    """

    name: str  # type: ignore[misc]
    spaces: tuple[str, ...]
    selectors: tuple[str, ...] = ()
    num_proposals: int = 16
    num_sampled: int = 0
    uses_selector = True

    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        options, left_out = search_options(context, self.spaces, self.selectors, Budget(flops_ratio=flops_ratio))
        found = joint_search(
            options,
            self.num_proposals,
            self.num_sampled,
            decide=context.decide if len(options) > 1 else None,
            on_progress=context.on_progress,
        )
        priced = ((item, context.pricing.ratio(item.strategy)) for item in found)
        best = next((item for item, ratio in priced if not context.pricing.distance_note(ratio, flops_ratio)), found[0])
        strategy = replace(best.strategy, model_fingerprint=None)
        facts = {
            "strategy": strategy.describe(),
            "selector": strategy.selector,
            "kl_additive": best.kl_additive,
            "kl_search_nats": best.kl_search,
            "num_validation_runs": sum(its.num_curve_runs for its in options) + best.num_validation_runs,
        }
        if best.kl_decision is not None:
            facts["kl_decision_nats"] = best.kl_decision
        return self.fitted(context, flops_ratio, strategy, facts, left_out)


def search_options(
    context: FitContext,
    spaces: Sequence[str | None],
    selectors: Sequence[str | None],
    budget: Budget,
    prepared: Callable[[MeasuredProfile], MeasuredProfile] = lambda profile: profile,
) -> tuple[list[Option], list[str]]:
    """Every pair of a space and a selector, with what is left of the budget beside what the selector computes; DopError
    if there is no pair, or a measurement fails.

    Args:
        context: measures the curves; keeps GSOP's trajectories for other budgets.
        spaces: names, ``gsop`` among them; ``None``: the configured one.
        selectors: names; ``None``, or none at all: the context's.
        budget: of the whole.
        prepared: what is done to a profile before it is priced, such as adding layer times.

    Returns:
        The options, and which pairs this model or budget cannot have.
    """
    found: list[Option] = []
    errors: dict[str, DopError] = {}
    with_curves = next((space for space in spaces if space != GSOP), "uniform")  # GSOP needs that of tokens alone
    for space, selector in itertools.product(spaces, selectors or (None,)):
        name = selector or context.selector
        try:
            profile = prepared(context.needs_profile(with_curves if space == GSOP else space, selector))
            left = without_selection(context.pricing, profile, budget)
            problem = profile.problem(left)
            option = Option(name, problem.space.name, problem, left, num_curve_runs=profile.curves.num_validation_runs)
            if budget.kind == "flops":
                expected = budget.resolve(problem.cost_model) - left.resolve(problem.cost_model)
                option = replace(option, selection=context.pricing.selection_ratio, expected=expected)
            if space == GSOP:
                search = context.once(("trajectory", name), partial(gsop_search, problem))
                option = gsop_option(option, search, context.on_progress)
            found.append(option)
        except FAILURES:
            raise
        except DopError as error:  # not for this model, or not so cheap
            errors[f"{space or 'the space'} over {name}"] = error
    if not found:
        raise next(iter(errors.values()))
    return found, [f"left out: {name} ({error})" for name, error in errors.items()]


def without_selection(pricing: Pricing, profile: MeasuredProfile, budget: Budget) -> Budget:
    """A FLOPs budget without what the profile's selector computes, which may depend, a little, on the tokens it keeps;
    any other budget as it is. Where the optimum keeps all tokens, others that do not are still to fit.

    Raises:
        BudgetError: if it leaves nothing.
    """
    if budget.kind != "flops":
        return budget
    ratio = left = budget.resolve(profile.prices("flops"))
    overhead, fewer = 0.0, profile.space.tokens.full - 1
    for _ in range(3):
        best = profile.solve(Budget(flops_ratio=left))
        best = replace(best, num_visual_tokens=fewer) if best.num_visual_tokens is None else best
        overhead = max(overhead, pricing.selection_ratio(best))
        left = ratio - overhead
        if left <= 0.0:
            raise BudgetError(f"the selector alone costs {overhead:.4f} of the FLOPs, but {ratio:g} is asked for")
    return budget if overhead == 0.0 else Budget(flops_ratio=left)


@dataclass(frozen=True)
class UniformSearch(Method):
    """Uniform reduction by the selector with the least KL on the samples: choosing one is nobody's advantage then."""

    name = "uniform_search"

    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        measured = list(self._measured(context, flops_ratio))
        if not measured:
            raise BudgetError(f"no selector leaves enough for uniform reduction to {flops_ratio:g} of the FLOPs")
        divergence, best = min(measured, key=lambda item: item[0])
        facts = {"selector": best.method, "kl_search_nats": divergence, **best.hyperparameters}
        return replace(best, method=self.name, hyperparameters=facts)

    def _measured(self, context: FitContext, flops_ratio: float) -> Iterator[tuple[float, FittedMethod]]:
        for selector in SELECTORS:
            try:
                fitted = UniformReduction(selector).fit(context, flops_ratio)
                store = context.needs_store(self.name, selector)
                divergence = float(store.evaluate([fitted.needs_strategy()]).mean())
            except FAILURES:
                raise
            except DopError:  # not for this model, or not so cheap, which merging finds out as it runs
                continue
            yield divergence, fitted
