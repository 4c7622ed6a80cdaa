"""Rank visual tokens by the attention of relevant text: SparseVLM (arXiv 2410.04417) in both versions, and AdaptInfer.

SparseVLM, once, from the embeddings that enter the decoder: ``R = softmax over text(V Tᵀ)``, averaged over the visual
tokens; the *raters* are the text tokens above the mean. Text is what follows the first visual token. At each stage a
visual token scores the attention it receives from the raters.

Version 1 takes the mean over raters and heads, and recycles: of the tokens that would leave, the best 30 % and one more
are clustered by density peaks (``rho = exp(-mean squared distance to the k nearest)`` with as many neighbours ``k`` as
clusters, the token itself one of them; ``delta`` the distance to the nearest denser token; centres have the largest
``rho * delta``) into ``n // 10 + 1`` clusters. Each centre's slot goes on with the mean of its cluster, at the centre's
position. The group sizes of the strategy count recycled tokens as kept, see :func:`split_kept`.

Version 2 (SparseVLM+) recycles nothing. It divides each attention by a bias, what the product of all-ones query and key
would be after their rotation, and takes the mean over the 14 heads in which the raters look most at the image.

Not reproduced: the published code cuts after the layer whose attention it reads, and merges that layer's outputs; here
the cut is before it (as its count of tokens says). Version 1 renumbers positions, here they stay.
"""

from __future__ import annotations

from abc import abstractmethod
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
from dop_search.pruning.layer import rotate
from dop_search.selectors.base import group_sums
from dop_search.strategy.operations import ModelDims

RECYCLED_SHARE = 0.3
"""Share of the leaving tokens that is clustered."""
TOKENS_PER_CLUSTER = 10


@dataclass(frozen=True)
class _ByRaters(StageSelector):
    """Ranks by the attention of the raters."""

    version = 2

    def begin(self, sample: StageSample) -> Tensor:
        """The raters' weights over all text rows: ``[num_text]``, summing to 1."""
        visual, text = sample.hidden[sample.candidates].float(), sample.hidden[sample.text].float()
        after = sample.text_after()
        relevance = (visual @ text.T).masked_fill(~after, -torch.inf).softmax(dim=1).mean(dim=0)
        raters = after & (relevance > relevance[after].mean())
        if not bool(raters.any()):  # all equally relevant
            raters = after
        return raters / raters.sum()

    @abstractmethod
    def scores(self, sample: StageSample, raters: Tensor) -> Tensor:
        """``[num_candidates]`` attention received from the raters."""

    def rank(self, sample: StageSample, num_kept: int, memory: Any) -> StageRanking:
        return StageRanking(best_first(self.scores(sample, memory)))

    def begin_flops(self, dims: ModelDims, num_text: int, num_visual: int) -> int:
        return 2 * dims.hidden_size * num_text * num_visual


@dataclass(frozen=True)
class SparseVlmSelector(_ByRaters):
    """Version 1, with or without recycling."""

    name = "sparsevlm"
    recycle: bool = True

    def scores(self, sample: StageSample, raters: Tensor) -> Tensor:
        received = sample.attention(sample.text).mean(dim=0)[:, sample.candidates]
        return (raters[None] @ received)[0]

    def rank(self, sample: StageSample, num_kept: int, memory: Any) -> StageRanking:
        order = best_first(self.scores(sample, memory))
        num_best, num_clustered = split_kept(len(order), num_kept) if self.recycle else (num_kept, 0)
        if num_kept == num_best:
            return StageRanking(order)
        clustered = torch.from_numpy(order[num_best : num_best + num_clustered].copy()).to(sample.hidden.device)
        states = sample.hidden[sample.candidates[clustered]]
        centres, means = cluster_means(states.float(), num_kept - num_best)
        slots = clustered[centres].cpu().numpy()
        rest = order[num_best:]
        final = np.concatenate([order[:num_best], slots, rest[~np.isin(rest, slots)]])
        return StageRanking(final, merged=(clustered[centres], means.to(states.dtype)))

    def rank_flops(self, dims: ModelDims, num_text: int, num_rows: int, num_candidates: int, num_kept: int) -> int:
        num_best, num_clustered = split_kept(num_candidates, num_kept) if self.recycle else (num_kept, 0)
        distances = 2 * dims.hidden_size * num_clustered**2 if num_best < num_kept else 0
        # the weighted mean over text rows, then the rows themselves
        return attention_rows_flops(dims, num_text, num_rows) + 2 * num_text * num_candidates + distances


