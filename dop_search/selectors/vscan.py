"""VScan: local tokens from every window of the image, global ones from all of it, and the others merged into them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dop_search.selectors.attention_choice import cls_flops
from dop_search.selectors.base import (
    Selection,
    SelectionSizes,
    SelectorInputs,
    check_options,
    cosine_matrix,
    descending,
    group_sums,
    with_rest,
)
from dop_search.selectors.sharing import PerImageSelector


@dataclass(frozen=True)
class VScanSelector(PerImageSelector):
    """VScan (arXiv 2505.22654), its stage before the decoder.

    Of ``T`` tokens ``⌊local_share · T⌋`` are local: each window of ``window × window`` tokens gives as many, those with
    the highest CLS attention in a shallow layer. The others have the highest CLS attention in the layer that feeds the
    projector. Each token that is not kept is merged into the kept one with the most similar projected feature (cosine);
    kept tokens become the mean of themselves and those merged into them.

    Options:
        local_share: share of the local tokens.
        window: tokens per side of a window.

    Not reproduced: what the windows cannot share equally goes to the global tokens (the released code keeps fewer than
    ``T``); smaller windows at the edges of grids that six does not divide; renumbered positions. The stage inside the
    decoder is the method ``vscan_two_stage``.
    """

    local_share: float = 0.5
    window: int = 6

    name = "vscan"
    requires = frozenset({"cls_attention", "shallow_cls_attention", "embeds"})
    merges = True

    def __post_init__(self) -> None:
        holds = 0.0 <= self.local_share <= 1.0 and self.window >= 1
        check_options(holds, "`0 <= local_share <= 1` and `window >= 1`", **self.options())

    def one_image(self, inputs: SelectorInputs, num_kept: int) -> Selection:
        """See base class."""
        local = self._local(inputs, int(self.local_share * num_kept))
        order = with_rest(local, descending(inputs.tensor("cls_attention")))
        if not 0 < num_kept < inputs.num_visual_tokens:
            return Selection(order)
        kept, dropped = order[:num_kept], np.sort(order[num_kept:])
        embeds = inputs.tensor("embeds").float()
        index, gone = (torch.from_numpy(tokens).to(embeds.device) for tokens in (kept, dropped))
        nearest = cosine_matrix(embeds[gone], embeds[index]).argmax(dim=1)
        number = 1 + nearest.bincount(minlength=num_kept)[:, None]
        merged = (embeds[index] + group_sums(embeds[gone], nearest, num_kept)) / number
        return Selection(order, kept, merged)

    def _local(self, inputs: SelectorInputs, number: int) -> np.ndarray:
        """As many tokens of every window, window by window, ``number`` at most."""
        rows, columns = inputs.image_grids[0]
        row, column = np.divmod(np.arange(rows * columns), columns)
        window = row // self.window * -(-columns // self.window) + column // self.window
        by_attention = descending(inputs.tensor("shallow_cls_attention"))
        each = number // (int(window.max()) + 1)
        parts = [by_attention[window[by_attention] == index][:each] for index in range(int(window.max()) + 1)]
        return np.concatenate(parts)

    def selection_flops(self, sizes: SelectionSizes) -> int:
        """The CLS rows of two layers with their keys, similarities with the kept tokens, and the means."""
        pairs = (sizes.num_visual - sizes.num_kept) * sizes.num_kept
        return 2 * cls_flops(sizes) + (2 * pairs + sizes.num_visual) * sizes.dims.hidden_size
