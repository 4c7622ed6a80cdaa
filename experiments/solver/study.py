"""Solvers at one budget: quality against validation runs and seconds.

Each row measures everything itself, from a store that remembers nothing of the others: the divergence curves, where the
solver knows them, then its own runs. Rows named after an Optuna sampler search by exact KL; they start from uniform
reduction, and those with ``+warm`` also from the 16 best strategies by the sum of curves. All of them use the curves:
a trial above the budget is told the sum instead of being measured. ``random`` is Optuna's random sampler.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import Field, PositiveInt, PrivateAttr, field_validator

from dop_search.app.config import SearchConfig
from dop_search.app.config.section import Listed
from dop_search.app.report.style import FOUND, LOOKS, SMALLEST_KL, UNIFORM, Look, plain_decades, styled
from dop_search.app.results import ResultFile, Row
from dop_search.app.study import Measured, Result, Study
from dop_search.app.workbench import Workbench, flops_ratios
from dop_search.baselines import BASELINES
from dop_search.divergence import DivergenceEngine
from dop_search.divergence.profiling import SAVE_EVERY
from dop_search.evaluation.timing.timing import Clock, now_ms
from dop_search.search import CurveGrid, Curves, EvaluationStore, Problem, additive_exact, exact_optuna, rerank_all
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget, CostModel
from dop_search.utils.errors import ConfigError
from dop_search.utils.intervals import mean_ci95
from dop_search.utils.registry import unknown

SAMPLERS = ("tpe", "gp", "cmaes", "nsga2", "random")
DETERMINISTIC = ("additive_exact", "rerank", "gsop")
SOLVERS = (*DETERMINISTIC, *(f"{name}{warm}" for name, warm in itertools.product(SAMPLERS, ("", "+warm"))))
NUM_WARM_START = 16


class Solver(Study):
    """Solve the (single) budget with every solver and compare on new samples; see the module."""

    question = "What does each solver reach at one budget, for how many validation runs and seconds?"
    rows = "solvers"
    adds_rows = frozenset({"seeds", "solvers"})

    solvers: Listed[str] = SOLVERS
    """Names."""
    num_trials: PositiveInt = 60
    """Of each Optuna search, those above the budget and the warm start included."""
    seeds: Annotated[Listed[int], Field(min_length=1)] = (0, 1)
    """Of each Optuna search; the other solvers have none."""

    _engines: list[DivergenceEngine] = PrivateAttr(default_factory=list)

    @field_validator("solvers")
    @classmethod
    def _are_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in SOLVERS:
                raise ValueError(unknown("solver", name, SOLVERS))
        return value

    def check(self, config: SearchConfig) -> None:
        """See base class."""
        budgets = flops_ratios(config)
        if len(budgets) != 1:
            raise ConfigError(f"study 'solver' compares at one budget, but got {budgets}; set one, as in budget=0.2")

    def settings(self, config: SearchConfig) -> dict[str, Any]:
        """See base class; the budget is in no key."""
        return {**super().settings(config), "budget": flops_ratios(config)}

    def keys(self, bench: Workbench) -> list[dict[str, Any]]:
        """See base class."""
        return [
            {"name": name, "seed": seed}
            for name in self.solvers
            for seed in (self.seeds[:1] if name in DETERMINISTIC else self.seeds)
        ]

    def row(self, bench: Workbench, name: str, seed: int) -> Measured:
        """See base class."""
        if not self._engines:
            config = bench.config
            self._engines.append(
                DivergenceEngine(
                    bench.loaded.adapter,
                    bench.teacher("search"),
                    averaging=config.data.averaging,
                    memory=config.memory,
                )
            )
        budget = Budget(flops_ratio=bench.budgets[0])
        return _solve(bench, self._engines[0], name, budget, self.num_trials, seed)

    def summarize(self, bench: Workbench, results: ResultFile) -> dict[str, Any]:
        """See base class."""
        return {"budget": bench.budgets[0], "differences": _differences(bench, results, self.keys(bench))}

    @staticmethod
    def figures(result: Result) -> dict[str, Figure]:
        """``solver``: progress, and the end with runs and seconds."""
        rows = [row for row in result["rows"] if "kl_search" in row]
        with styled():
            figure = Figure(figsize=(9.6, 4.4), layout="constrained")
            progress, end = figure.subplots(1, 2, width_ratios=(1.0, 1.1))
            looks: dict[str, Look] = dict(zip(DRAWN, LOOKS, strict=True))
            for name, look in looks.items():
                for number, row in enumerate(row for row in rows if row["name"] == name and row["best_so_far"]):
                    runs, values = zip(*row["best_so_far"], strict=True)
                    progress.step(
                        [*runs, row["num_validation_runs"]],
                        np.maximum([*values, values[-1]], SMALLEST_KL),
                        where="post",
                        color=look.color,
                        linestyle=look.line,
                        label=None if number else name,
                    )
            progress.set(
                yscale="log", xlabel="validation runs, curves included", ylabel="least KL so far, search set (nats)"
            )
            progress.set_title(f"Progress at {result['summary']['budget']:g} of the FLOPs")
            progress.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)
            _end(end, rows)
        return {"solver": figure}


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
        strategy = BASELINES["gsop"].fit(context, budget.value).needs_strategy()
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
        "kl_ci95": mean_ci95(heldout, bench.config.seed),
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
            ci95 = mean_ci95(mine - base, bench.config.seed)
            found.append({**key, "kl_heldout": float((mine - base).mean()), "kl_heldout_ci95": ci95})
    return found


# -- figures ---------------------------------------------------------------------------------------


DRAWN = ("rerank", "tpe+warm", "gp+warm", "tpe", "gp", "random")
"""Solvers with a line; all others have a row in the right panel."""


def _end(axis: Axes, rows: list[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(row["name"] for row in rows))[::-1]
    for shift, field, color, marker, label in (
        (0.14, "kl_search", FOUND, "o", "search set"),
        (-0.14, "kl_heldout", UNIFORM, "s", "held-out"),
    ):
        its = [(max(row[field], SMALLEST_KL), names.index(row["name"]) + shift) for row in rows]
        axis.plot(*zip(*its, strict=True), marker, color=color, label=label)
    labels = []
    for name in names:
        of_name = [row for row in rows if row["name"] == name]
        runs, seconds = (np.mean([row[field] for row in of_name]) for field in ("num_validation_runs", "seconds"))
        labels.append(f"{name}: {runs:.0f} runs, {seconds:.0f} s")
    axis.set_yticks(range(len(names)), labels)
    axis.set(xscale="log", xlabel="KL of what was found (nats), one mark per seed")
    plain_decades(axis.xaxis)
    axis.set_title("The end")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
