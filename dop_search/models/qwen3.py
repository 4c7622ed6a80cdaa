"""Qwen3-VL and Qwen3.5, dense and with experts: images as Qwen2-VL has them.

Qwen3-VL has deepstack: vision features that enter after the first layers. Of Qwen3.5's layers three of four carry a
state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import MoeModelOutputWithPast

from dop_search.models.qwen2_vl import Qwen2VLAdapter
from dop_search.strategy.operations import ModelDims, RecurrentDims
from dop_search.utils.errors import UnsupportedModelError

CHUNK = 64
"""Tokens that transformers' recurrence takes at a time."""


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


class Qwen3_5Adapter(Qwen2VLAdapter):
    """``Qwen3_5ForConditionalGeneration``: gated delta nets (arXiv 2412.06464), and attention with gated queries."""

    layer_types = frozenset({"linear_attention"})

    @property
    def dims(self) -> ModelDims:
        """See base class; the state is a matrix per value head, queries, keys and values are convolved."""
        text: Any = self.text_config
        heads, width = text.linear_num_value_heads, text.linear_key_head_dim + text.linear_value_head_dim
        keys = text.linear_num_key_heads * text.linear_key_head_dim
        values = heads * text.linear_value_head_dim
        recurrent = RecurrentDims(
            layers=tuple(index for index, kind in enumerate(text.layer_types) if kind == "linear_attention"),
            in_width=2 * keys + values + 2 * heads,
            out_width=2 * values,
            state_size=values * text.linear_key_head_dim,
            window_size=(2 * keys + values) * text.linear_conv_kernel_dim,
            working_size=heads * (21 * width // 4 + 3 * CHUNK),  # measured
        )
        return replace(super().dims, gated_queries=True, recurrent=recurrent if recurrent.layers else None)


class Qwen3_5MoeAdapter(Qwen3_5Adapter):
    """``Qwen3_5MoeForConditionalGeneration``: every MLP is a mixture of experts, beside one that is shared."""

    decoder_output = MoeModelOutputWithPast

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
