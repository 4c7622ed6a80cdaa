"""Figures and tables of studies, drawn from ``result.json`` alone: one file per study."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from dop_search.app.report.studies import (
    additive_vs_exact,
    claims,
    compare,
    depthwise_vs_free,
    extension,
    failures,
    long_answers,
    objective,
    selectors,
    solver,
    split_attention,
    transfer,
    validation,
)
from dop_search.app.report.style import save_figure

Result = Mapping[str, Any]
"""The content of a study's ``result.json``."""

FIGURES: Mapping[str, Callable[[Result], dict[str, Figure]]] = MappingProxyType(
    {
        "additive_vs_exact": additive_vs_exact.figures,
        "compare": compare.figures,
        "depthwise_vs_free": depthwise_vs_free.figures,
        "failures": failures.figures,
        "long_answers": long_answers.figures,
        "objective": objective.figures,
        "selectors": selectors.figures,
        "solver": solver.figures,
        "split_attention": split_attention.figures,
        "text_operations": extension.figures,
        "transfer": transfer.figures,
        "validation_seed": validation.seed_figures,
        "validation_size": validation.size_figures,
        "validation_source": validation.source_figures,
        "vision_tower": extension.figures,
    }
)
TABLES: Mapping[str, Callable[[Result], Table]] = MappingProxyType(
    {
        "claims": claims.table,
        "compare": compare.table,
        "objective": objective.table,
    }
)


def draw_study(result: Result, folder: Path) -> list[Path]:
    """Write a study's figures as PNG into its folder; a study without rows has none.

    Returns:
        The files written.
    """
    make = FIGURES.get(result["study"])
    if make is None or not result["rows"]:
        return []
    paths = []
    for name, figure in make(result).items():
        paths.append(folder / f"{name}.png")
        save_figure(figure, paths[-1])
    return paths


def study_table(result: Result) -> Table | None:
    """What a study found, for a terminal; ``None`` for studies that only draw."""
    make = TABLES.get(result["study"])
    return None if make is None else make(result)
