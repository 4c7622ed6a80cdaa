"""LLaVA-1.5 and the models of its architecture: CLIP vision tower, two-layer projector, Llama decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dop_search.errors import UnsupportedModelError
from dop_search.models.adapter import ModelAdapter, cls_attention_hook
from dop_search.models.capture import VisionTower, refuse


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

    @property
    def tower(self) -> VisionTower:
        """See base class."""
        config, model = self.model.config, self.model.model
        layer, kind = config.vision_feature_layer, config.vision_config.model_type
        strategy = config.vision_feature_select_strategy
        has_cls = kind == "clip_vision_model"
        if kind not in ("clip_vision_model", "siglip_vision_model") or not isinstance(layer, int) or not layer:
            raise refuse(["what it computes"], f"the vision tower is {kind!r} with vision_feature_layer={layer}")
        if strategy != ("default" if has_cls else "full"):
            raise refuse(["what it computes"], f"vision_feature_select_strategy={strategy!r} on {kind!r}")
        layers = model.vision_tower.encoder.layers
        side = config.vision_config.image_size // config.vision_config.patch_size
        return VisionTower(
            module=model.vision_tower,
            layers=layers,
            feature_layer=layer % len(layers) if layer < 0 else layer - 1,
            has_cls=has_cls,
            width=config.vision_config.hidden_size,
            patch_size=config.vision_config.patch_size,
            grid=(side, side) if config.model_type == "llava" else None,
            final_norm=model.vision_tower.post_layernorm,
            project=model.multi_modal_projector,
        )

    def capture_cls_attention(self, receive: Callable[[Tensor], None]) -> RemovableHandle:
        """See base class."""
        config = self.model.config
        feature_layer = config.vision_feature_layer
        if config.vision_config.model_type != "clip_vision_model" or not isinstance(feature_layer, int):
            raise UnsupportedModelError(
                f"`cls_attention` needs a CLIP vision tower with one feature layer, but this model has "
                f"{config.vision_config.model_type!r} with vision_feature_layer={feature_layer}; "
                "use selector=uniform_grid, random or divprune"
            )
        layers = self.model.model.vision_tower.encoder.layers
        index = feature_layer if feature_layer < 0 else feature_layer - 1
        return cls_attention_hook(layers[index].self_attn, receive)
