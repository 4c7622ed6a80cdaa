"""Strategies that count per image: each image is ranked, kept and cut as if it were alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_families import tiny_processor
from support.tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

import dop_search as dop
from dop_search.baselines.pricing import Pricing
from dop_search.divergence import DivergenceEngine, make_teacher
from dop_search.divergence.profiling import token_counts
from dop_search.evaluation.timing.counting import count_decoder_flops
from dop_search.models import adapter_for
from dop_search.models.prompts import chat_prompt
from dop_search.pruning.packed import Tokens
from dop_search.pruning.ranking import RankingSource
from dop_search.selectors import make_selector
from dop_search.strategy.cost import CostModel, strategy_flops
from dop_search.strategy.operations import ModelDims, TokenCounts
from dop_search.testing.inputs import Inputs
from dop_search.testing.processors import drawn_image
from dop_search.testing.reference import masked_forward, text_positions, visual_positions
from dop_search.testing.strategies import random_rankings
from dop_search.utils.errors import DopError, StrategyError

FAMILIES = ["llava", "llava_next", "qwen2_5_vl"]
IMAGES = [drawn_image(56, 40, 0), drawn_image(30, 70, 1), drawn_image(60, 50, 2)]
NUM_LAYERS = 4
CLOSE = 2e-5

model_of: Callable[..., PreTrainedModel] = cache(tiny_model)


def prompt(family: str, *per_prompt: list[Image.Image]) -> Inputs:
    """A left-padded batch of questions about some images each."""
    processor = tiny_processor(family)
    texts = [chat_prompt(processor, f"What{' is' * row} this?", len(its), 0) for row, its in enumerate(per_prompt)]
    batch = processor(text=texts, images=list(per_prompt), padding=True, return_tensors="pt")
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


def num_visual(family: str, *images: Image.Image) -> list[int]:
    """Visual tokens of each image when it is alone."""
    model = model_of(family, NUM_LAYERS)
    return [int(visual_positions(model, prompt(family, [image])["input_ids"]).sum()) for image in images]


def logits_of(model: PreTrainedModel, inputs: Inputs, strategy: dop.Strategy, **how: Any) -> Tensor:
    with torch.no_grad(), dop.pruned(model, strategy, **how):
        logits: Tensor = model(**inputs).logits
    return logits


STRATEGIES = [
    dop.Strategy.depthwise(NUM_LAYERS, [3, 1], [4, 2], [3, 2], 5, [0.3, 0.7], selector="random", per_image=True),
    dop.Strategy.depthwise(NUM_LAYERS, 2, 3, 1, 0.4, selector="random", per_image=True),
    dop.Strategy.depthwise(NUM_LAYERS, [3, 1], [4, 2], [3, 2], None, [0.2, 0.8], selector="random", per_image=True),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_a_prompt_equal_the_masked_reference(family: str) -> None:
    """Two images of other sizes and one, in a batch; prefill and the steps of two beams; priced as counted."""
    model, sizes = model_of(family, NUM_LAYERS), num_visual(family, *IMAGES)
    batch, alone = prompt(family, IMAGES[:2], IMAGES[2:]), prompt(family, IMAGES[:2])
    images = [sizes[:2], sizes[2:]]
    visual = visual_positions(model, batch["input_ids"])
    assert visual.sum(dim=1).tolist() == [sum(its) for its in images]
    rankings, text = random_rankings([sum(its) for its in images], seed=1), text_positions(model, batch)
    for strategy in STRATEGIES:
        expected = masked_forward(model, batch, strategy, rankings, images=images)
        largest = expected[text].abs().max()
        found = logits_of(model, batch, strategy, rankings=rankings)
        assert (found - expected)[text].abs().max() < CLOSE * largest
        if strategy.num_visual_tokens is not None:  # groups alone may happen to be the same
            together = logits_of(model, batch, replace(strategy, per_image=False), rankings=rankings)
            assert (together - expected)[0][text[0]].abs().max() > 100 * CLOSE * largest
        arguments = {"max_new_tokens": 2, "min_new_tokens": 2, "num_beams": 2, "do_sample": False}
        with dop.pruned(model, strategy, rankings=rankings):
            generating: Any = model
            output = generating.generate(**batch, **arguments, output_logits=True, return_dict_in_generate=True)
        assert (output.logits[0][::2] - expected[:, -1]).abs().max() < CLOSE * largest
        counts = TokenCounts.of_prompt(visual_positions(model, alone["input_ids"])[0].numpy(), images[0])
        eager = model_of(family, NUM_LAYERS, attn_implementation="eager")  # whose products are counted
        with dop.pruned(eager, strategy, rankings=rankings[:1]):
            flops = count_decoder_flops(eager, alone)
        assert strategy_flops(adapter_for(model).dims, strategy, counts) == flops
        assert CostModel(adapter_for(model).dims, [counts] * 2).total(strategy) == 2 * flops


def ranking_of(model: PreTrainedModel, inputs: Inputs, selector: str, share: float) -> np.ndarray:
    """What a selector ranks in a prompt, images together, when it is to keep a share of the tokens."""
    source, given = RankingSource(adapter_for(model), make_selector(selector)), {}
    embed = adapter_for(model).text_model.register_forward_pre_hook(
        lambda module, args, kwargs: given.update(kwargs), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(**inputs)
            visual = visual_positions(model, inputs["input_ids"])
            keep = int(share * int(visual.sum()) + 0.5)
            source.prepare(Tokens(given["inputs_embeds"], inputs["input_ids"], visual), lambda count: keep)
            return source.rank([int(visual.sum())])[0]
    finally:
        embed.remove()
        source.close()


@pytest.mark.parametrize(
    ("family", "selector"),
    [
        ("llava", "divprune"),
        ("llava", "vispruner"),
        ("llava_next", "hired"),
        ("llava_next", "divprune"),
        ("qwen2_5_vl", "divprune"),
        ("qwen2_5_vl", "received_attention"),
    ],
)
def test_a_selector_sees_each_image_alone(family: str, selector: str) -> None:
    """The tokens that it keeps of an image are those it keeps where there is no other."""
    model, sizes = model_of(family, NUM_LAYERS), num_visual(family, *IMAGES[:2])
    first, second = (ranking_of(model, prompt(family, [image]), selector, 0.3) for image in IMAGES[:2])
    assert [len(first), len(second)] == sizes
    inputs = prompt(family, IMAGES[:2])
    text = text_positions(model, inputs)
    few = dop.Strategy.full(NUM_LAYERS, num_visual_tokens=0.3, selector=selector, per_image=True)
    given = logits_of(model, inputs, few, rankings=[np.concatenate([first, len(first) + second])])
    torch.testing.assert_close(logits_of(model, inputs, few)[text], given[text], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("selector", ["cls_attention", "divprune", "vispruner", "visionzip"])
def test_of_one_image_both_counts_are_the_same(selector: str) -> None:
    model, inputs = model_of("llava", NUM_LAYERS), prompt("llava", IMAGES[:1])
    for count in (5, 0.3):
        few = dop.Strategy.depthwise(NUM_LAYERS, [3, 1], 4, 2, count, [0.5, 0.5], selector=selector)
        assert torch.equal(logits_of(model, inputs, few), logits_of(model, inputs, replace(few, per_image=True)))
    same = replace(few, num_visual_tokens=int(0.3 * num_visual("llava", IMAGES[0])[0] + 0.5))
    assert torch.equal(logits_of(model, inputs, few), logits_of(model, inputs, same))


def test_the_engine_scores_single_images_and_prices_several() -> None:
    loaded, data = dop.load("pocket"), dop.validation_set("pocket", num_samples=1, seed=3)
    teacher = make_teacher(loaded, data, make_selector("cls_attention"), max_new_tokens=2)
    few = dop.Strategy.depthwise(12, 5, 10, 2, 0.25)
    engine = DivergenceEngine(loaded.adapter, teacher)
    together, each = engine.evaluate([few, replace(few, per_image=True)])
    assert together == each
    sample = teacher.samples[0]
    assert (sample.encoded.images, token_counts(teacher)[0].images) == ((256,), (256,))
    two = replace(teacher, samples=(replace(sample, encoded=replace(sample.encoded, images=(100, 156))),))
    with pytest.raises(DopError, match="several images"):
        DivergenceEngine(loaded.adapter, two).evaluate([replace(few, per_image=True)])
    assert token_counts(two)[0].images == (100, 156)


def test_what_ranks_across_images_is_refused() -> None:
    few = dop.Strategy.full(NUM_LAYERS, num_visual_tokens=3, selector="tome", per_image=True)
    with pytest.raises(StrategyError, match="divprune"):
        dop.prune_(model_of("llava", NUM_LAYERS), few)
    with pytest.raises(StrategyError, match="`per_image`"):
        dop.Strategy.full(4, selector="fastv", selector_options={"stages": [2]}, per_image=True)


def test_each_image_is_ranked_at_its_own_price() -> None:
    dims = ModelDims(4, 16, 32, num_heads=2, num_kv_heads=2, head_dim=8)
    two, one = (Pricing(dims, [TokenCounts(10, 16 * count, (16,) * count)]) for count in (2, 1))
    strategy = dop.Strategy.full(4, num_visual_tokens=4, selector="divprune", per_image=True)
    chosen = [its.selection_ratio(strategy) * its.cost_model.full_total for its in (two, one)]
    assert chosen[0] == pytest.approx(2 * chosen[1])
