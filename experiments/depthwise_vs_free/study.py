"""Exit depths, windows of layers and free layer sets; and whether deeper layers are more redundant.

Ablation rows say what one module costs, all else full: left out in one layer (``single``), from a layer to the end
(``from_end``) or up to a layer (``from_start``).

Search rows are strategies within a budget. ``start`` is the best exit-depth strategy by curves and re-ranking. From it
a local search on exact search-set KL goes on, with as many validation runs for each kind of move: ``exit`` moves exit
depths by a layer, ``window`` also the first layer, ``free`` switches single layers on or off; two moves at once where
single ones are used up. After each move as many visual tokens enter as the budget allows. ``gsop`` is the published
free search, with two groups of tokens and as many runs as it takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import numpy as np
from matplotlib.figure import Figure
from pydantic import PositiveInt

from dop_search.app.config.section import Listed
from dop_search.app.report.style import FOUND, LOOKS, UNIFORM, styled
from dop_search.app.results import ResultFile, Row
from dop_search.app.study import Measured, Result, Study
from dop_search.app.workbench import Workbench
from dop_search.baselines import BASELINES
from dop_search.search import Problem, rerank_all
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget
from dop_search.strategy.operations import MODULES
from dop_search.utils.intervals import holm, mean_ci95, sign_flip_p
from dop_search.utils.statistics import spearman

Ablation = Literal["single", "from_end", "from_start"]
Freedom = Literal["start", "exit", "window", "free", "gsop"]
MAX_PAIRS = 500
"""Random pairs of moves that are tried where all single moves are used up."""

Runs = np.ndarray
"""Boolean ``[layer, module]``: what runs."""


class DepthwiseVsFree(Study):
    """Measure ablations, search with each freedom, and compare on new samples; see the module."""

    question = (
        "What is one module of one layer worth, and what do windows and free sets of layers gain over exit depths?"
    )
    rows = "depths, windows and free sets"
    adds_rows = frozenset({"ablations", "searches"})

    num_runs: PositiveInt = 40
    """Validation runs of each local search."""
    ablations: Listed[Ablation] = get_args(Ablation)
    """Which to measure: a layer alone, from a layer to the end, up to a layer."""
    searches: Listed[Freedom] = get_args(Freedom)
    """Which to run at each budget; GSOP's takes over a thousand strategies for 30 layers."""

    def keys(self, bench: Workbench) -> list[dict[str, Any]]:
        """See base class."""
        ablations = itertools.product(self.ablations, MODULES)
        searches = itertools.product(bench.budgets, self.searches)
        return [
            *({"kind": kind, "name": module.value, "budget": None} for kind, module in ablations),
            *({"kind": "search", "name": name, "budget": budget} for budget, name in searches),
        ]

    def row(self, bench: Workbench, kind: str, name: str, budget: float | None) -> Measured:
        """See base class."""
        return _ablation(bench, kind, name) if budget is None else _search(bench, name, budget, self.num_runs)

    def summarize(self, bench: Workbench, results: ResultFile) -> dict[str, Any]:
        """See base class."""
        return {"differences": _differences(bench, results)}

    @staticmethod
    def figures(result: Result) -> dict[str, Figure]:
        """``ablation``: KL per layer and module; ``layer_sets``: search-set and held-out KL of each freedom."""
        return {"ablation": _draw_ablation(result), "layer_sets": _draw_layer_sets(result)}


# -- ablation --------------------------------------------------------------------------------------


def _ablation(bench: Workbench, kind: str, name: str) -> Row:
    """KL in nats per layer (``single``), exit depth (``from_end``) or start depth (``from_start``)."""
    num_layers = bench.num_layers
    module = [item.value for item in MODULES].index(name)
    space = bench.profile().space
    layers = list(range(num_layers))
    strategies = []
    for layer in layers:
        runs = np.ones((1, num_layers, len(MODULES)), dtype=np.bool_)
        cut = {"single": slice(layer, layer + 1), "from_end": slice(layer, None), "from_start": slice(0, layer + 1)}
        runs[0, cut[kind], module] = False
        strategies.append(Strategy.from_array(runs, **space.strategy_fields).canonical())
    alive = [layer for layer in layers if not strategies[layer].is_empty]
    values = np.zeros((num_layers, len(bench.data("search").samples)))
    values[alive] = bench.divergence([strategies[layer] for layer in alive], "search", f"{name}, {kind}")
    mean = values.mean(axis=1)
    return {
        "layers": layers,
        "dead": [layer for layer in layers if layer not in alive],
        "kl_search": mean,
        "kl_search_ci95": [mean_ci95(item, bench.config.seed) for item in values],
        "kl_search_median": np.median(values, axis=1),
        "share_moved": (values > 1e-3).mean(axis=1),
        "spearman_with_depth": spearman(alive, mean[alive].tolist()),
    }


