"""Models with random weights at the sizes of published checkpoints: skipping saves the same time whatever they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2Config,
)

from dop_search.models.published import published_models
from dop_search.utils.errors import ConfigError
from dop_search.utils.registry import Registry

Inputs = dict[str, Tensor]
IMAGE_TOKEN_ID = 31
FIRST_TEXT_ID = 100


@dataclass(frozen=True)
class Shape:
    """Sizes of a multimodal model and of the prompt it is measured with.

    Attributes:
        name: what ``--shape`` takes.
        layers, hidden, mlp, heads, kv_heads: of the decoder.
        vocabulary: tokens of the vocabulary.
        vision_layers, vision_hidden, vision_heads, vision_mlp: of the vision tower.
        image_size, patch_size: of one image or tile, in pixels.
        num_images: images or tiles in the prompt.
        num_visual: visual tokens that they become.
        config: builds the Hugging Face configuration.
        pixels: builds what the vision tower receives for one sample.
        source: where the sizes are from.
    """

    name: str
    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    vocabulary: int
    vision_layers: int
    vision_hidden: int
    vision_heads: int
    vision_mlp: int
    image_size: int
    patch_size: int
    num_images: int
    num_visual: int
    config: Callable[[Shape], PretrainedConfig]
    pixels: Callable[[Shape, int], Inputs]
    source: str

    def text(self, **extra: Any) -> dict[str, Any]:
        """Keyword arguments of the decoder's configuration; no token ends a generation."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 32768,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            **extra,
        }

    def vision(self) -> dict[str, Any]:
        """Keyword arguments of the configuration of a tower with one resolution."""
        return {
            "hidden_size": self.vision_hidden,
            "intermediate_size": self.vision_mlp,
            "num_hidden_layers": self.vision_layers,
            "num_attention_heads": self.vision_heads,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
        }


def _llava(shape: Shape) -> PretrainedConfig:
    """CLIP tower, two-layer projector, Llama decoder; several tiles are several images of equal size."""
    vision = CLIPVisionConfig(**shape.vision())
    text = LlamaConfig(**shape.text())
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN_ID)


def _llava_pixels(shape: Shape, batch: int) -> Inputs:
    side = shape.image_size
    return {"pixel_values": torch.zeros(batch * shape.num_images, 3, side, side)}


def _qwen2_5_vl(shape: Shape) -> PretrainedConfig:
    """Windowed tower with four full layers, M-RoPE, grouped-query attention."""
    half = shape.hidden // shape.heads // 2
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    vision = {
        "depth": shape.vision_layers,
        "hidden_size": shape.vision_hidden,
        "intermediate_size": shape.vision_mlp,
        "num_heads": shape.vision_heads,
        "patch_size": shape.patch_size,
        "out_hidden_size": shape.hidden,
        "window_size": 8 * shape.patch_size,
        "fullatt_block_indexes": [layer for layer in range(shape.vision_layers) if layer % 8 == 7],
    }
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    return Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=shape.text(rope_parameters=rope),
        image_token_id=IMAGE_TOKEN_ID,
        video_token_id=IMAGE_TOKEN_ID + 1,
        vision_start_token_id=IMAGE_TOKEN_ID + 2,
        vision_end_token_id=IMAGE_TOKEN_ID + 3,
    )


def _qwen_pixels(shape: Shape, batch: int) -> Inputs:
    side = shape.image_size // shape.patch_size
    images = batch * shape.num_images
    return {
        "pixel_values": torch.zeros(images * side * side, 3 * 2 * shape.patch_size**2),
        "image_grid_thw": torch.tensor([[1, side, side]] * images),
    }


def _internvl(shape: Shape) -> PretrainedConfig:
    """InternViT tiles after pixel shuffle (four patches a token), Qwen2 decoder."""
    vision = InternVLVisionConfig(**shape.vision())
    return InternVLConfig(
        vision_config=vision.to_dict(), text_config=Qwen2Config(**shape.text()).to_dict(), image_token_id=IMAGE_TOKEN_ID
    )


def _decoder(name_or_path: str) -> dict[str, Any]:
    """Sizes of a published checkpoint's decoder."""
    text = published_models()[name_or_path].text
    return {
        "layers": text["num_hidden_layers"],
        "hidden": text["hidden_size"],
        "mlp": text["intermediate_size"],
        "heads": text["num_attention_heads"],
        "kv_heads": text["num_key_value_heads"],
        "vocabulary": text["vocab_size"],
    }


