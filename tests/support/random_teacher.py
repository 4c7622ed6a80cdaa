"""A teacher of a model with random weights, at the prompt of a published checkpoint: for memory, not for meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dop_search.divergence.encoding import encode, full_states
from dop_search.divergence.memory import SampleSize
from dop_search.divergence.teacher import Teacher, TeacherSample
from dop_search.evaluation.timing.shapes import Shape, build, prompt
from dop_search.models.adapter import ModelAdapter
from dop_search.models.families import adapter_for
from dop_search.selectors import make_selector

ANSWER = tuple(range(100, 108))


def random_model(
    shape: Shape, *, layers: int, hidden: int, vocabulary: int = 1000, dtype=torch.float32, attention: str = "sdpa"
) -> tuple[ModelAdapter, Shape]:
    """The architecture and the prompt of ``shape`` at a small width."""
    heads = 4
    small = replace(
        shape,
        layers=layers,
        hidden=hidden,
        mlp=hidden * shape.mlp // shape.hidden,
        heads=heads,
        kv_heads=max(1, heads * shape.kv_heads // shape.heads),
        vocabulary=vocabulary,
        vision_layers=2,
        vision_hidden=32,
        vision_heads=2,
        vision_mlp=48,
    )
    return adapter_for(build(small, torch.device("cpu"), dtype, attention)), small


@torch.inference_mode()
def random_teacher(adapter: ModelAdapter, shape: Shape, num_text: Sequence[int]) -> Teacher:
    """One sample per entry of ``num_text``, half of the text before the image."""
    samples = []
    for index, count in enumerate(num_text):
        encoded = encode(adapter, prompt(shape, adapter.model, num_text=count), ANSWER, make_selector("random"))
        states = full_states(adapter, encoded)[encoded.prompt_length - 1 :]
        log_probs = adapter.lm_head(states).float().log_softmax(dim=-1)
        samples.append(TeacherSample(str(index), encoded, ANSWER, log_probs))
    return Teacher(tuple(samples), "random", make_selector("random"))


def sizes_of(teacher: Teacher) -> list[SampleSize]:
    return [
        SampleSize.of_prompt(sample.encoded.visual[: sample.encoded.prompt_length], len(sample.answer_ids))
        for sample in teacher.samples
    ]
