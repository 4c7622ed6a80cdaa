"""Solvers by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from dop_search.search.additive_exact import additive_exact
from dop_search.search.exhaustive import exhaustive
from dop_search.search.optuna_solvers import additive_optuna, exact_optuna
from dop_search.search.rerank import rerank
from dop_search.search.solution import Problem, Solution
from dop_search.strategy.cost.budget import Budget
from dop_search.utils.errors import ConfigError

SOLVERS: Mapping[str, Callable[..., Solution]] = MappingProxyType(
    {
        "additive_exact": additive_exact,
        "rerank": rerank,
        "additive_optuna": additive_optuna,
        "exact_optuna": exact_optuna,
        "exhaustive": exhaustive,
    }
)
"""Every solver takes ``(problem, budget, **options)``; the options are its keyword arguments."""


def solve(name: str, problem: Problem, budget: Budget, **options: Any) -> Solution:
    """Run the solver ``name``; ``on_progress`` is left out for one that does not take it.

    Raises:
        ConfigError: on an unknown solver or option; the message names a near one.
        BudgetError: if nothing fits; it names the smallest feasible value.
    """
    if name not in SOLVERS:
        raise ConfigError(f"unknown solver {name!r}; {_hint(name, SOLVERS)}known: {list(SOLVERS)}")
    known = list(inspect.signature(SOLVERS[name]).parameters)[2:]
    if "on_progress" not in known:
        options.pop("on_progress", None)
    for option in options:
        if option not in known:
            raise ConfigError(f"solver {name!r} has no option {option!r}; {_hint(option, known)}it has {known}")
    return SOLVERS[name](problem, budget, **options)


def _hint(name: str, known: Any) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}? " if near else ""
