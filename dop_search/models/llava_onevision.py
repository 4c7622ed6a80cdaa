"""LLaVA-OneVision: SigLIP tower, any-resolution tiles that are resized when they are many, pooled video frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dop_search.models.llava_next import LlavaNextAdapter
from dop_search.models.tower import Grids, VisionCall


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """``LlavaOnevisionForConditionalGeneration`` (arXiv 2408.03326)."""

    def token_grids(self, call: VisionCall) -> list[Grids]:
        """See base class; of a video, one grid per frame and its newline token."""
        if call.modality == "image":
            return super().token_grids(call)
        videos, frames = call.arguments["pixel_values_videos"].shape[:2]
        side = -(-self.patches_per_side // 2)
        return [((side, side),) * frames + ((1, 1),)] * videos

    def to_token_order(self, values: Tensor) -> Tensor:
        """See base class; a video's newline token gets the mean of the video."""
        call = self.vision_watch.current()
        if call.modality == "image":
            return super().to_token_order(values)
        videos = call.arguments["pixel_values_videos"].shape[0]
        pooled = self.multimodal.apply_pooling(values).reshape(videos, -1, values.shape[-1])
        return torch.cat([pooled, pooled.mean(dim=1, keepdim=True)], dim=1).flatten(0, 1)

    def tiles_per_image(self, call: VisionCall) -> list[int]:
        """See base class; one tile for each of several images in a prompt."""
        tiles = super().tiles_per_image(call)
        per_prompt = call.arguments.get("batch_num_images")
        if per_prompt is None:
            return tiles
        alone = [int(number) == 1 for number in per_prompt for _ in range(int(number))]
        return [count if single else 1 for count, single in zip(tiles, alone, strict=True)]

    def packing_arguments(self, call: VisionCall) -> dict[str, Any]:
        given = call.arguments.get("vision_aspect_ratio")
        return {"vision_aspect_ratio": self.model.config.vision_aspect_ratio if given is None else given}
