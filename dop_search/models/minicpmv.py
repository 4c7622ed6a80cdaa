"""MiniCPM-V 4.6 and 4.7, MiniCPM-OCR: slices in a tower that joins patches on its way, and the decoder of Qwen3.5."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dop_search.models.adapter import ModelAdapter
from dop_search.models.qwen3 import Qwen3_5Adapter
from dop_search.models.tower import Grids, VisionCall
from dop_search.models.vision import square_means


class MiniCPMVAdapter(Qwen3_5Adapter):
    """``MiniCPMV4_6ForConditionalGeneration`` and the models of its architecture.

    Only MiniCPM-V 4.7 has multimodal positions. A token is made of 4 × 4 patches, or of 2 × 2 (``downsample_mode``).
    """

    tower_name = "vision_tower"
    tower_attention = ModelAdapter.tower_attention
    knows_images = False

    def text_positions(self, position_ids: Tensor) -> Tensor | None:
        return position_ids if position_ids.ndim == 2 else super().text_positions(position_ids)

    @property
    def merge_size(self) -> int:
        """See base class; as the model is configured."""
        return self._merge_size(None)

    @property
    def patches_per_token(self) -> int:
        """See base class; in the tower's last layers, whose squares of patches are joined but in the finer mode."""
        return 4

    def _merge_size(self, call: VisionCall | None) -> int:
        mode = None if call is None else call.arguments.get("downsample_mode")
        return 2 if (mode or self.model.config.downsample_mode) == "4x" else 4

    def _patch_grids(self, call: VisionCall) -> list[list[int]]:
        """Rows and columns of each image and slice, or frame, in patches."""
        sizes = call.arguments["target_sizes" if call.modality == "image" else "target_sizes_videos"]
        grids: list[list[int]] = sizes.tolist()
        return grids

    def token_grids(self, call: VisionCall) -> list[Grids]:
        """See base class; an image comes first, and then its slices."""
        merge = self._merge_size(call)
        return [((rows // merge, columns // merge),) for rows, columns in self._patch_grids(call)]

    def to_token_order(self, values: Tensor) -> Tensor:
        """See base class; in later layers of the tower squares of patches are one already."""
        call, patches = self.vision_watch.current(), values.flatten(0, -2)
        grids = self._patch_grids(call)
        joined = math.isqrt(sum(rows * columns for rows, columns in grids) // len(patches))
        parts = patches.split([rows * columns // joined**2 for rows, columns in grids])
        return torch.cat(
            [
                square_means(part, *grid, self._merge_size(call) // joined)
                for part, (grid,) in zip(parts, self.token_grids(call), strict=True)
            ]
        )
