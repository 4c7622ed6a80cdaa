"""One decoder layer on packed rows: gather, project, attend, scatter. A skipped operation is never computed.

The layer is cut where state comes in: ``project`` (up to rotated queries and keys), then the cache and the attention,
then ``finish`` (output projection to MLP). ``project`` and ``finish`` are pure functions of tensors, which is what
``torch.compile`` needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from torch.nn.modules import module as modules

from dop_search.models.decoder_checks import PLAIN_RMS_NORMS
from dop_search.models.layer_names import mixer_of, names_of
from dop_search.pruning.attention import ForwardTables, attend, attend_text
from dop_search.pruning.layout import Layout
from dop_search.pruning.plans import LayerPlan
from dop_search.pruning.recurrent import State, mix, taps_of
from dop_search.pruning.sight import window_of
from dop_search.strategy.steps import Groups, LayerStep

MAX_COMPILED_VARIANTS = 32
"""Per compiled function: it is compiled anew for which of its index sets are given, not for their sizes."""


class KeyValueStore(Protocol):
    """What a layer hands its new keys and values, or its state, to: a cache, or a fixed prefix."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Add this layer's keys and values; returns all that its queries may see."""

    def state_of(self, layer_idx: int) -> State | None:
        """The state of a recurrent layer; ``None``: it has seen nothing."""

    def keep_state(self, layer_idx: int, state: State) -> None:
        """Take the state of a recurrent layer after what it was just given."""


def device_of(layer: Any) -> torch.device:
    """Where a decoder layer computes."""
    device: torch.device = getattr(layer, names_of(layer).norm).weight.device
    return device


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor, in_pairs: bool = False) -> Tensor:
    """Rotary position embedding of the first features if ``cos`` is for fewer than there are.

    In the half-rotation convention of the Llama family, in which ``cos`` and ``signed_sin`` always are; ``in_pairs``:
    the features that rotate together are neighbours.
    """
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat([rotate(x[..., :width], cos, signed_sin, in_pairs), x[..., width:]], dim=-1)
    half = width // 2
    if in_pairs:
        halves = rotate(x.unflatten(-1, (half, 2)).transpose(-1, -2).flatten(-2), cos, signed_sin)
        return halves.unflatten(-1, (2, half)).transpose(-1, -2).flatten(-2)
    if torch.compiler.is_compiling():  # a roll is fused with what is around it, a cat is two kernels more
        turned = torch.roll(x, half, dims=-1)
    else:
        turned = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return torch.addcmul(x * cos, turned, signed_sin)


def normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a norm of the model, fused where it is a plain RMS norm that nobody has hooked or changed."""
    if type(norm).__name__ not in PLAIN_RMS_NORMS or is_touched(norm):
        result: Tensor = norm(x)
        return result
    weight: Tensor = norm.weight  # type: ignore[assignment]
    return rms_norm(x, (x.shape[-1],), weight, norm.variance_epsilon)  # type: ignore[arg-type]


def is_touched(module: nn.Module) -> bool:
    """Whether calling the module is more than its class's forward: hooks, its own or global, or another forward."""
    return bool(
        ("forward" in module.__dict__ and "_hf_hook" not in module.__dict__)  # accelerate's only moves tensors
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or modules._global_forward_hooks
        or modules._global_forward_pre_hooks
        or modules._global_backward_hooks
        or modules._global_backward_pre_hooks
    )


def project_heads(projection: nn.Module, norm: nn.Module | None, rows: Tensor, head_dim: int) -> Tensor:
    """Project rows to heads: ``[num_rows, num_heads, head_dim]``, normalised per head where the model does so."""
    heads: Tensor = projection(rows).unflatten(-1, (-1, head_dim))
    return heads if norm is None else normalize(norm, heads)


