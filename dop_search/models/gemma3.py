"""Gemma 3: a SigLIP tower with pooled patches; a decoder with windows, that sees images as a whole."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model

from dop_search.models.adapter import ModelAdapter
from dop_search.utils.errors import UnsupportedModelError


class Gemma3Adapter(ModelAdapter):
    """``Gemma3ForConditionalGeneration`` (arXiv 2503.19786): five layers with a window to each without one."""

    layer_types = frozenset({"sliding_attention"})
    sees_images_whole = True
    draw_masks = staticmethod(create_masks_for_vision_model)
    """By which function the model draws the masks of its layers."""

    @classmethod
    def check_config(cls, config: Any) -> None:
        if config.get_text_config().use_bidirectional_attention:
            raise UnsupportedModelError("a decoder with use_bidirectional_attention=True is an encoder, not covered")

    def rotary(self, embeds: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.text_model.rotary_emb(embeds, position_ids, "full_attention")
        return cos, sin

    def windowed_rotary(self, embeds: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        cos, sin = self.text_model.rotary_emb(embeds, position_ids, "sliding_attention")
        return cos, sin

    def mask_arguments(self, embeds: Tensor, position_ids: Tensor, images: Tensor) -> dict[str, Any]:
        return {"attention_mask": self.draw_masks(self.text_config, embeds, None, None, position_ids, images)}

    @property
    def merge_size(self) -> int:
        """See base class: a square of patches is averaged. Crops are images of their own."""
        return int(self.multimodal.multi_modal_projector.kernel_size)
