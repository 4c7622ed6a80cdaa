"""One decoder layer on packed rows: gather, project, attend, scatter. A skipped operation is never computed."""

from __future__ import annotations

import sys
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dop_search.pruning.layout import AttentionPlan, Groups, Layout
from dop_search.pruning.steps import LayerStep


class KeyValueStore(Protocol):
    """What a layer hands its new keys and values to: a transformers ``Cache``, or a fixed prefix."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Add this layer's keys and values; returns all that its queries may see."""


class ForwardTables:
    """Rotary embeddings and masks of one forward, arranged once per attention plan instead of once per layer.

    Args:
        cos, sin: ``[num_rows, head_dim]``, one row per row of the layout.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos, self.sin = cos, sin
        self._rope: dict[int, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] = {}
        self._masks: dict[tuple[int, int, bool], tuple[Tensor, Tensor | None]] = {}
        self._alive: list[Tensor | None] = []  # keys above are identities, so what they name must live on
        self._triangles: dict[tuple[int, int], Tensor] = {}

    def rope(self, plan: AttentionPlan) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """``(cos, sin)`` for queries and for keys, each ``[num_samples, 1, length, head_dim]``."""
        if id(plan) not in self._rope:
            self._rope[id(plan)] = (
                self._gather(plan.query_rows, plan.query_pad, plan.num_samples),
                self._gather(plan.key_rows, plan.key_pad, plan.num_samples),
            )
        return self._rope[id(plan)]

    def _gather(self, rows: Tensor, pad: Tensor | None, num_samples: int) -> tuple[Tensor, Tensor]:
        index = rows if pad is None else rows[pad]
        shape = (num_samples, 1, -1, self.cos.shape[-1])
        return self.cos[index].view(shape), self.sin[index].view(shape)

    def mask(self, plan: AttentionPlan, past_valid: Tensor | None, additive: bool) -> tuple[Tensor, Tensor | None]:
        """The full mask ``[num_samples, 1, num_queries, past + num_keys]``.

        Args:
            plan: the arrangement.
            past_valid: which keys outside the plan are real.
            additive: as numbers to add to the scores instead of booleans.

        Returns:
            The mask, and for additive masks which queries see no key at all (``[num_samples, num_queries, 1, 1]``).
        """
        key = (id(plan), id(past_valid), additive)
        if key not in self._masks:
            mask, blind = full_mask(plan, past_valid), None
            if additive:
                blind = ~mask.any(dim=-1).transpose(1, 2)[..., None]
                lowest = torch.finfo(self.cos.dtype).min
                mask = torch.zeros_like(mask, dtype=self.cos.dtype).masked_fill_(~mask, lowest)
            self._masks[key] = mask, blind
            self._alive.append(past_valid)
        return self._masks[key]

    def triangle(self, num_queries: int, num_keys: int) -> Tensor | None:
        """Which keys each of the last ``num_queries`` tokens sees; ``None`` where plain causal attention is right."""
        if num_queries in (num_keys, 1):
            return None
        key = (num_queries, num_keys)
        if key not in self._triangles:
            self._triangles[key] = bottom_right_causal(num_queries, num_keys, self.cos.device)[None, None]
        return self._triangles[key]


def bottom_right_causal(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Boolean ``[num_queries, num_keys]``: the last query sees every key, each earlier one a key less."""
    rows = torch.arange(num_keys - num_queries, num_keys, device=device)
    return torch.arange(num_keys, device=device)[None, :] <= rows[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-rotation convention of the Llama family."""
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + rotated * sin


def project_heads(projection: nn.Module, norm: nn.Module | None, rows: Tensor, head_dim: int) -> Tensor:
    """Project rows to heads: ``[num_rows, num_heads, head_dim]``, normalised per head where the model does so."""
    heads: Tensor = projection(rows).view(rows.shape[0], -1, head_dim)
    return heads if norm is None else norm(heads)


def arrange(heads: Tensor, pad: Tensor | None, num_samples: int) -> Tensor:
    """``[rows, heads, head_dim]`` to ``[num_samples, heads, length, head_dim]``."""
    if pad is not None:
        heads = heads.index_select(0, pad)
    return heads.view(num_samples, -1, *heads.shape[1:]).transpose(1, 2)


def run_layer(
    layer: Any,
    hidden: Tensor,
    before: Groups,
    step: LayerStep,
    layout: Layout,
    tables: ForwardTables,
    cache: KeyValueStore | None = None,
    past_valid: Tensor | None = None,
    read_only: bool = False,
) -> Tensor:
    """Run one decoder layer of the Llama family on packed rows.

    Args:
        layer: decoder layer with ``input_layernorm``, ``self_attn``, ``post_attention_layernorm`` and ``mlp``.
        hidden: ``[rows of (text + before), hidden_size]``.
        before: groups whose rows ``hidden`` holds.
        step: what this layer does; rows of groups outside ``step.alive`` leave the sequence.
        layout: index sets.
        tables: rotary embeddings and masks of this forward.
        cache: receives this layer's keys and values, ``[num_samples, kv_heads, length, head_dim]``.
        past_valid: ``[num_samples, past]``, which cached keys are real; ``None`` without a past.
        read_only: queries and MLP only for rows whose logits are read (the last layer of a scoring pass).

    Returns:
        ``[rows of (text + step.alive), hidden_size]``.
    """
    keep = layout.relative(step.alive, before)
    if keep is not None:
        hidden = hidden.index_select(0, keep)
    plan = layout.attention(step.q, step.kv, read_only)
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    query_index = layout.relative(step.q, step.alive, read_only)
    key_index = layout.relative(step.kv, step.alive)
    queries_in = normed if query_index is None else normed.index_select(0, query_index)
    keys_in = normed if key_index is None else normed.index_select(0, key_index)

    head_dim = attention.head_dim
    queries = project_heads(attention.q_proj, getattr(attention, "q_norm", None), queries_in, head_dim)
    keys = project_heads(attention.k_proj, getattr(attention, "k_norm", None), keys_in, head_dim)
    values = project_heads(attention.v_proj, None, keys_in, head_dim)
    (cos_q, sin_q), (cos_k, sin_k) = tables.rope(plan)
    query = rotate(arrange(queries, plan.query_pad, plan.num_samples), cos_q, sin_q)
    key = rotate(arrange(keys, plan.key_pad, plan.num_samples), cos_k, sin_k)
    value = arrange(values, plan.key_pad, plan.num_samples)
    if cache is not None:
        key, value = cache.update(key, value, attention.layer_idx)

    context = attend(attention, query, key, value, plan, tables, past_valid)
    context = context.reshape(plan.num_samples * plan.num_queries, -1)
    if plan.query_unpad is not None:
        context = context.index_select(0, plan.query_unpad)
    hidden = add_rows(hidden, query_index, attention.o_proj(context))

    mlp_index = layout.relative(step.mlp, step.alive, read_only)
    mlp_in = hidden if mlp_index is None else hidden.index_select(0, mlp_index)
    return add_rows(hidden, mlp_index, layer.mlp(layer.post_attention_layernorm(mlp_in)))


def add_rows(hidden: Tensor, index: Tensor | None, update: Tensor) -> Tensor:
    """Add ``update`` to the rows at ``index`` (all rows when ``None``)."""
    return hidden + update if index is None else hidden.index_add(0, index, update)


def attend(
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    tables: ForwardTables,
    past_valid: Tensor | None,
) -> Tensor:
    """Attention by the model's own backend: ``[num_samples, num_queries, heads, head_dim]``.

    A mask is made only where plain causal attention would be wrong; ``eager`` always gets an additive one.
    """
    implementation = attention.config._attn_implementation
    function: Any = ALL_ATTENTION_FUNCTIONS.get_interface(
        implementation, sys.modules[type(attention).__module__].eager_attention_forward
    )
    kwargs: dict[str, Any] = {
        "dropout": attention.attention_dropout if attention.training else 0.0,
        "scaling": attention.scaling,
    }
    if implementation == "eager":
        mask, blind = tables.mask(plan, past_valid, additive=True)
        assert blind is not None
        context: Tensor = function(attention, query, key, value, mask, **kwargs)[0]
        return context.masked_fill(blind, 0.0)  # a query without any key receives nothing
    if plan.segments is None or past_valid is not None:
        mask, _ = tables.mask(plan, past_valid, additive=False)
        context = function(attention, query, key, value, mask, is_causal=False, **kwargs)[0]
        return context
    outputs = []
    for segment in plan.segments:
        part = query[:, :, segment.start : segment.stop]
        seen_keys, seen_values = key[:, :, : segment.num_keys], value[:, :, : segment.num_keys]
        triangle = tables.triangle(part.shape[2], segment.num_keys)
        causal = triangle is None
        outputs.append(function(attention, part, seen_keys, seen_values, triangle, is_causal=causal, **kwargs)[0])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def full_mask(plan: AttentionPlan, past_valid: Tensor | None) -> Tensor:
    """Boolean ``[num_samples, 1, num_queries, past + num_keys]``; ``past_valid`` marks keys outside the plan."""
    mask = plan.mask
    if mask is None:
        assert plan.segments is not None
        total, device = plan.num_past + plan.num_keys, plan.query_rows.device
        parts = []
        for segment in plan.segments:
            seen = bottom_right_causal(segment.stop - segment.start, segment.num_keys, device)
            parts.append(nn.functional.pad(seen, (0, total - segment.num_keys), value=False))
        mask = torch.cat(parts).expand(plan.num_samples, 1, -1, -1)
    if past_valid is not None:
        past = past_valid[:, None, None, :].expand(-1, 1, plan.num_queries, -1)
        mask = torch.cat([past, mask], dim=-1)
    return mask
