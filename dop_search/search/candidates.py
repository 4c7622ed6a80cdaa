"""The best few assignments of the surrogate under a budget, near-optimal ones included."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dop_search.search.additive_exact import enumeration_of, pareto_front
from dop_search.search.blocks import Depths
from dop_search.search.enumeration import TOLERANCE, UNLIMITED, Enumeration, Rows
from dop_search.search.solution import Problem, as_assignment
from dop_search.search.store import FloatArray
from dop_search.search.surrogate import IntArray
from dop_search.strategy.cost.budget import Budget
from dop_search.utils.errors import ConfigError

CandidateMode = Literal["slices", "exact"]

PRICES = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0, 64.0)
"""Prices that are tried, relative to the tangent's at the budget."""

NUM_FIRST_CELLS = 4
"""Cells that are looked at first, for each candidate."""

SHARES = (0.1, 0.3, 1.0)
"""How far up to what is known the passes go."""

FIRST_MARGIN = 0.02
"""How much above the bound candidates are looked for at first, as a share of it; doubled until there are enough."""


@dataclass(frozen=True)
class Candidate:
    """An assignment within the budget: its levels, cost ratio and estimated divergence in nats."""

    assignment: dict[str, int]
    cost_ratio: float
    kl_additive: float


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
    enumeration, full_total = enumeration_of(problem), problem.cost_model.full_total
    search = _BestSearch(enumeration, _largest_cost(budget.resolve(problem.cost_model), full_total))
    found = search.of_cells(k) if mode == "slices" else search.of_all(k)
    if len(found) == 0:
        raise budget.infeasible(problem.cost_model, float(pareto_front(problem).cost_ratio[0]))
    return [
        Candidate(as_assignment(problem.space, row), float(its / full_total), float(value))
        for row, its, value in zip(
            enumeration.indices(found.depths, found.level), found.cost, found.divergence, strict=True
        )
    ]


@dataclass(frozen=True)
class _Points:
    """Assignments within the budget, by rising divergence, then cost."""

    depths: Depths
    level: IntArray
    cost: IntArray
    divergence: FloatArray

    def take(self, rows: IntArray | slice) -> _Points:
        return _Points(self.depths.take(rows), self.level[rows], self.cost[rows], self.divergence[rows])

    def __len__(self) -> int:
        return len(self.level)


