"""Exit depths in the vision tower: what runs, what it costs, and that the tower is left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_inputs import tiny_inputs
from support.tiny_models import tiny_llava, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from dop_search.models.capture import attention_flops, mlp_flops
from dop_search.models.families import adapter_for
from dop_search.models.tower_depth import tower_depth_flops, tower_depths
from dop_search.testing.measure import model_state, state_difference
from dop_search.utils.errors import StrategyError

DEPTHS = [(0, 0), (1, 2), (2, 0), (3, 3)]


def test_what_does_not_run_passes_the_residual_stream_by() -> None:
    model = tiny_llava(2)
    view = adapter_for(model).tower_view
    pixels = torch.randn(2, 3, view.module.config.image_size, view.module.config.image_size)
    before = model_state(model)
    for attention, mlp in DEPTHS:
        with torch.no_grad(), tower_depths(view, attention, mlp):
            states = view.module(pixels).last_hidden_state
        with torch.no_grad():
            x = view.module.pre_layrnorm(view.module.embeddings(pixels))
            for index, layer in enumerate(view.layers):
                if index < attention:
                    x = x + layer.self_attn(hidden_states=layer.layer_norm1(x), attention_mask=None)[0]
                if index < mlp:
                    x = x + layer.mlp(layer.layer_norm2(x))
        assert torch.allclose(states, x, atol=1e-5)
    assert not state_difference(before, model_state(model))


def zeroed(module: torch.nn.Module, args: Any, output: Any) -> Any:
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


@pytest.mark.parametrize("family", ["llava", "llava_onevision"])  # CLIP, SigLIP
def test_it_is_as_if_the_modules_gave_zero_and_the_model_is_what_it_was(family: str) -> None:
    model = tiny_model(family, 2)
    view, inputs = adapter_for(model).tower_view, tiny_inputs(model)
    before = model_state(model)
    with torch.no_grad():
        full = model(**inputs).logits
        handles = [layer.self_attn.register_forward_hook(zeroed) for layer in view.layers[1:]]
        handles += [layer.mlp.register_forward_hook(zeroed) for layer in view.layers[2:]]
        expected = model(**inputs).logits
        for handle in handles:
            handle.remove()
        with tower_depths(view, attention=1, mlp=2):
            logits = model(**inputs).logits
        with pytest.raises(RuntimeError, match="inside"), tower_depths(view, 0, 0):
            raise RuntimeError("inside")
        assert torch.equal(model(**inputs).logits, full)
    assert torch.allclose(logits, expected, atol=1e-6)
    assert not torch.allclose(logits, full, atol=1e-4)
    assert not state_difference(before, model_state(model))


@pytest.mark.parametrize(("attention", "mlp"), DEPTHS)
def test_flops_are_what_a_counter_measures(attention: int, mlp: int) -> None:
    model = tiny_llava(2, attn_implementation="eager")
    view = adapter_for(model).tower_view
    assert view.grid is not None
    size, patches = view.module.config.image_size, view.grid[0] * view.grid[1]
    pixels = torch.randn(1, 3, size, size)

    def count(attention: int, mlp: int) -> int:
        with torch.no_grad(), tower_depths(view, attention, mlp), FlopCounterMode(display=False) as counter:
            view.module(pixels)
        return int(counter.get_total_flops())

    expected = tower_depth_flops(view, attention, mlp, patches)
    assert count(attention, mlp) - count(0, 0) == expected
    if attention == mlp == len(view.layers):
        assert expected == attention * (attention_flops(view, patches) + mlp_flops(view, patches))


def test_depths_beyond_the_tower_are_refused() -> None:
    view = adapter_for(tiny_llava(2)).tower_view
    with (
        pytest.raises(StrategyError, match=r"`0 <= mlp <= \d+` must hold for the vision tower, but got 99"),
        tower_depths(view, 0, 99),
    ):
        pass
