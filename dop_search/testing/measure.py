"""What the conformance suite observes from outside: counted FLOPs, cache lengths, and the state of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from dop_search.models.fast_linear import available as fast_linear_available

Flops = int


def count_decoder_flops(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Flops:
    """Count the FLOPs (1 MAC = 2 FLOPs) of all decoder layers in one prefill, by dispatched operators.

    Everything that runs inside ``model.model.language_model`` counts except its rotary embedding: vision tower,
    projector and ``lm_head`` run outside of it. Causality is not discounted. The counter knows no price for SDPA on
    the CPU (it would say 0), so the model must use ``eager`` attention.

    Raises:
        ValueError: if the model does not use eager attention, or nothing was counted.
    """
    backend = model.config.get_text_config()._attn_implementation
    if backend != "eager":
        raise ValueError(f"`attn_implementation` must be 'eager' to count FLOPs, but got {backend!r}")
    prices = {torch.ops.mkldnn._linear_pointwise: _linear_flops} if fast_linear_available() else {}
    with FlopCounterMode(display=False, custom_mapping=prices) as counter, torch.no_grad():
        model(**inputs)
    by_module = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    decoder = f"{type(model).__name__}.model.language_model"
    if not by_module.get(decoder):
        raise ValueError(f"nothing was counted under {decoder!r}; counted modules: {sorted(by_module)}")
    return int(by_module[decoder] - by_module.get(f"{decoder}.rotary_emb", 0))


def _linear_flops(rows: torch.Size, weight: torch.Size, *others: Any, **kwargs: Any) -> Flops:
    """A linear layer that runs through oneDNN, see ``fast_linear``; arguments are shapes."""
    return 2 * rows.numel() * weight[0]


def cache_lengths(cache: Any) -> list[int]:
    """Keys held by each layer of a transformers cache, padding included."""
    return [int(layer.keys.shape[-2]) for layer in cache.layers]


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a transformers cache holds."""
    return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in cache.layers)


_DATA_ATTRIBUTES = {"rope_deltas"}
"""Attributes that transformers itself writes in ``forward``: their names are compared, their values are not."""


def model_state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that patching could change, in a form that ``==`` compares.

    Per module: its class, the names of its instance attributes, the identity of attributes and parameters, and the
    identity of every hook in order. Plus the configuration and the flags of the parameters.
    """
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[name] = (type(module), id(module))
        for key, value in vars(module).items():
            if isinstance(value, dict):
                state[f"{name}:{key}"] = [(item, id(entry)) for item, entry in value.items()]
            elif key not in _DATA_ATTRIBUTES:
                state[f"{name}:{key}"] = value if isinstance(value, (bool, int, float, str)) else id(value)
            else:
                state[f"{name}:{key}"] = "present"
    config = getattr(model, "config", None)
    if config is not None:
        state["config"] = config.to_dict()
        state["attention"] = [config._attn_implementation, config.get_text_config()._attn_implementation]
    state["parameters"] = [(name, p.requires_grad, p.data_ptr(), p.shape) for name, p in model.named_parameters()]
    return state


def state_difference(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The keys of :func:`model_state` that differ: ``module path:attribute``."""
    missing = object()
    return [key for key in {**before, **after} if before.get(key, missing) != after.get(key, missing)]
