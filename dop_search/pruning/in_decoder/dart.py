"""DART (arXiv 2502.11494): keep a few pivots and the visual tokens that duplicate them least.

Pivots are the ``num_pivots`` visual and the ``num_pivots`` text tokens with the largest L1 norm of their keys. Each
pivot in turn adds its share of the tokens to keep: those of the pool with the lowest cosine similarity to it, which
then leave the pool. Keys and the states that are compared are those of the layer at whose door the stage stands,
after its norm.

Not reproduced: the published code reads the keys of the layer before and the states after the decoder's final norm.
Keys are taken before their rotation, which would make the L1 norm depend on the padding in front of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dop_search.pruning.in_decoder.base import StageRanking, StageSample, StageSelector, best_first
from dop_search.strategy.operations import ModelDims


@dataclass(frozen=True)
class DartSelector(StageSelector):
    """Duplication-aware selection; the chosen set depends on how many are kept."""

    name = "dart"
    num_pivots: int = 4

    def rank(self, sample: StageSample, num_kept: int, memory: Any) -> StageRanking:
        """See base class."""
        norms = sample.layer.self_attn.k_proj(sample.normed()).float().abs().sum(dim=1)
        visual = best_first(norms[sample.candidates])[: self.num_pivots]
        text = best_first(norms[sample.text])[: self.num_pivots]
        rows = torch.cat([sample.candidates[visual.tolist()], sample.text[text.tolist()]])
        states = torch.nn.functional.normalize(sample.normed().float(), dim=1)
        similarity = (states[rows] @ states[sample.candidates].T).cpu().numpy()
        chosen = visual.tolist()
        wanted = max(0, num_kept - len(chosen))
        shares = [wanted // len(rows) + (pivot < wanted % len(rows)) for pivot in range(len(rows))]
        pool = np.ones(len(sample.candidates), dtype=np.bool_)
        pool[chosen] = False
        for row, share in zip(similarity, shares, strict=True):
            order = np.argsort(row, kind="stable")
            added = order[pool[order]][:share]
            pool[added] = False
            chosen += added.tolist()
        return StageRanking(np.array([*chosen, *np.flatnonzero(pool)], dtype=np.int64))

    def rank_flops(self, dims: ModelDims, num_text: int, num_rows: int, num_candidates: int, num_kept: int) -> int:
        """See base class."""
        pivots = min(self.num_pivots, num_candidates) + min(self.num_pivots, num_text)
        return 2 * dims.hidden_size * (num_rows * dims.kv_width + pivots * num_candidates)
