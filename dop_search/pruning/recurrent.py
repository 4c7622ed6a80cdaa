"""Layers that carry a state from token to token on packed rows: gated delta nets (arXiv 2412.06464), and LFM2's short
convolutions (arXiv 2511.23404).

The state of a sample is what a short convolution remembers (the features of the last tokens) and, of a gated delta
net, a matrix per head. A token's ``kv`` is its update of both, its ``q`` what it reads: the output of the layer. A
token with neither is as if it were not there; one without ``kv`` reads a state that it leaves as it was. All that
others see of a token is its ``kv``, as in attention, so that the same operations are dead.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from dop_search.models.layer_names import is_recurrent, mixer_of
from dop_search.pruning.plans import LayerPlan, RecurrentPlan

State = tuple[Tensor, Tensor]
"""What a layer knows of each sample: last features of the convolution ``[batch, features, taps]``, and matrices
``[batch, heads, key width, value width]``, or ``[batch, 0]`` where there are none."""


def taps_of(layer: Any) -> int:
    """How many tokens the convolution of a recurrent layer sees; 0: the layer attends."""
    return int(mixer_of(layer).conv_kernel_size) if is_recurrent(layer) else 0


def plan_recurrence(
    sample: np.ndarray,
    updates: np.ndarray,
    reads: np.ndarray,
    num_samples: int,
    taps: int,
    device: torch.device,
    place: np.ndarray | None = None,
    length: int = 0,
) -> RecurrentPlan:
    """Arrange rows that update a state, read it, or both.

    Args:
        sample: of each row; rows are ordered by sample, and within it as the tokens are.
        updates, reads: boolean, per row.
        taps: see :func:`taps_of`.
        device: of the index tensors.
        place, length: where rows stand in ``[num_samples, length]``; by default one after the other from the left.
    """
    counts, rows = np.bincount(sample, minlength=num_samples), np.arange(len(sample))
    if place is None:
        length = int(counts.max(initial=0))
        place = sample * length + rows - np.repeat(np.cumsum(counts) - counts, counts)
    even = len(rows) == num_samples * length
    known = num_samples * taps  # rows of the state, in front of the new ones
    updating = np.append(np.flatnonzero(updates), 0) + known
    total = np.append(0, np.cumsum(updates))  # updates before each row
    first = total[np.append(0, np.cumsum(counts))]  # updates before each sample

    def earlier(its: np.ndarray, end: np.ndarray, back: int) -> np.ndarray:
        """Row of the update that is ``back`` before the update number ``end`` of the samples ``its``."""
        number = end - back
        return np.where(number >= first[its], updating[number.clip(0)], (its + 1) * taps + number - first[its])

    window = [earlier(sample, total[:-1], back) for back in range(taps - 1, 0, -1)]
    every = np.arange(num_samples)
    tail = np.stack([earlier(every, first[1:], back) for back in range(taps, 0, -1)], axis=1)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return RecurrentPlan(
        num_samples=num_samples,
        length=length if len(rows) else 0,
        place=None if even else tensor(place),
        window=tensor(np.stack([*window, rows + known])),
        tail=tensor(tail.ravel()),
        updates=None if updates.all() else tensor(updates),
        reads=None if even and reads.all() else tensor(place[reads]),
    )


@functools.lru_cache(maxsize=64)
def even_chunk(num_samples: int, length: int, taps: int, device: torch.device, inference: bool) -> LayerPlan:
    """A chunk of text without pads; ``inference``: the mode, whose tensors cannot be trained through."""
    every = np.ones(num_samples * length, dtype=np.bool_)
    plan = plan_recurrence(np.repeat(np.arange(num_samples), length), every, every, num_samples, taps, device)
    return LayerPlan(None, None, None, None, None, plan)


def text_chunk(num_samples: int, length: int, taps: int, device: torch.device, valid: Tensor | None) -> LayerPlan:
    """A chunk of text, in which every token (``valid``: that is real, ``[num_samples, length]``) does everything."""
    if valid is None:
        return even_chunk(num_samples, length, taps, device, torch.is_inference_mode_enabled())
    place = np.flatnonzero(valid.cpu().numpy())
    every = np.ones(len(place), dtype=np.bool_)
    plan = plan_recurrence(place // length, every, every, num_samples, taps, device, place, length)
    index = torch.from_numpy(place).to(device)
    return LayerPlan(None, index, index, None, None, plan)


def mix(
    mixer: Any, normed: Tensor, rows: LayerPlan, plan: RecurrentPlan, past: State | None
) -> tuple[Tensor, State | None]:
    """Update the state and read it.

    Args:
        mixer: the layer's gated delta net or short convolution.
        normed: ``[rows, hidden_size]``.
        rows: ``key``: those that take part, ``query``: those that read.
        plan: their arrangement.
        past: what came before; ``None``: nothing.

    Returns:
        The output of the rows that read, ``[num_reads, hidden_size]``, and the state after them.
    """
    if not plan.length:
        return normed.new_zeros(0, normed.shape[1]), past
    inside = normed if rows.key is None else normed.index_select(0, rows.key)
    context, state = (_short_convolution if hasattr(mixer, "in_proj") else _delta_net)(mixer, inside, plan, past)
    context = context.flatten(0, 1)
    context = context if plan.reads is None else context.index_select(0, plan.reads)
    if hasattr(mixer, "in_proj_z"):
        asking = normed if rows.query is None else normed.index_select(0, rows.query)
        context = mixer.norm(context, mixer.in_proj_z(asking).unflatten(-1, (-1, mixer.head_v_dim)))
    return mixer.out_proj(context.flatten(1)), state


def _convolve(features: Tensor, convolution: Any, plan: RecurrentPlan, past: State | None) -> tuple[Tensor, Tensor]:
    """Of each row with those before it (float32, ``[rows, features]``), and what is remembered of the last ones."""
    known = features.new_zeros(plan.num_samples, features.shape[1], plan.num_taps) if past is None else past[0]
    every = torch.cat([known.to(features.dtype).transpose(1, 2).flatten(0, 1), features])
    weight = convolution.weight[:, 0].float()
    convolved = sum(every.index_select(0, tap).float() * weight[:, i] for i, tap in enumerate(plan.window))
    assert isinstance(convolved, Tensor)
    if convolution.bias is not None:
        convolved = convolved + convolution.bias
    remembered = every.index_select(0, plan.tail).unflatten(0, (plan.num_samples, plan.num_taps)).transpose(1, 2)
    return convolved, remembered


def _short_convolution(mixer: Any, inside: Tensor, plan: RecurrentPlan, past: State | None) -> tuple[Tensor, State]:
    """LFM2's: gated before and after; a state without matrices. ``[num_samples, length, hidden_size]``."""
    before, after, features = mixer.in_proj(inside).chunk(3, dim=-1)
    convolved, remembered = _convolve(before * features, mixer.conv, plan, past)
    context = plan.arranged(after * convolved.to(after.dtype))
    return context, (remembered, remembered.new_zeros(plan.num_samples, 0))


