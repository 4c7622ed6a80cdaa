"""What every solver takes and returns."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dop_search.search.space import Space
from dop_search.search.store import EvaluationStore, FloatArray
from dop_search.search.surrogate import Surrogate
from dop_search.strategy import Strategy
from dop_search.strategy.cost.budget import Budget
from dop_search.strategy.cost.model import CostModel
from dop_search.utils.errors import BudgetError, ConfigError


@dataclass(frozen=True)
class Problem:
    """A space with its price and what is known of its divergence: the additive estimate, and exact evaluations."""

    space: Space
    cost_model: CostModel
    surrogate: Surrogate | None = None
    store: EvaluationStore | None = None

    def need_surrogate(self, solver: str) -> Surrogate:
        """The surrogate, or ConfigError naming the solver that needs it."""
        if self.surrogate is None:
            raise ConfigError(f"solver {solver!r} needs the additive surrogate: measure the curves first")
        return self.surrogate

    def need_store(self, solver: str) -> EvaluationStore:
        """The evaluation store, or ConfigError naming the solver that needs it."""
        if self.store is None:
            raise ConfigError(f"solver {solver!r} evaluates strategies on data: give it an evaluation store")
        return self.store


@dataclass(frozen=True)
class Solution:
    """A strategy that a solver chose.

    Attributes:
        strategy: canonical, within the budget.
        assignment: the parameters' levels it comes from.
        cost_ratio: cost relative to the full model, in the budget's kind.
        kl_additive: the surrogate's estimate in nats.
        kl_search: measured KL in nats, mean over the search set.
        num_validation_runs: strategies evaluated on the whole search set by this solver.
        seconds: wall time of the solver.
        solver: its name.
        per_sample_nats: measured divergence per sample, for confidence intervals.
        history: one JSON-ready dictionary per candidate or trial, in order.
        kl_decision: measured KL in nats, mean over the samples that decided among the last few; ``None`` for others.
    """

    strategy: Strategy
    assignment: Mapping[str, int]
    cost_ratio: float
    kl_additive: float | None
    kl_search: float | None
    num_validation_runs: int
    seconds: float
    solver: str
    per_sample_nats: FloatArray | None = field(default=None, compare=False, repr=False)
    history: Sequence[Mapping[str, Any]] = field(default=(), compare=False, repr=False)
    kl_decision: float | None = None

    def measured(self, per_sample_nats: FloatArray) -> MeasuredSolution:
        """This solution with what was measured of it on every search sample (``[num_samples]``)."""
        measured = {"kl_search": float(per_sample_nats.mean()), "per_sample_nats": per_sample_nats}
        return MeasuredSolution(**vars(self) | measured)


@dataclass(frozen=True)
class MeasuredSolution(Solution):
    """A solution that was evaluated on the search set."""

    kl_search: float
    per_sample_nats: FloatArray = field(compare=False, repr=False)


def uniform_assignment(
    problem: Problem, budget: Budget, depths: Mapping[str, int] | None = None
) -> dict[str, int] | None:
    """Uniform token reduction: the largest number of visual tokens that fits beside ``depths``, everything else full.

    ``None`` if not even the smallest number of the space fits.
    """
    ratio, space = budget.resolve(problem.cost_model), problem.space
    levels = space.tokens.levels

    def cost(level: int) -> float:
        return problem.cost_model.ratio(space.strategy({**(depths or {}), space.tokens.name: level}))

    low = bisect_right(levels, ratio, key=cost)  # the cost rises with the tokens
    return None if low == 0 else {**space.full, **(depths or {}), space.tokens.name: int(levels[low - 1])}


def uniform_strategy(problem: Problem, budget: Budget) -> Strategy:
    """Uniform token reduction as a strategy; BudgetError if not even the smallest number of visual tokens fits."""
    assignment = uniform_assignment(problem, budget)
    if assignment is None:
        raise BudgetError(
            f"not even one visual token that runs every layer fits into {budget.name}={budget.value:g}; allow more"
        )
    return problem.space.strategy(assignment)


def as_assignment(space: Space, indices: np.ndarray[Any, Any]) -> dict[str, int]:
    """Level indices ``[params]`` as names and levels."""
    return {p.name: int(p.levels[int(i)]) for p, i in zip(space.parameters, indices, strict=True)}
