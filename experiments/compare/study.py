"""Every method at the same FLOPs: held-out KL, accuracy and time, one row per method and budget.

Ours are named by their space (``dop``: the paper's, ``dop_split``, ``dop_groups``), ``SPACE@SELECTOR`` over another
selector than the configured one, and ``dop_search``, one study over selectors and spaces. ``uniform_search`` is the
uniform reduction with the least KL on the search samples, so that choosing a selector is no advantage of ours alone.
``gsop@SELECTOR`` is GSOP over another selector. All rows use up their budget to within 1 %, ours too. What a strategy
expresses is saved, ``strategies/METHOD-BUDGET.json``, for ``dop-eval strategy=…``. On samples without annotated answers
``relative_mean`` is the share of the full model's answers that stay, token by token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import NonNegativeInt, field_validator
from rich.table import Table

from dop_search.app.config.section import Listed
from dop_search.app.report.style import FAINT, LOOKS, SMALLEST_KL, Look, styled
from dop_search.app.results import FAILED, ResultFile, Row
from dop_search.app.study import Measured, Result, Study, save_strategy
from dop_search.app.workbench import Workbench
from dop_search.baselines import BASELINES, OWN, FittedMethod, known_methods
from dop_search.utils.intervals import holm, mean_ci95, num_dominant, sign_flip_p
from experiments.compare.overhead import counted_over_closed_form, prefill_times

TIMED_SAMPLES = 4
"""Prompts of the batch whose prefill is timed."""


class Compare(Study):
    """Fit, measure and rank; see the module."""

    question = "What does every method lose at the same FLOPs?"
    rows = "methods at equal FLOPs"
    judges = "heldout"
    group = ("method",)
    adds_rows = frozenset({"methods"})

    methods: Listed[str] = ()
    """Names; none: our searches and every published method."""
    num_timing_rounds: NonNegativeInt = 3
    """Paired measurements of the prefill per row; 0: no times."""

    _are_known = field_validator("methods")(known_methods)

    @property
    def names(self) -> list[str]:
        """The methods of this run."""
        return list(self.methods) or [*OWN, *BASELINES]

    def keys(self, bench: Workbench) -> list[dict[str, Any]]:
        """See base class."""
        return [{"method": name, "budget": budget} for name in self.names for budget in bench.budgets]

    def row(self, bench: Workbench, method: str, budget: float) -> Measured:
        """See base class."""
        fitted = bench.fit(method, budget)
        save_strategy(bench.config, f"{method}-{budget:g}", fitted)
        return _measure(bench, fitted, self.num_timing_rounds)

    def measure(self, bench: Workbench, results: ResultFile) -> None:
        """See base class; summarizes all rows that were ever measured."""
        if not results.data["summary"]:
            known = bench.is_annotated("heldout")
            results.summarize({"full": {"accuracy": float(bench.correct(None, "heldout").mean())} if known else {}})
        with bench.watch() as notify:
            results.measure(self.keys(bench), partial(self.row, bench), notify, self.rows, group=self.group)
        every = list(dict.fromkeys([*self.names, *(row["method"] for row in results.rows)]))
        results.sort([{"method": name, "budget": budget} for name in every for budget in results.budgets])
        results.summarize({"full": results.data["summary"]["full"], **summarize(results, results.budgets)})

    @staticmethod
    def figures(result: Result) -> dict[str, Figure]:
        """``pareto``: held-out KL, and relative mean, over the FLOPs ratio."""
        with styled():
            figure = Figure(figsize=(9.6, 4.6), layout="constrained")
            left, right = figure.subplots(1, 2)
            _panel(left, result, "kl_heldout", "held-out KL to the full model (nats)")
            left.set_yscale("log")
            left.set_title("What a budget costs")
            _panel(right, result, "relative_mean", "accuracy (% of the full model's, mean over families)")
            right.set_title("What is left of the answers")
            handles, labels = left.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=5)
        return {"pareto": figure}

    @staticmethod
    def table(result: Result) -> Table:
        """Methods by mean rank; a column per budget: held-out KL and accuracy in per cent of the full model's."""
        budgets = list(dict.fromkeys(row["budget"] for row in result["rows"]))
        rows = {(row["method"], row["budget"]): row for row in result["rows"]}
        rank = result["summary"].get("mean_rank", {})
        made = Table(title="Held-out KL (nats), relative mean of accuracy (%), at the same FLOPs", title_justify="left")
        made.add_column("method", no_wrap=True, min_width=28)
        made.add_column("rank", justify="right")
        for budget in budgets:
            made.add_column(f"{budget:g}", justify="right")
        methods = list(dict.fromkeys([*rank, *(row["method"] for row in result["rows"])]))
        for method in methods:
            cells = [_cell(rows.get((method, budget))) for budget in budgets]
            made.add_row(method, f"{rank[method]:.1f}" if method in rank else "", *cells)
        return made


# -- one row ---------------------------------------------------------------------------------------


