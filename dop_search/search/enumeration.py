"""Enumeration of a space by slices, with bounds: what the exact solvers of the surrogate are made of.

A *slice* fixes the number of visual tokens and every group's kv (or attention) depth. Within a slice the cost is
a sum over the remaining parameters, although the score product ``n_q * n_kv`` makes it bilinear in general::

    cost(slice, q_1, mlp_1, q_2, ...) = base(slice) + sum_p part_p(slice, level_p)

So partial assignments can be dropped as soon as their ideal completion (the cheapest and the least divergent
level of every parameter that is left) is of no use, and nothing is lost by it. All costs are exact integers,
summed over the samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dop_search.cost.model import CostModel
from dop_search.search.space import Parameter
from dop_search.search.store import FloatArray, OnProgress
from dop_search.search.surrogate import IntArray, Surrogate

MAX_CELLS = 1_000_000
"""Partial assignments times levels that are looked at in one step; bounds the memory."""

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
        assert cost_model.dims.num_layers == space.num_layers, (cost_model.dims, space.num_layers)
        self.surrogate = surrogate
        self.cost_model = cost_model
        self.outer = [space.tokens, *(p for p in space.parameters if p.role in ("attention", "kv"))]
        # MLPs first: they weigh most in cost and divergence, so bounds bite early.
        self.inner = sorted((p for p in space.parameters if p.role in ("q", "mlp")), key=lambda p: p.role)
        grids = np.meshgrid(*(np.arange(len(p.levels)) for p in self.outer), indexing="ij")
        self.slices: IntArray = np.stack([grid.ravel() for grid in grids], axis=1).astype(np.int64)
        self._moments = cost_model.moments(space.tokens.levels, space.shares)
        self._kv_depth = self._depths("kv")
        self.cost, self.divergence = self._bases()
        self._rest_cost, self._rest_divergence = self._ideals()

    # -- building -------------------------------------------------------------------------------

    def _depths(self, role: str) -> IntArray:
        """Exit depth of kv per slice and group ``[S, G]`` (``role`` kv), without a parameter the full depth."""
        space = self.surrogate.space
        result = np.full((len(self.slices), len(space.shares)), space.num_layers, dtype=np.int64)
        for column, parameter in enumerate(self.outer):
            if parameter.role in ("attention", role):
                result[:, parameter.group] = np.asarray(parameter.levels)[self.slices[:, column]]
        return result

    def _bases(self) -> tuple[IntArray, FloatArray]:
        space, coefficients, moments = self.surrogate.space, self.cost_model.coefficients, self._moments
        tokens, depth = self.slices[:, 0], self._kv_depth
        cost = np.full(len(self.slices), self.cost_model.floor_total, dtype=np.int64)
        per_layer = coefficients.kv * moments.tokens + coefficients.score * moments.text_pairs
        cost += (depth * per_layer[tokens]).sum(axis=1)
        unread = coefficients.score * moments.unread_pairs[tokens]
        cost -= ((depth == space.num_layers) * unread).sum(axis=1)
        searched = {(p.role, p.group) for p in self.inner}
        every = np.arange(len(self.slices))
        for group in range(len(space.shares)):
            last = np.maximum(depth[:, group] - 1, 0)[:, None]
            for role in ("q", "mlp"):  # tied or full ones run until they are dead
                if (role, group) not in searched:
                    cost += self._operation_cost(role, group, every, last)[:, 0]
        divergence = np.zeros(len(self.slices))
        for column, parameter in enumerate(self.outer):
            divergence += self.surrogate.curves[parameter.name][self.slices[:, column]]
        return cost, divergence

    def _operation_cost(self, role: str, group: int, slice_ids: IntArray, depth: IntArray) -> IntArray:
        """Cost of running ``role`` of a group in ``depth`` layers, shape of ``depth`` (``[slices, W]``)."""
        coefficients, moments = self.cost_model.coefficients, self._moments
        tokens = self.slices[slice_ids, 0]
        if role == "mlp":
            return np.asarray(depth * (coefficients.mlp * moments.tokens[tokens, group])[:, None])
        per_layer = coefficients.q * moments.tokens + coefficients.score * moments.text_pairs
        cost: IntArray = depth * per_layer[tokens, group][:, None]
        for other in range(self._kv_depth.shape[1]):
            both = np.minimum(depth, self._kv_depth[slice_ids, other][:, None])
            cost += both * (coefficients.score * moments.pairs[tokens, group, other])[:, None]
        return cost

    def _bound_rows(self, parameter: Parameter, slice_ids: IntArray) -> tuple[IntArray, IntArray]:
        """For each slice: the row of the parameter's effective curve, and its largest depth that is not dead."""
        bound, last = self.surrogate.last_useful_depth(parameter)
        if bound is None:
            return np.zeros(len(slice_ids), dtype=np.int64), np.repeat(last, len(slice_ids))
        rows = self.slices[slice_ids, self.outer.index(bound)]
        return rows, last[rows]

    def _options(self, parameter: Parameter, slice_ids: IntArray) -> tuple[IntArray, FloatArray]:
        """Cost and divergence that each level adds ``[slices, W]``; merged dead levels are INFEASIBLE but one."""
        levels = np.array(parameter.levels, dtype=np.int64)
        rows, last = self._bound_rows(parameter, slice_ids)
        depth = np.minimum(levels[None, :], last[:, None])
        cost = self._operation_cost(parameter.role, parameter.group, slice_ids, depth)
        dead = levels[None, :] >= last[:, None]
        dead[:, -1] = False  # "full" stands for all of them
        return np.where(dead, INFEASIBLE, cost), self.surrogate.effective(parameter)[rows]

    def _ideals(self) -> tuple[IntArray, FloatArray]:
        """Least cost and least divergence of the inner parameters from each stage on ``[inner + 1, S]``."""
        cost = np.zeros((len(self.inner) + 1, len(self.slices)), dtype=np.int64)
        divergence = np.zeros(cost.shape)
        for stage in reversed(range(len(self.inner))):
            parameter = self.inner[stage]
            every = np.arange(len(self.slices))
            rows, last = self._bound_rows(parameter, every)
            lowest = np.minimum(parameter.levels[0], last)[:, None]
            cost[stage] = cost[stage + 1] + self._operation_cost(parameter.role, parameter.group, every, lowest)[:, 0]
            divergence[stage] = divergence[stage + 1] + self.surrogate.effective(parameter).min(axis=1)[rows]
        return cost, divergence

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
        slices, position = np.unique(batch.slice_ids, return_inverse=True)
        extra_cost, extra_divergence = self._options(self.inner[stage], slices)
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
        if collector.within_slice_dominance:
            result = result.take(undominated(result.slice_ids, result.cost, result.divergence))
        return result

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
