"""Families that show a tower tiles, or images, of one size, each a square of visual tokens.

Of InternVL's InternViT four patches are shuffled into a token; Ovis2's tokens are mixtures of visual words, made of one
patch or a square of them; those of DeepSeek-VL are the patches of a SigLIP tower.
"""

from __future__ import annotations

from dop_search.models.adapter import ModelAdapter


class InternVLAdapter(ModelAdapter):
    """``InternVLForConditionalGeneration`` (arXiv 2504.10479); video frames come as tiles of an image."""

    tower_attention = "encoder.layer.{}.attention"
    has_cls = True
    knows_images = False

    @property
    def merge_size(self) -> int:
        return round(1 / self.model.config.downsample_ratio)


class QianfanOcrAdapter(InternVLAdapter):
    """``QianfanOCRForConditionalGeneration``: InternVL for images alone, with a Qwen3 decoder."""

    tower_attention = "layers.{}.attention"


class Ovis2Adapter(ModelAdapter):
    """``Ovis2ForConditionalGeneration`` (arXiv 2405.20797); the tokens around tiles are text."""

    tower_attention = "transformer.encoder.layers.{}.attention"
    knows_images = False
    merge_key = "vision_config.hidden_stride"


class DeepseekVLAdapter(ModelAdapter):
    """``DeepseekVLForConditionalGeneration`` (arXiv 2403.05525).

    And ``DeepseekVLHybridForConditionalGeneration``, whose second tower (SAM) adds to each patch what it sees there at
    a higher resolution; selectors look at the SigLIP tower.
    """

    tower_name = "vision_model"
