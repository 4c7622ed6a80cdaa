"""VisPruner: half of the tokens by attention, the other half by removing duplicates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dop_search.selectors.attention_choice import attention_field, attention_flops, attention_of
from dop_search.selectors.base import Selection, SelectionSizes, SelectorInputs, cosine_matrix, descending, finite_array
from dop_search.selectors.sharing import PerImageSelector
from dop_search.utils.errors import DopError


@dataclass(frozen=True)
class VisPrunerSelector(PerImageSelector):
    """VisPruner (arXiv 2412.01818v2).

    Of ``T`` tokens, ``⌊important_share · T⌋`` are those with the highest attention in the layer that feeds the
    projector. From the others, listed by attention, the ``step`` most duplicated are removed again and again: the list
    is split into its even and odd places, and the even tokens with the highest cosine similarity to any odd one go
    (the even survivors, most similar first, and then the odd ones make the next list), until ``T`` tokens are left.
    Similarities are those of the projector's inputs. No merging.

    The rounds make the choice discontinuous: where two attention values agree up to rounding, swapping them changes
    every later even/odd split, so that batch size, device or data type can change the kept tokens of such an image.

    Options:
        important_share: share of the tokens chosen by attention (the paper: 0.5).
        step: tokens removed per round.
        attention: ``cls``, or ``received`` (mean attention a token receives) for towers without a CLS token.

    Not reproduced: renumbered positions; the fixed anchor size for LLaVA-NeXT (the tokens of each tile are the patches
    that are no padding).
    """

    important_share: float = 0.5
    step: int = 8
    attention: str = "cls"

    name = "vispruner"
    version = 2

    def __post_init__(self) -> None:
        attention_field(self.attention)
        if not 0.0 <= self.important_share <= 1.0 or self.step < 1:
            raise DopError(
                f"`0 <= important_share <= 1` and `step >= 1` must hold, but got "
                f"(important_share={self.important_share}, step={self.step})"
            )

    def needs(self) -> frozenset[str]:
        """See base class."""
        return super().needs() | frozenset({attention_field(self.attention), "features"})

    def one_image(self, inputs: SelectorInputs, num_kept: int) -> Selection:
        """See base class."""
        by_attention = descending(attention_of(inputs, self.attention))
        num_important = int(self.important_share * num_kept + 1e-9)
        important, rest = by_attention[:num_important], by_attention[num_important:]
        if not 0 < num_kept < inputs.num_visual_tokens:
            return Selection(by_attention)
        similarity = finite_array(cosine_matrix(inputs.tensor("features")))
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
        return attention_flops(self.attention, sizes) + 2 * sizes.num_visual**2 * sizes.width
