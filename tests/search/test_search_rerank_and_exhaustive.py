"""Solvers that evaluate on data, against the exhaustive truth of small spaces; the registry."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from invented_problems import KINDS, POCKET_LIKE, interacting_evaluator, make_space, pocket_problem

from dop_search.search import (
    EvaluationStore,
    Problem,
    best_candidates,
    evaluate_grid,
    rerank_all,
    solve,
    uniform_assignment,
)
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget, CostModel
from dop_search.strategy.operations import TokenCounts
from dop_search.utils.errors import BudgetError, ConfigError


def fresh(problem: Problem, kind: str, num_samples: int = 20) -> Problem:
    """The same problem with nothing evaluated yet."""
    space = make_space(kind, problem.space.num_layers, problem.space.tokens.full)
    return replace(problem, store=EvaluationStore(interacting_evaluator(space, num_samples), num_samples))


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
def test_uniform_is_the_largest_number_of_tokens_that_fits(ratio: float) -> None:
    problem = pocket_problem("dop")
    costs = {n: problem.cost_model.ratio(Strategy.full(6, num_visual_tokens=n)) for n in range(1, 25)}
    largest = max(n for n, cost in costs.items() if cost <= ratio)
    chosen = uniform_assignment(problem, Budget(flops_ratio=ratio))
    assert chosen == {"attention_depth": 6, "mlp_depth": 6, "num_visual_tokens": largest}


def test_uniform_that_does_not_fit() -> None:
    problem = pocket_problem("dop")
    floor = problem.cost_model.floor_ratio
    assert uniform_assignment(problem, Budget(flops_ratio=floor)) is None
    solution = solve("rerank", problem, Budget(flops_ratio=floor))  # depth 0 fits, and is all that fits
    assert solution.cost_ratio == floor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [0.2, 0.45, 0.8])
@pytest.mark.fast_cases(3)
def test_rerank_is_never_worse_than_uniform_nor_than_the_additive_optimum(kind: str, ratio: float) -> None:
    problem, budget = pocket_problem(kind), Budget(flops_ratio=ratio)
    solutions = rerank_all(problem, budget, k=8)
    exact = interacting_evaluator(problem.space, 20)
    best = solutions[0]
    np.testing.assert_array_equal(best.per_sample_nats, exact([best.strategy], None)[0])
    divergences = [solution.kl_search for solution in solutions]
    assert divergences == sorted(divergences)
    uniform = uniform_assignment(problem, budget)
    assert uniform is not None
    additive = solve("additive_exact", problem, budget)
    for strategy in (problem.space.strategy(uniform), additive.strategy):
        assert best.kl_search <= exact([strategy], None).mean()
        assert strategy.key() in {solution.strategy.key() for solution in solutions}
    assert all(solution.cost_ratio <= ratio for solution in solutions)
    assert problem.store is not None
    assert best.num_validation_runs == problem.store.num_validation_runs == len(solutions) <= 9
    assert len({solution.strategy.key() for solution in solutions}) == len(solutions)


def test_rerank_finds_the_true_optimum_of_a_space_it_can_cover() -> None:
    problem = pocket_problem("dop", num_tokens=6)
    budget = Budget(flops_ratio=0.4)
    truth = solve("exhaustive", fresh(problem, "dop"), budget)
    found = solve("rerank", fresh(problem, "dop"), budget, k=400, mode="exact")
    assert found.kl_search == truth.kl_search
    assert found.strategy == truth.strategy


def test_exhaustive_equals_a_plain_loop() -> None:
    problem = pocket_problem("dop_split", num_tokens=8)
    levels = {"q_depth": [0, 2, 4], "kv_depth": [0, 3, 5], "mlp_depth": [1, 4], "num_visual_tokens": [1, 4, 6]}
    grid = evaluate_grid(problem, levels)
    exact = interacting_evaluator(problem.space, 20)
    plain = {}
    for q, kv, mlp, n in itertools.product([0, 2, 4, 6], [0, 3, 5, 6], [1, 4, 6], [1, 4, 6, None]):
        strategy = Strategy.depthwise(6, q, kv, mlp, num_visual_tokens=n).canonical()
        plain[strategy.key()] = (float(exact([strategy], None).mean()), problem.cost_model.ratio(strategy))
    assert {s.key() for s in grid.strategies} == set(plain)
    for ratio in (0.28, 0.4, 0.6, 1.0):
        best = grid.best(Budget(flops_ratio=ratio))
        assert best.kl_search == min(d for d, cost in plain.values() if cost <= ratio)
        assert best.cost_ratio <= ratio
    assert grid.best(Budget(flops_ratio=1.0)).strategy.is_empty


def test_too_large_a_grid_is_refused() -> None:
    with pytest.raises(ConfigError, match="more than `max_strategies=10`"):
        solve("exhaustive", pocket_problem("dop"), Budget(flops_ratio=0.5), max_strategies=10)
    with pytest.raises(ConfigError, match="more than `max_strategies=100`"):
        evaluate_grid(pocket_problem("dop"), max_strategies=100)


@pytest.mark.parametrize("solver", ["additive_exact", "rerank", "exhaustive", "additive_optuna", "exact_optuna"])
def test_infeasible_budgets_name_the_smallest_feasible(solver: str) -> None:
    problem = pocket_problem("uniform", num_tokens=8)
    smallest = problem.cost_model.ratio(Strategy.full(6, num_visual_tokens=1))
    with pytest.raises(BudgetError, match="the smallest feasible value is") as caught:
        solve(solver, problem, Budget(flops_ratio=smallest * 0.99))
    assert caught.value.smallest_feasible == pytest.approx(smallest, rel=1e-12)


def test_registry_names_near_names() -> None:
    problem, budget = pocket_problem("uniform", num_tokens=4), Budget(flops_ratio=0.8)
    with pytest.raises(ConfigError, match="unknown solver 'additive_exat'; did you mean 'additive_exact'"):
        solve("additive_exat", problem, budget)
    with pytest.raises(ConfigError, match="has no option 'mod'; did you mean 'mode'"):
        solve("rerank", problem, budget, mod="exact")
    with pytest.raises(ConfigError, match="'rerank' evaluates strategies on data"):
        solve("rerank", replace(problem, store=None), budget)
    with pytest.raises(ConfigError, match="needs the additive surrogate"):
        solve("additive_exact", replace(problem, surrogate=None), budget)
    with pytest.raises(ConfigError, match="k=0"):
        best_candidates(problem, budget, k=0)
    with pytest.raises(ConfigError, match="'slice'"):
        best_candidates(problem, budget, mode="slice")  # type: ignore[arg-type]


def test_kv_budgets_are_solved_too() -> None:
    problem = pocket_problem("dop_split")
    model = CostModel(POCKET_LIKE, [TokenCounts(5, 24)], kind="kv_cache")
    solution = solve("additive_exact", replace(problem, cost_model=model), Budget(kv_ratio=0.4))
    assert model.ratio(solution.strategy) == solution.cost_ratio <= 0.4
    depths = solution.strategy.depths()
    assert depths is not None
    assert depths["q"] == depths["mlp"] == (depths["kv"][0] - 1,)  # both are free in the cache


def test_search_imports_no_torch_and_no_model_code() -> None:
    code = (
        "import sys, dop_search.search, dop_search.strategy.cost; "
        "bad = [m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'optuna') "
        "or m.startswith(('dop_search.models', 'dop_search.pruning'))]; sys.exit(bool(bad))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
