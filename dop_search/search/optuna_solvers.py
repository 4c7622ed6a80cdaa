"""Optuna on the additive surrogate, and what its trials have in common with those on real validation runs (``joint``).

Parameters are depth ratios and the number of visual tokens. The budget is an Optuna constraint (for CMA-ES, which
knows none, a penalty); a trial above it is told the surrogate's estimate and never evaluated. Optuna is imported
when a solver runs.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from dop_search.search.solution import Problem, Solution
from dop_search.search.store import OnProgress
from dop_search.strategy.cost.budget import Budget
from dop_search.utils.errors import ConfigError

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial


def additive_optuna(
    problem: Problem,
    budget: Budget,
    sampler: str = "tpe",
    num_trials: int = 1000,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Solution:
    """An Optuna sampler (``tpe``, ``gp``, ``cmaes``, ``nsga2``, ``random``) on the additive surrogate.

    There for comparison: ``additive_exact`` has the optimum, sooner. The GP fits with torch and CMA-ES needs
    the package ``cmaes``.

    Raises:
        BudgetError: if nothing fits; it names the smallest feasible value.
        ConfigError: on an unknown sampler, or if no trial fits the budget.
    """
    from dop_search.search import optuna_study as plumbing

    start = time.perf_counter()
    surrogate = problem.need_surrogate("additive_optuna")
    limit = feasible_limit(problem, budget)

    def objective(trial: Trial) -> float:
        assignment = plumbing.suggest(trial, problem.space)
        estimate = surrogate(assignment)
        ratio = problem.cost_model.ratio(problem.space.strategy(assignment))
        value = price(trial, problem, assignment, ratio, estimate, limit, plumbing.uses_constraints(sampler))
        if on_progress is not None:
            on_progress(trial.number + 1, num_trials, f"{sampler} on the additive surrogate")
        return estimate if value is None else value

    with plumbing.quiet_optuna():
        study = plumbing.open_study(plumbing.open_storage(None), "additive", "none", {}, None)
        study.sampler = plumbing.make_sampler(sampler, seed)
        study.optimize(objective, n_trials=num_trials)
    history = [record_of(trial) for trial in study.get_trials(deepcopy=False)]
    best = best_record(history, "kl_additive", sampler)
    return Solution(
        strategy=problem.space.strategy(best["assignment"]),
        assignment=best["assignment"],
        cost_ratio=best["cost_ratio"],
        kl_additive=best["kl_additive"],
        kl_search=None,
        num_validation_runs=0,
        seconds=time.perf_counter() - start,
        solver=f"additive_optuna[{sampler}]",
        history=history,
    )


def price(
    trial: Trial,
    problem: Problem,
    assignment: dict[str, int],
    ratio: float,
    estimate: float,
    limit: float,
    uses_constraints: bool,
) -> float | None:
    """Note cost and estimate on the trial; what to tell if it is above the budget, ``None`` if it fits."""
    facts = {"assignment": assignment, "cost_ratio": ratio, "kl_additive": estimate, "fits": ratio <= limit}
    trial.set_user_attr("candidate", facts)
    if uses_constraints:
        trial.set_constraint("cost_ratio", ratio - limit)
        return None if ratio <= limit else estimate
    worst = sum(float(curve.max()) for curve in problem.need_surrogate("optuna").curves.values())
    return None if ratio <= limit else worst + 1.0 + (ratio - limit)


def feasible_limit(problem: Problem, budget: Budget) -> float:
    """The budget as a ratio, after checking that the cheapest strategy fits."""
    limit = budget.resolve(problem.cost_model)
    cheapest = problem.space.strategy({p.name: p.levels[0] for p in problem.space.parameters})
    ratio = problem.cost_model.ratio(cheapest)
    if ratio > limit:
        raise budget.infeasible(problem.cost_model, ratio)
    return limit


def record_of(trial: FrozenTrial) -> dict[str, Any]:
    """A finished trial as a JSON-ready dictionary."""
    known = {**trial.user_attrs.get("candidate", {}), **trial.user_attrs.get("measured", {})}
    return {"trial": trial.number, "state": trial.state.name, **known}


def best_record(history: list[dict[str, Any]], objective: str, sampler: str) -> dict[str, Any]:
    """The record with the least objective within the budget, the cheaper one on a tie; ConfigError if no trial fits."""
    fitting = [record for record in history if record.get("fits") and objective in record]
    if not fitting:
        raise ConfigError(
            f"none of {len(history)} trials of sampler {sampler!r} fits the budget; raise `num_trials`, "
            "or use solver 'additive_exact'"
        )
    return min(fitting, key=lambda record: (record[objective], record["cost_ratio"]))
