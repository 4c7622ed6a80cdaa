"""Tied and split attention depths, one to three token groups: KL of what is found, and its paired differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dop_search.app.report.style import FAINT, LOOKS, SMALLEST_KL, styled


def figures(result: Mapping[str, Any]) -> dict[str, Figure]:
    """``split_attention``: KL on search and held-out samples; the gain of splitting with its interval."""
    groups = sorted({row["groups"] for row in result["rows"]})
    with styled():
        figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        search, heldout, gain = figure.subplots(1, 3)
        for index, count in enumerate(groups):
            for split in (False, True):
                look = LOOKS[index]
                its = [row for row in result["rows"] if row["groups"] == count and row["split"] == split]
                for axis, field in ((search, "kl_search"), (heldout, "kl_heldout")):
                    points = sorted((row["budget"], max(row[field], SMALLEST_KL)) for row in its if field in row)
                    if points:
                        name = f"{count} group{'s' if count > 1 else ''}, {'q and kv apart' if split else 'q = kv'}"
                        axis.plot(
                            *zip(*points, strict=True),
                            color=look.color,
                            marker=look.marker,
                            linestyle="-" if split else ":",
                            markerfacecolor=look.color if split else "white",
                            label=name,
                        )
        search.set_title("On the search set")
        heldout.set_title("On held-out samples")
        for axis in (search, heldout):
            axis.set(yscale="log", xlabel="budget, share of the FLOPs", ylabel="KL of the found strategy (nats)")
        _gain(gain, result, groups)
        handles, labels = search.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return {"split_attention": figure}


def _gain(axis: Axes, result: Mapping[str, Any], groups: list[int]) -> None:
    budgets = sorted({row["budget"] for row in result["rows"]})
    for index, count in enumerate(groups):
        its = [item for item in result["summary"]["split_minus_tied"] if item["groups"] == count and item["ci95"]]
        if its:
            places = [budgets.index(item["budget"]) + 0.2 * (index - (len(groups) - 1) / 2) for item in its]
            middle = [item["difference"] for item in its]
            low, high = ([item["ci95"][side] for item in its] for side in (0, 1))
            look = LOOKS[index]
            axis.vlines(places, low, high, color=look.color)
            axis.plot(places, middle, look.marker, color=look.color)
    axis.axhline(0.0, color=FAINT, linewidth=0.9)
    axis.set_yscale("symlog", linthresh=0.01)
    axis.set_xticks(range(len(budgets)), [f"{budget:g}" for budget in budgets])
    axis.set(xlabel="budget, share of the FLOPs", ylabel="held-out KL, apart minus tied (nats)")
    axis.set_title("What splitting changes (95 %)")
