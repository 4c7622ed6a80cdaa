"""HoloV: a budget for every segment of the image, so that the kept tokens show all of the scene."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dop_search.selectors.attention_choice import attention_field, attention_flops, attention_of
from dop_search.selectors.base import Selection, SelectionSizes, SelectorInputs, cosine_matrix, descending, finite_array
from dop_search.selectors.sharing import PerImageSelector, shares
from dop_search.utils.errors import DopError


@dataclass(frozen=True)
class HoloVSelector(PerImageSelector):
    """HoloV (NeurIPS 2025, *Don't Just Chase "Highlighted Tokens" in MLLMs*).

    The tokens are cut into ``num_segments`` equal runs. A token scores
    ``10³ a_i + alpha · v_i · mean(10³ a) / mean(v)``, where ``a`` is the attention in the layer that feeds the
    projector and ``v_i`` the variance of the cosine similarities of its projected feature with the others of the
    segment. Each segment gets tokens in proportion to its mean score (largest remainders; what a full segment cannot
    take goes to the others), filled by attention.

    Options:
        num_segments: segments per image.
        alpha: weight of the variance.
        attention: ``cls``, or ``received`` (mean attention a token receives) for towers without a CLS token.

    Not reproduced: rounding and redistribution of the budgets are our reading; positions are not renumbered.
    """

    num_segments: int = 16
    alpha: float = 0.09
    attention: str = "cls"

    name = "holov"

    def __post_init__(self) -> None:
        attention_field(self.attention)
        if self.num_segments < 1:
            raise DopError(f"`num_segments >= 1` must hold, but got {self.num_segments}")

    def needs(self) -> frozenset[str]:
        """See base class."""
        return frozenset({attention_field(self.attention), "embeds"})

    def one_image(self, inputs: SelectorInputs, num_kept: int) -> Selection:
        """See base class."""
        attention = attention_of(inputs, self.attention)
        by_attention = descending(attention)
        count = inputs.num_visual_tokens
        segments = np.array_split(np.arange(count), min(self.num_segments, count))
        scores = self._scores(finite_array(attention), inputs, segments)
        means = np.array([scores[segment].mean() for segment in segments])
        budgets = shares(means, np.array([len(segment) for segment in segments]), num_kept)
        ranked = [by_attention[np.isin(by_attention, segment)] for segment in segments]
        kept = np.concatenate([order[:budget] for order, budget in zip(ranked, budgets, strict=True)])
        is_kept = np.isin(by_attention, kept)
        return Selection(np.concatenate([by_attention[is_kept], by_attention[~is_kept]]))

    def _scores(self, attention: np.ndarray, inputs: SelectorInputs, segments: list[np.ndarray]) -> np.ndarray:
        embeds = inputs.tensor("embeds")
        variance = np.zeros(len(attention))
        for segment in segments:
            if len(segment) < 2:
                continue
            similarity = finite_array(cosine_matrix(embeds[segment[0] : segment[-1] + 1]))
            others = similarity[~np.eye(len(segment), dtype=np.bool_)].reshape(len(segment), -1)
            variance[segment] = others.var(axis=1)
        scaled = 1e3 * attention
        mean = variance.mean()
        return scaled + (self.alpha * variance * scaled.mean() / mean if mean > 0 else 0.0)

    def selection_flops(self, sizes: SelectionSizes) -> int:
        """Attention with its keys, and the cosines within segments."""
        within = sizes.num_visual**2 // max(1, min(self.num_segments, sizes.num_visual)) * sizes.dims.hidden_size
        return attention_flops(self.attention, sizes) + 2 * within
