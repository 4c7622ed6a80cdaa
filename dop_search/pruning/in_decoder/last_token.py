"""Rank visual tokens by the attention that the last token of the prompt pays them (FastV, PyramidDrop)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dop_search.pruning.in_decoder.base import (
    StageRanking,
    StageSample,
    StageSelector,
    attention_rows_flops,
    best_first,
)
from dop_search.strategy.operations import ModelDims


@dataclass(frozen=True)
class FastVSelector(StageSelector):
    """FastV (arXiv 2403.06764): head-mean attention probability of the last prompt token, computed as one row.

    FastV at layer ``K`` goes by the attention of layer ``K - 1``, so its stage is ``K - 1``: the ranking is known
    before that layer runs, and what the leaving tokens would still do in it for themselves is dead.
    """

    name = "fastv"

    def rank(self, sample: StageSample, num_kept: int, memory: Any) -> StageRanking:
        """See base class."""
        last = torch.tensor([len(sample.hidden) - 1], device=sample.hidden.device)
        received = sample.attention(last).mean(dim=0)[0]
        return StageRanking(best_first(received[sample.candidates]))

    def rank_flops(self, dims: ModelDims, num_text: int, num_rows: int, num_candidates: int, num_kept: int) -> int:
        """See base class."""
        return attention_rows_flops(dims, 1, num_rows)


@dataclass(frozen=True)
class PyramidDropSelector(FastVSelector):
    """PyramidDrop (arXiv 2410.17247): the same score, by the projections of the layer from which tokens are missing.

    A stage at layer ``l`` ranks what enters layer ``l``; the tokens that leave have no operation from ``l`` on.
    """

    name = "pyramiddrop"
