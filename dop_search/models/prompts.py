"""From samples to model inputs, by the processor's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dop_search.data.samples import Sample


def chat_prompt(processor: Any, question: str, num_images: int = 1, num_videos: int = 0) -> str:
    """The user's turn as the checkpoint was trained to see it, up to where the answer starts."""
    content: list[dict[str, str]] = [{"type": "image"} for _ in range(num_images)]
    content += [{"type": "video"} for _ in range(num_videos)]
    content.append({"type": "text", "text": question})
    prompt: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return prompt


def model_inputs(processor: Any, samples: Sequence[Sample], device: torch.device) -> dict[str, Tensor]:
    """A left-padded batch: ``input_ids``, ``attention_mask``, ``pixel_values`` and what the family adds."""
    batch = processor(
        images=[sample.image for sample in samples],
        text=[chat_prompt(processor, sample.question) for sample in samples],
        padding=True,
        return_tensors="pt",
    )
    return {name: value.to(device) for name, value in batch.items()}


def with_answer(inputs: dict[str, Tensor], answer: Tensor) -> dict[str, Tensor]:
    """The inputs of an unpadded prompt with text tokens ``answer`` (``[1, new]``) behind it."""
    ids = torch.cat([inputs["input_ids"], answer], dim=1)
    extended = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inputs:  # Qwen: 0 is text
        kinds = inputs["mm_token_type_ids"]
        extended["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(answer, dtype=kinds.dtype)], dim=1)
    return extended
