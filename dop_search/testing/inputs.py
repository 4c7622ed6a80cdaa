"""Random inputs for small models: one sample, left-padded batches of samples, and packed rows.

A sample is the dictionary of keyword arguments of ``model(**sample)`` with a batch dimension of 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from dop_search.models import adapter_for
from dop_search.models.prompts import chat_prompt
from dop_search.models.text import MARKERS_KEY
from dop_search.testing.processors import drawn_image
from dop_search.testing.reference import decoder_of, visual_positions, visual_token_ids
from dop_search.testing.sizes import NUM_SPECIAL_TOKENS, PAD_TOKEN_ID

Inputs = dict[str, Tensor]

_LEFT_PADDED = {"input_ids": PAD_TOKEN_ID, "attention_mask": 0, "mm_token_type_ids": 0, "token_type_ids": 0}
_DRAWN_SIZES = ((40, 28), (30, 60), (56, 50))
_CONTEXT_LENGTHS = (14, 16, 20)
NUM_IMAGE_SHAPES = 3
"""Image shapes that there are; families of fixed resolution ignore the choice."""


def processed_sample(
    model: PreTrainedModel,
    processor: Any,
    num_text_before: int = 3,
    num_text_after: int = 4,
    seed: int = 0,
    num_images: int = 1,
    image_shape: int = 0,
) -> Inputs:
    """One prompt: random text, drawn images as a processor prepares them, random text.

    What the processor writes between visual tokens (ends of rows, names of tiles) stays.

    Args:
        model: of any family.
        processor: the family's.
        num_text_before, num_text_after: text tokens before the first and after the last image.
        seed: of tokens and pictures.
        num_images: images in the prompt.
        image_shape: which of ``NUM_IMAGE_SHAPES`` sizes the images have, where the family allows it.
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


def context_sample(
    model: PreTrainedModel,
    num_text_before: int = 3,
    num_text_after: int = 4,
    seed: int = 0,
    num_images: int = 1,
    image_shape: int = 0,
) -> Inputs:
    """As :func:`processed_sample`, for models that read text alone: contexts in the place of images.

    The markers are text as well.
    """
    opening, closing = (torch.tensor(marker) for marker in getattr(model.config, MARKERS_KEY))
    vocabulary, generator = model.config.get_text_config().vocab_size, torch.Generator().manual_seed(seed)

    def words(length: int) -> Tensor:
        return torch.randint(NUM_SPECIAL_TOKENS, vocabulary, (length,), generator=generator)

    pieces = [words(num_text_before)]
    for length in (*[2] * (num_images - 1), num_text_after):
        pieces += [opening, words(_CONTEXT_LENGTHS[image_shape % NUM_IMAGE_SHAPES]), closing, words(length)]
    input_ids = torch.cat(pieces)[None]
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def collate(samples: Sequence[Inputs]) -> Inputs:
    """One batch of several samples: tokens padded on the left, pixels stacked."""
    batch: Inputs = {}
    for name in samples[0]:
        tensors = [sample[name] for sample in samples]
        if name.startswith("pixel_values") and "target_sizes" in samples[0]:  # patches of all images in one row
            batch[name] = torch.cat(tensors, dim=-1)
            continue
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
    if (adapter := adapter_for(model)).sees_images_whole:
        packed[adapter.token_types] = torch.cat([sample[adapter.token_types] for sample in samples], dim=1)
    return {**packed, "input_ids": input_ids, "position_ids": torch.cat(positions, dim=-1)}


def _fill(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros at the end of every axis but the first."""
    more = [part for size, has in zip(shape, tensor.shape[1:], strict=True) for part in (size - has, 0)]
    return pad(tensor, more[::-1])
