"""Qwen2-VL: dynamic resolution, one visual token per 2 × 2 patches, multimodal RoPE, video.

GLM has the same images, and a decoder of four norms that rotates neighbouring features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dop_search.models.adapter import ModelAdapter
from dop_search.models.tower import Grids, VisionCall


class Qwen2VLAdapter(ModelAdapter):
    """``Qwen2VLForConditionalGeneration`` (arXiv 2409.12191)."""

    tower_name, tower_attention = "visual", "blocks.{}.attn"
    sizes_name = "image_grid_thw"
    merge_key = "vision_config.spatial_merge_size"
    middle_depth = 0.5  # HiPrune: 16 of 32

    def rotary(self, embeds: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """See base class; axes are time, height and width, with the text's own in front when ``generate()`` calls."""
        if position_ids.ndim == 2:
            position_ids = position_ids[None].expand(3, -1, -1)
        return super().rotary(embeds, position_ids[-3:])

    def text_positions(self, position_ids: Tensor) -> Tensor | None:
        """See base class; with multimodal positions alone transformers packs nothing."""
        return position_ids[0] if position_ids.ndim == 3 and len(position_ids) == 4 else None

    def token_grids(self, call: VisionCall) -> list[Grids]:
        """See base class; a video has one grid per pair of frames."""
        merge = self.merge_size
        return [((rows // merge, columns // merge),) * times for times, rows, columns in grid_thw(call).tolist()]

    def to_token_order(self, values: Tensor) -> Tensor:
        """See base class; the processor already orders patches by the cell that they are merged in."""
        return values.reshape(-1, self.patches_per_token, values.shape[-1]).mean(dim=1)


class Glm4vAdapter(Qwen2VLAdapter):
    """``Glm4vForConditionalGeneration`` (arXiv 2507.01006), ``Glm46VForConditionalGeneration`` and GLM-OCR.

    Tokens of a video are image tokens between markers, frame after frame with the time in words; transformers takes
    images or videos in one call, not both.
    """

    def rotary(self, embeds: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """See base class; of each pair of features what the model has of both, in halves."""
        cos, sin = (part[..., ::2] for part in super().rotary(embeds, position_ids))
        return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)


def grid_thw(call: VisionCall) -> Tensor:
    """Time, height and width in patches of each image or video."""
    grids: Tensor | None = call.arguments.get(f"{call.modality}_grid_thw")
    if grids is None:  # Qwen3-VL's method for videos is its method for images
        grids = call.arguments["image_grid_thw"]
    return grids
