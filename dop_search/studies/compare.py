"""Every method at the same FLOPs: held-out KL, accuracy and time, one row per method and budget.

Ours are named by their space (``dop``: the paper's, ``dop_split``, ``dop_groups``), ``SPACE@SELECTOR`` over another
selector than the configured one, and ``dop_search``: of all of these the one with the least KL on the search samples.
``uniform_search`` is the same choice among all uniform reductions, so that choosing a selector is no advantage of ours
alone. ``gsop@SELECTOR`` is GSOP over another selector. All rows use up their budget to within 1 %, ours too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dop_search.app.results import FAILED, ResultFile, Row
from dop_search.app.workbench import Workbench
from dop_search.baselines import BASELINES, FitContext, FittedMethod, baseline
from dop_search.evaluation.accuracy import relative_family_mean
from dop_search.search import rerank_all
from dop_search.selectors import SELECTORS
from dop_search.strategy.cost import Budget
from dop_search.studies.overhead import counted_over_closed_form, prefill_times
from dop_search.utils.errors import BudgetError, ConfigError
from dop_search.utils.statistics import bootstrap_ci95

SPACES = ("dop", "dop_split", "dop_groups")
CHOICES = {"dop_search": SPACES, "uniform_search": tuple(SELECTORS)}
"""Rows that are the best of others on the search samples, and the others' names (before an ``@``)."""

TIMED_SAMPLES = 4
"""Prompts of the batch whose prefill is timed."""


def compare(
    bench: Workbench,
    results: ResultFile,
    methods: Sequence[str] = (),
    num_candidates: int = 16,
    num_timing_rounds: int = 3,
) -> None:
    """Fit, measure and rank; see the module.

    Args:
        bench: the model and its samples.
        results: where the rows go.
        methods: names; none: ``dop``, ``dop_split`` and every published method.
        num_candidates: that exact KL chooses among in each of our searches.
        num_timing_rounds: paired readings of the prefill per row; 0: no times.
    """
    names = list(methods) or [*SPACES[:2], *BASELINES]
    for name in names:
        _check(name)
    keys = [{"method": name, "budget": budget} for name in names for budget in bench.budgets]
    contexts: dict[str, FitContext] = {}

    def context(selector: str) -> FitContext:
        if selector not in contexts:
            contexts[selector] = bench.context(selector or None)
        return contexts[selector]

    def row(method: str, budget: float) -> tuple[Mapping[str, Any], np.ndarray]:
        space, _, selector = method.partition("@")
        if space in SPACES:
            fitted = search_space(
                bench, context(selector), method, space, selector, budget, num_candidates, use_up=True
            )
        else:
            fitted = baseline(space).fit(context(selector), budget)
        return _measure(bench, fitted, num_timing_rounds)

    if not results.data["summary"]:
        results.summarize({"full": {"accuracy": float(bench.correct(None, "heldout").mean())}})
    with bench.watch() as notify:
        results.measure(keys, row, notify, "methods at equal FLOPs", group="method")
    every = list(dict.fromkeys([*names, *(row["method"] for row in results.rows if row["method"] not in CHOICES)]))
    _choose(results, every, results.budgets)
    results.sort([{"method": name, "budget": budget} for name in (*CHOICES, *every) for budget in results.budgets])
    results.summarize({"full": results.data["summary"]["full"], **summarize(results, results.budgets)})


def _check(name: str) -> None:
    method, _, selector = name.partition("@")
    if method not in (*SPACES, *BASELINES, *SELECTORS) or (selector and selector not in SELECTORS):
        raise ConfigError(
            f"unknown method {name!r}; there are {', '.join((*SPACES, *BASELINES))}, and any search over a selector, "
            "such as dop_split@divprune"
        )
    if selector and method not in (*SPACES, "gsop"):
        raise ConfigError(f"{method!r} has no selector to choose, but got {name!r}; it goes with {SPACES} and gsop")


# -- ours ------------------------------------------------------------------------------------------


def search_space(
    bench: Workbench,
    context: FitContext,
    name: str,
    space: str,
    selector: str,
    budget: float,
    num_candidates: int,
    use_up: bool = False,
) -> FittedMethod:
    """The strategy of a search space at a FLOPs ratio that includes what its selector computes.

    ``use_up``: the best candidate within the tolerance of the budget, where there is one, and not a cheaper one.
    """
    profile = bench.profile(space, selector or None)
    overhead = 0.0
    for _ in range(3):  # what a selection costs may depend, a little, on how many tokens are kept
        left = Budget(flops_ratio=_left(budget, overhead))
        overhead = max(overhead, context.pricing.selection_ratio(profile.solve(left)))
    limit = Budget(flops_ratio=_left(budget, overhead))
    with bench.watch(f"{name} at {budget:g}: ") as notify:
        found = rerank_all(profile.problem(limit), limit, num_candidates, on_progress=notify)
    note = context.pricing.distance_note
    equal = (item for item in found if use_up and not note(context.pricing.ratio(item.strategy), budget))
    best = next(equal, found[0])
    strategy = replace(best.strategy, model_fingerprint=None)
    ratio = context.pricing.ratio(strategy)
    facts = {
        "strategy": strategy.describe(),
        "selector": strategy.selector,
        "kl_additive": best.kl_additive,
        "num_validation_runs": profile.curves.num_validation_runs + best.num_validation_runs,
    }
    return FittedMethod(name, budget, ratio, facts, note(ratio, budget), strategy=strategy)


