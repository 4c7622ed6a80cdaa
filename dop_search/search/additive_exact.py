"""The provable optimum of the additive surrogate: its whole Pareto front, once, then any budget in microseconds.

For each block of numbers of visual tokens (:mod:`~dop_search.search.enumeration`) some good depths are known (*pool*),
ordered by divergence ``D_0 > D_1 > ...``. Depths ``a`` with ``D_(j+1) <= D(a) < D_j`` are of use at some ``n`` only if
they cost less there than pool member ``j + 1``, and so, for any ``x``, only if at one of the block's ends::

    D(a) + x lowered cost(a) / scale  <  D_j + x raised cost(j + 1) / scale

All depths below these *corners* are enumerated, each with the ``x`` of the tangent there; with the pool they are all
that can be on the front at any ``n`` of the block, and few. Corners are left out where even a tangent's cost, beside
every ``n`` of the block, is beaten by points that the pool gives elsewhere. At last all that is left meets every ``n``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dop_search.search.blocks import Depths, undominated
from dop_search.search.enumeration import TOLERANCE, UNLIMITED, Enumeration, Rows
from dop_search.search.solution import Problem, Solution, as_assignment
from dop_search.search.space import Space
from dop_search.search.store import FloatArray, OnProgress
from dop_search.search.surrogate import IntArray
from dop_search.strategy.cost.budget import Budget
from dop_search.strategy.cost.model import CostModel

SHARES = (0.03, 0.1, 0.3, 1.0)
"""How far up to the corners the passes go; all but the last only look for a better pool."""

SLOPE_STEP, DEPTH_STEP = 1.2, 2.0
"""Corners of about the same slope and divergence share a tangent: ratios of either."""

STEPS = 1 << 14
"""Of the staircase of costs; finer ones leave out more."""


class _Staircase:
    """The least divergence that is known up to a cost; of what is worth more, nothing is forgotten."""

    def __init__(self, enumeration: Enumeration, pool: Depths, features: IntArray) -> None:
        parts = [(cost.ravel(), nats.ravel()) for *_, cost, nats in enumeration.by_block(pool, features)]
        cost, nats = (np.concatenate(part) for part in zip(*parts, strict=True))
        self._first = float(cost.min())
        self._step = (float(cost.max()) - self._first) / STEPS or 1.0
        self._nats = np.full(STEPS + 3, np.inf)  # the first stands for what costs less than anything known
        np.minimum.at(self._nats, np.ceil((cost - self._first) / self._step + TOLERANCE).astype(np.int64) + 1, nats)
        self._nats = np.minimum.accumulate(self._nats)

    def at(self, cost: FloatArray) -> FloatArray:
        """A divergence that is reached at no more than ``cost``."""
        step = np.floor((cost - self._first) / self._step - TOLERANCE) + 1
        return np.asarray(self._nats[np.clip(step, 0, STEPS + 2).astype(np.int64)])


@dataclass(frozen=True)
class _Corners:
    """Of one block, by falling divergence: pool members ``[m]`` and the corners between them ``[m - 1]``."""

    nats: FloatArray
    cost: FloatArray  # raised, divided by the scale, at each end [m, ends]
    slope: FloatArray  # of the tangent, rounded
    useful: NDArray[np.bool_]


class _FrontSearch:
    def __init__(self, enumeration: Enumeration) -> None:
        self.enumeration = enumeration

    def depths(self) -> tuple[Depths, IntArray]:
        """All depths that can be on the front, and their features."""
        pool, features, corners = self._corners(self.enumeration.tangents[2])
        for share in SHARES:
            found = self._below(corners, share)
            pool, features, corners = self._corners(Depths.concatenate([pool, *found]))
        return pool, features

    def _corners(self, pool: Depths) -> tuple[Depths, IntArray, list[_Corners]]:
        """The corners of each block, and the pool without depths that it beats in their whole block."""
        enumeration, features = self.enumeration, self.enumeration.features(pool)
        keep, parts, result = np.zeros(len(pool), dtype=np.bool_), [], []
        x, least, _ = enumeration.tangents
        for block, its in enumerate(enumeration.rows_by_block(pool)):
            ends = np.flatnonzero(enumeration.end_block == block)
            weights = features[its].astype(np.float64)
            lowered, raised = (
                (weights @ prices[ends].T + enumeration.fixed) / enumeration.scale[ends]
                for prices in (enumeration.lower, enumeration.upper)
            )
            chosen = undominated(raised.sum(axis=1), pool.divergence[its])
            nats, cost = pool.divergence[its[chosen]], raised[chosen]
            next_one = np.searchsorted(-nats, -pool.divergence[its])
            keep[its] = (lowered <= cost[next_one] * (1 + TOLERANCE)).any(axis=1)
            slope = _hull_slopes(cost.mean(axis=1), nats)
            slope = SLOPE_STEP ** np.round(np.log(slope) / np.log(SLOPE_STEP))
            height = least[:, ends].min(axis=1)
            cheapest = ((height - nats[:-1, None]) / x).max(axis=1).clip(self.enumeration.cheapest[ends].min())
            parts.append((nats, cost, slope, cheapest))
        pool, features = pool.take(keep), features[keep]
        known = _Staircase(enumeration, pool, features)
        for (low, high), (nats, cost, slope, cheapest) in zip(enumeration.blocks, parts, strict=True):
            least_cost = cheapest[:, None] * enumeration.level_scale[low : high + 1] * (1 - TOLERANCE)
            least_nats = nats[1:, None] + enumeration.token_nats[low : high + 1]
            useful = np.asarray((least_nats <= known.at(least_cost)).any(axis=1))
            result.append(_Corners(nats, cost, slope, useful))
        return pool, features, result

    def _below(self, corners: list[_Corners], share: float) -> list[Depths]:
        """The depths below corners; with ``share < 1`` only those that are nearest to the tangents."""
        enumeration = self.enumeration
        ends, bins = [], []
        for e, block in enumerate(enumeration.end_block):
            its = corners[block]
            raised = its.cost[:, self._column(e)]
            its_limits = np.stack([its.nats[:-1] + its.slope * raised[1:], its.nats[:-1], raised[1:]])
            depth = np.floor(np.log(np.maximum(its.nats[:-1] - its.nats[-1], 1e-12)) / np.log(DEPTH_STEP))
            keys, where = np.unique(np.stack([its.slope, depth], 1)[its.useful], axis=0, return_inverse=True)
            limit = np.full((3, len(keys)), -np.inf)
            for which in range(3):
                np.maximum.at(limit[which], where, its_limits[which, its.useful])
            ends.append(np.full(len(keys), e))
            bins.append(np.concatenate([keys[:, :1].T, limit]))
        end, (x, limit, nats, cost) = np.concatenate(ends), np.concatenate(bins, axis=1)
        pairs, pair = np.unique(np.stack([end, x]), axis=1, return_inverse=True)
        bound = enumeration.bound(1.0, pairs[1], pairs[0].astype(np.int64))
        least = bound.min(axis=1)[pair]
        limit = least + share * (limit - least)
        limit += TOLERANCE * np.abs(limit)
        place, kv = np.nonzero(bound[pair] <= limit[:, None])
        top = np.array([corners[b].cost[0, self._column(e)] for e, b in enumerate(enumeration.end_block)])
        top *= 1 + TOLERANCE
        cheap_end, cheap_kv = np.nonzero(self.enumeration.cheapest <= top[:, None])
        unlimited = np.full(len(cheap_end), UNLIMITED)
        rows = Rows(
            np.concatenate([end[place], cheap_end]),
            np.concatenate([kv, cheap_kv]),
            np.concatenate([x[place], np.ones(len(cheap_end))]),
            np.concatenate([limit[place], unlimited]),
            np.concatenate([nats[place], unlimited]),
            np.concatenate([cost[place] * (1 + TOLERANCE), top[cheap_end]]),
        )
        found = []
        for depths, cost, row in enumeration.complete(rows):
            its = np.flatnonzero(self._of_use(corners, depths, rows.end[row], cost))
            if share < 1.0:  # a better pool needs no more than the best at either end
                its = its[undominated(cost[its], depths.divergence[its], rows.end[row][its])]
            found.append(depths.take(its))
        return found

    def _column(self, end: int) -> int:
        """Whether an end is its block's first (0) or second (1)."""
        return int(end > 0 and self.enumeration.end_block[end - 1] == self.enumeration.end_block[end])

    def _of_use(self, corners: list[_Corners], depths: Depths, end: IntArray, cost: FloatArray) -> NDArray[np.bool_]:
        """Whether depths cost no more, at the end where they were found, than the pool's next of less divergence."""
        result = np.zeros(len(depths), dtype=np.bool_)
        order = np.argsort(end, kind="stable")
        cuts = np.searchsorted(end[order], np.arange(len(self.enumeration.ends) + 1))
        for number, (first, last) in enumerate(pairwise(cuts)):
            its, block = order[first:last], self.enumeration.end_block[number]
            column = self._column(number)
            pool = corners[block]
            next_one = np.searchsorted(-pool.nats, -depths.divergence[its], side="left")
            useful = np.concatenate([[True], pool.useful, [False]])[next_one]
            bound = np.append(pool.cost[:, column], -np.inf)[next_one]
            result[its] = useful & (cost[its] <= bound * (1 + TOLERANCE))
        return result


