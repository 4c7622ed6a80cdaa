"""DeepSeek-VL: images of one size in a SigLIP tower, a visual token per patch, Llama decoder."""

from __future__ import annotations

from dop_search.models.adapter import ModelAdapter


class DeepseekVLAdapter(ModelAdapter):
    """``DeepseekVLForConditionalGeneration`` (arXiv 2403.05525), the one with a single tower."""

    tower_name = "vision_model"
