"""What a study chooses among: a selector with a space, and what its surrogate proposes within a budget."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dop_search.search.candidates import best_candidates
from dop_search.search.gsop_search import SHARES, GsopPoint, GsopSearch
from dop_search.search.optuna_solvers import feasible_limit
from dop_search.search.solution import Problem, uniform_assignment
from dop_search.search.space import TOKENS, Assignment, Space
from dop_search.search.store import OnProgress
from dop_search.search.surrogate import Surrogate
from dop_search.strategy import Strategy
from dop_search.strategy.cost.budget import Budget

GSOP = "gsop"


@dataclass(frozen=True)
class Option:
    """A selector with a space, one of those that a study chooses among.

    Attributes:
        selector, space: their names, the categories of the study.
        problem: with a surrogate and a store; all options have the same samples in the same order.
        budget: of the problem's kind of cost, without what the selector itself is expected to compute.
        num_runs: validation runs that it took to make, beside the curves.
        num_curve_runs: those of the curves.
        selection: what the selector computes for a strategy, as a share of the cost; ``None``: nothing.
        expected: what the budget is short of for that.
    """

    selector: str
    space: str
    problem: Problem
    budget: Budget
    num_runs: int = 0
    num_curve_runs: int = 0
    selection: Callable[[Strategy], float] | None = None
    expected: float = 0.0

    @property
    def limit(self) -> float:
        """The budget as a ratio; BudgetError if nothing fits."""
        return feasible_limit(self.problem, self.budget)

    def price(self, strategy: Strategy) -> float:
        """The cost of a strategy with its selector, as a ratio; at most :attr:`most` fits."""
        return self.problem.cost_model.ratio(strategy) + (0.0 if self.selection is None else self.selection(strategy))

    @property
    def most(self) -> float:
        """The budget with what the selector computes, as a ratio."""
        return self.limit if self.selection is None else (self.limit + self.expected) * (1 + 1e-12)

    def proposals(self, number: int, use_up: bool) -> list[Mapping[str, int]]:
        """The surrogate's optimum, uniform reduction, then the surrogate's other candidates; of GSOP's points the best
        by estimate, the one that GSOP itself would take, then the others."""
        if isinstance(self.problem.space, TrajectorySpace):
            return self.problem.space.proposals(self.problem.need_surrogate(GSOP))[:number]
        chosen: list[Mapping[str, int]] = []
        if number > 0:
            chosen += [candidate.assignment for candidate in best_candidates(self.problem, self.budget, number)]
        uniform = uniform_assignment(self.problem, self.budget)
        chosen = chosen if uniform is None else [*chosen[:1], uniform, *chosen[1:]]
        if use_up:
            chosen = [filled(self, assignment) for assignment in chosen]
        distinct = {self.problem.space.strategy(item).key(): item for item in reversed(chosen)}
        return list(reversed(distinct.values()))

    def facts(self) -> dict[str, Any]:
        """What the study's numbers depend on."""
        space, store = self.problem.space, self.problem.need_store("exact_optuna")
        return {
            "space": [[p.name, p.levels[0], p.full, len(p.levels)] for p in space.parameters],
            "shares": list(space.shares),
            "strategy_fields": dict(space.strategy_fields),
            "budget": [self.budget.kind, self.limit],
            "full_cost": self.problem.cost_model.full_total,
            "num_samples": store.num_samples,
            "samples": store.header,
        }


def filled(option: Option, assignment: Mapping[str, int]) -> dict[str, int]:
    """The assignment with every parameter raised as far as the budget allows: the number of tokens, then the depths.

    A budget that would be left over is used up; costs rise with every parameter. Where the selector computes more than
    was expected, fewer tokens are kept.
    """
    space, found, most = option.problem.space, dict(assignment), option.most
    fits = option.price(space.strategy(found)) <= most
    for parameter in (space.tokens, *(p for p in space.parameters if p.role != "tokens")):
        lowers = parameter is space.tokens and not fits
        levels = [level for level in parameter.levels if lowers or level >= found[parameter.name]]

        def cost(level: int, name: str = parameter.name) -> float:
            return option.price(space.strategy({**found, name: level}))

        found[parameter.name] = int(levels[max(0, bisect_right(levels, most, key=cost) - 1)])
    return found


