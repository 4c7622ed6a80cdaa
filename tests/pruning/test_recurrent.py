"""Recurrent layers, where the masked reference says nothing: states, caches, refusals."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_families import TINY_FAMILIES
from support.tiny_inputs import tiny_sample
from support.tiny_models import tiny_model
from transformers import AutoModelForImageTextToText
from transformers.cache_utils import DynamicCache

import dop_search as dop
from dop_search.divergence.footprint import Footprint
from dop_search.models import adapter_for
from dop_search.pruning.attention import ForwardTables
from dop_search.pruning.layer import run_layer
from dop_search.pruning.layout import TEXT, pack
from dop_search.pruning.recurrent import plan_recurrence
from dop_search.strategy import Strategy
from dop_search.strategy.cost import CostModel
from dop_search.strategy.operations import TokenCounts
from dop_search.strategy.steps import LayerStep
from dop_search.testing.conformance.decoding import continuation_arguments
from dop_search.testing.inputs import collate, random_text
from dop_search.testing.peak_memory import peak_memory
from dop_search.testing.reference import append_tokens, visual_positions
from dop_search.testing.sizes import TinySizes
from dop_search.utils.errors import ConfigError, DopError, UnsupportedModelError


@cache
def qwen() -> Any:
    return tiny_model("qwen3_5")


def rankings(inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
    return [np.arange(int(count)) for count in visual_positions(qwen(), inputs["input_ids"]).sum(dim=1)]


NOTHING = Strategy.depthwise(4, 0, 0, 0, selector="explicit")


def test_a_skipped_token_leaves_the_state_untouched() -> None:
    """The first layer's state is what the model itself has after the text alone: no decay, nothing in the window."""
    model, sample = qwen(), tiny_sample(qwen(), 3, 6)
    text = sample["input_ids"][~visual_positions(model, sample["input_ids"])][None]
    caches = [DynamicCache(config=model.config), DynamicCache(config=model.config)]
    with torch.no_grad():
        model(input_ids=text, past_key_values=caches[0], use_cache=True)
        with dop.pruned(model, NOTHING, rankings=rankings(sample)):
            model(**sample, past_key_values=caches[1], use_cache=True)
    expected, found = (its.layers[0] for its in caches)
    torch.testing.assert_close(found.conv_states[0], expected.conv_states[0])
    torch.testing.assert_close(found.recurrent_states[0], expected.recurrent_states[0])


def test_a_cache_of_the_plain_model_is_continued_and_a_pruned_one_is_refused_there() -> None:
    model = qwen()
    batch = collate([tiny_sample(model, 3, 4), tiny_sample(model, 5, 7, seed=1)])
    longer = append_tokens(batch, random_text(model, 6, seed=2).view(2, 3))
    tokens = longer["input_ids"][:, -3:]
    plain, pruned = DynamicCache(config=model.config), DynamicCache(config=model.config)
    half = Strategy.depthwise(4, 1, 1, 1, selector="explicit")
    with torch.no_grad():
        model(**batch, past_key_values=plain, use_cache=True)
        expected = model(**longer).logits[:, -3:]
        with dop.pruned(model, half, rankings=rankings(batch)):
            given = continuation_arguments(model, longer, 3)
            continued = model(input_ids=tokens, **given, past_key_values=plain).logits
            model(**batch, past_key_values=pruned, use_cache=True)
        torch.testing.assert_close(continued, expected, atol=1e-4, rtol=1e-4)
        before = pruned.layers[0].conv_states[0].clone()
        with pytest.raises(DopError, match="filled by a pruned model"):
            model(input_ids=tokens[:, :1], past_key_values=pruned)
    assert torch.equal(pruned.layers[0].conv_states[0], before)


def test_what_a_row_sees_through_the_convolution() -> None:
    """Rows of two samples, two of which read without an update; three taps, so that six rows of state come first."""
    sample, updates = np.array([0, 0, 0, 0, 1, 1]), np.array([True, False, True, True, False, True])
    plan = plan_recurrence(sample, updates, ~updates, 2, 3, torch.device("cpu"))
    rows = plan.window.T.tolist()
    assert rows[0] == [1, 2, 6]  # the last two of the state, itself
    assert rows[1] == [2, 6, 7]  # reads after one update
    assert rows[2] == [2, 6, 8]  # the reader before it is not there
    assert rows[3] == [6, 8, 9]
    assert rows[4:] == [[4, 5, 10], [4, 5, 11]]
    assert plan.tail.view(2, 3).tolist() == [[6, 8, 9], [4, 5, 11]]


@pytest.mark.parametrize("lengths", [(700,), (500, 400)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_type", "text"),
    [("qwen3_5", {"linear_key_head_dim": 32, "linear_value_head_dim": 64}), ("lfm2_vl", {})],
)
def test_memory_of_a_recurrent_layer(
    lengths: tuple[int, ...], dtype: torch.dtype, model_type: str, text: dict[str, int]
) -> None:
    """Predicted within 15 per cent of what torch reports, with transformers' own kernel."""
    family = replace(TINY_FAMILIES[model_type], text={**TINY_FAMILIES[model_type].text, **text})
    config = family.config(model_type, TinySizes(hidden_size=192, intermediate_size=384))
    adapter = adapter_for(AutoModelForImageTextToText.from_config(config, dtype=dtype))
    layout, _ = pack([np.full(length, TEXT) for length in lengths], torch.device("cpu"))
    hidden = torch.randn(sum(lengths), 192, dtype=dtype)
    nobody: frozenset[int] = frozenset()
    step, table = LayerStep(nobody, nobody, nobody, nobody), torch.zeros(sum(lengths), 24, dtype=dtype)
    with torch.inference_mode(), peak_memory() as peak:
        run_layer(adapter.layers[0], hidden.clone(), nobody, step, layout, ForwardTables(table, table))
    predicted = Footprint.of(adapter).layer_of(lengths)
    assert 0.9 * peak.num_bytes < predicted < 1.15 * peak.num_bytes


def test_what_needs_layers_of_one_kind_is_refused() -> None:
    model, sample = qwen(), tiny_sample(qwen())
    inside = Strategy.depthwise(
        4, [4, 2], [4, 2], [4, 2], shares=[0.5, 0.5], selector="fastv", selector_options={"stages": [1]}
    )
    with pytest.raises(UnsupportedModelError, match="recurrent layers"), dop.pruned(model, inside):
        pass
    with dop.pruned(model, NOTHING, rankings=rankings(sample)), pytest.raises(DopError, match=r"DynamicCache\(config="):
        model(**sample, past_key_values=DynamicCache(), use_cache=True)
    with pytest.raises(ConfigError, match="recurrent or have other heads; use FLOPs"):
        CostModel(adapter_for(model).dims, [TokenCounts(3, 4)], "latency", latency=object())  # type: ignore[arg-type]
