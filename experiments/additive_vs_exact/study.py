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
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from pydantic import PositiveInt, PrivateAttr, field_validator

from dop_search.app.config.section import Listed
from dop_search.app.report.style import FAINT, LOOKS, styled
from dop_search.app.results import ResultFile, Row
from dop_search.app.study import Measured, Result, Study
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
from dop_search.utils.intervals import mean_ci95
from dop_search.utils.statistics import spearman

METHODS = ("additive", "rerank", "reanchored", "pair", "pairs", "exact")
SCORED = ("additive", "exact")
"""Methods whose strategies also answer the test questions."""
GRIDS: dict[str, tuple[int, ...]] = {"dop": (13, 4), "dop_split": (5, 3)}
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


class AdditiveVsExact(Study):
    """Measure the grids, choose by every method and compare on new samples; see the module."""

    question = "How far is the optimum of the sum of curves from the true joint optimum, and what closes the gap?"
    rows = "additive and exact optima"
    reads = ("search", "heldout", "test")
    judges = "test"
    group = ("space",)

    grids: dict[str, Listed[int]] = GRIDS
    """Per space (one group of tokens) the numbers of levels of each depth and of the visual tokens."""
    num_candidates: PositiveInt = 16
    """Of ``rerank``."""

    _grids: dict[str, _Measured] = PrivateAttr(default_factory=dict)

    @field_validator("grids")
    @classmethod
    def _has_two_numbers(cls, value: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        for space, sizes in value.items():
            if space not in GRIDS or len(sizes) != 2 or min(sizes) < 2:
                raise ValueError(
                    f"maps {' or '.join(GRIDS)} to two numbers of levels >= 2, of each depth and of the tokens, "
                    f"but got ({space}: {list(sizes)})"
                )
        return value

    def keys(self, bench: Workbench) -> list[dict[str, Any]]:
        """See base class."""
        return [
            {"space": space, "method": method, "budget": budget}
            for space in self.grids
            for method, budget in [("grid", None), *itertools.product(METHODS, bench.budgets)]
        ]

    def row(self, bench: Workbench, space: str, method: str, budget: float | None) -> Measured:
        """See base class."""
        if budget is None:
            return _describe_grid(self._whole(bench, space))
        limit = Budget(flops_ratio=budget)
        strategy, values = _choose(self._whole(bench, space), method, limit, self.num_candidates)
        return _measure(bench, strategy, method, values)

    def _whole(self, bench: Workbench, space: str) -> _Measured:
        if space not in self._grids:
            problem = bench.profile(space).problem()
            levels = _levels(problem.space, *self.grids[space])
            with bench.watch(f"{space}: ") as notify:
                self._grids[space] = _Measured(evaluate_grid(problem, levels, on_progress=notify))
        return self._grids[space]

    def summarize(self, bench: Workbench, results: ResultFile) -> dict[str, Any]:
        """See base class."""
        return {"gaps": _gaps(bench, results, list(self.grids))}

    @staticmethod
    def figures(result: Result) -> dict[str, Figure]:
        """``map``: exact KL over the two depths; ``optima``: estimate against measurement, excess KL of each method."""
        grids = {row["space"]: row for row in result["rows"] if row["method"] == "grid" and "levels" in row}
        made = {"map": _map(grids[MAPPED])} if MAPPED in grids else {}
        return {**made, "optima": _optima(result, grids)}


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
        "kl_ci95": mean_ci95(heldout, bench.config.seed),
    }
    if method in SCORED and bench.is_annotated("test"):
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
                "kl_heldout_ci95": mean_ci95(mine - theirs, bench.config.seed),
            }
        )
    return gaps


# -- figures ---------------------------------------------------------------------------------------


MAPPED = "dop"
FLOOR_NATS = 1e-4
"""Smaller divergences share one colour: they are less than the samples can resolve."""
LABELS = {
    "additive": "additive",
    "rerank": "+ re-ranking",
    "reanchored": "re-anchored curves",
    "pair": "+ strongest pair",
    "pairs": "+ all pairs",
    "exact": "exhaustive",
}


