"""Operations that a strategy does not express, searched together with those that it does, at equal FLOPs.

An extension has exit depths of its own. Each is varied alone on the search samples, and the divergences are added to
those of the visual tokens' operations, as in the paper's additive approximation: what one side saves the other may
spend. The best by the sum, and the best without the extension, are measured exactly; the least KL on the search samples
wins.
"""

from __future__ import annotations

import heapq
import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pydantic import Field, PositiveInt, PrivateAttr
from transformers import PreTrainedModel

from dop_search.app.report.style import LOOKS, SMALLEST_KL, styled
from dop_search.app.results import ResultFile, Row
from dop_search.app.study import Measured, Result, Study
from dop_search.app.workbench import Workbench
from dop_search.baselines import FittedMethod
from dop_search.search import Solution, rerank_all, solve
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget
from dop_search.utils.errors import BudgetError
from dop_search.utils.intervals import holm, mean_ci95, sign_flip_p
from experiments.compare.study import relative_family_mean

CURVE, SEARCH = "curve", "search"
"""Parts of the result: one parameter varied alone, and what a search found."""

VISUAL, BOTH = "visual", "both"
"""Variants of a search: visual tokens only, or with the extension."""

Depths = Mapping[str, int]

EXCESS = 1e-4
"""How far a strategy may be above its budget, relative to it: what is left for the decoder depends on the strategy."""

MAX_CORRECTIONS = 6
"""Times that the visual tokens' budget is corrected so that both together fit."""

CLOSE = 5e-4
"""Share of the decoder's FLOPs that may be left."""


class Extension(ABC):
    """Operations beside a strategy's.

    Attributes:
        full: exit depth of each parameter when nothing is skipped.
    """

    full: Mapping[str, int]

    @abstractmethod
    def ratio(self, strategy: Strategy, depths: Depths) -> float:
        """FLOPs relative to those of the full model, over the search samples."""

    @abstractmethod
    def apply(self, model: PreTrainedModel, strategy: Strategy, depths: Depths) -> AbstractContextManager[Any]:
        """The context in which ``model`` skips both."""

    @abstractmethod
    def decoder_ratio(self, ratio: float) -> float:
        """A share of the extension's total as a share of the full decoder's FLOPs."""

    def is_sensible(self, depths: Depths) -> bool:
        """Whether no other choice computes the same."""
        return True


@dataclass(frozen=True)
class Found:
    """A strategy with depths of the extension, by the sum of divergences."""

    strategy: Strategy
    depths: Depths
    kl_additive: float
    flops_ratio: float

    def describe(self) -> str:
        """One line for tables."""
        return self.strategy.describe() + " + " + " ".join(f"{name}≤{depth}" for name, depth in self.depths.items())


