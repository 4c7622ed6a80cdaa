"""Average pooling of the token grid: a control that keeps a little of every token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dop_search.selectors.base import Selection, SelectionSizes, SelectorInputs, group_sums, with_rest
from dop_search.selectors.grid_cells import balanced_cells
from dop_search.selectors.sharing import PerImageSelector
from dop_search.selectors.uniform_grid import spread_order


@dataclass(frozen=True)
class AvgPoolSelector(PerImageSelector):
    """Cut the token grid into ``T`` boxes of nearly equal size; the token in the middle of each becomes the box's mean.

    Means are taken of the projected tokens. The boxes come in an order that spreads over the image.
    """

    name = "avg_pool"
    version = 2
    requires = frozenset({"embeds"})
    merges = True

    def one_image(self, inputs: SelectorInputs, num_kept: int) -> Selection:
        (rows, columns), count = inputs.image_grids[0], inputs.num_visual_tokens
        everything = np.arange(count)
        if num_kept == 0:
            return Selection(everything)
        cells, middles = balanced_cells(rows, columns, num_kept)
        points = np.stack(np.divmod(middles, columns), axis=1)
        order = with_rest(middles[spread_order(points, len(points) // 2)], everything)
        if num_kept == count:
            return Selection(order)
        embeds = inputs.tensor("embeds").float()
        index = torch.from_numpy(cells).to(embeds.device)
        return Selection(order, middles, group_sums(embeds, index, num_kept) / index.bincount()[:, None])

    def selection_flops(self, sizes: SelectionSizes) -> int:
        """The means."""
        return sizes.num_visual * sizes.dims.hidden_size
