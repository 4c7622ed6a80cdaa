"""Tiny random models of every supported family, built from their configs: nothing is downloaded.

They keep what matters to operation pruning (grouped-query attention, M-RoPE, deepstack injections, any-resolution
tiles, newline tokens) at about 100 k parameters. Weights are drawn so that attention is neither flat nor one-hot:
skipping any operation moves the logits far more than rounding does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SiglipVisionConfig,
)

from dop_search.models.families import TEXT_MODELS, auto_class
from dop_search.models.text import MARKERS_KEY
from dop_search.testing.families import MORE_FAMILIES
from dop_search.testing.sizes import ANYRES_TILE_SIZE as ANYRES_TILE_SIZE
from dop_search.testing.sizes import (
    IMAGE_TOKEN_ID,
    NUM_SPECIAL_TOKENS,
    PAD_TOKEN_ID,
    VIDEO_TOKEN_ID,
    VISION_END_TOKEN_ID,
    VISION_START_TOKEN_ID,
    TinySizes,
)
from dop_search.utils.errors import UnsupportedModelError


def _clip(image_size: int, patch_size: int) -> dict[str, Any]:
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
    )
    return dict(config.to_dict())


def _llava(sizes: TinySizes) -> PretrainedConfig:
    """CLIP tower with a CLS token; 4 x 4 = 16 visual tokens per image."""
    return LlavaConfig(
        vision_config=_clip(image_size=28, patch_size=7),
        text_config=LlamaConfig(**sizes.text()).to_dict(),
        image_token_index=IMAGE_TOKEN_ID,
    )


def _llava_next(sizes: TinySizes) -> PretrainedConfig:
    """Base image plus any-resolution tiles with newline tokens; 14, 16 or 20 visual tokens."""
    side = ANYRES_TILE_SIZE
    return LlavaNextConfig(
        vision_config=_clip(image_size=side, patch_size=side // 2),
        text_config=LlamaConfig(**sizes.text()).to_dict(),
        image_token_index=IMAGE_TOKEN_ID,
        image_grid_pinpoints=[[side, 2 * side], [2 * side, side], [2 * side, 2 * side]],
    )


def _llava_onevision(sizes: TinySizes) -> PretrainedConfig:
    """SigLIP tower (no CLS token), any-resolution tiles, Qwen2 decoder; 14, 16 or 20 visual tokens."""
    side = ANYRES_TILE_SIZE
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=side,
        patch_size=side // 2,
        vision_use_head=False,
    )
    return LlavaOnevisionConfig(
        vision_config=vision.to_dict(),
        text_config=Qwen2Config(**sizes.text()).to_dict(),
        image_token_index=IMAGE_TOKEN_ID,
        video_token_index=VIDEO_TOKEN_ID,
        image_grid_pinpoints=[[side, 2 * side], [2 * side, side], [2 * side, 2 * side]],
    )


_QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE_TOKEN_ID,
    "video_token_id": VIDEO_TOKEN_ID,
    "vision_start_token_id": VISION_START_TOKEN_ID,
    "vision_end_token_id": VISION_END_TOKEN_ID,
}


def _mrope(sizes: TinySizes) -> dict[str, Any]:
    half = sizes.hidden_size // sizes.num_attention_heads // 2
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}


def _qwen2_vl(sizes: TinySizes) -> PretrainedConfig:
    """Dynamic resolution (any grid of merged 2 x 2 patches), M-RoPE."""
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": sizes.hidden_size, "num_heads": 2, "patch_size": 4}
    text = sizes.text(rope_parameters=_mrope(sizes))
    return Qwen2VLConfig(vision_config=vision, text_config=text, **_QWEN_TOKENS)


def _qwen2_5_vl(sizes: TinySizes) -> PretrainedConfig:
    """As Qwen2-VL, with windowed attention in the tower (features are permuted back by the model)."""
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": sizes.hidden_size,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    text = sizes.text(rope_parameters=_mrope(sizes))
    return Qwen2_5_VLConfig(vision_config=vision, text_config=text, **_QWEN_TOKENS)


def _qwen3_vl(sizes: TinySizes, kind: Any = Qwen3VLConfig, **extra: Any) -> PretrainedConfig:
    """Deepstack: features of two tower layers are added to the visual tokens after decoder layers 0 and 1."""
    vision = {
        "depth": 3,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": sizes.hidden_size,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    head_dim = sizes.hidden_size // sizes.num_attention_heads
    text = sizes.text(rope_parameters=_mrope(sizes), head_dim=head_dim, **extra)
    config: PretrainedConfig = kind(vision_config=vision, text_config=text, **_QWEN_TOKENS)
    return config


def _qwen3_vl_moe(sizes: TinySizes) -> PretrainedConfig:
    """As Qwen3-VL, with two of five experts in each layer."""
    return _qwen3_vl(sizes, Qwen3VLMoeConfig, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24)


def _internvl(sizes: TinySizes) -> PretrainedConfig:
    """Tiles of 3 x 3 visual tokens after pixel shuffle, Qwen2 decoder."""
    vision = InternVLVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=42,
        patch_size=7,
    )
    return InternVLConfig(
        vision_config=vision.to_dict(),
        text_config=Qwen2Config(**sizes.text()).to_dict(),
        image_token_id=IMAGE_TOKEN_ID,
    )


def _text(model_type: str) -> Callable[[TinySizes], PretrainedConfig]:
    """A decoder alone; the opening marker is one token, the closing one is two."""

    def config(sizes: TinySizes) -> PretrainedConfig:
        return AutoConfig.for_model(
            model_type, **sizes.text(), head_dim=sizes.hidden_size // sizes.num_attention_heads, sliding_window=None,
            **{MARKERS_KEY: [[VISION_START_TOKEN_ID], [VISION_END_TOKEN_ID, IMAGE_TOKEN_ID]]},
        )  # fmt: skip

    return config


TINY_CONFIGS: dict[str, Callable[[TinySizes], PretrainedConfig]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    **{model_type: family.config for model_type, family in MORE_FAMILIES.items()},
    **{model_type: _text(model_type) for model_type in TEXT_MODELS},
}
"""Config builder of each family, by ``model_type``."""


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
        model_type: a key of ``TINY_CONFIGS``.
        num_layers: decoder layers.
        seed: seed of the weights; the global random state is left alone.
        attn_implementation: ``sdpa`` or ``eager``, for tower and decoder.
        dtype: of the weights. transformers computes norms and softmax in float32 all the same.
        num_heads, num_kv_heads: query heads and key/value heads of the decoder.

    Raises:
        UnsupportedModelError: if there is no tiny model of this family.
    """
    if model_type not in TINY_CONFIGS:
        raise UnsupportedModelError(
            f"there is no tiny model of the family {model_type!r}; there is one of {sorted(TINY_CONFIGS)}"
        )
    sizes = TinySizes(num_hidden_layers=num_layers, num_attention_heads=num_heads, num_key_value_heads=num_kv_heads)
    config = TINY_CONFIGS[model_type](sizes)
    with torch.random.fork_rng(devices=[]):
        model = auto_class(model_type).from_config(config, attn_implementation=attn_implementation, dtype=dtype)
    randomize_(model, seed)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD_TOKEN_ID
    model.generation_config.suppress_tokens = list(range(NUM_SPECIAL_TOKENS))
    result: PreTrainedModel = model.eval()
    return result


def tiny_llava(
    num_layers: int = 4,
    seed: int = 0,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    num_heads: int = 4,
    num_kv_heads: int = 2,
) -> PreTrainedModel:
    """A tiny LLaVA with 16 visual tokens; arguments as in :func:`tiny_model`."""
    return tiny_model("llava", num_layers, seed, attn_implementation, dtype, num_heads, num_kv_heads)


def randomize_(model: nn.Module, seed: int, gain: float = 1.5) -> None:
    """Draw every parameter anew: matrices of variance ``gain² / fan_in``, norms near 1, biases near 0.

    The usual 0.02 initialisation leaves attention uniform and the residual stream almost untouched, and then a wrong
    mask hides behind the tolerance.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if id(parameter) in embeddings:
                value = noise
            elif ".experts." in name:  # [experts, out, in]
                value = noise * gain / parameter.shape[-1] ** 0.5
            elif parameter.ndim >= 2:
                value = noise * gain / parameter[0].numel() ** 0.5
            elif name.endswith("weight"):
                value = 1.0 + 0.1 * noise
            else:
                value = 0.2 * noise
            parameter.copy_(value)
