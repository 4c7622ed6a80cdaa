"""Solvers at one budget: quality against validation runs and seconds.

Each row measures everything itself, from a store that remembers nothing of the others: the divergence curves, where the
solver knows them, then its own runs. Rows named after an Optuna sampler search by exact KL; they start from uniform
reduction, and those with ``+warm`` also from the 16 best strategies by the sum of curves. All of them use the curves:
a trial above the budget is told the sum instead of being measured. ``random`` is Optuna's random sampler.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dop_search.app.results import ResultFile, Row
from dop_search.app.workbench import Workbench
from dop_search.baselines import BASELINES
from dop_search.divergence import DivergenceEngine
from dop_search.divergence.profiling import SAVE_EVERY
from dop_search.evaluation.timing.timing import Clock, now_ms
from dop_search.search import CurveGrid, Curves, EvaluationStore, Problem, additive_exact, exact_optuna, rerank_all
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget, CostModel
from dop_search.utils.errors import ConfigError
from dop_search.utils.statistics import bootstrap_ci95

SAMPLERS = ("tpe", "gp", "cmaes", "nsga2", "random")
DETERMINISTIC = ("additive_exact", "rerank", "gsop")
SOLVERS = (*DETERMINISTIC, *(f"{name}{warm}" for name, warm in itertools.product(SAMPLERS, ("", "+warm"))))
NUM_WARM_START = 16


def solver(
    bench: Workbench,
    results: ResultFile,
    solvers: Sequence[str] = SOLVERS,
    num_trials: int = 60,
    seeds: Sequence[int] = (0, 1),
) -> None:
    """Solve the (single) budget with every solver and compare on new samples; see the module.

    Args:
        bench: the model and its samples.
        results: where the rows go.
        solvers: names.
        num_trials: of each Optuna search, those above the budget and the warm start included.
        seeds: of each Optuna search; the other solvers have none.
    """
    unknown = [name for name in solvers if name not in SOLVERS]
    if unknown:
        raise ConfigError(f"unknown solver {unknown[0]!r}; there are {', '.join(SOLVERS)}")
    if len(bench.budgets) != 1:
        raise ConfigError(f"study 'solver' compares at one budget, but got {bench.budgets}; set one, as in budget=0.2")
    budget = Budget(flops_ratio=bench.budgets[0])
    engines: list[DivergenceEngine] = []

    def row(name: str, seed: int) -> tuple[Row, np.ndarray]:
        if not engines:
            config = bench.config
            engines.append(
                DivergenceEngine(
                    bench.loaded.adapter,
                    bench.teacher("search"),
                    averaging=config.data.averaging,
                    memory=config.memory,
                )
            )
        return _solve(bench, engines[0], name, budget, num_trials, seed)

    keys = [
        {"name": name, "seed": seed} for name in solvers for seed in (seeds[:1] if name in DETERMINISTIC else seeds)
    ]
    with bench.watch() as notify:
        results.measure(keys, row, notify, "solvers")
    results.sort(keys)
    results.summarize({"budget": budget.value, "differences": _differences(bench, results, keys)})


class _Recorder:
    """The engine, and what it was asked: runs so far, and the least mean KL in nats among those within the budget."""

    def __init__(self, engine: DivergenceEngine, cost_model: CostModel, limit: float) -> None:
        self._engine, self._cost_model, self._limit = engine, cost_model, limit
        self.num_runs = 0
        self.best_so_far: list[tuple[int, float]] = []

    def __call__(self, strategies: Sequence[Strategy], samples: Sequence[int] | None) -> np.ndarray:
        assert samples is None, "every run is over all samples"
        values = self._engine.evaluate(strategies)
        for strategy, value in zip(strategies, values.mean(axis=1), strict=True):
            self.num_runs += 1
            if self._cost_model.ratio(strategy) <= self._limit:
                least = min([float(value), *(known for _, known in self.best_so_far[-1:])])
                self.best_so_far.append((self.num_runs, least))
        return values


def _solve(
    bench: Workbench, engine: DivergenceEngine, name: str, budget: Budget, num_trials: int, seed: int
) -> tuple[Row, np.ndarray]:
    known = bench.profile("dop_split")
    device = bench.loaded.adapter.device
    clock: Clock = "cpu" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"
    start = now_ms(device, clock)
    recorder = _Recorder(engine, known.problem(budget).cost_model, budget.value)
    store = EvaluationStore(recorder, engine.num_samples, batch_size=SAVE_EVERY)
    if name == "gsop":
        context = replace(bench.context(), evaluate=lambda its: store.evaluate(its).mean(axis=1), memo={})
        strategy = BASELINES["gsop"].fit(context, budget.value).strategy
        assert strategy is not None
    else:
        curves = Curves.measure(
            known.space, store, CurveGrid.of(bench.config.space.num_depth_levels, bench.config.space.num_token_levels)
        )
        recorder.best_so_far.clear()  # points of the curves are no answers
        problem = replace(known.problem(budget), surrogate=curves.surrogate(known.space), store=store)
        strategy = _search(problem, name, budget, num_trials, seed)
    seconds = (now_ms(device, clock) - start) / 1e3
    search, heldout = bench.divergence([strategy], "search")[0], bench.divergence([strategy])[0]
    return {
        "strategy": strategy.describe(),
        "flops_ratio": known.problem(budget).cost_model.ratio(strategy),
        "num_validation_runs": recorder.num_runs,
        "seconds": seconds,
        "clock": clock,
        "kl_search": float(search.mean()),
        "kl_heldout": float(heldout.mean()),
        "kl_heldout_median": float(np.median(heldout)),
        "kl_ci95": bootstrap_ci95(heldout, bench.config.seed),
        "best_so_far": [(runs, float(f"{value:.4g}")) for runs, value in recorder.best_so_far],
    }, heldout


def _search(problem: Problem, name: str, budget: Budget, num_trials: int, seed: int) -> Strategy:
    if name == "additive_exact":
        return additive_exact(problem, budget).strategy
    if name == "rerank":
        return rerank_all(problem, budget)[0].strategy
    sampler, _, warm = name.partition("+")
    return exact_optuna(
        problem,
        budget,
        sampler,
        num_trials=num_trials,
        seed=seed,
        pruner="none",
        num_warm_start=NUM_WARM_START if warm else 0,
    ).strategy


def _differences(bench: Workbench, results: ResultFile, keys: Sequence[dict[str, Any]]) -> list[Row]:
    """Per row: held-out KL above that of ``rerank``, paired over samples."""
    base = next((results.per_sample(key) for key in keys if key["name"] == "rerank"), None)
    found = []
    for key in keys:
        mine = results.per_sample(key)
        if base is not None and mine is not None and key["name"] != "rerank":
            ci95 = bootstrap_ci95(mine - base, bench.config.seed)
            found.append({**key, "kl_heldout": float((mine - base).mean()), "kl_heldout_ci95": ci95})
    return found
