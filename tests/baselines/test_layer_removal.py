"""Removing whole layers against a model that was built without them, and the low-rank repair against least squares."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from support.tiny_inputs import tiny_inputs, tiny_sample
from support.tiny_models import tiny_llava
from transformers import PreTrainedModel

import dop_search as dop
from dop_search.baselines.layer_removal import LowRankRepair, layers_removed
from dop_search.evaluation.timing.counting import count_decoder_flops
from dop_search.models import adapter_for
from dop_search.strategy import Strategy
from dop_search.strategy.cost.flops import strategy_flops
from dop_search.strategy.operations import TokenCounts
from dop_search.testing.measure import cache_lengths, model_state, state_difference
from dop_search.testing.reference import text_positions
from dop_search.utils.errors import DopError

LAYERS = 5
REMOVED = (0, 3)


@functools.cache
def model_of(backend: str) -> PreTrainedModel:
    return tiny_llava(num_layers=LAYERS, attn_implementation=backend)


def built_without(model: PreTrainedModel, removed: tuple[int, ...]) -> PreTrainedModel:
    """A new model of fewer layers with the weights of the others."""
    short = tiny_llava(num_layers=LAYERS - len(removed), attn_implementation=model.config._attn_implementation)
    kept = [layer for layer in range(LAYERS) if layer not in removed]
    weights = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if "language_model.layers." in name:
            at = parts.index("layers") + 1
            if int(parts[at]) in removed:
                continue
            parts[at] = str(kept.index(int(parts[at])))
        weights[".".join(parts)] = value
    short.load_state_dict(weights)
    return short


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_equals_a_model_built_without_the_layers(backend: str) -> None:
    """Logits, cache and generated tokens of a padded batch."""
    model = model_of(backend)
    short, inputs = built_without(model, REMOVED), tiny_inputs(model)
    with torch.no_grad():
        expected = short(**inputs).logits
        tokens = short.generate(**inputs, max_new_tokens=5, do_sample=False)
        full = model(**inputs).logits
        with layers_removed(model, REMOVED):
            output = model(**inputs, use_cache=True)
            assert torch.equal(output.logits, expected)
            assert len(cache_lengths(output.past_key_values)) == LAYERS - 2
            assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), tokens)
        assert not torch.equal(full, expected)
        assert torch.equal(model(**inputs).logits, full)


def test_fewer_tokens_and_fewer_layers_together() -> None:
    """The short model under a strategy of its own depth, and the price of that strategy."""
    model = model_of("eager")
    short, inputs = built_without(model, REMOVED), tiny_sample(model, 3, 4)
    strategy = Strategy.full(LAYERS - 2, num_visual_tokens=7)
    with torch.no_grad():
        with dop.pruned(short, strategy):
            expected = short(**inputs).logits
        with layers_removed(model, REMOVED, num_visual_tokens=7):
            logits = model(**inputs).logits
            counted = count_decoder_flops(model, inputs)
    text = text_positions(model, inputs)
    torch.testing.assert_close(logits[text], expected[text])
    assert counted == strategy_flops(adapter_for(short).dims, strategy, TokenCounts(7, 16))


@pytest.mark.parametrize("leave", ["exit", "exception"])
def test_model_is_restored(leave: str) -> None:
    model = tiny_llava(num_layers=LAYERS)
    repair = LowRankRepair(torch.zeros(32, 2), torch.zeros(2, 32), torch.ones(32))
    before = copy.copy(model_state(model))
    if leave == "exit":
        with layers_removed(model, REMOVED, num_visual_tokens=3, repair=repair):
            assert model.config.text_config.num_hidden_layers == LAYERS - 2
    else:
        with pytest.raises(KeyError), layers_removed(model, REMOVED, repair=repair):
            raise KeyError
    assert state_difference(before, model_state(model)) == []


def test_refuses_what_it_cannot_remove() -> None:
    model = model_of("sdpa")
    before = model_state(model)
    for removed in ((LAYERS,), range(LAYERS)):
        with pytest.raises(DopError, match="leave one"), layers_removed(model, removed):
            pass
    with (
        dop.pruned(model, Strategy.full(LAYERS, num_visual_tokens=2)),
        pytest.raises(DopError, match="is pruned"),
        layers_removed(model, (1,)),
    ):
        pass
    assert state_difference(before, model_state(model)) == []


def test_repair_equals_least_squares_at_full_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    wanted = states + states @ torch.randn(6, 6, generator=generator, dtype=torch.float64) + 3.0
    repair = LowRankRepair.fit(states, wanted, rank=6, ridge=1e-12)
    torch.testing.assert_close(repair(states), wanted)
    noisy = wanted + torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    errors = [float((LowRankRepair.fit(states, noisy, rank)(states) - noisy).pow(2).mean()) for rank in (1, 3, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < float((states - noisy).pow(2).mean())


def test_repair_is_applied_before_the_final_norm_and_priced() -> None:
    model, inputs = model_of("eager"), tiny_sample(model_of("eager"), 3, 4)
    generator = torch.Generator().manual_seed(1)
    repair = LowRankRepair(*(torch.randn(shape, generator=generator) for shape in ((32, 2), (2, 32), (32,))))
    seen = []
    with torch.no_grad(), layers_removed(model, REMOVED):
        handle = model.model.language_model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(**inputs)
        plain_flops = count_decoder_flops(model, inputs)
        handle.remove()
        norm, head = model.model.language_model.norm, model.lm_head
        expected = head(norm(seen[0] + seen[0] @ repair.down @ repair.up + repair.bias))
    with torch.no_grad(), layers_removed(model, REMOVED, repair=repair):
        torch.testing.assert_close(model(**inputs).logits, expected)
        extra = count_decoder_flops(model, inputs) - plain_flops
    assert extra == repair.flops(adapter_for(model).dims, TokenCounts(7, 16), 16)
