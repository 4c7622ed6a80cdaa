"""GLM-4.1V, GLM-4.6V and GLM-OCR: images as Qwen2-VL has them; a decoder of four norms that rotates in pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from dop_search.models.qwen2_vl import Qwen2VLAdapter


class Glm4vAdapter(Qwen2VLAdapter):
    """``Glm4vForConditionalGeneration`` (arXiv 2507.01006), ``Glm46VForConditionalGeneration`` and GLM-OCR.

    Tokens of a video are image tokens between markers, frame after frame with the time in words; transformers takes
    images or videos in one call, not both.
    """

    def rotary(self, embeds: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """See base class; of each pair of features what the model has of both, in halves."""
        cos, sin = (part[..., ::2] for part in super().rotary(embeds, position_ids))
        return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)
