"""Tiny random models of every supported family, built from their configs: nothing is downloaded.

They keep what matters to operation pruning (grouped-query attention, M-RoPE, deepstack injections, any-resolution
tiles, newline tokens) at about 100 k parameters. Weights are drawn so that attention is neither flat nor one-hot:
skipping any operation moves the logits far more than rounding does.
"""

from __future__ import annotations

from functools import partial

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from dop_search.models.families import TEXT_MODELS, auto_class
from dop_search.models.text import MARKERS_KEY
from dop_search.testing.models import randomize_
from dop_search.testing.sizes import (
    IMAGE_TOKEN_ID,
    NUM_SPECIAL_TOKENS,
    PAD_TOKEN_ID,
    VISION_END_TOKEN_ID,
    VISION_START_TOKEN_ID,
    TinySizes,
)
from dop_search.utils.errors import UnsupportedModelError
from support.tiny_families import TINY_FAMILIES

TINY_MODELS = (*TINY_FAMILIES, *TEXT_MODELS)
"""Families of which there is a tiny model, by ``model_type``."""


def tiny_config(model_type: str, sizes: TinySizes) -> PretrainedConfig:
    """The configuration of a tiny model; of a decoder alone the opening marker is one token, the closing one is two.

    Raises:
        UnsupportedModelError: if there is no tiny model of this family.
    """
    if model_type in TINY_FAMILIES:
        return TINY_FAMILIES[model_type].config(model_type, sizes)
    if model_type not in TEXT_MODELS:
        raise UnsupportedModelError(
            f"there is no tiny model of the family {model_type!r}; there is one of {sorted(TINY_MODELS)}"
        )
    return AutoConfig.for_model(
        model_type,
        **sizes.text(),
        head_dim=sizes.hidden_size // sizes.num_attention_heads,
        sliding_window=None,
        **{MARKERS_KEY: [[VISION_START_TOKEN_ID], [VISION_END_TOKEN_ID, IMAGE_TOKEN_ID]]},
    )


def tiny_model(
    model_type: str,
    num_layers: int = 4,
    seed: int = 0,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    num_heads: int = 4,
    num_kv_heads: int = 2,
) -> PreTrainedModel:
    """Build a tiny random model in evaluation mode on the CPU.

    Args:
        model_type: one of ``TINY_MODELS``.
        num_layers: decoder layers.
        seed: seed of the weights; the global random state is left alone.
        attn_implementation: ``sdpa`` or ``eager``, for tower and decoder.
        dtype: of the weights. transformers computes norms and softmax in float32 all the same.
        num_heads, num_kv_heads: query heads and key/value heads of the decoder.

    Raises:
        UnsupportedModelError: if there is no tiny model of this family.
    """
    sizes = TinySizes(num_hidden_layers=num_layers, num_attention_heads=num_heads, num_key_value_heads=num_kv_heads)
    config = tiny_config(model_type, sizes)
    with torch.random.fork_rng(devices=[]):
        model = auto_class(model_type).from_config(config, attn_implementation=attn_implementation, dtype=dtype)
    randomize_(model, seed)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD_TOKEN_ID
    model.generation_config.suppress_tokens = list(range(NUM_SPECIAL_TOKENS))
    result: PreTrainedModel = model.eval()
    return result


tiny_llava = partial(tiny_model, "llava")
"""A tiny LLaVA with 16 visual tokens per image."""
