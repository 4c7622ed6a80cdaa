"""Selector × operations: one panel per budget, a line per selector from uniform reduction to found operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dop_search.app.report.style import FAINT, FOUND, UNIFORM, styled

SMALLEST = 1e-5
"""Nats; what is less is drawn here."""


def figures(result: Mapping[str, Any]) -> dict[str, Figure]:
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
