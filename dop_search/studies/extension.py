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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from dop_search.app.results import ResultFile, Row
from dop_search.app.workbench import Workbench
from dop_search.baselines import FittedMethod
from dop_search.evaluation.accuracy import relative_family_mean
from dop_search.search import Solution, rerank_all, solve
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget
from dop_search.utils.errors import BudgetError, ConfigError
from dop_search.utils.statistics import bootstrap_ci95

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


def extension_study(
    bench: Workbench,
    results: ResultFile,
    extension: Extension,
    levels: Mapping[str, Sequence[int]],
    num_candidates: int = 12,
) -> None:
    """Measure the curves of the extension, then search with it and without.

    Args:
        bench: the model and its samples.
        results: where the rows go.
        extension: what is searched beside the visual tokens' operations.
        levels: depths of each parameter at which its curve is measured, the full one included.
        num_candidates: of each sum that exact KL chooses among.
    """
    keys = [
        {"part": CURVE, "parameter": name, "depth": depth}
        for name, its in levels.items()
        for depth in its
        if depth != extension.full[name]
    ]
    full = Strategy.full(bench.num_layers, selector=bench.selector().name)

    def method(strategy: Strategy, depths: Depths, budget: float = 1.0) -> FittedMethod:
        ratio = extension.ratio(strategy, depths)
        return FittedMethod("extension", budget, ratio, {}, runtime=lambda m: extension.apply(m, strategy, depths))

    def curve(part: str, parameter: str, depth: int) -> Row:
        depths = {**extension.full, parameter: depth}
        divergence = bench.outcome(method(full, depths), "search").divergence
        return {
            "flops_ratio": extension.ratio(full, depths),
            "kl_search": float(divergence.mean()),
            "kl_search_median": float(np.median(divergence)),
        }

    with bench.watch() as notify:
        rows = results.measure(keys, curve, notify, "operations varied alone", group="parameter")
    curves = {name: {extension.full[name]: 0.0} for name in levels}
    for row in rows:
        if "kl_search" in row:
            curves[row["parameter"]][row["depth"]] = row["kl_search"]

    def search(part: str, variant: str, budget: float) -> tuple[Row, np.ndarray]:
        if variant == VISUAL:
            best, num_runs = _visual_only(bench, extension, budget, num_candidates)
            candidates = [best]
        else:
            candidates, num_runs = best_sums(bench, extension, curves, budget, num_candidates)
            num_runs += len(candidates) + len(keys)
        exact = []
        with bench.watch(f"{variant} at {budget:g}: ") as notify:
            for index, item in enumerate(candidates):
                notify(index, len(candidates), "exact divergence")
                its = bench.outcome(method(item.strategy, item.depths), "search")
                exact.append(float(its.divergence.mean()))
        found = candidates[int(np.argmin(exact))]
        fitted = method(found.strategy, found.depths, budget)
        outcome = bench.outcome(fitted)
        right, families = bench.correct_after(fitted, outcome), [s.family for s in bench.data("heldout").samples]
        return {
            "strategy": found.describe(),
            "depths": dict(found.depths),
            "flops_ratio": fitted.flops_ratio,
            "kl_additive": found.kl_additive,
            "kl_search": min(exact),
            "kl_heldout": float(outcome.divergence.mean()),
            "kl_ci95": bootstrap_ci95(outcome.divergence, bench.config.seed),
            "accuracy": float(right.mean()),
            "relative_mean": relative_family_mean(right, bench.correct(None, "heldout"), families),
            "num_validation_runs": bench.profile().curves.num_validation_runs + num_runs,
        }, outcome.divergence

    searches = [
        {"part": SEARCH, "variant": variant, "budget": budget}
        for budget, variant in itertools.product(bench.budgets, (VISUAL, BOTH))
    ]
    with bench.watch() as notify:
        results.measure(searches, search, notify, "searches with and without", group="budget")
    results.summarize({"both_minus_visual": list(_differences(bench, results))})


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


def _differences(bench: Workbench, results: ResultFile) -> Iterator[Row]:
    """Held-out KL with the extension minus without, with paired intervals; below 0 the extension helps."""
    for budget in bench.budgets:
        without, both = (
            results.per_sample({"part": SEARCH, "variant": variant, "budget": budget}) for variant in (VISUAL, BOTH)
        )
        if without is not None and both is not None:
            ci95 = bootstrap_ci95(both - without, bench.config.seed)
            yield {"budget": budget, "difference": float((both - without).mean()), "ci95": ci95}


def checked_levels(full: Mapping[str, int], num_levels: int) -> dict[str, list[int]]:
    """Exit depths from 0 to the full one, evenly, and the one below the full one.

    Raises:
        ConfigError: if fewer than two are asked for.
    """
    if num_levels < 2:
        raise ConfigError(f"`num_levels >= 2` must hold, but got {num_levels}")
    return {
        name: sorted({*(round(x) for x in np.linspace(0, depth, num_levels)), depth - 1})
        for name, depth in full.items()
    }
