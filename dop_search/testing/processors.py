"""Real processors of every family for the tiny models, with a tiny tokenizer: nothing is downloaded.

Image and video processors are the family's own classes with small sizes; the tokenizer spells every character.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from transformers import (
    CLIPImageProcessor,
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from dop_search.testing.families import MORE_FAMILIES
from dop_search.testing.sizes import ANYRES_TILE_SIZE
from dop_search.testing.tokenizer import VICUNA, chatml, square, tiny_tokenizer
from dop_search.utils.errors import UnsupportedModelError

VIDEO_FAMILIES = (
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "internvl",
    "llava_next_video",
)


def _llava() -> Any:
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=square(28)),
        tokenizer=tiny_tokenizer("<image>"),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )


def _pinpoints(side: int) -> list[list[int]]:
    return [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]


def _llava_next() -> Any:
    side = ANYRES_TILE_SIZE
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": side}, crop_size=square(side), image_grid_pinpoints=_pinpoints(side)
        ),
        tokenizer=tiny_tokenizer("<image>"),
        patch_size=side // 2,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )


def _llava_onevision() -> Any:
    side = ANYRES_TILE_SIZE
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=square(side), image_grid_pinpoints=_pinpoints(side)),
        tokenizer=tiny_tokenizer("<image>"),
        video_processor=LlavaOnevisionVideoProcessor(size=square(side)),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=chatml("<image>", "<video>"),
    )


def _qwen(processor: Any, videos: Any) -> Any:
    sizes: dict[str, Any] = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    area = {"shortest_edge": 16 * 16, "longest_edge": 40 * 40}
    in_vision = "<|vision_start|>{}<|vision_end|>".format
    return processor(
        image_processor=Qwen2VLImageProcessor(size=dict(area), **sizes),
        tokenizer=tiny_tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
        video_processor=videos(
            size={"shortest_edge": 16 * 16, "longest_edge": 4 * 24 * 24},
            do_sample_frames=False,
            cap_pixels_per_frame=False,
            **sizes,
        ),
        chat_template=chatml(in_vision("<|image_pad|>"), in_vision("<|video_pad|>")),
    )


def _internvl() -> Any:
    tokens = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=square(42), crop_to_patches=True, min_patches=1, max_patches=3),
        tokenizer=tiny_tokenizer("<IMG_CONTEXT>", **tokens),
        video_processor=InternVLVideoProcessor(size=square(42)),
        image_seq_length=9,
        chat_template=chatml("<IMG_CONTEXT>\n", "<video>\n"),
    )


TINY_PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": lambda: _qwen(Qwen2VLProcessor, Qwen2VLVideoProcessor),
    "qwen2_5_vl": lambda: _qwen(Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
    "qwen3_vl": lambda: _qwen(Qwen3VLProcessor, Qwen3VLVideoProcessor),
    "qwen3_vl_moe": lambda: _qwen(Qwen3VLProcessor, Qwen3VLVideoProcessor),
    "internvl": _internvl,
    **{model_type: family.processor for model_type, family in MORE_FAMILIES.items()},
}
"""Processor builder of each family, by ``model_type``."""


def tiny_processor(model_type: str) -> Any:
    """The family's processor for :func:`dop_search.testing.models.tiny_model`.

    Raises:
        UnsupportedModelError: if there is no tiny processor of this family.
    """
    if model_type not in TINY_PROCESSORS:
        raise UnsupportedModelError(
            f"there is no tiny processor of the family {model_type!r}; there is one of {sorted(TINY_PROCESSORS)}"
        )
    return TINY_PROCESSORS[model_type]()


def drawn_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with a few coloured shapes on a gradient."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    ground = np.stack([rows * 255 // height, columns * 255 // width, np.full_like(rows, 96)], axis=-1)
    picture = Image.fromarray(ground.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(4):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        draw.ellipse([x - width // 6, y - height // 6, x + width // 6, y + height // 6], fill=colour)
    return picture


def drawn_video(num_frames: int, width: int, height: int, seed: int = 0) -> np.ndarray:
    """``[frames, height, width, 3]`` of :func:`drawn_image`."""
    return np.stack([np.asarray(drawn_image(width, height, 100 * seed + frame)) for frame in range(num_frames)])
