"""Ground truth: the exact divergence of every point of a (coarse) grid of a space."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dop_search.search.solution import MeasuredSolution, Problem
from dop_search.search.store import FloatArray, OnProgress
from dop_search.strategy import Strategy
from dop_search.strategy.cost.budget import Budget
from dop_search.utils.errors import ConfigError


@dataclass(frozen=True)
class EvaluatedGrid:
    """Every distinct strategy of a grid with its exact divergence; of equal ones that of the higher levels."""

    problem: Problem
    assignments: Sequence[Mapping[str, int]]  # [P]
    strategies: Sequence[Strategy]  # [P], canonical
    cost_ratio: FloatArray  # [P], relative to the full model
    per_sample_nats: FloatArray  # [P, num_samples]
    seconds: float

    def best(self, budget: Budget) -> MeasuredSolution:
        """The least divergent point within the budget; BudgetError, with the smallest feasible, if nothing fits."""
        cost_model, surrogate = self.problem.cost_model, self.problem.surrogate
        ratio = budget.resolve(cost_model)
        fits = np.flatnonzero(self.cost_ratio <= ratio)
        if len(fits) == 0:
            raise budget.infeasible(cost_model, float(self.cost_ratio.min()))
        mean = self.per_sample_nats.mean(axis=1)
        row = int(min(fits, key=lambda i: (mean[i], self.cost_ratio[i])))
        return MeasuredSolution(
            strategy=self.strategies[row],
            assignment=self.assignments[row],
            cost_ratio=float(self.cost_ratio[row]),
            kl_additive=None if surrogate is None else surrogate(self.assignments[row]),
            kl_search=float(mean[row]),
            num_validation_runs=len(self.strategies),
            seconds=self.seconds,
            solver="exhaustive",
            per_sample_nats=self.per_sample_nats[row],
        )


def evaluate_grid(
    problem: Problem,
    levels: Mapping[str, Sequence[int]] | None = None,
    max_strategies: int = 20_000,
    max_cost_ratio: float = 1.0,
    on_progress: OnProgress | None = None,
) -> EvaluatedGrid:
    """Evaluate every distinct strategy of the space, or of a grid of it: ``levels`` per parameter, see
    :meth:`Space.with_levels`. Strategies that cost more than ``max_cost_ratio`` are left out.

    Raises:
        ConfigError: if the grid is larger than ``max_strategies``, dead operations merged.
    """
    start = time.perf_counter()
    store = problem.need_store("exhaustive")
    space = problem.space.with_levels(levels or {})
    if space.num_assignments > 50 * max_strategies:
        raise _too_large(space.num_assignments, max_strategies)
    distinct: dict[str, tuple[dict[str, int], Strategy, float]] = {}
    for values in itertools.product(*(reversed(p.levels) for p in space.parameters)):
        assignment = dict(zip(space.names, values, strict=True))
        strategy = space.strategy(assignment)
        key = strategy.key()
        if key not in distinct:
            distinct[key] = (assignment, strategy, problem.cost_model.ratio(strategy))
    points = [point for point in distinct.values() if point[2] <= max_cost_ratio]
    if len(points) > max_strategies:
        raise _too_large(len(points), max_strategies)
    strategies = [strategy for _, strategy, _ in points]
    values_nats = store.evaluate(strategies, on_progress=on_progress, what=f"all {len(points)} strategies of the grid")
    return EvaluatedGrid(
        problem,
        [assignment for assignment, _, _ in points],
        strategies,
        np.array([ratio for _, _, ratio in points]),
        values_nats,
        time.perf_counter() - start,
    )


def exhaustive(
    problem: Problem,
    budget: Budget,
    levels: Mapping[str, Sequence[int]] | None = None,
    num_levels: int | None = None,
    max_strategies: int = 20_000,
    on_progress: OnProgress | None = None,
) -> MeasuredSolution:
    """The true optimum of a grid within a budget; for several budgets use :func:`evaluate_grid` once.

    ``num_levels`` spreads so many levels evenly over each parameter that ``levels`` does not name.

    Raises:
        BudgetError: if nothing fits; it names the smallest feasible value.
        ConfigError: if the grid is larger than ``max_strategies``.
    """
    chosen = dict(levels or {})
    if num_levels is not None:
        for parameter in problem.space.parameters:
            spread = np.linspace(parameter.levels[0], parameter.full, num_levels)
            chosen.setdefault(parameter.name, sorted({parameter.nearest(value) for value in spread}))
    ratio = budget.resolve(problem.cost_model)
    cheapest = problem.space.strategy({p.name: p.levels[0] for p in problem.space.with_levels(chosen).parameters})
    smallest = problem.cost_model.ratio(cheapest)
    if smallest > ratio:
        raise budget.infeasible(problem.cost_model, smallest)
    return evaluate_grid(problem, chosen, max_strategies, ratio, on_progress).best(budget)


def _too_large(number: int, maximum: int) -> ConfigError:
    return ConfigError(
        f"the grid has {number} points, more than `max_strategies={maximum}`; give fewer `levels` or raise the limit"
    )
