"""Attention of one layer: rotary tables and masks of a forward, and the call of the model's own backend."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dop_search.models.decoder_checks import is_flash
from dop_search.pruning.cache import append_valid
from dop_search.pruning.plans import AttentionPlan
from dop_search.pruning.sight import append_places, within_window
from dop_search.utils.errors import UnsupportedModelError


class ForwardTables:
    """Rotary embeddings and masks of one forward, arranged once per attention plan instead of once per layer.

    Args:
        cos, sin: ``[num_rows, head_dim]``, one row per row of the layout.
        windowed: the same of layers with a window, where their positions rotate otherwise.
    """

    def __init__(self, cos: Tensor, sin: Tensor, *windowed: Tensor) -> None:
        self.cos, self.sin = cos, signed(sin)
        self.windowed = ForwardTables(*windowed) if windowed else None
        self._rope: dict[int, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] = {}
        self._masks: dict[tuple[int, int, int, bool], tuple[Tensor, Tensor | None]] = {}
        self._alive: list[Tensor | None] = []  # keys above are identities, so what they name must live on
        self._triangles: dict[tuple[int, int], Tensor] = {}
        self._elsewhere: dict[torch.device, ForwardTables] = {}

    def on(self, device: torch.device) -> ForwardTables:
        """The same tables on ``device``, for decoders whose layers are on several."""
        if device == self.cos.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = ForwardTables(*(part.to(device) for part in self._parts))
        return self._elsewhere[device]

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        return (self.cos, signed(self.sin), *(self.windowed._parts if self.windowed else ()))  # signs cancel

    def of_layer(self, window: int | None) -> ForwardTables:
        """The tables of a layer with this window."""
        return self if window is None or self.windowed is None else self.windowed

    def select(self, rows: Tensor) -> ForwardTables:
        """The tables of some of the rows, for another layout."""
        return ForwardTables(*(part.index_select(0, rows) for part in self._parts))

    def rope(self, plan: AttentionPlan) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """``(cos, signed sin)`` for queries and for keys, each ``[num_samples, 1, length, head_dim]``."""
        if id(plan) not in self._rope:
            self._rope[id(plan)] = (
                self._gather(plan.query_rows, plan.query_pad, plan.num_samples),
                self._gather(plan.key_rows, plan.key_pad, plan.num_samples),
            )
        return self._rope[id(plan)]

    def _gather(self, rows: Tensor, pad: Tensor | None, num_samples: int) -> tuple[Tensor, Tensor]:
        index = rows if pad is None else rows[pad]
        shape = (num_samples, 1, len(index) // num_samples, self.cos.shape[-1])
        return self.cos[index].view(shape), self.sin[index].view(shape)

    def mask(
        self, plan: AttentionPlan, past_valid: Tensor | None, additive: bool, past_places: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The full mask ``[num_samples, 1, num_queries, past + num_keys]``.

        Args:
            past_valid: which keys outside the plan are real.
            additive: as numbers to add to the scores instead of booleans.
            past_places: where they stand (``[num_samples, past]``); needed with a window.

        Returns:
            The mask, and for additive masks which queries see no key at all (``[num_samples, num_queries, 1, 1]``).
        """
        key = (id(plan), id(past_valid), id(past_places), additive)
        if key not in self._masks:
            mask, blind = full_mask(plan, past_valid, past_places), None
            if additive:
                blind = ~mask.any(dim=-1).transpose(1, 2)[..., None]
                lowest = torch.finfo(self.cos.dtype).min
                mask = torch.zeros_like(mask, dtype=self.cos.dtype).masked_fill_(~mask, lowest)
            self._masks[key] = mask, blind
            self._alive += [past_valid, past_places]
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


def signed(sin: Tensor) -> Tensor:
    """``sin`` with the sign of the half rotation folded in, see :func:`dop_search.pruning.layer.rotate`."""
    half = sin.shape[-1] // 2
    return torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)


def backend(attention: Any, masked: bool) -> tuple[str, Any, dict[str, Any]]:
    """Name, function and constant arguments of the attention backend that the model was loaded with.

    ``masked``: for a call with a mask (padding inside a batch), for which ``sdpa`` stands in where the backend takes
    none.
    """
    implementation: str = attention.config._attn_implementation
    eager: Any = getattr(sys.modules[type(attention).forward.__module__], "eager_attention_forward", None)
    if eager is None and implementation == "eager":
        raise UnsupportedModelError(
            f"{type(attention).__name__} has no `eager_attention_forward` beside it; load the model with "
            "attn_implementation='sdpa'"
        )
    kwargs = {"dropout": attention.attention_dropout if attention.training else 0.0, "scaling": attention.scaling}
    if masked and is_flash(implementation):
        implementation = "sdpa"
    return implementation, ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager), kwargs


