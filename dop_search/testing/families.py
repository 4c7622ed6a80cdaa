"""Tiny configurations and processors of the families that need no inputs of their own: their processor makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    DeepseekVLConfig,
    DeepseekVLImageProcessor,
    DeepseekVLProcessor,
    Idefics3Config,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LightOnOcrConfig,
    LightOnOcrProcessor,
    LlamaConfig,
    LlavaNextImageProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    LlavaProcessor,
    Mistral3Config,
    MistralConfig,
    Ovis2Config,
    Ovis2ImageProcessor,
    Ovis2Processor,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
    VipLlavaConfig,
)

from dop_search.testing.sizes import IMAGE_TOKEN_ID, PAD_TOKEN_ID, VIDEO_TOKEN_ID, TinySizes
from dop_search.testing.tokenizer import VICUNA, chatml, square, tiny_tokenizer

SIDE, PATCH = 28, 7
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}


@dataclass(frozen=True)
class TinyFamily:
    """What the kit needs of a family.

    Attributes:
        config: a tiny model's configuration.
        processor: the family's own processor with small sizes and the tiny tokenizer.
    """

    config: Callable[[TinySizes], PretrainedConfig]
    processor: Callable[[], Any]


# -- Idefics3, SmolVLM: 4 visual tokens per tile, up to 2 x 2 tiles and the whole image ---------------------------


def _idefics3(kind: Any) -> Callable[[TinySizes], PretrainedConfig]:
    return lambda sizes: kind(
        vision_config=dict(TOWER),
        text_config=LlamaConfig(**sizes.text()).to_dict(),
        image_token_id=IMAGE_TOKEN_ID,
        pad_token_id=PAD_TOKEN_ID,
        scale_factor=2,
    )


def _idefics3_processor(kind: Any, images: Any, **extra: Any) -> Any:
    return kind(
        image_processor=images(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}),
        tokenizer=tiny_tokenizer("<image>", fake_image_token="<img>", global_image_token="</img>"),
        image_seq_len=4,
        chat_template=chatml("<image>", ""),
        **extra,
    )


# -- Mistral Small 3, LightOnOCR: images of any size, a visual token per 2 x 2 patches ------------------------------


def _pixtral(kind: Any, text: Any) -> Callable[[TinySizes], PretrainedConfig]:
    def build(sizes: TinySizes) -> PretrainedConfig:
        decoder = text(**sizes.text(head_dim=sizes.hidden_size // sizes.num_attention_heads, sliding_window=None))
        config: PretrainedConfig = kind(
            vision_config=PixtralVisionConfig(**{**TOWER, "image_size": 2 * SIDE}).to_dict(),
            text_config=decoder.to_dict(),
            image_token_id=IMAGE_TOKEN_ID,
            spatial_merge_size=2,
        )
        return config

    return build


def _pixtral_processor(kind: Any, **extra: str) -> Any:
    return kind(
        image_processor=PixtralImageProcessor(size={"longest_edge": 2 * SIDE}, patch_size=square(2 * PATCH)),
        tokenizer=tiny_tokenizer("[IMG]", "[VID]", "[IMG_BREAK]", "[IMG_END]", **extra),
        patch_size=PATCH,
        spatial_merge_size=2,
        chat_template=chatml("[IMG]", ""),
    )


# -- the others ---------------------------------------------------------------------------------------------------

OVIS_TOKENS = ("<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>")


def _ovis2(sizes: TinySizes) -> PretrainedConfig:
    """Tiles of 2 x 2 visual tokens, each of 2 x 2 patches."""
    ids = tiny_tokenizer("<IMG_ATOM>", "<video>", "<IMG_START>", "<IMG_END>", OVIS_TOKENS).convert_tokens_to_ids
    vision = {**TOWER, "hidden_stride": 2, "vocab_size": 40, "num_visual_indicator_tokens": 5}
    return Ovis2Config(
        vision_config=vision,
        text_config=Qwen2Config(**sizes.text()).to_dict(),
        image_token_id=IMAGE_TOKEN_ID,
        visual_indicator_token_ids=ids(["<IMG_START>", *OVIS_TOKENS, "<IMG_END>"]),
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
    )


def _ovis2_processor() -> Any:
    return Ovis2Processor(
        image_processor=Ovis2ImageProcessor(size=square(SIDE), crop_to_patches=True, min_patches=1, max_patches=3),
        tokenizer=tiny_tokenizer("<IMG_ATOM>", "<video>", "<IMG_START>", "<IMG_END>", OVIS_TOKENS),
        image_seq_length=4,
        chat_template=chatml("<image>", ""),
    )


def _deepseek_vl(sizes: TinySizes) -> PretrainedConfig:
    """16 visual tokens per image."""
    return DeepseekVLConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False).to_dict(),
        text_config=LlamaConfig(**sizes.text()).to_dict(),
        image_token_id=IMAGE_TOKEN_ID,
    )


def _deepseek_vl_processor() -> Any:
    return DeepseekVLProcessor(
        image_processor=DeepseekVLImageProcessor(size=square(SIDE), min_size=PATCH),
        tokenizer=tiny_tokenizer("<image>"),
        num_image_tokens=16,
        chat_template=chatml("<image>", ""),
    )


def _vipllava(sizes: TinySizes) -> PretrainedConfig:
    """16 visual tokens per image from two layers of the tower."""
    return VipLlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER).to_dict(),
        text_config=LlamaConfig(**sizes.text()).to_dict(),
        image_token_index=IMAGE_TOKEN_ID,
        vision_feature_layer=[-2, 1],
    )


def _vipllava_processor() -> Any:
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square(SIDE)),
        tokenizer=tiny_tokenizer("<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )


PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


def _llava_next_video(sizes: TinySizes) -> PretrainedConfig:
    """Tiles of 2 x 2 visual tokens with newlines; of a video one token per frame."""
    return LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**{**TOWER, "patch_size": SIDE // 2}).to_dict(),
        text_config=LlamaConfig(**sizes.text()).to_dict(),
        image_token_index=IMAGE_TOKEN_ID,
        video_token_index=VIDEO_TOKEN_ID,
        image_grid_pinpoints=PINPOINTS,
    )


def _llava_next_video_processor() -> Any:
    crop: dict[str, Any] = {"size": {"shortest_edge": SIDE}, "crop_size": square(SIDE)}
    return LlavaNextVideoProcessor(
        image_processor=LlavaNextImageProcessor(**crop, image_grid_pinpoints=PINPOINTS),
        video_processor=LlavaNextVideoVideoProcessor(**crop),
        tokenizer=tiny_tokenizer("<image>"),
        patch_size=SIDE // 2,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chatml("<image>", "<video>"),
    )


MORE_FAMILIES: dict[str, TinyFamily] = {
    "idefics3": TinyFamily(
        _idefics3(Idefics3Config), lambda: _idefics3_processor(Idefics3Processor, Idefics3ImageProcessor)
    ),
    "smolvlm": TinyFamily(
        _idefics3(SmolVLMConfig),
        lambda: _idefics3_processor(SmolVLMProcessor, SmolVLMImageProcessor, video_processor=SmolVLMVideoProcessor()),
    ),
    "mistral3": TinyFamily(_pixtral(Mistral3Config, MistralConfig), lambda: _pixtral_processor(PixtralProcessor)),
    "lighton_ocr": TinyFamily(
        _pixtral(LightOnOcrConfig, Qwen3Config),
        lambda: _pixtral_processor(LightOnOcrProcessor, image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]"),
    ),
    "ovis2": TinyFamily(_ovis2, _ovis2_processor),
    "deepseek_vl": TinyFamily(_deepseek_vl, _deepseek_vl_processor),
    "vipllava": TinyFamily(_vipllava, _vipllava_processor),
    "llava_next_video": TinyFamily(_llava_next_video, _llava_next_video_processor),
}
"""By ``model_type``."""