@dataclass(frozen=True)
class SparseVlm2Selector(_ByRaters):
    """Version 2.

    ``num_heads``: heads whose attention counts.
    """

    name = "sparsevlm_v2"
    num_heads: int = 14

    def scores(self, sample: StageSample, raters: Tensor) -> Tensor:
        bias = rotation_bias(sample.cos[sample.text], sample.sin[sample.text], sample.cos, sample.sin)
        received = (sample.attention(sample.text) / bias)[:, :, sample.candidates]
        by_head = raters.to(received.dtype) @ received
        best = by_head.sum(dim=1).topk(min(self.num_heads, len(by_head))).indices
        return by_head[best].mean(dim=0)

    def rank_flops(self, dims: ModelDims, num_text: int, num_rows: int, num_candidates: int, num_kept: int) -> int:
        bias = 2 * dims.head_dim * num_text * num_rows
        means = 2 * dims.num_heads * num_text * num_candidates
        return attention_rows_flops(dims, num_text, num_rows) + bias + means


@dataclass(frozen=True)
class AdaptInferSelector(StageSelector):
    """AdaptInfer (arXiv 2508.06084): attention from the question, each of its words weighted by how much words attend.

    In each head a word of the text after the image weighs as much as it gives to and receives from that text. A visual
    token scores what it receives from the words so weighted, summed over heads. Weights are made anew at every stage,
    by the layer from which tokens are missing.

    Not reproduced: the released code cuts after the layer whose attention it reads; here before it, as its counts say.
    """

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


def rotation_bias(query_cos: Tensor, query_sin: Tensor, key_cos: Tensor, key_sin: Tensor) -> Tensor:
    """``[queries, keys]``: the scaled product of an all-ones query and an all-ones key after their rotation.

    Args:
        query_cos, query_sin: ``[queries, head_dim]``; ``sin`` signed, as in :class:`StageSample`.
        key_cos, key_sin: ``[keys, head_dim]``.
    """
    queries, keys = (
        rotate(torch.ones_like(cos), cos, sin).float() for cos, sin in ((query_cos, query_sin), (key_cos, key_sin))
    )
    return queries @ keys.T / keys.shape[1] ** 0.5


def split_kept(num_candidates: int, num_kept: int) -> tuple[int, int]:
    """How many tokens are kept by score and how many of the others are clustered, if ``num_kept`` slots go on.

    The largest number kept by score that leaves room for the clusters of the rest. No token is recycled if all stay.
    """
    for best in range(num_kept, -1, -1):
        if with_recycled(num_candidates, best) <= num_kept:
            return best, num_recycled(num_candidates - best)
    return num_kept, 0


def with_recycled(num_candidates: int, num_best: int) -> int:
    """Slots that go on when ``num_best`` tokens are kept by score: those, and one for each cluster."""
    clustered = num_recycled(num_candidates - num_best)
    return num_best + (clustered // TOKENS_PER_CLUSTER + 1 if clustered else 0)


def num_recycled(num_leaving: int) -> int:
    """Of so many leaving tokens, those that are clustered."""
    return int(RECYCLED_SHARE * num_leaving) + 1 if num_leaving else 0


def cluster_means(states: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """The centres of ``states`` ``[n, width]`` and the means of their clusters ``[num_clusters, width]``."""
    centres, members = density_peaks(states, num_clusters)
    sums = group_sums(states, members, len(centres))
    return centres, sums / members.bincount(minlength=len(centres))[:, None]


def density_peaks(states: Tensor, num_centres: int) -> tuple[Tensor, Tensor]:
    """Cluster ``states`` ``[n, width]`` by density peaks with ``num_centres`` nearest neighbours (Du et al. 2016).

    Returns the centres (``[num_centres]``, by decreasing score) and the cluster of every state (``[n]``).
    """
    squares = states.pow(2).sum(dim=1)
    squared = (squares[:, None] + squares[None, :] - 2 * (states @ states.T)).clamp_min(0.0) / states.shape[1]
    squared.fill_diagonal_(0.0)
    density = (-squared.topk(num_centres, dim=1, largest=False).values.mean(dim=1)).exp()
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
