"""FitPrune (arXiv 2409.10197), online part: rank by the attention received from visual and from text tokens.

``self_i`` and ``cross_i`` are the attention that token ``i`` receives from the visual and from the text rows: of every
pair the maximum over heads, then the mean over rows; a token scores their product. Rows are worked off in chunks, so
that no attention map exists.

Not reproduced: the published code reads the map that eager attention has made anyway. Here queries and keys are
computed once more at each stage, which :meth:`FitPruneSelector.rank_flops` charges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dop_search.pruning.in_decoder.base import (
    StageRanking,
    StageSample,
    StageSelector,
    attention_probabilities,
    attention_rows_flops,
    best_first,
)
from dop_search.strategy.operations import ModelDims

CHUNK_ROWS = 128


@dataclass(frozen=True)
class FitPruneSelector(StageSelector):
    """Self attention times cross attention."""

    name = "fitprune"
    version = 2

    def rank(self, sample: StageSample, num_kept: int, memory: Any) -> StageRanking:
        own, cross = received_attention(sample)
        return StageRanking(best_first(own.double() * cross.double()))

    def rank_flops(self, dims: ModelDims, num_text: int, num_rows: int, num_candidates: int, num_kept: int) -> int:
        return attention_rows_flops(dims, num_text + num_candidates, num_rows)


def received_attention(sample: StageSample) -> tuple[Tensor, Tensor]:
    """Attention that each candidate receives from visual and from text rows, each ``[num_candidates]`` float32."""
    keys = sample.keys()
    result = []
    for rows in (sample.candidates, sample.text):
        parts = [
            attention_probabilities(sample.layer.self_attn, sample.queries(part), keys, part)[:, :, sample.candidates]
            .max(dim=0)
            .values.sum(dim=0)
            for part in rows.split(CHUNK_ROWS)
        ]
        result.append(torch.stack(parts).sum(dim=0) / max(1, len(rows)))
    return result[0], result[1]
