"""Ovis2: tiles of a tower whose features are mixtures of visual words, one per patch or per square of patches."""

from __future__ import annotations

from dop_search.models.adapter import ModelAdapter


class Ovis2Adapter(ModelAdapter):
    """``Ovis2ForConditionalGeneration`` (arXiv 2405.20797); the tokens around tiles are text."""

    tower_attention = "transformer.encoder.layers.{}.attention"
    knows_images = False

    @property
    def merge_size(self) -> int:
        return int(self.model.config.vision_config.hidden_stride)
