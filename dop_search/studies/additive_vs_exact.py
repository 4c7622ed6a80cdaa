"""The additive optimum against the true joint optimum, found by measuring every strategy of a coarse grid.

Methods, each over the same grid and within the same budget:

* ``additive``: the optimum of the sum of curves;
* ``rerank``: the best of the 16 best by the sum, and uniform reduction, by exact KL;
* ``reanchored``: curves measured again around the additive optimum, solved again; the better of the two by exact KL;
* ``pair``, ``pairs``: the sum plus the measured interaction of the strongest pair of parameters, or of all pairs;
* ``exact``: the least KL of the grid.

``num_validation_runs`` counts the distinct strategies that a method alone would have had to measure.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from dop_search.app.results import ResultFile, Row
from dop_search.app.workbench import Workbench
from dop_search.search import (
    CurveGrid,
    Curves,
    EvaluatedGrid,
    EvaluationStore,
    Problem,
    Space,
    evaluate_grid,
    pareto_front,
    rerank_all,
)
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget
from dop_search.utils.errors import ConfigError
from dop_search.utils.statistics import bootstrap_ci95, spearman

METHODS = ("additive", "rerank", "reanchored", "pair", "pairs", "exact")
SCORED = ("additive", "exact")
"""Methods whose strategies also answer the test questions."""
GRIDS = {"dop": (13, 4), "dop_split": (5, 3)}
FEWEST_TOKENS = 1 / 16
"""Share of the visual tokens at the lowest level of a grid."""

Point = Mapping[str, int]


@dataclass(frozen=True)
class _Measured:
    """A grid with all its exact divergences, read by methods as if they measured them."""

    grid: EvaluatedGrid

    @cached_property
    def space(self) -> Space:
        """The space with the grid's levels alone."""
        levels = {n: sorted({a[n] for a in self.grid.assignments}) for n in self.grid.problem.space.names}
        return self.grid.problem.space.with_levels(levels)

    @cached_property
    def _row(self) -> Mapping[str, int]:
        return {strategy.key(): row for row, strategy in enumerate(self.grid.strategies)}

    def per_sample(self, strategy: Strategy) -> np.ndarray:
        """Divergence in nats of a strategy of the grid ``[num_samples]``."""
        return np.asarray(self.grid.per_sample_nats[self._row[strategy.key()]])

    def counting(self) -> Problem:
        """The problem with a store that counts what is asked of it and knows its own curves."""
        store = EvaluationStore(
            lambda strategies, _: np.stack([self.per_sample(item) for item in strategies]),
            self.grid.per_sample_nats.shape[1],
        )
        curves = Curves.measure(self.space, store, CurveGrid(levels={p.name: p.levels for p in self.space.parameters}))
        return replace(self.grid.problem, space=self.space, surrogate=curves.surrogate(self.space), store=store)


def additive_vs_exact(
    bench: Workbench, results: ResultFile, grids: Mapping[str, Sequence[int]] = GRIDS, num_candidates: int = 16
) -> None:
    """Measure the grids, choose by every method and compare on new samples; see the module.

    Args:
        bench: the model and its samples.
        results: where the rows go.
        grids: per space (one group of tokens) the numbers of levels of each depth and of the visual tokens.
        num_candidates: of ``rerank``.
    """
    for space, sizes in grids.items():
        if space not in GRIDS or len(sizes) != 2 or min(sizes) < 2:
            raise ConfigError(
                f"`grids` maps {' or '.join(GRIDS)} to two numbers of levels >= 2, of each depth and of the tokens, "
                f"but got ({space}: {list(sizes)})"
            )
    measured: dict[str, _Measured] = {}

    def whole(space: str) -> _Measured:
        if space not in measured:
            problem = bench.profile(space).problem()
            with bench.watch(f"{space}: ") as notify:
                grid = evaluate_grid(problem, _levels(problem.space, *grids[space]), on_progress=notify)
            measured[space] = _Measured(grid)
        return measured[space]

    def row(space: str, method: str, budget: float | None) -> Row | tuple[Row, np.ndarray]:
        if budget is None:
            return _describe_grid(whole(space))
        strategy, values = _choose(whole(space), method, Budget(flops_ratio=budget), num_candidates)
        return _measure(bench, strategy, method, values)

    keys: list[dict[str, Any]] = [
        {"space": space, "method": method, "budget": budget}
        for space in grids
        for method, budget in [("grid", None), *itertools.product(METHODS, bench.budgets)]
    ]
    with bench.watch() as notify:
        results.measure(keys, row, notify, "additive and exact optima", group="space")
    results.sort(keys)
    results.summarize({"gaps": _gaps(bench, results, list(grids))})


