"""A Llama decoder of vLLM that runs the operations of a strategy, and no others, on the rows of one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from vllm.config import VllmConfig
from vllm.forward_context import ForwardContext
from vllm.model_executor.layers.attention.attention import unified_kv_cache_update
from vllm.v1.attention.backend import CommonAttentionMetadata

from dop_search.serving.rows import Fed, Paging, Rows, Tally
from dop_search.strategy import Strategy
from dop_search.strategy.steps import Groups, LayerStep, layer_steps


@dataclass
class _Cache:
    """What is known once the engine has made its cache."""

    block_size: int
    builder: Any
    tally: Tally


class PrunedDecoder:
    """Runs steps with visual tokens through packed layers, and tells vLLM's own decoder where keys are in the others.

    ``decoder``: vLLM's ``LlamaModel``.
    """

    def __init__(self, decoder: Any, strategy: Strategy, vllm_config: VllmConfig) -> None:
        self.decoder, self.vllm_config = decoder, vllm_config
        self.steps = layer_steps(strategy)
        self.everyone: Groups = frozenset(range(len(strategy.groups)))
        self._split: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._cache: _Cache | None = None

    def keep_weights(self) -> None:
        """Copy the projections of layers whose queries and keys are of different rows, before vLLM packs them."""
        for index, step in enumerate(self.steps):
            if step.q != step.kv:
                projection = self.decoder.layers[index].self_attn.qkv_proj
                bias = projection.bias
                self._split[index] = projection.weight.detach().clone(), None if bias is None else bias.detach().clone()

    def rows(self, fed: Fed, context: ForwardContext) -> Rows:
        """The rows of the step that ``context`` is about."""
        attention = self.decoder.layers[0].self_attn.attn
        metadata = context.attn_metadata[attention.layer_name]
        cache = self._cache or self._make_cache(attention, metadata.block_table.device)
        paging = Paging(
            metadata.query_start_loc.long(), metadata.seq_lens.long(), metadata.block_table.long(), cache.block_size
        )
        return Rows(fed, paging, cache.tally.advance(fed.counts(len(self.everyone)), paging))

    def _make_cache(self, attention: Any, device: torch.device) -> _Cache:
        spec = attention.get_kv_cache_spec(self.vllm_config)
        names = [layer.self_attn.attn.layer_name for layer in self.decoder.layers]
        builder = attention.get_attn_backend().get_builder_cls()(spec, names, self.vllm_config, device)
        tally = Tally(attention.kv_cache.shape[0] * spec.block_size, 1 + len(self.everyone), device)
        self._cache = _Cache(spec.block_size, builder, tally)
        return self._cache

    def redirect(self, rows: Rows, context: ForwardContext) -> None:
        """A step of text alone: vLLM's own layers find the keys where groups have left them."""
        for layer, step in zip(self.decoder.layers, self.steps, strict=True):
            if step.kv != self.everyone:
                self._see(layer, step, rows, context, {})

    def _see(self, layer: Any, step: LayerStep, rows: Rows, context: ForwardContext, made: dict[Any, Any]) -> None:
        """Let a layer's attention be that of the step's queries to its keys."""
        name = layer.self_attn.attn.layer_name
        key = step.q, step.kv
        if key not in made:
            made[key] = self._metadata(rows, *key)
        context.attn_metadata[name], context.slot_mapping[name] = made[key]

    def _metadata(self, rows: Rows, queries: Groups, keys: Groups) -> tuple[Any, Tensor]:
        assert self._cache is not None
        slots = rows.slots(keys)
        if not len(rows.members(queries)):
            return None, slots
        runs = rows.runs(queries, keys)
        starts = functional.pad(runs.sizes.cumsum(0), (1, 0)).int()
        lengths = runs.lengths.int()
        common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts.cpu(),
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=lengths.cpu(),
            num_reqs=len(lengths),
            num_actual_tokens=int(starts[-1]),
            max_query_len=int(runs.sizes.max()),
            max_seq_len=int(lengths.max()),
            block_table_tensor=rows.paging.table[runs.request].int(),
            slot_mapping=slots,
            causal=True,
        )
        return self._cache.builder.build(0, common), slots

    def run(self, embeds: Tensor, rows: Rows, positions: Tensor, context: ForwardContext) -> Tensor:
        """The decoder's output ``[n, hidden_size]`` of a step; rows that leave before the end are zero.

        ``positions``: ``[n]``, or ``[axes, n]`` with multimodal RoPE.
        """
        x, alive, made = embeds.clone(), self.everyone, {}  # type: ignore[var-annotated]
        for index, (layer, step) in enumerate(zip(self.decoder.layers, self.steps, strict=True)):
            if (staying := rows.within(step.alive, alive)) is not None:
                x = x[staying]
            alive = step.alive
            if not len(x):
                break
            self._see(layer, step, rows, context, made)
            self._attend(index, layer, step, x, rows, positions)
            _add(
                x,
                rows.within(step.mlp, alive),
                lambda part, layer=layer: layer.mlp(layer.post_attention_layernorm(part)),
            )
        output = embeds.new_zeros(embeds.shape)
        return output.index_copy_(0, rows.members(alive), self.decoder.norm(x)) if len(x) else output

    def _attend(self, index: int, layer: Any, step: LayerStep, x: Tensor, rows: Rows, positions: Tensor) -> None:
        """Add the attention of the queries to ``x``, and keep the keys and values."""
        attention, norm, both = layer.self_attn, layer.input_layernorm, step.q | step.kv
        part = rows.within(both, step.alive)
        h = norm(x if part is None else x[part])
        queries, keys = rows.within(step.q, both), rows.within(step.kv, both)
        positions = positions[..., rows.members(both)]
        asking = positions if queries is None else positions[..., queries]
        offering = positions if keys is None else positions[..., keys]
        sizes = [attention.q_size, attention.kv_size, attention.kv_size]
        if index not in self._split:
            q, k, v = attention.qkv_proj(h)[0].split(sizes, dim=-1)
        else:
            weights, bias = self._split[index]
            cut = attention.q_size
            bq, bkv = (None, None) if bias is None else (bias[:cut], bias[cut:])
            q = functional.linear(h if queries is None else h[queries], weights[:cut], bq)
            k, v = functional.linear(h if keys is None else h[keys], weights[cut:], bkv).split(sizes[1:], dim=-1)
        if len(k):
            k = _rotated(attention.rotary_emb, offering, k)
            shape = (-1, attention.num_kv_heads, attention.head_dim)
            unified_kv_cache_update(k.view(shape), v.reshape(shape), attention.attn.layer_name)
        if len(q):
            q = _rotated(attention.rotary_emb, asking, q)
            out = attention.o_proj(attention.attn(q, None, None))[0]
            place = rows.within(step.q, step.alive)
            x.add_(out) if place is None else x.index_add_(0, place, out)


def _rotated(rotary: Any, positions: Tensor, heads: Tensor) -> Tensor:
    """``heads`` ``[n, heads * head_dim]`` at their positions; vLLM's multimodal RoPE takes two tensors alone."""
    heads = heads.contiguous()
    rotated: Tensor = rotary(positions, heads, heads if positions.ndim == 2 else None)[0]
    return rotated


def _add(x: Tensor, place: Tensor | None, compute: Any) -> None:
    """Add to ``x`` what is computed of some of its rows (``None``: of all)."""
    if place is None:
        x.add_(compute(x))
    elif len(place):
        x.index_add_(0, place, compute(x[place]))
