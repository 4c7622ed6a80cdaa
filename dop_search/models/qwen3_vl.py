"""Qwen3-VL, dense and with experts: as Qwen2-VL, with deepstack: vision features that enter after the first layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import MoeModelOutputWithPast

from dop_search.models.qwen2_vl import Qwen2VLAdapter
from dop_search.strategy.operations import ModelDims
from dop_search.utils.errors import UnsupportedModelError


class Qwen3VLAdapter(Qwen2VLAdapter):
    """``Qwen3VLForConditionalGeneration`` (deepstack: arXiv 2406.04334)."""

    has_deepstack = True

    def pop_deepstack(self, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        kwargs.pop("visual_pos_masks", None)
        return tuple(kwargs.pop("deepstack_visual_embeds", None) or ())

    def deepstack_arguments(self, visual: Tensor, features: Sequence[Tensor]) -> dict[str, Any]:
        return {"visual_pos_masks": visual, "deepstack_visual_embeds": list(features)} if features else {}


class Qwen3VLMoeAdapter(Qwen3VLAdapter):
    """``Qwen3VLMoeForConditionalGeneration``: every MLP is a mixture of experts."""

    decoder_output = MoeModelOutputWithPast

    @classmethod
    def check_config(cls, config: Any) -> None:
        """See base class: all layers must cost the same."""
        text = config.get_text_config()
        if text.mlp_only_layers or text.decoder_sparse_step != 1:
            raise UnsupportedModelError(
                "every layer must have experts, as in the published models, but this model has mlp_only_layers="
                f"{text.mlp_only_layers} and decoder_sparse_step={text.decoder_sparse_step}"
            )

    @property
    def dims(self) -> ModelDims:
        return with_experts(super().dims, self.text_config)


def with_experts(dims: ModelDims, text: Any) -> ModelDims:
    """Sizes of a decoder in which every MLP is a mixture of experts; Qwen3.5's have one that is shared."""
    return replace(
        dims,
        intermediate_size=text.moe_intermediate_size,
        gated_mlp=True,
        num_experts=text.num_experts,
        active_experts=text.num_experts_per_tok,
        shared_expert_size=getattr(text, "shared_expert_intermediate_size", 0),
    )
