"""The cost model against sums over samples; budgets."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dop_search.strategy import Strategy
from dop_search.strategy.cost import (
    Budget,
    CostModel,
    full_flops,
    layer_flops,
    strategy_flops,
    strategy_kv_bytes,
)
from dop_search.strategy.operations import ModelDims, TokenCounts, TokenGroup, group_sizes
from dop_search.utils.errors import BudgetError, ConfigError, DataError, StrategyError

DIMS = ModelDims(num_layers=5, hidden_size=24, intermediate_size=50, num_heads=4, num_kv_heads=2, head_dim=6)
COUNTS = [TokenCounts(3, 16), TokenCounts(9, 16), TokenCounts(3, 16), TokenCounts(4, 11)]

depths = st.integers(0, 5)
depthwise = st.builds(
    lambda q, kv, mlp, n: Strategy.depthwise(5, q, kv, mlp, num_visual_tokens=n, shares=(0.25, 0.75)),
    *[st.lists(depths, min_size=2, max_size=2)] * 3,
    st.none() | st.integers(0, 20),
)


@settings(max_examples=50, deadline=None)
@given(depthwise)
def test_totals_are_sums_over_samples(strategy: Strategy) -> None:
    model = CostModel(DIMS, COUNTS)
    assert model.total(strategy) == sum(strategy_flops(DIMS, strategy, c) for c in COUNTS)
    assert model.full_total == sum(full_flops(DIMS, c) for c in COUNTS)
    assert model.absolute(strategy) == model.total(strategy) / 4
    assert model.ratio(strategy) == model.total(strategy) / model.full_total
    assert model.floor_ratio <= model.ratio(strategy) <= 1

    cache = CostModel(DIMS, COUNTS, kind="kv_cache", bytes_per_element=4)
    assert cache.total(strategy) == sum(strategy_kv_bytes(DIMS, strategy, c, 4) for c in COUNTS)
    assert cache.full == sum(2 * DIMS.kv_width * 4 * DIMS.num_layers * c.total for c in COUNTS) / 4


@pytest.mark.parametrize("kind", ["flops", "kv_cache"])
def test_floor_is_the_cost_without_visual_tokens(kind: str) -> None:
    model = CostModel(DIMS, COUNTS, kind=kind)  # type: ignore[arg-type]
    assert model.floor_ratio == model.ratio(Strategy.full(5, num_visual_tokens=0))
    assert model.floor_total == model.total(Strategy.depthwise(5, 5, 0, 5))


def test_group_prices_are_sums_over_samples() -> None:
    """Looked up by sets of groups, a layer costs what it costs with that many tokens, sample by sample."""
    model = CostModel(DIMS, COUNTS)
    limits = [0, 5, 13, 16]
    prices = model.group_prices(limits, (0.3, 0.7))
    groups = (TokenGroup(0.3), TokenGroup(0.7))
    for row, limit in enumerate(limits):
        for queries, keys, mlps in itertools.product(range(4), repeat=3):
            expected = last = 0
            for sample in COUNTS:
                sizes = group_sizes(groups, min(limit, sample.visual))
                n = [
                    sample.text + sum(k for g, k in enumerate(sizes) if bits >> g & 1) for bits in (queries, keys, mlps)
                ]
                expected += layer_flops(DIMS, *n)
                last += layer_flops(DIMS, sample.text, n[1], sample.text)
            assert prices.attention[row, 0, queries, keys] + prices.mlp[row, mlps, keys] == expected
            assert prices.last[row, keys] == last
    assert prices.fixed == 0


def test_bad_input_is_refused() -> None:
    with pytest.raises(DataError, match="at least one sample"):
        CostModel(DIMS, [])
    with pytest.raises(ConfigError, match="'latncy'"):
        CostModel(DIMS, COUNTS, kind="latncy")  # type: ignore[arg-type]
    with pytest.raises(StrategyError, match="6 layers"):
        CostModel(DIMS, COUNTS).ratio(Strategy.full(6))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of .* but got none"),
        ({"flops_ratio": 0.5, "kv_ratio": 0.5}, "exactly one of"),
        ({"flops_ratio": 0.0}, r"`0 < flops_ratio <= 1` must hold, but got \(flops_ratio=0\)"),
        ({"kv_ratio": 1.5}, r"`0 < kv_ratio <= 1` must hold, but got \(kv_ratio=1.5\)"),
        ({"flops_ratio": float("nan")}, "flops_ratio=nan"),
        ({"flops": -3.0}, "flops=-3"),
        ({"flops_ratio": 10**400}, "flops_ratio=inf"),
        ({"kv_bytes": float("inf")}, "kv_bytes=inf"),
        ({"flops_ratio": "0.5"}, "must be a number"),
    ],
)
def test_bad_budgets_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(**fields)


def test_budgets_resolve_to_ratios() -> None:
    flops, cache = CostModel(DIMS, COUNTS), CostModel(DIMS, COUNTS, kind="kv_cache")
    assert Budget(flops_ratio=0.25).resolve(flops) == 0.25
    assert Budget(flops=0.25 * flops.full).resolve(flops) == pytest.approx(0.25)
    assert Budget(kv_bytes=0.5 * cache.full).resolve(cache) == pytest.approx(0.5)
    with pytest.raises(BudgetError, match="kind 'kv_cache', but got 'flops'"):
        Budget(kv_ratio=0.5).resolve(flops)
    with pytest.raises(BudgetError, match="must not exceed the full model's"):
        Budget(flops=2 * flops.full).resolve(flops)


def test_infeasible_error_names_a_feasible_value() -> None:
    model = CostModel(DIMS, COUNTS)
    for smallest in (1 / 3, 0.1234567891, 0.2):
        error = Budget(flops_ratio=0.01).infeasible(model, smallest)
        named = float(str(error).split("smallest feasible value is ")[1].split(",")[0])
        assert smallest <= named <= smallest * (1 + 1e-5)
        assert error.smallest_feasible == smallest
