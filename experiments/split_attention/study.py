"""Queries and keys/values with one exit depth or two, and token groups by rank: what each freedom gains.

Every variant is searched in the same way: divergence curves, the 16 best by their sum and uniform reduction by exact
KL. ``kl_heldout_additive`` is the held-out KL of the sum's own optimum, which no exact KL has chosen.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import PositiveInt, field_validator

from dop_search.app.config.section import Listed
from dop_search.app.report.style import FAINT, LOOKS, SMALLEST_KL, styled
from dop_search.app.results import ResultFile, Row
from dop_search.app.study import Measured, Result, Study
from dop_search.app.workbench import Workbench
from dop_search.divergence.profiling import MeasuredProfile
from dop_search.search import rerank_all
from dop_search.strategy.cost import Budget
from dop_search.utils.intervals import mean_ci95

SHARES = ((1.0,), (0.25, 0.75), (0.2, 0.3, 0.5))


class SplitAttention(Study):
    """Search every variant at every budget and compare them in pairs on the same samples."""

    question = "What does it gain to give queries and keys/values an exit depth each, and to group tokens by rank?"
    rows = "tied and split attention"
    group = ("groups",)
    adds_rows = frozenset({"shares"})

    shares: Listed[Listed[float]] = SHARES
    """Of the kept tokens per group, one entry per number of groups."""
    num_candidates: PositiveInt = 16
    """Of the sum that exact KL chooses among."""

    @field_validator("shares")
    @classmethod
    def _differ_in_groups(cls, value: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
        if not value or len({len(item) for item in value}) < len(value):
            raise ValueError(f"needs entries with different numbers of groups, but got {[list(v) for v in value]}")
        return value

    def keys(self, bench: Workbench) -> list[dict[str, Any]]:
        """See base class."""
        return [
            {"groups": groups, "split": split, "budget": budget}
            for groups, split, budget in itertools.product(map(len, self.shares), (False, True), bench.budgets)
        ]

    def row(self, bench: Workbench, groups: int, split: bool, budget: float) -> Measured:
        """See base class."""
        shares = next(item for item in self.shares if len(item) == groups)
        return _search(bench, _profile(bench, shares, split), Budget(flops_ratio=budget), self.num_candidates)

    def summarize(self, bench: Workbench, results: ResultFile) -> dict[str, Any]:
        """See base class."""
        return _differences(bench, results, [len(item) for item in self.shares])

    @staticmethod
    def figures(result: Result) -> dict[str, Figure]:
        """``split_attention``: KL on search and held-out samples; the gain of splitting with its interval."""
        groups = sorted({row["groups"] for row in result["rows"]})
        with styled():
            figure = Figure(figsize=(9.6, 3.6), layout="constrained")
            search, heldout, gain = figure.subplots(1, 3)
            for index, count in enumerate(groups):
                for split in (False, True):
                    look = LOOKS[index]
                    its = [row for row in result["rows"] if row["groups"] == count and row["split"] == split]
                    for axis, field in ((search, "kl_search"), (heldout, "kl_heldout")):
                        points = sorted((row["budget"], max(row[field], SMALLEST_KL)) for row in its if field in row)
                        if points:
                            name = f"{count} group{'s' if count > 1 else ''}, {'q and kv apart' if split else 'q = kv'}"
                            axis.plot(
                                *zip(*points, strict=True),
                                color=look.color,
                                marker=look.marker,
                                linestyle="-" if split else ":",
                                markerfacecolor=look.color if split else "white",
                                label=name,
                            )
            search.set_title("On the search set")
            heldout.set_title("On held-out samples")
            for axis in (search, heldout):
                axis.set(yscale="log", xlabel="budget, share of the FLOPs", ylabel="KL of the found strategy (nats)")
            _gain(gain, result, groups)
            handles, labels = search.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=3)
        return {"split_attention": figure}


def _profile(bench: Workbench, shares: tuple[float, ...], split: bool) -> MeasuredProfile:
    if len(shares) == 1:
        return bench.profile("dop_split" if split else "dop")
    return bench.profile("dop_groups", shares=shares, split=split)


def _search(bench: Workbench, profile: MeasuredProfile, budget: Budget, num_candidates: int) -> tuple[Row, np.ndarray]:
    problem = profile.problem(budget)
    with bench.watch(f"{profile.space.name} at {budget.value:g}: ") as notify:
        ranked = rerank_all(problem, budget, num_candidates, on_progress=notify)
    best = ranked[0]
    optimum = min(ranked, key=lambda solution: solution.kl_additive or 0.0)
    heldout, untouched = bench.divergence([best.strategy, optimum.strategy])
    return {
        "strategy": best.strategy.describe(),
        "flops_ratio": best.cost_ratio,
        "num_parameters": len(problem.space.parameters),
        "num_validation_runs": profile.curves.num_validation_runs + best.num_validation_runs,
        "kl_search": best.kl_search,
        "kl_heldout": float(heldout.mean()),
        "kl_heldout_median": float(np.median(heldout)),
        "kl_ci95": mean_ci95(heldout, bench.config.seed),
        "kl_heldout_additive": float(untouched.mean()),
    }, heldout


def _differences(bench: Workbench, results: ResultFile, groups: Sequence[int]) -> dict[str, Any]:
    """Held-out KL between pairs of variants with paired intervals; below 0 the freer one is better."""

    def between(tied: dict[str, Any], free: dict[str, Any]) -> Row | None:
        a, b = results.per_sample(tied), results.per_sample(free)
        if a is None or b is None:
            return None
        return {"difference": float((b - a).mean()), "ci95": mean_ci95(b - a, bench.config.seed)}

    found: dict[str, list[Row]] = {"split_minus_tied": [], "groups_minus_one": []}
    for count, budget in itertools.product(groups, bench.budgets):
        tied, free = ({"groups": count, "split": split, "budget": budget} for split in (False, True))
        if (values := between(tied, free)) is not None:
            found["split_minus_tied"].append({"groups": count, "budget": budget, **values})
    for count, split, budget in itertools.product(groups[1:], (False, True), bench.budgets):
        one, more = ({"groups": number, "split": split, "budget": budget} for number in (groups[0], count))
        if (values := between(one, more)) is not None:
            found["groups_minus_one"].append({"groups": count, "split": split, "budget": budget, **values})
    return found


# -- figures ---------------------------------------------------------------------------------------


def _gain(axis: Axes, result: Result, groups: list[int]) -> None:
    budgets = sorted({row["budget"] for row in result["rows"]})
    for index, count in enumerate(groups):
        its = [item for item in result["summary"]["split_minus_tied"] if item["groups"] == count and item["ci95"]]
        if its:
            places = [budgets.index(item["budget"]) + 0.2 * (index - (len(groups) - 1) / 2) for item in its]
            middle = [item["difference"] for item in its]
            low, high = ([item["ci95"][side] for item in its] for side in (0, 1))
            look = LOOKS[index]
            axis.vlines(places, low, high, color=look.color)
            axis.plot(places, middle, look.marker, color=look.color)
    axis.axhline(0.0, color=FAINT, linewidth=0.9)
    axis.set_yscale("symlog", linthresh=0.01)
    axis.set_xticks(range(len(budgets)), [f"{budget:g}" for budget in budgets])
    axis.set(xlabel="budget, share of the FLOPs", ylabel="held-out KL, apart minus tied (nats)")
    axis.set_title("What splitting changes (95 %)")