def _hull_slopes(cost: FloatArray, nats: FloatArray) -> FloatArray:
    """How steeply the lower hull of a front falls between its points ``[m - 1]``."""
    hull: list[int] = []
    for i in range(len(cost)):
        while len(hull) > 1 and (nats[hull[-1]] - nats[hull[-2]]) * (cost[i] - cost[hull[-2]]) >= (
            nats[i] - nats[hull[-2]]
        ) * (cost[hull[-1]] - cost[hull[-2]]):
            hull.pop()
        hull.append(i)
    slopes = -np.diff(nats[hull]) / np.diff(cost[hull])
    return np.repeat(slopes, np.diff(hull))


@dataclass(frozen=True)
class Front:
    """Every assignment that no other beats in both cost and estimated divergence."""

    space: Space
    cost_model: CostModel
    total_cost: IntArray  # [P], summed over samples, exact, ascending
    divergence_nats: FloatArray  # [P], the surrogate's estimate, strictly descending
    indices: IntArray  # [P, params], level index of every parameter
    seconds: float

    @property
    def cost_ratio(self) -> FloatArray:
        """Cost relative to the full model ``[P]``, ascending."""
        return np.asarray(self.total_cost / self.cost_model.full_total)

    def __len__(self) -> int:
        return len(self.total_cost)

    def solve(self, budget: Budget) -> Solution:
        """The least divergent strategy within the budget; BudgetError, with the smallest feasible, if nothing fits."""
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


