"""Tiny configurations and real processors of every family, one entry each: nothing is downloaded.

Image and video processors are the family's own classes with small sizes; the tokenizer spells every character.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import transformers as hf

from dop_search.models.families import FAMILIES
from dop_search.testing.sizes import (
    ANYRES_TILE_SIZE,
    IMAGE_TOKEN_ID,
    PAD_TOKEN_ID,
    VIDEO_TOKEN_ID,
    VISION_END_TOKEN_ID,
    VISION_START_TOKEN_ID,
    TinySizes,
)
from dop_search.testing.tokenizer import VICUNA, chatml, square, tiny_tokenizer

SIDE, PATCH = ANYRES_TILE_SIZE, 7
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
Values = dict[str, Any]


@dataclass(frozen=True)
class TinyFamily:
    """What the kit needs of a family.

    Attributes:
        values: of a tiny model's configuration, besides those of its decoder and its tower.
        vision: those of its tower.
        processor: makes the family's own processor with small sizes and the tiny tokenizer.
        text: those of its decoder besides :meth:`TinySizes.text`.
        sized: both, where they depend on the sizes: of the decoder and of the tower.
        takes_videos: whether the processor takes ``videos=`` and the model has tokens of their own for them.
    """

    values: Values
    vision: Values
    processor: Callable[[], Any]
    text: Values = field(default_factory=dict)
    sized: Callable[[TinySizes], tuple[Values, Values]] = lambda sizes: ({}, {})
    takes_videos: bool = False

    def config(self, model_type: str, sizes: TinySizes) -> hf.PretrainedConfig:
        """The configuration of a tiny model."""
        text, vision = self.sized(sizes)
        return hf.AutoConfig.for_model(
            model_type,
            text_config={**sizes.text(), **self.text, **text},
            vision_config={**self.vision, **vision},
            **self.values,
        )


def _tower(kind: str, patch_size: int = PATCH, **values: Any) -> Values:
    """A tower of three layers; ``(28 / patch_size) ** 2`` patches per image or tile."""
    return {
        "model_type": kind,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": patch_size,
        **values,
    }


def _head_dim(sizes: TinySizes) -> tuple[Values, Values]:
    return {"head_dim": sizes.hidden_size // sizes.num_attention_heads}, {}


# -- LLaVA and its relatives: CLIP with a CLS token or SigLIP without; tiles with newlines --------------------------

_LLAMA, _QWEN2 = {"model_type": "llama"}, {"model_type": "qwen2"}
_IMAGE, _VIDEO = {"image_token_index": IMAGE_TOKEN_ID}, {"video_token_index": VIDEO_TOKEN_ID}
_CROP: Values = {"size": {"shortest_edge": SIDE}, "crop_size": square(SIDE)}


def _llava_processor(kind: Any, images: Any, patch_size: int = PATCH, template: str = VICUNA, **more: Any) -> Any:
    return kind(
        image_processor=images,
        tokenizer=tiny_tokenizer("<image>"),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
        **more,
    )


def _plain_llava_processor() -> Any:
    return _llava_processor(hf.LlavaProcessor, hf.CLIPImageProcessor(**_CROP))


def _llava_next_processor() -> Any:
    images = hf.LlavaNextImageProcessor(**_CROP, image_grid_pinpoints=PINPOINTS)
    return _llava_processor(hf.LlavaNextProcessor, images, SIDE // 2)


def _llava_next_video_processor() -> Any:
    return _llava_processor(
        hf.LlavaNextVideoProcessor,
        hf.LlavaNextImageProcessor(**_CROP, image_grid_pinpoints=PINPOINTS),
        SIDE // 2,
        chatml("<image>", "<video>"),
        video_processor=hf.LlavaNextVideoVideoProcessor(**_CROP),
    )


def _video_llava_processor() -> Any:
    return _llava_processor(
        hf.VideoLlavaProcessor,
        hf.VideoLlavaImageProcessor(**_CROP),
        template=chatml("<image>", "<video>"),
        video_processor=hf.VideoLlavaVideoProcessor(**_CROP),
    )


def _llava_onevision_processor() -> Any:
    return hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(size=square(SIDE), image_grid_pinpoints=PINPOINTS),
        tokenizer=tiny_tokenizer("<image>"),
        video_processor=hf.LlavaOnevisionVideoProcessor(size=square(SIDE)),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=chatml("<image>", "<video>"),
    )


# -- Qwen-VL: any grid of merged 2 x 2 patches, M-RoPE --------------------------------------------------------------

_QWEN_TOKENS = {
    "image_token_id": IMAGE_TOKEN_ID,
    "video_token_id": VIDEO_TOKEN_ID,
    "vision_start_token_id": VISION_START_TOKEN_ID,
    "vision_end_token_id": VISION_END_TOKEN_ID,
}


def _qwen_vision(**values: Any) -> Values:
    return {"hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, **values}


def _mrope(width: str, head_dim: bool = False) -> Callable[[TinySizes], tuple[Values, Values]]:
    """Rotary sections of the decoder, and the tower's name for the decoder's width."""

    def sized(sizes: TinySizes) -> tuple[Values, Values]:
        half = sizes.hidden_size // sizes.num_attention_heads // 2
        sections = [half - 2 * (half // 3), half // 3, half // 3]
        text: Values = {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections},
            **(_head_dim(sizes)[0] if head_dim else {}),
        }
        return text, {width: sizes.hidden_size}

    return sized


def _qwen(processor: Any, videos: Any) -> Any:
    sizes: Values = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    in_vision = "<|vision_start|>{}<|vision_end|>".format
    return processor(
        image_processor=hf.Qwen2VLImageProcessor(size={"shortest_edge": 16 * 16, "longest_edge": 40 * 40}, **sizes),
        tokenizer=tiny_tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
        video_processor=videos(
            size={"shortest_edge": 16 * 16, "longest_edge": 4 * 24 * 24},
            do_sample_frames=False,
            cap_pixels_per_frame=False,
            **sizes,
        ),
        chat_template=chatml(in_vision("<|image_pad|>"), in_vision("<|video_pad|>")),
    )


_GLM_TOKENS = ("<|begin_of_video|>", "<|end_of_video|>")


def _glm_tokenizer() -> Any:
    return tiny_tokenizer("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>", _GLM_TOKENS)


def _glm(kind: Any, images: Any, videos: Any) -> Any:
    sizes: Values = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    return kind(
        image_processor=images(size={"shortest_edge": 2 * 16 * 16, "longest_edge": 2 * 40 * 40}, **sizes),
        tokenizer=_glm_tokenizer(),
        video_processor=videos(
            size={"shortest_edge": 2 * 16 * 16, "longest_edge": 4 * 24 * 24}, do_sample_frames=False, **sizes
        ),
        chat_template=chatml(
            "<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>"
        ),
    )


def _glm_family(processor: Callable[[], Any], **vision: Any) -> TinyFamily:
    start, end = _glm_tokenizer().convert_tokens_to_ids(list(_GLM_TOKENS))
    return TinyFamily(
        {
            "image_token_id": IMAGE_TOKEN_ID,
            "video_token_id": VIDEO_TOKEN_ID,
            "image_start_token_id": VISION_START_TOKEN_ID,
            "image_end_token_id": VISION_END_TOKEN_ID,
            "video_start_token_id": start,
            "video_end_token_id": end,
        },
        _qwen_vision(depth=2, image_size=32, **vision),
        processor,
        sized=_mrope("out_hidden_size"),
        takes_videos=True,
    )


_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_DELTA_NETS = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 10,
}


def _qwen3_5_sizes(sizes: TinySizes) -> tuple[Values, Values]:
    """Half of each head is rotated."""
    text, vision = _mrope("out_hidden_size")(sizes)
    head_dim, types = 2 * sizes.hidden_size // sizes.num_attention_heads, ["linear_attention", "full_attention"]
    text["rope_parameters"] |= {"partial_rotary_factor": 0.5}
    text |= {"head_dim": head_dim, "layer_types": (types * sizes.num_hidden_layers)[: sizes.num_hidden_layers]}
    return text, vision


# -- Idefics3, SmolVLM: 4 visual tokens per tile, up to 2 x 2 tiles and the whole image -----------------------------

_IDEFICS = {"image_token_id": IMAGE_TOKEN_ID, "pad_token_id": PAD_TOKEN_ID, "scale_factor": 2}


def _idefics3_processor(kind: Any, images: Any, **extra: Any) -> Any:
    return kind(
        image_processor=images(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}),
        tokenizer=tiny_tokenizer("<image>", fake_image_token="<img>", global_image_token="</img>"),
        image_seq_len=4,
        chat_template=chatml("<image>", ""),
        **extra,
    )


# -- Mistral Small 3, LightOnOCR: images of any size, a visual token per 2 x 2 patches ------------------------------

_PIXTRAL = {"image_token_id": IMAGE_TOKEN_ID, "spatial_merge_size": 2}


def _pixtral_processor(kind: Any, **extra: str) -> Any:
    return kind(
        image_processor=hf.PixtralImageProcessor(size={"longest_edge": 2 * SIDE}, patch_size=square(2 * PATCH)),
        tokenizer=tiny_tokenizer("[IMG]", "[VID]", "[IMG_BREAK]", "[IMG_END]", **extra),
        patch_size=PATCH,
        spatial_merge_size=2,
        chat_template=chatml("[IMG]", ""),
    )


# -- MiniCPM-V: an image and its slices, 4 x 4 patches per visual token, the tower joins 2 x 2 of them ----------------

_SLICE_TOKENS = ("<slice>", "</slice>", "<image_id>", "</image_id>")


def _minicpmv_tokenizer() -> Any:
    names = ("slice_start_token", "slice_end_token", "image_id_start_token", "image_id_end_token")
    return tiny_tokenizer(
        "<|image_pad|>",
        "<|video_pad|>",
        "<image>",
        "</image>",
        _SLICE_TOKENS,
        image_start_token="<image>",
        image_end_token="</image>",
        **dict(zip(names, _SLICE_TOKENS, strict=True)),
    )


def _minicpmv_processor(kind: Any, images: Any, videos: Any, **values: Any) -> Any:
    sizes: Values = {"patch_size": 4, "scale_resolution": 32, **values}
    return kind(
        image_processor=images(max_slice_nums=2, **sizes),
        video_processor=videos(max_slice_nums=1, do_sample_frames=False, **sizes),
        tokenizer=_minicpmv_tokenizer(),
        chat_template=chatml("<|image_pad|>", "<|video_pad|>"),
    )


def _minicpmv_family(processor: Callable[[], Any], **values: Any) -> TinyFamily:
    return TinyFamily(
        {"image_token_id": IMAGE_TOKEN_ID, "video_token_id": VIDEO_TOKEN_ID, "insert_layer_id": 1, **values},
        {**_tower("minicpmv4_6_vision", patch_size=4), "image_size": 32},
        processor,
        _DELTA_NETS,
        lambda sizes: (_qwen3_5_sizes(sizes)[0], {}),
        takes_videos=True,
    )


def _minicpmv_markers() -> Values:
    names = ("image_start_id", "image_end_id", "slice_start_id", "slice_end_id", "newline_id")
    return dict(
        zip(
            names,
            _minicpmv_tokenizer().convert_tokens_to_ids(["<image>", "</image>", *_SLICE_TOKENS[:2], "\n"]),
            strict=True,
        )
    )


# -- LFM2-VL: tiles of 2 x 2 visual tokens and the whole image, padded to the largest -------------------------------


def _lfm2_sizes(sizes: TinySizes) -> tuple[Values, Values]:
    types = ["conv", "full_attention"] * sizes.num_hidden_layers
    return {"layer_types": types[: sizes.num_hidden_layers], "block_multiple_of": 8, "block_ff_dim": 66}, {}


def _lfm2_vl_processor() -> Any:
    tiles = ("<|img_row_1_col_1|>", "<|img_row_1_col_2|>", "<|img_row_2_col_1|>", "<|img_thumbnail|>")
    return hf.Lfm2VlProcessor(
        image_processor=hf.Lfm2VlImageProcessor(
            tile_size=SIDE,
            encoder_patch_size=PATCH,
            min_image_tokens=4,
            max_image_tokens=8,
            max_tiles=2,
            max_pixels_tolerance=1.0,
        ),
        tokenizer=tiny_tokenizer("<image>", "<video>", "<|image_start|>", "<|image_end|>", tiles),
        chat_template=chatml("<image>", ""),
    )


# -- Gemma 3: 16 visual tokens of 2 x 2 patches, more than the window of every other layer --------------------------


def _gemma3_sizes(sizes: TinySizes) -> tuple[Values, Values]:
    types = ["sliding_attention", "full_attention"] * sizes.num_hidden_layers
    return {**_head_dim(sizes)[0], "layer_types": types[: sizes.num_hidden_layers]}, {}


def _gemma3_processor() -> Any:
    start, end = "<start_of_image>", "<end_of_image>"
    return hf.Gemma3Processor(
        image_processor=hf.Gemma3ImageProcessor(size=square(2 * SIDE)),
        tokenizer=tiny_tokenizer("<image_soft_token>", start=start, end=end, boi_token=start, eoi_token=end),
        image_seq_length=16,
        chat_template=chatml(start, ""),
    )


# -- Gemma 4: up to 70 visual tokens of 2 x 2 patches; layers that see everything have one wide head of keys ---------


def _gemma4_sizes(sizes: TinySizes) -> tuple[Values, Values]:
    text, width = _gemma3_sizes(sizes)[0], sizes.hidden_size // sizes.num_attention_heads
    return {**text, "global_head_dim": 2 * width, "num_global_key_value_heads": 1}, {}


def _gemma4_processor() -> Any:
    start, end = "<|image>", "<image|>"
    audio = {"audio_token": "<unk>", "boa_token": "<unk>", "eoa_token": "<unk>"}
    return hf.Gemma4Processor(
        feature_extractor=hf.Gemma4AudioFeatureExtractor(),
        image_processor=hf.Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70, pooling_kernel_size=2),
        tokenizer=tiny_tokenizer(
            "<|image|>", "<|video|>", start=start, end=end, boi_token=start, eoi_token=end, **audio
        ),
        video_processor=hf.Gemma4VideoProcessor(patch_size=4, pooling_kernel_size=2, do_sample_frames=False),
        chat_template=chatml("<|image|>", "<|video|>"),
    )


# -- tiles of one size ----------------------------------------------------------------------------------------------

_OVIS_TOKENS = ("<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>")


def _ovis2_tokenizer() -> Any:
    return tiny_tokenizer("<IMG_ATOM>", "<video>", "<IMG_START>", "<IMG_END>", _OVIS_TOKENS)


def _ovis2_processor() -> Any:
    return hf.Ovis2Processor(
        image_processor=hf.Ovis2ImageProcessor(size=square(SIDE), crop_to_patches=True, min_patches=1, max_patches=3),
        tokenizer=_ovis2_tokenizer(),
        image_seq_length=4,
        chat_template=chatml("<image>", ""),
    )


_SAM: Values = {
    "hidden_size": 16,
    "output_channels": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 2 * SIDE,
    "patch_size": PATCH,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 32,
}


def _deepseek_vl_processor(kind: Any, images: Any, **more: Any) -> Any:
    return kind(
        image_processor=images(size=square(SIDE), min_size=PATCH, **more),
        tokenizer=tiny_tokenizer("<image>"),
        num_image_tokens=16,
        chat_template=chatml("<image>", ""),
    )


def _tiles_processor(kind: Any, prefix: str, video: str = "", **more: Any) -> Any:
    tokens = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    return kind(
        image_processor=hf.GotOcr2ImageProcessor(size=square(42), crop_to_patches=True, min_patches=1, max_patches=3),
        tokenizer=tiny_tokenizer("<IMG_CONTEXT>", **tokens),
        image_seq_length=9,
        chat_template=chatml(prefix, video),
        **more,
    )


def _internvl_processor() -> Any:
    video = hf.InternVLVideoProcessor(size=square(42))
    return _tiles_processor(hf.InternVLProcessor, "<IMG_CONTEXT>\n", "<video>\n", video_processor=video)


def _qianfan_ocr_processor() -> Any:
    return _tiles_processor(hf.QianfanOCRProcessor, "<image>\n")


def _video_llama_3_processor() -> Any:
    return hf.VideoLlama3Processor(
        image_processor=hf.VideoLlama3ImageProcessor(
            size={"shortest_edge": 16 * 16, "longest_edge": 40 * 40}, patch_size=4, merge_size=2
        ),
        tokenizer=tiny_tokenizer("<|image_pad|>", "<|video_pad|>"),
        video_processor=hf.VideoLlama3VideoProcessor(),
        chat_template=chatml("<|image_pad|>", ""),
    )


# -- towers that show no attention ----------------------------------------------------------------------------------


def _fast_vlm_processor() -> Any:
    return hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessor(size={"shortest_edge": 256}, crop_size=square(256)),
        tokenizer=tiny_tokenizer("<image>"),
        patch_size=64,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=VICUNA,
    )


def _perception_lm_processor() -> Any:
    return hf.PerceptionLMProcessor(
        image_processor=hf.PerceptionLMImageProcessor(tile_size=SIDE, max_num_tiles=1, vision_input_type="thumb+tile"),
        video_processor=hf.PerceptionLMVideoProcessor(size=square(SIDE)),
        tokenizer=tiny_tokenizer("<|image|>", "<|video|>"),
        patch_size=PATCH,
        pooling_ratio=2,
        chat_template=chatml("<|image|>", "<|video|>"),
    )


def _aria_processor() -> Any:
    return hf.AriaProcessor(
        image_processor=hf.AriaImageProcessor(max_image_size=490, min_image_size=336),
        tokenizer=tiny_tokenizer("<image>"),
        chat_template=chatml("<image>", ""),
        size_conversion={490: 6, 980: 9},
    )


def _janus_processor() -> Any:
    return hf.JanusProcessor(
        image_processor=hf.JanusImageProcessor(size=square(SIDE), min_size=PATCH),
        tokenizer=tiny_tokenizer("<image>", boi_token="<img>", eoi_token="</img>"),
        num_image_tokens=16,
        chat_template=chatml("<image>", ""),
    )


_JANUS_DRAWING = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "latent_channels": 32}
_DEEPSTACK = _qwen_vision(depth=3, num_position_embeddings=64, deepstack_visual_indexes=[0, 1])

TINY_FAMILIES: dict[str, TinyFamily] = {
    "llava": TinyFamily(_IMAGE, _tower("clip_vision_model"), _plain_llava_processor, _LLAMA),
    "llava_next": TinyFamily(
        {**_IMAGE, "image_grid_pinpoints": PINPOINTS},
        _tower("clip_vision_model", SIDE // 2),
        _llava_next_processor,
        _LLAMA,
    ),
    "llava_onevision": TinyFamily(
        {**_IMAGE, **_VIDEO, "image_grid_pinpoints": PINPOINTS},
        _tower("siglip_vision_model", SIDE // 2, vision_use_head=False),
        _llava_onevision_processor,
        _QWEN2,
        takes_videos=True,
    ),
    "qwen2_vl": TinyFamily(
        _QWEN_TOKENS,
        {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 4},
        lambda: _qwen(hf.Qwen2VLProcessor, hf.Qwen2VLVideoProcessor),
        sized=_mrope("hidden_size"),
        takes_videos=True,
    ),
    "qwen2_5_vl": TinyFamily(  # windowed attention in the tower, whose features the model permutes back
        _QWEN_TOKENS,
        _qwen_vision(depth=2, window_size=16, fullatt_block_indexes=[1]),
        lambda: _qwen(hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor),
        sized=_mrope("out_hidden_size"),
        takes_videos=True,
    ),
    "qwen3_vl": TinyFamily(  # features of two tower layers are added after decoder layers 0 and 1
        _QWEN_TOKENS,
        _DEEPSTACK,
        lambda: _qwen(hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor),
        sized=_mrope("out_hidden_size", head_dim=True),
        takes_videos=True,
    ),
    "qwen3_5": TinyFamily(  # every other layer is recurrent, with two value heads per key head
        _QWEN_TOKENS,
        _qwen_vision(depth=3, num_position_embeddings=64),
        lambda: _qwen(hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor),
        _DELTA_NETS,
        sized=_qwen3_5_sizes,
        takes_videos=True,
    ),
    "qwen3_5_moe": TinyFamily(
        _QWEN_TOKENS,
        _qwen_vision(depth=3, num_position_embeddings=64),
        lambda: _qwen(hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor),
        {**_DELTA_NETS, **_EXPERTS, "shared_expert_intermediate_size": 16},
        _qwen3_5_sizes,
        takes_videos=True,
    ),
    "internvl": TinyFamily(  # tiles of 3 x 3 visual tokens after pixel shuffle
        {"image_token_id": IMAGE_TOKEN_ID},
        _tower("internvl_vision", num_hidden_layers=2, image_size=42),
        _internvl_processor,
        _QWEN2,
        takes_videos=True,
    ),
    "qwen3_vl_moe": TinyFamily(  # two of five experts in each layer
        _QWEN_TOKENS,
        _DEEPSTACK,
        lambda: _qwen(hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor),
        _EXPERTS,
        _mrope("out_hidden_size", head_dim=True),
        takes_videos=True,
    ),
    "glm46v": _glm_family(lambda: _glm(hf.Glm46VProcessor, hf.Glm46VImageProcessor, hf.Glm46VVideoProcessor)),
    "glm4v": _glm_family(lambda: _glm(hf.Glm4vProcessor, hf.Glm4vImageProcessor, hf.Glm4vVideoProcessor)),
    "glmga": _glm_family(lambda: _glm(hf.Glm46VProcessor, hf.GlmgaImageProcessor, hf.GlmgaVideoProcessor)),
    "glm_ocr": _glm_family(
        lambda: _glm(hf.Glm46VProcessor, hf.Glm46VImageProcessor, hf.Glm46VVideoProcessor), attention_bias=True
    ),
    "minicpmv4_6": _minicpmv_family(
        lambda: _minicpmv_processor(hf.MiniCPMV4_6Processor, hf.MiniCPMV4_6ImageProcessor, hf.MiniCPMV4_6VideoProcessor)
    ),
    "minicpmv4_7": _minicpmv_family(
        lambda: _minicpmv_processor(
            hf.MiniCPMV4_7Processor, hf.MiniCPMV4_6ImageProcessor, hf.MiniCPMV4_6VideoProcessor
        ),
        **_minicpmv_markers(),
    ),
    "minicpm_ocr": _minicpmv_family(  # 2 x 2 patches per visual token
        lambda: _minicpmv_processor(
            hf.MiniCPMOcrProcessor, hf.MiniCPMOcrImageProcessor, hf.MiniCPMOcrVideoProcessor, scale_resolution=24
        )
    ),
    "lfm2_vl": TinyFamily(  # every other layer is a short convolution
        {"image_token_id": IMAGE_TOKEN_ID, "projector_hidden_size": 24},
        {**_tower("siglip2_vision_model"), "num_patches": 16, "vision_use_head": False},
        _lfm2_vl_processor,
        sized=_lfm2_sizes,
    ),
    "idefics3": TinyFamily(
        _IDEFICS,
        _tower("idefics3_vision"),
        lambda: _idefics3_processor(hf.Idefics3Processor, hf.Idefics3ImageProcessor),
        _LLAMA,
    ),
    "smolvlm": TinyFamily(
        _IDEFICS,
        _tower("smolvlm_vision"),
        lambda: _idefics3_processor(
            hf.SmolVLMProcessor, hf.SmolVLMImageProcessor, video_processor=hf.SmolVLMVideoProcessor()
        ),
        _LLAMA,
    ),
    "mistral3": TinyFamily(
        _PIXTRAL,
        _tower("pixtral", image_size=2 * SIDE),
        lambda: _pixtral_processor(hf.PixtralProcessor),
        {"model_type": "mistral", "sliding_window": None},
        _head_dim,
    ),
    "lighton_ocr": TinyFamily(
        _PIXTRAL,
        _tower("pixtral", image_size=2 * SIDE),
        lambda: _pixtral_processor(
            hf.LightOnOcrProcessor, image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]"
        ),
        {"model_type": "qwen3", "sliding_window": None},
        _head_dim,
    ),
    "ovis2": TinyFamily(  # tiles of 2 x 2 visual tokens, each of 2 x 2 patches
        {
            "image_token_id": IMAGE_TOKEN_ID,
            "visual_indicator_token_ids": _ovis2_tokenizer().convert_tokens_to_ids(
                ["<IMG_START>", *_OVIS_TOKENS, "<IMG_END>"]
            ),
            "vocab_size": TinySizes().vocab_size,
            "hidden_size": TinySizes().hidden_size,
        },
        _tower("ovis2_vision", hidden_stride=2, vocab_size=40, num_visual_indicator_tokens=5),
        _ovis2_processor,
        _QWEN2,
    ),
    "video_llava": TinyFamily({**_IMAGE, **_VIDEO}, _tower("clip_vision_model"), _video_llava_processor, _LLAMA),
    "qianfan_ocr": TinyFamily(
        {"image_token_id": IMAGE_TOKEN_ID},
        _tower("qianfan_ocr_vision", num_hidden_layers=2, image_size=42),
        _qianfan_ocr_processor,
        {"model_type": "qwen3"},
        _head_dim,
    ),
    "video_llama_3": TinyFamily(
        {"image_token_id": IMAGE_TOKEN_ID, "video_token_id": VIDEO_TOKEN_ID},
        {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4},
        _video_llama_3_processor,
        _QWEN2,
    ),
    "gemma3": TinyFamily(
        {"image_token_id": IMAGE_TOKEN_ID, "mm_tokens_per_image": 16},
        _tower("siglip_vision_model", image_size=2 * SIDE, vision_use_head=False),
        _gemma3_processor,
        {"model_type": "gemma3_text", "sliding_window": 12, "query_pre_attn_scalar": 6},
        _gemma3_sizes,
    ),
    "gemma4": TinyFamily(  # two of five experts beside each MLP
        {
            "image_token_id": IMAGE_TOKEN_ID,
            "video_token_id": VIDEO_TOKEN_ID,
            "audio_config": None,
            "tie_word_embeddings": False,  # otherwise every token predicts itself
        },
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 80,
        },
        _gemma4_processor,
        {
            "sliding_window": 40,
            "hidden_size_per_layer_input": 0,
            "use_bidirectional_attention": "vision",
            "attention_k_eq_v": True,
            "final_logit_softcapping": 30.0,
            "enable_moe_block": True,
            "num_experts": 5,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
        },
        _gemma4_sizes,
        takes_videos=True,
    ),
    "deepseek_vl": TinyFamily(
        {"image_token_id": IMAGE_TOKEN_ID},
        _tower("siglip_vision_model", vision_use_head=False),
        lambda: _deepseek_vl_processor(hf.DeepseekVLProcessor, hf.DeepseekVLImageProcessor),
        _LLAMA,
    ),
    "deepseek_vl_hybrid": TinyFamily(
        {"image_token_id": IMAGE_TOKEN_ID, "high_res_vision_config": _SAM},
        _tower("siglip_vision_model", vision_use_head=False),
        lambda: _deepseek_vl_processor(
            hf.DeepseekVLHybridProcessor, hf.DeepseekVLHybridImageProcessor, high_res_size=square(2 * SIDE)
        ),
        _LLAMA,
    ),
    "janus": TinyFamily(
        {
            "image_token_id": IMAGE_TOKEN_ID,
            "vq_config": {
                **_JANUS_DRAWING,
                "num_embeddings": 8,
                "projection_dim": 16,
                "image_token_embed_dim": 16,
            },
        },
        {**_tower("janus_vision_model"), "mlp_ratio": 2, "projection_dim": 32},
        _janus_processor,
        _LLAMA,
    ),
    "cosmos3_omni": TinyFamily(
        _QWEN_TOKENS,
        _DEEPSTACK,
        lambda: _qwen(hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor),
        sized=_mrope("out_hidden_size", head_dim=True),
        takes_videos=True,
    ),
    "fast_vlm": TinyFamily(
        {**_IMAGE, "image_seq_length": 16},
        {
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "global_pool": "avg",
            "hidden_size": 64,
            "model_args": {"inference_mode": True, "layers": [1] * 5, "embed_dims": [8, 8, 8, 32, 32]},
        },
        _fast_vlm_processor,
        _QWEN2,
    ),
    "perception_lm": TinyFamily(
        {"image_token_id": IMAGE_TOKEN_ID, "video_token_id": VIDEO_TOKEN_ID, "projector_pooling_ratio": 2},
        {
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_tiny_patch16_384",
            "do_pooling": False,
            "model_args": {
                "embed_dim": 16,
                "depth": 2,
                "num_heads": 2,
                "img_size": [SIDE, SIDE],
                "patch_size": PATCH,
                "global_pool": "",
                "use_post_transformer_norm": False,
            },
        },
        _perception_lm_processor,
        _LLAMA,
        takes_videos=True,
    ),
    "aria": TinyFamily(
        {**_IMAGE, "projector_patch_to_query_dict": {25: 6, 100: 9}},
        _tower("idefics3_vision", patch_size=98, image_size=980),
        _aria_processor,
        {"moe_num_experts": 5, "moe_topk": 2, "moe_num_shared_experts": 2},
        _head_dim,
    ),
    "vipllava": TinyFamily(  # reads two layers of the tower
        {**_IMAGE, "vision_feature_layer": [-2, 1]}, _tower("clip_vision_model"), _plain_llava_processor, _LLAMA
    ),
    "llava_next_video": TinyFamily(  # of a video one token per frame
        {**_IMAGE, **_VIDEO, "image_grid_pinpoints": PINPOINTS},
        _tower("clip_vision_model", SIDE // 2),
        _llava_next_video_processor,
        _LLAMA,
        takes_videos=True,
    ),
}

FIRST_OF_ADAPTERS = tuple({FAMILIES[name]: name for name in reversed(TINY_FAMILIES)}.values())[::-1]
"""Of families that share an adapter, and with it a decoder, the first."""
"""By ``model_type``."""


def tiny_processor(model_type: str) -> Any:
    """The family's processor for :func:`support.tiny_models.tiny_model`."""
    return TINY_FAMILIES[model_type].processor()
