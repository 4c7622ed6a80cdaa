"""ViP-LLaVA: LLaVA whose projector reads several layers of the tower."""

from __future__ import annotations

from dop_search.models.llava import LlavaAdapter


class VipLlavaAdapter(LlavaAdapter):
    """``VipLlavaForConditionalGeneration`` (arXiv 2312.00784)."""

    vision_towers = ("clip_vision_model",)

    @property
    def feature_layer(self) -> int:
        """See base class: the last of them."""
        config = self.model.config
        states = 1 + config.vision_config.num_hidden_layers
        layer = config.vision_feature_layer
        return max(index % states for index in ([layer] if isinstance(layer, int) else layer))
