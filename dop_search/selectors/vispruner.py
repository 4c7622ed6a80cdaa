"""VisPruner: half of the tokens by attention, the other half by removing duplicates."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class VisPrunerSelector(AttentionSelector, PerImageSelector):
    """VisPruner (arXiv 2412.01818v2).

    Of ``T`` tokens, ``⌊important_share · T⌋`` are those with the highest attention in the layer that feeds the
    projector. From the others, listed by attention, the ``step`` most duplicated are removed again and again: the list
    is split into its even and odd places, and the even tokens with the highest cosine similarity to any odd one go
    (the even survivors, most similar first, and then the odd ones make the next list), until ``T`` tokens are left.
    Similarities are those of the features. No merging.

    The rounds make the choice discontinuous: where two attention values agree up to rounding, swapping them changes
    every later even/odd split, so that batch size, device or data type can change the kept tokens of such an image.

    Options:
        important_share: share of the tokens chosen by attention (the paper: 0.5).
        step: tokens removed per round.
        attention: see :class:`AttentionSelector`; ``received`` is the paper's on Qwen-VL.

    Not reproduced: renumbered positions; the fixed anchor size for LLaVA-NeXT (the tokens of each tile are the patches
    that are no padding).
    """

    important_share: float = 0.5
    step: int = 8

    name = "vispruner"
    version = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        holds = 0.0 <= self.important_share <= 1.0 and self.step >= 1
        check_options(holds, "`0 <= important_share <= 1` and `step >= 1`", **self.options())

    def one_image(self, inputs: SelectorInputs, num_kept: int) -> Selection:
        by_attention = descending(self.scores(inputs))
        num_important = int(self.important_share * num_kept + 1e-9)
        important, rest = by_attention[:num_important], by_attention[num_important:]
        if not 0 < num_kept < inputs.num_visual_tokens:
            return Selection(by_attention)
        similarity = finite_array(cosine_matrix(inputs.tensor(self.space)))
        removed: list[np.ndarray] = []
        while (surplus := len(rest) - (num_kept - num_important)) > 0:
            even, odd = rest[::2], rest[1::2]
            if len(odd) == 0:
                removed.append(rest)
                rest = rest[:0]
                continue
            by_duplicity = np.argsort(-similarity[np.ix_(even, odd)].max(axis=1), kind="stable")
            count = min(self.step, surplus)
            removed.append(even[by_duplicity[:count]])
            rest = np.concatenate([even[by_duplicity[count:]], odd])
        diverse = by_attention[np.isin(by_attention, rest)]
        return Selection(np.concatenate([important, diverse, *reversed(removed)]))

    def selection_flops(self, sizes: SelectionSizes) -> int:
        """Attention with its keys, and all pairwise cosines."""
        return self.attention_flops(sizes) + 2 * sizes.num_visual**2 * self.states_width(sizes)
