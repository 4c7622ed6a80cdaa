"""What a pruned forward asks of an accelerator, counted without one."""

from __future__ import annotations

import pytest
import torch
from support.tiny_inputs import tiny_inputs
from support.tiny_models import tiny_llava

import dop_search as dop
from dop_search.evaluation.timing.launches import HostWaits, Launches
from dop_search.utils.errors import DopError

LAYERS = 6
STRATEGY = dop.Strategy.depthwise(LAYERS, 3, 5, 2, num_visual_tokens=9, selector="uniform_grid")


def test_counts_what_is_known() -> None:
    rows, weight = torch.ones(4, 8), torch.ones(8, 8)
    with torch.inference_mode(), Launches() as launches:
        torch.nn.functional.rms_norm(torch.nn.functional.linear(rows, weight).view(2, 2, 8).transpose(0, 1), (8,)) + 1
    assert launches.by_name == {"linear": 1, "rms_norm": 1, "add": 1}
    with HostWaits() as waits:
        if (rows > 0).all():
            rows[rows > 2], rows[:2].sum().item()
    assert waits.by_name == {"__bool__": 1, "__getitem__": 1, "item": 1}


@pytest.fixture(scope="module")
def model():
    return tiny_llava(num_layers=LAYERS)


@torch.inference_mode()
def per_step(model, inputs, counter) -> float:
    """Of a step of ``generate()``."""
    totals = []
    for tokens in (2, 7):
        with counter() as counted:
            model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        totals.append(counted.by_name.total())
    return (totals[1] - totals[0]) / 5


@pytest.mark.parametrize("lengths", [((3, 4),), ((3, 4), (1, 2))], ids=["one", "padded"])
def test_a_step_waits_no_more_and_launches_less_than_the_plain_model(model, lengths) -> None:
    inputs = tiny_inputs(model, lengths)
    plain = [per_step(model, inputs, counter) for counter in (HostWaits, Launches)]
    with dop.pruned(model, STRATEGY):
        waits, launches = (per_step(model, inputs, counter) for counter in (HostWaits, Launches))
    assert waits <= plain[0]
    assert launches <= plain[1] - 10 * LAYERS


@torch.inference_mode()
def test_only_generate_is_trusted_with_the_mask(model) -> None:
    """A step of one's own is checked, also over the cache that ``generate()`` has left."""
    inputs = tiny_inputs(model, ((3, 4),))
    with dop.pruned(model, STRATEGY):
        found = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        cache = found.past_key_values
        mask = torch.ones(1, cache.get_seq_length() + 1, dtype=torch.long)
        mask[0, 2] = 0
        with pytest.raises(DopError, match="hides or shows other tokens"):
            model(input_ids=found.sequences[:, -1:], attention_mask=mask, past_key_values=cache)


@torch.inference_mode()
def test_layers_of_a_known_prompt_shape_neither_wait_nor_change(model) -> None:
    """What a CUDA graph of the layers needs: the second prompt of a shape launches the same, and waits for nothing."""
    text = model.model.language_model
    seen = []
    for seed in (0, 1):
        inputs = tiny_inputs(model, ((3, 4),))
        inputs["pixel_values"] = torch.randn(inputs["pixel_values"].shape, generator=torch.manual_seed(seed))
        with dop.pruned(model, STRATEGY):
            decoder = text.forward.__self__
            model(**inputs)
            first = counted(decoder, model, inputs)
            seen.append(first)
    assert seen[0] == seen[1]
    assert seen[0][0] == {}, "no wait from the first layer to the last"


def counted(decoder, model, inputs):
    """Waits and launches between the first norm of the first layer and the last layer's MLP."""
    waits, launches, shapes = HostWaits(), Launches(), []
    layers = decoder.adapter.layers

    def enter(*_):
        waits.__enter__()
        launches.__enter__()

    def leave(_, args, __):
        launches.__exit__(None, None, None)
        waits.__exit__(None, None, None)
        shapes.append(args[0].shape)

    hooks = layers[0].input_layernorm.register_forward_pre_hook(enter), layers[-1].mlp.register_forward_hook(leave)
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return dict(waits.by_name), dict(launches.by_name), shapes
