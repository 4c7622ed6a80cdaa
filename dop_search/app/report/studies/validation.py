"""Figures of the studies of search samples: how many, other seeds, other questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dop_search.app.report.style import FAINT, LOOKS, SMALLEST_KL, plain_decades, styled

RULE_NAMES = {
    "additive": "additive optimum",
    "rerank": "least KL (re-ranked)",
    "one_se": "within one standard error",
    "root": "least mean of √KL",
}
_SMALLEST_DRAWN = 0.01
_DEPTHS = {"q_depth": "queries", "kv_depth": "keys, values", "attention_depth": "attention", "mlp_depth": "MLP"}


def size_figures(result: Mapping[str, Any]) -> dict[str, Figure]:
    """``validation_size``: per budget, KL by rule, the differences between rules, and where the optimum lies."""
    budgets = _budgets(result)
    if not budgets:
        return {}
    with styled():
        figure = Figure(figsize=(10.6, 0.8 + 2.5 * len(budgets)), layout="constrained")
        panels = figure.subplots(len(budgets), 3, squeeze=False)
        for line, budget in zip(panels, budgets, strict=True):
            rows = _rows(result, budget, "num_samples")
            sizes = np.array([row["num_samples"] for row in rows], dtype=float)
            _levels(line[0], rows, sizes)
            _differences(line[1], rows, sizes)
            _stability(line[2], rows, sizes)
            line[0].set_ylabel(f"budget {budget:g}\nKL (nats)")
            for axis in line:
                axis.set_xscale("log", base=2)
                axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
        for axis, title in zip(
            panels[0],
            (
                "held-out KL (dots: draws)",
                "difference to the additive optimum",
                "additive optimum, resampled",
            ),
            strict=True,
        ):
            axis.set_title(title)
        for axis in panels[-1]:
            axis.set_xlabel("search samples")
        handles, labels = panels[0][0].get_legend_handles_labels()
        depths, names = panels[0][2].get_legend_handles_labels()
        labels += [f"right: exit depth, {name}" for name in names]
        figure.legend([*handles, *depths], labels, loc="outside lower left", ncols=4)
    return {"validation_size": figure}


def seed_figures(result: Mapping[str, Any]) -> dict[str, Figure]:
    """``validation_seed``: per budget, search and held-out KL of each seed's choice by each rule."""
    budgets = _budgets(result)
    if not budgets:
        return {}
    with styled():
        figure = Figure(figsize=(4.6 * len(budgets), 3.6), layout="constrained")
        for axis, budget in zip(figure.subplots(1, len(budgets), squeeze=False)[0], budgets, strict=True):
            rows = _rows(result, budget, "seed")
            for index, (rule, name) in enumerate(RULE_NAMES.items()):
                look, x = LOOKS[index], np.arange(len(rows)) + 0.16 * (index - 1.5)
                values = [max(row["kl_heldout"][rule], SMALLEST_KL) for row in rows]
                searched = [max(row["kl_search"][rule], SMALLEST_KL) for row in rows]
                axis.vlines(x, searched, values, color=look.color, linewidth=0.8)
                axis.plot(x, values, color=look.color, marker=look.marker, linestyle="", label=name)
                axis.plot(x, searched, color=look.color, marker="_", linestyle="", markersize=7.0)
            axis.set_yscale("log")
            axis.set_xticks(range(len(rows)), [str(row["seed"]) for row in rows])
            plain_decades(axis.yaxis)
            axis.set_title(f"budget {budget:g}")
            axis.set_xlabel("seed of the search samples")
            axis.set_ylabel("KL (nats)\nmarkers: held-out, bars: search samples")
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return {"validation_seed": figure}


