"""What the packed decoder layers can stand in for; everything else is refused before it computes something wrong."""

from __future__ import annotations

from pathlib import Path
from types import FunctionType
from typing import Any

import transformers
from torch import nn

from dop_search.models.layer_names import mixer_of
from dop_search.utils.errors import UnsupportedModelError

_TRANSFORMERS = str(Path(transformers.__file__).parent)

DECODER_LAYERS = frozenset(
    {
        "LlamaDecoderLayer",
        "MistralDecoderLayer",
        "GemmaDecoderLayer",
        "Gemma3DecoderLayer",
        "Gemma4TextDecoderLayer",
        "Qwen2DecoderLayer",
        "Qwen3DecoderLayer",
        "Qwen2VLDecoderLayer",
        "Qwen2_5_VLDecoderLayer",
        "Qwen3VLTextDecoderLayer",
        "Qwen3VLMoeTextDecoderLayer",
        "Qwen3_5DecoderLayer",
        "Qwen3_5MoeDecoderLayer",
        "Glm4vTextDecoderLayer",
        "GlmOcrTextDecoderLayer",
        "Lfm2DecoderLayer",
        "AriaTextDecoderLayer",
    }
)
"""Classes of transformers whose arithmetic is that of :func:`dop_search.pruning.layer.run_layer`. Names of modules do
not tell: Granite's layers look like Llama's and scale their residuals."""

PLAIN_RMS_NORMS = frozenset(
    {
        "LlamaRMSNorm",
        "MistralRMSNorm",
        "Qwen2RMSNorm",
        "Qwen2VLRMSNorm",
        "Qwen2_5_VLRMSNorm",
        "Qwen3RMSNorm",
        "Qwen3VLTextRMSNorm",
        "Glm4vRMSNorm",
        "GlmOcrRMSNorm",
        "Lfm2RMSNorm",
        "AriaTextRMSNorm",
        "Qwen3VLMoeTextRMSNorm",
    }
)
"""Norms that are exactly ``x / rms(x) * weight``, so that one fused kernel can stand for their eight."""

MASKED_BACKENDS = ("eager", "sdpa")
"""Attention backends that take a mask as it is; flash kernels take none and get none."""


def is_flash(implementation: str) -> bool:
    """Whether an attention backend is of the flash family, of the package or of the kernels hub.

    They take no masks and are causal from the bottom right by themselves.
    """
    return "flash" in implementation


def forward_owner(cls: type) -> type | None:
    """The class, or the base of it, whose forward its instances run; ``None`` if that is not what its file defines.

    Decorators may come from that file or from transformers.
    """
    function: Any = getattr(cls, "forward", None)
    files = []
    while isinstance(function, FunctionType):
        files.append(function.__code__.co_filename)
        name = f"{function.__module__}.{function.__qualname__}"
        function = getattr(function, "__wrapped__", None)
    if function is not None or not files:
        return None
    if any(file != files[-1] and not file.startswith(_TRANSFORMERS) for file in files):
        return None
    return next((base for base in cls.__mro__ if f"{base.__module__}.{base.__qualname__}.forward" == name), None)


def check_layer(layer: nn.Module, known: frozenset[str] = DECODER_LAYERS) -> None:
    """Refuse a decoder layer that computes something else than :func:`dop_search.pruning.layer.run_layer`;
    UnsupportedModelError for another class of layers, or another forward of the layer, its attention or a norm.

    What counts is the class whose forward runs: a subclass may add to it, but not replace it.

    ``known``: names of classes that do compute the same; those of ``DECODER_LAYERS`` are transformers' own.
    """
    cls = type(layer)
    if any("_orig_mod" in part._modules for part in (layer, mixer_of(layer))):
        raise UnsupportedModelError(
            "a decoder layer or its attention was compiled by itself, which pruned layers would not run; take the "
            "layers out of `torch.compile`, and prune with `compile=True`"
        )
    attention = type(mixer_of(layer))
    for norm in {type(norm) for norm in layer.modules() if type(norm).__name__ in PLAIN_RMS_NORMS}:
        _owner(norm)
    owner = _owner(cls)
    is_foreign = owner.__name__ in DECODER_LAYERS and _package(owner) != "transformers"
    if owner.__name__ not in known or is_foreign:
        raise UnsupportedModelError(
            f"decoder layers of class {cls.__name__} are not known to compute what pruned layers compute; "
            f"known are {', '.join(sorted(known))}, with the forward of transformers. If they do, let your adapter "
            "name them in `decoder_layers`, and run the conformance suite on it (dop_search/models/README.md)"
        )
    if _package(_owner(attention)) not in map(_package, cls.__mro__):
        raise UnsupportedModelError(
            f"the attention of class {attention.__name__} in {cls.__name__} has a forward of its own, which a pruned "
            f"model would not run; use the class that {cls.__name__} comes with"
        )


def _owner(cls: type) -> type:
    owner = forward_owner(cls)
    if owner is None:
        raise UnsupportedModelError(
            f"the forward of class {cls.__name__} was replaced, which a pruned model would not notice; undo that "
            "before the model is pruned"
        )
    return owner


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def check_window(config: Any, known: frozenset[str] = frozenset()) -> None:
    """Refuse a decoder that attends within a sliding window, or whose layers are of other types; UnsupportedModelError
    naming the setting.

    ``known``: types of layers, besides full attention, that its adapter covers.
    """
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    types = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if types <= known and (window is None or "sliding_attention" in known):
        return
    if window is not None or types:
        found = ", ".join([*sorted(types), *([] if window is None else [f"sliding_window={window}"])])
        raise UnsupportedModelError(
            f"the decoder attends within a window ({found}), which pruning does not support; if all prompts with "
            "their answers are shorter than it, load the model with `sliding_window` None (use_sliding_window=False) "
            "in its text configuration, which changes nothing for them"
        )


def check_attention(implementation: str) -> None:
    """Refuse attention backends whose masks are of another kind; UnsupportedModelError naming those that work."""
    if implementation in MASKED_BACKENDS or (is_flash(implementation) and not implementation.startswith("paged")):
        return
    raise UnsupportedModelError(
        f"the attention backend {implementation!r} is not supported by pruned layers; load the model with "
        f"attn_implementation={', '.join(MASKED_BACKENDS)} or flash_attention_2, or call "
        "model.set_attn_implementation('sdpa')"
    )


def check_placement(name: str, parts: list[nn.Module]) -> None:
    """Refuse a decoder that is offloaded: packed rows follow its layers over devices, but nothing loads their weights;
    UnsupportedModelError naming the remedy.

    ``parts``: decoder layers and what else runs on packed rows.
    """
    offloaded = sum(any(parameter.is_meta for parameter in part.parameters()) for part in parts)
    if offloaded:
        raise UnsupportedModelError(
            f"the weights of {offloaded} of {len(parts)} parts of the decoder of {name} are offloaded (on the device "
            "meta), but pruned layers need them where they compute; load the model in half precision or with "
            "model.quantization, or spread it over more GPUs (model.device_map=auto)"
        )
