"""``torch.compile``: the same logits, and no compilation after the first prompt."""

from __future__ import annotations

import pytest
import torch
from support.tiny_inputs import tiny_inputs
from support.tiny_models import tiny_llava
from torch._dynamo.utils import counters

import dop_search as dop
from dop_search.testing.conformance.base import generate, max_text_difference

pytestmark = pytest.mark.slow

PROMPTS = (((3, 4),), ((5, 9),), ((6, 17),))
BACKEND = "aot_eager"  # what is compiled anew, and when, does not depend on the code generator, which takes a minute
NUM_LAYERS = 10
"""More layers than ``torch.compile`` makes variants of one function: one compilation has to serve them all."""


def compiled_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def strategy(num_layers: int) -> dop.Strategy:
    return dop.Strategy.depthwise(num_layers, 2, num_layers - 1, 1, num_visual_tokens=9, selector="uniform_grid")


def test_compiled_layers_are_right_and_compiled_once() -> None:
    model = tiny_llava(num_layers=NUM_LAYERS)
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    for lengths in PROMPTS:
        inputs = tiny_inputs(model, lengths)
        with torch.no_grad(), dop.pruned(model, strategy(NUM_LAYERS)):
            logits = model(**inputs).logits
            tokens = generate(model, **inputs, max_new_tokens=4, do_sample=False)
        with torch.no_grad(), dop.pruned(model, strategy(NUM_LAYERS), compile=BACKEND):
            compiled_logits = model(**inputs).logits
            compiled_tokens = generate(model, **inputs, max_new_tokens=4, do_sample=False)
        assert max_text_difference(model, inputs, compiled_logits, logits) <= 2e-5
        assert compiled_tokens.tolist() == tokens.tolist()
        graphs.append(compiled_graphs())
    assert 0 < graphs[0] < NUM_LAYERS * 2
    assert graphs == graphs[:1] * len(PROMPTS), "another prompt or another step compiled again"


def test_whole_model_can_be_compiled_around_the_pruned_decoder() -> None:
    model = tiny_llava(num_layers=2)
    inputs = tiny_inputs(model)
    with torch.no_grad(), dop.pruned(model, strategy(2)):
        expected = model(**inputs).logits
        logits = torch.compile(model, backend="eager")(**inputs).logits
    assert max_text_difference(model, inputs, logits, expected) <= 2e-5


def test_a_compiled_model_that_has_run_is_pruned_and_restored() -> None:
    model = tiny_llava(num_layers=2)
    inputs = tiny_inputs(model)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        full = compiled(**inputs).logits
        with dop.pruned(model, strategy(2)):
            expected = model(**inputs).logits
        with dop.pruned(compiled, strategy(2)):
            assert max_text_difference(model, inputs, compiled(**inputs).logits, expected) <= 2e-5
            tokens = compiled.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3
        assert torch.equal(compiled(**inputs).logits, full)
