"""Qwen2-VL: dynamic resolution, one visual token per 2 × 2 patches, multimodal RoPE, video."""

from __future__ import annotations

from torch import Tensor

from dop_search.models.adapter import ModelAdapter
from dop_search.models.tower import Grids, VisionCall


class Qwen2VLAdapter(ModelAdapter):
    """``Qwen2VLForConditionalGeneration`` (arXiv 2409.12191)."""

    tower_name, tower_attention = "visual", "blocks.{}.attn"
    sizes_name = "image_grid_thw"
    middle_depth = 0.5  # HiPrune: 16 of 32

    def rotary(self, embeds: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """See base class; axes are time, height and width, with the text's own in front when ``generate()`` calls."""
        if position_ids.ndim == 2:
            position_ids = position_ids[None].expand(3, -1, -1)
        return super().rotary(embeds, position_ids[-3:])

    def text_positions(self, position_ids: Tensor) -> Tensor | None:
        """See base class; with multimodal positions alone transformers packs nothing."""
        return position_ids[0] if position_ids.ndim == 3 and len(position_ids) == 4 else None

    @property
    def merge_size(self) -> int:
        return int(self.vision_tower.spatial_merge_size)

    def token_grids(self, call: VisionCall) -> list[Grids]:
        """See base class; a video has one grid per pair of frames."""
        merge = self.merge_size
        return [((rows // merge, columns // merge),) * times for times, rows, columns in grid_thw(call).tolist()]

    def to_token_order(self, values: Tensor) -> Tensor:
        """See base class; the processor already orders patches by the cell that they are merged in."""
        return values.reshape(-1, self.patches_per_token, values.shape[-1]).mean(dim=1)


def grid_thw(call: VisionCall) -> Tensor:
    """Time, height and width in patches of each image or video."""
    grids: Tensor | None = call.arguments.get(f"{call.modality}_grid_thw")
    if grids is None:  # Qwen3-VL's method for videos is its method for images
        grids = call.arguments["image_grid_thw"]
    return grids
