"""AdaptInfer (arXiv 2508.06084): attention from the question, each of its words weighted by how much words attend.

In each head a word of the text after the image weighs as much as it gives to and receives from that text. A visual
token scores what it receives from the words so weighted, summed over heads. Weights are made anew at every stage.

Not reproduced: the released code cuts after the layer whose attention it reads; here before it, as its counts say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
class AdaptInferSelector(StageSelector):
    """Ranks by the layer from which tokens are missing."""

    name = "adaptinfer"

    def rank(self, sample: StageSample, num_kept: int, memory: Any) -> StageRanking:
        attention, after = sample.attention(sample.text), sample.text_after()
        among = attention[:, :, sample.text] * (after[:, None] & after)
        return StageRanking(best_first(word_scores(among, attention[:, :, sample.candidates])))

    def rank_flops(self, dims: ModelDims, num_text: int, num_rows: int, num_candidates: int, num_kept: int) -> int:
        """See base class; text before the image is computed as well, and weighs nothing."""
        return attention_rows_flops(dims, num_text, num_rows) + 2 * dims.num_heads * num_text * num_candidates


def word_scores(among: Tensor, received: Tensor) -> Tensor:
    """``[visual]`` scores from the attention of words to words ``[heads, words, words]`` and to visual tokens."""
    weights = among.sum(dim=1) + among.sum(dim=2) - among.diagonal(dim1=1, dim2=2)
    return (weights[:, None] @ received).sum(dim=(0, 1))
