"""Operations beside a strategy's: what each costs alone, and what a search with them gains at equal FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dop_search.app.report.style import LOOKS, SMALLEST_KL, styled

VARIANTS = {"visual": "visual tokens only", "both": "both"}


def figures(result: Mapping[str, Any]) -> dict[str, Figure]:
    """``STUDY``: KL over the exit depth of each parameter alone; held-out KL of what is found over the budget."""
    if not result["rows"]:
        return {}
    with styled():
        figure = Figure(figsize=(8.4, 3.9), layout="constrained")
        curves, found = figure.subplots(1, 2)
        _curves(curves, result)
        _found(found, result)
        handles, labels = curves.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6, title="exit depths, left")
    return {result["study"]: figure}


def _curves(axis: Axes, result: Mapping[str, Any]) -> None:
    rows = [row for row in result["rows"] if row["part"] == "curve" and "kl_search" in row]
    for index, name in enumerate(dict.fromkeys(row["parameter"] for row in rows)):
        its = sorted((row["depth"], max(row["kl_search"], SMALLEST_KL)) for row in rows if row["parameter"] == name)
        look = LOOKS[index % len(LOOKS)]
        axis.plot(*zip(*its, strict=True), color=look.color, marker=look.marker, label=name.replace("_", ", "))
    axis.set(yscale="log", xlabel="exit depth (layers)", ylabel="KL on the search samples (nats)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_title("One depth varied alone")


def _found(axis: Axes, result: Mapping[str, Any]) -> None:
    for index, (variant, label) in enumerate(VARIANTS.items()):
        rows = [row for row in result["rows"] if row["part"] == "search" and row["variant"] == variant]
        its = sorted((row for row in rows if "kl_heldout" in row), key=lambda row: row["budget"])
        if its:
            look = LOOKS[index]
            budgets = [row["budget"] * (1 + 0.02 * (index - 0.5)) for row in its]
            low, high = ([max(row["kl_ci95"][side], SMALLEST_KL) for row in its] for side in (0, 1))
            axis.vlines(budgets, low, high, color=look.color, alpha=0.5)
            values = [max(row["kl_heldout"], SMALLEST_KL) for row in its]
            axis.plot(budgets, values, color=look.color, marker=look.marker, label=label)
    axis.set(yscale="log", xlabel="budget, share of the FLOPs", ylabel="KL on held-out samples (nats)")
    axis.set_title("What is found (95 %)")
    axis.legend()
