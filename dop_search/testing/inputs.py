"""Random inputs for tiny models: one sample, and left-padded batches of samples. No processor is needed.

A sample is the dictionary of keyword arguments of ``model(**sample)`` with a batch dimension of 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from dop_search.models.prompts import chat_prompt
from dop_search.models.text import MARKERS_KEY
from dop_search.testing.processors import drawn_image, tiny_processor
from dop_search.testing.reference import decoder_of, visual_positions, visual_token_ids
from dop_search.testing.sizes import ANYRES_TILE_SIZE, IMAGE_TOKEN_ID, NUM_SPECIAL_TOKENS, PAD_TOKEN_ID

Inputs = dict[str, Tensor]

_LEFT_PADDED = {"input_ids": PAD_TOKEN_ID, "attention_mask": 0, "mm_token_type_ids": 0, "token_type_ids": 0}
_DRAWN_SIZES = ((40, 28), (30, 60), (56, 50))
_QWEN_GRIDS = ((4, 4), (3, 6), (5, 3))
_ANYRES_SIZES = ((1, 2), (2, 1), (2, 2))
_INTERNVL_TILES = (2, 1, 2)
_CONTEXT_LENGTHS = (14, 16, 20)
NUM_IMAGE_SHAPES = 3
"""Image shapes that :func:`tiny_sample` knows; families of fixed resolution ignore the choice."""


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
        model: a model of :func:`dop_search.testing.models.tiny_model`.
        num_text_before, num_text_after: text tokens before the first and after the last image.
        seed: of tokens and pixels.
        num_images: images in the prompt.
        image_shape: which of ``NUM_IMAGE_SHAPES`` sizes the images have, where the family allows it.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = [num_text_before, *[2] * (num_images - 1), num_text_after]
    vocabulary = model.config.get_text_config().vocab_size
    if (markers := getattr(model.config, MARKERS_KEY, None)) is not None:
        return _context_sample(blocks, _CONTEXT_LENGTHS[image_shape % NUM_IMAGE_SHAPES], markers, vocabulary, generator)
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


_processor_of = cache(tiny_processor)


def processed_sample(
    model: PreTrainedModel,
    processor: Any,
    num_text_before: int = 3,
    num_text_after: int = 4,
    seed: int = 0,
    num_images: int = 1,
    image_shape: int = 0,
) -> Inputs:
    """As :func:`tiny_sample`, for any family: a processor prepares drawn images, and random text stands around them.

    What the processor writes between visual tokens (ends of rows, names of tiles) stays.
    """
    size = _DRAWN_SIZES[image_shape % NUM_IMAGE_SHAPES]
    images = [drawn_image(*size, seed=10 * seed + index) for index in range(num_images)]
    prompt = chat_prompt(processor, "?", num_images)
    batch = dict(processor(text=[prompt], images=[images], return_tensors="pt"))
    visual = visual_positions(model, batch["input_ids"])[0].nonzero()[:, 0]
    first, end = int(visual[0]), int(visual[-1]) + 1
    blocks = [
        random_text(model, length, seed + 1000 * part) for part, length in enumerate((num_text_before, num_text_after))
    ]
    sample: Inputs = {}
    for name, value in batch.items():
        if name in _LEFT_PADDED:
            text = (
                blocks if name == "input_ids" else [torch.full_like(b, int(name == "attention_mask")) for b in blocks]
            )
            value = torch.cat([text[0], value[0, first:end], text[1]])[None]
        sample[name] = value.to(model.dtype) if value.is_floating_point() else value
    return sample


def random_text(model: PreTrainedModel, length: int, seed: int) -> Tensor:
    """Random tokens ``[length]``, none of them a placeholder."""
    vocabulary = torch.arange(NUM_SPECIAL_TOKENS, model.config.get_text_config().vocab_size)
    vocabulary = vocabulary[~torch.isin(vocabulary, torch.tensor(visual_token_ids(model)))]
    generator = torch.Generator().manual_seed(seed)
    return vocabulary[torch.randint(len(vocabulary), (length,), generator=generator)]


def _context_sample(
    blocks: Sequence[int], count: int, markers: Sequence[Sequence[int]], vocabulary: int, generator: torch.Generator
) -> Inputs:
    """Text with contexts of ``count`` tokens in the place of images; the markers are text as well."""
    opening, closing = (torch.tensor(marker) for marker in markers)
    pieces: list[Tensor] = []
    for index, length in enumerate(blocks):
        pieces.append(torch.randint(NUM_SPECIAL_TOKENS, vocabulary, (length,), generator=generator))
        if index + 1 < len(blocks):
            inside = torch.randint(NUM_SPECIAL_TOKENS, vocabulary, (count,), generator=generator)
            pieces += [opening, inside, closing]
    input_ids = torch.cat(pieces)[None]
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def collate(samples: Sequence[Inputs]) -> Inputs:
    """One batch of several samples: tokens padded on the left, pixels stacked."""
    batch: Inputs = {}
    for name in samples[0]:
        tensors = [sample[name] for sample in samples]
        if name in _LEFT_PADDED:
            longest = max(tensor.shape[1] for tensor in tensors)
            value = _LEFT_PADDED[name]
            tensors = [pad(tensor, (longest - tensor.shape[1], 0), value=value) for tensor in tensors]
        else:  # samples differ in tiles, or in the size of images
            shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
            tensors = [_fill(tensor, shape) for tensor in tensors]
        batch[name] = torch.cat(tensors)
    return batch


def pack_rows(model: PreTrainedModel, samples: Sequence[Inputs]) -> Inputs:
    """Samples after each other in one row, without padding and without a mask: their positions restart.

    Families with multimodal positions take those of the text in front of theirs, as transformers asks for.
    """
    positions: list[Tensor] = []

    def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        length = tokens.shape[1]
        text, given = torch.arange(length)[None], kwargs.get("position_ids")
        positions.append(text if given is None or given.ndim == 2 else torch.cat([text[None], given[-3:]]))

    hook = decoder_of(model).register_forward_pre_hook(see, with_kwargs=True)
    try:
        for sample in samples:
            with torch.no_grad():
                model(**sample)
    finally:
        hook.remove()
    packed = {name: value for name, value in collate(samples).items() if name not in _LEFT_PADDED}
    input_ids = torch.cat([sample["input_ids"] for sample in samples], dim=1)
    return {**packed, "input_ids": input_ids, "position_ids": torch.cat(positions, dim=-1)}


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


def _fill(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros at the end of every axis but the first."""
    more = [part for size, has in zip(shape, tensor.shape[1:], strict=True) for part in (size - has, 0)]
    return pad(tensor, more[::-1])


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
    if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"):
        merge = vision.spatial_merge_size
        height, width = (merge * n for n in _QWEN_GRIDS[shape])
        channels = getattr(vision, "in_channels", 3)
        width_of_patch = channels * vision.temporal_patch_size * vision.patch_size**2
        return {
            "pixel_values": pixels(num_images * height * width, width_of_patch),
            "image_grid_thw": torch.tensor([[1, height, width]] * num_images),
        }
    return None