_LLAMA_7B, _LLAMA_13B = _decoder("llava-hf/llava-1.5-7b-hf"), _decoder("llava-hf/llava-1.5-13b-hf")
_CLIP_L: dict[str, Any] = {
    "vision_layers": 24,
    "vision_hidden": 1024,
    "vision_heads": 16,
    "vision_mlp": 4096,
    "image_size": 336,
    "patch_size": 14,
    "config": _llava,
    "pixels": _llava_pixels,
}
_STUB: dict[str, Any] = {**_CLIP_L, "vision_layers": 2, "vision_hidden": 32, "vision_heads": 2, "vision_mlp": 32}
_NEXT = "five tiles of 576 tokens, the 2,880 of the literature, as five images"

_SHAPES = (
    Shape("llava_1_5_7b", **_LLAMA_7B, **_CLIP_L, num_images=1, num_visual=576, source="LLaVA-1.5-7B"),
    Shape("llava_1_5_13b", **_LLAMA_13B, **_CLIP_L, num_images=1, num_visual=576, source="LLaVA-1.5-13B"),
    Shape("llava_next_7b", **_LLAMA_7B, **_CLIP_L, num_images=5, num_visual=2880, source=f"LLaVA-NeXT-7B, {_NEXT}"),
    Shape("llava_next_13b", **_LLAMA_13B, **_CLIP_L, num_images=5, num_visual=2880, source=f"LLaVA-NeXT-13B, {_NEXT}"),
    Shape(
        "qwen2_5_vl_7b",
        **_decoder("Qwen/Qwen2.5-VL-7B-Instruct"),
        vision_layers=32,
        vision_hidden=1280,
        vision_heads=16,
        vision_mlp=3420,
        image_size=1008,
        patch_size=14,
        num_images=1,
        num_visual=1296,
        config=_qwen2_5_vl,
        pixels=_qwen_pixels,
        source="Qwen2.5-VL-7B, one image of 1008 x 1008 pixels",
    ),
    Shape(
        "internvl3_8b",
        **_decoder("OpenGVLab/InternVL3-8B-hf"),
        vision_layers=24,
        vision_hidden=1024,
        vision_heads=16,
        vision_mlp=4096,
        image_size=448,
        patch_size=14,
        num_images=5,
        num_visual=1280,
        config=_internvl,
        pixels=_llava_pixels,
        source="InternVL3-8B, five tiles",
    ),
    Shape(
        "small",
        layers=8,
        hidden=1024,
        mlp=2752,
        heads=8,
        kv_heads=8,
        vocabulary=32064,
        num_images=5,
        num_visual=2880,
        **_STUB,
        source="a Llama decoder of 8 layers x 1024 that a CPU can run; the vision tower is a stub",
    ),
    Shape(
        "tiny",
        layers=4,
        hidden=64,
        mlp=160,
        heads=4,
        kv_heads=4,
        vocabulary=256,
        num_images=2,
        num_visual=200,
        **{**_STUB, "image_size": 140},
        source="made up, to try the command in seconds",
    ),
)
SHAPES = Registry("shape", {shape.name: shape for shape in _SHAPES})
"""What ``--shape`` can be."""


def shape_named(name: str) -> Shape:
    """Look a shape up.

    Raises:
        ConfigError: if there is none of that name; names a near one.
    """
    return SHAPES.find(name)


def build(shape: Shape, device: torch.device, dtype: torch.dtype, attn_implementation: str = "sdpa") -> PreTrainedModel:
    """A model of ``shape`` with random weights, in evaluation mode."""
    return random_model(shape.config(shape), device, dtype, attn_implementation)


def random_model(
    config: PretrainedConfig, device: torch.device, dtype: torch.dtype, attn_implementation: str = "sdpa"
) -> PreTrainedModel:
    """A model of any configuration with random weights, in evaluation mode."""
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    return model.eval()


def prompt(shape: Shape, model: PreTrainedModel, num_text: int = 60, batch: int = 1) -> Inputs:
    """One prompt, ``batch`` times: half of the text, the images, the other half of the text.

    Raises:
        ConfigError: if ``num_text`` leaves no text before or after the images.
    """
    if num_text < 2:
        raise ConfigError(f"`text_tokens >= 2` must hold (one before the images, one after), but got ({num_text})")
    before, after = num_text // 2, num_text - num_text // 2
    highest = shape.vocabulary - FIRST_TEXT_ID
    text = [FIRST_TEXT_ID + index % highest for index in range(num_text)]
    ids = torch.tensor([[*text[:before], *[IMAGE_TOKEN_ID] * shape.num_visual, *text[-after:]]] * batch)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **shape.pixels(shape, batch)}
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == IMAGE_TOKEN_ID).int()
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
