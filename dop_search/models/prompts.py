"""From samples to model inputs, by the processor's own chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from textwrap import shorten
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from dop_search.data.samples import IMAGE_PLACE, Sample
from dop_search.utils.errors import CheckpointError, DataError


def chat_prompt(processor: Any, question: str, num_images: int = 1, num_videos: int = 0, system: str = "") -> str:
    """The user's turn as the checkpoint was trained to see it, up to where the answer starts.

    Args:
        processor: has the chat template.
        question: what is asked; each ``<image>`` in it is the place of an image, and they come first if there is none.
        system: the system prompt; empty for none.

    Raises:
        DataError: if the question holds the model's own image token, or the chat template has no system prompt.
        CheckpointError: if the chat template drops the question.
    """
    content: list[dict[str, str]] = [{"type": "video"} for _ in range(num_videos)]
    before, *rest = question.split(IMAGE_PLACE) if question.count(IMAGE_PLACE) == num_images else [question]
    if not rest:
        content = [*({"type": "image"} for _ in range(num_images)), *content]
    for index, text in enumerate((before, *rest)):
        _check_text(processor, text)
        content += [{"type": "image"}] if index else []
        content += [{"type": "text", "text": text}] if text or not rest else []
    turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system:
        _check_text(processor, system)
        turns = [{"role": "system", "content": [{"type": "text", "text": system}]}, *turns]
    try:
        prompt: str = processor.apply_chat_template(turns, add_generation_prompt=True)
    except TemplateError as error:
        if not system:
            raise
        raise DataError(f"the model's chat template takes no system prompt ({error}); leave `system` out") from error
    shown = "".join(prompt.split())  # templates trim
    if "".join(system.split()) not in shown:
        raise DataError("the model's chat template drops the system prompt; leave `system` out")
    if any("".join(part.get("text", "").split()) not in shown for part in content):
        raise CheckpointError(
            f"the model's chat template drops the question {shorten(question, 80)!r} (it makes {shorten(prompt, 80)!r} "
            "of it); take chat_template.jinja of the original checkpoint"
        )
    return prompt


def sample_prompt(processor: Any, sample: Sample) -> str:
    """The prompt of a sample, see :func:`chat_prompt`; its errors name the sample."""
    try:
        return chat_prompt(processor, sample.question, len(sample.images), system=sample.system)
    except DataError as error:
        raise DataError(f"the sample {sample.id!r}: {error}") from error


def model_inputs(processor: Any, samples: Sequence[Sample], device: torch.device) -> dict[str, Tensor]:
    """A left-padded batch: ``input_ids``, ``attention_mask``, ``pixel_values`` and what the family adds; DataError
    naming the first sample that the processor cannot prepare."""
    texts = [sample_prompt(processor, sample) for sample in samples]
    if hasattr(processor, "image_processor") and (bare := next((s.id for s in samples if s.image is None), None)):
        raise DataError(f"the model reads images, but the sample {bare!r} has none; use data=pocket, or data=jsonl")
    try:
        batch = processor(
            images=[list(sample.images) for sample in samples],  # a flat list may be one prompt's
            text=texts,
            padding=True,
            return_tensors="pt",
        )
    except PROCESSOR_ERRORS as error:
        for sample in samples if len(samples) > 1 else ():
            model_inputs(processor, [sample], device)
        raise unprepared(f"the sample {samples[0].id!r}", samples[0].images, error) from error
    return {name: value.to(device) for name, value in batch.items()}


PROCESSOR_ERRORS = (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError)
"""What processors raise on images that they are not made for."""


def unprepared(what: str, images: Sequence[Image.Image], error: Exception) -> DataError:
    """The error of a processor on ``what`` with these images."""
    sizes = ", ".join("{}x{}".format(*image.size) for image in images) or "none"
    return DataError(
        f"{what}: the model's processor cannot prepare it ({type(error).__name__}: {error}); its images are {sizes} "
        "pixels: leave it out, or cut or pad what is extremely small, long or wide"
    )


@contextmanager
def image_tokens_checked() -> Iterator[None]:
    """Around a forward with images: transformers' complaint about their number of tokens as an error of ours;
    CheckpointError if the processor makes room for other visual tokens than the vision tower gives."""
    try:
        yield
    except ValueError as error:
        if "do not match" not in str(error):
            raise
        raise CheckpointError(
            f"the checkpoint's processor does not fit its vision tower ({error}); compare patch_size, "
            "vision_feature_select_strategy, num_additional_image_tokens or image_seq_length in processor_config.json "
            "with config.json"
        ) from error


def _check_text(processor: Any, text: str) -> None:
    """A text with the placeholder of an image would ask for one more image than there is."""
    for name in ("image_token", "video_token"):
        token = getattr(processor, name, None)
        if isinstance(token, str) and token in text:
            raise DataError(f"the text holds {token!r}, this model's place of an image or a video; take it out")


def with_answer(inputs: dict[str, Tensor], answer: Tensor) -> dict[str, Tensor]:
    """The inputs of an unpadded prompt with text tokens ``answer`` (``[1, new]``) after it."""
    ids = torch.cat([inputs["input_ids"], answer], dim=1)
    extended = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("mm_token_type_ids", "token_type_ids"):  # of Qwen and Gemma: 0 is text
        if name in inputs:
            extended[name] = torch.cat([inputs[name], torch.zeros_like(answer, dtype=inputs[name].dtype)], dim=1)
    return extended
