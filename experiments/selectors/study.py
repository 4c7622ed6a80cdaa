"""Selector × operations: each selector with uniform reduction and with searched operations, at the same FLOPs.

Two ways to spend a budget better than by dropping tokens at random: choose the tokens better (the selector), or skip
operations of the tokens that stay. This study crosses the two and says what either adds alone and what both add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import PositiveInt, field_validator

from dop_search.app.config.section import Listed
from dop_search.app.report.style import FAINT, FOUND, UNIFORM, styled
from dop_search.app.results import ResultFile
from dop_search.app.study import Measured, Result, Study
from dop_search.app.workbench import Workbench
from dop_search.baselines.space_search import SpaceSearch
from dop_search.selectors import SELECTORS
from dop_search.utils.intervals import mean_ci95
from dop_search.utils.statistics import spearman

OPERATIONS = ("uniform", "found")
MOVED_NATS = 1e-2
"""A sample with a larger divergence counts as moved."""


class Selectors(Study):
    """Fit, search and measure; see the module."""

    question = "What does a better selector gain, what do skipped operations gain, and what do both?"
    rows = "selectors with and without skipped operations"
    group = ("selector",)
    adds_rows = frozenset({"names"})

    names: Listed[str] = ()
    """Selectors; none: all. One that the model cannot run gets its reason instead of numbers."""
    space: Literal["dop", "dop_split", "dop_groups"] = "dop_split"
    """What is searched."""
    num_candidates: PositiveInt = 16
    """How many are re-ranked by exact KL at each budget."""

    @field_validator("names")
    @classmethod
    def _are_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            SELECTORS.find(name)
        return value

    def keys(self, bench: Workbench) -> list[dict[str, Any]]:
        """See base class."""
        return [
            {"selector": name, "budget": budget, "operations": operations}
            for name in self.names or sorted(SELECTORS)
            for budget in bench.budgets
            for operations in OPERATIONS
        ]

    def row(self, bench: Workbench, selector: str, budget: float, operations: str) -> Measured:
        """See base class."""
        search = SpaceSearch(self.space, (self.space,), num_proposals=self.num_candidates)
        fitted = bench.fit(selector if operations == "uniform" else search, budget, selector)
        strategy = fitted.needs_strategy()
        heldout = bench.divergence([strategy], "heldout", what=f"{selector} at {budget:g}, held out")[0]
        return {
            "flops_ratio": fitted.flops_ratio,
            "kl_search": float(bench.divergence([strategy], "search")[0].mean()),
            "kl_heldout": float(heldout.mean()),
            "kl_ci95": mean_ci95(heldout, bench.config.seed),
            "kl_median": float(np.median(heldout)),
            "share_moved": float((heldout > MOVED_NATS).mean()),
            "strategy": strategy.describe(),
        }, heldout

    def summarize(self, bench: Workbench, results: ResultFile) -> dict[str, Any]:
        """See base class."""
        return summarize(results, results.budgets, bench.config.selector.name)

    @staticmethod
    def figures(result: Result) -> dict[str, Figure]:
        """``selectors``: held-out KL of each selector with uniform reduction and with found operations."""
        rows = [row for row in result["rows"] if "kl_heldout" in row]
        if not rows:
            return {}
        budgets = list(dict.fromkeys(row["budget"] for row in rows))
        names = _order(rows)
        with styled():
            figure = Figure(figsize=(9.6, 1.5 + 0.24 * len(names)), layout="constrained")
            axes = figure.subplots(1, len(budgets), sharex=True, sharey=True, squeeze=False)[0]
            for axis, budget in zip(axes, budgets, strict=True):
                differences = result["summary"].get(f"{budget:g}", {}).get("differences", {})
                _panel(axis, [row for row in rows if row["budget"] == budget], names, differences)
                axis.set_title(f"{budget:g} of the FLOPs")
            axes[0].set_yticks(range(len(names)), names)
            axes[0].set_ylim(len(names) - 0.5, -0.5)
            figure.supxlabel("held-out KL to the full model (nats, mean and 95 % interval)", fontsize=9)
            handles, labels = axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper center", ncols=4)
        return {"selectors": figure}


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
        found["differences"][name] = mean_ci95(samples(name, "found") - samples(name, "uniform"))
    if reference in names:
        start = samples(reference, "uniform")
        best = {kind: min(names, key=lambda name: rows[name, kind]["kl_search"]) for kind in OPERATIONS}
        found["steps"] = {
            step: {
                "selector": name,
                "kl_heldout": rows[name, kind]["kl_heldout"],
                "difference_ci95": mean_ci95(samples(name, kind) - start),
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


# -- figures ---------------------------------------------------------------------------------------


SMALLEST = 1e-5
"""Nats; what is less is drawn here."""


def _panel(axis: Axes, rows: list[Mapping[str, Any]], names: list[str], differences: Mapping[str, Any]) -> None:
    found = {(row["selector"], row["operations"]): row for row in rows}
    looks = (("uniform", UNIFORM, "s", -0.15), ("found", FOUND, "o", 0.15))
    for operations, color, marker, shift in looks:
        points = [(found[name, operations], place) for place, name in enumerate(names) if (name, operations) in found]
        x = [max(row["kl_heldout"], SMALLEST) for row, _ in points]
        y = [place + shift for _, place in points]
        for row, height in zip([row for row, _ in points], y, strict=True):
            low, high = (max(end, SMALLEST) for end in row["kl_ci95"])
            axis.plot([low, high], [height, height], color=color, linewidth=0.9, zorder=2)
        label = "uniform reduction" if operations == "uniform" else "found operations"
        axis.plot(x, y, marker, color=color, label=label, zorder=3)
    sure = [place for place, name in enumerate(names) if (ends := differences.get(name)) and ends[0] * ends[1] > 0]
    axis.plot(
        [1.0] * len(sure),
        sure,
        "*",
        color=FAINT,
        transform=axis.get_yaxis_transform(),
        clip_on=False,
        label="paired interval of the difference excludes 0",
    )
    axis.set_xscale("log")


def _order(rows: list[Mapping[str, Any]]) -> list[str]:
    """Selectors, the lowest mean of log KL with uniform reduction first."""
    product: dict[str, float] = {}
    for row in rows:
        if row["operations"] == "uniform":
            product[row["selector"]] = product.get(row["selector"], 1.0) * max(row["kl_heldout"], SMALLEST)
    return sorted(product, key=lambda name: product[name])
