"""Transfer: a strategy found elsewhere (another model, budget or draw of samples), run on the target at its budget.

A strategy travels by depth ratio (arXiv 2507.02909); the number of visual tokens becomes the most that the target's
budget allows at those depths. It is compared on the target's held-out samples
with the strategy searched there and with uniform reduction, paired by sample.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import PositiveInt, PrivateAttr

from dop_search.app.config import SearchConfig
from dop_search.app.config.section import Listed
from dop_search.app.report.style import FAINT, FOUND, LOOKS, styled
from dop_search.app.report.style import UNIFORM as UNIFORM_COLOR
from dop_search.app.results import ResultFile, Row
from dop_search.app.study import Measured, Result, Study
from dop_search.app.workbench import Workbench
from dop_search.models.loading import load
from dop_search.search import Problem, rerank_all, uniform_strategy
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget
from dop_search.utils.errors import ConfigError
from dop_search.utils.intervals import holm, mean_ci95, sign_flip_p
from experiments.validation_seed.study import check_other_seed

TARGET, UNIFORM = "target", "uniform"
"""Sources of the rows that the others are compared with: the search on the target itself, and uniform reduction."""


class Transfer(Study):
    """Search at every source, move and measure; see the module."""

    question = "Does a strategy that was found on another model, at another budget or from other samples do here?"
    rows = "strategies at their targets"
    group = ("target",)
    adds_rows = frozenset({"models", "seeds"})

    models: Listed[str] = ()
    """Other models of the same selector; each is a source and a target."""
    seeds: Listed[int] = ()
    """Of other search samples, for the configured model."""
    num_candidates: PositiveInt = 16
    """How many are re-ranked by exact KL in each search."""

    _benches: dict[str, Workbench] = PrivateAttr(default_factory=dict)
    _found: dict[tuple[str, int, float], Strategy] = PrivateAttr(default_factory=dict)

    def check(self, config: SearchConfig) -> None:
        """See base class."""
        if config.data.seed in self.seeds:
            raise ConfigError(f"study.options.seeds has the configured data.seed ({config.data.seed}); name others")

    def keys(self, bench: Workbench) -> list[dict[str, Any]]:
        """See base class."""
        own = bench.loaded.name
        if own in self.models:
            raise ConfigError(f"study.options.models names the configured model {own!r}; name others, or []")
        for seed in self.seeds:
            check_other_seed(bench, seed)
        return _keys(own, self.models, self.seeds, bench.budgets)

    def row(self, bench: Workbench, target: str, budget: float, axis: str, source: str) -> Measured:
        """See base class."""
        seed, limit = bench.config.data.seed, Budget(flops_ratio=budget)
        there: dict[str, Any] = {"model": target, "seed": seed, "budget": budget}
        if axis not in (TARGET, UNIFORM):
            there[axis] = _like(axis, source)
        found = None if axis == UNIFORM else self._search(bench, **there)  # first: it may need another model
        here = self._at(bench, target)
        problem = here.profile(seed=seed).problem(limit)
        if found is None:
            strategy = uniform_strategy(problem, limit)
        else:
            strategy = found if axis == TARGET else moved(found, problem, budget)
        heldout = here.divergence([strategy], "heldout")[0]
        values = {
            "flops_ratio": problem.cost_model.ratio(strategy),
            "kl_search": float(here.divergence([strategy], "search", seed=seed)[0].mean()),
            "kl_heldout": float(heldout.mean()),
            "kl_ci95": mean_ci95(heldout, bench.config.seed),
            "kl_median": float(np.median(heldout)),
            "strategy": strategy.describe(),
        }
        return values, heldout

    def _at(self, bench: Workbench, model: str) -> Workbench:
        """The workbench of a model; beside the configured one, the latest alone is held."""
        if model == bench.loaded.name:
            return bench
        if model not in self._benches:
            self._benches.clear()
            other = bench.config.model.model_copy(update={"name_or_path": model})
            config = bench.config.model_copy(update={"model": other})
            self._benches[model] = Workbench(config, load(**config.model.model_dump()), bench.progress)
        return self._benches[model]

    def _search(self, bench: Workbench, model: str, seed: int, budget: float) -> Strategy:
        key = (model, seed, budget)
        if key not in self._found:
            limit = Budget(flops_ratio=budget)
            problem = self._at(bench, model).profile(seed=seed).problem(limit)
            with bench.watch(f"{model}, seed {seed}: ") as notify:
                self._found[key] = rerank_all(problem, limit, self.num_candidates, on_progress=notify)[0].strategy
        return self._found[key]

    def summarize(self, bench: Workbench, results: ResultFile) -> dict[str, Any]:
        """See base class."""
        return summarize(results)

    @staticmethod
    def figures(result: Result) -> dict[str, Figure]:
        """``transfer``: one panel per target and budget."""
        rows = [row for row in result["rows"] if "kl_heldout" in row]
        if not rows:
            return {}
        targets = list(dict.fromkeys(row["target"] for row in rows))
        budgets = list(dict.fromkeys(row["budget"] for row in rows))
        sources = {target: _sources(rows, target) for target in targets}
        heights = [len(sources[target]) for target in targets]
        with styled():
            figure = Figure(figsize=(9.6, 1.0 + 0.2 * sum(heights) + 0.4 * len(targets)), layout="constrained")
            axes = figure.subplots(len(targets), len(budgets), sharex=True, squeeze=False, height_ratios=heights)
            for line, target in zip(axes, targets, strict=True):
                for axis, budget in zip(line, budgets, strict=True):
                    here = [row for row in rows if row["target"] == target and row["budget"] == budget]
                    _panel(axis, here, sources[target])
                    axis.set_title(f"on {_short(target)} at {budget:g}")
                    if axis is not line[0]:
                        axis.tick_params(labelleft=False)
            figure.supxlabel(
                "held-out KL to the full model (nats, mean and 95 % interval), at shares of the FLOPs", fontsize=9
            )
        return {"transfer": figure}


def _keys(own: str, models: Sequence[str], seeds: Sequence[int], budgets: Sequence[float]) -> list[dict[str, Any]]:
    keys = []
    for target in (own, *models):
        for budget in budgets:
            sources = [(TARGET, ""), (UNIFORM, "")]
            sources += [("model", other) for other in (own, *models) if other != target]
            if target == own:
                sources += [("budget", f"{other:g}") for other in budgets if other != budget]
                sources += [("seed", str(seed)) for seed in seeds]
            keys += [{"target": target, "budget": budget, "axis": axis, "source": source} for axis, source in sources]
    return keys


def _like(axis: str, source: str) -> str | int | float:
    kinds: dict[str, Any] = {"model": str, "seed": int, "budget": float}
    value: str | int | float = kinds[axis](source)
    return value


def moved(strategy: Strategy, problem: Problem, budget: float) -> Strategy:
    """A depth-wise strategy on the model of ``problem``: same depth ratios, as many visual tokens as ``budget`` allows.

    A strategy that is cheaper than the budget with all tokens keeps all, and stays cheaper.

    Raises:
        BudgetError: if its depths alone cost more, at the fewest tokens; names the smallest feasible ratio.
        StrategyError: if it is not depth-wise.
    """
    space, cost = problem.space, problem.cost_model
    scaled = strategy if strategy.num_layers == space.num_layers else strategy.for_num_layers(space.num_layers)
    scaled = replace(scaled, **space.strategy_fields)

    def keeping(count: int) -> Strategy:
        return replace(scaled, num_visual_tokens=None if count >= space.tokens.full else count)

    levels = space.tokens.levels
    place = bisect_right(levels, budget, key=lambda count: cost.ratio(keeping(count)))  # levels[:place] fit
    if place == 0:
        raise Budget(flops_ratio=budget).infeasible(cost, cost.ratio(keeping(levels[0])))
    return keeping(levels[place - 1])


def summarize(results: ResultFile) -> dict[str, Any]:
    """Per row that moved: its held-out KL minus the target's own, and minus uniform's, paired by sample.

    ``to_…_ci95``: the 95 % interval; ``to_…_p``: by sign flips, adjusted by Holm over all of these differences.
    """
    moves: list[Row] = []
    tested: list[tuple[Row, str, float]] = []
    for row in results.rows:
        if row["axis"] in (TARGET, UNIFORM) or "kl_heldout" not in row:
            continue
        its = _samples(results, row)
        moves.append({name: row[name] for name in ("target", "budget", "axis", "source")})
        for axis in (TARGET, UNIFORM):
            other = _samples(results, {**row, "axis": axis, "source": ""})
            if its is not None and other is not None:
                moves[-1][f"to_{axis}_ci95"] = mean_ci95(its - other)
                tested.append((moves[-1], f"to_{axis}_p", sign_flip_p(its - other)))
    for (move, name, _), p in zip(tested, holm([p for *_, p in tested]), strict=True):
        move[name] = p
    return {"moves": moves}


def _samples(results: ResultFile, row: Mapping[str, Any]) -> np.ndarray | None:
    return results.per_sample({name: row[name] for name in ("target", "budget", "axis", "source")})


# -- figures ---------------------------------------------------------------------------------------


SMALLEST = 1e-5
"""Nats; what is less is drawn here."""
_COLORS = {"target": FOUND, "uniform": UNIFORM_COLOR, "model": LOOKS[2].color, "budget": LOOKS[3].color, "seed": FAINT}
_MARKERS = {"target": "o", "uniform": "s", "model": "^", "budget": "D", "seed": "v"}
_NAMES = {"target": "searched here", "uniform": "uniform reduction"}


def _sources(rows: list[Mapping[str, Any]], target: str) -> list[str]:
    """Labels of what runs on ``target`` at any budget, in the order of a panel; larger budgets first."""

    def place(row: Mapping[str, Any]) -> tuple[int, float]:
        return list(_MARKERS).index(row["axis"]), -float(row["source"]) if row["axis"] == "budget" else 0.0

    return list(dict.fromkeys(_label(row) for row in sorted(rows, key=place) if row["target"] == target))


def _panel(axis: Axes, rows: list[Mapping[str, Any]], labels: list[str]) -> None:
    for row in rows:
        color, place = _COLORS[row["axis"]], labels.index(_label(row))
        axis.plot([max(end, SMALLEST) for end in row["kl_ci95"]], [place, place], color=color, linewidth=1.0)
        axis.plot(max(row["kl_heldout"], SMALLEST), place, _MARKERS[row["axis"]], color=color)
    own = next((row for row in rows if row["axis"] == "target"), None)
    if own is not None:
        axis.axvline(max(own["kl_heldout"], SMALLEST), color=FOUND, linewidth=0.6, linestyle=":")
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set_xscale("log")


def _label(row: Mapping[str, Any]) -> str:
    return _NAMES.get(row["axis"], f"from {row['axis']} {_short(row['source'])}")


def _short(name: str) -> str:
    return name.rsplit("/", 1)[-1]
