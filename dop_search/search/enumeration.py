"""Enumeration of a space with Lagrangian bounds: what the exact solvers of the surrogate are made of.

An assignment is a number of visual tokens ``n`` and *depths*: exit depths of kv (or attention), queries and MLP per
group. A layer's price is looked up by the sets of groups that run its modules, so that the cost of depths ``a`` is
linear in prices, ``cost(n, a) = sum_f w_f(a) price_f(n)``, where ``w_f >= 0`` counts layers: any function of the
token counts will do, bilinear like FLOPs or measured like latency. Given ``n`` and the kv depths, cost and divergence
are sums over *components*: a role of one group, or of all groups where what groups cost does not add up. So the
minimum of ``D(a) + x cost(n, a)`` is found component by component, and so is all that lies below a limit.

Depths are enumerated once per end of a block (:mod:`~dop_search.search.blocks`), not once per number of tokens.

Costs are exact integers, summed over samples, and divergences exact sums (``RESOLUTION_NATS``). Bounds are floats,
widened by ``TOLERANCE``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
from numpy.typing import NDArray

from dop_search.search.blocks import ROLES, Blocks, Depths, Role
from dop_search.search.store import FloatArray
from dop_search.search.surrogate import IntArray, Surrogate
from dop_search.strategy.cost.model import CostModel

TOLERANCE = 1e-9
"""Relative; far above rounding errors of bounds, far below what they decide."""

MAX_CELLS = 4_000_000
"""Partial assignments times options that are looked at in one step; bounds the memory."""

NUM_TANGENTS = 32
"""Multipliers from which the first depths come."""

UNLIMITED = 1e300

Parts = list[tuple[FloatArray, FloatArray, list[IntArray]]]
"""Of each component cost and divergence of every option ``[n, W]``, and the depths of its groups."""


@dataclass(frozen=True)
class Rows:
    """Where to enumerate: depths at ``end`` and ``kv`` of at most three limits, all ``[n]``."""

    end: IntArray
    kv: IntArray
    x: FloatArray
    limit: FloatArray  # of D + x cost / scale; infinite for none
    nats: FloatArray  # of D
    cost: FloatArray  # of cost / scale


class Enumeration(Blocks):
    """Bounds of the depths at the ends of blocks, and all depths below limits."""

    def __init__(self, surrogate: Surrogate, cost_model: CostModel) -> None:
        super().__init__(surrogate, cost_model)
        self._components: list[tuple[Role, tuple[int, ...]]] = [
            (role, groups)
            for role in reversed(ROLES)  # MLPs first: they weigh most
            for groups in (
                [(g,) for g in range(self.num_groups)] if self.is_additive(role) else [tuple(range(self.num_groups))]
            )
        ]

    @cached_property
    def _base(self) -> FloatArray:
        """Lowered cost of the kv depths alone, divided by the scale ``[E, S]``."""
        sets = 1 << self.num_groups
        nobody = (self.table_of(self.lower, "q") + self.table_of(self.lower, "mlp"))[:, 0]  # [E, kinds, 2**G keys]
        base = nobody.reshape(len(nobody), -1) @ self.num_layers_of.T
        return (base + self.lower[:, -sets:][:, self.keys[:, -1]] + self.fixed) / self.scale[:, None]

    def bound(self, alpha: float, x: FloatArray, end: IntArray) -> FloatArray:
        """A lower bound of ``alpha D + x cost / scale`` over all depths, at ends ``[n]``, per kv depths ``[n, S]``."""
        total = x[:, None] * self._base[end] + alpha * self.kv_nats
        for group in range(self.num_groups):
            best = np.zeros((len(end), 1))
            for role in ROLES:
                before = self.before if role == "q" else np.arange(self.num_layers)[None]
                least = (x[:, None] * self._least_marginal[role, group][end]) @ before  # [n, L]
                nats = _weighted(alpha, self.options[role, group][0])
                best = best + (nats + least[:, None]).min(axis=2)  # [n, kv levels]
            total += best[:, self.kv_level[:, group]]
        return np.asarray(total)

    @cached_property
    def _least_marginal(self) -> dict[tuple[Role, int], FloatArray]:
        """The least that a group can add in a layer of a kind in which it is a key, by the scale ``[E, kinds]``."""
        return {
            (role, group): self.marginals(self.lower, role, group).min(axis=(1, 3)) / self.scale[:, None]
            for role, group in self.options
        }

    @cached_property
    def tangents(self) -> tuple[FloatArray, FloatArray, Depths]:
        """Multipliers of all sizes ``[X]``, the least ``D + x cost / scale`` at each end ``[X, E]``, depths near it.

        The least divergent depths are among them, in every block.
        """
        multipliers = np.append(0.0, self.largest_nats * np.geomspace(1e-5, 1e3, NUM_TANGENTS))
        every, least, depths = np.arange(len(self.ends)), [], []
        for multiplier in multipliers:
            x = np.full(len(every), multiplier)
            bound = self.bound(1.0, x, every)
            least.append(bound.min(axis=1))
            depths.append(self.best(every, bound.argmin(axis=1), x))
        return multipliers[1:], np.stack(least[1:]), Depths.concatenate(depths)

    @cached_property
    def cheapest(self) -> FloatArray:
        """The least cost / scale of any depths ``[E, S]``."""
        every = np.arange(len(self.ends))
        return self.bound(0.0, np.ones(len(every)), every)

    def _until(self, role: Role, chosen: int, end: IntArray, kv: IntArray) -> FloatArray:
        """Lowered cost that the set ``chosen`` adds in the layers before each depth ``[n, L]``."""
        table = self.table_of(self.lower, role)
        added = (table[:, chosen] - table[:, 0]) / self.scale[:, None, None]
        kinds = self.kinds[:-1] if role == "q" else 0
        total = np.zeros((len(end), self.num_layers))
        np.cumsum(added[end[:, None], kinds, self.keys[kv, :-1]], axis=1, out=total[:, 1:])
        return total  # the last layer adds nothing: only text has a query and an MLP there

    def _component(
        self, role: Role, groups: tuple[int, ...], end: IntArray, kv: IntArray, beaten: bool = False
    ) -> tuple[FloatArray, FloatArray, list[IntArray]]:
        """Cost and divergence of every option ``[n, W]``, and the groups' depths ``[n or 1, W]``."""
        searched = [g for g in groups if self.space.find(role, g) is not None]
        width = self.num_layers ** len(searched)
        grid = np.indices((self.num_layers,) * len(searched)).reshape(len(searched), width)
        last = np.maximum(self.kv_depth[kv] - 1, 0)
        depth = {g: grid[searched.index(g)][None] if g in searched else last[:, g, None] for g in groups}
        nats = np.zeros((len(end), grid.shape[1]))
        for g in searched:
            nats += self.options[role, g][0][self.kv_level[kv, g]][:, depth[g][0]]
        cost = np.zeros(nats.shape)
        for chosen in range(1, 1 << len(groups)):  # the layers in which exactly these groups take part
            inside = [g for bit, g in enumerate(groups) if chosen >> bit & 1]
            outside = [depth[g] for g in groups if g not in inside]
            start = reduce(np.maximum, outside, np.zeros((1, 1), dtype=np.int64))
            stop = np.maximum(start, reduce(np.minimum, [depth[g] for g in inside]))
            until = self._until(role, sum(1 << g for g in inside), end, kv)
            rows = np.arange(len(end))[:, None]
            cost += until[rows, stop] - (until[rows, start] if len(groups) > 1 else 0.0)
        if len(groups) == 1 and not beaten:
            nats = self._without_useless(role, groups[0], end, nats)
        return cost, nats, [np.broadcast_to(depth[g], nats.shape) for g in groups]

    def _without_useless(self, role: Role, group: int, end: IntArray, nats: FloatArray) -> FloatArray:
        """Options that another one of the same group equals or beats, in the whole block, made infinite."""
        rises, flat = self._slopes[role, group]
        before = np.minimum.accumulate(np.pad(nats, ((0, 0), (1, 0)), constant_values=np.inf), axis=1)[:, :-1]
        useless = rises[end][:, None] & (nats >= before)
        useless |= flat[end][:, None] & (np.arange(nats.shape[1]) != nats.argmin(axis=1)[:, None])
        return np.where(useless, np.inf, nats)

    @cached_property
    def _slopes(self) -> dict[tuple[Role, int], tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
        """Whether a greater depth never costs less, and whether it never costs anything, in an end's block ``[E]``."""
        result = {}
        for role, group in self.options:
            marginal = self.marginals(self.prices, role, group).reshape(len(self.levels), -1)
            least = np.minimum.reduceat(marginal.min(axis=1), self.blocks[:, 0])[self.end_block]
            most = np.maximum.reduceat(marginal.max(axis=1), self.blocks[:, 0])[self.end_block]
            result[role, group] = (least >= 0, (least == 0) & (most == 0))
        return result

    def complete(self, rows: Rows, beaten: bool = False) -> Iterator[tuple[Depths, FloatArray, IntArray]]:
        """All depths below the limits, in pieces: with the lowered cost / scale and the number of the row of each.

        ``beaten``: also with options that another one of the same group equals or beats in the whole block.
        """
        slices, where = np.unique(rows.end * len(self.kv_depth) + rows.kv, return_inverse=True)
        width = max(self.num_layers ** len(groups) for _, groups in self._components)
        order, step = np.argsort(where, kind="stable"), max(1, MAX_CELLS // (4 * width))
        for start in range(0, len(slices), step):
            part = order[slice(*np.searchsorted(where[order], [start, start + step]))]
            end, kv = np.divmod(slices[start : start + step], len(self.kv_depth))
            parts = [self._component(role, groups, end, kv, beaten) for role, groups in self._components]
            yield from self._expand(rows, part, where[part] - start, end, kv, parts)

    def best(self, end: IntArray, kv: IntArray, x: FloatArray) -> Depths:
        """The depths of least ``D + x cost / scale`` of each row ``[n]``."""
        parts = [self._component(role, groups, end, kv) for role, groups in self._components]
        chosen = np.array([(nats + x[:, None] * cost).argmin(axis=1) for cost, nats, _ in parts])
        return self._chosen(end, kv, np.arange(len(end)), np.zeros(len(end)), chosen, parts)[0]

    def _expand(
        self, rows: Rows, which: IntArray, place: IntArray, end: IntArray, kv: IntArray, parts: Parts
    ) -> Iterator[tuple[Depths, FloatArray, IntArray]]:
        """Component by component, nothing kept that the best of the others would not bring below the limits."""
        least_nats = self.kv_nats[kv] + sum(nats.min(axis=1) for _, nats, _ in parts)
        costs = [np.where(np.isfinite(nats), cost, np.inf) for cost, nats, _ in parts]
        least_cost = self._base[end, kv] + sum(cost.min(axis=1) for cost in costs)
        left = np.stack([rows.nats[which] - least_nats[place], rows.cost[which] - least_cost[place]])
        its = np.flatnonzero((left >= 0).all(axis=0))
        which, place, left = which[its], place[its], left[:, its]
        x, base = rows.x[which], self._base[end, kv][place]
        total = rows.limit[which] - self.kv_nats[kv[place]] - x * base
        excess = []
        for (_, nats, _), cost in zip(parts, costs, strict=True):
            value = cost[place]
            value *= x[:, None]
            value += nats[place]
            least = value.min(axis=1)
            value -= least[:, None]
            total -= least
            excess.append(value)
        more = [
            np.stack([nats - nats.min(axis=1)[:, None], cost - cost.min(axis=1)[:, None]])
            for (_, nats, _), cost in zip(parts, costs, strict=True)
        ]
        left = np.concatenate([total[None], left])
        row = np.flatnonzero(total >= 0)
        pending = [(row, left[:, row], np.zeros((len(row), 0), dtype=np.int64))]
        while pending:
            row, left, chosen = pending.pop()
            stage = chosen.shape[1]
            if stage == len(parts):
                its = place[row]
                yield *self._chosen(end[its], kv[its], its, base[row], chosen.T, parts), which[row]
                continue
            piece = max(1, MAX_CELLS // excess[stage].shape[1])
            if len(row) > piece:
                pending.append((row[piece:], left[:, piece:], chosen[piece:]))
                row, left, chosen = row[:piece], left[:, :piece], chosen[:piece]
            again, option = np.nonzero(excess[stage][row] <= left[0, :, None])
            rest = left[:, again]
            rest[0] -= excess[stage][row[again], option]
            rest[1:] -= more[stage][:, place[row[again]], option]
            its = np.flatnonzero((rest >= 0).all(axis=0))
            if len(its):
                again, option = again[its], option[its]
                pending.append((row[again], rest[:, its], np.concatenate([chosen[again], option[:, None]], axis=1)))

    def _chosen(
        self, end: IntArray, kv: IntArray, place: IntArray, cost: FloatArray, chosen: IntArray, parts: Parts
    ) -> tuple[Depths, FloatArray]:
        """The depths of the chosen options ``[components, n]``, and their cost on top of ``cost``."""
        inner = np.zeros((len(kv), 2, self.num_groups), dtype=np.int64)
        nats = self.kv_nats[kv].copy()
        for (role, groups), (costs, divergence, depth), option in zip(self._components, parts, chosen, strict=True):
            nats += divergence[place, option]
            cost = cost + costs[place, option]
            for g, its in zip(groups, depth, strict=True):
                inner[:, ROLES.index(role), g] = its[place, option]
        return Depths(self.end_block[end], kv, inner, nats), cost


def _weighted(alpha: float, nats: FloatArray) -> FloatArray:
    """``alpha * nats`` where there is an option; infinite where there is none, also for ``alpha = 0``."""
    return np.where(np.isfinite(nats), alpha * np.where(np.isfinite(nats), nats, 0.0), np.inf)
