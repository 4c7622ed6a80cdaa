"""Our own searches as methods beside the published ones: the best strategy of spaces and selectors at a FLOPs ratio."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dop_search.baselines.base import FitContext, FittedMethod, Method
from dop_search.baselines.pricing import Pricing
from dop_search.baselines.uniform import UniformReduction
from dop_search.divergence.profiling import MeasuredProfile
from dop_search.search import MeasuredSolution, Option, joint_search
from dop_search.selectors import SELECTORS
from dop_search.strategy.cost import Budget
from dop_search.utils.errors import BudgetError, DopError, NumericalError

SPACES = ("dop", "dop_split", "dop_groups")
"""Spaces that are methods by their names."""
SEARCHED_SELECTORS = ("cls_attention", "received_attention", "divprune", "cdpruner_llm", "vispruner")
"""That ``dop_search`` chooses among, by attention, diversity and relevance; a model need not have all of them."""


@dataclass(frozen=True)
class SpaceSearch(Method):
    """One study over spaces and selectors: the surrogate's candidates, exact KL, at a ratio with the selector's cost.

    Args:
        name: of the method.
        spaces: to choose among.
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
        """See base class."""
        options, left_out = self._options(context, flops_ratio)
        found = joint_search(
            [option for option, _ in options],
            self.num_proposals,
            self.num_sampled,
            on_progress=context.on_progress,
        )
        best = next((item for item in found if self._uses_up(context, item, flops_ratio)), found[0])
        curves = {id(profile.curves): profile.curves for _, profile in options}.values()
        strategy = replace(best.strategy, model_fingerprint=None)
        facts = {
            "strategy": strategy.describe(),
            "selector": strategy.selector,
            "kl_additive": best.kl_additive,
            "kl_search_nats": best.kl_search,
            "num_validation_runs": sum(its.num_validation_runs for its in curves) + best.num_validation_runs,
        }
        return self.fitted(context, flops_ratio, strategy, facts, left_out)

    @staticmethod
    def _uses_up(context: FitContext, solution: MeasuredSolution, flops_ratio: float) -> bool:
        return not context.pricing.distance_note(context.pricing.ratio(solution.strategy), flops_ratio)

    def _options(
        self, context: FitContext, flops_ratio: float
    ) -> tuple[list[tuple[Option, MeasuredProfile]], list[str]]:
        found: list[tuple[Option, MeasuredProfile]] = []
        errors: dict[str, DopError] = {}
        for space in self.spaces:
            for selector in self.selectors or (None,):
                try:
                    profile = context.needs_profile(space, selector)
                    budget = without_selection(context.pricing, profile, flops_ratio)
                except DopError as error:
                    errors[f"{space} over {selector or context.selector}"] = error
                    continue
                name = selector or context.selector
                found.append((Option(name, space, profile.problem(budget), budget), profile))
        if not found:
            raise next(iter(errors.values()))
        return found, [f"left out: {name} ({error})" for name, error in errors.items()]


def without_selection(pricing: Pricing, profile: MeasuredProfile, flops_ratio: float) -> Budget:
    """The budget without what the profile's selector computes, which may depend, a little, on the tokens it keeps.

    Raises:
        BudgetError: if it leaves nothing.
    """
    overhead, left = 0.0, flops_ratio
    for _ in range(3):
        overhead = max(overhead, pricing.selection_ratio(profile.solve(Budget(flops_ratio=left))))
        left = flops_ratio - overhead
        if left <= 0.0:
            raise BudgetError(f"the selector alone costs {overhead:.4f} of the FLOPs, but {flops_ratio:g} is asked for")
    return Budget(flops_ratio=left)


@dataclass(frozen=True)
class UniformSearch(Method):
    """Uniform reduction by the selector with the least KL on the samples: choosing one is nobody's advantage then."""

    name = "uniform_search"

    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        """See base class."""
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
            except NumericalError:
                raise
            except DopError:  # not for this model, or not so cheap
                continue
            yield divergence, fitted
