"""Qwen3.5, dense and with experts: as Qwen3-VL without deepstack; three of four layers carry a state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers.modeling_outputs import MoeModelOutputWithPast

from dop_search.models.qwen2_vl import Qwen2VLAdapter
from dop_search.models.qwen3_vl import with_experts
from dop_search.strategy.operations import ModelDims, RecurrentDims

CHUNK = 64
"""Tokens that transformers' recurrence takes at a time."""


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
