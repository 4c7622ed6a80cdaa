"""Queries and keys/values with one exit depth or two, and token groups by rank: what each freedom gains.

Every variant is searched in the same way: divergence curves, the 16 best by their sum and uniform reduction by exact
KL. ``kl_heldout_additive`` is the held-out KL of the sum's own optimum, which no exact KL has chosen.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from dop_search.app.results import ResultFile, Row
from dop_search.app.workbench import Workbench
from dop_search.divergence.profiling import Profile
from dop_search.search import rerank_all
from dop_search.strategy.cost import Budget
from dop_search.utils.errors import ConfigError
from dop_search.utils.statistics import bootstrap_ci95

SHARES = ((1.0,), (0.25, 0.75), (0.2, 0.3, 0.5))


def split_attention(
    bench: Workbench, results: ResultFile, shares: Sequence[Sequence[float]] = SHARES, num_candidates: int = 16
) -> None:
    """Search every variant at every budget and compare them in pairs on the same samples.

    Args:
        bench: the model and its samples.
        results: where the rows go.
        shares: of the kept tokens per group, one entry per number of groups.
        num_candidates: of the sum that exact KL chooses among.
    """
    by_groups = {len(item): tuple(float(share) for share in item) for item in shares}
    if not by_groups or len(by_groups) < len(shares):
        raise ConfigError(f"`shares` needs entries with different numbers of groups, but got {list(shares)}")

    def row(groups: int, split: bool, budget: float) -> tuple[Row, np.ndarray]:
        return _search(bench, _profile(bench, by_groups[groups], split), Budget(flops_ratio=budget), num_candidates)

    keys = [
        {"groups": groups, "split": split, "budget": budget}
        for groups, split, budget in itertools.product(by_groups, (False, True), bench.budgets)
    ]
    with bench.watch() as notify:
        results.measure(keys, row, notify, "tied and split attention", group="groups")
    results.sort(keys)
    results.summarize(_differences(bench, results, list(by_groups)))


def _profile(bench: Workbench, shares: tuple[float, ...], split: bool) -> Profile:
    if len(shares) == 1:
        return bench.profile("dop_split" if split else "dop")
    return bench.profile("dop_groups", shares=shares, split=split)


def _search(bench: Workbench, profile: Profile, budget: Budget, num_candidates: int) -> tuple[Row, np.ndarray]:
    problem = profile.problem(budget)
    with bench.watch(f"{profile.space.name} at {budget.value:g}: ") as notify:
        ranked = rerank_all(problem, budget, num_candidates, on_progress=notify)
    best = ranked[0]
    optimum = min(ranked, key=lambda solution: solution.kl_additive or 0.0)
    heldout, untouched = bench.divergence([best.strategy, optimum.strategy])
    return {
        "strategy": best.strategy.describe(),
        "flops_ratio": best.cost_ratio,
        "num_parameters": len(problem.space.parameters),
        "num_validation_runs": profile.curves.num_validation_runs + best.num_validation_runs,
        "kl_search": best.kl_search,
        "kl_heldout": float(heldout.mean()),
        "kl_heldout_median": float(np.median(heldout)),
        "kl_ci95": bootstrap_ci95(heldout, bench.config.seed),
        "kl_heldout_additive": float(untouched.mean()),
    }, heldout


def _differences(bench: Workbench, results: ResultFile, groups: Sequence[int]) -> dict[str, Any]:
    """Held-out KL between pairs of variants with paired intervals; below 0 the freer one is better."""

    def between(tied: dict[str, Any], free: dict[str, Any]) -> Row | None:
        a, b = results.per_sample(tied), results.per_sample(free)
        if a is None or b is None:
            return None
        return {"difference": float((b - a).mean()), "ci95": bootstrap_ci95(b - a, bench.config.seed)}

    found: dict[str, list[Row]] = {"split_minus_tied": [], "groups_minus_one": []}
    for count, budget in itertools.product(groups, bench.budgets):
        tied, free = ({"groups": count, "split": split, "budget": budget} for split in (False, True))
        if (values := between(tied, free)) is not None:
            found["split_minus_tied"].append({"groups": count, "budget": budget, **values})
    for count, split, budget in itertools.product(groups[1:], (False, True), bench.budgets):
        one, more = ({"groups": number, "split": split, "budget": budget} for number in (groups[0], count))
        if (values := between(one, more)) is not None:
            found["groups_minus_one"].append({"groups": count, "split": split, "budget": budget, **values})
    return found
