"""LLaVA-NeXT-Video: LLaVA-NeXT for images, pooled frames without newline tokens for videos."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import avg_pool2d

from dop_search.models.llava_next import LlavaNextAdapter
from dop_search.models.tower import Grids, VisionCall


class LlavaNextVideoAdapter(LlavaNextAdapter):
    """``LlavaNextVideoForConditionalGeneration``."""

    def token_grids(self, call: VisionCall) -> list[Grids]:
        """See base class; of a video, one grid per frame."""
        if call.modality == "image":
            return super().token_grids(call)
        videos, frames = call.arguments["pixel_values_videos"].shape[:2]
        side = self.patches_per_side // self.model.config.spatial_pool_stride
        return [((side, side),) * frames] * videos

    def to_token_order(self, values: Tensor) -> Tensor:
        """See base class; the mean of the patches that a frame's token is pooled from."""
        if self.vision_watch.current().modality == "image":
            return super().to_token_order(values)
        grid = values.unflatten(1, (self.patches_per_side, self.patches_per_side)).permute(0, 3, 1, 2)
        pooled = avg_pool2d(grid, self.model.config.spatial_pool_stride)
        return pooled.permute(0, 2, 3, 1).flatten(0, 2)