# -- searches --------------------------------------------------------------------------------------


def _exit_moves(runs: Runs) -> Iterator[Runs]:
    """One module's exit depth, one layer more or less."""
    layers = np.arange(len(runs))
    for module in range(runs.shape[1]):
        depth = int(runs[:, module].sum())
        for other in (depth - 1, depth + 1):
            if 0 <= other <= len(runs):
                yield _with(runs, module, layers < other)


def _window_moves(runs: Runs) -> Iterator[Runs]:
    """One module's first or last layer, one more or less."""
    layers = np.arange(len(runs))
    for module in range(runs.shape[1]):
        on = np.flatnonzero(runs[:, module])
        start, end = (int(on[0]), int(on[-1]) + 1) if len(on) else (0, 0)
        for low, high in ((start - 1, end), (start + 1, end), (start, end - 1), (start, end + 1)):
            if 0 <= low <= high <= len(runs):
                yield _with(runs, module, (layers >= low) & (layers < high))


def _free_moves(runs: Runs) -> Iterator[Runs]:
    """One module of one layer on or off."""
    for layer, module in np.ndindex(*runs.shape):
        moved = runs.copy()
        moved[layer, module] = not moved[layer, module]
        yield moved


def _with(runs: Runs, module: int, layers: np.ndarray) -> Runs:
    moved = runs.copy()
    moved[:, module] = layers
    return moved


MOVES: dict[str, Callable[[Runs], Iterator[Runs]]] = {
    "exit": _exit_moves,
    "window": _window_moves,
    "free": _free_moves,
}


def _search(bench: Workbench, name: str, budget: float, num_runs: int) -> tuple[Row, np.ndarray]:
    if name == "gsop":
        fitted = BASELINES["gsop"].fit(bench.context(), budget)
        strategy, used = fitted.needs_strategy(), int(fitted.hyperparameters["num_evaluations"])
        path: list[float] = []
    else:
        limit = Budget(flops_ratio=budget)
        profile = bench.profile("dop_split")
        problem = profile.problem(limit)
        best = rerank_all(problem, limit)[0]
        strategy, used = best.strategy, profile.curves.num_validation_runs + best.num_validation_runs
        path = [best.kl_search]
        if name in MOVES:
            with bench.watch(f"{name} at {budget:g}: ") as notify:
                strategy, path = local_search(
                    problem,
                    strategy,
                    budget,
                    MOVES[name],
                    num_runs,
                    bench.config.seed,
                    lambda done: notify(done, num_runs, "local search"),
                )
            used += len(path) - 1
    search = bench.divergence([strategy], "search")[0]
    heldout = bench.divergence([strategy])[0]
    return {
        "strategy": strategy.describe(),
        "flops_ratio": bench.profile("dop_split").problem().cost_model.ratio(strategy),
        "num_validation_runs": used,
        "kl_search": float(search.mean()),
        "kl_search_ci95": mean_ci95(search, bench.config.seed),
        "kl_heldout": float(heldout.mean()),
        "kl_heldout_median": float(np.median(heldout)),
        "kl_ci95": mean_ci95(heldout, bench.config.seed),
        "best_so_far": [float(f"{value:.4g}") for value in path],
    }, heldout


def local_search(
    problem: Problem,
    start: Strategy,
    budget: float,
    moves: Callable[[Runs], Iterator[Runs]],
    num_runs: int,
    seed: int = 0,
    on_run: Callable[[int], None] = lambda done: None,
) -> tuple[Strategy, list[float]]:
    """First improvement on exact KL from a strategy with one group of tokens, in random order.

    Returns:
        The best strategy, and the least mean KL in nats at the start and after each run: at most ``num_runs``, fewer
        where no move is left that was not measured.
    """
    rng = np.random.default_rng(seed)
    store = problem.need_store("local search")
    best, runs = start, start.to_array()[0]
    path = [float(store.evaluate([start])[0].mean())]
    seen = {start.key()}

    def neighbours() -> Iterator[Runs]:
        single = list(moves(runs))
        yield from (single[index] for index in rng.permutation(len(single)))
        for _ in range(MAX_PAIRS):
            double = list(moves(single[int(rng.integers(len(single)))]))
            yield double[int(rng.integers(len(double)))]

    improved = True
    while improved:
        improved = False
        for candidate in neighbours():
            if len(path) > num_runs:
                return best, path
            strategy = _fill(problem, candidate, budget)
            if strategy is None or strategy.key() in seen:
                continue
            seen.add(strategy.key())
            value = float(store.evaluate([strategy])[0].mean())
            improved = value < path[-1]
            path.append(min(value, path[-1]))
            on_run(len(path) - 1)
            if improved:
                best, runs = strategy, candidate
                break
    return best, path


