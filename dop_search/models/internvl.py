"""InternVL: tiles of an InternViT with a CLS token, four patches shuffled into one visual token, Qwen2 decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dop_search.models.adapter import ModelAdapter
from dop_search.models.tower import Grids, VisionCall
from dop_search.utils.errors import UnsupportedModelError


class InternVLAdapter(ModelAdapter):
    """``InternVLForConditionalGeneration`` (arXiv 2504.10479); video frames come as tiles of an image."""

    model_types = ("internvl",)

    @property
    def vision_tower(self) -> Any:
        """See base class."""
        return self.model.model.vision_tower

    @property
    def patches_per_token(self) -> int:
        """See base class: pixel shuffling joins a square of patches."""
        return round(1 / self.model.config.downsample_ratio**2)

    def token_grids(self, call: VisionCall) -> list[Grids]:
        """See base class; each tile is a grid, whichever image it belongs to."""
        vision = self.model.config.vision_config
        scale = self.model.config.downsample_ratio
        rows, columns = (
            int(size // patch * scale) for size, patch in zip(vision.image_size, vision.patch_size, strict=True)
        )
        return [((rows, columns),)] * len(call.arguments["pixel_values"])

    def to_token_order(self, values: Tensor) -> Tensor:
        """See base class; the mean over each cell of the pixel shuffle."""
        tiles, patches, channels = values.shape
        side = int(patches**0.5)
        cells = self.multimodal.pixel_shuffle(
            values.reshape(tiles, side, side, channels), scale_factor=self.model.config.downsample_ratio
        )
        mean: Tensor = cells.reshape(tiles, -1, cells.shape[-1] // channels, channels).mean(dim=2)
        return mean.flatten(0, 1)

    def cls_attention_module(self) -> Any:
        """See base class."""
        return self.received_attention_module()

    def received_attention_module(self) -> Any:
        """See base class."""
        feature_layer = self.model.config.vision_feature_layer
        if not isinstance(feature_layer, int) or self.model.config.vision_feature_select_strategy != "default":
            raise UnsupportedModelError(
                "attention of the vision tower is captured in the one layer that feeds the projector, but this model "
                f"has vision_feature_layer={feature_layer} and vision_feature_select_strategy="
                f"{self.model.config.vision_feature_select_strategy!r}; use selector=uniform_grid or selector=random"
            )
        layers = self.vision_tower.encoder.layer
        return layers[feature_layer if feature_layer < 0 else feature_layer - 1].attention
