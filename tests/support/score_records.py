"""Invented benchmark scores, for tests of whatever reads them. The numbers mean nothing."""

from __future__ import annotations

from dop_search.app.record import (
    EvalRecord,
    ModelInfo,
    Provenance,
    Record,
    RelativeMean,
    ScoreComparison,
    StrategyScores,
    SuiteInfo,
)
from dop_search.strategy import Strategy

FULL = {"gqa": (62.0, "%"), "pope": (86.5, "%"), "mme": (1800.0, "points")}
"""Benchmark → the full model's score and its unit."""


def example_scores(kept: float, kept_by_uniform: float | None = None) -> dict[str, ScoreComparison]:
    """Scores that are ``kept`` of the full model's on every benchmark."""
    scores = {}
    for name, (full, unit) in FULL.items():
        pruned = kept * full
        uniform = None if kept_by_uniform is None else kept_by_uniform * full
        scores[name] = ScoreComparison(
            full=full,
            pruned=pruned,
            uniform=uniform,
            ci95=(pruned - full - 0.01 * full, pruned - full + 0.01 * full),
            uniform_ci95=None if uniform is None else (pruned - uniform - 0.01 * full, pruned - uniform + 0.01 * full),
            unit=unit,
            num_samples=100,
        )
    return scores


def scored(record: Record) -> Record:
    """``record`` with benchmark scores: the smaller the budget, the less is kept."""
    results = []
    for result in record.results:
        kept = 1.0 - 0.05 * (1.0 - result.flops_ratio)
        mean = RelativeMean(pruned=100 * kept, uniform=100 * (kept - 0.04))
        results.append(result.model_copy(update={"scores": example_scores(kept, kept - 0.04), "relative_mean": mean}))
    info = SuiteInfo(suite="pocket13", limit=100, batch_size=16, fingerprint="00ff00ff00ff00ff")
    return record.model_copy(update={"results": results, "scores": info})


def example_evaluation(strategies: dict[str, tuple[Strategy, float, float]]) -> EvalRecord:
    """An evaluation of ``name -> (strategy, FLOPs ratio, share of the full model's score that it keeps)``."""
    return EvalRecord(
        model=ModelInfo(name="pocket", fingerprint="llava-1f2e3d4c5b6a", num_layers=12),
        suite=SuiteInfo(suite="pocket13", limit=100),
        full={name: score for name, (score, _) in FULL.items()},
        units={name: unit for name, (_, unit) in FULL.items()},
        num_samples=dict.fromkeys(FULL, 100),
        strategies=[
            StrategyScores(
                name=name,
                file=f"{name}.json",
                strategy=strategy,
                flops_ratio=ratio,
                scores=example_scores(kept),
                relative_mean=RelativeMean(pruned=100 * kept),
            )
            for name, (strategy, ratio, kept) in strategies.items()
        ],
        provenance=Provenance(started_at="2026-01-02T03:04:05+00:00", command="dop-eval"),
    )
