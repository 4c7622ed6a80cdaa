"""Spaces, curves and the additive surrogate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from invented_problems import KINDS, counted, enumerate_plainly, interacting_evaluator, make_space, problems

from dop_search.search import Curve, CurveGrid, Curves, EvaluationStore, Problem, Space, Surrogate
from dop_search.strategy import Strategy
from dop_search.utils.errors import CacheError, ConfigError, StrategyError

# -- spaces -------------------------------------------------------------------------------------


def test_parameters_of_the_spaces() -> None:
    assert Space.dop(8, 9).names == ("attention_depth", "mlp_depth", "num_visual_tokens")
    assert Space.dop_split(8, 9).names == ("q_depth", "kv_depth", "mlp_depth", "num_visual_tokens")
    assert Space.uniform(8, 9).names == ("num_visual_tokens",)
    groups = Space.dop_groups(8, 9, shares=(0.25, 0.75))
    assert groups.names == (
        *("g0_q_depth", "g0_kv_depth", "g0_mlp_depth", "g1_q_depth", "g1_kv_depth", "g1_mlp_depth"),
        "num_visual_tokens",
    )
    assert Space.dop(8, 9).tokens.levels == tuple(range(1, 10))
    assert Space.dop(8, 9, min_visual_tokens=0).tokens.levels[0] == 0
    assert Space.dop(8, 9).num_assignments == 9 * 9 * 9


def test_assignments_are_canonical_strategies() -> None:
    space = Space.dop(8, 20, selector="random", selector_options={"seed": 3}, model_fingerprint="m")
    strategy = space.strategy({"attention_depth": 5, "mlp_depth": 7, "num_visual_tokens": 11})
    expected = Strategy.depthwise(
        8, 4, 5, 4, num_visual_tokens=11, selector="random", selector_options={"seed": 3}, model_fingerprint="m"
    )
    assert strategy == expected  # q and mlp beyond layer 3 are dead with kv up to layer 4
    groups = Space.dop_groups(8, 20, shares=(0.25, 0.75), split=True)
    strategy = groups.single("g1_kv_depth", 3)
    assert strategy.depths() == {"q": (7, 2), "kv": (8, 3), "mlp": (7, 2)}
    assert strategy.num_visual_tokens is None


@pytest.mark.parametrize("kind", KINDS)
def test_full_is_the_empty_strategy_and_every_parameter_at_full_too(kind: str) -> None:
    space = make_space(kind, 5, 12)
    assert space.strategy(space.full).is_empty
    for parameter in space.parameters:
        assert space.single(parameter.name, parameter.full).is_empty
        assert not space.single(parameter.name, parameter.levels[0]).is_empty


def test_bad_names_and_levels_are_refused() -> None:
    space = Space.dop_split(4, 10)
    with pytest.raises(ConfigError, match="did you mean 'kv_depth'"):
        space.single("kv_dept", 2)
    with pytest.raises(ConfigError, match="num_visual_tokens=11"):
        space.strategy({"num_visual_tokens": 11})
    with pytest.raises(ConfigError, match=r"no levels \[17\]"):
        space.with_levels({"q_depth": [1, 17]})
    with pytest.raises(ConfigError, match="num_visual_tokens=0"):
        Space.dop(4, 0)
    with pytest.raises(StrategyError, match="sum to 1"):
        Space.dop_groups(4, 10, shares=(0.5, 0.6))
    assert space.with_levels({"q_depth": [1]}).parameter("q_depth").levels == (1, 4)


# -- curves -------------------------------------------------------------------------------------


def test_curves_measure_each_point_once_and_nothing_where_nothing_is_skipped() -> None:
    space = make_space("dop_split", 6, 24)
    evaluator, calls = counted(interacting_evaluator(space, 10))
    curves = Curves.measure(space, EvaluationStore(evaluator, 10), CurveGrid(num_token_levels=6))
    # kv: 0..5; q and mlp: 0..4 (5 is dead with kv everywhere); tokens: all of the grid but the last.
    num_token_points = len(curves.curves["num_visual_tokens"].levels) - 1
    assert curves.num_validation_runs == 6 + 5 + 5 + num_token_points == sum(calls) // 10
    for name, curve in curves.curves.items():
        for level, row in zip(curve.levels, curve.per_sample_nats, strict=True):
            expected = interacting_evaluator(space, 10)([space.single(name, int(level))], None)[0]
            np.testing.assert_array_equal(row, expected)
        assert (curve.per_sample_nats[-1] == 0).all()


def test_grids() -> None:
    space = Space.dop(32, 576)
    grid = CurveGrid(max_all_depths=16, num_depths=9, num_token_levels=12)
    assert grid.for_parameter(space.parameter("mlp_depth")) == (0, 4, 8, 12, 16, 20, 24, 28, 32)
    tokens = grid.for_parameter(space.tokens)
    assert tokens[0] == 1
    assert tokens[-1] == 576
    assert len(tokens) == 12
    ratios = np.diff(np.log(tokens))
    assert ratios.max() < 1.0
    assert CurveGrid().for_parameter(Space.dop(12, 144).parameter("mlp_depth")) == tuple(range(13))
    own = CurveGrid(levels={"mlp_depth": [5]})
    assert own.for_parameter(space.parameter("mlp_depth")) == (0, 5, 32)
    assert CurveGrid().for_parameter(Space.uniform(4, 1).tokens) == (1,)
    assert CurveGrid().for_parameter(Space.uniform(4, 9, min_visual_tokens=0).tokens)[:2] == (0, 1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0, 5, allow_subnormal=False, width=32), min_size=2, max_size=8),
    st.sampled_from(["tokens", "mlp"]),
)
def test_interpolation_keeps_measured_values_and_adds_no_extremum(values: list[float], role: str) -> None:
    levels = np.cumsum(np.arange(1, len(values) + 1))
    curve = Curve("x", role, levels, np.array(values)[:, None])
    np.testing.assert_allclose(curve(levels), values, atol=1e-12)
    for left, right, a, b in zip(levels, levels[1:], values, values[1:], strict=False):
        between = curve(np.arange(left, right + 1))
        assert (between >= min(a, b) - 1e-12).all()
        assert (between <= max(a, b) + 1e-12).all()
        steps = np.diff(between) * (1 if b >= a else -1)
        assert (steps >= -1e-12).all()


def test_interpolation_is_close_on_a_smooth_curve() -> None:
    """Power laws, which is what token curves look like: a sparse grid is within a few per cent."""
    space = Space.uniform(4, 576)
    levels = np.array(CurveGrid().for_parameter(space.tokens))
    exact = lambda n: 2.0 * (n**-0.8 - 576**-0.8)  # noqa: E731
    curve = Curve("num_visual_tokens", "tokens", levels, exact(levels.astype(float))[:, None])
    every = np.arange(1, 500)
    np.testing.assert_allclose(curve(every), exact(every.astype(float)), rtol=0.03)


def test_curves_round_trip_and_foreign_files_are_refused(tmp_path: Path) -> None:
    space = make_space("dop_groups", 3, 12)
    curves = Curves.measure(space, EvaluationStore(interacting_evaluator(space, 5), 5))
    path = tmp_path / "deep" / "curves.parquet"
    curves.save(path)
    loaded = Curves.load(path)
    assert loaded.space_name == "dop_groups"
    assert loaded.num_validation_runs == curves.num_validation_runs
    assert list(loaded.curves) == list(curves.curves)
    for name, curve in curves.curves.items():
        np.testing.assert_array_equal(loaded.curves[name].levels, curve.levels)
        np.testing.assert_array_equal(loaded.curves[name].per_sample_nats, curve.per_sample_nats)
        assert loaded.curves[name].role == curve.role
    assert [item.name for item in path.parent.iterdir()] == ["curves.parquet"]

    with pytest.raises(CacheError, match="measure them again"):
        Curves.load(tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(CacheError, match=r"text\.parquet"):
        Curves.load(tmp_path / "text.parquet")


def test_curves_of_another_space_are_refused() -> None:
    small = make_space("dop", 3, 12)
    curves = Curves.measure(small, EvaluationStore(interacting_evaluator(small, 5), 5))
    with pytest.raises(ConfigError, match=r"no curves for \['kv_depth', 'q_depth'\]"):
        curves.surrogate(make_space("dop_split", 3, 12))
    with pytest.raises(ConfigError, match="measured from 1 to 12"):
        curves.surrogate(make_space("dop", 3, 14))


# -- surrogate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_surrogate_of_an_additive_divergence_is_exact(kind: str) -> None:
    """With all keys and values kept, so that nothing is dead and a sum over operations is really a sum."""
    space = make_space(kind, 4, 6)
    rng = np.random.default_rng(0)
    loss = rng.random((len(space.shares), 4, 3))
    token_loss = np.sort(rng.random(7))[::-1]
    full = Strategy.full(4).canonical().to_array()

    def evaluate(strategies: Sequence[Strategy], samples: object) -> np.ndarray:
        kept = [6 if s.num_visual_tokens is None else s.num_visual_tokens for s in strategies]
        lost = [float((loss * (s.to_array() < full)).sum()) for s in strategies]
        return np.array([[a + token_loss[n] - token_loss[6]] for a, n in zip(lost, kept, strict=True)])

    grid = CurveGrid(levels={"num_visual_tokens": range(1, 7)})
    surrogate = Curves.measure(space, EvaluationStore(evaluate, 1), grid).surrogate(space)
    for _ in range(50):
        assignment = {p.name: int(rng.choice(p.levels)) for p in space.parameters if p.role in ("q", "mlp", "tokens")}
        exact = float(evaluate([space.strategy(assignment)], None)[0, 0])
        assert surrogate(assignment) == pytest.approx(exact, abs=1e-12)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(problems(max_points=400))
def test_surrogate_is_a_function_of_the_canonical_strategy(problem: Problem) -> None:
    """And the least sum of curves over the assignments that stand for it: dead operations cost nothing."""
    least: dict[str, float] = {}
    estimates: dict[str, list[float]] = {}
    assert problem.surrogate is not None
    for _, total, assignment in enumerate_plainly(problem):
        key = problem.space.strategy(assignment).key()
        least[key] = min(least.get(key, np.inf), total)
        estimates.setdefault(key, []).append(problem.surrogate(assignment))
    for key, values in estimates.items():
        assert set(values) == {least[key]}


def test_bad_curves_are_refused() -> None:
    space = make_space("uniform", 3, 4)
    with pytest.raises(ConfigError, match="needs 4 finite values"):
        Surrogate(space, {"num_visual_tokens": [1.0, 0.0]})
    with pytest.raises(ConfigError, match="needs 4 finite values"):
        Surrogate(space, {"num_visual_tokens": [1.0, float("nan"), 0.5, 0.0]})
