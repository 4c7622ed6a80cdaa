"""Which image-text-to-text classes of transformers can be pruned: ``python -m dop_search.models.coverage``.

Every class without an adapter is built from its default configuration with two decoder layers, without memory for its
weights, and what pruned layers would have to do otherwise is read off the modules.
"""

from __future__ import annotations

import inspect
import logging
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

from dop_search.models.decoder_checks import DECODER_LAYERS
from dop_search.models.families import FAMILIES

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = {"input_layernorm", "post_attention_layernorm"}
FOUR_NORMS = NORMS | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
NOT_CAUSAL = ("block_sequence_ids", "or_mask_function")
"""Arguments of transformers' masks that open more than what comes before."""
NUM_LAYERS = 2
UNBUILDABLE = (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError)
"""What classes make of their own default configurations."""

NOTES = {
    "gemma4": "31B and 26B-A4B; E2B and E4B share keys and values between layers and read per-layer embeddings",
    "gemma3n": "keys and values that layers share, per-layer embeddings, four residual streams (AltUp)",
    "got_ocr2": "visual tokens that convolutions mix over an image",
    "pp_chart2table": "visual tokens that convolutions mix over an image",
    "molmo2": "tokens of all images see each other",
    "granite_docling": "scaled residuals",
    "kimi_k25": "latent attention (MLA), which has no projections of keys and values; experts",
    "mistral4": "latent attention (MLA), which has no projections of keys and values; experts",
    "glm4v_moe": "experts in some layers alone",
}
"""Where what a family's code says is better than what can be read off its modules."""

Status = Literal["covered", "refused", "not applicable"]


@dataclass(frozen=True)
class Coverage:
    """One row of the table.

    Attributes:
        status: whether there is an adapter; ``not applicable`` where visual tokens are no part of a decoder's sequence.
        reason: what stands in the way, or what of the family is covered.
    """

    model_type: str
    name: str
    status: Status
    reason: str = ""


def coverage(model_type: str) -> Coverage:
    """The row of a model type of transformers' image-text-to-text classes."""
    name = str(CLASSES[model_type])
    if model_type in FAMILIES:
        return Coverage(model_type, name, "covered", NOTES.get(model_type, ""))
    if model_type in NOTES:
        return Coverage(model_type, name, "refused", NOTES[model_type])
    try:
        config = shortened(AutoConfig.for_model(model_type))
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except UNBUILDABLE:
        return Coverage(model_type, name, "refused", "cannot be built from its default configuration")
    return Coverage(model_type, name, *verdict(model))


def shortened(config: Any) -> Any:
    """The configuration with two layers in each of its parts; lists with an entry per layer keep their first two."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for key in ("num_hidden_layers", "num_layers", "depth", "encoder_layers", "decoder_layers"):
            if isinstance(number := getattr(part, key, None), int) and number > NUM_LAYERS:
                for name, value in list(vars(part).items()):
                    if isinstance(value, list) and len(value) == number:
                        setattr(part, name, value[-NUM_LAYERS:])
                setattr(part, key, NUM_LAYERS)
    return config


def verdict(model: Any) -> tuple[Status, str]:
    """Whether a model without an adapter could have one, and what stands in the way."""
    if model.config.is_encoder_decoder:
        return "not applicable", "encoder and decoder: images do not enter the decoder's sequence"
    decoder, text = model.get_decoder(), model.config.get_text_config(decoder=True)
    kinds = {type(module).__name__ for module in decoder.modules()}
    if getattr(text, "cross_attention_layers", None) or any("CrossAttention" in kind for kind in kinds):
        return "not applicable", "cross attention: images do not enter the decoder's sequence"
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return "refused", f"a decoder of another kind ({type(decoder).__name__})"
    found = differences(layers, text)
    source = inspect.getsource(sys.modules[type(model).__module__])
    if any(argument in source for argument in NOT_CAUSAL):
        found.append("attention that is not causal within an image or a prompt")
    return "refused", "; ".join(found) or "nothing but an adapter is missing"


def differences(layers: nn.ModuleList, config: Any) -> list[str]:
    """What the layers have that :func:`dop_search.pruning.layer.run_layer` does not do."""
    if all(type(layer).__name__ in DECODER_LAYERS for layer in layers):
        return []
    found: list[str] = []
    types = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if types:
        found.append(f"layers of other types ({', '.join(types)})")
    attention = [getattr(layer, "self_attn", None) for layer in layers]
    lacking = sorted(
        {part for module in attention if module is not None for part in PROJECTIONS if not hasattr(module, part)}
    )
    if None in attention:
        found.append("layers without `self_attn`")
    elif lacking:
        found.append(f"attention without {', '.join(lacking)}")
    norms = {name for layer in layers for name, module in layer.named_children() if "Norm" in type(module).__name__}
    if norms not in (NORMS, FOUR_NORMS):
        found.append(f"other norms ({', '.join(sorted(norms ^ NORMS))})")
    if any(hasattr(getattr(layer, "mlp", None), "experts") for layer in layers):
        found.append("experts")
    return found or [f"layers of a class that nobody has checked ({type(layers[0]).__name__})"]


def table() -> str:
    """All classes as a Markdown table, those of one reason in one row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for row in sorted(map(coverage, CLASSES), key=lambda row: row.model_type):
        rows.setdefault((row.status, row.reason), []).append(f"`{row.model_type}`")
    order = ("covered", "refused", "not applicable")
    keys = sorted(rows, key=lambda key: (order.index(key[0]), -len(rows[key]), key[1]))
    lines = ["| | `model_type` | why |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {key[0]} | {', '.join(rows[key])} | {key[1]} |" for key in keys)])


if __name__ == "__main__":
    logging.getLogger("transformers").setLevel(logging.ERROR)
    print(table())
