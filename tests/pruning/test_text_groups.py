"""Operations of text tokens: the runtime against the masked dense reference, and what they cost against a count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_inputs import tiny_inputs, tiny_sample
from support.tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

import dop_search as dop
from dop_search.baselines import FitContext, baseline
from dop_search.evaluation.timing.counting import count_decoder_flops
from dop_search.models.families import adapter_for
from dop_search.pruning import pruned
from dop_search.pruning.text_groups import TextGroups, text_groups_flops, text_sizes
from dop_search.strategy.cost.flops import strategy_flops
from dop_search.strategy.operations import TokenCounts
from dop_search.strategy.policy import GroupPolicy
from dop_search.testing.inputs import collate
from dop_search.testing.reference import (
    OperationMasks,
    append_tokens,
    logits_under,
    operation_masks,
    visual_positions,
)
from dop_search.testing.strategies import random_rankings
from dop_search.utils.errors import StrategyError

NUM_LAYERS = 4
TOLERANCE = 2e-5
CASES = {
    "nothing": ((4, 4, 4), (4, 4, 4)),
    "before_never_enters": ((0, 0, 0), (4, 4, 4)),
    "before_keys_only": ((0, 4, 0), (4, 4, 4)),
    "after_leaves": ((4, 4, 4), (2, 3, 1)),
    "both": ((1, 2, 2), (3, 4, 0)),
    "last_token_alone": ((0, 0, 0), (0, 0, 0)),
}
cases = pytest.mark.parametrize("case", list(CASES))


def text_closed(masks: OperationMasks, visual: Tensor, attended: Tensor, case: str) -> OperationMasks:
    """The masks with the text's operations closed, position by position."""
    for sample in range(visual.shape[0]):
        places = [int(place) for place in attended[sample].nonzero()[:, 0]]
        image = [place for place in places if visual[sample, place]]
        for place in places[:-1]:
            if not visual[sample, place]:
                depths = CASES[case][0 if place < image[0] else 1]
                for mask, depth in zip((masks.q, masks.kv, masks.mlp), depths, strict=True):
                    mask[depth:, sample, place] = False
    return masks


def extended(masks: OperationMasks, count: int) -> OperationMasks:
    """The same with tokens after the prompt, which run everything."""
    return OperationMasks(*(torch.nn.functional.pad(m, (0, count), value=True) for m in (masks.q, masks.kv, masks.mlp)))


def arrange(family: str, case: str) -> tuple[PreTrainedModel, dict[str, Any], dict[str, Any], OperationMasks]:
    """A model, a padded batch, the arguments of ``pruned``, and what the reference hides for them."""
    model = tiny_model(family, NUM_LAYERS)
    inputs = tiny_inputs(model)
    visual = visual_positions(model, inputs["input_ids"])
    rankings = random_rankings(visual.sum(dim=1).tolist(), seed=1)
    strategy = dop.Strategy.depthwise(NUM_LAYERS, 2, 3, 1, num_visual_tokens=3)
    attended = inputs["attention_mask"].bool()
    masks = text_closed(operation_masks(visual, strategy, rankings), visual, attended, case)
    text = TextGroups.depthwise(NUM_LAYERS, *CASES[case])
    return model, inputs, {"strategy": strategy, "rankings": rankings, "text": text}, masks


def distance(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).abs().max() / expected.abs().max())


@cases
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl"])
def test_prompt_and_continuation_give_the_logits_of_the_reference(family: str, case: str) -> None:
    model, inputs, arguments, masks = arrange(family, case)
    new = inputs["input_ids"][:, -2:]
    longer = append_tokens(inputs, new)
    expected = logits_under(model, longer, extended(masks, 2))[:, -3:]
    with torch.no_grad(), pruned(model, **arguments):
        output = model(**inputs, use_cache=True)
        mask, cache = longer["attention_mask"], output.past_key_values
        rest = model(input_ids=new, attention_mask=mask, past_key_values=cache).logits
    assert distance(torch.cat([output.logits[:, -1:], rest], dim=1), expected) < TOLERANCE


@cases
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_prompt_gives_the_logits_of_the_reference_with_multimodal_rope(family: str, case: str) -> None:
    model, inputs, arguments, masks = arrange(family, case)
    expected = logits_under(model, inputs, masks)[:, -1]
    with torch.no_grad(), pruned(model, **arguments):
        logits = model(**inputs).logits[:, -1]
    assert distance(logits, expected) < TOLERANCE


@cases
def test_flops_are_what_a_counter_measures(case: str) -> None:
    model = tiny_model("llava", NUM_LAYERS, attn_implementation="eager")
    inputs = collate([tiny_sample(model)])
    adapter = adapter_for(model)
    visual = visual_positions(model, inputs["input_ids"])[0].numpy()
    strategy = dop.Strategy.depthwise(NUM_LAYERS, 2, 3, 1, num_visual_tokens=3)
    text = TextGroups.depthwise(NUM_LAYERS, *CASES[case])
    expected = text_groups_flops(adapter.dims, strategy, text, int(visual.sum()), text_sizes(visual))
    with pruned(model, strategy, [np.arange(int(visual.sum()))], text=text):
        assert count_decoder_flops(model, inputs) == expected
    full = strategy_flops(adapter.dims, strategy, TokenCounts(int((~visual).sum()), int(visual.sum())))
    assert expected < full


def test_full_depths_are_lossless() -> None:
    """Only dead operations go: queries and MLPs of the last layer that nobody reads."""
    model = tiny_model("llava", NUM_LAYERS)
    inputs = tiny_inputs(model)
    text = TextGroups.depthwise(NUM_LAYERS, (4, 4, 4), (4, 4, 4))
    with torch.no_grad():
        expected = model(**inputs).logits[:, -1]
        with pruned(model, dop.Strategy.full(NUM_LAYERS), text=text):
            logits = model(**inputs).logits[:, -1]
    assert torch.allclose(logits, expected, atol=1e-5)


def test_a_prompt_without_an_image_skips_nothing() -> None:
    visual = np.zeros(5, dtype=np.bool_)
    text = TextGroups.depthwise(NUM_LAYERS, (0, 0, 0), (0, 0, 0))
    groups = np.full(5, -1)
    assert text_sizes(visual) == (0, 0)
    assert (text.assign(groups, visual, 1) == groups).all()


def test_what_does_not_fit_is_refused() -> None:
    model = tiny_model("llava", NUM_LAYERS)
    with pytest.raises(StrategyError, match=r"`0 <= depth <= 4` must hold for text tokens, but got 5"):
        TextGroups.depthwise(4, (5, 4, 4), (4, 4, 4))
    layers = GroupPolicy((0, 2), (0, 1, 2), (0,))
    with pytest.raises(StrategyError, match=r"at exit depths, but got the layers \(0, 2\)"):
        TextGroups(4, layers, layers)
    staged = baseline("fastv").fit(FitContext(adapter_for(model).dims, (TokenCounts(8, 16),)), 0.8).strategy
    everything = TextGroups.depthwise(NUM_LAYERS, (4, 4, 4), (4, 4, 4))
    assert staged is not None
    assert staged.stages
    with pytest.raises(StrategyError, match="ranks inside the decoder"), pruned(model, staged, text=everything):
        pass
    other = TextGroups.depthwise(3, (3, 3, 3), (3, 3, 3))
    with (
        pytest.raises(StrategyError, match="for 3 decoder layers, the strategy for 4"),
        pruned(model, dop.Strategy.full(NUM_LAYERS), text=other),
    ):
        pass
