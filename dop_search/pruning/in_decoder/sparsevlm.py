"""SparseVLM (arXiv 2410.04417): rank visual tokens by the attention of relevant text, recycle some that leave.

Once, from the embeddings that enter the decoder: ``R = softmax over text(V Tᵀ)``, averaged over the visual tokens; the
*raters* are the text tokens above the mean. Text is what follows the first visual token. At each stage a visual token
scores the attention it receives from the raters, mean over raters and heads.

Recycling: of the tokens that would leave, the best 30 % are clustered by density peaks (``rho = exp(-mean squared
distance to the k nearest)``, ``delta`` the distance to the nearest denser token, centres have the largest
``rho * delta``) into ``n // 10 + 1`` clusters; each centre's slot goes on with the mean of its cluster, at the centre's
position. The group sizes of the strategy count recycled tokens as kept, see :func:`split_kept`.

Not reproduced: the published code cuts after the layer whose attention it reads and renumbers positions; here the cut
is before it (as its count of tokens says) and positions stay. The rank-based adaptive keep ratio of the paper's first
version, which the published keep lists replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
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

RECYCLED_SHARE = 0.3
"""Share of the leaving tokens that is clustered."""
TOKENS_PER_CLUSTER = 10
NUM_NEIGHBOURS = 5


@dataclass(frozen=True)
class SparseVlmSelector(StageSelector):
    """Text-guided ranking, with or without recycling."""

    name = "sparsevlm"
    recycle: bool = True

    def begin(self, sample: StageSample) -> Tensor:
        """The raters' weights over all text rows: ``[num_text]``, summing to 1."""
        visual, text = sample.hidden[sample.candidates].float(), sample.hidden[sample.text].float()
        after = sample.text > sample.candidates[0]
        if not bool(after.any()):
            after = torch.ones_like(after)
        relevance = (visual @ text.T).masked_fill(~after, -torch.inf).softmax(dim=1).mean(dim=0)
        raters = after & (relevance > relevance[after].mean())
        if not bool(raters.any()):  # all equally relevant
            raters = after
        return raters / raters.sum()

    def rank(self, sample: StageSample, num_kept: int, memory: Any) -> StageRanking:
        """See base class."""
        received = sample.attention(sample.text).mean(dim=0)[:, sample.candidates]
        order = best_first((memory[None] @ received)[0])
        num_best, num_clustered = split_kept(len(order), num_kept) if self.recycle else (num_kept, 0)
        if num_kept == num_best:
            return StageRanking(order)
        clustered = torch.from_numpy(order[num_best : num_best + num_clustered].copy()).to(sample.hidden.device)
        states = sample.hidden[sample.candidates[clustered]]
        centres, members = density_peaks(states.float(), num_kept - num_best)
        sums = torch.zeros(len(centres), states.shape[1], device=states.device).index_add_(0, members, states.float())
        means = sums / members.bincount(minlength=len(centres))[:, None]
        slots = clustered[centres].cpu().numpy()
        rest = order[num_best:]
        final = np.concatenate([order[:num_best], slots, rest[~np.isin(rest, slots)]])
        return StageRanking(final, merged=(clustered[centres], means.to(states.dtype)))

    def begin_flops(self, dims: ModelDims, num_text: int, num_visual: int) -> int:
        """See base class."""
        return 2 * dims.hidden_size * num_text * num_visual

    def rank_flops(self, dims: ModelDims, num_text: int, num_rows: int, num_candidates: int, num_kept: int) -> int:
        """See base class."""
        num_best, num_clustered = split_kept(num_candidates, num_kept) if self.recycle else (num_kept, 0)
        distances = 2 * dims.hidden_size * num_clustered**2 if num_best < num_kept else 0
        # the weighted mean over text rows, then the rows themselves
        return attention_rows_flops(dims, num_text, num_rows) + 2 * num_text * num_candidates + distances


def split_kept(num_candidates: int, num_kept: int) -> tuple[int, int]:
    """How many tokens are kept by score and how many of the others are clustered, if ``num_kept`` slots go on.

    The largest number kept by score that leaves room for the clusters of the rest. No token is recycled if all stay.
    """
    for best in range(num_kept, -1, -1):
        if with_recycled(num_candidates, best) <= num_kept:
            return best, int(RECYCLED_SHARE * (num_candidates - best))
    return num_kept, 0


def with_recycled(num_candidates: int, num_best: int) -> int:
    """Slots that go on when ``num_best`` tokens are kept by score: those, and one for each cluster."""
    clustered = int(RECYCLED_SHARE * (num_candidates - num_best))
    return num_best + (clustered // TOKENS_PER_CLUSTER + 1 if clustered else 0)


def density_peaks(states: Tensor, num_centres: int) -> tuple[Tensor, Tensor]:
    """Cluster ``states`` ``[n, width]`` by density peaks (k nearest neighbours; Du et al. 2016).

    Returns:
        The centres (``[num_centres]``, by decreasing score) and the cluster of every state (``[n]``).
    """
    squares = states.pow(2).sum(dim=1)
    squared = (squares[:, None] + squares[None, :] - 2 * (states @ states.T)).clamp_min(0.0) / states.shape[1]
    squared.fill_diagonal_(0.0)
    neighbours = min(NUM_NEIGHBOURS, len(states))
    density = (-squared.topk(neighbours, dim=1, largest=False).values.mean(dim=1)).exp()
    place = torch.arange(len(states), device=states.device)
    tied = (density[None, :] == density[:, None]) & (place[None, :] < place[:, None])
    denser = (density[None, :] > density[:, None]) | tied  # ties go to the earlier token, so one token is the densest
    distances = squared.sqrt()
    gap = distances.masked_fill(~denser, torch.inf).min(dim=1).values
    gap = torch.where(gap.isinf(), distances.max(), gap)
    score = density * gap
    centres = torch.argsort(score, descending=True, stable=True)[:num_centres]
    members = distances[:, centres].argmin(dim=1)
    members[centres] = torch.arange(len(centres), device=states.device)
    return centres, members
