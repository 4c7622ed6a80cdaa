"""What the packed decoder layers can stand in for; everything else is refused before it computes something wrong."""

from __future__ import annotations

from typing import Any

from torch import nn

from dop_search.utils.errors import UnsupportedModelError

DECODER_LAYERS = frozenset(
    {
        "LlamaDecoderLayer",
        "MistralDecoderLayer",
        "GemmaDecoderLayer",
        "Qwen2DecoderLayer",
        "Qwen3DecoderLayer",
        "Qwen2VLDecoderLayer",
        "Qwen2_5_VLDecoderLayer",
        "Qwen3VLTextDecoderLayer",
    }
)
"""Classes of transformers whose arithmetic is that of :func:`dop_search.pruning.layer.run_layer`. Names of modules do
not tell: Granite's layers look like Llama's and scale their residuals."""

MASKED_BACKENDS = ("eager", "sdpa")
"""Attention backends that take a mask as it is; flash kernels take none and get none."""


def is_flash(implementation: str) -> bool:
    """Whether an attention backend is of the flash family, of the package or of the kernels hub.

    They take no masks and are causal from the bottom right by themselves.
    """
    return "flash" in implementation


def check_arithmetic(layer: nn.Module, config: Any, known: frozenset[str] = DECODER_LAYERS) -> None:
    """Refuse decoders that compute something else than the packed layers.

    Args:
        layer: a decoder layer.
        config: configuration of the decoder.
        known: names of classes that do compute the same.

    Raises:
        UnsupportedModelError: for another class of layers, or attention within a sliding window.
    """
    names = {cls.__name__ for cls in type(layer).__mro__}
    if not names & known:
        raise UnsupportedModelError(
            f"decoder layers of class {type(layer).__name__} are not known to compute what pruned layers compute; "
            f"known are {', '.join(sorted(known))}. If they do, let your adapter name them in `decoder_layers`, and "
            "run the conformance suite on it (dop_search/models/README.md)"
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    types = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if window is not None or types:
        found = ", ".join([*sorted(types), *([] if window is None else [f"sliding_window={window}"])])
        raise UnsupportedModelError(
            f"the decoder attends within a window ({found}), which pruning does not support; if all prompts with "
            "their answers are shorter than it, load the model with `sliding_window` None (use_sliding_window=False) "
            "in its text configuration, which changes nothing for them"
        )


def check_attention(implementation: str) -> None:
    """Refuse attention backends whose masks are of another kind.

    Raises:
        UnsupportedModelError: naming those that work.
    """
    if implementation in MASKED_BACKENDS or (is_flash(implementation) and not implementation.startswith("paged")):
        return
    raise UnsupportedModelError(
        f"the attention backend {implementation!r} is not supported by pruned layers; load the model with "
        f"attn_implementation={', '.join(MASKED_BACKENDS)} or flash_attention_2, or call "
        "model.set_attn_implementation('sdpa')"
    )


def check_placement(name: str, parts: list[nn.Module]) -> None:
    """Refuse a decoder that is offloaded: packed rows follow its layers over devices, but nothing loads their weights.

    Args:
        name: the model's class, for the message.
        parts: decoder layers and what else runs on packed rows.

    Raises:
        UnsupportedModelError: naming the remedy.
    """
    offloaded = sum(any(parameter.is_meta for parameter in part.parameters()) for part in parts)
    if offloaded:
        raise UnsupportedModelError(
            f"the weights of {offloaded} of {len(parts)} parts of the decoder of {name} are offloaded (on the device "
            "meta), but pruned layers need them where they compute; load the model in half precision or with "
            "model.quantization, or spread it over more GPUs (model.device_map=auto)"
        )
