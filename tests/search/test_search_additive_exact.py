"""The exact solver of the surrogate equals brute force."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from invented_problems import enumerate_plainly, make_space, plain_front, problems, random_curves

from dop_search.search import Problem, Surrogate, best_candidates, pareto_front, solve
from dop_search.strategy.cost import Budget, CostModel
from dop_search.strategy.operations import ModelDims, TokenCounts
from dop_search.utils.errors import BudgetError


def budget_for(problem: Problem, ratio: float) -> Budget:
    return Budget(
        **{{"flops": "flops_ratio", "kv_cache": "kv_ratio"}.get(problem.cost_model.kind, "latency_ratio"): ratio}
    )


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(problems())
def test_front_equals_brute_force(problem: Problem) -> None:
    front = pareto_front(problem)
    expected = plain_front(enumerate_plainly(problem))
    assert list(zip(front.total_cost.tolist(), front.divergence_nats.tolist(), strict=True)) == expected
    # monotone, and every point is what it says
    assert (np.diff(front.total_cost) > 0).all()
    assert (np.diff(front.divergence_nats) < 0).all()
    assert problem.surrogate is not None
    for row in range(0, len(front), max(1, len(front) // 5)):
        solution = front.solution(row)
        assert problem.cost_model.total(solution.strategy) == front.total_cost[row]
        assert solution.strategy == solution.strategy.canonical()
        assert problem.surrogate(solution.assignment) == front.divergence_nats[row]


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(problems())
def test_every_budget_is_solved_to_the_optimum(problem: Problem) -> None:
    points = enumerate_plainly(problem)
    front = pareto_front(problem)
    ratios = sorted({cost / problem.cost_model.full_total for cost, _, _ in points})
    ratios = [ratio for ratio in ratios if ratio <= 1.0]  # measured times may exceed the full model's
    assume(ratios)
    for ratio in (ratios[0], ratios[len(ratios) // 2], ratios[-1], 1.0):
        best = min(d for cost, d, _ in points if cost / problem.cost_model.full_total <= ratio)
        solution = front.solve(budget_for(problem, ratio))
        assert solution.kl_additive == best
        assert solution.cost_ratio <= ratio
    if ratios[0] > 0.0:
        with pytest.raises(BudgetError, match="the smallest feasible value is") as caught:
            front.solve(budget_for(problem, ratios[0] * 0.999))
        assert caught.value.smallest_feasible == ratios[0]
        assert front.solve(budget_for(problem, caught.value.smallest_feasible)).cost_ratio == ratios[0]


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(problems(max_points=400))
def test_k_best_equal_brute_force(problem: Problem) -> None:
    """Of distinct canonical strategies, with and without the spread over cells."""
    best: dict[str, tuple[float, int]] = {}
    for cost, divergence, assignment in enumerate_plainly(problem):
        key = problem.space.strategy(assignment).key()
        best[key] = min(best.get(key, (np.inf, 0)), (divergence, cost))
    costs = sorted(cost for _, cost in best.values())
    ratio = costs[len(costs) // 2] / problem.cost_model.full_total
    assume(ratio <= 1.0)
    within = sorted(d for d, cost in best.values() if cost / problem.cost_model.full_total <= ratio)
    budget = budget_for(problem, ratio)

    candidates = best_candidates(problem, budget, k=7, mode="exact")
    assert [c.kl_additive for c in candidates] == within[:7]
    keys = [problem.space.strategy(c.assignment).key() for c in candidates]
    assert len(set(keys)) == len(keys)
    assert all(c.cost_ratio <= ratio for c in candidates)

    cells: dict[tuple[object, ...], float] = {}
    for cost, divergence, assignment in enumerate_plainly(problem):
        if cost / problem.cost_model.full_total <= ratio:
            share = max(assignment["num_visual_tokens"], 1) / problem.space.tokens.full
            keys = [value for name, value in assignment.items() if name.endswith(("kv_depth", "attention_depth"))]
            cell = (*keys, np.floor(4 * np.log2(share) - 1e-9))
            cells[cell] = min(cells.get(cell, np.inf), divergence)
    spread = best_candidates(problem, budget, k=7, mode="slices")
    assert [c.kl_additive for c in spread] == sorted(cells.values())[:7]


def test_spread_candidates_differ_in_kv_depth_or_clearly_in_tokens() -> None:
    dims = ModelDims(num_layers=12, hidden_size=128, intermediate_size=344, num_heads=4, num_kv_heads=4, head_dim=32)
    space = make_space("dop_split", 12, 144)
    curves = random_curves(space, np.random.default_rng(3), monotone=True)
    problem = Problem(space, CostModel(dims, [TokenCounts(15, 144)]), Surrogate(space, curves))
    chosen = best_candidates(problem, Budget(flops_ratio=0.3), k=16)
    assert len(chosen) == 16
    cells = {
        (c.assignment["kv_depth"], int(4 * np.log2(c.assignment["num_visual_tokens"] / 144) - 1e-9)) for c in chosen
    }
    assert len(cells) >= 15


@pytest.mark.parametrize("kind", ["dop", "dop_split", "dop_groups"])
def test_full_budget_costs_no_divergence(kind: str) -> None:
    space = make_space(kind, 4, 16)
    dims = ModelDims(num_layers=4, hidden_size=16, intermediate_size=24, num_heads=2, num_kv_heads=2, head_dim=8)
    curves = {
        name: np.maximum(values, 1e-3) for name, values in random_curves(space, np.random.default_rng(0), True).items()
    }
    for values in curves.values():
        values[-1] = 0.0
    problem = Problem(space, CostModel(dims, [TokenCounts(5, 16)]), Surrogate(space, curves))
    solution = solve("additive_exact", problem, Budget(flops_ratio=1.0))
    assert solution.kl_additive == 0.0
    assert solution.strategy.is_empty


@pytest.mark.slow
def test_real_sizes_take_seconds_and_a_further_budget_milliseconds() -> None:
    """2 groups x (q, kv, mlp) x 33 depths x 2,880 token levels: 3.7e12 assignments; loose bounds for slow machines."""
    dims = ModelDims(
        num_layers=32, hidden_size=4096, intermediate_size=11008, num_heads=32, num_kv_heads=32, head_dim=128
    )
    space = make_space("dop_groups", 32, 2880)
    curves = {}
    for parameter in space.parameters:
        x = np.array(parameter.levels) / parameter.full
        weight = {"q": 0.01, "kv": 1.0, "mlp": 0.4, "tokens": 0.5}[parameter.role] * (1 + parameter.group)
        curves[parameter.name] = weight * (1 - x) ** (2 if parameter.role == "tokens" else 4)
    problem = Problem(space, CostModel(dims, [TokenCounts(40 + i, 2880) for i in range(50)]), Surrogate(space, curves))
    front = pareto_front(problem)
    assert front.seconds < 15
    assert len(front) > 10_000
    start = time.perf_counter()
    for ratio in np.linspace(0.15, 1, 50):
        solve("additive_exact", problem, Budget(flops_ratio=float(ratio)))
    assert (time.perf_counter() - start) / 50 < 10e-3
    # nothing near the front is better, and nothing anywhere
    rng = np.random.default_rng(0)
    sizes = np.array([len(p.levels) for p in space.parameters])
    near = front.indices[rng.integers(len(front), size=300)] + rng.integers(-1, 2, size=(300, len(sizes)))
    for row in np.concatenate([near.clip(0, sizes - 1), rng.integers(sizes, size=(100, len(sizes)))]):
        assignment = {p.name: p.levels[i] for p, i in zip(space.parameters, row, strict=True)}
        total = problem.cost_model.total(space.strategy(assignment))
        within = front.divergence_nats[front.total_cost <= total]
        assert len(within)
        assert problem.surrogate is not None
        assert within[-1] <= problem.surrogate(assignment)
