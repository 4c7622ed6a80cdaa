"""The layer × module map: which operations run on visual tokens, are skipped, or are dead, budget by budget."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from dop_search.app.record import Record
from dop_search.app.report.style import INK, styled
from dop_search.app.report.text import percent_text
from dop_search.strategy import Strategy
from dop_search.strategy.operations import MODULES

RUN, SKIPPED, DEAD = 0, 1, 2
_CELLS: dict[int, tuple[str, dict[str, Any]]] = {
    RUN: ("runs", {"facecolor": "#2d5f8b", "edgecolor": "white"}),
    SKIPPED: ("skipped", {"facecolor": "white", "edgecolor": "#9a9a9a", "hatch": "////"}),
    DEAD: ("dead: no text token would see it", {"facecolor": "#e6e6e6", "edgecolor": "#b5b5b5", "hatch": ".."}),
}
_ROW_NAMES = {"q": "queries", "kv": "keys, values", "mlp": "MLP"}


def operation_states(strategy: Strategy) -> np.ndarray:
    """``[group, layer, module]`` of ``RUN``, ``SKIPPED`` or ``DEAD``.

    Dead are the queries and MLPs from the group's last layer with keys on: their result reaches no text token,
    so dropping them changes nothing.
    """
    runs = strategy.canonical().to_array()
    if strategy.num_visual_tokens == 0:
        return np.full(runs.shape, SKIPPED)
    states = np.where(runs, RUN, SKIPPED)
    for index, group in enumerate(strategy.groups):
        last_kv = group.kv[-1] if group.kv else 0
        for module, name in enumerate(MODULES):
            if name.value != "kv":
                states[index, last_kv:, module] = DEAD
    return states


def layer_map(record: Record) -> Figure:
    """One grid per budget (rows: group and module, columns: layers), with the tokens that enter beside it."""
    num_rows = sum(3 * len(result.strategy.groups) for result in record.results)
    num_layers = max(result.strategy.num_layers for result in record.results)
    with styled():
        figure = Figure(
            figsize=(min(11.0, 3.2 + 0.26 * num_layers), 0.9 + 0.30 * num_rows + 0.5 * len(record.results)),
            layout="constrained",
        )
        heights = [3 * len(result.strategy.groups) for result in record.results]
        grid = figure.subplots(
            len(record.results), 2, squeeze=False, height_ratios=heights, width_ratios=[max(8, num_layers), 5]
        )
        for row, result in zip(grid, record.results, strict=True):
            draw_operations(row[0], result.strategy)
            row[0].set_title(f"budget {result.budget.text}: {percent_text(result.flops_ratio)} % of the FLOPs")
            _tokens(row[1], result.strategy, record.model.num_visual_tokens)
        grid[-1][0].set_xlabel("decoder layer")
        handles = [Patch(label=label, **style) for label, style in _CELLS.values()]
        figure.legend(handles=handles, loc="outside lower left", ncols=3, handlelength=1.6, handleheight=1.2)
    return figure


def draw_operations(axis: Axes, strategy: Strategy) -> None:
    """Cells of one strategy on an empty axis: rows are modules (of each group), columns are layers."""
    states = operation_states(strategy)
    names = []
    for group in range(states.shape[0]):
        prefix = f"group {group} " if states.shape[0] > 1 else ""
        for module, name in enumerate(MODULES):
            row = group * len(MODULES) + module
            names.append(prefix + _ROW_NAMES[name.value])
            for layer in range(states.shape[1]):
                style = _CELLS[int(states[group, layer, module])][1]
                axis.add_patch(Rectangle((layer - 0.46, row - 0.42), 0.92, 0.84, linewidth=0.4, **style))
    axis.set_xlim(-0.6, states.shape[1] - 0.4)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_yticks(range(len(names)), names)
    step = 1 if states.shape[1] <= 16 else 4
    axis.set_xticks(range(0, states.shape[1], step))
    axis.tick_params(length=0)
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _tokens(axis: Axes, strategy: Strategy, num_visual: float | None) -> None:
    """A bar: the share of the visual tokens that enter the decoder."""
    share = 1.0
    if strategy.num_visual_tokens is not None and num_visual:
        share = min(1.0, strategy.num_kept(round(num_visual)) / num_visual)
    total = "" if num_visual is None else f" of {num_visual:g}"
    kept = strategy.describe_tokens() + ("" if strategy.num_visual_tokens is None else total)
    run, skipped = _CELLS[RUN][1], _CELLS[SKIPPED][1]
    axis.add_patch(Rectangle((0, 0.35), 1, 0.3, linewidth=0.6, **skipped))
    axis.add_patch(Rectangle((0, 0.35), share, 0.3, linewidth=0.6, **run))
    axis.text(0, 0.72, f"tokens: {kept}", color=INK, fontsize=8.5)
    axis.set_xlim(-0.02, 1.02)
    axis.set_ylim(0, 1)
    axis.axis("off")
