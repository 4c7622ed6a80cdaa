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

from dop_search.app.results import ResultFile, Row
from dop_search.app.workbench import Workbench
from dop_search.models.loading import load
from dop_search.search import Problem, rerank_all
from dop_search.search.solution import uniform_assignment
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget
from dop_search.utils.errors import BudgetError, ConfigError
from dop_search.utils.statistics import bootstrap_ci95

TARGET, UNIFORM = "target", "uniform"
"""Sources of the rows that the others are compared with: the search on the target itself, and uniform reduction."""


def transfer(
    bench: Workbench,
    results: ResultFile,
    models: Sequence[str] = (),
    seeds: Sequence[int] = (),
    num_candidates: int = 16,
) -> None:
    """Search at every source, move and measure; see the module.

    Args:
        bench: the model and its samples.
        results: where the rows go.
        models: other models of the same selector; each is a source and a target.
        seeds: of other search samples, for the configured model.
        num_candidates: how many are re-ranked by exact KL in each search.
    """
    own = bench.loaded.name
    if own in models:
        raise ConfigError(f"study.options.models names the configured model {own!r}; name others, or []")
    if bench.config.data.seed in seeds:
        raise ConfigError(f"study.options.seeds has the configured data.seed ({bench.config.data.seed}); name others")
    benches = {own: bench}
    found: dict[tuple[str, int, float], Strategy] = {}

    def at(model: str) -> Workbench:
        if model not in benches:
            config = bench.config.model_copy(
                update={"model": bench.config.model.model_copy(update={"name_or_path": model})}
            )
            benches[model] = Workbench(config, load(**config.model.model_dump()), bench.progress)
        return benches[model]

    def search(model: str, seed: int, budget: float) -> Strategy:
        key = (model, seed, budget)
        if key not in found:
            limit = Budget(flops_ratio=budget)
            problem = at(model).profile(seed=seed).problem(limit)
            with bench.watch(f"{model}, seed {seed}: ") as notify:
                found[key] = rerank_all(problem, limit, num_candidates, on_progress=notify)[0].strategy
        return found[key]

    def row(target: str, budget: float, axis: str, source: str) -> tuple[Row, np.ndarray]:
        here, seed = at(target), bench.config.data.seed
        problem = here.profile(seed=seed).problem(Budget(flops_ratio=budget))
        if axis == TARGET:
            strategy = search(target, seed, budget)
        elif axis == UNIFORM:
            strategy = uniform(problem, budget)
        else:
            place: dict[str, Any] = {"model": target, "seed": seed, "budget": budget} | {axis: _like(axis, source)}
            strategy = moved(search(**place), problem, budget)
        heldout = here.divergence([strategy], "heldout")[0]
        values = {
            "flops_ratio": problem.cost_model.ratio(strategy),
            "kl_search": float(here.divergence([strategy], "search", seed=seed)[0].mean()),
            "kl_heldout": float(heldout.mean()),
            "kl_ci95": bootstrap_ci95(heldout, bench.config.seed),
            "kl_median": float(np.median(heldout)),
            "strategy": strategy.describe(),
        }
        return values, heldout

    for seed in seeds:
        bench.check_other_seed(seed)
    keys = _keys(own, models, seeds, bench.budgets)
    with bench.watch() as notify:
        results.measure(keys, row, notify, "strategies at their targets", group="target")
    results.sort(keys)
    results.summarize(summarize(results))


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


def uniform(problem: Problem, budget: float) -> Strategy:
    """The most visual tokens that fit, every layer run in full.

    Raises:
        BudgetError: if not even one does.
    """
    assignment = uniform_assignment(problem, Budget(flops_ratio=budget))
    if assignment is None:
        raise BudgetError(f"not even one visual token that runs every layer fits into {budget:g} of the FLOPs")
    return problem.space.strategy(assignment)


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
    """Per row that moved: paired 95 % intervals of its held-out KL minus the target's own, and minus uniform's."""
    moves = []
    for row in results.rows:
        if row["axis"] in (TARGET, UNIFORM) or "kl_heldout" not in row:
            continue
        its = _samples(results, row)
        differences = {}
        for axis in (TARGET, UNIFORM):
            other = _samples(results, {**row, "axis": axis, "source": ""})
            if its is not None and other is not None:
                differences[f"to_{axis}_ci95"] = bootstrap_ci95(its - other)
        moves.append({name: row[name] for name in ("target", "budget", "axis", "source")} | differences)
    return {"moves": moves}


def _samples(results: ResultFile, row: Mapping[str, Any]) -> np.ndarray | None:
    return results.per_sample({name: row[name] for name in ("target", "budget", "axis", "source")})
