"""EntropyPrune (arXiv 2602.17196): keep the visual tokens whose heads ask for the most different things.

A token scores the entropy of the eigenvalues of ``Z Zᵀ / H``, where row ``h`` of ``Z`` is its query of head ``h`` minus
the mean over its ``H`` heads. Heads are rotated alike, so that the rotation of queries changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.linalg import eigvalsh

from dop_search.pruning.in_decoder.base import StageRanking, StageSample, StageSelector, best_first
from dop_search.strategy.operations import ModelDims

SMALLEST = 1e-10


@dataclass(frozen=True)
class EntropyPruneSelector(StageSelector):
    """Ranks by the queries of the layer below the one from which tokens are missing, which its stage is, as FastV's."""

    name = "entropyprune"

    def rank(self, sample: StageSample, num_kept: int, memory: Any) -> StageRanking:
        return StageRanking(best_first(head_entropy(sample.queries(sample.candidates).transpose(0, 1))))

    def rank_flops(self, dims: ModelDims, num_text: int, num_rows: int, num_candidates: int, num_kept: int) -> int:
        """See base class: queries, their products and, at 4/3 of a cube, eigenvalues."""
        gram = 2 * dims.num_heads * dims.query_width
        return num_candidates * (2 * dims.hidden_size * dims.query_width + gram + 4 * dims.num_heads**3 // 3)


def head_entropy(queries: Tensor) -> Tensor:
    """``[tokens]`` float64 entropies, relative to ``log H``, of queries ``[tokens, H, head_dim]``."""
    centred = queries.double() - queries.double().mean(dim=1, keepdim=True)
    values = eigvalsh(centred @ centred.mT / queries.shape[1]).clamp_min(SMALLEST)
    return -(values * values.log()).sum(dim=-1) / math.log(max(2, queries.shape[1]))
