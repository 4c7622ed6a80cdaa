"""Solvers by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from dop_search.search.additive_exact import additive_exact
from dop_search.search.exhaustive import exhaustive
from dop_search.search.joint import exact_optuna
from dop_search.search.optuna_solvers import additive_optuna
from dop_search.search.rerank import rerank
from dop_search.search.solution import Problem, Solution
from dop_search.strategy.cost.budget import Budget
from dop_search.utils.errors import ConfigError
from dop_search.utils.registry import Registry, did_you_mean

SOLVERS: Registry[Callable[..., Solution]] = Registry(
    "solver",
    {
        "additive_exact": additive_exact,
        "rerank": rerank,
        "additive_optuna": additive_optuna,
        "exact_optuna": exact_optuna,
        "exhaustive": exhaustive,
    },
)
"""Every solver takes ``(problem, budget, **options)``; the options are its keyword arguments. A module of one's own
adds to it, ``SOLVERS["mine"] = mine``."""


def check_solver_options(name: str, options: Iterable[str]) -> None:
    """Refuse, by ConfigError, an unknown solver, or an option that it does not have; names a near one."""
    known = [option for option in list(inspect.signature(SOLVERS.find(name)).parameters)[2:] if option != "on_progress"]
    for option in options:
        if option not in known:
            near = did_you_mean(option, known)
            raise ConfigError(f"solver {name!r} has no option {option!r}; {near}it has {known}")


def solve(name: str, problem: Problem, budget: Budget, **options: Any) -> Solution:
    """Run the solver ``name``; ``on_progress`` is left out for one that does not take it.

    Raises ConfigError on an unknown solver or option, BudgetError, naming the smallest feasible value, if nothing fits.
    """
    solver = SOLVERS.find(name)
    if "on_progress" not in inspect.signature(solver).parameters:
        options.pop("on_progress", None)
    check_solver_options(name, options.keys() - {"on_progress"})
    return solver(problem, budget, **options)
