"""Recurrent layers by the equations of their papers, token by token: their part of the masked reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def recurrence_hook(reads: Tensor, updates: Tensor) -> Callable[..., Tensor]:
    """What ``reads`` get from a recurrence that sees the tokens ``updates`` (both ``[batch, position]``)."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        result = torch.zeros_like(output)
        for sample, (reading, updating) in enumerate(zip(reads.tolist(), updates.tolist(), strict=True)):
            is_short = hasattr(module, "conv")
            taps = (module.conv if is_short else module.conv1d).weight[:, 0]  # [features, taps]
            seen = [torch.zeros_like(taps[:, 0])] * (taps.shape[1] - 1)
            shape = (0,) if is_short else (module.num_v_heads, module.head_k_dim, module.head_v_dim)
            state, step = hidden.new_zeros(shape), convolution_step if is_short else delta_step
            for place, (asks, learns) in enumerate(zip(reading, updating, strict=True)):
                if asks or learns:
                    answer, seen, state = step(module, hidden[sample, place], seen, state, learns)
                    result[sample, place] = answer if asks else 0.0
        return result

    return hook


def convolution_step(
    module: Any, token: Tensor, seen: list[Tensor], state: Tensor, learns: bool = True
) -> tuple[Tensor, list[Tensor], Tensor]:
    """As :func:`delta_step`, of LFM2's short convolution (arXiv 2511.23404, section 2): ``o = W (C * conv(B * x))``,
    whose state is what it looks back to."""
    before, after, features = module.in_proj(token).chunk(3)
    window = [*seen, before * features]
    mixed = sum(module.conv.weight[:, 0, i] * part for i, part in enumerate(window))
    if module.conv.bias is not None:
        mixed = mixed + module.conv.bias
    return module.out_proj(after * mixed), window[1:] if learns else seen, state


def delta_step(
    module: Any, token: Tensor, seen: list[Tensor], state: Tensor, learns: bool = True
) -> tuple[Tensor, list[Tensor], Tensor]:
    """One token of a gated delta net: its output, and what it leaves if it ``learns``, by the equations of the paper
    (arXiv 2412.06464, eq. 10): ``S' = S exp(g)``, ``S' += k (v - k S')^T beta``, ``o = q S'``.

    Args:
        module: the layer's gated delta net.
        token: ``[hidden_size]``, normed.
        seen: features of the tokens before it, as many as the convolution looks back.
        state: ``[heads, key width, value width]``.
        learns: otherwise it reads the state that others have left.
    """
    features = module.in_proj_qkv(token)
    taps = module.conv1d.weight[:, 0]
    mixed = nn.functional.silu(sum(taps[:, i] * part for i, part in enumerate([*seen, features])))
    query, key, value = mixed.split([module.key_dim, module.key_dim, module.value_dim])
    repeats = module.num_v_heads // module.num_k_heads
    query, key = (
        (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(repeats, dim=0)
        for part in (query.view(module.num_k_heads, -1), key.view(module.num_k_heads, -1))
    )
    if learns:
        decay = torch.exp(-module.A_log.exp() * nn.functional.softplus(module.in_proj_a(token) + module.dt_bias))
        state = state * decay[:, None, None]
        known = (key[:, None] @ state)[:, 0]
        change = (value.view(module.num_v_heads, -1) - known) * module.in_proj_b(token).sigmoid()[:, None]
        state, seen = state + key[:, :, None] @ change[:, None], [*seen[1:], features]
    answer = (query[:, None] @ state)[:, 0] / module.head_k_dim**0.5
    gate = module.in_proj_z(token).view(module.num_v_heads, -1)
    return module.out_proj(module.norm(answer, gate).flatten()), seen, state
