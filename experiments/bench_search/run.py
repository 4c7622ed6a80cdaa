"""How long one validation run takes, and what each of the engine's shortcuts gives.

    uv run python experiments/bench_search/run.py

All variants score the same strategies on the same samples, interleaved in one process; the medians of the rounds are
compared. Writes ``result.json`` beside this file.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from dop_search import load, validation_set
from dop_search.data.samples import ValidationSet
from dop_search.divergence import DivergenceEngine, Teacher, make_teacher
from dop_search.divergence.profiling import make_space, token_counts
from dop_search.models.fast_linear import fast_linear
from dop_search.models.loading import LoadedModel
from dop_search.models.prompts import model_inputs
from dop_search.pruning import pruned
from dop_search.search import CurveGrid
from dop_search.selectors import make_selector
from dop_search.strategy import Strategy
from dop_search.strategy.cost import CostModel
from dop_search.utils.files import write_text_atomic

HERE = Path(__file__).parent
BATCH_SIZE = 16  # of the Hugging Face forwards
SWITCHES = ("keep_prefix", "early_start", "share_prefixes")
"""The engine's shortcuts, added one after the other; features at answer positions and no dead operation: always."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--policies", type=int, default=32, help="strategies per set")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "result.json")
    args = parser.parse_args()
    torch.set_num_threads(2)
    loaded = load("pocket")
    data = validation_set("pocket", num_samples=args.samples)
    teacher = make_teacher(loaded, data, make_selector("cls_attention"), batch_size=BATCH_SIZE)
    sets = strategy_sets(loaded, teacher, args.policies)
    result = {
        "samples": args.samples,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "sets": {name: measure(loaded, teacher, data, policies, args.rounds) for name, policies in sets.items()},
    }
    write_text_atomic(args.out, json.dumps(result, indent=2) + "\n")
    for name, rows in result["sets"].items():
        print(f"\n{name}: {rows['num_policies']} strategies, FLOPs {rows['mean_flops_ratio']:.2f} of the full model")
        for variant, row in rows["variants"].items():
            print(f"  {variant:48s} {row['ms_per_policy']:8.1f} ms   {row['speedup']:5.2f} ×")


def strategy_sets(loaded: LoadedModel, teacher: Teacher, count: int) -> dict[str, list[Strategy]]:
    """Random points of two spaces, the neighbours of one incumbent, and a whole profile."""
    num_layers = loaded.adapter.dims.num_layers
    num_visual = teacher.samples[0].encoded.num_visual
    sets = {}
    for name in ("dop_split",):
        space, rng = make_space(name, num_layers, num_visual), np.random.default_rng(0)
        sets[f"random points of {name}"] = [
            space.strategy({p.name: int(rng.choice(p.levels)) for p in space.parameters}) for _ in range(count)
        ]
    space, rng = make_space("dop_split", num_layers, num_visual), np.random.default_rng(0)
    levels = {p.name: CurveGrid(num_token_levels=12).for_parameter(p) for p in space.parameters}
    sets["random points on the grid of the curves"] = [
        space.strategy({name: int(rng.choice(values)) for name, values in levels.items()}) for _ in range(count)
    ]
    split = make_space("dop_split", num_layers, num_visual)
    centre = {"q_depth": 7, "kv_depth": 9, "mlp_depth": 4, "num_visual_tokens": num_visual // 2}
    steps = [(q, kv, mlp) for q in range(-2, 2) for kv in range(-2, 2) for mlp in range(-2, 2)][:count]
    sets["neighbours of one strategy"] = [
        split.strategy(
            {**centre, "q_depth": 7 + q, "kv_depth": 9 + kv, "mlp_depth": 4 + mlp},
        )
        for q, kv, mlp in steps
    ]
    grid = CurveGrid(num_token_levels=12)
    profile = [split.single(p.name, level) for p in split.parameters for level in grid.for_parameter(p)]
    sets["whole profile of dop_split"] = list({s.key(): s for s in profile if not s.is_empty}.values())
    return sets


def measure(
    loaded: LoadedModel, teacher: Teacher, data: ValidationSet, policies: Sequence[Strategy], rounds: int
) -> dict[str, object]:
    batches = [
        model_inputs(loaded.processor, data.samples[start : start + BATCH_SIZE], torch.device("cpu"))
        for start in range(0, len(data), BATCH_SIZE)
    ]
    some = policies[:: max(1, len(policies) // 8)]  # the slow variant scores a part of the set
    variants: dict[str, Callable[[], object]] = {
        "full Hugging Face forwards": lambda: full_forwards(loaded, batches),
        "pruned Hugging Face forwards": lambda: pruned_forwards(loaded, batches, some),
    }
    num_scored = {"full Hugging Face forwards": 1, "pruned Hugging Face forwards": len(some)}
    options = dict.fromkeys(SWITCHES, False)
    variants["engine: cached features, answer positions only"] = engine_call(loaded, teacher, policies, dict(options))
    for switch in SWITCHES:
        options[switch] = True
        variants[f"engine: + {switch}"] = engine_call(loaded, teacher, policies, dict(options))
    everything = engine_call(loaded, teacher, policies, dict(options))
    variants["engine: + fast_linear"] = lambda: with_fast_linear(loaded, everything)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):  # the first round warms up
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    per_policy = {
        name: 1000 * statistics.median(times[1:]) / num_scored.get(name, len(policies))
        for name, times in seconds.items()
    }
    reference = per_policy["full Hugging Face forwards"]
    cost = CostModel(loaded.adapter.dims, token_counts(teacher))
    return {
        "num_policies": len(policies),
        "mean_flops_ratio": float(np.mean([cost.ratio(strategy) for strategy in policies])),
        "variants": {
            name: {"ms_per_policy": value, "speedup": reference / value} for name, value in per_policy.items()
        },
    }


@torch.inference_mode()
def full_forwards(loaded: LoadedModel, batches: Sequence[dict[str, torch.Tensor]]) -> None:
    """What one strategy costs when it is simulated by masks: at least the full model on every sample."""
    for inputs in batches:
        loaded.model(**inputs, use_cache=False)


@torch.inference_mode()
def pruned_forwards(
    loaded: LoadedModel, batches: Sequence[dict[str, torch.Tensor]], policies: Sequence[Strategy]
) -> None:
    """True skipping, but the vision tower and every layer for every strategy."""
    for strategy in policies:
        with pruned(loaded.model, strategy):
            for inputs in batches:
                loaded.model(**inputs, use_cache=False)


def with_fast_linear(loaded: LoadedModel, call: Callable[[], object]) -> None:
    with fast_linear(loaded.model):
        call()


def engine_call(
    loaded: LoadedModel, teacher: Teacher, policies: Sequence[Strategy], options: dict[str, bool]
) -> Callable[[], object]:
    engine = DivergenceEngine(loaded.adapter, teacher, **options)
    return lambda: engine.evaluate(policies)


if __name__ == "__main__":
    main()
