"""The decoder's forward with a strategy: prefill on packed rows, then decoding on the shorter caches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from textwrap import shorten
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils.generic import ModelOutput

from dop_search.models.adapter import ModelAdapter
from dop_search.pruning.attention import ForwardTables, extension_mask, signed
from dop_search.pruning.cache import CacheState, PrunedCache, append_valid, open_state
from dop_search.pruning.checks import UncalledModules, check_arguments, check_embeds, check_labels, check_outputs
from dop_search.pruning.deepstack import Deepstack, visual_numbers
from dop_search.pruning.layer import (
    EAGER_PARTS,
    LayerParts,
    Side,
    checkpointed,
    device_of,
    extend_layer,
    is_checkpointed,
    run_layer,
    run_recurrent,
)
from dop_search.pruning.layout import LayoutCache
from dop_search.pruning.packed import Tokens, find_packing
from dop_search.pruning.plans import LayerPlan
from dop_search.pruning.prompt import Call, Prompt, arrange
from dop_search.pruning.ranking import RankingSource
from dop_search.pruning.recurrent import taps_of, text_chunk
from dop_search.pruning.sight import TokenMasks, append_places, sights_of, window_of
from dop_search.pruning.stages import StagePlan, StageRun
from dop_search.pruning.text_groups import TextGroups
from dop_search.strategy import Strategy
from dop_search.strategy.steps import LayerStep, layer_steps
from dop_search.utils.attached import Attached
from dop_search.utils.errors import DopError


class PrunedDecoder(Attached):
    """Replaces the forward of a decoder instance. Made by :func:`dop_search.pruning.prune_`.

    Any number of threads may call the model: what a call has shown is kept for its thread alone.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        strategy: Strategy,
        rankings: RankingSource,
        uncalled: UncalledModules,
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
        self.windows = [window_of(layer) for layer in adapter.layers]
        self.taps = [taps_of(layer) for layer in adapter.layers]
        self.layouts = LayoutCache()
        self.call = Call()
        self.uncalled = uncalled

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def see_call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the multimodal module: the decoder itself receives embeddings only."""
        if getattr(module, "_is_replica", False):
            raise DopError("a pruned model cannot be replicated by DataParallel; run one process per device")
        call, embeds = self.call, kwargs.get("inputs_embeds")
        call.input_ids = args[0] if args else kwargs.get("input_ids")
        if call.input_ids is None and embeds is not None:
            beside = call.beside_embeds
            fits = beside is not None and beside.shape == embeds.shape[:2]
            call.input_ids = beside if fits else self.adapter.placeholder_ids(None, embeds)
        encoded = kwargs.get("mm_encoder_outputs")
        self.rankings.begin(encoded)
        if not encoded:  # otherwise `generate()` has encoded the images just before
            self.rankings.expect(call.input_ids)
        if not self.adapter.has_sight:
            return None
        return args, TokenMasks.of_call(kwargs, self.adapter.token_types if self.adapter.sees_images_whole else None)

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
    ) -> ModelOutput:
        """Same contract as the decoder's own forward; hidden states at tokens that left and at pads are zero."""
        deepstack = self.adapter.pop_deepstack(kwargs)
        check_outputs([self.text_model.config], kwargs)
        self.uncalled.check()
        seen_ids = self.call.input_ids if input_ids is None else input_ids
        read, self.call.input_ids, self.call.read = self.call.read, None, None
        if inputs_embeds is None:
            inputs_embeds = self.text_model.embed_tokens(input_ids)
        attention_mask, whole = TokenMasks.undone(attention_mask, inputs_embeds.shape[1])
        check_arguments(kwargs, attention_mask)
        if seen_ids is None or seen_ids.shape != inputs_embeds.shape[:2]:
            raise DopError("a pruned decoder is called by its model; call the model, with `input_ids`")
        device = self.adapter.device  # with a device map the vision tower and what comes from it may be elsewhere
        inputs_embeds, seen_ids = inputs_embeds.to(device), seen_ids.to(device)
        attention_mask, position_ids, read, whole = (
            None if t is None else t.to(device) for t in (attention_mask, position_ids, read, whole)
        )
        deepstack = tuple(features.to(device) for features in deepstack)
        past_key_values = self._cache(past_key_values, use_cache)
        state = open_state(past_key_values, self.windows, self.taps, attention_mask)
        batch, length = inputs_embeds.shape[:2]
        packing = None
        if attention_mask is None:
            positions = None if position_ids is None else self.adapter.text_positions(position_ids)
            backend, cached = self.text_model.config._attn_implementation, past_key_values is not None
            packing = find_packing(positions, (batch, length), cached, backend, kwargs)
        if position_ids is None:
            position_ids = (torch.arange(length, device=device) + state.num_seen)[None]
        rope = (
            *self.adapter.rotary(inputs_embeds, position_ids),
            *self.adapter.windowed_rotary(inputs_embeds, position_ids),
        )
        visual = self.adapter.visual_token_mask(seen_ids)
        grown = length == 1 and past_key_values is not None and past_key_values is self.call.checked
        new = state.new_tokens(attention_mask, length, grown)
        self.call.checked = past_key_values if self.call.generating else None
        tokens = Tokens(inputs_embeds, seen_ids, visual, rope, new, read, whole)
        if packing is not None:
            tokens = tokens.unpacked(packing)
        state.open, kept = True, cast("PrunedCache | None", past_key_values)
        try:
            prompt = self._prompt(tokens, state, packing is not None)
            if prompt is None:
                hidden = self._extend(tokens, kept, state)
            else:
                hidden = self._prefill(prompt, tokens, kept, state, deepstack)
        finally:
            state.open = False
        state.add_tokens(tokens.valid if packing is None else None, batch, length, device)
        norm = self.adapter.final_norm
        hidden = norm(hidden.to(norm.weight.device))
        return self.adapter.decoder_output(
            last_hidden_state=hidden if packing is None else packing.gather(hidden), past_key_values=past_key_values
        )

    def _cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache to fill; none under gradient checkpointing, as in transformers."""
        if is_checkpointed(self.adapter.layers[0]):
            if cache is not None and cache.get_seq_length():
                raise DopError("gradient checkpointing cannot continue a cache; pass the whole sequence")
            return None
        use_cache = self.text_model.config.use_cache if use_cache is None else use_cache
        return DynamicCache(config=self.text_model.config) if use_cache and cache is None else cache

    def _prompt(self, tokens: Tokens, state: CacheState, packed: bool) -> Prompt | None:
        """What the strategy says about a chunk with visual tokens; ``None`` for text, which runs everything.

        A single token is always its sample's last, so that it runs everything as well.
        """
        length = tokens.embeds.shape[1]
        if self.call.prompt is not None and (part := self.call.prompt.part(state.num_seen, length)) is not None:
            return part
        if length == 1:
            return None
        valid, visual = tokens.valid, tokens.visual
        if not bool((visual if valid is None else visual & valid).any()):
            check_embeds(tokens.input_ids)
            if not packed:
                return None
        elif self.stages is not None and state.num_seen:
            raise DopError(
                f"a selector with stages ranks the tokens of a whole prompt, but {state.num_seen} tokens of it are "
                "already cached; pass prompt and images in one call"
            )
        check_labels(visual, tokens.read)
        return arrange(tokens, self.strategy, self.rankings, self.text)

    # -- a chunk with visual tokens -------------------------------------------------------------

    def _prefill(
        self,
        prompt: Prompt,
        tokens: Tokens,
        cache: PrunedCache | None,
        state: CacheState,
        deepstack: tuple[Tensor, ...] = (),
    ) -> Tensor:
        batch, length, width = prompt.embeds.shape
        visual = tokens.visual
        sights = None
        if self.adapter.has_sight:
            whole = torch.zeros_like(visual) if tokens.whole is None else tokens.whole
            sights = sights_of(state.num_seen, whole.cpu().numpy(), self.adapter.sees_images_in_windows)
        layout, kept = self.layouts.pack(prompt.groups, visual.device, sights)
        places = np.concatenate([row * length + keep for row, keep in enumerate(kept)])
        full = prompt.embeds.new_zeros(batch * length, width)
        if not len(places):  # of a prompt in chunks: all tokens of this one are dropped
            return full.view(batch, length, width)
        entry = layout.tensor(places)
        tables = ForwardTables(
            *(part.expand(batch, -1, -1).flatten(0, 1).index_select(0, entry) for part in tokens.rope)
        )
        injected = None
        if deepstack:
            injected = Deepstack(deepstack, layout, visual_numbers(visual.cpu().numpy())[places])
        hidden = prompt.embeds.reshape(batch * length, width).index_select(0, entry)
        before = self.all_groups
        all_real: dict[int, Tensor] = {}
        made: dict[Any, Any] = {}
        run = None
        if self.stages is not None:
            run = StageRun(self.stages, self.adapter, prompt.num_ranked)
            run.begin(hidden, layout, tables)
        for index, (layer, step) in enumerate(zip(self.adapter.layers, self.steps, strict=True)):
            if run is not None and index in run.plan.stages:
                present, here = layout.rows(before), device_of(layer)
                hidden, layout, tables, entry = run.refine(
                    index, hidden.to(here), before, layout.on(here), tables.on(here), entry.to(here)
                )
                if injected is not None:
                    injected = Deepstack(deepstack, layout, injected.token_of_row[present])
            past_valid = self._past_valid(state, index, batch, visual.device, all_real)
            compute = partial(
                run_layer,
                layer,
                before=before,
                step=step,
                layout=layout,
                tables=tables,
                cache=cache,
                past_valid=past_valid,
                parts=self.parts,
                past_places=state.places.get(index),
            )
            hidden = checkpointed(layer, compute, hidden)
            before = step.alive
            if injected is not None:
                hidden = injected.add(hidden, index, before)
            if cache is not None and not self.taps[index]:
                plan = layout.attention(step.q, step.kv, False, self.windows[index])
                self._remember(state, index, plan.key_valid, (plan.num_samples, plan.num_keys), plan.key_places, made)
        final = entry.index_select(0, layout.tensor(layout.rows(before))).to(hidden.device)
        full = full.to(hidden.device)
        return full.index_copy(0, final, hidden).view(batch, length, width)

    # -- a chunk of text only: decoding and continuation ------------------------------------------

    def _extend(self, tokens: Tokens, cache: PrunedCache | None, state: CacheState) -> Tensor:
        hidden, new_valid = tokens.embeds, tokens.valid
        batch, length = hidden.shape[:2]
        eager = self.text_model.config._attn_implementation == "eager"
        masks: dict[tuple[int, int, int, torch.device], Tensor | None] = {}
        rows: dict[tuple[bool, torch.device], Side] = {}
        chunks: dict[tuple[int, torch.device], LayerPlan] = {}
        new_places = None
        if any(window is not None for window in self.windows):
            new_places = torch.arange(state.num_seen, state.num_seen + length, device=hidden.device).repeat(batch, 1)
        packed = hidden.flatten(0, 1)
        for index, layer in enumerate(self.adapter.layers):
            past, device = state.valid[index], device_of(layer)
            if taps := self.taps[index]:
                if (taps, device) not in chunks:
                    chunks[taps, device] = text_chunk(batch, length, taps, device, new_valid)
                recur = partial(run_recurrent, layer, rows=chunks[taps, device], cache=cache)
                packed = checkpointed(layer, recur, packed.to(device))
                continue
            window, places = self.windows[index], state.places.get(index)
            if window is not None and state.num_seen + length <= window:
                window = None
            key = (state.lengths[index], id(past), -1 if window is None else id(places), device)
            if key not in masks:
                mask = extension_mask(
                    hidden, state.lengths[index], past, new_valid, eager, window, (places, new_places)
                )
                masks[key] = None if mask is None else mask.to(device)
            side = (self.windows[index] is not None and len(tokens.rope) > 2, device)
            if side not in rows:
                cos, sin = (part.to(device)[:, None] for part in tokens.rope[2 if side[0] else 0 :][:2])
                rows[side] = Side(None, None, cos, signed(sin))
            compute = partial(
                extend_layer, layer, rows=rows[side], num_samples=batch, mask=masks[key], cache=cache, parts=self.parts
            )
            packed = checkpointed(layer, compute, packed.to(device))
        made: dict[Any, Any] = {}
        for index in range(len(self.windows)):
            if not self.taps[index]:
                places = None if self.windows[index] is None else new_places
                self._remember(state, index, new_valid, (batch, length), places, made)
        return packed.view(hidden.shape)

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

    def _remember(
        self,
        state: CacheState,
        index: int,
        valid: Tensor | None,
        shape: tuple[int, int],
        places: Tensor | None,
        made: dict[Any, Any],
    ) -> None:
        """Note a layer's new keys; layers with the same ones share a tensor, and with it the masks of later steps.

        ``made``: what was noted so far, beside what it was made of, so that its identity stays its own.
        """
        past, length = state.valid[index], state.lengths[index]
        known = valid if past is None else past
        if known is not None:
            key = (length, id(past), id(valid), shape)
            if key not in made:
                made[key] = append_valid(past, length, valid, *shape, known.device), past, valid
            state.valid[index] = made[key][0]
        state.lengths[index] += shape[1]
        if places is not None:
            before = state.places.get(index)
            if (id(before), id(places)) not in made:
                made[id(before), id(places)] = append_places(before, places), before, places
            state.places[index] = made[id(before), id(places)][0]


def explicit_rankings(rankings: Any) -> list[np.ndarray] | None:
    """Rankings given by the user as arrays; DopError if they are no arrays of token numbers, or there are none."""
    if rankings is None:
        return None
    given = rankings if isinstance(rankings, (Sequence, np.ndarray, Tensor)) else []
    arrays = [ranking.numpy(force=True) if isinstance(ranking, Tensor) else np.asarray(ranking) for ranking in given]
    if not arrays or any(array.ndim != 1 or (len(array) and array.dtype.kind not in "iu") for array in arrays):
        raise DopError(
            "`rankings` must have one entry per sample of the batch, each the numbers of its visual tokens, best "
            f"first, but got {shorten(repr(rankings), 80)}"
        )
    return arrays
