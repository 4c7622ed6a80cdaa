"""The decoder's forward with a strategy: prefill on packed rows, then decoding on the shorter caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from dop_search.models.adapter import ModelAdapter
from dop_search.pruning.attention import ForwardTables, extension_mask, signed
from dop_search.pruning.cache import CacheState, append_valid, open_state
from dop_search.pruning.deepstack import Deepstack, visual_numbers
from dop_search.pruning.layer import EAGER_PARTS, LayerParts, Side, device_of, extend_layer, run_layer
from dop_search.pruning.layout import AttentionPlan, Layout, LayoutCache, assign_groups
from dop_search.pruning.ranking import RankingSource, visual_counts
from dop_search.pruning.stages import StagePlan, StageRun, check_first_chunk
from dop_search.pruning.steps import LayerStep, layer_steps
from dop_search.pruning.text_groups import TextGroups
from dop_search.strategy import Strategy
from dop_search.utils.errors import DopError, UnsupportedModelError


class PrunedDecoder:
    """Replaces the forward of a decoder instance. Made by :func:`dop_search.pruning.prune_`."""

    def __init__(
        self,
        adapter: ModelAdapter,
        strategy: Strategy,
        rankings: RankingSource,
        parts: LayerParts = EAGER_PARTS,
        stages: StagePlan | None = None,
        text: TextGroups | None = None,
    ) -> None:
        self.adapter = adapter
        self.parts = parts
        self.stages = stages
        self.strategy = strategy
        self.rankings = rankings
        self.text = text
        further = () if text is None else text.policies
        self.steps: tuple[LayerStep, ...] = layer_steps(strategy, further)
        self.all_groups = frozenset(range(len(strategy.groups) + len(further)))
        self.text_model: Any = adapter.text_model
        self.layouts = LayoutCache()
        self._input_ids: Tensor | None = None

    def see_input_ids(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the multimodal module: the decoder itself receives embeddings only."""
        self._input_ids = args[0] if args else kwargs.get("input_ids")

    # Inside `torch.compile(model)` nothing is traced here: the layers are compiled by `compile=True`.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
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
        """Same contract as the decoder's own forward; hidden states at tokens that left and at pads are zero."""
        deepstack = self.adapter.pop_deepstack(kwargs)
        _refuse(kwargs, attention_mask)
        seen_ids = self._input_ids if input_ids is None else input_ids
        self._input_ids = None
        if inputs_embeds is None:
            inputs_embeds = self.text_model.embed_tokens(input_ids)
        device = self.adapter.device  # with a device map the vision tower and what comes from it may be elsewhere
        inputs_embeds, seen_ids = inputs_embeds.to(device), None if seen_ids is None else seen_ids.to(device)
        attention_mask, position_ids = (None if t is None else t.to(device) for t in (attention_mask, position_ids))
        deepstack = tuple(features.to(device) for features in deepstack)
        batch, length = inputs_embeds.shape[:2]
        if seen_ids is None or seen_ids.shape != (batch, length):
            raise DopError(
                "a pruned model finds the visual tokens by `input_ids`; pass `input_ids` (not only `inputs_embeds`)"
            )
        if (self.text_model.config.use_cache if use_cache is None else use_cache) and past_key_values is None:
            past_key_values = DynamicCache(config=self.text_model.config)
        state = open_state(past_key_values, self.strategy.num_layers, attention_mask)
        if position_ids is None:
            position_ids = (torch.arange(length, device=device) + state.num_seen)[None]
        rope = self.adapter.rotary(inputs_embeds, position_ids)
        valid = None if attention_mask is None else attention_mask[:, -length:].bool()
        visual = self.adapter.visual_token_mask(seen_ids)
        state.open = True
        try:
            if length > 1 and bool(visual.any()):
                inputs_embeds = self.rankings.prepare(inputs_embeds, seen_ids, visual, valid, self.strategy.num_kept)
                hidden = self._prefill(inputs_embeds, visual, valid, rope, past_key_values, state, deepstack)
            else:
                hidden = self._extend(inputs_embeds, valid, rope, past_key_values, state)
        finally:
            state.open = False
        state.num_seen += length
        return BaseModelOutputWithPast(
            last_hidden_state=self.text_model.norm(hidden.to(self.text_model.norm.weight.device)),
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
        deepstack: tuple[Tensor, ...] = (),
    ) -> Tensor:
        batch, length, width = embeds.shape
        layout, places = self._layout(visual, valid)
        entry = layout.tensor(places)
        tables = ForwardTables(*(part.expand(batch, -1, -1).flatten(0, 1).index_select(0, entry) for part in rope))
        injected = None
        if deepstack:
            injected = Deepstack(deepstack, layout, visual_numbers(visual.cpu().numpy())[places])
        hidden = embeds.reshape(batch * length, width).index_select(0, entry)
        before = self.all_groups
        all_real: dict[int, Tensor] = {}
        run = None
        if self.stages is not None:
            check_first_chunk(state.num_seen)
            run = StageRun(self.stages, self.adapter, visual_counts(visual))
            run.begin(hidden, layout, tables)
        for index, step in enumerate(self.steps):
            if run is not None and index in run.plan.stages:
                present, here = layout.rows(before), device_of(self.adapter.layers[index])
                hidden, layout, tables, entry = run.refine(
                    index, hidden.to(here), before, layout.on(here), tables.on(here), entry.to(here)
                )
                if injected is not None:
                    injected = Deepstack(deepstack, layout, injected.token_of_row[present])
            past_valid = self._past_valid(state, index, batch, embeds.device, all_real)
            hidden = run_layer(
                self.adapter.layers[index], hidden, before, step, layout, tables, cache, past_valid, parts=self.parts
            )
            before = step.alive
            if injected is not None:
                hidden = injected.add(hidden, index, before)
            if cache is not None:
                self._remember(state, index, layout.attention(step.q, step.kv))
        final = entry.index_select(0, layout.tensor(layout.rows(before))).to(hidden.device)
        full = hidden.new_zeros(batch * length, width)
        return full.index_copy(0, final, hidden).view(batch, length, width)

    def _layout(self, visual: Tensor, valid: Tensor | None) -> tuple[Layout, np.ndarray]:
        """The packed rows, and the place of each in the padded batch."""
        batch, length = visual.shape
        counts = visual_counts(visual)
        rankings = self.rankings.rank(counts) if self.stages is None else [np.arange(count) for count in counts]
        is_visual = visual.cpu().numpy()
        is_valid = np.ones((batch, length), dtype=np.bool_) if valid is None else valid.cpu().numpy()
        places = [np.flatnonzero(row) for row in is_valid]
        groups = [
            assign_groups(is_visual[row, place], rankings[row], self.strategy) for row, place in enumerate(places)
        ]
        if self.text is not None:
            first = len(self.strategy.groups)
            groups = [self.text.assign(its, is_visual[row, places[row]], first) for row, its in enumerate(groups)]
        layout, kept = self.layouts.pack(groups, visual.device)
        entry = [row * length + place[keep] for row, (place, keep) in enumerate(zip(places, kept, strict=True))]
        return layout, np.concatenate(entry)

    # -- a chunk of text only: decoding and continuation ------------------------------------------

    def _extend(
        self,
        hidden: Tensor,
        valid: Tensor | None,
        rope: tuple[Tensor, Tensor],
        cache: Cache | None,
        state: CacheState,
    ) -> Tensor:
        batch, length = hidden.shape[:2]
        new_valid = None if valid is None or length == 1 or bool(valid.all()) else valid
        eager = self.text_model.config._attn_implementation == "eager"
        masks: dict[tuple[int, int, torch.device], Tensor | None] = {}
        rows: dict[torch.device, Side] = {}
        packed = hidden.flatten(0, 1)
        for index, layer in enumerate(self.adapter.layers):
            past, device = state.valid[index], device_of(layer)
            key = (state.lengths[index], id(past), device)
            if key not in masks:
                mask = extension_mask(hidden, state.lengths[index], past, new_valid, eager)
                masks[key] = None if mask is None else mask.to(device)
            if device not in rows:
                cos, sin = (part.to(device)[:, None] for part in rope)
                rows[device] = Side(None, None, cos, signed(sin))
            packed = extend_layer(layer, packed.to(device), rows[device], batch, masks[key], cache, self.parts)
        appended: dict[tuple[int, int], Tensor] = {}
        for index, past in enumerate(state.valid):
            if past is not None or new_valid is not None:
                held = (state.lengths[index], id(past))
                if held not in appended:
                    appended[held] = append_valid(past, held[0], new_valid, batch, length, hidden.device)
                state.valid[index] = appended[held]
            state.lengths[index] += length
        return packed.view_as(hidden)

    # -- bookkeeping ------------------------------------------------------------------------------

    def _past_valid(
        self, state: CacheState, index: int, batch: int, device: torch.device, all_real: dict[int, Tensor]
    ) -> Tensor | None:
        """Which cached keys are real; ``all_real`` keeps one tensor per length, as masks are shared by identity."""
        length, valid = state.lengths[index], state.valid[index]
        if length == 0 or valid is not None:
            return valid if length else None
        if length not in all_real:
            all_real[length] = torch.ones(batch, length, dtype=torch.bool, device=device)
        return all_real[length]

    def _remember(self, state: CacheState, index: int, plan: AttentionPlan) -> None:
        past, length, device = state.valid[index], state.lengths[index], plan.key_rows.device
        if past is not None or plan.key_valid is not None:
            state.valid[index] = append_valid(past, length, plan.key_valid, plan.num_samples, plan.num_keys, device)
        state.lengths[index] += plan.num_keys


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
    """Rankings given by the user as arrays.

    Raises:
        DopError: if there are none.
    """
    if rankings is not None and not len(rankings):
        raise DopError("`rankings` must have one entry per sample of the batch, but got an empty list")
    return None if rankings is None else [np.asarray(ranking) for ranking in rankings]
