"""The decoder's forward with a strategy: prefill on packed rows, then decoding on the shorter caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from dop_search.errors import DopError, UnsupportedModelError
from dop_search.models.adapter import ModelAdapter
from dop_search.pruning.cache import CacheState, append_valid, open_state
from dop_search.pruning.layer import ForwardTables, run_layer
from dop_search.pruning.layout import AttentionPlan, Layout, assign_groups, pack
from dop_search.pruning.ranking import RankingSource, visual_counts
from dop_search.pruning.steps import LayerStep, layer_steps
from dop_search.strategy import Strategy


class PrunedDecoder:
    """Replaces the forward of a decoder instance. Made by :func:`dop_search.pruning.prune_`."""

    def __init__(self, adapter: ModelAdapter, strategy: Strategy, rankings: RankingSource) -> None:
        self.adapter = adapter
        self.strategy = strategy
        self.rankings = rankings
        self.steps: tuple[LayerStep, ...] = layer_steps(strategy)
        self.all_groups = frozenset(range(len(strategy.groups)))
        self.text_model: Any = adapter.text_model
        self._input_ids: Tensor | None = None

    def see_input_ids(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the multimodal module: the decoder itself receives embeddings only."""
        self._input_ids = args[0] if args else kwargs.get("input_ids")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Same contract as the decoder's own forward; hidden states at skipped visual tokens and pads are zero."""
        _refuse(kwargs, attention_mask)
        seen_ids = self._input_ids if input_ids is None else input_ids
        self._input_ids = None
        if inputs_embeds is None:
            inputs_embeds = self.text_model.embed_tokens(input_ids)
        batch, length = inputs_embeds.shape[:2]
        if seen_ids is None or seen_ids.shape != (batch, length):
            raise DopError(
                "a pruned model finds the visual tokens by `input_ids`; pass `input_ids` (not only `inputs_embeds`)"
            )
        if (self.text_model.config.use_cache if use_cache is None else use_cache) and past_key_values is None:
            past_key_values = DynamicCache(config=self.text_model.config)
        state = open_state(past_key_values, self.strategy.num_layers, attention_mask)
        if position_ids is None:
            position_ids = (torch.arange(length, device=inputs_embeds.device) + state.num_seen)[None]
        rope = self.adapter.rotary(inputs_embeds, position_ids)
        valid = None if attention_mask is None else attention_mask[:, -length:].bool()
        visual = self.adapter.visual_token_mask(seen_ids)
        state.open = True
        try:
            if length > 1 and bool(visual.any()):
                inputs_embeds = self.rankings.prepare(inputs_embeds, seen_ids, visual, valid, self.strategy.num_kept)
                hidden = self._prefill(inputs_embeds, visual, valid, rope, past_key_values, state)
            else:
                hidden = self._extend(inputs_embeds, valid, position_ids, rope, past_key_values, state)
        finally:
            state.open = False
        state.num_seen += length
        return BaseModelOutputWithPast(
            last_hidden_state=self.text_model.norm(hidden),
            past_key_values=past_key_values if use_cache is not False else None,
        )

    # -- a chunk with visual tokens -------------------------------------------------------------

    def _prefill(
        self,
        embeds: Tensor,
        visual: Tensor,
        valid: Tensor | None,
        rope: tuple[Tensor, Tensor],
        cache: Cache | None,
        state: CacheState,
    ) -> Tensor:
        batch, length, width = embeds.shape
        layout, entry = self._layout(visual, valid)
        sample, column = layout.sample_index, layout.column_index
        cos, sin = (part.expand(batch, -1, -1)[sample, column] for part in rope)
        tables = ForwardTables(cos, sin)
        hidden = embeds.reshape(batch * length, width).index_select(0, entry)
        before = self.all_groups
        for index, step in enumerate(self.steps):
            past_valid = self._past_valid(state, index, batch, embeds.device)
            hidden = run_layer(self.adapter.layers[index], hidden, before, step, layout, tables, cache, past_valid)
            before = step.alive
            if cache is not None:
                self._remember(state, index, layout.attention(step.q, step.kv))
        final = entry.index_select(0, layout.tensor(layout.rows(before)))
        full = hidden.new_zeros(batch * length, width)
        return full.index_copy(0, final, hidden).view(batch, length, width)

    def _layout(self, visual: Tensor, valid: Tensor | None) -> tuple[Layout, Tensor]:
        batch, length = visual.shape
        rankings = self.rankings.rank(visual_counts(visual))
        is_visual = visual.cpu().numpy()
        is_valid = np.ones((batch, length), dtype=np.bool_) if valid is None else valid.cpu().numpy()
        groups, columns = [], []
        for row in range(batch):
            column = np.flatnonzero(is_valid[row])
            groups.append(assign_groups(is_visual[row, column], rankings[row], self.strategy))
            columns.append(column)
        layout, _ = pack(groups, columns, visual.device)
        return layout, layout.tensor(layout.sample * length + layout.column)

    # -- a chunk of text only: decoding and continuation ------------------------------------------

    def _extend(
        self,
        hidden: Tensor,
        valid: Tensor | None,
        position_ids: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: Cache | None,
        state: CacheState,
    ) -> Tensor:
        batch, length = hidden.shape[:2]
        new_valid = None if valid is None or length == 1 or bool(valid.all()) else valid
        eager = self.text_model.config._attn_implementation == "eager"
        masks: dict[tuple[int, int], Tensor | None] = {}
        for index, layer in enumerate(self.adapter.layers):
            past = state.valid[index]
            key = (state.lengths[index], id(past))
            if key not in masks:
                masks[key] = extension_mask(hidden, state.lengths[index], past, new_valid, eager)
            hidden = layer(
                hidden,
                attention_mask=masks[key],
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
                position_embeddings=rope,
            )
        appended: dict[tuple[int, int], Tensor] = {}
        for index, past in enumerate(state.valid):
            if past is not None or new_valid is not None:
                key = (state.lengths[index], id(past))
                if key not in appended:
                    appended[key] = append_valid(past, key[0], new_valid, batch, length, hidden.device)
                state.valid[index] = appended[key]
            state.lengths[index] += length
        return hidden

    # -- bookkeeping ------------------------------------------------------------------------------

    def _past_valid(self, state: CacheState, index: int, batch: int, device: torch.device) -> Tensor | None:
        if state.lengths[index] == 0:
            return None
        valid = state.valid[index]
        return torch.ones(batch, state.lengths[index], dtype=torch.bool, device=device) if valid is None else valid

    def _remember(self, state: CacheState, index: int, plan: AttentionPlan) -> None:
        past, length, device = state.valid[index], state.lengths[index], plan.key_rows.device
        if past is not None or plan.key_valid is not None:
            state.valid[index] = append_valid(past, length, plan.key_valid, plan.num_samples, plan.num_keys, device)
        state.lengths[index] += plan.num_keys


