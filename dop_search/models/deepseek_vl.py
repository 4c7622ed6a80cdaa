"""DeepSeek-VL: images of one size in a SigLIP tower, a visual token per patch, Llama decoder; 7B has a second one."""

from __future__ import annotations

from dop_search.models.adapter import ModelAdapter


class DeepseekVLAdapter(ModelAdapter):
    """``DeepseekVLForConditionalGeneration`` (arXiv 2403.05525).

    And ``DeepseekVLHybridForConditionalGeneration``, whose second tower (SAM) adds to each patch what it sees there at
    a higher resolution; selectors look at the SigLIP tower.
    """

    tower_name = "vision_model"
