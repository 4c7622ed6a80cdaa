"""FLOPs, KV bytes and literature conventions against numbers from papers and an independent count."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conventions import CONVENTIONS
from hypothesis import given, settings
from hypothesis import strategies as st

from dop_search.strategy import Strategy
from dop_search.strategy.cost import (
    CostModel,
    full_flops,
    layer_counts,
    layer_flops,
    strategy_flops,
    strategy_kv_bytes,
)
from dop_search.strategy.operations import ModelDims, RecurrentDims, TokenCounts
from dop_search.utils.errors import StrategyError

LLAVA_7B = ModelDims(
    num_layers=32, hidden_size=4096, intermediate_size=11008, num_heads=32, num_kv_heads=32, head_dim=128
)
GQA = ModelDims(
    num_layers=4,
    hidden_size=48,
    intermediate_size=100,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    gated_mlp=False,
)


@pytest.mark.parametrize(
    ("name", "text", "visual", "published_tera"),
    [
        ("pdrop", 64, 576, 3.817),
        ("pdrop", 64, 2880, 20.825),
        ("pdrop", 0, 192, 1.253),
        ("pdrop", 0, 64, 0.416),
        ("fastv", 64, 576, 2.99),
        ("fastv", 64, 2880, 16.67),
        ("gsop", 135, 576, 9.474),
    ],
)
def test_conventions_reproduce_published_numbers(name: str, text: int, visual: int, published_tera: float) -> None:
    decimals = len(str(published_tera).split(".")[1])
    measured = CONVENTIONS[name].full(LLAVA_7B, TokenCounts(text, visual)) / 1e12
    assert round(measured, decimals) == published_tera


def test_gsop_convention_is_ours() -> None:
    strategy = Strategy.depthwise(32, 20, 24, 12, num_visual_tokens=100)
    counts = TokenCounts(135, 576)
    assert CONVENTIONS["gsop"].strategy(LLAVA_7B, strategy, counts) == strategy_flops(LLAVA_7B, strategy, counts)


def test_convention_of_token_reduction_is_the_formula_at_that_many_tokens() -> None:
    """Keeping 64 tokens costs what the papers quote for 64, less the dead operations of the last layer."""
    strategy = Strategy.depthwise(32, 32, 32, 32, num_visual_tokens=64)
    macs = CONVENTIONS["pdrop"].strategy(LLAVA_7B, strategy, TokenCounts(50, 576))
    n, d, m = 64, 4096, 11008
    dead = 2 * n * d * d + 2 * n * n * d + 3 * n * d * m
    assert macs == 32 * (4 * n * d * d + 2 * n * n * d + 3 * n * d * m) - dead


@st.composite
def layer_set_strategies(draw: st.DrawFn, num_layers: int) -> Strategy:
    num_groups = draw(st.integers(1, 3))
    bits = draw(st.lists(st.booleans(), min_size=num_groups * num_layers * 3, max_size=num_groups * num_layers * 3))
    shares = {1: [1.0], 2: [0.25, 0.75], 3: [0.2, 0.3, 0.5]}[num_groups]
    return Strategy.from_array(
        np.array(bits, dtype=bool).reshape(num_groups, num_layers, 3),
        shares=shares,
        num_visual_tokens=draw(st.none() | st.integers(0, 12)),
    )


def count_by_hand(dims: ModelDims, strategy: Strategy, counts: TokenCounts) -> int:
    """Matrix by matrix, token by token group, no shared code with the package but the group sizes."""
    sizes = strategy.group_sizes(counts.visual)
    total = 0
    for layer in range(dims.num_layers):
        queries = keys = mlps = either = counts.text
        for size, policy in zip(sizes, strategy.groups, strict=True):
            last_key = max(policy.kv, default=-1)
            queries += size * (layer in policy.q and layer < last_key)
            keys += size * (layer in policy.kv)
            mlps += size * (layer in policy.mlp and layer < last_key)
            either += size * (layer in policy.kv or (layer in policy.q and layer < last_key))
        width, kv_width = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
        mixer = [
            *[(queries, dims.hidden_size, width)] * (1 + dims.gated_queries),  # q_proj and its gate
            (keys, dims.hidden_size, kv_width),  # k_proj
            (keys, dims.hidden_size, kv_width),  # v_proj
            (queries, width, dims.hidden_size),  # o_proj
            (queries, width, keys),  # scores of all heads
            (queries, keys, width),  # values of all heads
        ]
        if dims.recurrent is not None and layer in dims.recurrent.layers:  # two heads of 3 keys and 5 values
            mixer = [
                (either, dims.hidden_size, 2 * (3 + 3 + 5 + 1 + 1)),  # queries, keys, values, decays, strengths
                *[(queries, dims.hidden_size, 2 * 5)] * 2,  # gate and output
                *[(either, 2 * 3, 5)] * 3,  # what the state says of the key, what it learns, what it answers
            ]
        for rows, inner, columns in [
            *mixer,
            *[(mlps, dims.hidden_size, dims.intermediate_size)] * (3 if dims.gated_mlp else 2),
        ]:
            total += 2 * rows * inner * columns
    return total


@settings(max_examples=60, deadline=None)
@given(
    strategy=layer_set_strategies(GQA.num_layers),
    text=st.integers(1, 9),
    visual=st.integers(0, 20),
    recurrent=st.sets(st.integers(0, GQA.num_layers - 1)),
)
def test_strategy_flops_equal_a_count_matrix_by_matrix(
    strategy: Strategy, text: int, visual: int, recurrent: set[int]
) -> None:
    counts, dims = TokenCounts(text, visual), GQA
    if recurrent:
        sizes = RecurrentDims(tuple(recurrent), in_width=26, out_width=20, state_size=30, window_size=64)
        dims = replace(GQA, gated_queries=True, recurrent=sizes)
    by_hand = count_by_hand(dims, strategy, counts)
    assert strategy_flops(dims, strategy, counts) == by_hand
    assert CostModel(dims, [counts, counts]).total(strategy) == 2 * by_hand


def test_full_counts_dead_operations_and_the_empty_strategy_does_not() -> None:
    counts = TokenCounts(5, 7)
    full = full_flops(GQA, counts)
    assert full == GQA.num_layers * layer_flops(GQA, 12, 12, 12)
    empty = strategy_flops(GQA, Strategy.full(GQA.num_layers), counts)
    assert full - empty == layer_flops(GQA, 12, 12, 12) - layer_flops(GQA, 5, 12, 5)


def test_layer_flops_of_arrays_equal_those_of_integers() -> None:
    n_q, n_kv, n_mlp = np.array([3, 5]), np.array([4, 9]), np.array([1, 7])
    expected = [layer_flops(GQA, 3, 4, 1), layer_flops(GQA, 5, 9, 7)]
    assert layer_flops(GQA, n_q, n_kv, n_mlp).tolist() == expected


def test_kv_bytes() -> None:
    """Two tensors of 8 * 2 numbers of 2 bytes for each cached token of each layer."""
    counts = TokenCounts(5, 10)
    strategy = Strategy.depthwise(4, q=4, kv=[3, 1], mlp=4, num_visual_tokens=8, shares=[0.25, 0.75])
    assert strategy_kv_bytes(GQA, strategy, counts) == 2 * 16 * 2 * (4 * 5 + 3 * 2 + 1 * 6)
    assert strategy_kv_bytes(GQA, Strategy.full(GQA.num_layers), counts, bytes_per_element=4) == 2 * 16 * 4 * 4 * 15
    assert layer_counts(strategy, counts).kv.tolist() == [13, 7, 7, 5]


def test_foreign_strategy_is_refused() -> None:
    with pytest.raises(StrategyError, match="32 layers, but the model has 4"):
        strategy_flops(GQA, Strategy.full(32), TokenCounts(1, 1))


def test_a_shortened_decoder_keeps_the_numbers_of_the_full_one() -> None:
    sizes = RecurrentDims((0, 2, 5), in_width=26, out_width=20, state_size=30, window_size=64)
    dims = ModelDims(6, 64, 128, num_heads=4, num_kv_heads=2, head_dim=16, recurrent=sizes)
    assert replace(dims, num_layers=4).kinds == dims.kinds[:4]
