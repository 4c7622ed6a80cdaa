"""The additive optimum against the true one: maps of exact KL, estimate against measurement, and what each run buys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from dop_search.app.report.style import FAINT, LOOKS, styled

MAPPED = "dop"
FLOOR_NATS = 1e-4
"""Smaller divergences share one colour: they are less than the samples can tell apart."""
LABELS = {
    "additive": "additive",
    "rerank": "+ re-ranking",
    "reanchored": "re-anchored curves",
    "pair": "+ strongest pair",
    "pairs": "+ all pairs",
    "exact": "exhaustive",
}


def figures(result: Mapping[str, Any]) -> dict[str, Figure]:
    """``map``: exact KL over the two depths; ``optima``: estimate against measurement, and excess KL of each method."""
    grids = {row["space"]: row for row in result["rows"] if row["method"] == "grid" and "levels" in row}
    made = {"map": _map(grids[MAPPED])} if MAPPED in grids else {}
    return {**made, "optima": _optima(result, grids)}


def _map(grid: Mapping[str, Any]) -> Figure:
    names = grid["parameters"]
    levels = np.array(grid["levels"])
    attention, mlp, tokens = (levels[:, names.index(n)] for n in ("attention_depth", "mlp_depth", "num_visual_tokens"))
    shown = sorted(set(tokens.tolist()))
    depths, mlp_depths = sorted(set(attention.tolist())), sorted(set(mlp.tolist()))
    exact = np.maximum(grid["kl_search_of"], FLOOR_NATS)
    norm = LogNorm(FLOOR_NATS, float(exact.max()))
    with styled():
        figure = Figure(figsize=(9.6, 3.2), layout="constrained")
        axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axis, count in zip(axes, shown, strict=True):
            image = np.full((len(depths), len(mlp_depths)), np.nan)
            for x, y, value, its in zip(mlp, attention, exact, tokens, strict=True):
                if its == count:
                    image[depths.index(y), mlp_depths.index(x)] = value
            for line in range(len(depths)):  # MLP depths beyond the keys' are the same strategy
                known = np.flatnonzero(~np.isnan(image[line]))
                if len(known):
                    image[line, np.isnan(image[line])] = image[line, known[-1]]
            drawn = axis.imshow(image, norm=norm, cmap="viridis_r", origin="lower", aspect="auto")
            axis.set_xticks(range(0, len(mlp_depths), 3), mlp_depths[::3])
            axis.set_yticks(range(0, len(depths), 3), depths[::3])
            axis.set_title(f"{count} visual tokens")
            axis.set_xlabel("MLP depth")
            axis.grid(False)
        axes[0].set_ylabel("attention depth")
        bar = figure.colorbar(drawn, ax=list(axes), pad=0.01)
        bar.set_label("exact KL (nats), search set")
    return figure


def _optima(result: Mapping[str, Any], grids: Mapping[str, Mapping[str, Any]]) -> Figure:
    with styled():
        figure = Figure(figsize=(9.2, 2.4 * len(grids) + 0.3), layout="constrained")
        for line, (space, grid) in zip(figure.subplots(len(grids), 3, squeeze=False), grids.items(), strict=True):
            scatter, search, heldout = line
            estimate = np.maximum(grid["kl_estimate_of"], FLOOR_NATS)
            exact = np.maximum(grid["kl_search_of"], FLOOR_NATS)
            drawn = scatter.scatter(estimate, exact, c=grid["cost_ratio"], s=9, cmap="cividis", vmin=0.0, vmax=1.0)
            scatter.axline((1.0, 1.0), slope=1.0, color=FAINT, linewidth=0.9)
            scatter.set(xscale="log", yscale="log", xlabel="sum of curves (nats)", ylabel="exact KL (nats)")
            scatter.set_title(f"{space}: all strategies")
            ranks = f"Spearman {grid['spearman']:.3f}\ncheap half {grid['spearman_cheap_half']:.3f}"
            scatter.annotate(ranks, (0.03, 0.97), xycoords="axes fraction", va="top")
            figure.colorbar(drawn, ax=scatter, label="share of the FLOPs", pad=0.01)
            gaps = [gap for gap in result["summary"]["gaps"] if gap["space"] == space]
            _excess(search, gaps, "kl_search")
            search.set_title(f"{space}: search set")
            search.set_ylabel("KL above the optimum's (nats)")
            _excess(heldout, gaps, "kl_heldout")
            heldout.set_title(f"{space}: held-out, 95 %")
        handles, labels = search.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure


def _excess(axis: Axes, gaps: Sequence[Mapping[str, Any]], field: str) -> None:
    """KL of each method above that of the exhaustive optimum, per budget; bars where there are intervals."""
    budgets = sorted({gap["budget"] for gap in gaps})
    names = [name for name in LABELS if name != "exact"]
    for index, (look, name) in enumerate(zip(LOOKS, names, strict=False)):
        its = [gap for gap in gaps if gap["method"] == name]
        places = [budgets.index(gap["budget"]) + 0.15 * (index - (len(names) - 1) / 2) for gap in its]
        axis.plot(places, [gap[field] for gap in its], look.marker, color=look.color, label=LABELS[name])
        bars = [(x, *gap[f"{field}_ci95"]) for x, gap in zip(places, its, strict=True) if gap.get(f"{field}_ci95")]
        if bars:
            axis.vlines(*zip(*bars, strict=True), color=look.color)
    axis.axhline(0.0, color=FAINT, linewidth=0.9)
    axis.set_yscale("symlog", linthresh=0.001)
    ends = [gap[field] for gap in gaps] + [end for gap in gaps for end in gap.get(f"{field}_ci95") or ()]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    axis.set_ylim(2 * low - 2e-4, 2 * high + 2e-4)
    axis.set_xticks(range(len(budgets)), [f"{budget:g}" for budget in budgets])
    axis.set_xlabel("budget, share of the FLOPs")
