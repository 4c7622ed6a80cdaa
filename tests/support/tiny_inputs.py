"""Random inputs for the tiny models: no processor is needed for those whose pixels are easily made up."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dop_search.models.text import MARKERS_KEY
from dop_search.testing.inputs import NUM_IMAGE_SHAPES, Inputs, collate, context_sample, processed_sample
from dop_search.testing.sizes import ANYRES_TILE_SIZE, IMAGE_TOKEN_ID, NUM_SPECIAL_TOKENS
from support.tiny_families import tiny_processor

_QWEN_GRIDS = ((4, 4), (3, 6), (5, 3))
_ANYRES_SIZES = ((1, 2), (2, 1), (2, 2))
_INTERNVL_TILES = (2, 1, 2)
_processor_of = cache(tiny_processor)


def tiny_sample(
    model: PreTrainedModel,
    num_text_before: int = 3,
    num_text_after: int = 4,
    seed: int = 0,
    num_images: int = 1,
    image_shape: int = 0,
) -> Inputs:
    """One random prompt: text, images with two text tokens between any two, text.

    Args:
        model: a tiny model.
        num_text_before, num_text_after: text tokens before the first and after the last image.
        seed: of tokens and pixels.
        num_images: images in the prompt.
        image_shape: which of ``NUM_IMAGE_SHAPES`` sizes the images have, where the family allows it.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = [num_text_before, *[2] * (num_images - 1), num_text_after]
    vocabulary = model.config.get_text_config().vocab_size
    if hasattr(model.config, MARKERS_KEY):
        return context_sample(model, num_text_before, num_text_after, seed, num_images, image_shape)
    vision = _vision_inputs(model, num_images, image_shape % NUM_IMAGE_SHAPES, generator)
    if vision is None:
        processor = _processor_of(model.config.model_type)
        return processed_sample(model, processor, num_text_before, num_text_after, seed, num_images, image_shape)
    multimodal: Any = model  # `get_image_features` is declared by the families, not by PreTrainedModel
    with torch.no_grad():
        features = multimodal.get_image_features(**vision, return_dict=True).pooler_output
    # InternVL returns one entry per tile; its tiles of one image follow each other without a separator.
    per_entry = [len(feature) for feature in features]
    entries_per_image = len(per_entry) // num_images
    pieces: list[Tensor] = []
    for index, length in enumerate(blocks):
        pieces.append(torch.randint(NUM_SPECIAL_TOKENS, vocabulary, (length,), generator=generator))
        if index < num_images:
            count = sum(per_entry[index * entries_per_image : (index + 1) * entries_per_image])
            pieces.append(torch.full((count,), IMAGE_TOKEN_ID))
    input_ids = torch.cat(pieces)[None]
    sample = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **vision}
    if "image_grid_thw" in vision:
        sample["mm_token_type_ids"] = (input_ids == IMAGE_TOKEN_ID).int()
    return sample


def tiny_inputs(
    model: PreTrainedModel,
    text_lengths: Sequence[tuple[int, int]] = ((3, 4), (5, 7)),
    seed: int = 0,
    image_shapes: Sequence[int] | None = None,
) -> Inputs:
    """A left-padded batch with one sample per ``(text tokens before, text tokens after)`` the image.

    ``image_shapes`` gives each sample's choice in :func:`tiny_sample`; by default all have shape 0.
    """
    shapes = [0] * len(text_lengths) if image_shapes is None else list(image_shapes)
    return collate(
        [
            tiny_sample(model, before, after, seed=1000 * seed + index, image_shape=shape)
            for index, ((before, after), shape) in enumerate(zip(text_lengths, shapes, strict=True))
        ]
    )


def _vision_inputs(model: PreTrainedModel, num_images: int, shape: int, generator: torch.Generator) -> Inputs | None:
    """Keyword arguments of ``get_image_features`` with random pixels; ``None`` where a processor has to make them."""
    family, vision = model.config.model_type, model.config.vision_config
    dtype = model.dtype

    def pixels(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    if family == "llava":
        return {"pixel_values": pixels(num_images, 3, vision.image_size, vision.image_size)}
    if family == "internvl":
        side = vision.image_size[0]
        return {"pixel_values": pixels(num_images * _INTERNVL_TILES[shape], 3, side, side)}
    if family in ("llava_next", "llava_onevision"):
        rows, columns = _ANYRES_SIZES[shape]
        side = ANYRES_TILE_SIZE
        return {
            "pixel_values": pixels(num_images, 1 + rows * columns, 3, side, side),
            "image_sizes": torch.tensor([[rows * side, columns * side]] * num_images),
        }
    if family.startswith("qwen"):
        merge = vision.spatial_merge_size
        height, width = (merge * n for n in _QWEN_GRIDS[shape])
        channels = getattr(vision, "in_channels", 3)
        width_of_patch = channels * vision.temporal_patch_size * vision.patch_size**2
        return {
            "pixel_values": pixels(num_images * height * width, width_of_patch),
            "image_grid_thw": torch.tensor([[1, height, width]] * num_images),
        }
    return None
