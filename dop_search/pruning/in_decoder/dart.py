"""DART (arXiv 2502.11494): keep a few pivots and the visual tokens that duplicate them least.

Pivots are the visual tokens, and the text tokens after the image, with the largest L1 norm of their keys. Each pivot
in turn, visual ones first, adds its share of the tokens to keep: those of the pool with the lowest cosine similarity to
it, which then leave the pool. Keys and the states that are compared are those of the layer at whose door the stage
stands, after its norm.

Not reproduced: the published code reads the keys of the layer before and the states after the decoder's final norm.
Keys are taken before their rotation, which would make the L1 norm depend on the padding in front of a sample. The
published code visits the pivots in the order of a Python set, and rounds each pivot's share down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dop_search.pruning.in_decoder.base import StageRanking, StageSample, StageSelector, best_first
from dop_search.strategy.operations import ModelDims


@dataclass(frozen=True)
class DartSelector(StageSelector):
    """Duplication-aware selection; the chosen set depends on how many are kept.

    Args:
        num_pivots: visual tokens that are pivots.
        num_text_pivots: text tokens that are pivots.
    """

    name = "dart"
    version = 2
    num_pivots: int = 4
    num_text_pivots: int = 4

    def rank(self, sample: StageSample, num_kept: int, memory: Any) -> StageRanking:
        states = sample.normed()
        norms = sample.layer.self_attn.k_proj(states).float().abs().sum(dim=1)
        return StageRanking(self.order(states, norms, sample.candidates, sample.text[sample.text_after()], num_kept))

    def order(self, states: Tensor, norms: Tensor, candidates: Tensor, text: Tensor, num_kept: int) -> np.ndarray:
        """Places in ``candidates``, the ``num_kept`` chosen ones first.

        Args:
            states: ``[num_rows, hidden_size]`` what is compared.
            norms: ``[num_rows]`` L1 norms of the keys.
            candidates: rows of the visual tokens.
            text: rows of the text that pivots are taken from.
        """
        visual = best_first(norms[candidates])[: self.num_pivots]
        words = best_first(norms[text])[: self.num_text_pivots]
        rows = torch.cat([candidates[visual.tolist()], text[words.tolist()]])
        units = torch.nn.functional.normalize(states.float(), dim=1)
        similarity = (units[rows] @ units[candidates].T).cpu().numpy()
        chosen = visual.tolist()
        wanted = max(0, num_kept - len(chosen))
        shares = [wanted // len(rows) + (pivot < wanted % len(rows)) for pivot in range(len(rows))]
        pool = np.ones(len(candidates), dtype=np.bool_)
        pool[chosen] = False
        for row, share in zip(similarity, shares, strict=True):
            order = np.argsort(row, kind="stable")
            added = order[pool[order]][:share]
            pool[added] = False
            chosen += added.tolist()
        return np.array([*chosen, *np.flatnonzero(pool)], dtype=np.int64)

    def rank_flops(self, dims: ModelDims, num_text: int, num_rows: int, num_candidates: int, num_kept: int) -> int:
        """See base class; text before the image gives no pivots, but is counted."""
        pivots = min(self.num_pivots, num_candidates) + min(self.num_text_pivots, num_text)
        return 2 * dims.hidden_size * (num_rows * dims.kv_width + pivots * num_candidates)