def enumeration_of(problem: Problem) -> Enumeration:
    """The enumeration of a problem, kept on its surrogate."""
    surrogate = problem.need_surrogate("additive_exact")
    kept = surrogate.kept.setdefault(problem.cost_model, {})
    if "enumeration" not in kept:
        kept["enumeration"] = Enumeration(surrogate, problem.cost_model)
    enumeration: Enumeration = kept["enumeration"]
    return enumeration


def pareto_front(problem: Problem, on_progress: OnProgress | None = None) -> Front:
    """The front of the surrogate, exact; kept on the surrogate, so that a further call with it is free."""
    surrogate = problem.need_surrogate("additive_exact")
    kept = surrogate.kept.setdefault(problem.cost_model, {})
    if "front" not in kept:
        start = time.perf_counter()
        what = "exact front of the additive surrogate"
        if on_progress is not None:
            on_progress(0, 1, what)
        enumeration = enumeration_of(problem)
        depths, features = _FrontSearch(enumeration).depths()
        known = _Staircase(enumeration, depths, features)
        found = []
        for its, levels, cost, nats in enumeration.by_block(depths, features):
            row, column = np.nonzero(nats <= known.at(cost))
            found.append((its[row], levels[column]))
        row, level = (np.concatenate(part) for part in zip(*found, strict=True))
        total, estimate = enumeration.cost(features[row], level), depths.divergence[row] + enumeration.token_nats[level]
        best = undominated(total, estimate)
        indices = enumeration.indices(depths.take(row[best]), level[best])
        seconds = time.perf_counter() - start
        kept["front"] = Front(problem.space, problem.cost_model, total[best], estimate[best], indices, seconds)
        if on_progress is not None:
            on_progress(1, 1, what)
    front: Front = kept["front"]
    return front


def additive_exact(problem: Problem, budget: Budget, on_progress: OnProgress | None = None) -> Solution:
    """Solve one budget on the front, which is built once per surrogate and cost model; BudgetError as with it."""
    start = time.perf_counter()
    solution = pareto_front(problem, on_progress).solve(budget)
    return replace(solution, seconds=time.perf_counter() - start)
