"""Rank visual tokens by the attention that the last token of the prompt pays them (FastV, PyramidDrop, FlowCut)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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

    ``rotated``: whether queries and keys are rotated first; VScan's released code for Qwen2.5-VL does not.
    """

    name = "fastv"
    rotated: bool = True

    def rank(self, sample: StageSample, num_kept: int, memory: Any) -> StageRanking:
        last = torch.tensor([len(sample.hidden) - 1], device=sample.hidden.device)
        received = sample.attention(last, self.rotated).mean(dim=0)[0]
        return StageRanking(best_first(received[sample.candidates]))

    def rank_flops(self, dims: ModelDims, num_text: int, num_rows: int, num_candidates: int, num_kept: int) -> int:
        return attention_rows_flops(dims, 1, num_rows)


@dataclass(frozen=True)
class PyramidDropSelector(FastVSelector):
    """PyramidDrop (arXiv 2410.17247): the same score, by the projections of the layer from which tokens are missing.

    A stage at layer ``l`` ranks what enters layer ``l``; the tokens that leave have no operation from ``l`` on.
    """

    name = "pyramiddrop"


@dataclass(frozen=True)
class FlowCutSelector(StageSelector):
    """FlowCut (arXiv 2505.19536) in the decoder, by what the layer below the one from which tokens are missing shows.

    Two distributions over the visual tokens alone, of the last token's query over their keys and of its value over
    their values (mean over heads), are added and multiplied by the L1 norm of a token's value (mean over heads).
    """

    name = "flowcut_two_stage"

    def rank(self, sample: StageSample, num_kept: int, memory: Any) -> StageRanking:
        last = torch.tensor([len(sample.hidden) - 1], device=sample.hidden.device)
        values = sample.values(sample.candidates).float()
        relation = _spread(sample.queries(last), sample.keys(sample.candidates))
        semantic = _spread(sample.values(last), values)
        return StageRanking(best_first((relation + semantic) * values.mean(dim=0).abs().sum(dim=1)))

    def rank_flops(self, dims: ModelDims, num_text: int, num_rows: int, num_candidates: int, num_kept: int) -> int:
        """See base class: a query, a value and the candidates' keys and values, and two rows of products."""
        rows = dims.query_width + dims.kv_width
        return 2 * dims.hidden_size * (rows + 2 * num_candidates * dims.kv_width) + 2 * num_candidates * rows


def _spread(one: Tensor, many: Tensor) -> Tensor:
    """``[n]`` softmax of a vector's products with others, mean over heads: ``[heads, 1 or n, head_dim]`` each."""
    many = many.repeat_interleave(len(one) // len(many), dim=0).float()
    scores = one.float() @ many.transpose(1, 2) * one.shape[2] ** -0.5
    return scores.softmax(dim=-1).mean(dim=0)[0]
