"""An invented record and invented curves, for tests of whatever reads them. The numbers mean nothing."""

from __future__ import annotations

import numpy as np

from dop_search.app.record import (
    Candidate,
    DataInfo,
    ModelInfo,
    Named,
    Provenance,
    Record,
    Result,
    UniformResult,
)
from dop_search.search.curves import Curve, Curves
from dop_search.strategy import Strategy

NUM_LAYERS = 12
NUM_VISUAL_TOKENS = 144
FLOOR_RATIO = 0.07


def example_curves(num_samples: int = 24) -> Curves:
    """Curves of the space ``dop_split``, every third depth and every twelfth number of tokens measured."""
    rng = np.random.default_rng(0)
    curves = {}
    for role, scale, rate in (("q", 0.02, 6.0), ("kv", 2.1, 9.0), ("mlp", 0.9, 11.0)):
        curves[f"{role}_depth"] = _curve(rng, f"{role}_depth", role, NUM_LAYERS, 3, scale, rate, num_samples)
    name = "num_visual_tokens"
    curves[name] = _curve(rng, name, "tokens", NUM_VISUAL_TOKENS, 12, 2.2, 13.0, num_samples)
    return Curves("dop_split", curves, num_validation_runs=sum(len(c.levels) - 1 for c in curves.values()))


def _curve(
    rng: np.random.Generator, name: str, role: str, full: int, step: int, scale: float, rate: float, num_samples: int
) -> Curve:
    """``scale * exp(-rate * level / full)``, zero at full, with noise per sample."""
    levels = np.arange(0, full + 1, step, dtype=np.int64)
    mean = scale * (np.exp(-rate * levels / full) - np.exp(-rate))
    noise = np.exp(0.5 * rng.standard_normal((len(levels), num_samples)))
    return Curve(name, role, levels, mean[:, None] * noise)


def example_strategies() -> dict[float, Strategy]:
    """One strategy per budget."""
    depths = {0.5: (7, 11, 8, None), 0.3: (5, 9, 5, 118), 0.15: (3, 8, 2, 72)}
    return {
        budget: Strategy.depthwise(
            NUM_LAYERS, q=q, kv=kv, mlp=mlp, num_visual_tokens=n_v, model_fingerprint="llava-1f2e3d4c5b6a"
        )
        for budget, (q, kv, mlp, n_v) in depths.items()
    }


def example_record(strategies: dict[float, Strategy] | None = None) -> Record:
    """A record of three budgets (or of ``strategies``, by FLOPs ratio) with fronts and candidates."""
    rng = np.random.default_rng(0)
    results = []
    for budget, strategy in (strategies or example_strategies()).items():
        kl = 0.09 * float(np.exp(-14 * (budget - FLOOR_RATIO)))
        uniform = UniformResult(
            num_visual_tokens=int(NUM_VISUAL_TOKENS * (budget - FLOOR_RATIO)),
            flops_ratio=budget - 0.003,
            kl_heldout=3.1 * kl,
            kl_heldout_ci95=(2.3 * kl, 4.2 * kl),
            accuracy=0.93 - kl,
            kl_search=2.9 * kl,
        )
        results.append(
            Result(
                budget=budget,
                strategy=strategy,
                flops_ratio=budget - 0.002,
                kv_ratio=min(1.0, 1.3 * budget),
                kl_additive=0.93 * kl,
                kl_search=kl,
                kl_search_ci95=(0.8 * kl, 1.25 * kl),
                kl_heldout=1.08 * kl,
                kl_heldout_ci95=(0.85 * kl, 1.4 * kl),
                accuracy_full=0.951,
                accuracy_pruned=0.948 - kl / 3,
                uniform=uniform,
                num_validation_runs=53,
                seconds=23.4,
                kl_heldout_difference_ci95=(-3.0 * kl, -1.2 * kl),
                candidates=_candidates(rng, budget, kl),
            )
        )
    ratios = np.linspace(FLOOR_RATIO, 1.0, 40)
    return Record(
        model=ModelInfo(
            name="pocket",
            fingerprint="llava-1f2e3d4c5b6a",
            num_layers=NUM_LAYERS,
            num_visual_tokens=NUM_VISUAL_TOKENS,
            num_text_tokens=11.5,
            num_parameters=4_812_032,
            dtype="float32",
            device="cpu",
            attn_implementation="sdpa",
        ),
        data=DataInfo(
            name="pocket",
            num_samples=96,
            num_heldout=192,
            num_test=400,
            fingerprints={"search": "0a1b2c3d", "heldout": "4e5f6a7b", "test": "8c9d0e1f"},
        ),
        selector=Named(name="cls_attention"),
        space=Named(name="dop_split", options={"num_token_levels": 12}),
        solver=Named(name="additive_exact", options={"num_rerank": 16}),
        results=results,
        floor_ratio=FLOOR_RATIO,
        front=[(float(x), max(0.0, float(0.09 * np.exp(-14 * (x - 0.08)) - 2e-7))) for x in ratios],
        uniform_front=[(float(x), max(0.0, float(0.4 * np.exp(-13 * (x - 0.08)) - 2e-6))) for x in ratios],
        num_validation_runs=101,
        seconds=96.2,
        timings={"load": 1.9, "teacher": 14.2, "curves": 31.0, "solve": 0.4, "confirm": 22.7, "accuracy": 26.0},
        provenance=Provenance(
            started_at="2026-01-02T03:04:05+00:00",
            versions={"dop_search": "0.1.0", "torch": "2.15.0", "transformers": "5.23.0"},
            git_commit="0123456789abcdef0123456789abcdef01234567",
            command="dop-search",
            machine="2 CPU cores",
            config={"model": {"name_or_path": "pocket"}, "seed": 0},
        ),
    )


def _candidates(rng: np.random.Generator, budget: float, kl: float) -> list[Candidate]:
    items = []
    for index in range(16):
        additive = kl * float(1 + 0.15 * index)
        ratio = budget - 0.01 * float(rng.random())
        text = f"q≤{index} kv≤9 mlp≤4 n_v={100 + index} @ {budget}"
        exact = additive * float(np.exp(0.25 * rng.standard_normal()))
        items.append(
            Candidate(describe=text, flops_ratio=ratio, kl_search=exact, kl_additive=additive, is_uniform=index == 15)
        )
    return items
