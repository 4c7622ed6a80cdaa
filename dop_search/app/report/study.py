"""Optuna's own pictures of the studies behind a search: how it went, what was tried, what mattered, and the front."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dop_search.app.record import Record, Result
from dop_search.app.report.style import SMALLEST_KL, plain_decades, styled

STUDIES_FILE = "studies.journal"
"""The studies of a run, in its directory; ``optuna-dashboard`` reads it."""
PICTURES = {
    "history": (
        "How the search went",
        "Optuna's history of the study: the search KL of each trial that fits, in order, and the best so far.",
        "Optimization history: {}; the line of the best so far falls step by step.",
    ),
    "parallel": (
        "What was tried",
        "Optuna's parallel coordinates: a line is a trial, darker with less KL; None: not in its space.",
        "Parallel coordinates of objective and parameters: {}.",
    ),
    "importances": (
        "What mattered",
        "Optuna's importances of the parameters that all trials have, for the logarithm of the search KL.",
        "Bars: importance of each parameter for the search KL; {}.",
    ),
    "front": (
        "The trials under the constraint",
        "Cost and search KL of every trial; grey are those above the budget, whose KL is the additive estimate.",
        "Points: search KL over cost, trials that fit, above the budget, and the best; {}.",
    ),
}
"""Kind → heading, caption, and what the picture shows, for those who do not see it."""
SIZE_IN = (9.0, 4.6)


def study_figures(record: Record, run_dir: Path) -> dict[str, Figure]:
    """``study_KIND-BUDGET``: pictures of each result's study, where ``run_dir`` has it."""
    path = run_dir / STUDIES_FILE
    if not path.exists():
        return {}
    import optuna

    from dop_search.search.optuna_study import open_storage, quiet_optuna

    drawn: dict[str, Figure] = {}
    with quiet_optuna(), styled(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all of optuna.visualization.matplotlib is experimental
        storage = open_storage(path)
        for result in record.results:
            if result.study is not None:
                study = optuna.load_study(study_name=result.study, storage=storage)
                for kind, figure in _draw(study, result).items():
                    drawn[study_figure_name(kind, result)] = figure
    return drawn


def study_figure_name(kind: str, result: Result) -> str:
    """Name of a picture of a result's study, also of its file."""
    return f"study_{kind}-{result.budget.text.replace(' ', '-')}"


def _draw(study: Any, result: Result) -> dict[str, Figure]:
    """Of the trials that fit and were measured on all samples; the front has those above the budget, too."""
    import matplotlib.pyplot as plt
    import optuna
    from optuna.visualization import matplotlib as pictures

    priced = [t for t in study.get_trials(deepcopy=False) if t.value is not None and "candidate" in t.user_attrs]
    measured = optuna.create_study()
    measured.add_trials([t for t in priced if t.user_attrs["candidate"]["fits"] and t.state.name == "COMPLETE"])
    values = [trial.value for trial in measured.trials]
    if len({*values}) < 2:
        return {}
    what = "KL on the search samples (nats)"
    log10: dict[str, Any] = {"target": lambda trial: math.log10(max(trial.value, SMALLEST_KL))}
    log10["target_name"] = "log10 of the KL (nats)"
    everything = optuna.create_study()
    everything.add_trials([trial for trial in priced if trial.state.name == "COMPLETE"])
    limit = max(trial.user_attrs["candidate"]["cost_ratio"] for trial in measured.trials)
    makers: Mapping[str, Callable[[], Any]] = {
        "history": lambda: pictures.plot_optimization_history(measured, target_name=what),
        "parallel": lambda: pictures.plot_parallel_coordinate(measured, **log10),
        "importances": lambda: pictures.plot_param_importances(measured, **log10),
        "front": lambda: pictures.plot_pareto_front(
            everything,
            targets=lambda trial: (trial.user_attrs["candidate"]["cost_ratio"], trial.value),
            target_names=["cost, share of the full model's", what],
            constraints_func=lambda trial: [trial.user_attrs["candidate"]["cost_ratio"] - limit],
        ),
    }
    drawn = {}
    for kind, make in makers.items():
        axis = make()
        if kind in ("history", "front"):
            axis.set_yscale("log")
            axis.set_ylim(bottom=max(SMALLEST_KL, 0.5 * min(value for value in values if value is not None)))
            plain_decades(axis.yaxis)
            axis.legend(loc="best")
        axis.set_title("", loc="center")
        axis.set_title(f"{PICTURES[kind][0]}, budget {result.budget.text}", loc="left")
        axis.figure.set_size_inches(*SIZE_IN)
        if kind == "parallel":
            axis.grid(visible=False, axis="y")
            axis.figure.autofmt_xdate(rotation=20)
        axis.figure.tight_layout()
        drawn[kind] = axis.figure
        plt.close(axis.figure)
    return drawn


def study_alt_text(kind: str, result: Result) -> str:
    """What a picture shows, for those who do not see it."""
    best = min(item.kl_search for item in result.candidates)
    what = f"{len(result.candidates)} measured strategies at {result.budget.text}, the least search KL {best:.2g} nats"
    return PICTURES[kind][2].format(what)
