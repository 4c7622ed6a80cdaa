"""Enumeration of a space by slices, with bounds: what the exact solvers of the surrogate are made of.

A *slice* fixes the number of visual tokens and every group's kv (or attention) depth. Within a slice it is known which
groups are keys in which layer, so a layer's price is looked up by the set of groups that query, or that go through the
MLP: any function of the token counts will do, bilinear like FLOPs or measured like latency. Running role ``q`` or
``mlp`` of group ``g`` down to depth ``d`` adds::

    sum over layers l < d of  price(groups at l and g) - price(groups at l)

Where that does not depend on the other groups at ``l`` (one group; FLOPs), the cost is a sum over the parameters. Where
it does, a later group's part depends on the choices for the earlier groups of its role.

Partial assignments are dropped as soon as their ideal completion (a lower bound of what is left, in cost and in
divergence) is of no use, and nothing is lost by it. All costs are exact integers, summed over the samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dop_search.search.space import Parameter
from dop_search.search.store import FloatArray, OnProgress
from dop_search.search.surrogate import IntArray, Surrogate
from dop_search.strategy.cost.model import CostModel
from dop_search.utils.errors import ConfigError

MAX_CELLS = 1_000_000
"""Partial assignments times levels that are looked at in one step; bounds the memory."""

MAX_SLICES = 100_000
"""Slices whose prices by layer are held at once."""

INFEASIBLE = np.iinfo(np.int64).max // 4


@dataclass
class Batch:
    """Assignments (partial or complete): slice, total cost, divergence in nats, level index per inner parameter."""

    slice_ids: IntArray
    cost: IntArray
    divergence: FloatArray
    choices: IntArray  # [n, inner parameters decided so far]

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_] | slice) -> Batch:
        """The given rows."""
        return Batch(self.slice_ids[rows], self.cost[rows], self.divergence[rows], self.choices[rows])

    def __len__(self) -> int:
        return len(self.slice_ids)


class Collector(Protocol):
    """Decides what is worth completing and keeps the completed."""

    within_slice_dominance: bool

    def keep(self, slice_ids: IntArray, cost: IntArray, divergence: FloatArray) -> NDArray[np.bool_]:
        """Whether assignments of at least this cost and divergence can be of use."""
        ...

    def add(self, batch: Batch) -> None:
        """Take complete assignments in."""
        ...


class Enumeration:
    """The slices of a surrogate under a cost model.

    Attributes:
        outer: parameters that a slice fixes: the number of visual tokens, then one kv or attention depth per
            group that has one.
        inner: the other parameters, in the order of expansion.
        slices: level index of each outer parameter ``[S, outer]``.
        cost: total cost of each slice before inner parameters are added ``[S]``.
        divergence: the same in nats ``[S]``.
    """

    def __init__(self, surrogate: Surrogate, cost_model: CostModel) -> None:
        space = surrogate.space
        if cost_model.dims.num_layers != space.num_layers:
            raise ConfigError(
                f"the space has {space.num_layers} layers, but the cost model {cost_model.dims.num_layers}; "
                "make both for the same model"
            )
        self.surrogate = surrogate
        self.cost_model = cost_model
        self.outer = [space.tokens, *(p for p in space.parameters if p.role in ("attention", "kv"))]
        # MLPs first: they weigh most in cost and divergence, so bounds bite early.
        self.inner = sorted((p for p in space.parameters if p.role in ("q", "mlp")), key=lambda p: p.role)
        grids = np.meshgrid(*(np.arange(len(p.levels)) for p in self.outer), indexing="ij")
        self.slices: IntArray = np.stack([grid.ravel() for grid in grids], axis=1).astype(np.int64)
        self._prices = cost_model.group_prices(space.tokens.levels, space.shares)
        self._kv_depth = self._kv_depths()
        self._additive = {role: self._is_additive(self._table(role)) for role in ("q", "mlp")}
        self.cost, self.divergence = self._bases()
        self._rest_cost, self._rest_divergence = self._ideals()

    # -- prices ---------------------------------------------------------------------------------

    def _table(self, role: str) -> IntArray:
        """Price ``[P, 2**G of the role, 2**G of the keys]``."""
        return self._prices.attention if role == "q" else self._prices.mlp

    def _is_additive(self, table: IntArray) -> bool:
        """Whether what a group adds is the same whatever other groups are there."""
        for group in range(len(self.surrogate.space.shares)):
            bit = 1 << group
            sets = [others for others in range(table.shape[1]) if not others & bit]
            added = table[:, [others | bit for others in sets]] - table[:, sets]
            if not (added == added[:, :1]).all():
                return False
        return True

    def _keys_at(self, slice_ids: IntArray, layer: int) -> IntArray:
        """The set of groups that are keys in a layer, per slice ``[n]``."""
        bits = np.int64(1) << np.arange(self._kv_depth.shape[1])
        return np.asarray((self._kv_depth[slice_ids] > layer) @ bits)

    def _added(self, role: str, group: int, others: int, slice_ids: IntArray, layer: int) -> IntArray:
        """What the group adds in one layer to the groups ``others`` (a set), per slice ``[n]``."""
        table, tokens, keys = self._table(role), self.slices[slice_ids, 0], self._keys_at(slice_ids, layer)
        return np.asarray(table[tokens, others | 1 << group, keys] - table[tokens, others, keys])

    def _added_until(self, role: str, group: int, others: int, slice_ids: IntArray) -> IntArray:
        """The sum of :meth:`_added` over the layers before each depth ``[n, L]``."""
        num_layers = self.surrogate.space.num_layers
        total = np.zeros((len(slice_ids), num_layers), dtype=np.int64)
        for layer in range(num_layers - 1):  # in the last layer only text has a query and an MLP
            total[:, layer + 1] = total[:, layer] + self._added(role, group, others, slice_ids, layer)
        return total

    def _operation_cost(
        self, role: str, group: int, slice_ids: IntArray, depth: IntArray, earlier: dict[int, IntArray]
    ) -> IntArray:
        """What running ``role`` of a group in ``depth`` layers adds, shape of ``depth`` (``[n, W]``).

        Args:
            role: ``q`` or ``mlp``.
            group: token group.
            slice_ids: ``[n]``.
            depth: layers in which it runs.
            earlier: depths ``[n]`` of the groups of that role that are already decided; of no matter if additive.
        """
        distinct, row = np.unique(slice_ids, return_inverse=True)
        if self._additive[role] or not earlier:
            until = self._added_until(role, group, 0, distinct)
            return np.asarray(until[row[:, None], depth])
        cost = np.zeros(depth.shape, dtype=np.int64)
        for chosen in range(1 << len(earlier)):  # the layers in which exactly these groups take part
            inside = [g for bit, g in enumerate(earlier) if chosen >> bit & 1]
            outside = [g for g in earlier if g not in inside]
            top = np.full(len(slice_ids), self.surrogate.space.num_layers - 1, dtype=np.int64)
            stop = np.minimum.reduce([top, *(earlier[g] for g in inside)])
            start = np.maximum.reduce([np.zeros_like(top), *(earlier[g] for g in outside)])
            until = self._added_until(role, group, sum(1 << g for g in inside), distinct)
            first, last = np.minimum(depth, start[:, None]), np.minimum(depth, np.maximum(start, stop)[:, None])
            cost += until[row[:, None], last] - until[row[:, None], first]
        return cost

    # -- building -------------------------------------------------------------------------------

    def _kv_depths(self) -> IntArray:
        """Exit depth of kv per slice and group ``[S, G]``; without a parameter the full depth."""
        space = self.surrogate.space
        result = np.full((len(self.slices), len(space.shares)), space.num_layers, dtype=np.int64)
        for column, parameter in enumerate(self.outer):
            if parameter.role in ("attention", "kv"):
                result[:, parameter.group] = np.asarray(parameter.levels)[self.slices[:, column]]
        return result

    def _last_depth(self, group: int, slice_ids: IntArray) -> IntArray:
        """The depth from which on queries and MLP of a group are dead ``[n]``."""
        return np.asarray(np.maximum(self._kv_depth[slice_ids, group] - 1, 0))

    def _unsearched(self, role: str) -> list[int]:
        """Groups whose ``role`` has no parameter: tied or full, they run until they are dead."""
        searched = {(p.role, p.group) for p in self.inner}
        return [g for g in range(len(self.surrogate.space.shares)) if (role, g) not in searched]

    def _bases(self) -> tuple[IntArray, FloatArray]:
        space, tokens = self.surrogate.space, self.slices[:, 0]
        every = np.arange(len(self.slices))
        cost = np.full(len(self.slices), self._prices.fixed, dtype=np.int64)
        for layer in range(space.num_layers - 1):
            keys = self._keys_at(every, layer)
            cost += self._prices.attention[tokens, 0, keys] + self._prices.mlp[tokens, 0, keys]
        cost += self._prices.last[tokens, self._keys_at(every, space.num_layers - 1)]
        for role in ("q", "mlp"):
            earlier: dict[int, IntArray] = {}
            for group in self._unsearched(role):
                depth = self._last_depth(group, every)
                for part in np.array_split(every, len(every) // MAX_SLICES + 1):
                    known = {g: values[part] for g, values in earlier.items()}
                    cost[part] += self._operation_cost(role, group, part, depth[part, None], known)[:, 0]
                earlier[group] = depth
        divergence = np.zeros(len(self.slices))
        for column, parameter in enumerate(self.outer):
            divergence += self.surrogate.curves[parameter.name][self.slices[:, column]]
        return cost, divergence

    def _bound_rows(self, parameter: Parameter, slice_ids: IntArray) -> tuple[IntArray, IntArray]:
        """For each slice: the row of the parameter's effective curve, and its largest depth that is not dead."""
        bound, last = self.surrogate.last_useful_depth(parameter)
        if bound is None:
            return np.zeros(len(slice_ids), dtype=np.int64), np.repeat(last, len(slice_ids))
        rows = self.slices[slice_ids, self.outer.index(bound)]
        return rows, last[rows]

    def _options(self, stage: int, slice_ids: IntArray, choices: IntArray) -> tuple[IntArray, FloatArray]:
        """Cost and divergence that each level adds ``[n, W]``; merged dead levels are INFEASIBLE but one.

        Args:
            stage: which inner parameter.
            slice_ids: ``[n]``.
            choices: level indices of the inner parameters before it ``[n, stage]``.
        """
        parameter = self.inner[stage]
        levels = np.array(parameter.levels, dtype=np.int64)
        rows, last = self._bound_rows(parameter, slice_ids)
        depth = np.minimum(levels[None, :], last[:, None])
        earlier = {g: self._last_depth(g, slice_ids) for g in self._unsearched(parameter.role)}
        for column, before in enumerate(self.inner[:stage]):
            if before.role == parameter.role:
                value = np.asarray(before.levels)[choices[:, column]]
                earlier[before.group] = np.minimum(value, self._last_depth(before.group, slice_ids))
        cost = self._operation_cost(parameter.role, parameter.group, slice_ids, depth, earlier)
        dead = levels[None, :] >= last[:, None]
        dead[:, -1] = False  # "full" stands for all of them
        return np.where(dead, INFEASIBLE, cost), self.surrogate.effective(parameter)[rows]

    def _ideals(self) -> tuple[IntArray, FloatArray]:
        """Lower bounds of what inner parameters add, in cost and divergence, from each stage on ``[inner + 1, S]``."""
        cost = np.zeros((len(self.inner) + 1, len(self.slices)), dtype=np.int64)
        divergence = np.zeros(cost.shape)
        for stage in reversed(range(len(self.inner))):
            parameter = self.inner[stage]
            rows, last = self._bound_rows(parameter, np.arange(len(self.slices)))
            cost[stage] = cost[stage + 1] + self._least_cost(parameter, last)
            divergence[stage] = divergence[stage + 1] + self.surrogate.effective(parameter).min(axis=1)[rows]
        return cost, divergence

    def _least_cost(self, parameter: Parameter, last: IntArray) -> IntArray:
        """The least that any level can add, whatever the other groups do, per slice ``[S]``."""
        every, bit = np.arange(len(self.slices)), 1 << parameter.group
        if self._additive[parameter.role]:
            others = [0]
        else:
            others = [item for item in range(self._table(parameter.role).shape[1]) if not item & bit]
        running, least = np.zeros(len(every), dtype=np.int64), np.full(len(every), INFEASIBLE)
        levels = set(parameter.levels)
        for depth in range(self.surrogate.space.num_layers + 1):
            reached = np.full(len(every), depth in levels) | ((depth == last) & (parameter.full >= depth))
            least = np.where(reached & (depth <= last), np.minimum(least, running), least)
            if depth < self.surrogate.space.num_layers - 1:
                added = [self._added(parameter.role, parameter.group, item, every, depth) for item in others]
                running = running + np.minimum.reduce(added)
        return np.asarray(least)

    # -- searching ------------------------------------------------------------------------------

    @property
    def ideal_cost(self) -> IntArray:
        """The cheapest completion of each slice ``[S]``."""
        return np.asarray(self.cost + self._rest_cost[0])

    @property
    def ideal_divergence(self) -> FloatArray:
        """The least divergence of each slice ``[S]``, at whatever cost."""
        return np.asarray(self.divergence + self._rest_divergence[0])

    def run(
        self,
        slice_ids: IntArray,
        collector: Collector,
        option_stride: int = 1,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Complete every assignment of the slices that ``collector`` wants, in the order given.

        ``option_stride``: look only at every so many levels (from the top), for a quick first pass.
        """
        for start in range(0, len(slice_ids), 8192):
            if on_progress is not None:
                on_progress(start, len(slice_ids), "exact front of the additive surrogate")
            ids = slice_ids[start : start + 8192]
            first = Batch(ids, self.cost[ids], self.divergence[ids], np.zeros((len(ids), 0), dtype=np.int64))
            pending = [first]
            while pending:
                batch = pending.pop()
                stage = batch.choices.shape[1]
                batch = batch.take(self._worthwhile(batch, stage, collector))
                if len(batch) == 0:
                    continue
                if stage == len(self.inner):
                    collector.add(batch)
                    continue
                piece = max(1, MAX_CELLS // len(self.inner[stage].levels))
                if len(batch) > piece:
                    pending.extend(batch.take(slice(i, i + piece)) for i in reversed(range(0, len(batch), piece)))
                else:
                    pending.append(self._expand(batch, stage, collector, option_stride))
        if on_progress is not None:
            on_progress(len(slice_ids), len(slice_ids), "exact front of the additive surrogate")

    def _worthwhile(self, batch: Batch, stage: int, collector: Collector) -> NDArray[np.bool_]:
        return collector.keep(
            batch.slice_ids,
            batch.cost + self._rest_cost[stage][batch.slice_ids],
            batch.divergence + self._rest_divergence[stage][batch.slice_ids],
        )

    def _expand(self, batch: Batch, stage: int, collector: Collector, option_stride: int) -> Batch:
        parameter = self.inner[stage]
        if self._additive[parameter.role]:  # the options of a slice are those of all its partial assignments
            distinct, position = np.unique(batch.slice_ids, return_inverse=True)
            extra_cost, extra_divergence = self._options(stage, distinct, np.zeros((len(distinct), stage), np.int64))
        else:
            position = np.arange(len(batch))
            extra_cost, extra_divergence = self._options(stage, batch.slice_ids, batch.choices)
        width = extra_cost.shape[1]
        chosen = np.arange(width)[::-1][::option_stride]
        cost = batch.cost[:, None] + extra_cost[position[:, None], chosen[None, :]]
        divergence = batch.divergence[:, None] + extra_divergence[position[:, None], chosen[None, :]]
        rest = stage + 1
        ids = np.broadcast_to(batch.slice_ids[:, None], cost.shape)
        useful = collector.keep(
            ids.ravel(),
            (cost + self._rest_cost[rest][ids]).ravel(),
            (divergence + self._rest_divergence[rest][ids]).ravel(),
        )
        useful &= cost.ravel() < INFEASIBLE
        rows, columns = np.divmod(np.flatnonzero(useful), len(chosen))
        result = Batch(
            batch.slice_ids[rows],
            cost[rows, columns],
            divergence[rows, columns],
            np.concatenate([batch.choices[rows], chosen[columns][:, None]], axis=1),
        )
        if collector.within_slice_dominance and self._is_settled(stage):
            result = result.take(undominated(result.slice_ids, result.cost, result.divergence))
        return result

    def _is_settled(self, stage: int) -> bool:
        """Whether no later parameter's cost depends on what was chosen up to ``stage`` within a slice."""
        role = self.inner[stage].role
        return self._additive[role] or all(parameter.role != role for parameter in self.inner[stage + 1 :])

    # -- results --------------------------------------------------------------------------------

    def indices(self, batch: Batch) -> IntArray:
        """Level indices in the order of the space's parameters ``[n, params]``; dead levels appear as full."""
        names = [p.name for p in self.outer] + [p.name for p in self.inner]
        values = np.concatenate([self.slices[batch.slice_ids], batch.choices], axis=1)
        return values[:, [names.index(name) for name in self.surrogate.space.names]]

    def coarse_passes(self, strides: tuple[int, ...] = (8, 4, 2)) -> Iterator[tuple[IntArray, int]]:
        """Sub-lattices of slices (from the top), coarse to fine, with the stride for the inner levels."""
        tops = np.array([len(p.levels) - 1 for p in self.outer])
        scale = np.maximum(1, (tops + 1) // 33)
        for stride in strides:
            yield np.flatnonzero(((tops - self.slices) % (stride * scale) == 0).all(axis=1)), stride


def undominated(segments: IntArray, cost: IntArray, divergence: FloatArray) -> IntArray:
    """Rows that no other row of the same segment beats in cost and divergence, one per equal pair.

    Ordered by segment, then cost.
    """
    order = np.lexsort((divergence, cost, segments))
    segment, value = segments[order], divergence[order]
    best = value.copy()  # running minimum within the segment, by doubling: exact, unlike offsets per segment
    step = 1
    longest = int(np.bincount(np.unique(segment, return_inverse=True)[1]).max()) if len(order) else 0
    while step < longest:
        same = segment[step:] == segment[:-step]
        best[step:] = np.where(same, np.minimum(best[step:], best[:-step]), best[step:])
        step *= 2
    beaten = np.zeros(len(order), dtype=np.bool_)
    beaten[1:] = (segment[1:] == segment[:-1]) & (best[:-1] <= value[1:])
    return order[~beaten]
