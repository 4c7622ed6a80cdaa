"""Weights in fewer bits: what can be asked for, which packages it needs, and what it takes."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig, TorchAoConfig

from dop_search.models.families import auto_class
from dop_search.utils.errors import DopError

Quantization = Literal["bnb4", "bnb8", "int8"]
"""``bnb4``, ``bnb8``: 4-bit NF4 and LLM.int8 of bitsandbytes; ``int8``: 8-bit weights of torchao. Only the decoder's
linear layers: the vision tower, the projector and ``lm_head`` stay as they are."""

_PACKAGES: dict[str, str] = {"bnb4": "bitsandbytes", "bnb8": "bitsandbytes", "int8": "torchao"}


def quantization_config(
    quantization: Quantization, config: PretrainedConfig, dtype: torch.dtype | str
) -> BitsAndBytesConfig | TorchAoConfig:
    """What transformers' ``from_pretrained`` takes; DopError on an unknown name, on a checkpoint that is quantised
    already, or if a package is missing.

    ``dtype``: what the weights are unpacked to; ``"auto"``: the checkpoint's.
    """
    check_quantization(quantization, config)
    for package in (_PACKAGES[quantization], "accelerate"):
        if find_spec(package) is None:
            raise DopError(
                f"model.quantization={quantization} needs the package {package}, which is not installed; "
                f"`pip install {package}`, or leave it out (null)"
            )
    kept = kept_modules(config)
    if quantization == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=kept)
    if quantization == "bnb8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    compute = getattr(config, "dtype", None) if isinstance(dtype, str) else dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute or torch.bfloat16,
        llm_int8_skip_modules=kept,
    )


def check_quantization(quantization: str, config: PretrainedConfig) -> None:
    """Refuse what cannot be asked for; DopError on an unknown name, or a checkpoint that is quantised already."""
    if quantization not in get_args(Quantization):
        raise DopError(f"`quantization` must be one of {', '.join(get_args(Quantization))}, but got {quantization!r}")
    if getattr(config, "quantization_config", None) is not None:
        method = dict(config.quantization_config).get("quant_method", "unknown")
        raise DopError(
            f"the checkpoint is quantised already ({method}) and is loaded so; leave quantization={quantization} out"
        )


def meta_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    """The model without weights: sizes and names of everything, and no memory."""
    with torch.device("meta"):
        return auto_class(config.model_type).from_config(config, dtype=dtype, attn_implementation=attention).eval()


def kept_modules(config: PretrainedConfig) -> list[str]:
    """Names of the modules that stay as they are: all but the decoder."""
    inner = meta_model(config).model
    return [
        *(f"model.{name}" for name, _ in inner.named_children() if name not in ("language_model", "layers")),
        "lm_head",
    ]


def stored(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What a parameter or buffer really holds: packed weights and their scales, each with a name."""
    if hasattr(tensor, "__tensor_flatten__"):  # torchao
        for part in tensor.__tensor_flatten__()[0]:
            yield from stored(f"{name}.{part}", getattr(tensor, part))
        return
    yield name, tensor
    scales = {"absmax": getattr(getattr(tensor, "quant_state", None), "absmax", None)}  # bitsandbytes, 4 and 8 bits
    scales["SCB"] = getattr(tensor, "SCB", None)
    yield from ((f"{name}.{part}", value) for part, value in scales.items() if isinstance(value, Tensor))


def stored_bytes(tensor: Tensor) -> int:
    """Memory that a parameter or buffer takes."""
    return sum(part.nbytes for _, part in stored("", tensor))


def packed_bytes(linear: nn.Linear, quantization: Quantization, element: int) -> int:
    """Memory of a quantised linear weight: 4 bits with a scale per 64 weights, or 8 with one per row."""
    count = linear.weight.numel()
    if quantization == "bnb4":
        return count // 2 + 4 * -(-count // 64)
    return count + linear.out_features * (4 if quantization == "bnb8" else element)
