"""Selector × operations: each selector with uniform reduction and with searched operations, at the same FLOPs.

Two ways to spend a budget better than by dropping tokens at random: choose the tokens better (the selector), or skip
operations of the tokens that stay. This study crosses the two and says what either adds alone and what both add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dop_search.app.results import ResultFile, Row
from dop_search.app.workbench import Workbench
from dop_search.baselines import FitContext, baseline
from dop_search.selectors import SELECTORS
from dop_search.studies.compare import SPACES, search_space
from dop_search.utils.errors import ConfigError
from dop_search.utils.statistics import bootstrap_ci95, spearman

OPERATIONS = ("uniform", "found")
MOVED_NATS = 1e-2
"""A sample with a larger divergence counts as moved."""


def selectors(
    bench: Workbench,
    results: ResultFile,
    names: Sequence[str] = (),
    space: str = "dop_split",
    num_candidates: int = 16,
) -> None:
    """Fit, search and measure; see the module.

    Args:
        bench: the model and its samples.
        results: where the rows go.
        names: selectors; none: all. One that the model cannot run gets its reason instead of numbers.
        space: what is searched.
        num_candidates: how many are re-ranked by exact KL at each budget.
    """
    chosen = list(names) or sorted(SELECTORS)
    unknown = [name for name in chosen if name not in SELECTORS]
    if unknown:
        raise ConfigError(f"unknown selector {unknown[0]!r}; study.options.names takes {', '.join(sorted(SELECTORS))}")
    if space not in SPACES:
        raise ConfigError(f"study.options.space must be one of {', '.join(SPACES)}, but got {space!r}")
    keys = [
        {"selector": name, "budget": budget, "operations": operations}
        for name in chosen
        for budget in bench.budgets
        for operations in OPERATIONS
    ]
    contexts: dict[str, FitContext] = {}

    def row(selector: str, budget: float, operations: str) -> tuple[Row, np.ndarray]:
        if selector not in contexts:
            contexts[selector] = bench.context(selector)
        context = contexts[selector]
        if operations == "uniform":
            fitted = baseline(selector).fit(context, budget)
        else:
            fitted = search_space(bench, context, selector, space, selector, budget, num_candidates)
        assert fitted.strategy is not None
        heldout = bench.divergence([fitted.strategy], "heldout", what=f"{selector} at {budget:g}, held out")[0]
        return {
            "flops_ratio": fitted.flops_ratio,
            "kl_search": float(bench.divergence([fitted.strategy], "search")[0].mean()),
            "kl_heldout": float(heldout.mean()),
            "kl_ci95": bootstrap_ci95(heldout, bench.config.seed),
            "kl_median": float(np.median(heldout)),
            "share_moved": float((heldout > MOVED_NATS).mean()),
            "strategy": fitted.strategy.describe(),
        }, heldout

    with bench.watch() as notify:
        results.measure(keys, row, notify, "selectors with and without skipped operations", group="selector")
    results.sort(keys)
    results.summarize(summarize(results, results.budgets, bench.config.selector.name))


def summarize(results: ResultFile, budgets: Sequence[float], reference: str) -> dict[str, Any]:
    """What the selector and what the operations gain, per budget.

    ``differences``: per selector the paired 95 % interval of KL(found) − KL(uniform), held out. ``steps``: held-out KL
    of the ``reference`` selector with uniform reduction, after exchanging the operations alone, the selector alone
    (for the best by KL on the search samples), and both, with paired intervals against the start. ``shares``: of
    the variance of log10 KL over the table, by selector, operations and their interaction. ``spearman``: between
    selectors' KL with uniform reduction and with found operations.
    """
    return {f"{budget:g}": _at(results, budget, reference) for budget in budgets}


def _at(results: ResultFile, budget: float, reference: str) -> dict[str, Any]:
    rows: dict[tuple[str, str], Mapping[str, Any]] = {
        (row["selector"], row["operations"]): row
        for row in results.rows
        if row["budget"] == budget and "kl_heldout" in row
    }
    names = [name for name, operations in rows if operations == "uniform" and (name, "found") in rows]

    def samples(name: str, operations: str) -> np.ndarray:
        values = results.per_sample({"selector": name, "budget": budget, "operations": operations})
        assert values is not None
        return values

    found: dict[str, Any] = {"differences": {}}
    for name in names:
        found["differences"][name] = bootstrap_ci95(samples(name, "found") - samples(name, "uniform"))
    if reference in names:
        start = samples(reference, "uniform")
        best = {kind: min(names, key=lambda name: rows[name, kind]["kl_search"]) for kind in OPERATIONS}
        found["steps"] = {
            step: {
                "selector": name,
                "kl_heldout": rows[name, kind]["kl_heldout"],
                "difference_ci95": bootstrap_ci95(samples(name, kind) - start),
            }
            for step, name, kind in (
                ("start", reference, "uniform"),
                ("operations", reference, "found"),
                ("selector", best["uniform"], "uniform"),
                ("both", best["found"], "found"),
            )
        }
    if len(names) > 1:
        table = np.array([[rows[name, kind]["kl_heldout"] for kind in OPERATIONS] for name in names])
        found["shares"] = variance_shares(np.log10(np.maximum(table, 1e-6)))
        found["spearman"] = spearman(table[:, 0].tolist(), table[:, 1].tolist())
    return found


def variance_shares(table: np.ndarray) -> dict[str, float]:
    """Two-way analysis of variance without replication of ``table`` ``[selectors, operations]``: shares of its sum of
    squares that add up to 1."""
    centred = table - table.mean()
    rows, columns = centred.mean(axis=1), centred.mean(axis=0)
    total = float((centred**2).sum())
    parts = {
        "selector": float((rows**2).sum() * table.shape[1]),
        "operations": float((columns**2).sum() * table.shape[0]),
        "interaction": float(((centred - rows[:, None] - columns) ** 2).sum()),
    }
    return {name: part / total if total else 0.0 for name, part in parts.items()}
