"""Answers to conversations with images and videos, in batches of alike prompts, in the order of the questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from dop_search.evaluation.runnable import Runnable, reading, running
from dop_search.models.fast_linear import fast_linear
from dop_search.models.generation import plain_generation
from dop_search.models.loading import LoadedModel
from dop_search.models.prompts import PROCESSOR_ERRORS, image_tokens_checked, unprepared
from dop_search.utils.errors import DataError

Part: TypeAlias = dict[str, Any]
"""As in Hugging Face's conversations: ``{"type": kind, kind: …}`` of a text, an image or a video (a path, a URL, or its
frames)."""


def part(kind: Literal["text", "image", "video"], value: Any) -> Part:
    """A part of a turn."""
    return {"type": kind, kind: value}


@dataclass(frozen=True)
class Generation:
    """How an answer is made; answers end before the first of ``until``.

    ``options`` are further arguments of ``generate()``, sorted by name; greedy and neutral without any, whatever the
    checkpoint's generation_config.json says.
    """

    max_new_tokens: int
    until: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = (("do_sample", False),)


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer: turns of ``role`` and ``content``, a list of parts."""

    turns: Sequence[Mapping[str, Any]]
    generation: Generation

    @classmethod
    def of_user(cls, parts: Sequence[Part], generation: Generation) -> Prompt:
        """A single turn of the user's."""
        return cls([{"role": "user", "content": list(parts)}], generation)

    def media(self, kind: Literal["image", "video"]) -> list[Any]:
        """All images, or all videos, in order."""
        return [item[kind] for turn in self.turns for item in turn["content"] if item["type"] == kind]


def answer_prompts(
    loaded: LoadedModel,
    prompts: Sequence[Callable[[], Prompt]],
    method: Runnable | None = None,
    *,
    lengths: Sequence[tuple[Any, ...]] | None = None,
    batch_size: int = 16,
    num_frames: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """One answer per prompt, in order, by ``generate()`` of the (pruned) model.

    Args:
        loaded: the model.
        prompts: make the prompts when their turn comes, so that only one batch of images is held at a time.
        method: a strategy or a fitted method; ``None``: the full model.
        lengths: sort keys; neighbours share a batch. ``None``: the order of the prompts.
        batch_size: most prompts per call; only prompts of one shape and one ``generation`` share a call.
        num_frames: frames taken of each video; ``None``: the processor's own rule.
        on_progress: called with (done, total) prompts.
    """
    loaded = reading(loaded, method)
    keys = lengths or [()] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: (keys[index], index))
    answers: dict[int, str] = {}
    if on_progress is not None:
        on_progress(0, len(prompts))
    with fast_linear(loaded.model), running(loaded.model, method):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            made = [prompts[index]() for index in indices]
            for group in _alike(made):
                texts = _generate(loaded, [made[position] for position in group], num_frames)
                answers.update((indices[position], text) for position, text in zip(group, texts, strict=True))
            if on_progress is not None:
                on_progress(len(answers), len(prompts))
    return [answers[index] for index in range(len(prompts))]


def _alike(prompts: Sequence[Prompt]) -> Iterator[list[int]]:
    """Positions of prompts that may share a call: as many images and videos each, and the same generation."""
    groups: dict[Any, list[int]] = {}
    for position, prompt in enumerate(prompts):
        key = (len(prompt.media("image")), len(prompt.media("video")), repr(prompt.generation))
        groups.setdefault(key, []).append(position)
    yield from groups.values()


@torch.inference_mode()
def _generate(loaded: LoadedModel, prompts: Sequence[Prompt], num_frames: int | None) -> list[str]:
    generation = prompts[0].generation
    inputs = _inputs(loaded, prompts, num_frames)
    model: Any = loaded.model
    with plain_generation(loaded), image_tokens_checked():
        ids = model.generate(**inputs, max_new_tokens=generation.max_new_tokens, **dict(generation.options))
    new = ids[:, inputs["input_ids"].shape[1] :]
    texts = loaded.processor.batch_decode(new, skip_special_tokens=True)
    return [_cut(text, generation.until).strip() for text in texts]


def _inputs(loaded: LoadedModel, prompts: Sequence[Prompt], num_frames: int | None) -> dict[str, Tensor]:
    processor = loaded.processor
    texts = processor.apply_chat_template([list(p.turns) for p in prompts], add_generation_prompt=True)
    images, videos = ([item for prompt in prompts for item in prompt.media(kind)] for kind in ("image", "video"))
    media: dict[str, Any] = {}
    if images:
        media["images"] = images
    if videos:
        if getattr(processor, "video_processor", None) is None:
            raise DataError(
                f"the processor of {loaded.name!r} ({type(processor).__name__}) takes no videos; choose a model that "
                "does, or a suite without videos"
            )
        media["videos"] = videos
        if num_frames is not None:
            media |= {"num_frames": num_frames, "do_sample_frames": True}
    try:
        batch = processor(text=texts, padding=True, return_tensors="pt", **media)
    except PROCESSOR_ERRORS as error:
        what = f"one of {len(prompts)} prompts, the first of which is {shorten(texts[0], 200)!r}"
        raise unprepared(what, images, error) from error
    return {name: value.to(loaded.adapter.device) for name, value in batch.items() if isinstance(value, Tensor)}


def _cut(text: str, until: Sequence[str]) -> str:
    for stop in until:
        if stop:
            text = text.split(stop, 1)[0]
    return text