def _measure(bench: Workbench, fitted: FittedMethod, num_rounds: int) -> tuple[Row, np.ndarray]:
    outcome = bench.outcome(fitted)
    families = [sample.family for sample in bench.data("heldout").samples]
    values: Row = {
        "flops_ratio": fitted.flops_ratio,
        "counted_over_closed_form": counted_over_closed_form(bench.loaded, bench.data("heldout").samples[0], fitted),
        "kl_heldout": float(outcome.divergence.mean()),
        "kl_ci95": mean_ci95(outcome.divergence, bench.config.seed),
        "num_dominant": num_dominant(outcome.divergence),
        "same_answers": float(outcome.same_answer.mean()),
        "relative_mean": 100.0 * float(outcome.same_answer.mean()),
    }
    if bench.is_annotated("heldout"):
        right = bench.correct_after(fitted, outcome)
        values["accuracy"] = float(right.mean())
        values["relative_mean"] = relative_family_mean(right, bench.correct(None, "heldout"), families)
    if num_rounds:
        values |= prefill_times(bench.loaded, bench.data("heldout").samples[:TIMED_SAMPLES], fitted, num_rounds)
    values["hyperparameters"] = dict(fitted.hyperparameters)
    values["notes"] = list(fitted.notes)
    return values, outcome.divergence


# -- all rows --------------------------------------------------------------------------------------


REFERENCES = ("dop_search", "uniform_search")
"""What the others are compared with: the first that was measured."""


def summarize(results: ResultFile, budgets: Sequence[float]) -> dict[str, Any]:
    """Paired differences to a reference and mean ranks.

    ``differences``: per budget and method the mean of KL(method) − KL(reference) over the same held-out samples, its
    95 % interval, the samples that carry 90 % of it, and the p-value by sign flips, adjusted by Holm over the table.
    ``mean_rank``: by held-out KL, over the budgets at which at least half of the methods were measured, of the methods
    measured at all of them; a method that cannot reach a budget ranks last there, one whose measurement failed has no
    rank, ties share the mean of their ranks.
    """
    measured = {row["method"] for row in results.rows}
    reference = next((name for name in REFERENCES if name in measured), REFERENCES[0])
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
                between[row["method"]] = _difference(theirs - ours)
        differences[f"{budget:g}"] = between
        values = [row.get("kl_heldout", np.inf) for row in its]
        for row, value in zip(its, values, strict=True) if budget in ranked else ():
            below, equal = sum(v < value for v in values), sum(v == value for v in values)
            ranks.setdefault(row["method"], []).append(below + (equal + 1) / 2)
    every = [item for between in differences.values() for item in between.values()]
    for item, p_value in zip(every, holm([item["p"] for item in every]), strict=True):
        item["p"] = p_value
    mean_rank = {name: float(np.mean(item)) for name, item in ranks.items() if len(item) == len(ranked)}
    return {
        "reference": reference,
        "differences": differences,
        "mean_rank": dict(sorted(mean_rank.items(), key=lambda item: item[1])),
    }


def _difference(values: np.ndarray) -> dict[str, Any]:
    return {
        "mean": float(values.mean()),
        "ci95": mean_ci95(values),
        "num_dominant": num_dominant(values),
        "p": sign_flip_p(values),
    }


# -- figures ---------------------------------------------------------------------------------------


OURS = ("dop_search", "dop_split", "dop")
CONTROLS = ("random", "uniform_grid", "resize")
NUM_NAMED = 3
"""Published methods that get a line and a name of their own: those with the best mean rank."""


def _panel(axis: Axes, result: Result, field: str, label: str) -> None:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in result["rows"]:
        if row.get(field) is not None:
            series.setdefault(row["method"], []).append((row["flops_ratio"], row[field]))
    named = _named(result, series)
    other: str | None = "other methods"
    for name, points in series.items():
        if name not in named:
            axis.plot(*zip(*sorted(points), strict=True), color="#d0d0d0", linewidth=0.8, zorder=1, label=other)
            other = None
    for name, look in named.items():
        points = [(x, max(y, SMALLEST_KL)) for x, y in sorted(series[name])]
        width = 2.2 if name in OURS else 1.3
        axis.plot(
            *zip(*points, strict=True),
            color=look.color,
            linestyle=look.line,
            marker=look.marker,
            linewidth=width,
            label=name,
            zorder=3,
        )
    axis.set_xlabel("prefill FLOPs, share of the full model's (selection included)")
    axis.set_ylabel(label)
    if field == "relative_mean":
        axis.axhline(100.0, color=FAINT, linewidth=0.5)


def _named(result: Result, series: Mapping[str, Any]) -> dict[str, Look]:
    rank = result["summary"].get("mean_rank", {})
    published = [name for name in rank if not name.startswith(("dop", "uniform_search")) and name not in CONTROLS]
    names = [name for name in (*OURS, *published[:NUM_NAMED], *CONTROLS) if name in series]
    extra = (*LOOKS, Look(FAINT, "x", ":"), Look(FAINT, "+", "--"), Look(FAINT, "1", "-."))
    return dict(zip(names, extra, strict=False))


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    if "kl_heldout" not in row:
        return "failed" if "failed" in row else "–"
    return f"{row['kl_heldout']:.3f} {row['relative_mean']:.0f}"


def relative_family_mean(correct: np.ndarray, correct_full: np.ndarray, families: Sequence[str]) -> float:
    """Accuracy in per cent of the full model's, mean over families of questions (as over benchmarks).

    Args:
        correct, correct_full: boolean ``[num_samples]``, of the pruned and of the full model.
        families: each sample's; those that the full model never answers are left out. NaN if that is all.
    """
    names = np.array(families)
    ratios = [
        correct[names == name].mean() / correct_full[names == name].mean()
        for name in dict.fromkeys(families)
        if correct_full[names == name].any()
    ]
    return float(100.0 * np.mean(ratios)) if ratios else float("nan")
