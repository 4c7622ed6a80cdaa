"""HiPrune: what the middle of the tower looks at with its neighbourhood, and what its end looks at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dop_search.selectors.attention_choice import received_flops
from dop_search.selectors.base import (
    Selection,
    SelectionSizes,
    SelectorInputs,
    at_layer,
    check_options,
    descending,
    with_rest,
)
from dop_search.selectors.sharing import PerImageSelector

MIDDLE = at_layer("global_attention", "middle")


@dataclass(frozen=True)
class HiPruneSelector(PerImageSelector):
    """HiPrune (arXiv 2508.00553): anchors with buffers around them, then registers.

    Of ``T`` tokens the ``round(alpha · T / 5)`` with the most attention in a middle layer are anchors; they come with
    their four neighbours. The others are those with the most attention in the layer that feeds the projector. Attention
    is the mean over heads and over all tokens that ask, a CLS token included. The middle layer is the released one: 9
    of CLIP's 24, 16 of Qwen2.5-VL's 32.

    As released, neighbours are the tokens one place and one row before and after: at the ends of a row they are in the
    next one, at the ends of the image they are its first and last token.

    Options:
        alpha: share of the tokens that anchors and their neighbours would be, did they not overlap.

    Not reproduced: renumbered positions; where anchors and neighbours are more than ``T`` tokens, anchors come first.
    """

    alpha: float = 0.1

    name = "hiprune"
    version = 3
    requires = frozenset({"global_attention", MIDDLE})

    def __post_init__(self) -> None:
        check_options(0.0 <= self.alpha <= 1.0, "`0 <= alpha <= 1`", alpha=self.alpha)

    def one_image(self, inputs: SelectorInputs, num_kept: int) -> Selection:
        last = inputs.num_visual_tokens - 1
        anchors = descending(inputs.tensor(MIDDLE))[: round(self.alpha * num_kept / 5)]
        columns = inputs.image_grids[0][1]
        near = np.concatenate([anchors + step for step in (-1, 1, -columns, columns)]).clip(0, last)
        chosen = with_rest(anchors, np.unique(near))
        return Selection(with_rest(chosen, descending(inputs.tensor("global_attention"))))

    def selection_flops(self, sizes: SelectionSizes) -> int:
        """All scores of two layers with their queries and keys."""
        return 2 * received_flops(sizes)
