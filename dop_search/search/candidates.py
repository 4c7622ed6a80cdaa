"""The best few assignments of the surrogate under a budget, near-optimal ones included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dop_search.search.enumeration import Enumeration
from dop_search.search.solution import Problem, as_assignment
from dop_search.search.store import FloatArray
from dop_search.search.surrogate import IntArray
from dop_search.strategy.cost.budget import Budget
from dop_search.utils.errors import ConfigError

CandidateMode = Literal["slices", "exact"]

TOKEN_CELLS_PER_OCTAVE = 4


@dataclass(frozen=True)
class Candidate:
    """An assignment within the budget: its levels, cost ratio and estimated divergence in nats."""

    assignment: dict[str, int]
    cost_ratio: float
    kl_additive: float


class _BestCollector:
    """Keeps the ``k`` least divergent within a cost limit, at most one per cell if there are cells."""

    def __init__(self, k: int, limit: int, num_inner: int, cells: IntArray | None, threshold: float = np.inf) -> None:
        empty = np.zeros(0, dtype=np.int64)
        self.within_slice_dominance = cells is not None  # a slice lies in one cell and so needs one candidate
        self.best = None #(empty, empty, np.zeros(0), np.zeros((0, num_inner), dtype=np.int64))
        self.threshold = threshold
        self._k, self._limit, self._cells = k, limit, cells

    def keep(self, slice_ids: IntArray, cost: IntArray, divergence: FloatArray) -> NDArray[np.bool_]:
        return np.asarray((cost <= self._limit) & (divergence < self.threshold))

    def add(self, batch) -> None:
        merged = Batch(
            np.concatenate([self.best.slice_ids, batch.slice_ids]),
            np.concatenate([self.best.cost, batch.cost]),
            np.concatenate([self.best.divergence, batch.divergence]),
            np.concatenate([self.best.choices, batch.choices]),
        )
        order = np.lexsort((merged.cost, merged.divergence))
        if self._cells is not None:
            _, first = np.unique(self._cells[merged.slice_ids[order]], return_index=True)
            order = order[np.sort(first)]
        self.best = merged.take(order[: self._k])
        if len(self.best) == self._k:
            self.threshold = min(self.threshold, float(self.best.divergence[-1]))


def best_candidates(problem: Problem, budget: Budget, k: int = 16, mode: CandidateMode = "slices") -> list[Candidate]:
    """At most ``k`` distinct canonical assignments within the budget, least estimated divergence first.

    ``mode="exact"``: the ``k`` best of the whole space, not only of the front. With every integer number of
    visual tokens these are often one strategy with 71, 72, 73, ... tokens.
    ``mode="slices"`` (default): the best of each cell, the ``k`` best cells. A cell has the same kv (attention)
    depth in every group and numbers of visual tokens within a quarter of an octave, so that candidates differ
    by more than a token or a layer of queries. Both are exact, and in both the first is the surrogate's optimum.

    Raises:
        BudgetError: if nothing fits; it names the smallest feasible value.
    """
    if k < 1:
        raise ConfigError(f"`k >= 1` must hold for the number of candidates, but got (k={k})")
    if mode not in ("slices", "exact"):
        raise ConfigError(f"`mode` must be 'slices' or 'exact', but got {mode!r}")
    enumeration = Enumeration(problem.need_surrogate("rerank"), problem.cost_model)
    full_total = problem.cost_model.full_total
    limit = _largest_cost(budget.resolve(problem.cost_model), full_total)
    if int(enumeration.ideal_cost.min()) > limit:
        raise budget.infeasible(problem.cost_model, _smallest_cost(enumeration) / full_total)
    cells = _cells(enumeration) if mode == "slices" else None
    order = np.argsort(enumeration.ideal_divergence, kind="stable")
    threshold = np.inf
    for slice_ids, stride in enumeration.coarse_passes():  # real candidates, so their k-th is an upper bound
        coarse = _BestCollector(k, limit, len(enumeration.inner), cells, threshold)
        enumeration.run(slice_ids, coarse, option_stride=stride)
        threshold = float(np.nextafter(coarse.threshold, np.inf))
    collector = _BestCollector(k, limit, len(enumeration.inner), cells, threshold)
    enumeration.run(order, collector)
    best = collector.best
    if len(best) == 0:  # the bound of some slice fits, but nothing in it does
        raise budget.infeasible(problem.cost_model, _smallest_cost(enumeration) / full_total)
    return [
        Candidate(as_assignment(problem.space, row), float(cost / full_total), float(divergence))
        for row, cost, divergence in zip(enumeration.indices(best), best.cost, best.divergence, strict=True)
    ]


class _CheapestCollector:
    """Keeps the least cost."""

    within_slice_dominance = True

    def __init__(self) -> None:
        self.cost = int(np.iinfo(np.int64).max)

    def keep(self, slice_ids: IntArray, cost: IntArray, divergence: FloatArray) -> NDArray[np.bool_]:
        return np.asarray(cost < self.cost)

    def add(self, batch) -> None:
        self.cost = min(self.cost, int(batch.cost.min(initial=self.cost)))


def _smallest_cost(enumeration: Enumeration) -> int:
    """The cost of the cheapest assignment, exact whatever the prices are."""
    collector = _CheapestCollector()
    enumeration.run(np.argsort(enumeration.ideal_cost, kind="stable"), collector)
    return collector.cost


def _largest_cost(ratio: float, full_total: int) -> int:
    """The largest integer cost whose ratio to ``full_total``, as a float, does not exceed ``ratio``."""
    limit = int(ratio * full_total) + 2
    while limit / full_total > ratio:
        limit -= 1
    return limit


def _cells(enumeration: Enumeration) -> IntArray:
    """A number per slice: equal depths and numbers of visual tokens of about the same size share it."""
    tokens = np.asarray(enumeration.outer[0].levels)
    bins = np.floor(TOKEN_CELLS_PER_OCTAVE * np.log2(np.maximum(tokens, 1) / tokens[-1]) - 1e-9)
    cells: IntArray = np.unique(bins, return_inverse=True)[1].astype(np.int64)[enumeration.slices[:, 0]]
    for column, parameter in enumerate(enumeration.outer[1:], start=1):
        cells = cells * len(parameter.levels) + enumeration.slices[:, column]
    return cells
