"""The tables of an enumeration: prices of every number of visual tokens, blocks of them, kv depths, options.

**Blocks.** A block is a run of numbers of visual tokens between two *ends*. There prices are lowered (``lower``) so
that the straight line between the ends is nowhere above the price, or raised (``upper``). Divided by a ``scale`` that
is linear between the ends, a lowered cost within the block is at least a convex combination of its values at the ends,
and a raised one at most. So depths below a line ``D + x cost / scale`` somewhere in a block are so at one of its ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dop_search.search.store import FloatArray
from dop_search.search.surrogate import IntArray, Surrogate
from dop_search.strategy.cost.model import CostModel
from dop_search.utils.errors import ConfigError

BLOCKS_PER_OCTAVE = 4
"""Blocks of numbers of visual tokens while that doubles."""

Role = Literal["q", "mlp"]
ROLES: tuple[Role, ...] = ("q", "mlp")


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


class Blocks:
    """A surrogate's assignments under a cost model: prices, blocks, kv depths, options.

    Attributes:
        levels: numbers of visual tokens ``[T]``.
        fixed: what is paid beside the layers.
        prices: of every feature (sets of groups in a layer of a kind) for each of them ``[T, F]``.
        before: layers of each kind before each layer ``[kinds, L]``.
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
        self.kinds, self.num_kinds = table.kinds, table.attention.shape[1]
        of_kind = self.kinds == np.arange(self.num_kinds)[:, None]
        self.before: IntArray = np.cumsum(of_kind, axis=1) - of_kind
        self.prices: IntArray = np.concatenate(
            [table.attention.reshape(shape), table.mlp.reshape(shape), table.last], axis=1
        )
        self.largest_nats = sum(float(np.abs(curve).max()) for curve in surrogate.curves.values()) or 1.0
        self._make_kv()
        self._make_blocks()
        self.options = {(role, g): self._options_of(role, g) for role in ROLES for g in range(self.num_groups)}

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
        self.keys: IntArray = (self.kv_depth[:, None, :] > layers[None, :, None]) @ bits  # [S, L]
        code = self.keys[:, :-1] + (self.kinds[:-1] << self.num_groups)
        sets = np.arange(self.num_kinds << self.num_groups)
        self.num_layers_of = (code[:, :, None] == sets).sum(axis=1)  # [S, kinds * 2**G]

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
        self.lower = prices[self.ends] - np.maximum.reduceat(line - prices, starts)[self.end_block].clip(0)
        self.upper = prices[self.ends] + np.maximum.reduceat(prices - line, starts)[self.end_block].clip(0)
        whole = self.num_layers * (prices.max(axis=1) + 1) + self.fixed
        self.level_scale = whole[low] + share * (whole[high] - whole[low])  # [T], linear within a block
        self.scale = whole[self.ends]
        nats = self.token_nats
        nats_line = nats[low] + share * (nats[high] - nats[low])
        self.token_sag = np.maximum.reduceat(nats_line - nats, starts).clip(0)  # [B]

    def table_of(self, prices: NDArray[Any], role: Role) -> NDArray[Any]:
        """The attention's or the MLP's part of ``[n, F]``: ``[n, 2**G that run it, kinds (MLPs: 1), 2**G keys]``."""
        sets = 1 << self.num_groups
        first, kinds = (0, self.num_kinds) if role == "q" else (self.num_kinds, 1)
        part = prices[:, first * sets * sets : (first + kinds) * sets * sets]
        return part.reshape(-1, kinds, sets, sets).swapaxes(1, 2)

    def marginals(self, prices: NDArray[Any], role: Role, group: int) -> NDArray[Any]:
        """What a group that is a key adds to the groups without it ``[n, sets without it, kinds, sets of keys with
        it]``."""
        table, sets = self.table_of(prices, role), np.arange(1 << self.num_groups)
        without, inside = sets[sets >> group & 1 == 0], sets[sets >> group & 1 == 1]
        return (table[:, without | 1 << group] - table[:, without])[..., inside]

    def is_additive(self, role: Role) -> bool:
        """Whether what a group adds is the same whatever other groups are there."""
        added = [self.marginals(self.prices, role, group) for group in range(self.num_groups)]
        return all(bool((part == part[:, :1]).all()) for part in added)

    def _options_of(self, role: Role, group: int) -> tuple[FloatArray, IntArray]:
        """Divergence of each depth (infinite if there is no such option) and its level index ``[kv levels, L]``."""
        parameter = self.space.find(role, group)
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

    def features(self, depths: Depths) -> IntArray:
        """In how many layers each price is paid ``[n, F]``.

        The layers in which exactly some groups run, and exactly some are keys, are those between two of their depths.
        """
        sets, count = 1 << self.num_groups, len(depths)
        result = np.zeros((self.prices.shape[1], count), dtype=np.int64)
        keys = self._between(self.kv_depth[depths.kv].T)
        for column, row in enumerate((0, self.num_kinds * sets * sets)):
            runs = self._between(depths.inner[:, column].T)
            for chosen, offered in np.ndindex(sets, sets):
                if chosen & ~offered == 0:  # what is no key is dead, and does not run
                    first = np.maximum(runs[0][chosen], keys[0][offered])
                    end = np.minimum(runs[1][chosen], keys[1][offered])
                    at = row + chosen * sets + offered
                    if column or self.num_kinds == 1:
                        result[at] = np.maximum(end - first, 0)
                        continue
                    between = self.before[:, end] - self.before[:, np.minimum(first, self.num_layers - 1)]
                    result[at : row + self.num_kinds * sets * sets : sets * sets] = np.maximum(between, 0)
        result[self.keys[depths.kv, -1] - sets, np.arange(count)] = 1
        return result.T

    def _between(self, depths: IntArray) -> tuple[list[NDArray[np.int16]], list[NDArray[np.int16]]]:
        """First layer in which exactly a set of groups is below its depths ``[G, n]``, and the one after the last, of
        all layers but the last, per set."""
        its, groups = depths.astype(np.int16), range(self.num_groups)
        zero, most = np.zeros_like(its[0]), np.full_like(its[0], self.num_layers - 1)
        sets = range(1 << self.num_groups)
        first = [reduce(np.maximum, [its[g] for g in groups if not chosen >> g & 1], zero) for chosen in sets]
        end = [reduce(np.minimum, [its[g] for g in groups if chosen >> g & 1], most) for chosen in sets]
        return first, end

    def cost(self, features: IntArray, level: IntArray) -> IntArray:
        """Exact total cost of depths (given by their features) at levels ``[n]``."""
        return np.asarray(np.einsum("nf,nf->n", features, self.prices[level]) + self.fixed)

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
            elif parameter.role == "q" or parameter.role == "mlp":
                table = self.options[parameter.role, g][1]
                columns.append(table[self.kv_level[depths.kv, g], depths.inner[:, ROLES.index(parameter.role), g]])
            else:
                columns.append(self.kv_level[depths.kv, g])
        return np.stack(columns, axis=1)


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
