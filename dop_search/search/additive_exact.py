"""The provable optimum of the additive surrogate: its whole Pareto front, once, then any budget in microseconds."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dop_search.search.enumeration import Batch, Enumeration, undominated
from dop_search.search.solution import Problem, Solution, as_assignment
from dop_search.search.space import Space
from dop_search.search.store import FloatArray, OnProgress
from dop_search.search.surrogate import IntArray
from dop_search.strategy.cost.budget import Budget
from dop_search.strategy.cost.model import CostModel


@dataclass(frozen=True)
class Front:
    """Every assignment that no other beats in both cost and estimated divergence.

    Attributes:
        space: what was searched.
        cost_model: what it costs.
        total_cost: summed over samples, exact, ascending ``[P]``.
        divergence_nats: the surrogate's estimate, strictly descending ``[P]``.
        indices: level index of every parameter ``[P, params]``.
        seconds: what building it took.
    """

    space: Space
    cost_model: CostModel
    total_cost: IntArray
    divergence_nats: FloatArray
    indices: IntArray
    seconds: float

    @property
    def cost_ratio(self) -> FloatArray:
        """Cost relative to the full model ``[P]``, ascending."""
        return np.asarray(self.total_cost / self.cost_model.full_total)

    def __len__(self) -> int:
        return len(self.total_cost)

    def solve(self, budget: Budget) -> Solution:
        """The least divergent strategy within the budget.

        Raises:
            BudgetError: if nothing fits; it names the smallest feasible value.
        """
        start = time.perf_counter()
        ratio = budget.resolve(self.cost_model)
        # Compared as ratios, so that the ratio of a strategy is itself a budget that the strategy fits.
        row = int(np.searchsorted(self.cost_ratio, ratio, side="right")) - 1
        if row < 0:
            raise budget.infeasible(self.cost_model, float(self.cost_ratio[0]))
        return self.solution(row, time.perf_counter() - start)

    def solution(self, row: int, seconds: float = 0.0) -> Solution:
        """The solution at one point of the front."""
        assignment = as_assignment(self.space, self.indices[row])
        return Solution(
            strategy=self.space.strategy(assignment),
            assignment=assignment,
            cost_ratio=float(self.total_cost[row] / self.cost_model.full_total),
            kl_additive=float(self.divergence_nats[row]),
            kl_search=None,
            num_validation_runs=0,
            seconds=seconds,
            solver="additive_exact",
        )


class _ParetoCollector:
    """Keeps the undominated; what an incumbent equals or beats is of no use."""

    within_slice_dominance = True

    def __init__(self, num_inner: int) -> None:
        empty = np.zeros(0, dtype=np.int64)
        self.best = Batch(empty, empty, np.zeros(0), np.zeros((0, num_inner), dtype=np.int64))

    def keep(self, slice_ids: IntArray, cost: IntArray, divergence: FloatArray) -> NDArray[np.bool_]:
        if len(self.best) == 0:
            return np.ones(len(cost), dtype=np.bool_)
        row = np.searchsorted(self.best.cost, cost, side="right") - 1
        return np.asarray((row < 0) | (self.best.divergence[row] > divergence))

    def add(self, batch: Batch) -> None:
        merged = Batch(
            np.concatenate([self.best.slice_ids, batch.slice_ids]),
            np.concatenate([self.best.cost, batch.cost]),
            np.concatenate([self.best.divergence, batch.divergence]),
            np.concatenate([self.best.choices, batch.choices]),
        )
        same = np.zeros(len(merged), dtype=np.int64)
        self.best = merged.take(undominated(same, merged.cost, merged.divergence))


def pareto_front(problem: Problem, on_progress: OnProgress | None = None) -> Front:
    """Enumerate the space with dominance; exact, coarse passes first so that bounds are tight early."""
    start = time.perf_counter()
    enumeration = Enumeration(problem.need_surrogate("additive_exact"), problem.cost_model)
    collector = _ParetoCollector(len(enumeration.inner))
    for slice_ids, stride in enumeration.coarse_passes():
        enumeration.run(slice_ids, collector, option_stride=stride)
    enumeration.run(np.argsort(enumeration.ideal_cost, kind="stable"), collector, on_progress=on_progress)
    best = collector.best
    return Front(
        problem.space,
        problem.cost_model,
        best.cost,
        best.divergence,
        enumeration.indices(best),
        time.perf_counter() - start,
    )


def additive_exact(problem: Problem, budget: Budget, on_progress: OnProgress | None = None) -> Solution:
    """Build the front and solve one budget; keep the :class:`Front` for several budgets.

    Raises:
        BudgetError: if nothing fits; it names the smallest feasible value.
    """
    start = time.perf_counter()
    front = pareto_front(problem, on_progress)
    solution = front.solve(budget)
    return Solution(**{**vars(solution), "seconds": time.perf_counter() - start})