class _BestSearch:
    """The least divergent assignments within a cost.

    With ``D(a) + D(n) + price cost(n, a)`` below ``nats + price limit`` somewhere in a block, it is so at one of the
    block's ends, for any ``price``; of a few, each end and kv depth has the one that leaves least.
    """

    def __init__(self, enumeration: Enumeration, limit: int) -> None:
        self.enumeration, self.limit = enumeration, limit
        x, least, _ = enumeration.tangents
        self.token_nats = enumeration.token_nats[enumeration.ends] - enumeration.token_sag[enumeration.end_block]
        every = np.arange(len(enumeration.ends))
        typical = x / np.median(enumeration.scale)
        left = []
        for price in typical:
            ends = [np.interp(price * s, x, column) for s, column in zip(enumeration.scale, least.T, strict=True)]
            left.append(float((self.token_nats + ends).min()) - price * limit)
        self.prices = typical[int(np.argmax(left))] * np.array(PRICES)
        bounds = np.stack(
            [
                enumeration.bound(1.0, price * enumeration.scale, every) + self.token_nats[:, None] - price * limit
                for price in self.prices
            ]
        )
        starts = np.searchsorted(enumeration.end_block, np.arange(len(enumeration.blocks)))
        of_cell = np.minimum.reduceat(bounds, starts, axis=1)  # [prices, B, S]
        best = of_cell.argmax(axis=0)  # one price for both ends, or what is said above does not hold
        self.bound = np.take_along_axis(bounds, best[enumeration.end_block][None], axis=0)[0]  # [E, S]
        self.price = self.prices[best][enumeration.end_block]
        dear = np.minimum.reduceat(enumeration.cheapest * enumeration.scale[:, None], starts) > limit * (1 + TOLERANCE)
        self.cell_bound = np.where(dear, np.inf, of_cell.max(axis=0))  # [B, S]

    def of_cells(self, k: int) -> _Points:
        """The best of each block and kv depths, the ``k`` best of them."""
        enumeration, feasible = self.enumeration, np.isfinite(self.cell_bound)
        order = np.argsort(self.cell_bound, axis=None)[: int(feasible.sum())]
        found: list[_Points] = []
        for first, last in ((0, NUM_FIRST_CELLS * k), (NUM_FIRST_CELLS * k, len(order))):
            block, kv = np.divmod(order[first:last], feasible.shape[1])
            end = np.concatenate([np.flatnonzero(enumeration.end_block == b) for b in block] or [block])
            kv = np.repeat(kv, np.bincount(enumeration.end_block, minlength=len(feasible))[block])
            for price in self.prices:
                found.append(self._points(enumeration.best(end, kv, price * enumeration.scale[end]), 1))
            if sum(map(len, found)) and self._reached(found, k)[1] < np.inf:
                break
        for share in SHARES:
            known, worst = self._reached(found, k)
            nats = np.minimum(known, min(worst, enumeration.largest_nats))[enumeration.end_block]
            nats = self.bound + share * np.maximum(nats - self.bound, 0.0)
            found.append(self._points(self._below(nats, np.isfinite(self.cell_bound)[enumeration.end_block]), 1))
        return self._merged(found, 1).take(slice(0, k))

    def of_all(self, k: int) -> _Points:
        """The ``k`` best of all."""
        lowest, largest = float(self.cell_bound.min()), self.enumeration.largest_nats
        margin = FIRST_MARGIN * max(abs(lowest), FIRST_MARGIN * largest)
        while True:
            below = lowest + margin if np.isfinite(lowest) else largest
            depths = self._below(np.full(self.bound.shape, below), self.bound <= below, beaten=True)
            found = self._points(depths, k)
            enough = int(np.count_nonzero(found.divergence <= below)) >= k
            if enough or below >= largest:
                return found.take(slice(0, k))
            margin *= 2.0

    def _reached(self, found: list[_Points], k: int) -> tuple[FloatArray, float]:
        """The least divergence known in each cell ``[B, S]``, and the ``k``-th of all."""
        known = np.full(self.cell_bound.shape, np.inf)
        for points in found:
            np.minimum.at(known, (points.depths.block, points.depths.kv), points.divergence)
        return known, float(np.partition(known, k - 1, axis=None)[k - 1]) if known.size >= k else np.inf

    def _below(self, nats: FloatArray, wanted: NDArray[np.bool_], beaten: bool = False) -> Depths:
        """Depths whose divergence beside some ``n`` may be at most ``nats`` ``[E, S]`` within the cost."""
        enumeration = self.enumeration
        end, kv = np.nonzero(wanted & (self.bound <= nats))
        nats, price = nats[end, kv], self.price[end, kv]
        left = nats - self.token_nats[end] + price * self.limit
        left += TOLERANCE * (np.abs(nats) + price * self.limit)
        most = nats - np.minimum.reduceat(enumeration.token_nats, enumeration.blocks[:, 0])[enumeration.end_block[end]]
        rows = Rows(end, kv, price * enumeration.scale[end], left, most, np.full(len(end), UNLIMITED))
        found = [depths for depths, *_ in enumeration.complete(rows, beaten)]
        return Depths.concatenate([enumeration.tangents[2].take(slice(0, 1)), *found])

    def _points(self, depths: Depths, per_cell: int) -> _Points:
        enumeration, features, parts = self.enumeration, self.enumeration.features(depths), []
        for its, levels, cost, _ in enumeration.by_block(depths, features):
            row, column = np.nonzero(cost <= self.limit * (1 + TOLERANCE))
            parts.append((its[row], levels[column]))
        row, level = (np.concatenate(part) for part in zip(*parts, strict=True))
        total = enumeration.cost(features[row], level)
        points = _Points(depths.take(row), level, total, depths.divergence[row] + enumeration.token_nats[level])
        return self._merged([points.take(np.flatnonzero(total <= self.limit))], per_cell)

    def _merged(self, found: list[_Points], per_cell: int) -> _Points:
        """All of them in order; of each cell only the best, if ``per_cell`` is 1."""
        level, cost, divergence = (
            np.concatenate([getattr(its, name) for its in found]) for name in ("level", "cost", "divergence")
        )
        depths = Depths(*(np.concatenate([getattr(its.depths, f.name) for its in found]) for f in fields(Depths)))
        points = _Points(depths, level, cost, divergence)
        order = np.lexsort((cost, divergence))
        if per_cell == 1:
            cell = depths.block[order] * self.cell_bound.shape[1] + depths.kv[order]
            order = order[np.sort(np.unique(cell, return_index=True)[1])]
        return points.take(order)


def _largest_cost(ratio: float, full_total: int) -> int:
    """The largest integer cost whose ratio to ``full_total``, as a float, does not exceed ``ratio``."""
    limit = int(ratio * full_total) + 2
    while limit / full_total > ratio:
        limit -= 1
    return limit