def source_figures(result: Mapping[str, Any]) -> dict[str, Figure]:
    """``validation_source``: KL on the other families' questions, beside as many mixed search samples."""
    budgets = _budgets(result)
    if not budgets:
        return {}
    count = max(len(_rows(result, budget, "family")) for budget in budgets)
    with styled():
        figure = Figure(figsize=(5.2 * len(budgets), 1.4 + 0.26 * count), layout="constrained")
        for axis, budget in zip(figure.subplots(1, len(budgets), squeeze=False)[0], budgets, strict=True):
            rows = sorted(_rows(result, budget, "family"), key=lambda row: -float(row["kl_others"]))
            for y, row in enumerate(rows):
                low, high = row["difference_ci95"] or (-1.0, 1.0)
                sure = low > 0.0 or high < 0.0
                ends = [max(row[field], _SMALLEST_DRAWN) for field in ("kl_others_mixed", "kl_others")]
                color, width = ("black", 2.0) if sure else (FAINT, 0.8)
                axis.plot(ends, [y, y], zorder=1, color=color, linewidth=width)
            for field, look, name in (
                ("kl_others", LOOKS[0], "searched on this family, scored on the others"),
                ("kl_others_mixed", LOOKS[1], "searched on as many of all families, same questions"),
                ("kl_same_family", LOOKS[2], "searched on this family, scored on it"),
            ):
                points = [(row[field], y) for y, row in enumerate(rows) if row[field] is not None]
                x, y_ = zip(*((max(value, _SMALLEST_DRAWN), y) for value, y in points), strict=True)
                axis.plot(x, y_, color=look.color, marker=look.marker, linestyle="", label=name)
            axis.set_xscale("log")
            plain_decades(axis.xaxis)
            axis.set_yticks(range(len(rows)), [row["family"] for row in rows])
            axis.set_title(f"budget {budget:g}")
            axis.set_xlabel(f"held-out KL of the additive optimum (nats; {_SMALLEST_DRAWN:g}: that or less)")
        axis.plot([], [], color="black", linewidth=2.0, label="95 % interval of the difference without 0")
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return {"validation_source": figure}


# -- panels of validation_size ---------------------------------------------------------------------


def _levels(axis: Axes, rows: Sequence[Mapping[str, Any]], sizes: np.ndarray) -> None:
    for index, (rule, name) in enumerate(RULE_NAMES.items()):
        look = LOOKS[index]
        shift = 2.0 ** (0.09 * (index - 1.5))
        for size, row in zip(sizes, rows, strict=True):
            draws = np.maximum(row["kl_heldout_draws"][rule], SMALLEST_KL)
            axis.plot(np.full(len(draws), size * shift), draws, ".", color=look.color, markersize=2.0, alpha=0.6)
        values = [max(row["kl_heldout"][rule], SMALLEST_KL) for row in rows]
        axis.plot(sizes * shift, values, color=look.color, marker=look.marker, linestyle=look.line, label=name)
    searched = [max(row["kl_search"]["rerank"], SMALLEST_KL) for row in rows]
    axis.plot(sizes, searched, color=FAINT, linewidth=1.2, label="least KL, on the search samples")
    axis.set_yscale("log")


def _differences(axis: Axes, rows: Sequence[Mapping[str, Any]], sizes: np.ndarray) -> None:
    for index, rule in enumerate(RULE_NAMES):
        if rule == "additive":
            continue
        look, shift = LOOKS[index], 2.0 ** (0.14 * (index - 2))
        means = np.array([row["kl_heldout"][rule] - row["kl_heldout"]["additive"] for row in rows])
        low, high = np.array([row["difference_ci95"][rule] for row in rows]).T
        axis.vlines(sizes * shift, low, high, color=look.color, linewidth=1.2)
        axis.plot(sizes * shift, means, color=look.color, marker=look.marker, linestyle="")
    axis.axhline(0.0, color=FAINT, linewidth=0.8)
    axis.set_ylabel("difference (nats, 95 %)")


def _stability(axis: Axes, rows: Sequence[Mapping[str, Any]], sizes: np.ndarray) -> None:
    known = [name for name in _DEPTHS if name in rows[0].get("stability", {})]
    for index, name in enumerate(known):
        look = LOOKS[index]
        low, middle, high = np.array([row["stability"][name] for row in rows], dtype=float).T
        x = sizes * 2.0 ** (0.14 * (index - 1))
        axis.vlines(x, low, high, color=look.color, linewidth=1.2)
        axis.plot(x, middle, color=look.color, marker=look.marker, linestyle="", label=_DEPTHS[name])
    axis.set_ylabel("exit depth (median, 5–95 %)")


def _budgets(result: Mapping[str, Any]) -> list[float]:
    return list(dict.fromkeys(row["budget"] for row in result["rows"] if _is_measured(row)))


def _is_measured(row: Mapping[str, Any]) -> bool:
    return "infeasible" not in row and "failed" not in row


def _rows(result: Mapping[str, Any], budget: float, by: str) -> list[Mapping[str, Any]]:
    """The measured rows of a budget (not those out of reach), ascending."""
    measured = [row for row in result["rows"] if row["budget"] == budget and _is_measured(row)]
    return sorted(measured, key=lambda row: row[by])