def _left(budget: float, overhead: float) -> float:
    if overhead >= budget:
        raise BudgetError(f"the selector alone costs {overhead:.4f} of the FLOPs, but {budget:g} is asked for")
    return budget - overhead


# -- one row ---------------------------------------------------------------------------------------


def _measure(bench: Workbench, fitted: FittedMethod, num_rounds: int) -> tuple[Row, np.ndarray]:
    outcome = bench.outcome(fitted)
    right = bench.correct_after(fitted, outcome)
    families = [sample.family for sample in bench.data("heldout").samples]
    values: Row = {
        "flops_ratio": fitted.flops_ratio,
        "counted_over_closed_form": counted_over_closed_form(bench.loaded, bench.data("heldout").samples[0], fitted),
        "kl_heldout": float(outcome.divergence.mean()),
        "kl_ci95": bootstrap_ci95(outcome.divergence, bench.config.seed),
        "same_answers": float(outcome.same_answer.mean()),
        "accuracy": float(right.mean()),
        "relative_mean": relative_family_mean(right, bench.correct(None, "heldout"), families),
    }
    if fitted.method in SELECTORS:
        values["kl_search"] = float(bench.outcome(fitted, "search").divergence.mean())
    elif fitted.method.partition("@")[0] in SPACES:  # measured while it was searched for
        assert fitted.strategy is not None
        values["kl_search"] = float(bench.divergence([fitted.strategy], "search").mean())
    if num_rounds:
        values |= prefill_times(bench.loaded, bench.data("heldout").samples[:TIMED_SAMPLES], fitted, num_rounds)
    values["hyperparameters"] = dict(fitted.hyperparameters)
    values["notes"] = list(fitted.notes)
    return values, outcome.divergence


def _choose(results: ResultFile, names: Sequence[str], budgets: Sequence[float]) -> None:
    """Add the rows that are another row, chosen by its KL on the search samples among all that were ever measured."""
    for choice, among in CHOICES.items():
        for budget in budgets:
            keys = [{"method": name, "budget": budget} for name in names if name.partition("@")[0] in among]
            rows = [row for key in keys if (row := results.find(key)) is not None and "kl_search" in row]
            if rows:
                best = min(rows, key=lambda row: row["kl_search"])
                samples = results.per_sample({"method": best["method"], "budget": budget})
                values = {name: value for name, value in best.items() if name not in ("method", "budget")}
                values["hyperparameters"] = {"chosen": best["method"], **best["hyperparameters"]}
                key = {"method": choice, "budget": budget}
                old = results.find(key)
                if old is None or old["hyperparameters"] != values["hyperparameters"]:
                    results.add(key, values, samples)


# -- all rows --------------------------------------------------------------------------------------


def summarize(results: ResultFile, budgets: Sequence[float], reference: str = "dop_search") -> dict[str, Any]:
    """Paired differences to ``reference`` and mean ranks.

    ``differences``: per budget and method the 95 % bootstrap interval of KL(method) − KL(reference) over the same
    held-out samples. ``mean_rank``: by held-out KL, over the budgets at which at least half of the methods were
    measured, of the methods measured at all of them; a method that cannot reach a budget ranks last there, one whose
    measurement failed has no rank, ties share the mean of their ranks.
    """
    differences: dict[str, dict[str, Any]] = {}
    ranks: dict[str, list[float]] = {}
    counts = {budget: sum(row["budget"] == budget for row in results.rows) for budget in budgets}
    ranked = [budget for budget in budgets if 2 * counts[budget] >= max(counts.values())]
    for budget in budgets:
        its = [row for row in results.rows if row["budget"] == budget and FAILED not in row]
        ours = results.per_sample({"method": reference, "budget": budget})
        between = {}
        for row in its:
            theirs = results.per_sample({"method": row["method"], "budget": budget})
            if ours is not None and theirs is not None and row["method"] != reference:
                between[row["method"]] = bootstrap_ci95(theirs - ours)
        differences[f"{budget:g}"] = between
        values = [row.get("kl_heldout", np.inf) for row in its]
        for row, value in zip(its, values, strict=True) if budget in ranked else ():
            below, equal = sum(v < value for v in values), sum(v == value for v in values)
            ranks.setdefault(row["method"], []).append(below + (equal + 1) / 2)
    mean_rank = {name: float(np.mean(item)) for name, item in ranks.items() if len(item) == len(ranked)}
    return {
        "reference": reference,
        "differences": differences,
        "mean_rank": dict(sorted(mean_rank.items(), key=lambda item: item[1])),
    }
