"""Answers that pruning loses: by family, and some of the pictures with the visual tokens that were kept."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from dop_search.app.report.style import FOUND, UNIFORM, styled

COLOR_STEP = 32
"""Colours are drawn in steps of this, so that noise in a picture does not make the file large."""
MAX_COLUMNS = 3
COLORS = {"found": FOUND, "uniform": UNIFORM}


def figures(result: Mapping[str, Any]) -> dict[str, Figure]:
    """``by_family``: lost answers per family; ``pictures``: some of them."""
    rows = [row for row in result["rows"] if "lost" in row]
    if not rows:
        return {}
    made = {"by_family": _by_family(rows)}
    if any(row["pictures"] for row in rows):
        made["pictures"] = _pictures(rows)
    return made


def _by_family(rows: list[Mapping[str, Any]]) -> Figure:
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    families = list(rows[0]["asked"])
    with styled():
        figure = Figure(figsize=(4.4 * len(budgets) + 0.6, 1.3 + 0.24 * len(families)), layout="constrained")
        panels = figure.subplots(1, len(budgets), squeeze=False, sharey=True)[0]
        for axis, budget in zip(panels, budgets, strict=True):
            for index, row in enumerate(item for item in rows if item["budget"] == budget):
                lost = [row["lost"][family] for family in families]
                place = np.arange(len(families)) + 0.38 * (index - 0.5)
                hatch = None if row["method"] == "found" else "////"
                name = f"{row['method']}: {row['num_lost']} of {row['num_full_right']}"
                axis.barh(place, lost, 0.36, color=COLORS[row["method"]], hatch=hatch, edgecolor="white", label=name)
            axis.set_title(f"budget {budget:g}")
            axis.set_xlabel("answers lost (right by the full model, wrong when pruned)")
            axis.legend(loc="best")
        panels[0].set_yticks(range(len(families)), [f"{name} ({rows[0]['asked'][name]})" for name in families])
        panels[0].invert_yaxis()
    return figure


def _pictures(rows: list[Mapping[str, Any]]) -> Figure:
    rows = [row for row in rows if row["pictures"]]
    columns = min(MAX_COLUMNS, max(len(row["pictures"]) for row in rows))
    with styled():
        width, height = 1.4 * columns + 0.1, 2.0 * len(rows) + 0.1
        figure = Figure(figsize=(width, height))
        grid = figure.subplots(len(rows), columns, squeeze=False)
        figure.subplots_adjust(0.05 / width, 0.3 / height, 1.0 - 0.05 / width, 1.0 - 0.5 / height, 0.07, 0.55)
        for line, row in zip(grid, rows, strict=True):
            for axis in line:
                axis.set_axis_off()
            for axis, picture in zip(line, row["pictures"], strict=False):
                _draw(axis, picture)
            heading = f"{row['method']} at {row['budget']:g}: {row['strategy']} (grey: dropped)"
            line[0].text(0.0, 1.22, heading, transform=line[0].transAxes, fontsize=7.5, fontweight="bold")
    return figure


def _draw(axis: Axes, picture: Mapping[str, Any]) -> None:
    """The image, grey where its visual tokens were dropped."""
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["png"]))).convert("RGB"))
    axis.imshow(image // COLOR_STEP * COLOR_STEP, interpolation="nearest")
    if picture["grid"] is not None:
        height, width = image.shape[:2]
        dropped = np.ones(picture["grid"])
        dropped.reshape(-1)[picture["kept"]] = 0.0
        veil = np.zeros((*dropped.shape, 4))
        veil[..., :3], veil[..., 3] = 0.5, 0.9 * dropped
        axis.imshow(veil, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest")
    question = textwrap.wrap(_shown(picture["question"].split("\n")[0]), 28, max_lines=2, placeholder=" …")
    axis.set_title("\n".join([*[""] * (2 - len(question)), *question]), fontsize=6.0, fontweight="normal", pad=3.0)
    answers = (f"{name}: {_shown(picture[name])}" for name in ("full", "pruned"))
    text = "\n".join(answer if len(answer) <= 28 else answer[:27] + "…" for answer in answers)
    axis.text(0.0, -0.03, text, transform=axis.transAxes, va="top", fontsize=6.0)


def _shown(text: str) -> str:
    """Without what the font lacks, and nothing that matplotlib reads as a formula."""
    return "".join(char if char.isascii() else "□" for char in text).replace("$", r"\$")