def _map(grid: Mapping[str, Any]) -> Figure:
    names = grid["parameters"]
    levels = np.array(grid["levels"])
    attention, mlp, tokens = (levels[:, names.index(n)] for n in ("attention_depth", "mlp_depth", "num_visual_tokens"))
    shown = sorted(set(tokens.tolist()))
    depths, mlp_depths = sorted(set(attention.tolist())), sorted(set(mlp.tolist()))
    exact = np.maximum(grid["kl_search_of"], FLOOR_NATS)
    norm = LogNorm(FLOOR_NATS, float(exact.max()))
    with styled():
        figure = Figure(figsize=(9.6, 3.2), layout="constrained")
        axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axis, count in zip(axes, shown, strict=True):
            image = np.full((len(depths), len(mlp_depths)), np.nan)
            for x, y, value, its in zip(mlp, attention, exact, tokens, strict=True):
                if its == count:
                    image[depths.index(y), mlp_depths.index(x)] = value
            for line in range(len(depths)):  # MLP depths beyond the keys' are the same strategy
                known = np.flatnonzero(~np.isnan(image[line]))
                if len(known):
                    image[line, np.isnan(image[line])] = image[line, known[-1]]
            drawn = axis.imshow(image, norm=norm, cmap="viridis_r", origin="lower", aspect="auto")
            axis.set_xticks(range(0, len(mlp_depths), 3), mlp_depths[::3])
            axis.set_yticks(range(0, len(depths), 3), depths[::3])
            axis.set_title(f"{count} visual tokens")
            axis.set_xlabel("MLP depth")
            axis.grid(False)
        axes[0].set_ylabel("attention depth")
        bar = figure.colorbar(drawn, ax=list(axes), pad=0.01)
        bar.set_label("exact KL (nats), search set")
    return figure


def _optima(result: Result, grids: Mapping[str, Mapping[str, Any]]) -> Figure:
    with styled():
        figure = Figure(figsize=(9.2, 2.4 * len(grids) + 0.3), layout="constrained")
        for line, (space, grid) in zip(figure.subplots(len(grids), 3, squeeze=False), grids.items(), strict=True):
            scatter, search, heldout = line
            estimate = np.maximum(grid["kl_estimate_of"], FLOOR_NATS)
            exact = np.maximum(grid["kl_search_of"], FLOOR_NATS)
            drawn = scatter.scatter(estimate, exact, c=grid["cost_ratio"], s=9, cmap="cividis", vmin=0.0, vmax=1.0)
            scatter.axline((1.0, 1.0), slope=1.0, color=FAINT, linewidth=0.9)
            scatter.set(xscale="log", yscale="log", xlabel="sum of curves (nats)", ylabel="exact KL (nats)")
            scatter.set_title(f"{space}: all strategies")
            ranks = f"Spearman {grid['spearman']:.3f}\ncheap half {grid['spearman_cheap_half']:.3f}"
            scatter.annotate(ranks, (0.03, 0.97), xycoords="axes fraction", va="top")
            figure.colorbar(drawn, ax=scatter, label="share of the FLOPs", pad=0.01)
            gaps = [gap for gap in result["summary"]["gaps"] if gap["space"] == space]
            _excess(search, gaps, "kl_search")
            search.set_title(f"{space}: search set")
            search.set_ylabel("KL above the optimum's (nats)")
            _excess(heldout, gaps, "kl_heldout")
            heldout.set_title(f"{space}: held-out, 95 %")
        handles, labels = search.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure


def _excess(axis: Axes, gaps: Sequence[Mapping[str, Any]], field: str) -> None:
    """KL of each method above that of the exhaustive optimum, per budget; bars where there are intervals."""
    budgets = sorted({gap["budget"] for gap in gaps})
    names = [name for name in LABELS if name != "exact"]
    for index, (look, name) in enumerate(zip(LOOKS, names, strict=False)):
        its = [gap for gap in gaps if gap["method"] == name]
        places = [budgets.index(gap["budget"]) + 0.15 * (index - (len(names) - 1) / 2) for gap in its]
        axis.plot(places, [gap[field] for gap in its], look.marker, color=look.color, label=LABELS[name])
        bars = [(x, *gap[f"{field}_ci95"]) for x, gap in zip(places, its, strict=True) if gap.get(f"{field}_ci95")]
        if bars:
            axis.vlines(*zip(*bars, strict=True), color=look.color)
    axis.axhline(0.0, color=FAINT, linewidth=0.9)
    axis.set_yscale("symlog", linthresh=0.001)
    ends = [gap[field] for gap in gaps] + [end for gap in gaps for end in gap.get(f"{field}_ci95") or ()]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    axis.set_ylim(2 * low - 2e-4, 2 * high + 2e-4)
    axis.set_xticks(range(len(budgets)), [f"{budget:g}" for budget in budgets])
    axis.set_xlabel("budget, share of the FLOPs")