def arrange(heads: Tensor, pad: Tensor | None, num_samples: int) -> Tensor:
    """``[rows, heads, head_dim]`` to ``[num_samples, heads, length, head_dim]``."""
    if pad is not None:
        heads = heads.index_select(0, pad)
    return heads.unflatten(0, (num_samples, heads.shape[0] // num_samples)).transpose(1, 2)


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
    parts: LayerParts | None = None,
    past_places: Tensor | None = None,
) -> Tensor:
    """Run one decoder layer of the Llama family, or a recurrent one, on packed rows.

    Args:
        layer: decoder layer with ``input_layernorm``, ``self_attn``, ``post_attention_layernorm`` and ``mlp``.
        hidden: ``[rows of (text + before), hidden_size]``.
        before: groups whose rows ``hidden`` holds.
        step: what this layer does; rows of groups outside ``step.alive`` leave the sequence.
        tables: rotary embeddings and masks of this forward.
        cache: receives this layer's keys and values, ``[num_samples, kv_heads, length, head_dim]``.
        past_valid: ``[num_samples, past]``, which cached keys are real; ``None`` without a past.
        read_only: queries and MLP only for rows whose logits are read (the last layer of a scoring pass).
        parts: compiled stand-ins of :func:`project` and :func:`finish`.
        past_places: ``[num_samples, past]``, where cached keys stand; only for a layer with a window.

    Returns:
        ``[rows of (text + step.alive), hidden_size]``.
    """
    parts = parts or EAGER_PARTS
    device = device_of(layer)
    window = window_of(layer)
    hidden, layout, tables = hidden.to(device), layout.on(device), tables.on(device).of_layer(window)
    rows = layout.layer(before, step, read_only, window, taps_of(layer))
    plan = rows.attention
    if rows.keep is not None:
        hidden = hidden.index_select(0, rows.keep)
    if plan is None:
        return run_recurrent(layer, hidden, rows, cache)
    (cos_q, sin_q), (cos_k, sin_k) = tables.rope(plan)
    queries = Side(rows.query, plan.query_pad, cos_q, sin_q)
    keys = Side(rows.key, plan.key_pad, cos_k, sin_k)
    query, key, value, gate = parts.project(layer, hidden, queries, keys, plan.num_samples)
    if cache is not None:
        key, value = cache.update(key, value, layer.self_attn.layer_idx)
    context = attend(layer.self_attn, query, key, value, plan, tables, past_valid, past_places)
    del query, key, value  # the MLP needs the room
    return parts.finish(layer, hidden, context, plan.query_unpad, rows.query, rows.mlp, gate)


def run_recurrent(layer: Any, hidden: Tensor, rows: LayerPlan, cache: KeyValueStore | None) -> Tensor:
    """Run a recurrent layer on packed rows, or on all of a chunk of text: ``[rows, hidden_size]``."""
    assert rows.recurrent is not None
    mixer = mixer_of(layer)
    past = None if cache is None else cache.state_of(mixer.layer_idx)
    attended, state = mix(mixer, normalize(getattr(layer, names_of(layer).norm), hidden), rows, rows.recurrent, past)
    if cache is not None and state is not None:
        cache.keep_state(mixer.layer_idx, state)
    return feed_forward(layer, hidden, attended, rows.query, rows.mlp)


def extend_layer(
    layer: Any,
    hidden: Tensor,
    rows: Side,
    num_samples: int,
    mask: Tensor | None,
    cache: KeyValueStore | None,
    parts: LayerParts,
) -> Tensor:
    """Run one decoder layer on a chunk of text over the layer's cache, whatever that holds.

    Args:
        hidden: ``[num_samples * length, hidden_size]``, padding included.
        mask: see :func:`dop_search.pruning.attention.extension_mask`.

    Returns:
        Hidden states of the same shape.
    """
    query, key, value, gate = parts.project(layer, hidden, rows, rows, num_samples)
    if cache is not None:
        key, value = cache.update(key, value, layer.self_attn.layer_idx)
    context = attend_text(layer.self_attn, query, key, value, mask)
    return parts.finish(layer, hidden, context, None, None, None, gate)


def is_checkpointed(layer: Any) -> bool:
    """Whether transformers would compute the layer again in the backward pass instead of keeping what is in it."""
    return bool(getattr(layer, "gradient_checkpointing", False)) and layer.training


def checkpointed(layer: Any, compute: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """``compute(hidden)``, under the layer's gradient checkpointing where that is on."""
    if not is_checkpointed(layer):
        return compute(hidden)
    result: Tensor = layer._gradient_checkpointing_func(compute, hidden)
    return result


class Side(NamedTuple):
    """One side of an attention call.

    Attributes:
        rows: rows of the hidden states that take part (``None``: all).
        pad: row of each padded place (``None``: no padding).
        cos, sin: rotary embedding, ``[num_samples or 1, 1, length, head_dim]``; ``sin`` is signed.
    """

    rows: Tensor | None
    pad: Tensor | None
    cos: Tensor
    sin: Tensor


def project(
    layer: Any, hidden: Tensor, queries: Side, keys: Side, num_samples: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Norm, projections and rotation: query, key and value, each ``[num_samples, heads, length, head_dim]``.

    Where the query projection is twice as wide as the heads, its other half is a gate of what they receive: it comes
    last, ``[queries, heads * head_dim]``.
    """
    attention = layer.self_attn
    head_dim = attention.head_dim
    names = names_of(layer)
    query_norm, key_norm = (getattr(attention, name, None) for name in names.head_norms)
    normed = normalize(getattr(layer, names.norm), hidden)
    queries_in = normed if queries.rows is None else normed.index_select(0, queries.rows)
    keys_in = normed if keys.rows is None else normed.index_select(0, keys.rows)
    key = attention.k_proj(keys_in).unflatten(-1, (-1, head_dim))
    value = key if attention.v_proj is None else attention.v_proj(keys_in).unflatten(-1, (-1, head_dim))
    if "v_norm" in attention._modules:
        value = attention.v_norm(value)
    key = key if key_norm is None else normalize(key_norm, key)
    query, gate = attention.q_proj(queries_in), None
    if query.shape[-1] == 2 * key.shape[-2] * attention.num_key_value_groups * head_dim:
        query, gate = (part.flatten(1) for part in query.unflatten(-1, (-1, 2, head_dim)).unbind(dim=-2))
    query = query.unflatten(-1, (-1, head_dim))
    query = arrange(query if query_norm is None else normalize(query_norm, query), queries.pad, num_samples)
    return (
        rotate(query, queries.cos, queries.sin, names.in_pairs),
        rotate(arrange(key, keys.pad, num_samples), keys.cos, keys.sin, names.in_pairs),
        arrange(value, keys.pad, num_samples),
        gate,
    )


def finish(
    layer: Any,
    hidden: Tensor,
    context: Tensor,
    unpad: Tensor | None,
    query_rows: Tensor | None,
    mlp_rows: Tensor | None,
    gate: Tensor | None = None,
) -> Tensor:
    """Output projection, residual and MLP: the hidden states after the layer, ``[rows, hidden_size]``.

    Args:
        context: what the queries received, ``[num_samples, num_queries, heads, head_dim]``.
        unpad: padded place of each query (``None``: no padding).
        query_rows, mlp_rows: rows that issued a query, and that go through the MLP (``None``: all).
        gate: of what the queries received, before its sigmoid.
    """
    context = context.flatten(2).flatten(0, 1)
    if unpad is not None:
        context = context.index_select(0, unpad)
    if gate is not None:
        context = context * gate.sigmoid()
    output = getattr(layer.self_attn, names_of(layer).output)
    return feed_forward(layer, hidden, output(context), query_rows, mlp_rows)


def feed_forward(
    layer: Any, hidden: Tensor, attended: Tensor, query_rows: Tensor | None, mlp_rows: Tensor | None
) -> Tensor:
    """Residual and MLP after what the queries have received; arguments as in :func:`finish`."""
    names = names_of(layer)
    if names.attended_norm is not None:
        attended = normalize(getattr(layer, names.attended_norm), attended)
    hidden = add_rows(hidden, query_rows, attended)
    mlp_in = hidden if mlp_rows is None else hidden.index_select(0, mlp_rows)
    update = run_mlp(getattr(layer, names.mlp), normalize(getattr(layer, names.mlp_norm), mlp_in))
    if "router" in layer._modules:
        update = layer.post_feedforward_layernorm_1(update) + run_experts(layer, mlp_in)
    if names.update_norm is not None:
        update = normalize(getattr(layer, names.update_norm), update)
    hidden = add_rows(hidden, mlp_rows, update)
    return hidden * layer.layer_scalar if "layer_scalar" in layer._buffers else hidden


def run_mlp(mlp: Any, rows: Tensor) -> Tensor:
    """The MLP on ``[rows, hidden_size]``; blocks of experts ask for a batch axis."""
    result: Tensor = mlp(rows[None])[0] if hasattr(mlp, "experts") else mlp(rows)
    return result


def run_experts(layer: Any, rows: Tensor) -> Tensor:
    """Gemma 4's experts beside its MLP, with a router and norms of their own, on what enters both."""
    _, weights, chosen = layer.router(rows)
    update: Tensor = layer.experts(layer.pre_feedforward_layernorm_2(rows), chosen, weights)
    return layer.post_feedforward_layernorm_2(update)  # type: ignore[no-any-return]


def add_rows(hidden: Tensor, index: Tensor | None, update: Tensor) -> Tensor:
    """Add ``update`` to the rows at ``index`` (all rows when ``None``); under autocast it has another dtype."""
    return hidden + update if index is None else hidden.index_add(0, index, update.to(hidden.dtype))


@dataclass(frozen=True)
class LayerParts:
    """The two pure parts of a layer, as they are or compiled."""

    project: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]] = project
    finish: Callable[..., Tensor] = finish


EAGER_PARTS = LayerParts()


def parts_for(compile: bool | str) -> LayerParts:
    """Both parts as they are, or through ``torch.compile`` (by a named backend): one set of kernels for all layers,
    dynamic in the number of rows."""
    if not compile:
        return EAGER_PARTS
    backend = compile if isinstance(compile, str) else "inductor"
    options: dict[str, Any] = {"dynamic": True, "backend": backend, "recompile_limit": MAX_COMPILED_VARIANTS}
    return LayerParts(torch.compile(project, **options), torch.compile(finish, **options))
