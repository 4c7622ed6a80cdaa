"""HoloV: a budget for every segment of the image, so that the kept tokens show all of the scene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dop_search.selectors.attention_choice import AttentionSelector
from dop_search.selectors.base import (
    Selection,
    SelectionSizes,
    SelectorInputs,
    check_options,
    cosine_matrix,
    descending,
    finite_array,
)
from dop_search.selectors.sharing import PerImageSelector

EPSILON = 1e-6
"""Keeps the released code's divisions finite."""


@dataclass(frozen=True)
class HoloVSelector(AttentionSelector, PerImageSelector):
    """HoloV (NeurIPS 2025, *Don't Just Chase "Highlighted Tokens" in MLLMs*).

    The tokens are cut into ``num_segments`` equal runs. A token scores
    ``10³ a_i + alpha · v_i · mean(10³ a) / mean(v)`` with both means over its segment, where ``a`` is the attention in
    the layer that feeds the projector and ``v_i`` the spread of the cosine similarities of its projected feature within
    the segment, as the released code computes it (around the mean of the others, its own place counting as 0). Each
    segment gets tokens in proportion to its mean score: rounded down, then one more for the segments with the highest
    scores. They are filled by attention.

    Since the spread is scaled to its own segment's attention, a segment's mean score is ``1 + alpha`` times its mean
    attention, and the budgets are those of attention alone but for rounding.

    Options:
        num_segments: segments per image.
        alpha: weight of the variance.
        attention: see :class:`AttentionSelector`; features are those of the decoder with both.

    Not reproduced: the released code puts zero tokens in the place of what a full segment cannot take, here the other
    segments get it by the same rule; positions are not renumbered.
    """

    num_segments: int = 16
    alpha: float = 0.09

    name = "holov"
    version = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self.num_segments >= 1, "`num_segments >= 1`", num_segments=self.num_segments)

    @property
    def space(self) -> Literal["features", "embeds"]:
        return "embeds"

    def one_image(self, inputs: SelectorInputs, num_kept: int) -> Selection:
        by_attention = descending(self.scores(inputs))
        count = inputs.num_visual_tokens
        segments = np.array_split(np.arange(count), min(self.num_segments, count))
        budgets = segment_budgets(self.segment_scores(inputs, segments), [len(part) for part in segments], num_kept)
        ranked = [by_attention[np.isin(by_attention, segment)] for segment in segments]
        kept = np.concatenate([order[:budget] for order, budget in zip(ranked, budgets, strict=True)])
        is_kept = np.isin(by_attention, kept)
        return Selection(np.concatenate([by_attention[is_kept], by_attention[~is_kept]]))

    def segment_scores(self, inputs: SelectorInputs, segments: Sequence[np.ndarray]) -> np.ndarray:
        """``[num_segments]`` mean score of each run of tokens."""
        attention = 1e3 * finite_array(self.scores(inputs))
        embeds = inputs.tensor("embeds")
        result = []
        for segment in segments:
            scores = attention[segment]
            if len(segment) > 1:
                similarity = finite_array(cosine_matrix(embeds[segment[0] : segment[-1] + 1]))
                np.fill_diagonal(similarity, 0.0)
                others = len(segment) - 1
                spread = ((similarity - similarity.sum(axis=1, keepdims=True) / others) ** 2).sum(axis=1) / others
                scores = scores + self.alpha * spread * np.abs(scores).mean() / (spread.mean() + EPSILON)
            result.append(scores.mean())
        return np.array(result)

    def selection_flops(self, sizes: SelectionSizes) -> int:
        """Attention with its keys, and the cosines within segments."""
        within = sizes.num_visual**2 // max(1, min(self.num_segments, sizes.num_visual)) * sizes.dims.hidden_size
        return self.attention_flops(sizes) + 2 * within


def segment_budgets(scores: np.ndarray, sizes: Sequence[int], total: int) -> np.ndarray:
    """Tokens per segment: proportional to ``scores`` and rounded down, one more for the highest scores.

    What full segments cannot take goes to the others by the same rule.
    """
    capacities, result = np.array(sizes), np.zeros(len(sizes), dtype=np.int64)
    while (left := min(total, int(capacities.sum())) - int(result.sum())) > 0:
        weights = np.where(result < capacities, scores, 0.0)
        if weights.sum() <= 0:
            weights = np.where(result < capacities, 1.0, 0.0)
        part = np.floor(left * weights / (weights.sum() + EPSILON)).astype(np.int64)
        open_ = np.flatnonzero(result < capacities)
        best = open_[np.argsort(-weights[open_], kind="stable")]
        part[best[: left - int(part.sum())]] += 1
        result = np.minimum(result + part, capacities)
    return result
