"""What a layer asks of a GPU, counted without one: kernels that are launched, waits for the device, Python's time.

    uv run python experiments/bench_launches/run.py

A decoder of 4 and one of 8 layers at a width at which arithmetic costs nothing; what is said of a layer is the
difference between the two, by 4. Writes ``result.json`` beside this file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dop_search import Strategy, pruned
from dop_search.evaluation.timing.launches import HostWaits, Launches
from dop_search.evaluation.timing.shapes import SHAPES, build, prompt
from dop_search.models.families import adapter_for
from dop_search.pruning.layer import LayerParts, finish, project
from dop_search.utils.files import write_text_atomic

HERE = Path(__file__).parent
FEW, MANY = 4, 8
KINDS: dict[str, tuple[float, float, float, int | None] | None] = {
    "plain model": None,
    "every operation, fewer tokens": (1, 1, 1, 50),
    "no MLP of visual tokens": (1, 1, 0, 50),
    "keys and values of visual tokens alone": (0, 1, 0, 50),
    "text alone": (0, 0, 0, None),
}
"""Exit depths of q, kv and MLP, as ratios, and visual tokens."""
COMPILED = [(name, "prefill") for name in list(KINDS)[1:4:2]] + [(list(KINDS)[1], "decode")]
Inputs = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--no-compile", action="store_true", help="keep what is known of compiled parts, which takes minutes"
    )
    parser.add_argument("--out", type=Path, default=HERE / "result.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {name: measure(kind, options.rounds) for name, kind in KINDS.items()}
    if options.no_compile and options.out.exists():
        known = json.loads(options.out.read_text())["per_layer"]
        rows = {
            name: {**row, **{k: v for k, v in known[name].items() if k == "compiled"}} for name, row in rows.items()
        }
    else:
        for name, phase in COMPILED:
            kind = KINDS[name]
            assert kind is not None
            rows[name].setdefault("compiled", {})[phase] = compiled(kind, phase)
    write_text_atomic(options.out, json.dumps({"torch": torch.__version__, "per_layer": rows}, indent=1) + "\n")
    for name, row in rows.items():
        print(name, {key: value for key, value in row.items() if key != "by_name"})


def decoder(num_layers: int, kind: tuple[float, float, float, int | None] | None) -> tuple[Any, Inputs, Any]:
    """A model, a prompt, and the context in which it runs that way."""
    shape = SHAPES["tiny"]
    small = type(shape)(**{**vars(shape), "layers": num_layers})
    model = build(small, torch.device("cpu"), torch.float32)
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    if kind is not None:
        depths = [round(ratio * num_layers) for ratio in kind[:3]]
        strategy = Strategy.depthwise(num_layers, *depths, num_visual_tokens=kind[3], selector="uniform_grid")
        context = lambda: pruned(model, strategy)  # noqa: E731
    return model, prompt(small, model, num_text=20), context


def step(inputs: Inputs, cache: Any) -> Inputs:
    """The decoding step after a prefill."""
    mask: Tensor = inputs["attention_mask"]
    return {
        "input_ids": torch.tensor([[101]]),
        "attention_mask": torch.cat([mask, torch.ones(1, 1, dtype=mask.dtype)], dim=1),
        "position_ids": torch.tensor([[mask.shape[1]]]),
        "past_key_values": cache,
    }


@torch.inference_mode()
def measure(kind: tuple[float, float, float, int | None] | None, rounds: int) -> dict[str, Any]:
    """Per layer: kernels, and milliseconds of Python (the least of all rounds, as other processes use the machine); per
    forward and per step of ``generate()``: waits."""
    found: dict[int, dict[str, dict[str, float]]] = {}
    milliseconds: dict[int, dict[str, float]] = {}
    waits: dict[str, float] = {}
    for num_layers in (FEW, MANY):
        model, inputs, context = decoder(num_layers, kind)
        times: dict[str, list[float]] = {"prefill": [], "decode": []}
        with context():
            for _ in range(rounds):
                start = time.process_time()
                cache = model(**inputs, use_cache=True).past_key_values
                middle = time.process_time()
                model(**step(inputs, cache))
                times["decode"].append(time.process_time() - middle)
                times["prefill"].append(middle - start)
            with Launches() as prefill:
                cache = model(**inputs, use_cache=True).past_key_values
            with Launches() as decode:
                model(**step(inputs, cache))
            if num_layers == MANY:
                with HostWaits() as waited:
                    model(**inputs, use_cache=True)
                waits = {"prefill": waited.by_name.total(), "decode": generated_waits(model, inputs)}
        found[num_layers] = {"prefill": prefill.by_name, "decode": decode.by_name}
        milliseconds[num_layers] = {phase: 1000 * min(its) for phase, its in times.items()}
    by_name = {
        phase: {name: (its[name] - found[FEW][phase][name]) / (MANY - FEW) for name in its}
        for phase, its in found[MANY].items()
    }
    return {
        "kernels": {phase: sum(its.values()) for phase, its in by_name.items()},
        "python_ms": {
            phase: (value - milliseconds[FEW][phase]) / (MANY - FEW) for phase, value in milliseconds[MANY].items()
        },
        "waits": waits,
        "by_name": {phase: {name: count for name, count in its.items() if count} for phase, its in by_name.items()},
    }


def generated_waits(model: Any, inputs: Inputs) -> float:
    """Waits of a step of ``generate()``, transformers' own among them."""
    totals = []
    for tokens in (2, 6):
        with HostWaits() as waited:
            model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        totals.append(waited.by_name.total())
    return (totals[1] - totals[0]) / 4


@torch.inference_mode()
def compiled(kind: tuple[float, float, float, int | None], phase: str) -> dict[str, int]:
    """Kernels of a middle layer whose parts are compiled; a GPU's generator makes as many or fewer."""
    from torch._dynamo.utils import counters
    from torch._inductor import metrics

    model, inputs, context = decoder(FEW, kind)
    calls: dict[str, tuple[Any, ...]] = {}
    outside = 0

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(layer: Any, *args: Any) -> Any:
            nonlocal outside
            counted = launches.by_name.copy()
            result = function(layer, *args)
            if layer is middle:
                calls[function.__name__] = (layer, *args)
                outside -= (launches.by_name - counted).total()
            return result

        return run

    middle = adapter_for(model).layers[1]
    with context():
        text: Any = adapter_for(model).text_model
        text.forward.__self__.parts = LayerParts(recorded(project), recorded(finish))
        launches = Launches()
        cache = model(**inputs, use_cache=True).past_key_values
        outside = 0
        with launches:
            model(**(inputs if phase == "prefill" else step(inputs, cache)))
    result = {"attention and cache": int(measure(kind, 1)["kernels"][phase]) + outside}
    for function in (project, finish):
        torch._dynamo.reset()
        metrics.reset()
        counters.clear()
        torch.compile(function, dynamic=True)(*calls[function.__name__])
        result[function.__name__] = metrics.generated_kernel_count + counters["inductor"]["extern_calls"]
    return {**result, "kernels": sum(result.values())}


if __name__ == "__main__":
    main()
