"""Input resizing: the tower runs on a smaller image, the control that beats many criteria at equal cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dop_search.selectors.base import Selection, Selector, SelectorInputs, TowerPatch, with_rest
from dop_search.selectors.controls import farthest_point_order
from dop_search.selectors.sharing import per_image, shares
from dop_search.utils.errors import DopError

if TYPE_CHECKING:
    from dop_search.models.adapter import ModelAdapter
    from dop_search.models.capture import TowerView

MAX_ASPECT_CHANGE = 2.0


@dataclass(frozen=True)
class ResizeSelector(Selector):
    """The image is scaled down to ``a × b ≤ T`` patches, and the tower sees nothing else (VTC-Bench's control).

    The tower runs on the small image with interpolated position embeddings, so it gets cheaper too.
    The token nearest to the middle of each small patch carries its feature into the decoder.

    The grid is the largest one within a factor of two of the image's aspect; where ``a·b < T``, the remaining kept
    tokens repeat features of their patch, so that the cost is that of ``T`` tokens. Bicubic with anti-aliasing, on the
    pixels that the processor made: an image that the processor had scaled up is not read again from its file.

    The images of a sample share its tokens equally. The tower must have a fixed grid; other models resize in their
    processor, as the method ``resize`` does (:mod:`dop_search.baselines.resize`).
    """

    name = "resize"
    nested = False
    changes_tower = True
    several_images = True

    def rank(self, inputs: SelectorInputs, num_kept: int | None = None) -> np.ndarray:
        return per_image(inputs, num_kept, _middles_first).order

    def patch_tower(self, adapter: ModelAdapter, num_kept: int) -> TowerPatch:
        grid = self.tower_grid(adapter)
        assert grid is not None
        return ResizePatch(adapter.tower_view, grid, num_kept)


def _middles_first(inputs: SelectorInputs, num_kept: int) -> Selection:
    """Of one image the tokens in the middle of its small patches, spread out, then the others."""
    grid = inputs.image_grids[0]
    if num_kept == 0:
        return Selection(np.arange(inputs.num_visual_tokens))
    small = smaller_grid(*grid, num_kept)
    _, middles = grid_cells(*grid, small)
    return Selection(with_rest(middles[farthest_point_order(*small)], farthest_point_order(*grid)))


class ResizePatch(TowerPatch):
    """Runs a tower on smaller images and spreads its states over the full grid.

    Args:
        grid: rows and columns of its patches.
        num_kept: tokens of a sample, which its images share.
    """

    def __init__(self, tower: TowerView, grid: tuple[int, int], num_kept: int) -> None:
        super().__init__()
        self.module, self.num_extra, self.patch_size = tower.module, tower.num_extra, tower.patch_size
        self.grid, self.num_kept = grid, num_kept
        self.original = self.replace_forward(self.module, self.forward)

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The tower's contract, at the cost of the small images."""
        self.run.num_runs += 1
        images = self.run.images or (1,) * len(pixel_values)
        if sum(images) != len(pixel_values):
            raise DopError(f"the prompts ask for {sum(images)} images, but the tower receives {len(pixel_values)}")
        full = self.grid[0] * self.grid[1]
        counts = np.concatenate([shares(np.full(k, full), np.full(k, full), self.num_kept) for k in images])
        parts = [np.flatnonzero(counts == count) for count in np.unique(counts)]
        outputs = [self._small(pixel_values[part], int(counts[part[0]]), *args, **kwargs) for part in parts]
        if len(outputs) == 1:
            return outputs[0]
        order = torch.from_numpy(np.argsort(np.concatenate(parts))).to(pixel_values.device)
        joined = outputs[0]
        joined.last_hidden_state = torch.cat([each.last_hidden_state for each in outputs])[order]
        if joined.hidden_states is not None:
            layers = zip(*(each.hidden_states for each in outputs), strict=True)
            joined.hidden_states = tuple(None if states[0] is None else torch.cat(states)[order] for states in layers)
        return joined

    def _small(self, pixel_values: Tensor, count: int, *args: Any, **kwargs: Any) -> Any:
        """The tower on images of ``count`` tokens; of an image that gets none a single patch stands for all."""
        small = smaller_grid(*self.grid, max(1, count))
        size = (small[0] * self.patch_size, small[1] * self.patch_size)
        pixels = torch.nn.functional.interpolate(
            pixel_values.float(), size=size, mode="bicubic", antialias=True, align_corners=False
        )
        output = self.original(pixels.to(pixel_values.dtype), *args, **{**kwargs, "interpolate_pos_encoding": True})
        cells, _ = grid_cells(*self.grid, small)
        index = torch.from_numpy(np.concatenate([np.arange(self.num_extra), self.num_extra + cells]))
        index = index.to(pixel_values.device)
        output.last_hidden_state = output.last_hidden_state.index_select(1, index)
        if output.hidden_states is not None:
            output.hidden_states = tuple(
                None if state is None else state.index_select(1, index) for state in output.hidden_states
            )
        return output


def smaller_grid(rows: int, columns: int, count: int) -> tuple[int, int]:
    """The largest grid of at most ``count`` cells whose aspect is within a factor of two of the original's."""
    candidates = []
    for a in range(1, min(rows, count) + 1):
        b = min(columns, count // a)
        change = max(a * columns / (b * rows), b * rows / (a * columns))
        candidates.append((change <= MAX_ASPECT_CHANGE, a * b, -change, a, b))
    return max(candidates)[3:]


def grid_cells(rows: int, columns: int, small: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Map a grid onto a smaller one.

    Returns the cell of each token ``[rows * columns]``, and the token in the middle of each cell ``[a * b]``.
    """
    a, b = small
    cells = _nearest(rows, a)[:, None] * b + _nearest(columns, b)[None, :]
    middles = _nearest(a, rows)[:, None] * columns + _nearest(b, columns)[None, :]
    return cells.reshape(-1), middles.reshape(-1)


def _nearest(length: int, onto: int) -> np.ndarray:
    """For each of ``length`` places the one of ``onto`` places that its middle falls into."""
    return ((2 * np.arange(length) + 1) * onto) // (2 * length)
