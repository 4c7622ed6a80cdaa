"""Short names of a loaded model's content: caches are kept under them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from dop_search.models.families import adapter_for
from dop_search.models.quantization import stored

_NUM_VALUES = 64
"""Values of each tensor that the fingerprint reads."""

_PASSING = frozenset(
    {"_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "tokenizer_file", "padding", "truncation"}
)
"""Keys that say where a file was, what wrote it, or how a tokenizer was last called."""


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Hash of the architecture, the dtype and up to 64 evenly spaced values of every parameter and saved buffer.

    Packed weights of quantised checkpoints are buffers. Those that are computed and not saved (rotary frequencies,
    position ids) follow from the configuration and are left out.
    """
    digest = hashlib.sha256(adapter_for(model).fingerprint.encode())
    for name, parameter in model.named_parameters():
        for part, tensor in stored(name, parameter):  # scales are attributes of the parameter itself
            digest.update(f"{part}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(_values(tensor).float().numpy().tobytes())
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, buffer in model.state_dict().items():
        if name not in known and isinstance(buffer, Tensor):
            digest.update(f"{name}{tuple(buffer.shape)}{buffer.dtype}".encode())
            digest.update(_values(buffer).view(torch.uint8).numpy().tobytes())  # float32 would round packed integers
    return digest.hexdigest()[:16]


def settings_fingerprint(weights: str, model: PreTrainedModel, processor: Any) -> str:
    """Hash of all that answers depend on: weights (by their fingerprint), configurations, processor, tokenizer."""
    tokenizer = getattr(processor, "tokenizer", None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {
        "weights": weights,
        "config": model.config.to_dict(),
        "generation": None if model.generation_config is None else model.generation_config.to_dict(),
        "processor": processor.to_dict(),
        "chat_template": getattr(processor, "chat_template", None),
        "tokenizer": type(tokenizer).__name__ if backend is None else json.loads(backend.to_str()),
        "transformers": transformers.__version__,
    }
    return hashlib.sha256(json.dumps(_lasting(parts), sort_keys=True).encode()).hexdigest()[:16]


def _values(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _NUM_VALUES)][:_NUM_VALUES].cpu().contiguous()


def _lasting(value: Any) -> Any:
    """Plain data that is the same for the same settings, wherever they were read from."""
    if isinstance(value, Mapping):
        return {str(key): _lasting(item) for key, item in value.items() if key not in _PASSING}
    if isinstance(value, (list, tuple)):
        return [_lasting(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