class ExtensionStudy(Study):
    """Measure the curves of an extension, then search with it and without."""

    judges = "heldout"

    num_levels: Annotated[int, Field(ge=2)] = 5
    """Depths per parameter at which its curve is measured, evenly from 0 to the full one, and the one below that."""
    num_candidates: PositiveInt = 12
    """Of the sums of divergences, measured exactly."""

    _extensions: list[Extension] = PrivateAttr(default_factory=list)
    _curves: dict[str, dict[int, float]] = PrivateAttr(default_factory=dict)

    @abstractmethod
    def make_extension(self, bench: Workbench) -> Extension:
        """What is searched beside the visual tokens' operations."""

    def extension(self, bench: Workbench) -> Extension:
        """The same, made once."""
        if not self._extensions:
            self._extensions.append(self.make_extension(bench))
        return self._extensions[0]

    def keys(self, bench: Workbench) -> list[dict[str, Any]]:
        """See base class: the curves, which the searches need, first."""
        full = self.extension(bench).full
        curves = [
            {"part": CURVE, "parameter": name, "depth": depth}
            for name, its in levels(full, self.num_levels).items()
            for depth in its
            if depth != full[name]
        ]
        searches = itertools.product(bench.budgets, (VISUAL, BOTH))
        return [*curves, *({"part": SEARCH, "variant": variant, "budget": budget} for budget, variant in searches)]

    def measure(self, bench: Workbench, results: ResultFile) -> None:
        """See base class."""
        keys = self.keys(bench)
        curves, searches = ([key for key in keys if key["part"] == part] for part in (CURVE, SEARCH))
        with bench.watch() as notify:
            rows = results.measure(curves, partial(self.row, bench), notify, "operations varied alone", ("parameter",))
        full = self.extension(bench).full
        self._curves.update({name: {depth: 0.0} for name, depth in full.items()})
        for row in rows:
            if "kl_search" in row:
                self._curves[row["parameter"]][row["depth"]] = row["kl_search"]
        with bench.watch() as notify:
            results.measure(searches, partial(self.row, bench), notify, "searches with and without", ("budget",))
        results.summarize({"both_minus_visual": _differences(bench, results)})

    def row(self, bench: Workbench, part: str, **key: Any) -> Measured:
        """See base class."""
        return self._curve(bench, **key) if part == CURVE else self._search(bench, **key)

    def _method(self, bench: Workbench, strategy: Strategy, depths: Depths, budget: float = 1.0) -> FittedMethod:
        extension = self.extension(bench)
        ratio = extension.ratio(strategy, depths)
        return FittedMethod("extension", budget, ratio, {}, runtime=lambda m: extension.apply(m, strategy, depths))

    def _curve(self, bench: Workbench, parameter: str, depth: int) -> Row:
        full = Strategy.full(bench.num_layers, selector=bench.selector().name)
        depths = {**self.extension(bench).full, parameter: depth}
        divergence = bench.outcome(self._method(bench, full, depths), "search").divergence
        return {
            "flops_ratio": self.extension(bench).ratio(full, depths),
            "kl_search": float(divergence.mean()),
            "kl_search_median": float(np.median(divergence)),
        }

    def _search(self, bench: Workbench, variant: str, budget: float) -> tuple[Row, np.ndarray]:
        extension = self.extension(bench)
        if variant == VISUAL:
            best, num_runs = _visual_only(bench, extension, budget, self.num_candidates)
            candidates = [best]
        else:
            candidates, num_runs = best_sums(bench, extension, self._curves, budget, self.num_candidates)
            num_runs += len(candidates) + sum(key["part"] == CURVE for key in self.keys(bench))
        exact = []
        with bench.watch(f"{variant} at {budget:g}: ") as notify:
            for index, item in enumerate(candidates):
                notify(index, len(candidates), "exact divergence")
                its = bench.outcome(self._method(bench, item.strategy, item.depths), "search")
                exact.append(float(its.divergence.mean()))
        found = candidates[int(np.argmin(exact))]
        fitted = self._method(bench, found.strategy, found.depths, budget)
        outcome = bench.outcome(fitted)
        right, families = bench.correct_after(fitted, outcome), [s.family for s in bench.data("heldout").samples]
        return {
            "strategy": found.describe(),
            "depths": dict(found.depths),
            "flops_ratio": fitted.flops_ratio,
            "kl_additive": found.kl_additive,
            "kl_search": min(exact),
            "kl_heldout": float(outcome.divergence.mean()),
            "kl_ci95": mean_ci95(outcome.divergence, bench.config.seed),
            "accuracy": float(right.mean()),
            "relative_mean": relative_family_mean(right, bench.correct(None, "heldout"), families),
            "num_validation_runs": bench.profile().curves.num_validation_runs + num_runs,
        }, outcome.divergence

    @staticmethod
    def figures(result: Result) -> dict[str, Figure]:
        """``STUDY``: KL over the exit depth of each parameter alone; held-out KL of what is found over the budget."""
        if not result["rows"]:
            return {}
        with styled():
            figure = Figure(figsize=(8.4, 3.9), layout="constrained")
            curves, found = figure.subplots(1, 2)
            _draw_curves(curves, result)
            _draw_found(found, result)
            handles, labels = curves.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=6, title="exit depths, left")
        return {result["study"]: figure}


