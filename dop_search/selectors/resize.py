"""Input resizing: the tower runs on a smaller image, the control that beats many criteria at equal cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dop_search.selectors.base import Selector, SelectorInputs, TowerPatch, kept_count, with_rest
from dop_search.selectors.grid_cells import grid_cells, smaller_grid
from dop_search.selectors.sharing import image_slices
from dop_search.selectors.uniform_grid import farthest_point_order

if TYPE_CHECKING:
    from dop_search.models.capture import TowerView


@dataclass(frozen=True)
class ResizeSelector(Selector):
    """The image is scaled down to ``a × b ≤ T`` patches, and the tower sees nothing else (VTC-Bench's control).

    The tower runs on the small image with interpolated position embeddings, so it gets cheaper too.
    The token nearest to the middle of each small patch carries its feature into the decoder.

    The grid is the largest one within a factor of two of the image's aspect; where ``a·b < T``, the remaining kept
    tokens repeat features of their patch, so that the cost is that of ``T`` tokens. Bicubic with anti-aliasing, on the
    pixels that the processor made: an image that the processor had scaled up is not read again from its file.

    Here the tower must have a fixed grid, and a sample one image. Other models resize in their processor, as the method
    ``resize`` does (:mod:`dop_search.baselines.resize`).
    """

    name = "resize"
    nested = False
    changes_tower = True

    def rank(self, inputs: SelectorInputs, num_kept: int | None = None) -> np.ndarray:
        """See base class."""
        total = kept_count(inputs, num_kept)
        ((rows, columns),) = inputs.image_grids[:1]
        everything = np.arange(inputs.num_visual_tokens)
        if total == 0 or len(list(image_slices(inputs))) > 1:
            return everything
        small = smaller_grid(rows, columns, total)
        _, middles = grid_cells(rows, columns, small)
        return with_rest(middles[farthest_point_order(*small)], farthest_point_order(rows, columns))

    def patch_tower(self, tower: TowerView, num_kept: int, grid: tuple[int, int]) -> TowerPatch:
        """See base class."""
        return ResizePatch(tower, grid, smaller_grid(*grid, num_kept))


class ResizePatch(TowerPatch):
    """Runs a tower on a smaller image and spreads its states over the full grid."""

    def __init__(self, tower: TowerView, grid: tuple[int, int], small: tuple[int, int]) -> None:
        super().__init__()
        self.module, self.num_extra = tower.module, tower.num_extra
        self.size = (small[0] * tower.patch_size, small[1] * tower.patch_size)
        cells, _ = grid_cells(*grid, small)
        self.index = torch.from_numpy(np.concatenate([np.arange(self.num_extra), self.num_extra + cells]))
        self.previous = self.module.__dict__.get("forward")
        self.original = self.module.forward
        self.module.forward = self.forward

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The tower's contract, at the cost of the small image."""
        small = torch.nn.functional.interpolate(
            pixel_values.float(), size=self.size, mode="bicubic", antialias=True, align_corners=False
        )
        output = self.original(small.to(pixel_values.dtype), *args, **{**kwargs, "interpolate_pos_encoding": True})
        self.run.num_runs += 1
        index = self.index.to(pixel_values.device)
        output.last_hidden_state = output.last_hidden_state.index_select(1, index)
        if output.hidden_states is not None:
            output.hidden_states = tuple(
                None if state is None else state.index_select(1, index) for state in output.hidden_states
            )
        return output

    def restore(self) -> None:
        """See base class."""
        if self.previous is None:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.forward = self.previous
