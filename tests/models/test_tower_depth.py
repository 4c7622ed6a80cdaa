"""Exit depths in the vision tower: what runs, what it costs, and that the tower is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dop_search.errors import StrategyError
from dop_search.models.capture import tower_flops
from dop_search.models.families import adapter_for
from dop_search.models.tower_depth import tower_depth_flops, tower_depths
from dop_search.testing.measure import model_state, state_difference
from dop_search.testing.models import tiny_llava

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
        assert expected == tower_flops(view, [(patches, patches)])


def test_depths_beyond_the_tower_are_refused() -> None:
    view = adapter_for(tiny_llava(2)).tower_view
    with (
        pytest.raises(StrategyError, match=r"`0 <= mlp <= \d+` must hold for the vision tower, but got 99"),
        tower_depths(view, 0, 99),
    ):
        pass
