"""Transfer: held-out KL of moved strategies, beside the target's own and uniform reduction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dop_search.report.style import FAINT, FOUND, LOOKS, UNIFORM, styled

SMALLEST = 1e-5
"""Nats; what is less is drawn here."""
_COLORS = {"target": FOUND, "uniform": UNIFORM, "model": LOOKS[2].color, "budget": LOOKS[3].color, "seed": FAINT}
_MARKERS = {"target": "o", "uniform": "s", "model": "^", "budget": "D", "seed": "v"}
_NAMES = {"target": "searched here", "uniform": "uniform reduction"}


def figures(result: Mapping[str, Any]) -> dict[str, Figure]:
    """``transfer``: one panel per target and budget."""
    rows = [row for row in result["rows"] if "kl_heldout" in row]
    if not rows:
        return {}
    targets = list(dict.fromkeys(row["target"] for row in rows))
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    heights = [max(sum(row["target"] == t and row["budget"] == b for row in rows) for b in budgets) for t in targets]
    with styled():
        figure = Figure(figsize=(9.6, 1.0 + 0.26 * sum(heights) + 0.5 * len(targets)), layout="constrained")
        axes = figure.subplots(len(targets), len(budgets), sharex=True, squeeze=False, height_ratios=heights)
        for line, target in zip(axes, targets, strict=True):
            for axis, budget in zip(line, budgets, strict=True):
                _panel(axis, [row for row in rows if row["target"] == target and row["budget"] == budget])
                if target == targets[0]:
                    axis.set_title(f"at {budget:g}")
            line[0].set_ylabel(f"on {target}", fontweight="bold")
        figure.supxlabel(
            "held-out KL to the full model (nats, mean and 95 % interval), at shares of the FLOPs", fontsize=9
        )
    return {"transfer": figure}


def _panel(axis: Axes, rows: list[Mapping[str, Any]]) -> None:
    for place, row in enumerate(rows):
        color = _COLORS[row["axis"]]
        axis.plot([max(end, SMALLEST) for end in row["kl_ci95"]], [place, place], color=color, linewidth=1.0)
        axis.plot(max(row["kl_heldout"], SMALLEST), place, _MARKERS[row["axis"]], color=color)
    own = next((row for row in rows if row["axis"] == "target"), None)
    if own is not None:
        axis.axvline(max(own["kl_heldout"], SMALLEST), color=FOUND, linewidth=0.6, linestyle=":")
    axis.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xscale("log")


def _label(row: Mapping[str, Any]) -> str:
    return _NAMES.get(row["axis"], f"from {row['axis']} {row['source']}")
