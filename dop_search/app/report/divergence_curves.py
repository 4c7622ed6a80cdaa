"""The divergence curves: what one parameter costs in KL when all others stay at full."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dop_search.app.report.style import LOOKS, SMALLEST_KL, Look, styled
from dop_search.search.curves import Curve, Curves
from dop_search.utils.intervals import mean_ci95

_LABELS = {
    "q": "queries (q)",
    "kv": "keys and values (kv)",
    "mlp": "MLP ($D_P$)",
    "attention": "attention ($D_A$)",
    "tokens": "visual tokens ($n_v$)",
}
_RESAMPLES = 500
"""Of the bootstrap; enough for a bar in a picture."""


def divergence_curves(curves: Curves, num_layers: int) -> Figure:
    """One panel for the exit depths, one for the number of visual tokens, on one logarithmic axis.

    Marks are measured, lines are the interpolation that the surrogate uses, bars are 95 % intervals.
    """
    depths = [curve for curve in curves.curves.values() if curve.role != "tokens"]
    tokens = [curve for curve in curves.curves.values() if curve.role == "tokens"]
    panels = [panel for panel in (depths, tokens) if panel]
    with styled():
        figure = Figure(figsize=(4.4 * len(panels) + 0.6, 3.6), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            first = 0 if panel is depths else len(depths)
            for index, curve in enumerate(panel, start=first):
                _draw_curve(axis, curve, LOOKS[index % len(LOOKS)])
            axis.set_yscale("log", nonpositive="mask")
            axis.legend(loc="lower left")
            if panel is depths:
                axis.set_xlabel(f"exit depth (of {num_layers} layers; at full depth KL = 0)")
                axis.set_xlim(-0.3, num_layers + 0.3)
                axis.xaxis.get_major_locator().set_params(integer=True)
            else:
                axis.set_xlabel("visual tokens that enter the decoder")
        axes[0].set_ylabel("KL to the full model (nats)")
        figure.suptitle("One parameter reduced, all others at full", x=0.01, ha="left", fontsize=10, weight="bold")
    return figure


def _draw_curve(axis: Axes, curve: Curve, look: Look) -> None:
    levels = np.arange(curve.levels[0], curve.levels[-1] + 1)
    axis.plot(levels, _visible(curve(levels)), color=look.color, linestyle=look.line)
    mark: dict[str, Any] = {"color": look.color, "marker": look.marker, "markerfacecolor": "white"}
    axis.plot(curve.levels, _visible(curve.mean_nats), linestyle="", zorder=3, **mark)
    axis.plot([], [], linestyle=look.line, label=_label(curve), **mark)
    for level, row in zip(curve.levels, curve.per_sample_nats, strict=True):
        interval = mean_ci95(row, num_resamples=_RESAMPLES)
        if interval is not None and interval[1] > SMALLEST_KL:
            axis.vlines(level, max(interval[0], SMALLEST_KL), interval[1], color=look.color, linewidth=1.0)


def _visible(values: np.ndarray) -> np.ndarray:
    return np.where(values > SMALLEST_KL, values, np.nan)


def _label(curve: Curve) -> str:
    """The role in words, with the token group where there are several (``g1_kv_depth``)."""
    label = _LABELS.get(curve.role, curve.parameter)
    group = re.match(r"g(\d+)_", curve.parameter)
    return label if group is None else f"{label}, group {group[1]}"
