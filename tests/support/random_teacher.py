"""A teacher of a model with random weights, at the prompt of a published checkpoint: for memory, not for meaning."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dop_search.divergence.encoding import encode, full_states
from dop_search.divergence.footprint import SampleSize
from dop_search.divergence.teacher import Teacher, TeacherSample
from dop_search.evaluation.timing.shapes import Shape, build, prompt
from dop_search.models.adapter import ModelAdapter
from dop_search.models.families import adapter_for
from dop_search.selectors import make_selector

ANSWER = tuple(range(100, 108))


def narrow(shape: Shape, layers: int, hidden: int, vocabulary: int, **fields) -> Shape:
    """The architecture and the prompt of ``shape`` at a small width."""
    given, heads, half = shape.values["text_config"], 4, hidden // 8
    text = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": hidden * given["intermediate_size"] // given["hidden_size"],
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads * given["num_key_value_heads"] // given["num_attention_heads"]),
        "vocab_size": vocabulary,
    }
    vision = {"hidden_size": 32, "intermediate_size": 48}
    if "rope_parameters" in given:  # Qwen
        sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
        text["rope_parameters"] = {**given["rope_parameters"], "mrope_section": sections}
        vision |= {"depth": 2, "num_heads": 2, "out_hidden_size": hidden, "fullatt_block_indexes": []}
    else:
        vision |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    return shape.sized(text, vision, **fields)


def random_model(
    shape: Shape, *, layers: int, hidden: int, vocabulary: int = 1000, dtype=torch.float32, attention: str = "sdpa"
) -> tuple[ModelAdapter, Shape]:
    """A model of that architecture with random weights."""
    small = narrow(shape, layers, hidden, vocabulary)
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
