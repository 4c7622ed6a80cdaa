"""KLs of what was measured: over the cost, beside the Pareto front of the estimate, and over that estimate itself."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dop_search.app.record import Candidate, Measured, Record
from dop_search.app.report.style import FAINT, FOUND, INK, SMALLEST_KL, UNIFORM, styled
from dop_search.utils.statistics import spearman


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


def rank_correlation(candidates: list[Candidate]) -> tuple[float, int] | None:
    """Spearman's rho of additive and exact KL, and the number of pairs; ``None`` if there is nothing to rank."""
    pairs = [(item.kl_additive, item.kl_search) for item in candidates if item.kl_additive is not None]
    additive, exact = [a for a, _ in pairs], [e for _, e in pairs]
    if len(pairs) < 3 or len(set(additive)) == 1 or len(set(exact)) == 1:
        return None
    return spearman(additive, exact), len(pairs)


def additive_vs_exact(record: Record) -> Figure:
    """A scatter of all measured candidates on logarithmic axes; on the diagonal the estimate is exact."""
    candidates = [item for item in record.all_candidates() if item.kl_additive is not None]
    shown = [item for item in candidates if min(item.kl_search, item.kl_additive or 0.0) > SMALLEST_KL]
    with styled():
        figure = Figure(figsize=(4.6, 4.4), layout="constrained")
        axis = figure.subplots()
        for is_uniform, color, marker, label in (
            (False, FOUND, "o", "candidate"),
            (True, UNIFORM, "s", "uniform reduction"),
        ):
            chosen = [item for item in shown if item.is_uniform == is_uniform]
            if chosen:
                axis.plot(
                    [item.kl_additive or 0.0 for item in chosen],
                    [item.kl_search for item in chosen],
                    marker,
                    color=color,
                    markerfacecolor=color if is_uniform else "none",
                    markersize=4.5,
                    linestyle="",
                    label=label,
                )
        results = [(r.kl_additive, r.kl_search) for r in record.results if r.kl_additive and r.kl_search > 0.0]
        if results:
            additive, exact = zip(*results, strict=True)
            axis.plot(
                additive, exact, "*", color=INK, markersize=11, markeredgecolor="white", linestyle="", label="found"
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        low = min([*axis.get_xlim(), *axis.get_ylim()])
        high = max([*axis.get_xlim(), *axis.get_ylim()])
        axis.plot([low, high], [low, high], color=FAINT, linewidth=0.9, zorder=0)
        axis.set_xlim(low, high)
        axis.set_ylim(low, high)
        axis.set_aspect("equal")
        axis.set_xlabel("additive estimate (nats)")
        axis.set_ylabel("exact KL on the search set (nats)")
        axis.set_title("Does the sum rank strategies?")
        rho = rank_correlation(candidates)
        if rho is not None:
            axis.annotate(
                f"Spearman ρ = {rho[0]:.3f}  (n = {rho[1]})",
                (0.02, -0.16),
                xycoords="axes fraction",
                ha="left",
                color=INK,
            )
        if shown or results:
            axis.legend(loc="upper left")
    return figure
