"""When operation pruning fails: questions that the full model answers and the pruned one does not.

The found strategy and uniform token reduction at the same FLOPs, on the test samples, with a few of the pictures and
the visual tokens that were kept.
"""

from __future__ import annotations

import base64
import io
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from pydantic import NonNegativeInt

from dop_search.app.report.style import FOUND, UNIFORM, styled
from dop_search.app.results import ResultFile, Row
from dop_search.app.study import Measured, Result, Study
from dop_search.app.workbench import Workbench
from dop_search.data.samples import Sample
from dop_search.evaluation.accuracy import correct_answers
from dop_search.search.rerank import rerank
from dop_search.search.solution import uniform_strategy
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget
from dop_search.utils.intervals import mean_ci95

METHODS = ("found", "uniform")
MAX_SIDE_PX = 128
"""Pictures in the result are no larger."""


class Failures(Study):
    """Count and show the answers that pruning loses; one row per budget and method."""

    question = "Which answers does pruning lose, and do found strategies lose others than uniform reduction?"
    rows = "lost answers"
    reads = ("search", "test")
    judges = "test"

    num_pictures: NonNegativeInt = 4
    """Failures per row that are kept with their pictures, of different families as far as there are."""

    def keys(self, bench: Workbench) -> list[dict[str, Any]]:
        """See base class."""
        return [{"budget": budget, "method": method} for budget in bench.budgets for method in METHODS]

    def row(self, bench: Workbench, budget: float, method: str) -> Measured:
        """See base class."""
        samples, chosen = bench.data("test").samples, _strategy(bench, budget, method)
        before, after = bench.full_answers(), bench.answers(chosen)
        full, right = correct_answers(before, samples), correct_answers(after, samples)
        lost = full & ~right
        values: Row = {
            "strategy": chosen.describe(),
            "num_test": len(samples),
            "num_full_right": int(full.sum()),
            "num_lost": int(lost.sum()),
            "num_gained": int((right & ~full).sum()),
            "lost_ratio_ci95": mean_ci95(lost[full], bench.config.seed),
            "asked": _count(samples, full),
            "lost": _count(samples, lost),
        }
        shown = _of_different_families(samples, np.flatnonzero(lost), self.num_pictures)
        values["pictures"] = [_picture(bench, chosen, index, before[index], after[index]) for index in shown]
        return values, lost.astype(np.float64)

    def summarize(self, bench: Workbench, results: ResultFile) -> dict[str, Any]:
        """See base class."""
        return {"found_minus_uniform_ci95": _differences(results, results.budgets, bench.config.seed)}

    @staticmethod
    def figures(result: Result) -> dict[str, Figure]:
        """``by_family``: lost answers per family; ``pictures``: some of them."""
        rows = [row for row in result["rows"] if "lost" in row]
        if not rows:
            return {}
        made = {"by_family": _by_family(rows)}
        if any(row["pictures"] for row in rows):
            made["pictures"] = _pictures(rows)
        return made


def _strategy(bench: Workbench, budget: float, method: str) -> Strategy:
    limit = Budget(flops_ratio=budget)
    problem = bench.profile().problem(limit)
    if method == "uniform":
        return uniform_strategy(problem, limit)
    with bench.watch(f"budget {budget:g}: ") as notify:
        return rerank(problem, limit, on_progress=notify).strategy


def _differences(results: ResultFile, budgets: Sequence[float], seed: int) -> dict[str, Any]:
    """Per budget the 95 % interval of the share of test questions lost by found minus that lost by uniform, paired."""
    intervals = {}
    for budget in budgets:
        found, uniform = (results.per_sample({"budget": budget, "method": method}) for method in METHODS)
        if found is not None and uniform is not None:
            intervals[f"{budget:g}"] = mean_ci95(found - uniform, seed)
    return intervals


def _count(samples: Sequence[Sample], which: np.ndarray) -> dict[str, int]:
    counts = Counter(sample.family for sample, counted in zip(samples, which, strict=True) if counted)
    return {family: counts[family] for family in dict.fromkeys(sample.family for sample in samples)}


def _of_different_families(samples: Sequence[Sample], indices: np.ndarray, count: int) -> list[int]:
    """The first of every family, then the second, …"""
    seen: Counter[str] = Counter()
    turns = []
    for index in indices.tolist():
        turns.append((seen[samples[index].family], index))
        seen[samples[index].family] += 1
    return [index for _, index in sorted(turns)[:count]]


def _picture(bench: Workbench, strategy: Strategy, index: int, before: str, after: str) -> dict[str, Any]:
    """A failure to draw; ``kept`` are places on the ``grid`` of visual tokens, if the sample has one."""
    sample, encoded = bench.data("test").samples[index], bench.teacher("test").samples[index].encoded
    image = sample.images[0].copy()
    image.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    grids = [grid for image in bench.loaded.adapter.image_grids([encoded.num_visual])[0] for grid in image]
    count = strategy.num_kept(encoded.num_visual)
    whole = len(grids) == 1 and grids[0][0] * grids[0][1] == encoded.num_visual
    return {
        "id": sample.id,
        "family": sample.family,
        "question": sample.question,
        "answer": sample.answers[0],
        "full": before,
        "pruned": after,
        "grid": grids[0] if whole else None,
        "kept": np.sort(encoded.choice(count).order[:count]) if whole else None,
        "png": base64.b64encode(buffer.getvalue()).decode(),
    }


# -- figures ---------------------------------------------------------------------------------------


COLOR_STEP = 32
"""Colours are drawn in steps of this, so that noise in a picture does not make the file large."""
MAX_COLUMNS = 3
COLORS = {"found": FOUND, "uniform": UNIFORM}


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
