"""Transfer: held-out KL of moved strategies, beside the target's own and uniform reduction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dop_search.app.report.style import FAINT, FOUND, LOOKS, UNIFORM, styled

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
    sources = {target: _sources(rows, target) for target in targets}
    heights = [len(sources[target]) for target in targets]
    with styled():
        figure = Figure(figsize=(9.6, 1.0 + 0.2 * sum(heights) + 0.4 * len(targets)), layout="constrained")
        axes = figure.subplots(len(targets), len(budgets), sharex=True, squeeze=False, height_ratios=heights)
        for line, target in zip(axes, targets, strict=True):
            for axis, budget in zip(line, budgets, strict=True):
                here = [row for row in rows if row["target"] == target and row["budget"] == budget]
                _panel(axis, here, sources[target])
                axis.set_title(f"on {_short(target)} at {budget:g}")
                if axis is not line[0]:
                    axis.tick_params(labelleft=False)
        figure.supxlabel(
            "held-out KL to the full model (nats, mean and 95 % interval), at shares of the FLOPs", fontsize=9
        )
    return {"transfer": figure}


def _sources(rows: list[Mapping[str, Any]], target: str) -> list[str]:
    """Labels of what runs on ``target`` at any budget, in the order of a panel; larger budgets first."""

    def place(row: Mapping[str, Any]) -> tuple[int, float]:
        return list(_MARKERS).index(row["axis"]), -float(row["source"]) if row["axis"] == "budget" else 0.0

    return list(dict.fromkeys(_label(row) for row in sorted(rows, key=place) if row["target"] == target))


def _panel(axis: Axes, rows: list[Mapping[str, Any]], labels: list[str]) -> None:
    for row in rows:
        color, place = _COLORS[row["axis"]], labels.index(_label(row))
        axis.plot([max(end, SMALLEST) for end in row["kl_ci95"]], [place, place], color=color, linewidth=1.0)
        axis.plot(max(row["kl_heldout"], SMALLEST), place, _MARKERS[row["axis"]], color=color)
    own = next((row for row in rows if row["axis"] == "target"), None)
    if own is not None:
        axis.axvline(max(own["kl_heldout"], SMALLEST), color=FOUND, linewidth=0.6, linestyle=":")
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set_xscale("log")


def _label(row: Mapping[str, Any]) -> str:
    return _NAMES.get(row["axis"], f"from {row['axis']} {_short(row['source'])}")


def _short(name: str) -> str:
    return name.rsplit("/", 1)[-1]