def _levels(space: Space, num_depths: int, num_tokens: int) -> dict[str, list[int]]:
    """Depths evenly spaced, numbers of tokens geometrically; ends included."""
    chosen = {}
    for parameter in space.parameters:
        top = parameter.full
        spaced = (
            np.geomspace(top * FEWEST_TOKENS, top, num_tokens)
            if parameter.role == "tokens"
            else np.linspace(0, top, num_depths)
        )
        chosen[parameter.name] = sorted({parameter.nearest(value) for value in spaced})
    return chosen


# -- methods ---------------------------------------------------------------------------------------


def _choose(measured: _Measured, method: str, budget: Budget, num_candidates: int) -> tuple[Strategy, Row]:
    """A method's strategy and what it knows of it."""
    grid = measured.grid
    problem = measured.counting()
    store = problem.need_store("study")
    first = pareto_front(problem).solve(budget)
    chosen, estimate = first.strategy, first.kl_additive
    if method == "rerank":
        ranked = rerank_all(problem, budget, num_candidates, "exact")
        chosen, estimate = ranked[0].strategy, ranked[0].kl_additive
    elif method in ("reanchored", "pair", "pairs"):
        mean = _mean(problem)
        if method == "reanchored":
            estimates = _reanchored(measured, mean, first.assignment)
        else:
            estimates = _with_interactions(measured, mean, only_strongest=method == "pair")
        within = np.flatnonzero(grid.cost_ratio <= budget.value)
        at = int(min(within, key=lambda i: (round(float(estimates[i]), 12), grid.cost_ratio[i])))
        chosen, estimate = grid.strategies[at], float(estimates[at])
        if method == "reanchored" and mean([grid.assignments[at]])[0] > mean([first.assignment])[0]:
            chosen, estimate = first.strategy, first.kl_additive
    elif method == "exact":
        best = grid.best(budget)
        chosen, estimate = best.strategy, None  # found without the sum of curves
        store.evaluate([strategy for strategy in grid.strategies if not strategy.is_empty])
    return chosen, {
        "strategy": chosen.describe(),
        "flops_ratio": grid.problem.cost_model.ratio(chosen),
        "kl_estimate": estimate,
        "kl_search": float(measured.per_sample(chosen).mean()),
        "num_validation_runs": store.num_validation_runs,
    }


Mean = Callable[[Sequence[Point]], np.ndarray]


def _mean(problem: Problem) -> Mean:
    """Mean divergence in nats of points of the grid, counted; the full model's is 0 without measuring."""
    store, space = problem.need_store("study"), problem.space

    def mean(points: Sequence[Point]) -> np.ndarray:
        strategies = [space.strategy(point) for point in points]
        values = np.zeros(len(points))
        todo = [index for index, strategy in enumerate(strategies) if not strategy.is_empty]
        if todo:
            values[todo] = store.evaluate([strategies[index] for index in todo]).mean(axis=1)
        return values

    return mean


def _reanchored(measured: _Measured, mean: Mean, anchor: Point) -> np.ndarray:
    """``D(a) + sum_p [D(a with p) - D(a)]`` of every point of the grid."""
    base = float(mean([anchor])[0])
    curves = {}
    for p in measured.space.parameters:
        curves[p.name] = dict(zip(p.levels, mean([{**anchor, p.name: v} for v in p.levels]) - base, strict=True))
    return np.array([base + sum(curves[n][v] for n, v in point.items()) for point in measured.grid.assignments])


def _with_interactions(measured: _Measured, mean: Mean, only_strongest: bool) -> np.ndarray:
    """``sum_p D_p + sum_pairs [D_ab - D_a - D_b]`` of every point of the grid."""
    space = measured.space
    pairs = list(itertools.combinations(space.parameters, 2))
    if only_strongest:
        probes = [{p.name: p.levels[len(p.levels) // 2] for p in pair} for pair in pairs]
        singles = [sum(float(mean([{name: level}])[0]) for name, level in probe.items()) for probe in probes]
        strength = np.abs(mean(probes) - np.array(singles))
        pairs = [pairs[int(strength.argmax())]]
    curves = {p.name: dict(zip(p.levels, mean([{p.name: v} for v in p.levels]), strict=True)) for p in space.parameters}
    estimates = np.array([sum(curves[n][v] for n, v in point.items()) for point in measured.grid.assignments])
    for a, b in pairs:
        points = list(itertools.product(a.levels, b.levels))
        joint = dict(zip(points, mean([{a.name: x, b.name: y} for x, y in points]), strict=True))
        for index, point in enumerate(measured.grid.assignments):
            x, y = point[a.name], point[b.name]
            estimates[index] += joint[x, y] - curves[a.name][x] - curves[b.name][y]
    return estimates


# -- rows ------------------------------------------------------------------------------------------


def _describe_grid(measured: _Measured) -> Row:
    """All points of the grid and how well the sum ranks them."""
    grid, space = measured.grid, measured.space
    surrogate = measured.counting().need_surrogate("study")
    exact = grid.per_sample_nats.mean(axis=1)
    estimate = np.array([surrogate(point) for point in grid.assignments])
    cheap = grid.cost_ratio <= np.median(grid.cost_ratio)
    pruned = np.array([not strategy.is_empty for strategy in grid.strategies])
    cut = np.array([sum(point[p.name] != p.full for p in space.parameters) for point in grid.assignments])
    visible = pruned & (np.maximum(exact, estimate) >= 1e-4)
    ratio = np.where(visible, exact / np.maximum(estimate, 1e-9), np.nan)
    levels = [[int(point[name]) for name in space.names] for point in grid.assignments]
    return {
        "num_strategies": int(pruned.sum()),
        "num_samples": grid.per_sample_nats.shape[1],
        "spearman": spearman(estimate[pruned].tolist(), exact[pruned].tolist()),
        "spearman_cheap_half": spearman(estimate[cheap].tolist(), exact[cheap].tolist()),
        "median_cost_ratio": float(np.median(grid.cost_ratio)),
        "exact_to_estimate": {
            str(n): [float(x) for x in np.nanquantile(ratio[visible & (cut == n)], (0.1, 0.5, 0.9))]
            for n in sorted(set(cut[visible].tolist()))
        },
        "parameters": list(space.names),
        "levels": levels,
        "cost_ratio": [round(float(x), 5) for x in grid.cost_ratio],
        "kl_search_of": [float(f"{x:.4g}") for x in exact],
        "kl_estimate_of": [float(f"{x:.4g}") for x in estimate],
    }


def _measure(bench: Workbench, strategy: Strategy, method: str, values: Row) -> tuple[Row, np.ndarray]:
    heldout = bench.divergence([strategy])[0]
    values |= {
        "kl_heldout": float(heldout.mean()),
        "kl_heldout_median": float(np.median(heldout)),
        "kl_ci95": bootstrap_ci95(heldout, bench.config.seed),
    }
    if method in SCORED:
        values["accuracy"] = float(bench.correct(strategy).mean())
    return values, heldout


def _gaps(bench: Workbench, results: ResultFile, spaces: Sequence[str]) -> list[Row]:
    """Per space, budget and method: KL above the exact optimum's, on the search and on the held-out samples."""
    gaps = []
    for space, budget, method in itertools.product(spaces, bench.budgets, METHODS[:-1]):
        key, best = ({"space": space, "method": name, "budget": budget} for name in (method, "exact"))
        mine, theirs = results.per_sample(key), results.per_sample(best)
        row, other = results.find(key), results.find(best)
        if mine is None or theirs is None or row is None or other is None:
            continue
        gaps.append(
            {
                **key,
                "kl_search": row["kl_search"] - other["kl_search"],
                "kl_heldout": float((mine - theirs).mean()),
                "kl_heldout_ci95": bootstrap_ci95(mine - theirs, bench.config.seed),
            }
        )
    return gaps
