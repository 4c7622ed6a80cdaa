"""FLOPs as a counter sees them, to hold the closed form to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.integrations import moe as moe  # registers the operator that stands in for torch's on old devices

from dop_search.models import adapter_for
from dop_search.models.fast_linear import available as fast_linear_available

Flops = int


def count_decoder_flops(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Flops:
    """Count the FLOPs (1 MAC = 2 FLOPs) of all decoder layers in one prefill, by dispatched operators.

    Everything that runs inside the decoder module counts except its rotary embedding and short convolutions: vision
    tower, projector and ``lm_head`` run outside of it. Causality is not discounted. The counter knows no price for SDPA
    on the CPU (it would say 0), so the model must use ``eager`` attention. Recurrences run token by token, as they are
    priced: their kernels work in chunks, and multiply more.

    Raises:
        ValueError: if the model does not use eager attention, or nothing was counted.
    """
    backend = model.config.get_text_config()._attn_implementation
    if backend != "eager":
        raise ValueError(f"`attn_implementation` must be 'eager' to count FLOPs, but got {backend!r}")
    prices: dict[Any, Any] = {torch.ops.aten.convolution: lambda *shapes, **kwargs: 0}
    prices |= {torch.ops.aten._grouped_mm: _expert_flops, torch.ops.transformers.grouped_mm_fallback: _expert_flops}
    if fast_linear_available():
        prices[torch.ops.mkldnn._linear_pointwise] = _linear_flops
    with _token_by_token(model), FlopCounterMode(display=False, custom_mapping=prices) as counter, torch.no_grad():
        model(**inputs)
    by_module = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    text_model = adapter_for(model).text_model
    where = next(name for name, module in model.named_modules() if module is text_model)
    decoder = f"{type(model).__name__}.{where}"
    if not by_module.get(decoder):
        raise ValueError(f"nothing was counted under {decoder!r}; counted modules: {sorted(by_module)}")
    return int(by_module[decoder] - by_module.get(f"{decoder}.rotary_emb", 0))


def _linear_flops(rows: torch.Size, weight: torch.Size, *others: Any, **kwargs: Any) -> Flops:
    """A linear layer that runs through oneDNN, see ``fast_linear``; arguments are shapes."""
    return 2 * rows.numel() * weight[0]


def _expert_flops(rows: torch.Size, weight: torch.Size, *others: Any, **kwargs: Any) -> Flops:
    """Rows in groups, each through the weight ``[experts, in, out]`` of its expert; arguments are shapes."""
    return 2 * rows.numel() * weight[-1]


@contextmanager
def _token_by_token(model: PreTrainedModel) -> Iterator[None]:
    """Gated delta nets without chunks, within the context."""
    files: set[Any] = {
        sys.modules[type(layer.linear_attn).__module__] for layer in model.modules() if hasattr(layer, "linear_attn")
    }
    chunked = {file: file.torch_chunk_gated_delta_rule for file in files}
    try:
        for file in files:
            file.torch_chunk_gated_delta_rule = _delta_rule
        yield
    finally:
        for file, rule in chunked.items():
            file.torch_chunk_gated_delta_rule = rule


def _delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """As transformers' function of that name, one token after the other (arXiv 2412.06464, eq. 10)."""
    repeats = value.shape[2] // key.shape[2]
    query, key = (normalize(part, dim=-1).repeat_interleave(repeats, dim=2)[..., None, :] for part in (query, key))
    state = key.new_zeros(len(key), *key.shape[2:3], key.shape[-1], value.shape[-1])
    state, answers = state if initial_state is None else initial_state, []
    for token in range(key.shape[1]):
        state = state * g[:, token, :, None, None].exp()
        change = (value[:, token, :, None] - key[:, token] @ state) * beta[:, token, :, None, None]
        state = state + key[:, token].transpose(-1, -2) @ change
        answers.append((query[:, token] @ state)[:, :, 0] / key.shape[-1] ** 0.5)
    return torch.stack(answers, dim=1), state