def _visual_only(bench: Workbench, extension: Extension, budget: float, num_candidates: int) -> tuple[Found, int]:
    """The search without the extension, and how many validation runs it took beside the curves."""
    beside, profile = Strategy.full(bench.num_layers), bench.profile()
    limit = _left(bench, extension, budget, beside, extension.full)
    beside = solve("additive_exact", profile.problem(limit), limit).strategy  # near the one that is looked for
    limit = _left(bench, extension, budget, beside, extension.full)
    with bench.watch(f"visual tokens at {budget:g}: ") as notify:
        ranked = rerank_all(profile.problem(limit), limit, num_candidates, on_progress=notify)
    found = (_found(extension, item, extension.full, 0.0) for item in ranked)
    best = next((item for item in found if item.flops_ratio <= budget * (1 + EXCESS)), None)
    if best is None:
        raise BudgetError(f"no candidate fits into {budget:g} of the FLOPs together with the rest; allow more")
    return best, ranked[0].num_validation_runs


def _left(bench: Workbench, extension: Extension, budget: float, strategy: Strategy, depths: Depths) -> Budget:
    """What the decoder may spend when everything else costs what it costs beside ``strategy``.

    Raises:
        BudgetError: if nothing is left.
    """
    decoder = bench.profile().problem().cost_model.ratio(strategy)
    beside = extension.decoder_ratio(extension.ratio(strategy, depths)) - decoder
    left = extension.decoder_ratio(budget) - beside
    if left <= 0:
        raise BudgetError(f"{budget:g} of the FLOPs is less than what runs beside the decoder; allow more")
    return Budget(flops_ratio=min(left, 1.0))


def _found(extension: Extension, solution: Solution, depths: Depths, added: float) -> Found:
    strategy = replace(solution.strategy, model_fingerprint=None)
    return Found(strategy, depths, (solution.kl_additive or 0.0) + added, extension.ratio(strategy, depths))


def best_sums(
    bench: Workbench, extension: Extension, curves: Mapping[str, Mapping[int, float]], budget: float, count: int
) -> tuple[list[Found], int]:
    """The best pairs of strategy and depths by the sum of divergences, after what is found without the extension; and
    how many validation runs that took.

    Only depths are looked at that no others beat in both divergence and FLOPs beside that (or beside the full decoder,
    where nothing is found without).

    Raises:
        BudgetError: if no pair fits.
    """
    without, num_runs = [], 0
    try:
        found, num_runs = _visual_only(bench, extension, budget, count)
        without.append(found)
    except BudgetError:
        pass  # the extension may reach what the visual tokens alone cannot
    beside = without[0].strategy if without else Strategy.full(bench.num_layers)
    sums: dict[str, Found] = {}
    for added, depths in pareto_depths(extension, curves, beside):
        item = _fitted(bench, extension, budget, beside, depths, added)
        if item is not None:
            sums[item.describe()] = item
    for item in without:
        sums.pop(item.describe(), None)
    candidates = [*without, *heapq.nsmallest(count, sums.values(), key=lambda item: item.kl_additive)]
    if not candidates:
        raise BudgetError(f"nothing fits into {budget:g} of the FLOPs; allow more")
    return candidates, num_runs


def _fitted(
    bench: Workbench, extension: Extension, budget: float, beside: Strategy, depths: Depths, added: float
) -> Found | None:
    """The additive optimum beside these depths; ``None`` if nothing fits.

    What is left for the decoder depends, a little, on its own strategy, so that the limit is corrected a few times.
    """
    best: Found | None = None
    try:
        limit = _left(bench, extension, budget, beside, depths)
        for _ in range(MAX_CORRECTIONS):
            solution = solve("additive_exact", bench.profile().problem(limit), limit)
            item = _found(extension, solution, depths, added)
            if item.flops_ratio <= budget * (1 + EXCESS) and (best is None or item.kl_additive < best.kl_additive):
                best = item
            off = extension.decoder_ratio(budget - item.flops_ratio)
            if 0 <= off < CLOSE:
                break
            limit = Budget(flops_ratio=min(max(limit.value + off - CLOSE / 2, CLOSE), 1.0))
    except BudgetError:
        pass
    return best


