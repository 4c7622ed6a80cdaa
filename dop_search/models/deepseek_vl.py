"""DeepSeek-VL: images of one size in a SigLIP tower, a visual token per patch, Llama decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dop_search.models.adapter import ModelAdapter
from dop_search.models.tower import Grids, VisionCall


class DeepseekVLAdapter(ModelAdapter):
    """``DeepseekVLForConditionalGeneration`` (arXiv 2403.05525), the one with a single tower."""

    model_types = ("deepseek_vl",)

    @property
    def vision_tower(self) -> Any:
        """See base class."""
        return self.model.model.vision_model

    def token_grids(self, call: VisionCall) -> list[Grids]:
        """See base class."""
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        return [((side, side),)] * len(call.arguments["pixel_values"])

    def to_token_order(self, values: Tensor) -> Tensor:
        """See base class."""
        return values.flatten(0, 1)

    def received_attention_module(self) -> Any:
        """See base class."""
        return self.vision_tower.encoder.layers[-1].self_attn