def _fill(problem: Problem, runs: Runs, budget: float) -> Strategy | None:
    """These layers with as many visual tokens as the budget allows; ``None`` if it allows none, or nothing runs."""
    full = problem.space.tokens.full
    fields = problem.space.strategy_fields

    def entered(count: int) -> Strategy:
        tokens = None if count == full else count
        return Strategy.from_array(runs[None], num_visual_tokens=tokens, **fields).canonical()

    low, high = 0, full + 1  # `low` tokens fit, `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        fits = problem.cost_model.ratio(entered(middle)) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return entered(low) if low and runs.any() else None


def _differences(bench: Workbench, results: ResultFile, reference: str = "exit") -> list[Row]:
    """Per budget and kind: search-set and held-out KL above that of ``exit``, the latter paired over samples, with
    p-values by sign flips that are adjusted by Holm over all of them."""
    found: list[Row] = []
    for budget, name in itertools.product(bench.budgets, get_args(Freedom)):
        key, base = ({"kind": "search", "name": item, "budget": budget} for item in (name, reference))
        mine, theirs = results.per_sample(key), results.per_sample(base)
        row, other = results.find(key), results.find(base)
        if name != reference and mine is not None and theirs is not None and row is not None and other is not None:
            found.append(
                {
                    "name": name,
                    "budget": budget,
                    "kl_search": row["kl_search"] - other["kl_search"],
                    "kl_heldout": float((mine - theirs).mean()),
                    "kl_heldout_ci95": mean_ci95(mine - theirs, bench.config.seed),
                    "kl_heldout_p": sign_flip_p(mine - theirs),
                }
            )
    for row, p in zip(found, holm([row["kl_heldout_p"] for row in found]), strict=True):
        row["kl_heldout_p"] = p
    return found


# -- figures ---------------------------------------------------------------------------------------


TITLES = {
    "single": ("Left out in one layer", "layer"),
    "from_end": ("Left out from a layer to the end", "first layer left out"),
    "from_start": ("Left out up to a layer", "last layer left out"),
}
FLOOR_NATS = 1e-5


def _draw_ablation(result: Result) -> Figure:
    with styled():
        figure = Figure(figsize=(9.6, 3.3), layout="constrained")
        axes = figure.subplots(1, 3, sharey=True)
        for axis, (kind, (title, label)) in zip(axes, TITLES.items(), strict=True):
            its = [row for row in result["rows"] if row["kind"] == kind and "layers" in row]
            for look, row in zip(LOOKS, its, strict=False):
                alive = [layer for layer in row["layers"] if layer not in row["dead"]]
                mean = [max(row["kl_search"][layer], FLOOR_NATS) for layer in alive]
                low, high = (
                    [max(row["kl_search_ci95"][layer][side], FLOOR_NATS) for layer in alive] for side in (0, 1)
                )
                axis.plot(alive, mean, color=look.color, marker=look.marker, linestyle=look.line, label=row["name"])
                axis.fill_between(alive, low, high, color=look.color, alpha=0.13, linewidth=0)
            axis.set(yscale="log", xlabel=label)
            axis.set_title(title)
        axes[0].set_ylabel(f"KL, search set (nats, 95 %), at least {FLOOR_NATS:g}")
        if any(row["kind"] == "single" for row in result["rows"]):
            axes[0].legend()
    return figure


def _draw_layer_sets(result: Result) -> Figure:
    rows = {(row["name"], row["budget"]): row for row in result["rows"] if row["kind"] == "search"}
    budgets = sorted({budget for _, budget in rows}, reverse=True)
    with styled():
        figure = Figure(figsize=(3.2 * len(budgets), 3.4), layout="constrained")
        axes = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
        for axis, budget in zip(axes, budgets, strict=True):
            names = [name for name in get_args(Freedom) if "kl_search" in rows.get((name, budget), {})]
            for shift, field, interval, color, marker, label in (
                (-0.1, "kl_search", "kl_search_ci95", FOUND, "o", "search set"),
                (0.1, "kl_heldout", "kl_ci95", UNIFORM, "s", "held-out"),
            ):
                its = [rows[name, budget] for name in names]
                places = np.arange(len(names)) + shift
                low, high = ([max(row[interval][side], FLOOR_NATS) for row in its] for side in (0, 1))
                axis.vlines(places, low, high, color=color)
                axis.plot(places, [max(row[field], FLOOR_NATS) for row in its], marker, color=color, label=label)
            runs = [rows[name, budget]["num_validation_runs"] for name in names]
            axis.set_xticks(range(len(names)), [f"{name}\n{count}" for name, count in zip(names, runs, strict=True)])
            axis.set(yscale="log", xlabel="freedom, validation runs")
            axis.set_title(f"{budget:g} of the FLOPs")
        axes[0].set_ylabel("KL (nats, 95 %)")
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure
