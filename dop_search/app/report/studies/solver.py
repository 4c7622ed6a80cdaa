"""Solvers at one budget: least KL so far over validation runs, and what was found on search and held-out samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dop_search.app.report.style import FOUND, LOOKS, SMALLEST_KL, UNIFORM, Look, plain_decades, styled

DRAWN = ("rerank", "tpe+warm", "gp+warm", "tpe", "gp", "random")
"""Solvers with a line; all others have a row in the right panel."""


def figures(result: Mapping[str, Any]) -> dict[str, Figure]:
    """``solver``: progress, and the end with runs and seconds."""
    rows = [row for row in result["rows"] if "kl_search" in row]
    with styled():
        figure = Figure(figsize=(9.6, 4.4), layout="constrained")
        progress, end = figure.subplots(1, 2, width_ratios=(1.0, 1.1))
        looks: dict[str, Look] = dict(zip(DRAWN, LOOKS, strict=True))
        for name, look in looks.items():
            for number, row in enumerate(row for row in rows if row["name"] == name and row["best_so_far"]):
                runs, values = zip(*row["best_so_far"], strict=True)
                progress.step(
                    [*runs, row["num_validation_runs"]],
                    np.maximum([*values, values[-1]], SMALLEST_KL),
                    where="post",
                    color=look.color,
                    linestyle=look.line,
                    label=None if number else name,
                )
        progress.set(
            yscale="log", xlabel="validation runs, curves included", ylabel="least KL so far, search set (nats)"
        )
        progress.set_title(f"Progress at {result['summary']['budget']:g} of the FLOPs")
        progress.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)
        _end(end, rows)
    return {"solver": figure}


def _end(axis: Axes, rows: list[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(row["name"] for row in rows))[::-1]
    for shift, field, color, marker, label in (
        (0.14, "kl_search", FOUND, "o", "search set"),
        (-0.14, "kl_heldout", UNIFORM, "s", "held-out"),
    ):
        its = [(max(row[field], SMALLEST_KL), names.index(row["name"]) + shift) for row in rows]
        axis.plot(*zip(*its, strict=True), marker, color=color, label=label)
    labels = []
    for name in names:
        of_name = [row for row in rows if row["name"] == name]
        runs, seconds = (np.mean([row[field] for row in of_name]) for field in ("num_validation_runs", "seconds"))
        labels.append(f"{name}: {runs:.0f} runs, {seconds:.0f} s")
    axis.set_yticks(range(len(names)), labels)
    axis.set(xscale="log", xlabel="KL of what was found (nats), one mark per seed")
    plain_decades(axis.xaxis)
    axis.set_title("The end")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
