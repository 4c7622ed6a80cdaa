"""VScan: local tokens from every window of the image, global ones from all of it, and the others merged into them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dop_search.selectors.attention_choice import AttentionSelector
from dop_search.selectors.base import (
    Selection,
    SelectionSizes,
    SelectorInputs,
    at_layer,
    check_options,
    cosine_matrix,
    descending,
    group_sums,
    with_rest,
)
from dop_search.selectors.sharing import PerImageSelector


@dataclass(frozen=True)
class VScanSelector(AttentionSelector, PerImageSelector):
    """VScan (arXiv 2505.22654), its stage before the decoder.

    Of ``T`` tokens ``⌊local_share · T⌋`` are local, by attention in a layer a quarter up the tower (the 6th of CLIP's
    24, the 8th of Qwen2.5-VL's 32): each window of ``window × window`` tokens gives as many. The others are those with
    the highest attention in the layer that feeds the projector (the last that attends to whole images). Each token that
    is not kept is merged into the kept one with the most similar projected feature (cosine); kept tokens become the
    mean of themselves and those merged into them.

    Without a CLS token (``attention=received``, released for Qwen2.5-VL) a window gives ``⌈local / windows⌉`` tokens at
    most, best of the whole image first, and what is left at the edges of the grid is part of the last windows.

    Options:
        attention: see :class:`AttentionSelector`; merging is behind the projector in any case.
        local_share: share of the local tokens.
        window: tokens per side of a window; ``None``: the released 6 with a CLS token, 4 without.

    Not reproduced: what the windows cannot share goes to the global tokens (the released code keeps fewer than ``T``,
    or raises); with a CLS token, smaller windows at the edges of grids that six does not divide; renumbered positions;
    queries and keys that the released code for Qwen2.5-VL rotates twice where it runs flash-attention (with SDPA it
    does not). The stage inside the decoder is the method ``vscan_two_stage``.
    """

    local_share: float = 0.5
    window: int | None = None

    name = "vscan"
    version = 2
    requires = frozenset({"tiles", "embeds"})
    merges = True

    def __post_init__(self) -> None:
        super().__post_init__()
        holds = 0.0 <= self.local_share <= 1.0 and (self.window is None or self.window >= 1)
        check_options(holds, "`0 <= local_share <= 1` and `window >= 1`", **self.options())

    def needs(self) -> frozenset[str]:
        return self.requires | {f"{self.attention}_attention", self._shallow}

    @property
    def _shallow(self) -> str:
        return at_layer(f"{self.attention}_attention", 0.25)

    def one_image(self, inputs: SelectorInputs, num_kept: int) -> Selection:
        local = self._local(inputs, int(self.local_share * num_kept))
        order = with_rest(local, descending(self.scores(inputs)))
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
        """Tokens of every window, ``number`` at most: window by window, or best first without a CLS token."""
        grid, side = inputs.image_grids[0], self.window or (6 if self.by_cls else 4)
        place = [np.arange(length) // side for length in grid]
        if not self.by_cls:
            place = [np.minimum(part, max(0, len(part) // side - 1)) for part in place]
        window = (place[0][:, None] * (int(place[1][-1]) + 1) + place[1]).ravel()
        by_attention, count = descending(inputs.tensor(self._shallow)), int(window[-1]) + 1
        each = number // count if self.by_cls else -(-number // count)
        parts = [by_attention[window[by_attention] == index][:each] for index in range(count)]
        chosen = np.concatenate(parts)
        return chosen if self.by_cls else by_attention[np.isin(by_attention, chosen)][:number]

    def selection_flops(self, sizes: SelectionSizes) -> int:
        """The attention of two layers, similarities with the kept tokens, and the means."""
        pairs = (sizes.num_visual - sizes.num_kept) * sizes.num_kept
        return 2 * self.attention_flops(sizes) + (2 * pairs + sizes.num_visual) * sizes.dims.hidden_size
