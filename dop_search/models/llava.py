"""LLaVA-1.5 and the models of its architecture: CLIP vision tower, two-layer projector, Llama decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dop_search.errors import UnsupportedModelError
from dop_search.models.adapter import ModelAdapter, cls_attention_hook


class LlavaAdapter(ModelAdapter):
    """``LlavaForConditionalGeneration`` (arXiv 2310.03744)."""

    model_types = ("llava",)

    @property
    def multimodal(self) -> Any:
        """See base class."""
        return self.model.model

    @property
    def text_model(self) -> Any:
        """See base class."""
        return self.model.model.language_model

    def visual_token_mask(self, input_ids: Tensor) -> Tensor:
        """See base class."""
        return input_ids == self.model.config.image_token_id

    @property
    def tokens_per_image(self) -> int | None:
        """See base class."""
        vision = self.model.config.vision_config
        extra = 0 if self.model.config.vision_feature_select_strategy == "default" else 1
        return int((vision.image_size // vision.patch_size) ** 2 + extra)

    def capture_cls_attention(self, receive: Callable[[Tensor], None]) -> RemovableHandle:
        """See base class."""
        config = self.model.config
        feature_layer = config.vision_feature_layer
        if config.vision_config.model_type != "clip_vision_model" or not isinstance(feature_layer, int):
            raise UnsupportedModelError(
                f"`cls_attention` needs a CLIP vision tower with one feature layer, but this model has "
                f"{config.vision_config.model_type!r} with vision_feature_layer={feature_layer}; "
                "use selector=uniform_grid or selector=random"
            )
        layers = self.model.model.vision_tower.encoder.layers
        index = feature_layer if feature_layer < 0 else feature_layer - 1
        return cls_attention_hook(layers[index].self_attn, receive)
