"""A plan as a table, the time it would take on this device, and what would fit where it does not."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table

from dop_search.app.config import SearchConfig
from dop_search.app.plan.plan import Plan, Stage, least_bytes, make_plan
from dop_search.divergence.memory import GIB, RESERVED_BYTES
from dop_search.models.quantization import Quantization
from dop_search.utils.errors import MemoryLimitError

BENCHMARK_SECONDS = 0.5


def show_plan(config: SearchConfig) -> Plan:
    """Print the plan of a search; MemoryLimitError if it does not fit, with what would."""
    plan = make_plan(config)
    flops_per_second = matmul_speed(plan) if plan.is_here else None
    console = Console()
    console.print()
    console.print(_table(plan, flops_per_second))
    console.print("\n".join(_notes(plan, flops_per_second)), markup=False, highlight=False)
    if not plan.is_feasible:
        raise MemoryLimitError("\n  ".join(_refusal(config, plan)))
    return plan


def _table(plan: Plan, flops_per_second: float | None) -> Table:
    facts = plan.facts
    dims = facts.footprint.dims
    title = f"{facts.name}: {dims.num_layers} layers x {dims.hidden_size}, {str(facts.dtype).removeprefix('torch.')}"
    table = Table(title=title, title_justify="left")
    for name, justify in (
        ("stage", "left"), ("held on the device, GiB", "left"), ("peak, GiB", "right"), ("host, GiB", "right"),
        ("layer forwards", "right"), ("TFLOPs", "right"), ("time", "right"),
    ):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for stage in plan.stages:
        seconds = None if flops_per_second is None else stage.flops / flops_per_second
        sign = "≤ " if stage.at_most and stage.flops else ""
        table.add_row(
            stage.name,
            ", ".join(f"{name} {_gib(size)}" for name, size in stage.device_bytes.items()),
            _gib(sum(stage.device_bytes.values())),
            _gib(sum(stage.host_bytes.values())),
            f"{sign}{stage.num_layer_forwards:,}" if stage.num_layer_forwards else "–",
            f"{sign}{_tera(stage.flops)}" if stage.flops else "–",
            "–" if seconds is None or not stage.flops else f"{sign}{_duration(seconds)}",
        )
    return table


def _notes(plan: Plan, flops_per_second: float | None) -> Iterator[str]:
    facts, longest = plan.facts, max(plan.facts.prompts, key=lambda size: size.length)
    yield f"Sizes: {facts.source}. Prompts: {longest.visual:,} visual tokens ({facts.prompts_from})."
    spread = f", over {plan.num_devices} of them" if plan.num_devices > 1 else ""
    limit = _gib(plan.limit_bytes)
    yield f"Peak: {_gib(plan.peak_bytes)} of {limit} GiB that tensors may fill on {plan.device}{spread}."
    if flops_per_second is None:
        yield f"Time: not estimated, as this machine has no {plan.device}."
        return
    total = sum(stage.flops for stage in plan.stages) / flops_per_second
    yield (
        f"Time: {_duration(total)} at {flops_per_second / 1e12:.3g} TFLOP/s, the speed of a matrix product of this "
        "model's sizes here and now; loading, images and small kernels come on top."
    )


def _refusal(config: SearchConfig, plan: Plan) -> Iterator[str]:
    worst = max(plan.stages, key=lambda stage: sum(stage.device_bytes.values()))
    yield (
        f"it does not fit: {worst.name!r} holds {_held(worst)}, but tensors may fill {_gib(plan.limit_bytes)} GiB of "
        f"{plan.device}. What would fit:"
    )
    reserved = 0 if plan.device.type == "cpu" else RESERVED_BYTES
    enough = math.ceil(100 * (plan.needed_bytes + reserved) / GIB) / 100
    yield f"memory={enough:.2f} (a device with that much) or more"
    model = config.model
    if plan.facts.dtype == torch.float32:
        yield from _alternative(config, plan, "model.dtype=bfloat16", {"dtype": "bfloat16"})
    if model.quantization is None:
        for name in get_args(Quantization):
            yield from _alternative(config, plan, f"model.quantization={name}", {"quantization": name})
    if model.device_map is None and plan.device.type == "cuda":
        spread = {"device_map": "auto", "device": "auto"}
        yield from _alternative(config, plan, "model.device_map=auto on two such GPUs", spread)


def _alternative(config: SearchConfig, plan: Plan, what: str, changes: dict[str, str]) -> Iterator[str]:
    changed = config.model_copy(update={"model": config.model.model_copy(update=changes)})
    needed = least_bytes(changed, plan.limit_bytes)
    if needed <= plan.limit_bytes:
        yield f"{what}: {_gib(needed)} GiB would do"


def _held(stage: Stage) -> str:
    return ", ".join(f"{_gib(size)} GiB of {name}" for name, size in stage.device_bytes.items())


def matmul_speed(plan: Plan) -> float:
    """FLOP per second of a matrix product of the model's own sizes, measured for half a second."""
    dims, device = plan.facts.footprint.dims, plan.device
    rows = 2048 if device.type == "cuda" else 512
    left = torch.randn(rows, dims.hidden_size, device=device, dtype=plan.facts.dtype)
    right = torch.randn(dims.hidden_size, dims.intermediate_size, device=device, dtype=plan.facts.dtype)
    count, start = -1, 0.0
    while count < 1 or time.perf_counter() - start < BENCHMARK_SECONDS:
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if count < 0:  # the first is a warm-up
            start = time.perf_counter()
        count += 1
    return count * 2 * rows * dims.hidden_size * dims.intermediate_size / (time.perf_counter() - start)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}" if size >= GIB else f"{size / GIB:.2g}"


def _tera(flops: int) -> str:
    return f"{flops / 1e12:,.0f}" if flops >= 1e14 else f"{flops / 1e12:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