def pareto_depths(
    extension: Extension, curves: Mapping[str, Mapping[int, float]], strategy: Strategy
) -> list[tuple[float, Depths]]:
    """Sums of divergences and depths, the cheapest last; each costs less than those before it."""
    choices = []
    for its in itertools.product(*curves.values()):
        depths = dict(zip(curves, its, strict=True))
        if extension.is_sensible(depths):
            added = sum(curves[name][depth] for name, depth in depths.items())
            choices.append((added, extension.ratio(strategy, depths), depths))
    front: list[tuple[float, Depths]] = []
    cheapest = float("inf")
    for added, ratio, depths in sorted(choices, key=lambda item: item[:2]):
        if ratio < cheapest:
            cheapest = ratio
            front.append((added, depths))
    return front


def _differences(bench: Workbench, results: ResultFile) -> list[Row]:
    """Held-out KL with the extension minus without, with paired intervals; below 0 the extension helps.

    ``p``: by sign flips, adjusted by Holm over the budgets.
    """
    found: list[Row] = []
    for budget in bench.budgets:
        without, both = (
            results.per_sample({"part": SEARCH, "variant": variant, "budget": budget}) for variant in (VISUAL, BOTH)
        )
        if without is not None and both is not None:
            ci95, p = mean_ci95(both - without, bench.config.seed), sign_flip_p(both - without)
            found.append({"budget": budget, "difference": float((both - without).mean()), "ci95": ci95, "p": p})
    for row, p in zip(found, holm([row["p"] for row in found]), strict=True):
        row["p"] = p
    return found


def levels(full: Mapping[str, int], num_levels: int) -> dict[str, list[int]]:
    """Exit depths from 0 to the full one, evenly, and the one below the full one."""
    return {
        name: sorted({*(round(x) for x in np.linspace(0, depth, num_levels)), depth - 1})
        for name, depth in full.items()
    }


# -- figures ---------------------------------------------------------------------------------------


VARIANTS = {"visual": "visual tokens only", "both": "both"}


def _draw_curves(axis: Axes, result: Result) -> None:
    rows = [row for row in result["rows"] if row["part"] == "curve" and "kl_search" in row]
    for index, name in enumerate(dict.fromkeys(row["parameter"] for row in rows)):
        its = sorted((row["depth"], max(row["kl_search"], SMALLEST_KL)) for row in rows if row["parameter"] == name)
        look = LOOKS[index % len(LOOKS)]
        axis.plot(*zip(*its, strict=True), color=look.color, marker=look.marker, label=name.replace("_", ", "))
    axis.set(yscale="log", xlabel="exit depth (layers)", ylabel="KL on the search samples (nats)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_title("One depth varied alone")


def _draw_found(axis: Axes, result: Result) -> None:
    for index, (variant, label) in enumerate(VARIANTS.items()):
        rows = [row for row in result["rows"] if row["part"] == "search" and row["variant"] == variant]
        its = sorted((row for row in rows if "kl_heldout" in row), key=lambda row: row["budget"])
        if its:
            look = LOOKS[index]
            budgets = [row["budget"] * (1 + 0.02 * (index - 0.5)) for row in its]
            low, high = ([max(row["kl_ci95"][side], SMALLEST_KL) for row in its] for side in (0, 1))
            axis.vlines(budgets, low, high, color=look.color, alpha=0.5)
            values = [max(row["kl_heldout"], SMALLEST_KL) for row in its]
            axis.plot(budgets, values, color=look.color, marker=look.marker, label=label)
    axis.set(yscale="log", xlabel="budget, share of the FLOPs", ylabel="KL on held-out samples (nats)")
    axis.set_title("What is found (95 %)")
    axis.legend()
