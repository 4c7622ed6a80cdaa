"""Selection inside the decoder: at a stage the tokens are ranked, and the rows are laid out anew.

Before the first stage all groups do the same, so that any assignment of tokens to groups is right. At a stage the
tokens of the groups that have done the same so far (the pool) are ranked and dealt out to these groups, best first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dop_search.models.adapter import ModelAdapter
from dop_search.pruning.attention import ForwardTables
from dop_search.pruning.in_decoder import StageSample, StageSelector, make_stage_selector
from dop_search.pruning.layout import TEXT, Layout
from dop_search.strategy import Strategy
from dop_search.strategy.operations import ModelDims, TokenCounts
from dop_search.strategy.stages import Pool, stage_pools
from dop_search.strategy.steps import Groups, layer_steps
from dop_search.utils.errors import DopError


class StagePlan:
    """When a strategy ranks, which groups it mixes then, and how many tokens go on together."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.selector: StageSelector = make_stage_selector(strategy.selector, strategy.selector_options)
        self.stages = strategy.stages
        pools = stage_pools(strategy.groups, strategy.stages, strategy.num_layers)
        last = stage_pools(strategy.groups, [strategy.num_layers], strategy.num_layers)
        self.pools: dict[int, Pool] = dict(zip(self.stages, pools, strict=True))
        self._kept: dict[int, Pool] = dict(zip(self.stages, [*pools[1:], *last], strict=True))

    def pool_sizes(self, stage: int, num_visual: int) -> list[tuple[int, int]]:
        """``(group, tokens)`` of the groups that the stage ranks, best first."""
        sizes = self.strategy.group_sizes(num_visual)
        return [(group, sizes[group]) for group in sorted(self.pools[stage])]

    def num_kept(self, stage: int, num_visual: int) -> int:
        """Tokens that are still alike after the stage."""
        sizes = self.strategy.group_sizes(num_visual)
        return sum(sizes[group] for group in self._kept[stage])

    def flops(self, dims: ModelDims, counts: TokenCounts) -> int:
        """FLOPs of all rankings of one sample, which come on top of the strategy's own."""
        if not counts.visual:
            return 0
        steps = layer_steps(self.strategy)
        sizes = self.strategy.group_sizes(counts.visual)
        total = self.selector.begin_flops(dims, counts.text, sum(sizes))
        for stage in self.stages:
            alive = steps[stage - 1].alive if stage else frozenset(range(len(sizes)))
            rows = counts.text + sum(sizes[group] for group in alive)
            candidates = sum(size for _, size in self.pool_sizes(stage, counts.visual))
            if candidates:
                total += self.selector.rank_flops(
                    dims, counts.text, rows, candidates, self.num_kept(stage, counts.visual)
                )
        return total


class StageRun:
    """The stages of one prefill.

    ``num_visual``: visual tokens of each sample.
    """

    def __init__(self, plan: StagePlan, adapter: ModelAdapter, num_visual: list[int]) -> None:
        self.plan, self.adapter, self.num_visual = plan, adapter, num_visual
        self._memory: dict[int, Any] = {}

    def begin(self, hidden: Tensor, layout: Layout, tables: ForwardTables) -> None:
        """Let the criterion look at the embeddings."""
        everything = layout.rows(frozenset(range(len(self.plan.strategy.groups))))
        for index, start, stop in _slices(layout.sample[everything], layout.num_samples):
            if self.num_visual[index]:
                rows = np.arange(start, stop)
                visual = layout.group[rows] != TEXT
                sample = self._sample(0, hidden, tables, start, stop, ~visual, visual)
                self._memory[index] = self.plan.selector.begin(sample)

    def refine(
        self, stage: int, hidden: Tensor, before: Groups, layout: Layout, tables: ForwardTables, entry: Tensor
    ) -> tuple[Tensor, Layout, ForwardTables, Tensor]:
        """Rank, and lay out anew the rows that are there; none leaves here, but their groups change.

        Args:
            stage: the layer whose turn it is.
            hidden: ``[rows of (text + before), hidden_size]``.
            before: groups whose rows ``hidden`` holds.
            layout, tables: of ``hidden`` and the rows that have left.
            entry: place of every row of ``layout`` in the padded batch.

        Returns:
            The hidden states (with merged tokens where the criterion merges), layout, tables and places.
        """
        present = layout.rows(before)
        groups = layout.group[present].copy()
        sample_of = layout.sample[present]
        index = layout.tensor(present)
        tables = tables.select(index)
        pool = list(self.plan.pools[stage])
        for number, start, stop in _slices(sample_of, layout.num_samples):
            own = groups[start:stop]
            candidates = np.flatnonzero(np.isin(own, pool))
            if not len(candidates):
                continue
            sample = self._sample(stage, hidden, tables, start, stop, own == TEXT, np.isin(own, pool))
            kept = self.plan.num_kept(stage, self.num_visual[number])
            ranking = self.plan.selector.rank(sample, kept, self._memory.get(number))
            if not np.array_equal(np.sort(ranking.order), np.arange(len(candidates))):
                raise DopError(
                    f"{self.plan.selector.name!r} must rank each of {len(candidates)} tokens once, but its order has "
                    f"{len(ranking.order)} entries, {len(np.unique(ranking.order))} of them different"
                )
            sizes = self.plan.pool_sizes(stage, self.num_visual[number])
            labels = np.repeat([group for group, _ in sizes], [size for _, size in sizes])
            groups[start + candidates[ranking.order]] = labels
            if ranking.merged is not None:
                places, states = ranking.merged
                hidden = hidden.index_copy(0, start + sample.candidates[places], states)
        layout = Layout(sample_of, groups, layout.num_samples, layout.device)
        return hidden, layout, tables, entry.index_select(0, index)

    def _sample(
        self,
        layer: int,
        hidden: Tensor,
        tables: ForwardTables,
        start: int,
        stop: int,
        text: np.ndarray,
        candidates: np.ndarray,
    ) -> StageSample:
        return StageSample(
            layer=self.adapter.layers[layer],
            hidden=hidden[start:stop],
            cos=tables.cos[start:stop],
            sin=tables.sin[start:stop],
            text=torch.from_numpy(np.flatnonzero(text)).to(hidden.device),
            candidates=torch.from_numpy(np.flatnonzero(candidates)).to(hidden.device),
        )


def _slices(sample: np.ndarray, num_samples: int) -> list[tuple[int, int, int]]:
    """``(sample, first row, end)`` of rows that are ordered by sample."""
    bounds = np.searchsorted(sample, np.arange(num_samples + 1))
    return [(index, int(bounds[index]), int(bounds[index + 1])) for index in range(num_samples)]