@dataclass(frozen=True)
class TrajectorySpace(Space):
    """GSOP's operations beside a number of visual tokens, the one parameter: each number has the first point of the
    trajectory that fits the budget with so many tokens.

    Attributes:
        points: the trajectory.
        most_tokens: that fit beside each point, ascending; 0: not even one.
    """

    points: tuple[Strategy, ...] = ()
    most_tokens: tuple[int, ...] = field(default=(), hash=False)

    def point(self, num_tokens: int) -> int:
        """The place of the first point with which so many tokens fit; the last one if there is none."""
        return min(int(np.searchsorted(self.most_tokens, num_tokens)), len(self.points) - 1)

    def strategy(self, assignment: Assignment) -> Strategy:
        """See base class."""
        tokens = assignment.get(TOKENS, self.tokens.full)
        kept = None if tokens == self.tokens.full else tokens
        return replace(self.points[self.point(tokens)], num_visual_tokens=kept)

    def proposals(self, surrogate: Surrogate) -> list[Mapping[str, int]]:
        """Each point with the most tokens: the best by estimate, GSOP's own, then the others by estimate.

        GSOP's own, at equal FLOPs, is the last point that all tokens do not fit with.
        """
        reached = sorted({most for most in self.most_tokens if most >= self.tokens.levels[0]})
        ranked = sorted(reached, key=lambda most: (surrogate({TOKENS: most}), most))
        its_own = [most for most in reached if most < self.tokens.full][-1:]
        return [{TOKENS: most} for most in dict.fromkeys([*ranked[:1], *its_own, *ranked])]


def gsop_search(problem: Problem) -> GsopSearch:
    """GSOP's search on a problem's samples, under the selector of its space; all budgets share it."""
    space = problem.space
    return GsopSearch(problem.need_store(GSOP).means(), space.num_layers, dict(space.strategy_fields))


def gsop_option(option: Option, search: GsopSearch, on_progress: OnProgress | None = None) -> Option:
    """The space of GSOP's trajectory to a budget.

    A number of tokens is expected to lose what its point was measured to lose, and what the selector's curve of tokens
    says. ``search``, made by :func:`gsop_search`, goes on to the option's budget; BudgetError if nothing fits.
    """
    problem, most_cost, tokens = option.problem, option.most, option.problem.space.tokens
    what = f"GSOP's trajectory over {option.problem.space.strategy_fields.get('selector', 'the selector')}"
    search.evaluate = problem.need_store(GSOP).means(on_progress, what)
    points = search.trajectory(lambda strategy: option.price(strategy) <= most_cost)
    most: list[int] = []
    for point in points:  # costs fall, so more and more tokens fit

        def cost(level: int, point: GsopPoint = point) -> float:
            return option.price(point.with_tokens(level))

        least = tokens.levels.index(most[-1]) + 1 if most and most[-1] else 0
        low = bisect_right(tokens.levels, most_cost, lo=least, key=cost)
        most.append(int(tokens.levels[low - 1]) if low else 0)
    space = TrajectorySpace(
        GSOP,
        problem.space.num_layers,
        (tokens,),
        SHARES,
        problem.space.strategy_fields,
        tuple(point.strategy for point in points),
        tuple(most),
    )
    curve = problem.need_surrogate(GSOP).curves[TOKENS]
    lost = np.array([points[space.point(level)].divergence for level in tokens.levels])
    found = Problem(space, problem.cost_model, Surrogate(space, {TOKENS: curve + lost}), problem.store)
    return replace(option, space=GSOP, problem=found, num_runs=search.num_evaluations, num_curve_runs=0)
