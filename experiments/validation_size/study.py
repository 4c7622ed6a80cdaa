"""How many samples a search should see, and which rule should choose among the best candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import Field, NonNegativeInt, PositiveInt

from dop_search.app.config import SearchConfig
from dop_search.app.config.section import Listed
from dop_search.app.report.style import FAINT, LOOKS, SMALLEST_KL, styled
from dop_search.app.results import ResultFile
from dop_search.app.study import Measured, Result, Study
from dop_search.app.workbench import Workbench
from dop_search.divergence.profiling import MeasuredProfile
from dop_search.search.additive_exact import additive_exact
from dop_search.strategy.cost import Budget
from dop_search.utils.errors import ConfigError
from experiments.validation_size.rules import (
    RULE_NAMES,
    compare_rules,
    measured_budgets,
    measured_rows,
    on_samples,
    search_each,
)

_DEPTHS = {"q_depth": "queries", "kv_depth": "keys, values", "attention_depth": "attention", "mlp_depth": "MLP"}


class ValidationSize(Study):
    """Searches on random subsets of the search samples (``data.num_samples``), scored on the held-out ones."""

    question = "How many search samples does a strategy need, and which rule should choose among the best candidates?"
    rows = "searches on subsets"
    adds_rows = frozenset({"sizes"})

    sizes: Annotated[Listed[Annotated[int, Field(ge=2)]], Field(min_length=1)] = (8, 16, 32, 64, 128, 256)
    """Search samples; all of them are one draw, fewer are ``num_draws`` draws without repetition."""
    num_draws: PositiveInt = 6
    """Random subsets per size."""
    num_resamples: NonNegativeInt = 100
    """Bootstrap resamples of the additive optimum per size; 0: none."""

    def check(self, config: SearchConfig) -> None:
        """See base class."""
        if max(self.sizes) > config.data.num_samples:
            raise ConfigError(
                f"`sizes` must be between 2 and data.num_samples, but got (sizes={list(self.sizes)}, "
                f"data.num_samples={config.data.num_samples}); set data.num_samples={max(self.sizes)}"
            )

    def keys(self, bench: Workbench) -> list[dict[str, Any]]:
        """See base class."""
        return [{"num_samples": size, "budget": budget} for budget in bench.budgets for size in self.sizes]

    def row(self, bench: Workbench, num_samples: int, budget: float) -> Measured:
        """See base class."""
        whole, pool = bench.profile(), bench.config.data.num_samples
        rng = np.random.default_rng([bench.config.seed, num_samples])
        count = 1 if num_samples == pool else self.num_draws
        draws = [np.sort(rng.permutation(pool)[:num_samples]) for _ in range(count)]
        values, samples = search_each(bench, [on_samples(whole, draw) for draw in draws], budget)
        resamples = [rng.integers(0, pool, num_samples) for _ in range(self.num_resamples)]
        return {**values, "stability": _stability(whole, resamples, budget)}, samples

    def summarize(self, bench: Workbench, results: ResultFile) -> dict[str, Any]:
        """See base class."""
        return compare_rules(results, self.keys(bench))

    @staticmethod
    def figures(result: Result) -> dict[str, Figure]:
        """``validation_size``: per budget, KL by rule, the differences between rules, and where the optimum lies."""
        budgets = measured_budgets(result)
        if not budgets:
            return {}
        with styled():
            figure = Figure(figsize=(10.6, 0.8 + 2.5 * len(budgets)), layout="constrained")
            panels = figure.subplots(len(budgets), 3, squeeze=False)
            for line, budget in zip(panels, budgets, strict=True):
                rows = measured_rows(result, budget, "num_samples")
                sizes = np.array([row["num_samples"] for row in rows], dtype=float)
                _levels(line[0], rows, sizes)
                _differences(line[1], rows, sizes)
                _draw_stability(line[2], rows, sizes)
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


def _stability(whole: MeasuredProfile, resamples: Sequence[np.ndarray], budget: float) -> dict[str, Any]:
    """Where the additive optimum of resampled curves lies: 5th, 50th and 95th percentile of every parameter."""
    limit = Budget(flops_ratio=budget)
    optima = [dict(additive_exact(on_samples(whole, i).problem(limit), limit).assignment) for i in resamples]
    found = Counter(tuple(sorted(item.items())) for item in optima)
    return (
        {}
        if not optima
        else {
            **{
                parameter.name: np.percentile([item[parameter.name] for item in optima], (5, 50, 95))
                for parameter in whole.space.parameters
            },
            "num_distinct": len(found),
            "share_of_most_frequent": found.most_common(1)[0][1] / len(optima),
        }
    )


# -- panels ----------------------------------------------------------------------------------------


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


def _draw_stability(axis: Axes, rows: Sequence[Mapping[str, Any]], sizes: np.ndarray) -> None:
    known = [name for name in _DEPTHS if name in rows[0].get("stability", {})]
    for index, name in enumerate(known):
        look = LOOKS[index]
        low, middle, high = np.array([row["stability"][name] for row in rows], dtype=float).T
        x = sizes * 2.0 ** (0.14 * (index - 1))
        axis.vlines(x, low, high, color=look.color, linewidth=1.2)
        axis.plot(x, middle, color=look.color, marker=look.marker, linestyle="", label=_DEPTHS[name])
    axis.set_ylabel("exit depth (median, 5–95 %)")
