"""What the conformance suite observes from outside: the state of a model, and cache lengths."""

from __future__ import annotations

from typing import Any

from torch import nn


def cache_lengths(cache: Any) -> list[int]:
    """Keys held by each layer of a transformers cache, padding included; 0 where there is a state instead."""
    return [int(layer.keys.shape[-2]) if hasattr(layer, "keys") else 0 for layer in cache.layers]


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
