"""Long answers: divergence by answer position, and what the full model makes of the answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dop_search.app.report.style import FOUND, INK, LOOKS, SMALLEST_KL, UNIFORM, Look, styled

_LOOKS = {
    "uniform": Look(UNIFORM, "s", "--"),
    "found": Look(FOUND, "o", "-"),
    "found_long": LOOKS[2],
    "kv": LOOKS[3],
    "q": LOOKS[4],
    "mlp": LOOKS[5],
}
_NAMES = {"uniform": "uniform reduction", "found": "found on the search data", "found_long": "found on long answers"}


def figures(result: Mapping[str, Any]) -> dict[str, Figure]:
    """``long_answers``: a column per budget, one of the single cuts, one of the full model.

    Above KL by position in the full model's answers, below how many generated answers are the full model's up to there.
    """
    rows = [row for row in result["rows"] if "position" in row]
    if not rows:
        return {}
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    full = result["summary"].get("full")
    with styled():
        figure = Figure(figsize=(2.0 * (len(budgets) + 1), 5.4), layout="constrained")
        axes = figure.subplots(2, len(budgets) + 1, sharex=True)
        for column, budget in enumerate(budgets):
            its = [row for row in rows if row["budget"] == budget]
            _divergence(axes[0, column], its)
            _generated(axes[1, column], its)
            axes[0, column].set_title("one module cut" if budget == 1.0 else f"{budget:g} of the FLOPs")
        ends = [axis.get_ylim() for axis in axes[0, : len(budgets)]]
        for axis in axes[0, : len(budgets)]:
            axis.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
        for axis in axes[:, 1 : len(budgets)].flat:
            axis.tick_params(labelleft=False)
        for axis in axes[1]:
            axis.set_xlabel("answer position (tokens)")
        axes[0, 0].set_ylabel("KL to the full model (nats)")
        axes[1, 0].set_ylabel("generated answers still the same")
        if full is not None:
            _full_model(axes[0, -1], full)
        axes[1, -1].set_axis_off()
        axes[0, -1].tick_params(labelbottom=True)
        seen: dict[str, Artist] = {}
        for axis in axes[0]:
            handles, labels = axis.get_legend_handles_labels()
            seen |= dict(zip(labels, handles, strict=True))
        figure.legend(list(seen.values()), list(seen), loc="outside lower center", ncols=3)
    return {"long_answers": figure}


def _divergence(axis: Axes, rows: list[Mapping[str, Any]]) -> None:
    for row in rows:
        look = _LOOKS[row["strategy"]]
        low, high = zip(
            *(ends or (mean, mean) for ends, mean in zip(row["ci95"], row["mean"], strict=True)), strict=True
        )
        floor = [max(value, SMALLEST_KL) for value in row["mean"]]
        label = _NAMES.get(row["strategy"], f"{row['strategy']} cut alone: {row['strategy_text'].rsplit(' n_v', 1)[0]}")
        axis.plot(row["position"], floor, color=look.color, marker=look.marker, linestyle=look.line, label=label)
        axis.fill_between(
            row["position"],
            [max(value, SMALLEST_KL) for value in low],
            [max(value, SMALLEST_KL) for value in high],
            color=look.color,
            alpha=0.12,
            linewidth=0.0,
        )
    axis.set_yscale("log")


def _generated(axis: Axes, rows: list[Mapping[str, Any]]) -> None:
    for row in (row for row in rows if "generated" in row):
        look, its = _LOOKS[row["strategy"]], row["generated"]
        axis.plot(its["position"], its["same_so_far"], color=look.color, marker=look.marker, linestyle=look.line)
    axis.set_ylim(0.0, 1.05)


def _full_model(axis: Axes, full: Mapping[str, Any]) -> None:
    accuracy = full["accuracy"]
    axis.plot(accuracy["position"], accuracy["mean"], color=INK, marker="x", label="full model: annotated tokens right")
    axis.set_ylim(0.0, 1.05)
    axis.set_title("full model")
