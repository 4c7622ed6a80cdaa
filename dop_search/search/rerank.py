"""Exact evaluation of the surrogate's best candidates: what the sum of curves cannot see, the data decides."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dop_search.search.candidates import Candidate, CandidateMode, best_candidates
from dop_search.search.solution import MeasuredSolution, Problem, Solution, uniform_assignment
from dop_search.search.store import OnProgress
from dop_search.strategy.cost.budget import Budget


def rerank_all(
    problem: Problem, budget: Budget, k: int = 16, mode: CandidateMode = "slices", on_progress: OnProgress | None = None
) -> list[MeasuredSolution]:
    """The ``k`` best candidates and uniform token reduction, evaluated, the one with the least mean KL first.

    Uniform reduction (the most visual tokens that fit, everything else full) is always among them if it fits,
    so the first is never worse than it on the search set. ``num_validation_runs`` of each is that of all; ``history``
    of the first has all, in the surrogate's order.

    Raises:
        BudgetError: if nothing fits; it names the smallest feasible value.
    """
    start = time.perf_counter()
    store, surrogate = problem.need_store("rerank"), problem.need_surrogate("rerank")
    candidates = best_candidates(problem, budget, k, mode)
    uniform = uniform_assignment(problem, budget)
    if uniform is not None:
        ratio = problem.cost_model.ratio(problem.space.strategy(uniform))
        candidates.append(Candidate(uniform, ratio, surrogate(uniform)))
    chosen = {problem.space.strategy(item.assignment).key(): item for item in reversed(candidates)}
    candidates = sorted(chosen.values(), key=lambda item: item.kl_additive)
    strategies = [problem.space.strategy(item.assignment) for item in candidates]
    values = store.evaluate(strategies, on_progress=on_progress, what=f"exact divergence of {len(chosen)} candidates")
    history: list[dict[str, Any]] = [
        {
            "assignment": dict(item.assignment),
            "cost_ratio": item.cost_ratio,
            "kl_additive": item.kl_additive,
            "kl_search": float(row.mean()),
        }
        for item, row in zip(candidates, values, strict=True)
    ]
    seconds = time.perf_counter() - start
    solutions = [
        MeasuredSolution(
            strategy, **known, num_validation_runs=len(chosen), seconds=seconds, solver="rerank", per_sample_nats=row
        )
        for strategy, known, row in zip(strategies, history, values, strict=True)
    ]
    first, *others = best_first(solutions)
    return [replace(first, history=history), *others]


def best_first(solutions: Sequence[MeasuredSolution]) -> list[MeasuredSolution]:
    """Solutions by their mean KL, the best first; the cheaper one on a tie."""
    return sorted(solutions, key=lambda item: (item.kl_search, item.cost_ratio))


def with_exact(problem: Problem, found: Solution, others: Sequence[MeasuredSolution] = ()) -> list[MeasuredSolution]:
    """A solver's solution with its exact KL, sorted among ``others``, the best first.

    ``num_validation_runs`` of each is that of all.
    """
    (row,) = problem.need_store(found.solver).evaluate([found.strategy])
    runs = found.num_validation_runs + (others[0].num_validation_runs if others else 0)
    return [replace(item, num_validation_runs=runs) for item in best_first([found.measured(row), *others])]


def rerank(
    problem: Problem, budget: Budget, k: int = 16, mode: CandidateMode = "slices", on_progress: OnProgress | None = None
) -> MeasuredSolution:
    """The best of :func:`rerank_all`."""
    return rerank_all(problem, budget, k, mode, on_progress)[0]
