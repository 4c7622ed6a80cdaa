"""A decoder over two devices: packed rows follow the layers, and the numbers are those of one device."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from support.random_teacher import random_model, random_teacher
from support.two_devices import FIRST, SECOND, Devices, Placed, place_, plain

from dop_search import pruned
from dop_search.divergence import DivergenceEngine
from dop_search.evaluation.timing.shapes import SHAPES, prompt
from dop_search.models.families import adapter_for
from dop_search.strategy import Strategy

LAYERS = 6
STRATEGIES = [
    Strategy.depthwise(LAYERS, 3, 4, 2, selector="random"),
    Strategy.depthwise(LAYERS, 5, 6, 4, num_visual_tokens=70, selector="random"),
    Strategy.from_array(
        np.random.default_rng(0).random((2, LAYERS, 3)) < 0.6,
        shares=(0.25, 0.75),
        num_visual_tokens=120,
        selector="random",
    ),
]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def models(request):
    """The same model on the CPU, and with its decoder over two devices, tower and embeddings on the CPU."""
    adapter, shape = random_model(SHAPES["tiny"], layers=LAYERS, hidden=64, attention=request.param)
    spread = copy.deepcopy(adapter.model)
    text = spread.model.language_model
    for index, layer in enumerate(text.layers):
        place_(layer, FIRST if index < 2 else SECOND)
    place_(text.rotary_emb, FIRST)
    place_(text.norm, SECOND)
    place_(spread.lm_head, SECOND)
    return adapter, adapter_for(spread), shape


def test_the_helper_refuses_what_a_machine_would():
    with Devices():
        here, there = torch.ones(2, device=FIRST), torch.ones(2, device=SECOND)
        assert isinstance(here, Placed)
        assert here.device == FIRST
        with pytest.raises(RuntimeError, match="same device"):
            here + there
        with pytest.raises(RuntimeError, match="same device"):
            here + torch.ones(2)
        assert (here + there.to(FIRST)).cpu().tolist() == [2.0, 2.0]


@pytest.mark.parametrize("num_text", [(20, 20), (20, 24, 31)], ids=["even", "uneven"])
@pytest.mark.parametrize("keep_states", [True, False])
@pytest.mark.fast_cases(2)
def test_scores_are_those_of_one_device(models, num_text, keep_states):
    one, two, shape = models
    assert two.devices == [FIRST, SECOND]
    assert two.device == FIRST
    teacher = random_teacher(one, shape, num_text)
    expected = DivergenceEngine(one, teacher).evaluate(STRATEGIES)
    assert expected.max() > 1e-4
    with Devices():
        found = DivergenceEngine(two, teacher, keep_states=keep_states).evaluate([*STRATEGIES, *STRATEGIES[:1]])
    np.testing.assert_allclose(found[:3], expected, rtol=1e-3, atol=1e-6)
    assert (found[3] == found[0]).all()


@pytest.mark.parametrize("strategy", STRATEGIES, ids=["all", "some", "groups"])
@pytest.mark.parametrize("padded", [False, True])
@torch.inference_mode()
@pytest.mark.fast_cases(3)
def test_prefill_and_decoding_are_those_of_one_device(models, strategy, padded):
    one, two, shape = models
    inputs = prompt(shape, one.model, num_text=20, batch=2)
    if padded:
        inputs["attention_mask"][0, :5] = 0
    following = torch.tensor([[101], [102]])

    def logits(adapter):
        with pruned(adapter.model, strategy):
            first = adapter.model(**inputs, use_cache=True)
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(following)], dim=1)
            length = inputs["input_ids"].shape[1]
            second = adapter.model(
                input_ids=following,
                attention_mask=mask,
                position_ids=torch.full((2, 1), length),
                past_key_values=first.past_key_values,
                use_cache=True,
            )
        return [plain(output.logits[:, -1]) for output in (first, second)]

    expected = logits(one)
    with Devices():
        found = logits(two)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
