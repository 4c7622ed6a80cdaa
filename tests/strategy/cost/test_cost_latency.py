"""The latency table: interpolation against a formula, sums over samples, budgets, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget, CostModel, LatencyTable
from dop_search.strategy.operations import ModelDims, TokenCounts
from dop_search.utils.errors import BudgetError, CacheError, ConfigError

DIMS = ModelDims(num_layers=4, hidden_size=8, intermediate_size=8, num_heads=2, num_kv_heads=2, head_dim=4)
WHERE = {
    "device": "cpu (x86_64)",
    "device_type": "cpu",
    "num_threads": 1,
    "dtype": "float32",
    "attn_implementation": "sdpa",
    "dims_fingerprint": "llava-1",
    "versions": {"torch": "2"},
    "clock": "wall",
}
TEXT, VISUAL, SHARES = (10, 20), (0, 40, 100), (0.25, 0.75)


def bilinear_ms(text: float, keys: float, queries: float, mlps: float) -> float:
    """A made-up layer that linear interpolation meets exactly; arguments are text tokens and visual tokens."""
    part = 0.0 if queries in (0, keys) else 0.003 * queries  # index sets cost extra unless all or none take part
    return 0.5 + 0.01 * text + 0.002 * keys + 0.004 * queries + part + 0.006 * mlps


def made_up_table() -> LatencyTable:
    grid = [[(t, v) for v in VISUAL] for t in TEXT]
    keys = np.array([[bilinear_ms(t, v, 0, 0) for t, v in row] for row in grid])
    whole = np.array([[bilinear_ms(t, v, v, 0) for t, v in row] for row in grid]) - keys
    mlp = np.array([[bilinear_ms(t, v, 0, v) for t, v in row] for row in grid]) - keys
    part = np.array([[[bilinear_ms(t, v, f * v, 0) for f in SHARES] for t, v in row] for row in grid])
    mlp_part = np.array([[[bilinear_ms(t, v, 0, f * v) for f in SHARES] for t, v in row] for row in grid])
    return LatencyTable(
        environment=WHERE,
        num_layers=4,
        text=TEXT,
        visual=VISUAL,
        shares=SHARES,
        keys_ms=keys,
        queries_ms=whole,
        mlp_ms=mlp,
        queries_part_ms=part - keys[:, :, None],
        mlp_part_ms=mlp_part - keys[:, :, None],
        lengths=(10, 120),
        fixed_ms=np.array([1.0, 2.1]),
        full_ms=np.array([4.0, 12.0]),
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(10, 20), st.integers(0, 100), st.floats(0, 1), st.floats(0, 1))
def test_interpolation_meets_a_function_that_is_linear_between_the_points(
    text: int, keys: int, share_q: float, share_mlp: float
) -> None:
    table = made_up_table()
    queries, mlps = round(share_q * keys), round(share_mlp * keys)
    price = table.attention(text, text + queries, text + keys, text + keys) + table.mlp_price(
        text, text + keys, text + mlps
    )
    assert int(price) == pytest.approx(1e6 * bilinear_ms(text, keys, queries, mlps), abs=3)
    assert int(table.fixed(text + keys)) == pytest.approx(1e6 * (1 + 0.01 * (text + keys - 10)), abs=1)


def test_more_tokens_never_take_less_time_even_if_the_readings_say_so() -> None:
    table = made_up_table()
    noisy = replace(table, keys_ms=np.array([[1.0, 0.8, 2.0], [0.9, 1.5, 1.4]]))
    assert noisy.keys_ms.tolist() == [[1.0, 1.0, 2.0], [1.0, 1.5, 2.0]]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.builds(TokenCounts, st.integers(10, 20), st.integers(30, 100)), min_size=1, max_size=5),
    *[st.lists(st.integers(0, 4), min_size=2, max_size=2)] * 3,
    st.none() | st.integers(1, 100),
)
def test_a_prefill_is_the_sum_of_its_layers_over_samples(
    counts: list[TokenCounts], q: list[int], kv: list[int], mlp: list[int], tokens: int | None
) -> None:
    table = made_up_table()
    strategy = Strategy.depthwise(4, q, kv, mlp, num_visual_tokens=tokens, shares=(0.25, 0.75))
    expected = 0.0
    for sample in counts:
        expected += 1.0 + 0.01 * (sample.total - 10)
        sizes = strategy.group_sizes(sample.visual)
        policies = strategy.canonical().groups
        for layer in range(4):
            runs = [
                sum(size for size, policy in zip(sizes, policies, strict=True) if layer in getattr(policy, name))
                for name in ("kv", "q", "mlp")
            ]
            expected += bilinear_ms(sample.text, *runs)
    model = CostModel(DIMS, counts, "latency", latency=table)
    assert model.total(strategy) / 1e6 == pytest.approx(expected, rel=1e-5)
    assert model.full_total / 1e6 == pytest.approx(sum(4 + 8 * (c.total - 10) / 110 for c in counts), rel=1e-5)


def test_latency_budgets() -> None:
    counts = [TokenCounts(10, 100)]
    model = CostModel(DIMS, counts, "latency", latency=made_up_table())
    assert Budget(latency_ratio=0.5).resolve(model) == 0.5
    full_ms = 4 + 8 * 100 / 110
    assert Budget(latency_ms=full_ms / 4).resolve(model) == pytest.approx(0.25, rel=1e-5)
    with pytest.raises(BudgetError, match=r"must not exceed the full model's 11\.2727 ms per sample"):
        Budget(latency_ms=12.0).resolve(model)
    with pytest.raises(BudgetError, match="kind 'latency', but got 'flops'"):
        Budget(latency_ratio=0.5).resolve(CostModel(DIMS, counts))
    error = Budget(latency_ms=0.1).infeasible(model, 0.4)
    assert error.smallest_feasible == pytest.approx(0.4 * full_ms, rel=1e-5)


def test_what_a_cost_model_refuses() -> None:
    table = made_up_table()
    with pytest.raises(ConfigError, match="needs a table of what was measured"):
        CostModel(DIMS, [TokenCounts(10, 50)], "latency")
    for counts, what in (
        (TokenCounts(9, 50), "10 to 20 text tokens, but the samples have 9"),
        (TokenCounts(12, 101), "0 to 100 visual tokens"),
    ):
        with pytest.raises(ConfigError, match=what):
            CostModel(DIMS, [counts], "latency", latency=table)
    with pytest.raises(ConfigError, match="4 layers, but this one has 5"):
        CostModel(replace(DIMS, num_layers=5), [TokenCounts(10, 50)], "latency", latency=table)


def test_files_round_trip_and_are_refused_elsewhere(tmp_path: Path) -> None:
    table = made_up_table()
    path = tmp_path / "table.json"
    table.save(path)
    loaded = LatencyTable.load(path, WHERE)
    assert loaded.to_json() == table.to_json()
    other = {**WHERE, "device": "NVIDIA H200", "attn_implementation": "eager"}
    with pytest.raises(ConfigError, match=r"device: measured on 'cpu \(x86_64\)', asked for 'NVIDIA H200'") as caught:
        LatencyTable.load(path, other)
    assert "attn_implementation" in str(caught.value)
    assert LatencyTable.load(path).to_json() == table.to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "not a latency table of version 1"),
        ({"keys_ms": [[1.0]]}, "malformed"),
        ({"visual": [5, 40, 100]}, "starts at 0 visual tokens"),
        ({"text": [20, 10]}, "must ascend"),
        ({"fixed_ms": [1.0, float("nan")]}, "must be finite"),
    ],
)
def test_a_malformed_table_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CacheError, match=message):
        LatencyTable.from_json({**made_up_table().to_json(), **change})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"there is no latency table at .*nowhere\.json"):
        LatencyTable.load(tmp_path / "nowhere.json", WHERE)