def attend_text(attention: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of a text chunk over a layer's whole cache; ``mask`` as :func:`extension_mask` made it."""
    _, function, kwargs = backend(attention, mask is not None)
    context: Tensor = function(attention, query, key, value, mask, **kwargs)[0]
    return context


def attend(
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    tables: ForwardTables,
    past_valid: Tensor | None,
    past_places: Tensor | None = None,
) -> Tensor:
    """Attention by the model's own backend: ``[num_samples, num_queries, heads, head_dim]``.

    A mask is made only where plain causal attention would be wrong; ``eager`` always gets an additive one.
    """
    if not query.shape[2] or not key.shape[2]:  # in a chunk of visual tokens nobody may ask, or nobody may answer
        return query.new_zeros(query.shape).transpose(1, 2)
    segments = None if past_valid is not None else plan.segments
    implementation, function, kwargs = backend(attention, segments is None)
    if implementation == "eager":
        mask, blind = tables.mask(plan, past_valid, True, past_places)
        assert blind is not None
        context: Tensor = function(attention, query, key, value, mask, **kwargs)[0]
        return context.masked_fill(blind, 0.0)  # a query without any key receives nothing
    if segments is None:
        mask, _ = tables.mask(plan, past_valid, False, past_places)
        context = function(attention, query, key, value, mask, is_causal=False, **kwargs)[0]
        return context
    flash = is_flash(implementation)
    outputs = []
    for segment in segments:
        part = query[:, :, segment.start : segment.stop]
        seen_keys, seen_values = key[:, :, : segment.num_keys], value[:, :, : segment.num_keys]
        if not flash and 1 < part.shape[2] < segment.num_keys and part.device.type == "cuda":
            outputs.append(lower_right(part, seen_keys, seen_values, kwargs))
            continue
        triangle = None if flash else tables.triangle(part.shape[2], segment.num_keys)
        causal = triangle is None
        outputs.append(function(attention, part, seen_keys, seen_values, triangle, is_causal=causal, **kwargs)[0])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def lower_right(query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Fewer queries than keys, causal from the bottom right: the fused kernels know this shape, so no mask is made.

    Args:
        query, key, value: ``[num_samples, heads or kv_heads, length, head_dim]``.
        kwargs: ``dropout`` and ``scaling``.

    Returns:
        ``[num_samples, num_queries, heads, head_dim]``.
    """
    repeats = query.shape[1] // key.shape[1]
    context = scaled_dot_product_attention(
        query,
        repeat_kv(key, repeats),
        repeat_kv(value, repeats),
        attn_mask=causal_lower_right(query.shape[2], key.shape[2]),
        dropout_p=kwargs["dropout"],
        scale=kwargs["scaling"],
    )
    return context.transpose(1, 2)


def full_mask(plan: AttentionPlan, past_valid: Tensor | None, past_places: Tensor | None = None) -> Tensor:
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
        past = past_valid.to(mask.device)[:, None, None, :].expand(-1, 1, plan.num_queries, -1)
        if plan.window is not None and plan.query_places is not None and past_places is not None:
            past = past & within_window(plan.query_places, past_places.to(mask.device), plan.window)[:, None]
        mask = torch.cat([past, mask], dim=-1)
    return mask


def extension_mask(
    hidden: Tensor,
    past_length: int,
    past_valid: Tensor | None,
    new_valid: Tensor | None,
    eager: bool,
    window: int | None = None,
    places: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor | None:
    """Mask of a text chunk over one layer's cache: all real past keys, causal within the chunk.

    Args:
        hidden: ``[batch, length, hidden_size]``.
        past_length: keys in the cache.
        past_valid, new_valid: which of them, and of the chunk, are real; ``None``: all.
        eager: for the backend that adds it to the scores.
        window: how far back a token sees; ``None``, also where nothing is further back: everything.
        places: where the keys in the cache, and the tokens of the chunk, stand, each ``[batch, keys]``.

    Returns:
        ``[batch, 1, length, past + length]``, additive for ``eager`` and boolean otherwise; ``None`` where the
        backend needs none.
    """
    batch, length = hidden.shape[:2]
    if past_valid is None and new_valid is None and not eager and (length == 1 or past_length == 0) and window is None:
        return None
    causal = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
    mask = torch.cat([causal.new_ones(length, past_length), causal], dim=1).expand(batch, 1, -1, -1)
    if past_valid is not None or new_valid is not None:
        keys = append_valid(past_valid, past_length, new_valid, batch, length, hidden.device)
        mask = mask & keys[:, None, None, :]
    past_places, new_places = places
    if window is not None and new_places is not None:
        mask = mask & within_window(new_places, append_places(past_places, new_places), window)[:, None]
    if not eager:
        return mask
    return torch.zeros_like(mask, dtype=hidden.dtype).masked_fill_(~mask, torch.finfo(hidden.dtype).min)
