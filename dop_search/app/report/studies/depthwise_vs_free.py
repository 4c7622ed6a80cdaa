"""What single layers are worth, and what windows and free layer sets gain over exit depths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dop_search.app.report.style import FOUND, LOOKS, UNIFORM, styled

TITLES = {
    "single": ("Left out in one layer", "layer"),
    "from_end": ("Left out from a layer to the end", "first layer left out"),
    "from_start": ("Left out up to a layer", "last layer left out"),
}
NAMES = ("start", "exit", "window", "free", "gsop")
FLOOR_NATS = 1e-5


def figures(result: Mapping[str, Any]) -> dict[str, Figure]:
    """``ablation``: KL per layer and module; ``layer_sets``: search-set and held-out KL of each freedom."""
    return {"ablation": _ablation(result), "layer_sets": _layer_sets(result)}


def _ablation(result: Mapping[str, Any]) -> Figure:
    with styled():
        figure = Figure(figsize=(9.6, 3.3), layout="constrained")
        axes = figure.subplots(1, 3, sharey=True)
        for axis, (kind, (title, label)) in zip(axes, TITLES.items(), strict=True):
            its = [row for row in result["rows"] if row["kind"] == kind and "layers" in row]
            for look, row in zip(LOOKS, its, strict=False):
                alive = [layer for layer in row["layers"] if layer not in row["dead"]]
                mean = [max(row["kl_search"][layer], FLOOR_NATS) for layer in alive]
                low, high = (
                    [max(row["kl_search_ci95"][layer][side], FLOOR_NATS) for layer in alive] for side in (0, 1)
                )
                axis.plot(alive, mean, color=look.color, marker=look.marker, linestyle=look.line, label=row["name"])
                axis.fill_between(alive, low, high, color=look.color, alpha=0.13, linewidth=0)
            axis.set(yscale="log", xlabel=label)
            axis.set_title(title)
        axes[0].set_ylabel(f"KL, search set (nats, 95 %), at least {FLOOR_NATS:g}")
        axes[0].legend()
    return figure


def _layer_sets(result: Mapping[str, Any]) -> Figure:
    rows = {(row["name"], row["budget"]): row for row in result["rows"] if row["kind"] == "search"}
    budgets = sorted({budget for _, budget in rows}, reverse=True)
    with styled():
        figure = Figure(figsize=(3.2 * len(budgets), 3.4), layout="constrained")
        axes = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
        for axis, budget in zip(axes, budgets, strict=True):
            names = [name for name in NAMES if "kl_search" in rows.get((name, budget), {})]
            for shift, field, interval, color, marker, label in (
                (-0.1, "kl_search", "kl_search_ci95", FOUND, "o", "search set"),
                (0.1, "kl_heldout", "kl_ci95", UNIFORM, "s", "held-out"),
            ):
                its = [rows[name, budget] for name in names]
                places = np.arange(len(names)) + shift
                low, high = ([max(row[interval][side], FLOOR_NATS) for row in its] for side in (0, 1))
                axis.vlines(places, low, high, color=color)
                axis.plot(places, [max(row[field], FLOOR_NATS) for row in its], marker, color=color, label=label)
            runs = [rows[name, budget]["num_validation_runs"] for name in names]
            axis.set_xticks(range(len(names)), [f"{name}\n{count}" for name, count in zip(names, runs, strict=True)])
            axis.set(yscale="log", xlabel="freedom, validation runs")
            axis.set_title(f"{budget:g} of the FLOPs")
        axes[0].set_ylabel("KL (nats, 95 %)")
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure
