"""Everything that only a GPU can say, in one command of at most ten minutes.

    uv run python experiments/gpu/run.py --out experiments/gpu/result.json
    uv run python experiments/gpu/run.py --shape tiny --device cpu --samples 2     # the rehearsal, on any machine

Each part is a process of its own with a time limit, so that one that fails or hangs costs the others nothing. Random
weights at the sizes of a published checkpoint: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dop_search.app.cli.bench import parser as bench_parser
from dop_search.app.cli.bench import run as bench
from dop_search.divergence import DivergenceEngine, Teacher, TeacherSample
from dop_search.divergence.encoding import encode, full_states
from dop_search.divergence.forecast import ChunkForecast
from dop_search.divergence.memory import weight_bytes
from dop_search.divergence.profiling import SAVE_EVERY, make_space, token_counts
from dop_search.evaluation.timing.launches import HostWaits
from dop_search.evaluation.timing.shapes import SHAPES, Shape, build, prompt
from dop_search.evaluation.timing.timing import now_ms
from dop_search.evaluation.timing.variants import DEPTH_RATIOS, Prompt, fit
from dop_search.models.adapter import ModelAdapter
from dop_search.models.families import adapter_for
from dop_search.pruning.attention import ForwardTables, lower_right
from dop_search.pruning.layer import run_layer
from dop_search.pruning.layout import assign_groups, pack
from dop_search.search import CurveGrid, Curves, EvaluationStore, Problem, rerank_all, uniform_assignment
from dop_search.selectors import make_selector
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget, CostModel
from dop_search.strategy.steps import layer_steps
from dop_search.utils.files import write_text_atomic

RATIOS = (0.5, 0.3, 0.14)
ANSWER = tuple(range(100, 116))
LIMITS = {"plain": 120, "compiled": 150, "flash": 90, "graphs": 90, "attention": 40, "search": 110}
"""Seconds for each part, ten minutes together."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llava_next_7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--samples", type=int, default=25, help="of the search, and as many held out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", default="auto", help="auto, or GiB of the device for the search")
    parser.add_argument("--parts", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--part", choices=list(LIMITS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    if options.part is not None:
        print(json.dumps(PARTS[options.part](options)))
        return
    result: dict[str, Any] = {"torch": torch.__version__, "shape": options.shape, "device": device_name(options.device)}
    for part in options.parts:
        start = time.perf_counter()
        result[part] = in_a_process(part)
        result[part]["seconds"] = round(time.perf_counter() - start, 1)
        write_text_atomic(options.out, json.dumps(result, indent=1) + "\n")
        print(part, json.dumps(result[part])[:300], flush=True)


def in_a_process(part: str) -> dict[str, Any]:
    """What a part measured, or how it failed."""
    command = [sys.executable, __file__, *sys.argv[1:], "--part", part]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMITS[part])
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {LIMITS[part]} s"}
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-5:]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def built(options: argparse.Namespace) -> tuple[Shape, Any, ModelAdapter]:
    device = torch.device(options.device)
    shape = SHAPES[options.shape]
    model = build(shape, device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    return shape, model, adapter_for(model)


# -- prefill and decoding, as users run them ------------------------------------------------------


def timed(options: argparse.Namespace, *further: str) -> dict[str, Any]:
    """``dop-bench``: every variant's median times."""
    where = ["--shape", options.shape, "--device", options.device, "--rounds", str(options.rounds), "--quiet"]
    return bench(bench_parser().parse_args([*where, "--ratio", *map(str, RATIOS), *further])).to_json()


def flash(options: argparse.Namespace) -> dict[str, Any]:
    if importlib.util.find_spec("flash_attn") is None:
        return {"failed": "flash_attn is not installed"}
    return timed(options, "--attn", "flash_attention_2")


# -- the layers of a prefill as one CUDA graph ----------------------------------------------------


@torch.inference_mode()
def graphs(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a prefill's layers, launched by Python and replayed; both relative to the full model's."""
    shape, model, adapter = built(options)
    inputs = prompt(shape, model)
    counts, dims = Prompt.of(adapter, inputs).counts, adapter.dims
    cost = CostModel(dims, [counts])
    strategies = {"full": Strategy.full(dims.num_layers)}
    for ratio in RATIOS:
        for name, depths in DEPTH_RATIOS.items():
            if (found := fit(depths, ratio, cost, counts.visual, "uniform_grid")) is not None:
                strategies[f"{name} {ratio:g}"] = found
    visual = adapter.visual_token_mask(inputs["input_ids"])[0]
    rows = {}
    for name, strategy in strategies.items():
        run = layers_of(adapter, strategy, visual)
        replay, same, waits = captured(run, adapter.device)
        launched, replayed = (median_ms(call, adapter.device, options.rounds) for call in (run, replay))
        rows[name] = {
            "flops_ratio": cost.ratio(strategy), "launched_ms": launched, "replayed_ms": replayed, "same": same,
            "waits": waits,
        }  # fmt: skip
    for row in rows.values():
        row["time_ratio"] = row["replayed_ms"] / rows["full"]["launched_ms"]
    return {"rows": rows, "goal": "time_ratio <= 0.16 at flops_ratio 0.14"}


def layers_of(adapter: ModelAdapter, strategy: Strategy, visual: Tensor) -> Callable[[], Tensor]:
    """The decoder's layers on the rows that a strategy keeps of one prompt, with nothing left to decide."""
    its = visual.cpu().numpy()
    layout, kept = pack([assign_groups(its, np.arange(its.sum()), strategy)], adapter.device)
    everything = torch.zeros(1, len(its), adapter.dims.hidden_size, device=adapter.device, dtype=adapter.model.dtype)
    cos, sin = adapter.rotary(everything, torch.arange(len(its), device=adapter.device)[None])
    entry = layout.tensor(kept[0])
    tables = ForwardTables(cos[0].index_select(0, entry), sin[0].index_select(0, entry))
    hidden = torch.randn_like(everything[0, : len(entry)])
    steps = layer_steps(strategy)

    def run() -> Tensor:
        state, before = hidden, frozenset(range(len(strategy.groups)))
        for layer, step in zip(adapter.layers, steps, strict=True):
            state = run_layer(layer, state, before, step, layout, tables)
            before = step.alive
        return state

    return run


def captured(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], Any], bool, dict[str, int]]:
    """A replay of ``run``, whether it gives the same, and where the host would have to wait in it (nowhere).

    Without CUDA ``run`` itself, after the same checks.
    """
    for _ in range(2):
        expected = run()
    with HostWaits() as waits:
        run()
    if device.type != "cuda":
        return run, torch.equal(run(), expected), dict(waits.by_name)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    graph.replay()
    return graph.replay, torch.allclose(result, expected), dict(waits.by_name)


def median_ms(call: Callable[[], Any], device: torch.device, rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):  # the first is a warm-up
        start = now_ms(device, "wall")
        call()
        times.append(now_ms(device, "wall") - start)
    return float(np.median(times[1:]))


# -- fewer queries than keys ----------------------------------------------------------------------


@torch.inference_mode()
def attention(options: argparse.Namespace) -> dict[str, Any]:
    """Attention from the bottom right against the same with a mask: time, and the largest difference."""
    device, shape = torch.device(options.device), SHAPES[options.shape]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    text = shape.config.get_text_config()
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    keys, head_dim, rows = shape.num_visual + 60, text.hidden_size // heads, {}
    settings, repeats = {"dropout": 0.0, "scaling": head_dim**-0.5}, heads // kv_heads

    def masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)

    for queries in (60, keys // 4, keys - 1):
        query = torch.randn(1, heads, queries, head_dim, device=device, dtype=dtype)
        key, value = torch.randn(2, 1, kv_heads, keys, head_dim, device=device, dtype=dtype)
        mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        calls = partial(lower_right, query, key, value, settings), partial(masked, query, key, value, mask)
        rows[f"{queries} of {keys}"] = {
            "lower_right_ms": median_ms(calls[0], device, options.rounds),
            "masked_ms": median_ms(calls[1], device, options.rounds),
            "largest_difference": float((calls[0]() - calls[1]()).abs().max()),
        }
    return rows


# -- a whole search -------------------------------------------------------------------------------


def search(options: argparse.Namespace) -> dict[str, Any]:
    """Curves, candidates and confirmation at 0.14 of the FLOPs: seconds, and peak memory against its forecast."""
    shape, model, adapter = built(options)
    memory = "auto" if options.memory == "auto" else float(options.memory)
    start = time.perf_counter()
    teacher, heldout = (random_teacher(adapter, shape, options.samples, offset) for offset in (0, 7))
    seconds = {"teacher": time.perf_counter() - start}
    engine = DivergenceEngine(adapter, teacher, memory=memory)
    counts = token_counts(teacher)
    fields = {"selector": "random"}
    space = make_space("dop_split", adapter.dims.num_layers, shape.num_visual, strategy_fields=fields)
    store = EvaluationStore(engine, options.samples, batch_size=SAVE_EVERY)
    if adapter.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(adapter.device)
    start = time.perf_counter()
    grid = CurveGrid.of(5, 4) if adapter.dims.num_layers < 8 else CurveGrid()
    curves = Curves.measure(space, store, grid)
    seconds["curves"] = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(adapter.device) if adapter.device.type == "cuda" else None
    predicted = weight_bytes(model, adapter.device) + forecast(engine, [space.single(p.name, level)
        for p in space.parameters for level in grid.for_parameter(p)])  # fmt: skip
    start = time.perf_counter()
    problem = Problem(space, CostModel(adapter.dims, counts), curves.surrogate(space), store=store)
    budget = Budget(flops_ratio=0.14 if adapter.dims.num_layers > 8 else 0.5)
    best = rerank_all(problem, budget, 16)[0].strategy
    seconds["candidates"] = time.perf_counter() - start
    start = time.perf_counter()
    uniform = uniform_assignment(problem, budget)
    confirmed = [best] if uniform is None else [best, space.strategy(uniform)]
    DivergenceEngine(adapter, heldout, memory=memory, keep_states=False).evaluate(confirmed)
    seconds["held-out"] = time.perf_counter() - start
    return {
        "part_seconds": seconds,
        "total_seconds": sum(seconds.values()),
        "peak_bytes": peak,
        "predicted_bytes": predicted,
        "peak_over_predicted": None if peak is None else peak / predicted,
        "times_memory_ran_out": engine.batches.num_failures,
        "strategy": best.describe(),
        "goal": "at most 20 s in all",
    }


@torch.inference_mode()
def random_teacher(adapter: ModelAdapter, shape: Shape, count: int, offset: int) -> Teacher:
    """Prompts of slightly different lengths, and the model's own view of an answer to each."""
    selector, samples = make_selector("random"), []
    for index in range(count):
        inputs = prompt(shape, adapter.model, num_text=56 + (index + offset) % 8)
        encoded = encode(adapter, inputs, ANSWER, selector).to_host()
        states = full_states(adapter, encoded)[encoded.prompt_length - 1 :]
        samples.append(
            TeacherSample(str(index), encoded, ANSWER, adapter.lm_head(states).float().log_softmax(-1).cpu())
        )
    return Teacher(tuple(samples), f"random {offset}", selector)


def forecast(engine: DivergenceEngine, strategies: list[Strategy]) -> int:
    """What the plan counts with for the curves: hidden states that are kept, and the largest chunk."""
    work = [strategy for strategy in {its.key(): its for its in strategies}.values() if not strategy.is_empty]
    kept = peak = 0
    for members, chunk in engine.batches._kept.items():
        part = ChunkForecast(engine.batches.footprint, [engine.batches._sizes[m] for m in members], keeps=True)
        peak = max(peak, *(part.call(work[at : at + SAVE_EVERY]).peak_bytes for at in range(0, len(work), SAVE_EVERY)))
        kept += part.kept_bytes if chunk.place == "device" else 0
    return kept + peak


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "plain": timed,
    "compiled": lambda options: timed(options, "--compile"),
    "flash": flash,
    "graphs": graphs,
    "attention": attention,
    "search": search,
}

if __name__ == "__main__":
    main()