def _delta_net(mixer: Any, inside: Tensor, plan: RecurrentPlan, past: State | None) -> tuple[Tensor, State]:
    """What the heads read, ``[num_samples, length, heads, value width]``, and the state after it."""
    features = mixer.in_proj_qkv(inside)
    convolved, remembered = _convolve(features, mixer.conv1d, plan, past)
    convolved = torch.nn.functional.silu(convolved).to(features.dtype)
    strength = mixer.in_proj_b(inside).sigmoid()
    decay = -mixer.A_log.float().exp() * softplus(mixer.in_proj_a(inside).float() + mixer.dt_bias)
    if plan.updates is not None:  # the others change nothing: no decay, no strength
        strength, decay = strength * plan.updates[:, None], decay * plan.updates[:, None]
    query, key, value = convolved.split([mixer.key_dim, mixer.key_dim, mixer.value_dim], dim=-1)
    keys, values = (-1, mixer.head_k_dim), (-1, mixer.head_v_dim)
    rule = "torch_recurrent_gated_delta_rule" if plan.length == 1 else "torch_chunk_gated_delta_rule"
    context, state = getattr(sys.modules[type(mixer).forward.__module__], rule)(
        plan.arranged(query.unflatten(-1, keys)),
        plan.arranged(key.unflatten(-1, keys)),
        plan.arranged(value.unflatten(-1, values)),
        g=plan.arranged(decay),
        beta=plan.arranged(strength),
        initial_state=None if past is None else past[1],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    return context, (remembered, state)
