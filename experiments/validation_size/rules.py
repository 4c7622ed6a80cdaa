"""Rules that choose among the surrogate's best candidates, on which the three studies of search samples agree.

* ``additive``: the optimum of the sum of curves;
* ``rerank``: the least mean KL on the search samples;
* ``one_se``: the least additive estimate among the candidates whose KL is within one standard error of that
  (the paired difference's, over the search samples);
* ``root``: the least mean square root of KL, which a few samples with a large KL cannot decide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dop_search.app.results import ResultFile, Row
from dop_search.app.study import Result
from dop_search.app.workbench import Workbench
from dop_search.divergence.profiling import MeasuredProfile
from dop_search.search import EvaluationStore
from dop_search.search.rerank import rerank_all
from dop_search.search.solution import MeasuredSolution
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget
from dop_search.utils.intervals import holm
from experiments.validation_size.crossed import crossed

RULES = ("additive", "rerank", "one_se", "root")
RULE_NAMES = {
    "additive": "additive optimum",
    "rerank": "least KL (re-ranked)",
    "one_se": "within one standard error",
    "root": "least mean of √KL",
}


def choose(solutions: Sequence[MeasuredSolution]) -> dict[str, MeasuredSolution]:
    """What each of the rules takes of candidates that were evaluated on the same samples."""
    values = np.stack([solution.per_sample_nats for solution in solutions])
    excess = values - values[values.mean(axis=1).argmin()]
    error = excess.std(axis=1, ddof=1) / np.sqrt(values.shape[1])
    alike = [s for s, mean, se in zip(solutions, excess.mean(axis=1), error, strict=True) if mean <= se]
    return {
        "additive": min(solutions, key=_estimate),
        "rerank": solutions[int(values.mean(axis=1).argmin())],
        "one_se": min(alike, key=_estimate),
        "root": solutions[int(np.sqrt(values).mean(axis=1).argmin())],
    }


def on_samples(whole: MeasuredProfile, indices: Sequence[int] | np.ndarray) -> MeasuredProfile:
    """The profile of a search that sees these samples of a larger one (some twice, in a bootstrap).

    Curves are weighed anew from what was measured per sample; exact evaluations go to the larger profile's store.
    Prices stay those of all samples, so that a budget means the same whatever the search sees.
    """
    chosen, store = np.asarray(indices), whole.store

    def evaluate(strategies: Sequence[Strategy], some: Sequence[int] | None = None) -> np.ndarray:
        wanted, place = np.unique(chosen if some is None else chosen[list(some)], return_inverse=True)
        return store.evaluate(strategies, wanted.tolist())[:, place]

    curves = {
        name: replace(curve, per_sample_nats=curve.per_sample_nats[:, chosen])
        for name, curve in whole.curves.curves.items()
    }
    return replace(whole, curves=replace(whole.curves, curves=curves), store=EvaluationStore(evaluate, len(chosen)))


# -- one row ---------------------------------------------------------------------------------------


def search_each(bench: Workbench, profiles: Sequence[MeasuredProfile], budget: float) -> tuple[Row, np.ndarray]:
    """Search on each profile; mean KL over the searches by rule, and what each rule gains over ``additive``.

    Returns:
        The row's values, and the mean difference to ``additive`` per held-out sample, rule after rule.
    """
    limit = Budget(flops_ratio=budget)
    with bench.watch(f"budget {budget:g}: ") as notify:
        picked = [choose(rerank_all(item.problem(limit), limit, on_progress=notify)) for item in profiles]
    wanted = {choice[rule].strategy.key(): choice[rule].strategy for choice in picked for rule in RULES}
    held = dict(zip(wanted, bench.divergence(list(wanted.values())), strict=True))
    kl = {rule: np.stack([held[choice[rule].strategy.key()] for choice in picked]) for rule in RULES}
    difference = {rule: kl[rule] - kl["additive"] for rule in RULES[1:]}
    values: Row = {"num_draws": len(profiles)}
    values["kl_search"] = {r: float(np.mean([c[r].kl_search for c in picked])) for r in RULES}
    values["kl_heldout"] = {rule: float(kl[rule].mean()) for rule in RULES}
    values["kl_heldout_draws"] = {rule: kl[rule].mean(axis=1) for rule in RULES}
    tested = {rule: crossed(item) for rule, item in difference.items()}
    values["difference_ci95"] = {rule: item.ci95 for rule, item in tested.items()}
    values["difference_p"] = {rule: item.p for rule, item in tested.items()}
    values["strategies"] = {
        rule: dict(Counter(choice[rule].strategy.describe() for choice in picked).most_common()) for rule in RULES
    }
    return values, np.concatenate([item.mean(axis=0) for item in difference.values()])


# -- all rows --------------------------------------------------------------------------------------


def compare_rules(results: ResultFile, keys: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per budget, over all its rows: mean held-out KL by rule and the 95 % interval of the difference to ``additive``.

    The interval is over rows and held-out samples; draws within a row are averaged first. p-values are adjusted by Holm
    over budgets and rules. ``rows_below_05``: the rows' own differences that are significant after Holm over all rows.
    """
    summary: dict[str, Any] = {}
    for budget in dict.fromkeys(key["budget"] for key in keys):
        its = [key for key in keys if key["budget"] == budget]
        rows = [row for row in map(results.find, its) if row is not None and "kl_heldout" in row]
        samples = [item for item in map(results.per_sample, its) if item is not None]
        if not rows or len(samples) < len(rows):
            continue
        by_rule = np.stack(samples).reshape(len(samples), len(RULES) - 1, -1)
        tested = {rule: crossed(by_rule[:, i]) for i, rule in enumerate(RULES[1:])}
        summary[f"{budget:g}"] = {
            "kl_heldout": {rule: float(np.mean([row["kl_heldout"][rule] for row in rows])) for rule in RULES},
            "difference": {rule: float(by_rule[:, i].mean()) for i, rule in enumerate(RULES[1:])},
            "difference_ci95": {rule: item.ci95 for rule, item in tested.items()},
            "difference_p": {rule: item.p for rule, item in tested.items()},
        }
    adjust([item["difference_p"] for item in summary.values()])
    measured = [{**row, "difference_p": dict(row["difference_p"])} for row in results.rows if "difference_p" in row]
    adjust([row["difference_p"] for row in measured])
    summary["rows_below_05"] = [
        {**{name: row[name] for name in keys[0]}, "rule": rule, "p": p}
        for row in measured
        for rule, p in row["difference_p"].items()
        if p < 0.05
    ]
    return summary


def adjust(tables: Sequence[dict[str, float]]) -> None:
    """Replace p-values by Holm's over all of the tables."""
    places = [(table, name) for table in tables for name in table]
    for (table, name), p in zip(places, holm([table[name] for table, name in places]), strict=True):
        table[name] = p


def _estimate(solution: MeasuredSolution) -> tuple[float, float]:
    assert solution.kl_additive is not None
    return solution.kl_additive, solution.cost_ratio


# -- figures ---------------------------------------------------------------------------------------


def measured_budgets(result: Result) -> list[float]:
    """The budgets with measured rows, in their order."""
    return list(dict.fromkeys(row["budget"] for row in result["rows"] if _is_measured(row)))


def _is_measured(row: Mapping[str, Any]) -> bool:
    return "infeasible" not in row and "failed" not in row


def measured_rows(result: Result, budget: float, by: str) -> list[Mapping[str, Any]]:
    """The measured rows of a budget (not those out of reach), ascending."""
    measured = [row for row in result["rows"] if row["budget"] == budget and _is_measured(row)]
    return sorted(measured, key=lambda row: row[by])
