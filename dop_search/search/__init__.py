"""Search: curves, the additive surrogate, one file per solver. Never imports torch, models or pruning."""

from dop_search.search.additive_exact import Front, additive_exact, pareto_front
from dop_search.search.candidates import Candidate, best_candidates
from dop_search.search.curves import Curve, CurveGrid, Curves
from dop_search.search.exhaustive import EvaluatedGrid, evaluate_grid, exhaustive
from dop_search.search.joint import Decide, exact_optuna, joint_search
from dop_search.search.options import Option, gsop_option, gsop_search
from dop_search.search.optuna_solvers import additive_optuna
from dop_search.search.registry import SOLVERS, solve
from dop_search.search.rerank import best_first, rerank, rerank_all, with_exact
from dop_search.search.solution import MeasuredSolution, Problem, Solution, uniform_assignment, uniform_strategy
from dop_search.search.space import Parameter, Space
from dop_search.search.store import EvaluationStore, Evaluator, OnProgress
from dop_search.search.surrogate import Surrogate

__all__ = [
    "SOLVERS",
    "Candidate",
    "Curve",
    "CurveGrid",
    "Curves",
    "Decide",
    "EvaluatedGrid",
    "EvaluationStore",
    "Evaluator",
    "Front",
    "MeasuredSolution",
    "OnProgress",
    "Option",
    "Parameter",
    "Problem",
    "Solution",
    "Space",
    "Surrogate",
    "additive_exact",
    "additive_optuna",
    "best_candidates",
    "best_first",
    "evaluate_grid",
    "exact_optuna",
    "exhaustive",
    "gsop_option",
    "gsop_search",
    "joint_search",
    "pareto_front",
    "rerank",
    "rerank_all",
    "solve",
    "uniform_assignment",
    "uniform_strategy",
    "with_exact",
]
