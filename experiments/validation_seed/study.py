"""Whether other search samples of the same kind give the same strategy."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from pydantic import field_validator

from dop_search.app.config.section import Listed
from dop_search.app.report.style import LOOKS, SMALLEST_KL, plain_decades, styled
from dop_search.app.results import ResultFile
from dop_search.app.study import Measured, Result, Study
from dop_search.app.workbench import Workbench
from dop_search.utils.errors import ConfigError
from experiments.validation_size.rules import RULE_NAMES, compare_rules, measured_budgets, measured_rows, search_each


class ValidationSeed(Study):
    """The same search on ``data.num_samples`` search samples of other seeds, scored on the same held-out samples."""

    question = "Do search samples of another seed give another strategy?"
    rows = "searches on other samples"
    group = ("seed",)
    adds_rows = frozenset({"seeds"})

    seeds: Listed[int] = (0, 1, 2, 3)
    """Of the search samples."""

    @field_validator("seeds")
    @classmethod
    def _differ(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < 2 or len(set(value)) < len(value):
            raise ValueError(f"must be two or more different ones, but got {list(value)}; e.g. [0,1,2]")
        return value

    def keys(self, bench: Workbench) -> list[dict[str, Any]]:
        """See base class."""
        return [{"seed": seed, "budget": budget} for budget in bench.budgets for seed in self.seeds]

    def row(self, bench: Workbench, seed: int, budget: float) -> Measured:
        """See base class; a seed whose search samples are among the held-out ones is refused."""
        check_other_seed(bench, seed)
        return search_each(bench, [bench.profile(seed=seed)], budget)

    def summarize(self, bench: Workbench, results: ResultFile) -> dict[str, Any]:
        """See base class."""
        return compare_rules(results, self.keys(bench))

    @staticmethod
    def figures(result: Result) -> dict[str, Figure]:
        """``validation_seed``: per budget, search and held-out KL of each seed's choice by each rule."""
        budgets = measured_budgets(result)
        if not budgets:
            return {}
        with styled():
            figure = Figure(figsize=(4.6 * len(budgets), 3.6), layout="constrained")
            for axis, budget in zip(figure.subplots(1, len(budgets), squeeze=False)[0], budgets, strict=True):
                rows = measured_rows(result, budget, "seed")
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


def check_other_seed(bench: Workbench, seed: int) -> None:
    """Refuse, by ConfigError, a seed of whose search samples some are held out, as in a file that is shuffled."""
    shared = {*bench.data("search", seed=seed).ids} & {*bench.data("heldout").ids}
    if shared:
        raise ConfigError(
            f"{len(shared)} search samples of seed {seed} are held-out samples of seed {bench.config.data.seed}, "
            f"e.g. {min(shared)!r}; leave that seed out (study.options.seeds), or use experiment=validation_size, "
            "whose subsets are of one search set"
        )
