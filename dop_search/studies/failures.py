"""When operation pruning fails: questions that the full model answers and the pruned one does not.

The found strategy and uniform token reduction at the same FLOPs, on the test samples, with a few of the pictures and
the visual tokens that were kept.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from dop_search.app.results import ResultFile, Row
from dop_search.app.workbench import Workbench
from dop_search.data.samples import Sample
from dop_search.evaluation import correct_answers
from dop_search.search.rerank import rerank
from dop_search.search.solution import uniform_assignment
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget
from dop_search.utils.errors import BudgetError, ConfigError
from dop_search.utils.statistics import bootstrap_ci95

METHODS = ("found", "uniform")
MAX_SIDE_PX = 128
"""Pictures in the result are no larger."""


def failures(bench: Workbench, results: ResultFile, num_pictures: int = 4) -> None:
    """Count and show the answers that pruning loses.

    Args:
        bench: the model and its samples.
        results: one row per budget and method.
        num_pictures: failures per row that are kept with their pictures, of different families as far as there are.
    """
    if num_pictures < 0:
        raise ConfigError(f"`num_pictures >= 0` must hold, but got (num_pictures={num_pictures})")

    @cache
    def strategy(budget: float, method: str) -> Strategy:
        limit = Budget(flops_ratio=budget)
        problem = bench.profile().problem(limit)
        if method == "uniform":
            fits = uniform_assignment(problem, limit)
            if fits is None:
                raise BudgetError(f"not even one visual token fits a budget of {budget:g} with everything else full")
            return problem.space.strategy(fits)
        with bench.watch(f"budget {budget:g}: ") as notify:
            return rerank(problem, limit, on_progress=notify).strategy

    def row(budget: float, method: str) -> tuple[Row, np.ndarray]:
        samples, chosen = bench.data("test").samples, strategy(budget, method)
        before, after = bench.full_answers(), bench.answers(chosen)
        full, right = correct_answers(before, samples), correct_answers(after, samples)
        lost = full & ~right
        values: Row = {
            "strategy": chosen.describe(),
            "num_test": len(samples),
            "num_full_right": int(full.sum()),
            "num_lost": int(lost.sum()),
            "num_gained": int((right & ~full).sum()),
            "lost_ratio_ci95": bootstrap_ci95(lost[full], bench.config.seed),
            "asked": _count(samples, full),
            "lost": _count(samples, lost),
        }
        shown = _of_different_families(samples, np.flatnonzero(lost), num_pictures)
        values["pictures"] = [_picture(bench, chosen, index, before[index], after[index]) for index in shown]
        return values, lost.astype(np.float64)

    keys = [{"budget": budget, "method": method} for budget in bench.budgets for method in METHODS]
    with bench.watch() as notify:
        results.measure(keys, row, notify, "lost answers")
    results.sort(keys)
    results.summarize({"found_minus_uniform_ci95": _differences(results, results.budgets, bench.config.seed)})


def _differences(results: ResultFile, budgets: Sequence[float], seed: int) -> dict[str, Any]:
    """Per budget the 95 % interval of the share of test questions lost by found minus that lost by uniform, paired."""
    intervals = {}
    for budget in budgets:
        found, uniform = (results.per_sample({"budget": budget, "method": method}) for method in METHODS)
        if found is not None and uniform is not None:
            intervals[f"{budget:g}"] = bootstrap_ci95(found - uniform, seed)
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
    image = sample.image.copy()
    image.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    (grids,) = bench.loaded.adapter.image_grids([encoded.num_visual])
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
