"""All methods at the same FLOPs: Pareto plot and table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from dop_search.app.report.style import FAINT, LOOKS, SMALLEST_KL, Look, styled

OURS = ("dop_search", "dop_split", "dop")
CONTROLS = ("random", "uniform_grid", "resize")
NUM_NAMED = 3
"""Published methods that get a line and a name of their own: those with the best mean rank."""


def figures(result: Mapping[str, Any]) -> dict[str, Figure]:
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


def _panel(axis: Axes, result: Mapping[str, Any], field: str, label: str) -> None:
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


def _named(result: Mapping[str, Any], series: Mapping[str, Any]) -> dict[str, Look]:
    rank = result["summary"].get("mean_rank", {})
    published = [name for name in rank if not name.startswith(("dop", "uniform_search")) and name not in CONTROLS]
    names = [name for name in (*OURS, *published[:NUM_NAMED], *CONTROLS) if name in series]
    extra = (*LOOKS, Look(FAINT, "x", ":"), Look(FAINT, "+", "--"), Look(FAINT, "1", "-."))
    return dict(zip(names, extra, strict=False))


def table(result: Mapping[str, Any]) -> Table:
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


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    if "kl_heldout" not in row:
        return "failed" if "failed" in row else "–"
    return f"{row['kl_heldout']:.3f} {row['relative_mean']:.0f}"
