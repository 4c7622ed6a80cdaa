"""Enumeration of a space with Lagrangian bounds: what the exact solvers of the surrogate are made of.

An assignment is a number of visual tokens ``n`` and *depths*: exit depths of kv (or attention), queries and MLP per
group. A layer's price is looked up by the sets of groups that run its modules, so that the cost of depths ``a`` is
linear in prices, ``cost(n, a) = sum_f w_f(a) price_f(n)``, where ``w_f >= 0`` counts layers: any function of the token
counts will do, bilinear like FLOPs or measured like latency. Given ``n`` and the kv depths, cost and divergence are sums
over *components*: a role of one group, or of all groups where what groups cost does not add up. So the minimum of
``D(a) + x cost(n, a)`` is found component by component, and whatever is below a limit is enumerated component by
component, without anything that is not.

**Blocks.** A block is a run of numbers of visual tokens between two *ends*. There prices are lowered (``lower``) so that
the straight line between the ends is nowhere above the price, or raised (``upper``). Divided by a ``scale`` that is
linear between the ends, a lowered cost within the block is at least a convex combination of its values at the ends.
Hence depths that are below a line ``D + x cost / scale`` somewhere in the block are so at one of the ends, where they
are found: depths are enumerated once per end, not once per number of tokens.

Costs are exact integers, summed over samples, and divergences exact sums (``RESOLUTION_NATS``). Bounds are floats,
widened by ``TOLERANCE``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dop_search.search.store import FloatArray
from dop_search.search.surrogate import IntArray, Surrogate
from dop_search.strategy.cost.model import CostModel
from dop_search.utils.errors import ConfigError

BLOCKS_PER_OCTAVE = 4
"""Blocks of numbers of visual tokens while that doubles."""

TOLERANCE = 1e-9
"""Relative; far above rounding errors of bounds, far below what they decide."""

MAX_CELLS = 4_000_000
"""Partial assignments times options that are looked at in one step; bounds the memory."""

NUM_TANGENTS = 32
"""Multipliers from which the first depths come."""

UNLIMITED = 1e300

ROLES = ("q", "mlp")


@dataclass(frozen=True)
class Depths:
    """Depth assignments, each in a block: row of the kv depths, other depths, divergence without that of ``n``."""

    block: IntArray  # [n]
    kv: IntArray  # [n]
    inner: IntArray  # [n, 2 roles, G], none beyond where it is dead
    divergence: FloatArray  # [n]

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_] | slice) -> Depths:
        """The given rows."""
        return Depths(*(getattr(self, field.name)[rows] for field in fields(self)))

    @classmethod
    def concatenate(cls, parts: list[Depths]) -> Depths:
        """All of them (at least one part), each once."""
        block, kv, inner, divergence = (
            np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)
        )
        code = block * (1 + int(kv.max(initial=0))) + kv
        for column in inner.reshape(len(inner), inner.shape[1] * inner.shape[2]).T:
            code = code * (1 + int(inner.max(initial=0))) + column
        rows = np.unique(code, return_index=True)[1]
        return cls(block[rows], kv[rows], inner[rows], divergence[rows])

    def __len__(self) -> int:
        return len(self.kv)


@dataclass(frozen=True)
class Rows:
    """Where to enumerate: depths at ``end`` and ``kv`` of at most three limits, all ``[n]``."""

    end: IntArray
    kv: IntArray
    x: FloatArray
    limit: FloatArray  # of D + x cost / scale; infinite for none
    nats: FloatArray  # of D
    cost: FloatArray  # of cost / scale


class Enumeration:
    """A surrogate's assignments under a cost model.

    Attributes:
        levels: numbers of visual tokens ``[T]``.
        fixed: what is paid beside the layers.
        prices: of every feature (sets of groups in a layer) for each of them ``[T, F]``.
        kv_depth: exit depth of the keys of each group ``[S, G]``.
        blocks: first and last level of each block ``[B, 2]``.
        ends, end_block: level and block of each end ``[E]``, one for a block of one level, else two.
    """

    def __init__(self, surrogate: Surrogate, cost_model: CostModel) -> None:
        space = surrogate.space
        if cost_model.dims.num_layers != space.num_layers:
            raise ConfigError(
                f"the space has {space.num_layers} layers, but the cost model {cost_model.dims.num_layers}; "
                "make both for the same model"
            )
        self.surrogate, self.space, self.cost_model = surrogate, space, cost_model
        self.num_layers, self.num_groups = space.num_layers, len(space.shares)
        self.levels: IntArray = np.array(space.tokens.levels, dtype=np.int64)
        self.token_nats = surrogate.curves[space.tokens.name]
        table = cost_model.group_prices(space.tokens.levels, space.shares)
        self.fixed, shape = table.fixed, (len(self.levels), -1)
        self.prices: IntArray = np.concatenate(
            [table.attention.reshape(shape), table.mlp.reshape(shape), table.last], axis=1
        )
        self.largest_nats = sum(float(np.abs(curve).max()) for curve in surrogate.curves.values()) or 1.0
        self._make_kv()
        self._make_blocks()
        self.options = {(role, g): self._options_of(role, g) for role in ROLES for g in range(self.num_groups)}
        self._components = [
            (role, groups)
            for role in ("mlp", "q")  # MLPs first: they weigh most
            for groups in (
                [(g,) for g in range(self.num_groups)] if self._is_additive(role) else [tuple(range(self.num_groups))]
            )
        ]

    # -- what there is --------------------------------------------------------------------------

    def _make_kv(self) -> None:
        """Every combination of kv depths, the sets of keys that they give, and their divergence."""
        outer = [p for p in self.space.parameters if p.role in ("kv", "attention")]
        sizes = [len(p.levels) for p in outer]
        index = np.indices(sizes).reshape(len(outer), -1) if outer else np.zeros((0, 1), dtype=np.int64)
        self.kv_level = np.zeros((index.shape[1], self.num_groups), dtype=np.int64)
        self.kv_depth = np.full(self.kv_level.shape, self.num_layers, dtype=np.int64)
        self.kv_nats = np.zeros(len(self.kv_level))
        for parameter, column in zip(outer, index, strict=True):
            self.kv_level[:, parameter.group] = column
            self.kv_depth[:, parameter.group] = np.array(parameter.levels)[column]
            self.kv_nats += self.surrogate.curves[parameter.name][column]
        layers, bits = np.arange(self.num_layers), 1 << np.arange(self.num_groups)
        self._keys: IntArray = (self.kv_depth[:, None, :] > layers[None, :, None]) @ bits  # [S, L]
        sets = np.arange(1 << self.num_groups)
        self._num_layers_of = (self._keys[:, :-1, None] == sets).sum(axis=1)  # [S, 2**G]

    def _make_blocks(self) -> None:
        octaves = np.log2(np.maximum(self.levels, 1) / max(1, self.levels[-1]))
        starts = np.flatnonzero(np.diff(np.floor(BLOCKS_PER_OCTAVE * octaves - 1e-9), prepend=-np.inf))
        blocks = list(zip(starts.tolist(), [*(starts[1:] - 1).tolist(), len(self.levels) - 1], strict=True))
        self.blocks: IntArray = np.array(blocks, dtype=np.int64)
        ends = [(level, b) for b, block in enumerate(blocks) for level in sorted(set(block))]
        self.ends, self.end_block = np.array(ends, dtype=np.int64).T
        self.block_of: IntArray = np.repeat(np.arange(len(blocks)), self.blocks[:, 1] - self.blocks[:, 0] + 1)
        low, high = self.blocks[self.block_of].T
        share = (self.levels - self.levels[low]) / np.maximum(self.levels[high] - self.levels[low], 1)
        prices = self.prices.astype(np.float64)
        line = prices[low] + share[:, None] * (prices[high] - prices[low])
        starts = self.blocks[:, 0]
        self.lower = (prices[self.ends] - np.maximum.reduceat(line - prices, starts)[self.end_block].clip(0))
        self.upper = prices[self.ends] + np.maximum.reduceat(prices - line, starts)[self.end_block].clip(0)
        whole = self.num_layers * (prices.max(axis=1) + 1) + self.fixed
        self.level_scale = whole[low] + share * (whole[high] - whole[low])  # [T], linear within a block
        self.scale = whole[self.ends]
        nats = self.token_nats
        nats_line = nats[low] + share * (nats[high] - nats[low])
        self.token_sag = np.maximum.reduceat(nats_line - nats, starts).clip(0)  # [B]

    def _table(self, prices: NDArray[np.generic], role: str) -> NDArray[np.generic]:
        """The attention's or the MLP's part of ``[..., F]`` as ``[..., 2**G that run it, 2**G keys]``."""
        sets = 1 << self.num_groups
        part = prices[..., : sets * sets] if role == "q" else prices[..., sets * sets : 2 * sets * sets]
        return part.reshape(*prices.shape[:-1], sets, sets)

    def _marginals(self, prices: NDArray[np.generic], role: str, group: int) -> NDArray[np.generic]:
        """What a group that is a key adds to the groups without it ``[..., sets without it, sets of keys with it]``."""
        table, sets = self._table(prices, role), np.arange(1 << self.num_groups)
        without, inside = sets[sets >> group & 1 == 0], sets[sets >> group & 1 == 1]
        return (table[..., without | 1 << group, :] - table[..., without, :])[..., inside]

    def _is_additive(self, role: str) -> bool:
        """Whether what a group adds is the same whatever other groups are there."""
        added = [self._marginals(self.prices, role, group) for group in range(self.num_groups)]
        return all(bool((part == part[..., :1, :]).all()) for part in added)

    def _options_of(self, role: str, group: int) -> tuple[FloatArray, IntArray]:
        """Divergence of each depth (infinite if there is no such option) and its level index ``[kv levels, L]``."""
        parameter = self.space.find("q" if role == "q" else "mlp", group)
        bound = self.space.find("kv", group) or self.space.find("attention", group)
        kv = np.array([self.num_layers] if bound is None else bound.levels)
        nats = np.full((len(kv), self.num_layers), np.inf)
        index = np.zeros(nats.shape, dtype=np.int64)
        for row, last in enumerate(np.maximum(kv - 1, 0)):
            if parameter is None:  # tied or full: runs until it is dead
                nats[row, last] = 0.0
                continue
            levels, curve = np.array(parameter.levels), self.surrogate.curves[parameter.name]
            live = levels < last
            nats[row, levels[live]], index[row, levels[live]] = curve[live], np.flatnonzero(live)
            nats[row, last], index[row, last] = curve[~live].min(), len(levels) - 1  # "full" stands for all the dead
        return nats, index

    # -- bounds ---------------------------------------------------------------------------------

    @cached_property
    def _base(self) -> FloatArray:
        """Lowered cost of the kv depths alone, divided by the scale ``[E, S]``."""
        sets = 1 << self.num_groups
        base = (self._table(self.lower, "q") + self._table(self.lower, "mlp"))[:, 0] @ self._num_layers_of.T
        return (base + self.lower[:, -sets:][:, self._keys[:, -1]] + self.fixed) / self.scale[:, None]

    def bound(self, alpha: float, x: FloatArray, end: IntArray) -> FloatArray:
        """A lower bound of ``alpha D + x cost / scale`` over all depths, at ends ``[n]``, per kv depths ``[n, S]``."""
        total = x[:, None] * self._base[end] + alpha * self.kv_nats
        depths = np.arange(self.num_layers)
        for group in range(self.num_groups):
            best = np.zeros((len(end), 1))
            for role in ROLES:
                step = x * self._least_marginal[role, group][end]
                nats = _weighted(alpha, self.options[role, group][0])
                best = best + (nats + step[:, None, None] * depths).min(axis=2)  # [n, kv levels]
            total += best[:, self.kv_level[:, group]]
        return np.asarray(total)

    @cached_property
    def _least_marginal(self) -> dict[tuple[str, int], FloatArray]:
        """The least that a group can add in a layer in which it is a key, divided by the scale ``[E]``."""
        return {
            (role, group): self._marginals(self.lower, role, group).min(axis=(1, 2)) / self.scale
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

    # -- enumeration ----------------------------------------------------------------------------

    def _until(self, role: str, chosen: int, end: IntArray, kv: IntArray) -> FloatArray:
        """Lowered cost that the set ``chosen`` adds in the layers before each depth ``[n, L]``."""
        table = self._table(self.lower, role)
        added = (table[:, chosen] - table[:, 0]) / self.scale[:, None]
        total = np.zeros((len(end), self.num_layers))
        np.cumsum(added[end[:, None], self._keys[kv, :-1]], axis=1, out=total[:, 1:])
        return total  # the last layer adds nothing: only text has a query and an MLP there

    def _component(
        self, role: str, groups: tuple[int, ...], end: IntArray, kv: IntArray
    ) -> tuple[FloatArray, FloatArray, list[IntArray]]:
        """Cost and divergence of every option ``[n, W]``, and the groups' depths ``[n or 1, W]``."""
        searched = [g for g in groups if np.isfinite(self.options[role, g][0]).sum(axis=1).max() > 1]
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
            start = np.maximum.reduce([np.zeros((1, 1), dtype=np.int64), *(depth[g] for g in groups if g not in inside)])
            stop = np.maximum(start, np.minimum.reduce([depth[g] for g in inside]))
            until = self._until(role, sum(1 << g for g in inside), end, kv)
            rows = np.arange(len(end))[:, None]
            cost += until[rows, stop] - (until[rows, start] if len(groups) > 1 else 0.0)
        if len(groups) == 1:
            nats = self._without_useless(role, groups[0], end, nats)
        return cost, nats, [np.broadcast_to(depth[g], nats.shape) for g in groups]

    def _without_useless(self, role: str, group: int, end: IntArray, nats: FloatArray) -> FloatArray:
        """Options that another one of the same group equals or beats, in the whole block, made infinite."""
        rises, flat = self._slopes[role, group]
        before = np.minimum.accumulate(np.pad(nats, ((0, 0), (1, 0)), constant_values=np.inf), axis=1)[:, :-1]
        useless = rises[end][:, None] & (nats >= before)
        useless |= flat[end][:, None] & (np.arange(nats.shape[1]) != nats.argmin(axis=1)[:, None])
        return np.where(useless, np.inf, nats)

    @cached_property
    def _slopes(self) -> dict[tuple[str, int], tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
        """Whether a greater depth never costs less, and whether it never costs anything, in an end's block ``[E]``."""
        result = {}
        for role, group in self.options:
            marginal = self._marginals(self.prices, role, group).reshape(len(self.levels), -1)
            least = np.minimum.reduceat(marginal.min(axis=1), self.blocks[:, 0])[self.end_block]
            most = np.maximum.reduceat(marginal.max(axis=1), self.blocks[:, 0])[self.end_block]
            result[role, group] = (least >= 0, (least == 0) & (most == 0))
        return result

    def complete(self, rows: Rows) -> Iterator[tuple[Depths, IntArray, FloatArray]]:
        """All depths below the limits, in pieces: with the number of the row and the lowered cost / scale of each."""
        slices, where = np.unique(rows.end * len(self.kv_depth) + rows.kv, return_inverse=True)
        width = max(self.num_layers ** len(groups) for _, groups in self._components)
        order, step = np.argsort(where, kind="stable"), max(1, MAX_CELLS // (4 * width))
        for start in range(0, len(slices), step):
            part = order[slice(*np.searchsorted(where[order], [start, start + step]))]
            end, kv = np.divmod(slices[start : start + step], len(self.kv_depth))
            parts = [self._component(role, groups, end, kv) for role, groups in self._components]
            yield from self._expand(rows, part, where[part] - start, end, kv, parts)

    def best(self, end: IntArray, kv: IntArray, x: FloatArray) -> Depths:
        """The depths of least ``D + x cost / scale`` of each row ``[n]``."""
        inner = np.zeros((len(end), 2, self.num_groups), dtype=np.int64)
        nats = self.kv_nats[kv].copy()
        rows = np.arange(len(end))
        for role, groups in self._components:
            cost, divergence, depth = self._component(role, groups, end, kv)
            chosen = (divergence + x[:, None] * cost).argmin(axis=1)
            nats += divergence[rows, chosen]
            for g, its in zip(groups, depth, strict=True):
                inner[:, ROLES.index(role), g] = its[rows, chosen]
        return Depths(self.end_block[end], kv, inner, nats)

    def _expand(
        self,
        rows: Rows,
        which: IntArray,
        place: IntArray,
        end: IntArray,
        kv: IntArray,
        parts: list[tuple[FloatArray, FloatArray, list[IntArray]]],
    ) -> Iterator[tuple[Depths, IntArray, FloatArray]]:
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
                yield self._completed(which[row], end[place[row]], kv[place[row]], place[row], base[row], chosen, parts)
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

    def _completed(
        self,
        which: IntArray,
        end: IntArray,
        kv: IntArray,
        place: IntArray,
        cost: FloatArray,
        chosen: IntArray,
        parts: list[tuple[FloatArray, FloatArray, list[IntArray]]],
    ) -> tuple[Depths, IntArray, FloatArray]:
        inner = np.zeros((len(kv), 2, self.num_groups), dtype=np.int64)
        nats = self.kv_nats[kv].copy()
        for (role, groups), (costs, divergence, depth), option in zip(self._components, parts, chosen.T, strict=True):
            nats += divergence[place, option]
            cost = cost + costs[place, option]
            for g, its in zip(groups, depth, strict=True):
                inner[:, ROLES.index(role), g] = its[place, option]
        return Depths(self.end_block[end], kv, inner, nats), which, cost

    # -- results --------------------------------------------------------------------------------

    def features(self, depths: Depths) -> IntArray:
        """In how many layers each price is paid ``[n, F]``."""
        sets, count = 1 << self.num_groups, len(depths)
        bits, layers = 1 << np.arange(self.num_groups), np.arange(self.num_layers - 1)
        result = np.zeros((count, 2 * sets * sets + sets), dtype=np.int64)
        for column in range(2):
            runs = (depths.inner[:, column, None, :] > layers[None, :, None]) @ bits  # [n, L - 1]
            code = runs * sets + self._keys[depths.kv, :-1] + np.arange(count)[:, None] * sets * sets
            its = np.bincount(code.ravel(), minlength=count * sets * sets).reshape(count, sets * sets)
            result[:, column * sets * sets : (column + 1) * sets * sets] = its
        result[np.arange(count), 2 * sets * sets + self._keys[depths.kv, -1]] = 1
        return result

    def cost(self, features: IntArray, level: IntArray) -> IntArray:
        """Exact total cost of depths (given by their features) at levels ``[n]``."""
        return np.asarray(np.einsum("nf,nf->n", features, self.prices[level]) + self.fixed)

    @cached_property
    def cheapest(self) -> FloatArray:
        """The least cost / scale of any depths ``[E, S]``."""
        every = np.arange(len(self.ends))
        return self.bound(0.0, np.ones(len(every)), every)

    def by_block(
        self, depths: Depths, features: IntArray
    ) -> Iterator[tuple[IntArray, IntArray, FloatArray, FloatArray]]:
        """Per block: rows of ``depths`` in it, its levels, and cost (a float) and divergence of each beside each."""
        prices = self.prices.astype(np.float64).T
        for (low, high), its in zip(self.blocks, self.rows_by_block(depths), strict=True):
            levels = np.arange(low, high + 1)
            cost = features[its].astype(np.float64) @ prices[:, levels] + self.fixed
            yield its, levels, cost, depths.divergence[its, None] + self.token_nats[levels]

    def rows_by_block(self, depths: Depths) -> list[IntArray]:
        """The rows of ``depths`` in each block."""
        order = np.argsort(depths.block, kind="stable")
        return np.split(order, np.searchsorted(depths.block[order], np.arange(1, len(self.blocks))))

    def indices(self, depths: Depths, level: IntArray) -> IntArray:
        """Level indices in the order of the space's parameters ``[n, params]``; dead levels appear as full."""
        columns = []
        for parameter in self.space.parameters:
            g = parameter.group
            if parameter.role == "tokens":
                columns.append(level)
            elif parameter.role in ("kv", "attention"):
                columns.append(self.kv_level[depths.kv, g])
            else:
                table = self.options[parameter.role, g][1]
                columns.append(table[self.kv_level[depths.kv, g], depths.inner[:, ROLES.index(parameter.role), g]])
        return np.stack(columns, axis=1)


def _weighted(alpha: float, nats: FloatArray) -> FloatArray:
    """``alpha * nats`` where there is an option; infinite where there is none, also for ``alpha = 0``."""
    return np.where(np.isfinite(nats), alpha * np.where(np.isfinite(nats), nats, 0.0), np.inf)


def undominated(cost: NDArray[Any], divergence: FloatArray, segment: IntArray | None = None) -> IntArray:
    """Rows that no other row (of the same segment) beats in cost and divergence, one per equal pair, the first.

    Ordered by segment, then cost.
    """
    if segment is None:
        order = np.lexsort((divergence, cost))
        best = np.minimum.accumulate(divergence[order])
        return order[np.flatnonzero(np.append(True, divergence[order][1:] < best[:-1])[: len(order)])]
    order = np.argsort(segment, kind="stable")
    cuts = np.flatnonzero(np.diff(segment[order])) + 1
    return np.concatenate([its[undominated(cost[its], divergence[its])] for its in np.split(order, cuts)])
