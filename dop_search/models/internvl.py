"""InternVL: tiles of an InternViT with a CLS token, four patches shuffled into one visual token, Qwen2 decoder."""

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
