"""Draw concepts.png, the one picture of the method, from the record of the main job (experiments/main).

python experiments/concepts/draw.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from PIL import Image

from dop_search.app.record import Record
from dop_search.app.report.layer_map import draw_operations
from dop_search.app.report.style import FAINT, FOUND, INK, UNIFORM, save_figure, styled
from dop_search.strategy import Strategy

HERE = Path(__file__).parent
BUDGET = 0.3


def main() -> None:
    record = Record.load(HERE.parent / "main" / "record.json")
    result = next(item for item in record.results if item.budget.plain == BUDGET)
    with styled():
        figure = Figure(figsize=(9.4, 4.9))
        axes = figure.subplots(2, 3).reshape(-1)
        figure.subplots_adjust(left=0.085, right=0.98, top=0.94, bottom=0.1, wspace=0.42, hspace=0.5)
        cells(axes[0], Strategy.full(result.strategy.num_layers), "1 · operations")
        cells(axes[1], result.strategy, "2 · a strategy skips some")
        candidates(axes[2], record)
        front(axes[3], record, BUDGET)
        confirmation(axes[4], record)
        text(axes[5])
        for start in (0, 1, 3, 4):
            arrow(figure, axes[start])
    path = HERE / "concepts.png"
    save_figure(figure, path)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


def cells(axis: Axes, strategy: Strategy, title: str) -> None:
    draw_operations(axis, strategy)
    kept = f"{strategy.describe_tokens()} visual tokens"
    axis.text(-0.4, 3.1, kept, fontsize=8, color=INK)
    axis.text(-0.4, 3.6, "filled: runs, hatched: skipped, dotted: dead", fontsize=7, color=INK)
    axis.set(title=title, ylim=(3.7, -0.7), xlabel="decoder layer")
    axis.set_xticks(range(0, strategy.num_layers, 2))
    axis.tick_params(axis="y", labelsize=7.5)


def candidates(axis: Axes, record: Record) -> None:
    """The sum of the curves against the measured divergence."""
    points = [item for item in record.all_candidates() if item.kl_additive is not None and item.kl_additive > 0]
    axis.loglog([item.kl_additive for item in points], [item.kl_search for item in points], "o", color=FOUND, ms=3.5)
    low, high = min(item.kl_additive for item in points), max(item.kl_additive for item in points)
    axis.plot([low, high], [low, high], "--", color=FAINT, linewidth=1)
    axis.set(title="3 · KL ≈ sum of curves", xlabel="KL by the sum, nats", ylabel="KL measured")


def front(axis: Axes, record: Record, budget: float) -> None:
    for points, color, line, label in (
        (record.front, FOUND, "-", "strategies"),
        (record.uniform_front, UNIFORM, "--", "fewer tokens"),
    ):
        axis.plot(*np.array(points).T, line, color=color, label=label)
    axis.axvline(budget, color=FAINT, linestyle=":", linewidth=1.2)
    axis.set_yscale("symlog", linthresh=1e-3)
    axis.set_ylim(0)
    axis.set(title="4 · least KL under a budget", xlabel="share of the FLOPs", ylabel="KL by the sum")
    axis.legend()


def confirmation(axis: Axes, record: Record) -> None:
    """Held-out KL with 95 % intervals."""
    for offset, color, marker, label in ((-0.07, FOUND, "o", "found"), (0.07, UNIFORM, "s", "fewer tokens")):
        for place, result in enumerate(record.results):
            part = result if label == "found" else result.uniform
            assert part is not None
            assert part.kl_heldout_ci95 is not None
            low, high = part.kl_heldout_ci95
            axis.plot([place + offset] * 2, [low, high], color=color)
            axis.plot(place + offset, part.kl_heldout, marker, color=color, label=label if place == 0 else None)
    axis.set_xticks(range(len(record.results)), [item.budget.text for item in record.results])
    axis.set(title="5 · confirmed on new samples", xlabel="budget, share of the FLOPs", ylabel="held-out KL, nats")
    axis.set_ylim(0)
    axis.legend(loc="upper left")


def text(axis: Axes) -> None:
    axis.axis("off")
    axis.set_title("6 · run")
    lines = "with dop.pruned(model, s):\n    model.generate(**x)"
    axis.text(0, 0.72, lines, family="monospace", fontsize=9, color=INK)
    note = (
        "skipped operations are never\ncomputed, skipped keys and values\nnever cached; text tokens keep\nall of theirs"
    )
    axis.text(0, 0.15, note, fontsize=9, color=INK)


def arrow(figure: Figure, start: Axes) -> None:
    """A short one, right of ``start``."""
    style = {"arrowstyle": "-|>", "color": INK, "mutation_scale": 13, "linewidth": 1.3}
    ends = (1.03, 0.3), (1.14, 0.3)
    figure.add_artist(ConnectionPatch(*ends, "axes fraction", "axes fraction", axesA=start, axesB=start, **style))


if __name__ == "__main__":
    main()
