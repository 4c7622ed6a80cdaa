"""The Pareto front: what a share of the cost has to cost in KL, found strategies beside uniform reduction."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dop_search.app.record import Candidate, Measured, Record
from dop_search.app.report.style import FAINT, FOUND, INK, SMALLEST_KL, UNIFORM, styled


def pareto_front(record: Record) -> Figure:
    """Additive fronts as lines, exact KLs as points, held-out KLs of the results with their intervals."""
    with styled():
        figure = Figure(figsize=(6.6, 4.4), layout="constrained")
        axis = figure.subplots()
        _line(axis, record.front, FOUND, "-", "all operations, additive estimate")
        _line(axis, record.uniform_front, UNIFORM, "--", "uniform reduction, additive estimate")
        _candidates(axis, record.all_candidates())
        _results(axis, record)
        axis.set_yscale("log")
        lowest = min(max(result.kl_heldout, SMALLEST_KL) for result in record.results)
        axis.set_ylim(bottom=max(SMALLEST_KL, lowest / 30))  # below lies what nobody has to pay for
        low = min([record.floor_ratio or 0.1, *(cost for cost, _ in record.front)])
        axis.set_xlim(max(0.0, 0.8 * low), 1.02)
        if record.floor_ratio is not None:
            axis.axvspan(0.0, record.floor_ratio, facecolor="#f0f0f0", hatch="///", edgecolor="#c8c8c8", linewidth=0)
            axis.annotate(
                "text alone",
                (record.floor_ratio, 0.02),
                (3, 0),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                color=INK,
                fontsize=8,
                rotation=90,
                va="bottom",
            )
        axis.set_xlabel("prefill FLOPs, share of the full model's")
        axis.set_ylabel("KL to the full model (nats)")
        axis.set_title("What a budget costs")
        axis.legend(loc="upper right")
    return figure


def _line(axis: Axes, points: list[tuple[float, float]], color: str, style: str, label: str) -> None:
    kept = [(cost, kl) for cost, kl in sorted(points) if kl > SMALLEST_KL]
    if kept:
        costs, kls = zip(*kept, strict=True)
        axis.plot(costs, kls, color=color, linestyle=style, drawstyle="steps-post", label=label)


def _candidates(axis: Axes, candidates: list[Candidate]) -> None:
    label: str | None = "exact, search set"
    for is_uniform, color, marker in ((False, FOUND, "o"), (True, UNIFORM, "s")):
        chosen = [item for item in candidates if item.is_uniform == is_uniform and item.kl_search > SMALLEST_KL]
        if chosen:
            axis.plot(
                [item.flops_ratio for item in chosen],
                [item.kl_search for item in chosen],
                marker,
                color=color,
                markerfacecolor="none",
                markersize=3.5,
                alpha=0.7,
                linestyle="",
                label=label,
            )
            label = None


def _results(axis: Axes, record: Record) -> None:
    """The held-out KLs with 95 % intervals; budgets as thin lines."""
    found: list[Measured] = [*record.results]
    uniform: list[Measured] = [result.uniform for result in record.results if result.uniform is not None]
    for result in record.results:
        axis.axvline(result.flops_ratio, color=FAINT, linewidth=0.6, linestyle=":", zorder=0)
    for points, color, marker, label in (
        (found, FOUND, "o", "found, held-out (95 % CI)"),
        (uniform, UNIFORM, "s", "uniform, held-out (95 % CI)"),
    ):
        if not points:
            continue
        kls = np.array([max(item.kl_heldout, SMALLEST_KL) for item in points])
        ends = np.array([item.kl_heldout_ci95 or (item.kl_heldout, item.kl_heldout) for item in points])
        errors = np.abs(np.stack([kls - np.maximum(ends[:, 0], SMALLEST_KL), ends[:, 1] - kls]))
        axis.errorbar(
            [item.flops_ratio for item in points],
            kls,
            yerr=errors,
            fmt=marker,
            color=color,
            markersize=7,
            markeredgecolor="white",
            elinewidth=1.2,
            capsize=3,
            zorder=4,
            label=label,
        )
