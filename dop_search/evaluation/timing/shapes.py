"""Models with random weights at the sizes of published checkpoints: skipping saves the same time whatever they are."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from dop_search.models.published import published_models
from dop_search.utils.errors import ConfigError
from dop_search.utils.registry import Registry

Inputs = dict[str, Tensor]
IMAGE_TOKEN_ID = 31
FIRST_TEXT_ID = 100
_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


@dataclass(frozen=True)
class Shape:
    """Sizes of a multimodal model and of the prompt it is measured with.

    Attributes:
        name: what ``--shape`` takes.
        values: of the configuration.
        side: of one image or tile, in pixels.
        num_images: images or tiles in the prompt.
        num_visual: visual tokens that they become.
        source: where the sizes are from.
    """

    name: str
    values: dict[str, Any]
    side: int
    num_images: int
    num_visual: int
    source: str

    @property
    def config(self) -> PretrainedConfig:
        """The configuration, with token ids of any vocabulary; no token ends a generation."""
        config = AutoConfig.for_model(**copy.deepcopy(self.values))
        for offset, token in enumerate(_TOKENS):
            if hasattr(config, token):
                setattr(config, token, IMAGE_TOKEN_ID + offset)
        text = config.get_text_config()
        text.bos_token_id = text.eos_token_id = text.pad_token_id = None
        return config

    def sized(self, text: dict[str, Any], vision: dict[str, Any], **fields: Any) -> Shape:
        """The same architecture with other values of the decoder's and the tower's configuration."""
        parts = {
            "text_config": self.values["text_config"] | text,
            "vision_config": self.values["vision_config"] | vision,
        }
        return replace(self, values=self.values | parts, **fields)


def _published(name: str, name_or_path: str, side: int, num_images: int, num_visual: int, source: str) -> Shape:
    return Shape(name, published_models()[name_or_path].values, side, num_images, num_visual, source)


def _llama(layers: int, hidden: int, mlp: int, heads: int, vocabulary: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
    }


_7B, _13B = "llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf"
_NEXT = "five tiles of 576 tokens, the 2,880 of the literature, as five images"
_STUB = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
_LLAVA = _published("llava_1_5_7b", _7B, 336, 1, 576, "LLaVA-1.5-7B")
_SHAPES = (
    _LLAVA,
    _published("llava_1_5_13b", _13B, 336, 1, 576, "LLaVA-1.5-13B"),
    _published("llava_next_7b", _7B, 336, 5, 2880, f"LLaVA-NeXT-7B, {_NEXT}"),
    _published("llava_next_13b", _13B, 336, 5, 2880, f"LLaVA-NeXT-13B, {_NEXT}"),
    _published(
        "qwen2_5_vl_7b", "Qwen/Qwen2.5-VL-7B-Instruct", 1008, 1, 1296, "Qwen2.5-VL-7B, one image of 1008 x 1008 pixels"
    ),
    _published("internvl3_8b", "OpenGVLab/InternVL3-8B-hf", 448, 5, 1280, "InternVL3-8B, five tiles"),
    _LLAVA.sized(
        _llama(layers=8, hidden=1024, mlp=2752, heads=8, vocabulary=32064),
        _STUB,
        name="small",
        num_images=5,
        num_visual=2880,
        source="a Llama decoder of 8 layers x 1024 that a CPU can run; the vision tower is a stub",
    ),
    _LLAVA.sized(
        _llama(layers=4, hidden=64, mlp=160, heads=4, vocabulary=256),
        {**_STUB, "image_size": 140},
        name="tiny",
        side=140,
        num_images=2,
        num_visual=200,
        source="made up, to try the command in seconds",
    ),
)
SHAPES = Registry("shape", {shape.name: shape for shape in _SHAPES})
"""What ``--shape`` can be."""


def build(shape: Shape, device: torch.device, dtype: torch.dtype, attn_implementation: str = "sdpa") -> PreTrainedModel:
    """A model of ``shape`` with random weights, in evaluation mode."""
    return random_model(shape.config, device, dtype, attn_implementation)


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
    """One prompt, ``batch`` times: half of the text (two tokens at least), the images, the other half of the text."""
    if num_text < 2:
        raise ConfigError(f"`text_tokens >= 2` must hold (one before the images, one after), but got ({num_text})")
    before, after = num_text // 2, num_text - num_text // 2
    highest = shape.values["text_config"]["vocab_size"] - FIRST_TEXT_ID
    text = [FIRST_TEXT_ID + index % highest for index in range(num_text)]
    ids = torch.tensor([[*text[:before], *[IMAGE_TOKEN_ID] * shape.num_visual, *text[-after:]]] * batch)
    images, side, patch = batch * shape.num_images, shape.side, shape.values["vision_config"]["patch_size"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if shape.values["model_type"] == "qwen2_5_vl":
        count = side // patch
        inputs["pixel_values"] = torch.zeros(images * count * count, 3 * 2 * patch**2)
        inputs["image_grid_thw"] = torch.tensor([[1, count, count]] * images)
        inputs["mm_token_type_ids"] = (ids == IMAGE_TOKEN_ID).int()
    else:
        inputs["pixel_values"] = torch.zeros(images, 3, side, side)
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
