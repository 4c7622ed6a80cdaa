"""Qwen3-VL: as Qwen2-VL, with vision features of several depths added after the first decoder layers (deepstack)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dop_search.models.qwen2_vl import Qwen2VLAdapter


class Qwen3VLAdapter(Qwen2VLAdapter):
    """``Qwen3VLForConditionalGeneration`` (deepstack: arXiv 2406.04334)."""

    model_types = ("qwen3_vl",)
    has_deepstack = True

    def pop_deepstack(self, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """See base class."""
        kwargs.pop("visual_pos_masks", None)
        return tuple(kwargs.pop("deepstack_visual_embeds", None) or ())

    def deepstack_arguments(self, visual: Tensor, features: Sequence[Tensor]) -> dict[str, Any]:
        """See base class."""
        return {"visual_pos_masks": visual, "deepstack_visual_embeds": list(features)} if features else {}
