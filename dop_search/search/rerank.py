"""Exact evaluation of the surrogate's best candidates: what the sum of curves cannot see, the data decides."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

from dop_search.search.candidates import Candidate, CandidateMode, best_candidates
from dop_search.search.criteria import DEFAULT_CRITERION, Criterion, score
from dop_search.search.solution import MeasuredSolution, Problem, Solution, uniform_assignment
from dop_search.search.store import OnProgress
from dop_search.strategy.cost.budget import Budget


def rerank_all(
    problem: Problem,
    budget: Budget,
    k: int = 16,
    mode: CandidateMode = "slices",
    criterion: Criterion = DEFAULT_CRITERION,
    on_progress: OnProgress | None = None,
) -> list[MeasuredSolution]:
    """The ``k`` best candidates and uniform token reduction, evaluated, the best by ``criterion`` first.

    Uniform reduction (the most visual tokens that fit, everything else full) is always among them if it fits,
    so the first is never worse than it on the search set, by that criterion. ``num_validation_runs`` of each is that
    of all.

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
    distinct: dict[str, Candidate] = {}
    for candidate in candidates:
        distinct.setdefault(problem.space.strategy(candidate.assignment).key(), candidate)
    chosen = list(distinct.values())
    strategies = [problem.space.strategy(candidate.assignment) for candidate in chosen]
    what = f"exact divergence of {len(chosen)} candidates"
    values = store.evaluate(strategies, on_progress=on_progress, what=what)
    seconds = time.perf_counter() - start
    solutions = [
        MeasuredSolution(
            strategy=strategy,
            assignment=candidate.assignment,
            cost_ratio=candidate.cost_ratio,
            kl_additive=candidate.kl_additive,
            kl_search=float(row.mean()),
            num_validation_runs=len(chosen),
            seconds=seconds,
            solver="rerank",
            per_sample_nats=row,
        )
        for strategy, candidate, row in zip(strategies, chosen, values, strict=True)
    ]
    return best_first(solutions, criterion)


def best_first(
    solutions: Sequence[MeasuredSolution], criterion: Criterion = DEFAULT_CRITERION
) -> list[MeasuredSolution]:
    """Solutions by their measured KL, the best by ``criterion`` first; the cheaper one on a tie."""
    values = [float(score(criterion, solution.per_sample_nats)) for solution in solutions]
    order = sorted(range(len(solutions)), key=lambda i: (values[i], solutions[i].cost_ratio))
    return [solutions[index] for index in order]


def with_exact(
    problem: Problem,
    found: Solution,
    others: Sequence[MeasuredSolution] = (),
    criterion: Criterion = DEFAULT_CRITERION,
) -> list[MeasuredSolution]:
    """A solver's solution with its exact KL, sorted among ``others``, the best first.

    ``num_validation_runs`` of each is that of all.
    """
    (row,) = problem.need_store(found.solver).evaluate([found.strategy])
    runs = found.num_validation_runs + (others[0].num_validation_runs if others else 0)
    ranked = best_first([found.measured(row), *others], criterion)
    return [replace(item, num_validation_runs=runs) for item in ranked]


def rerank(
    problem: Problem,
    budget: Budget,
    k: int = 16,
    mode: CandidateMode = "slices",
    criterion: Criterion = DEFAULT_CRITERION,
    on_progress: OnProgress | None = None,
) -> MeasuredSolution:
    """The best of :func:`rerank_all`; ``history`` has all of them, in the surrogate's order."""
    solutions = rerank_all(problem, budget, k, mode, criterion, on_progress)
    history = [
        {
            "assignment": dict(solution.assignment),
            "cost_ratio": solution.cost_ratio,
            "kl_additive": solution.kl_additive,
            "kl_search": solution.kl_search,
        }
        for solution in sorted(solutions, key=_estimate)
    ]
    return replace(solutions[0], history=history)


def _estimate(solution: Solution) -> float:
    return math.inf if solution.kl_additive is None else solution.kl_additive
