"""Input resizing is the model's own processor under a lower limit: what transformers itself gives, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_families import tiny_processor
from support.tiny_models import tiny_model
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from dop_search.baselines import FitContext, baseline, plain_answers, plain_divergence
from dop_search.baselines.base import FittedMethod
from dop_search.data.samples import Sample, ValidationSet
from dop_search.divergence import make_teacher
from dop_search.evaluation.timing.counting import count_decoder_flops
from dop_search.models import adapter_for
from dop_search.models.loading import LoadedModel
from dop_search.models.prompts import model_inputs, with_answer
from dop_search.selectors import make_selector
from dop_search.testing.processors import drawn_image
from dop_search.testing.sizes import ANYRES_TILE_SIZE
from dop_search.utils.errors import BudgetError, DopError

SIDE = ANYRES_TILE_SIZE
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
IMAGES = [(drawn_image(60, 50, 0),), (drawn_image(60, 50, 1),), (drawn_image(60, 50, 2), drawn_image(40, 70, 9))]
SAMPLES = ValidationSet(
    "drawn",
    "search",
    0,
    tuple(
        Sample(f"{index}", images[0], f"What is in it {index}?", (), "drawn", more_images=images[1:])
        for index, images in enumerate(IMAGES)
    ),
)


def loaded_tiny(family: str) -> LoadedModel:
    model = tiny_model(family)
    return LoadedModel(family, model, tiny_processor(family), adapter_for(model), f"tiny {family}")


def fitted_on(loaded: LoadedModel, ratio: float) -> tuple[FittedMethod, Any]:
    teacher = make_teacher(loaded, SAMPLES, make_selector("uniform_grid"), max_new_tokens=4, batch_size=2)
    context = FitContext.from_teacher(loaded, teacher, "uniform_grid", samples=SAMPLES.samples)
    return baseline("resize").fit(context, ratio), teacher


def processor_under(family: str, fitted: FittedMethod) -> Any:
    """transformers' own processor with the setting that was solved."""
    processor = tiny_processor(family)
    images = processor.image_processor
    if family in QWEN:
        pixels = fitted.hyperparameters["max_pixels"]
        processor.image_processor = type(images)(
            min_pixels=min(16 * 16, pixels), max_pixels=pixels, patch_size=4, merge_size=2, temporal_patch_size=2
        )
    elif family == "internvl":
        images.max_patches = fitted.hyperparameters["max_patches"]
    else:
        most = fitted.hyperparameters["max_crops"]
        images.image_grid_pinpoints = [
            [rows * SIDE, columns * SIDE] for rows, columns in ((1, 2), (2, 1), (2, 2)) if rows * columns <= most
        ] or [[SIDE, SIDE]]
    return processor


@pytest.mark.parametrize(
    ("family", "ratio"),
    [*((family, 0.6) for family in QWEN), ("llava_next", 0.7), ("llava_onevision", 0.8), ("internvl", 0.86)],
)
def test_it_is_what_the_processor_gives_under_that_limit(family: str, ratio: float) -> None:
    loaded = loaded_tiny(family)
    fitted, teacher = fitted_on(loaded, ratio)
    theirs, before = processor_under(family, fitted), tiny_processor(family)
    divergences, tokens = [], []
    with fitted.apply(loaded.model), torch.inference_mode():
        for sample, known in zip(SAMPLES.samples, teacher.samples, strict=True):
            inputs = model_inputs(theirs, [sample], loaded.adapter.device)
            own = model_inputs(fitted.reading(loaded).processor, [sample], loaded.adapter.device)
            assert own.keys() == inputs.keys()
            for name, value in inputs.items():
                torch.testing.assert_close(own[name], value, rtol=0, atol=0)
            tokens.append(int(loaded.adapter.visual_token_mask(inputs["input_ids"]).sum()))
            answer = torch.tensor([known.answer_ids[:-1]], dtype=torch.long)
            logits = loaded.model(**with_answer(inputs, answer)).logits[0, inputs["input_ids"].shape[1] - 1 :]
            said = known.log_probs.double()
            divergences.append(float((said.exp() * (said - logits.double().log_softmax(-1))).sum(-1).mean()))
    found = plain_divergence(loaded, SAMPLES.samples, teacher, fitted, batch_size=2)
    np.testing.assert_allclose(found, divergences, rtol=1e-3, atol=1e-6)
    assert found.max() > 1e-4
    assert fitted.hyperparameters["mean_visual_tokens"] == round(float(np.mean(tokens)), 2)
    assert fitted.notes[0].startswith(f"{min(tokens)} to {max(tokens)} visual tokens")
    assert sum(tokens) < sum(sample.encoded.num_visual for sample in teacher.samples)
    for sample in SAMPLES.samples:  # and the model is what it was
        for name, value in model_inputs(before, [sample], loaded.adapter.device).items():
            torch.testing.assert_close(model_inputs(loaded.processor, [sample], loaded.adapter.device)[name], value)
    assert len(plain_answers(loaded, SAMPLES.samples, fitted, max_new_tokens=2)) == 3


def test_max_pixels_is_the_one_that_costs_as_asked() -> None:
    """By transformers' rule for sizes, counted over every limit."""
    loaded = loaded_tiny("qwen2_5_vl")
    fitted, _ = fitted_on(loaded, 0.7)
    images = [image for sample in SAMPLES.samples for image in sample.images]
    totals = {}
    for limit in range(1, 60):
        pixels = limit * 64
        sizes = [smart_resize(i.height, i.width, 8, min(256, pixels), min(1600, pixels)) for i in images]
        totals[pixels] = sum(rows * columns // 64 for rows, columns in sizes)
    chosen = totals[fitted.hyperparameters["max_pixels"]]
    assert chosen == round(3 * fitted.hyperparameters["mean_visual_tokens"])
    loaded.model.set_attn_implementation("eager")
    counted = {
        processor: sum(
            count_decoder_flops(loaded.model, model_inputs(processor, [sample], loaded.adapter.device))
            for sample in SAMPLES.samples
        )
        for processor in (loaded.processor, fitted.reading(loaded).processor)
    }
    full, fewer = counted.values()
    assert fitted.flops_ratio == pytest.approx(fewer / full, rel=1e-9)


def test_says_what_it_cannot_reach_and_what_it_needs() -> None:
    loaded = loaded_tiny("llava_next")
    with pytest.raises(BudgetError, match=r"resizing by max_crops cannot go below"):
        fitted_on(loaded, 0.2)
    teacher = make_teacher(loaded, SAMPLES, make_selector("uniform_grid"), max_new_tokens=2)
    with pytest.raises(DopError, match=r"samples=data.samples"):
        baseline("resize").fit(FitContext.from_teacher(loaded, teacher, "uniform_grid"), 0.5)


def test_benchmarks_are_asked_through_the_fitted_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    from dop_search.evaluation.lmms import answering

    loaded = loaded_tiny("qwen2_vl")
    fitted, _ = fitted_on(loaded, 0.8)
    asked = []
    monkeypatch.setattr(answering, "_generate", lambda reader, prompts, frames: asked.append(reader) or ["x"])
    prompt = answering.Prompt.of_user([answering.part("image", drawn_image(60, 50, 0))], answering.Generation(2))
    for method in (fitted, None):
        assert answering.answer_prompts(loaded, [lambda: prompt], method) == ["x"]
    largest = [reader.processor.image_processor.size["longest_edge"] for reader in asked]
    assert largest[0] == fitted.hyperparameters["max_pixels"] < largest[1]