def extension_mask(
    hidden: Tensor, past_length: int, past_valid: Tensor | None, new_valid: Tensor | None, eager: bool
) -> Tensor | None:
    """Mask of a text chunk over one layer's cache: all real past keys, causal within the chunk.

    Returns:
        ``[batch, 1, length, past + length]``, additive for ``eager`` and boolean otherwise; ``None`` where the
        backend needs none.
    """
    batch, length = hidden.shape[:2]
    if past_valid is None and new_valid is None and not eager and (length == 1 or past_length == 0):
        return None
    causal = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
    mask = torch.cat([causal.new_ones(length, past_length), causal], dim=1).expand(batch, 1, -1, -1)
    if past_valid is not None or new_valid is not None:
        keys = append_valid(past_valid, past_length, new_valid, batch, length, hidden.device)
        mask = mask & keys[:, None, None, :]
    if not eager:
        return mask
    return torch.zeros_like(mask, dtype=hidden.dtype).masked_fill_(~mask, torch.finfo(hidden.dtype).min)


def _refuse(kwargs: dict[str, Any], attention_mask: Any) -> None:
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.get(name):
            raise DopError(f"`{name}=True` is not available on a pruned model: its layers see different tokens")
    for name in ("deepstack_visual_embeds", "visual_pos_masks"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"the decoder was given `{name}`, which this model's adapter does not handle")
    if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2):
        raise DopError(
            "a pruned model needs the two-dimensional attention mask of the tokenizer, but got "
            f"{type(attention_mask).__name__} (static caches and custom masks are not supported)"
        )


def explicit_rankings(rankings: Sequence[Any] | None) -> list[np.ndarray] | None:
    """Rankings given by the user as arrays."""
    return None if rankings is None else [np.asarray(ranking) for ranking in rankings]
