"""Prefill time of strategies against the full model, at the shapes of a real checkpoint with random weights.

    python experiments/latency/prefill.py --shape llava_next_7b

Skipping saves the same time whatever the weights are, so no checkpoint is needed. Full model and strategies are timed
in turn in one process (median of the rounds); the vision tower is a stub, so that this is the decoder's time. Needs
torch and transformers only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dop_search.cost import CostModel
from dop_search.models import adapter_for
from dop_search.operations import TokenCounts
from dop_search.pruning import pruned
from dop_search.strategy import Strategy

TOKENS_PER_IMAGE = 576
SHAPES: dict[str, dict[str, int]] = {
    "llava_next_7b": {"layers": 32, "hidden": 4096, "mlp": 11008, "heads": 32, "images": 5},
    "llava_1_5_7b": {"layers": 32, "hidden": 4096, "mlp": 11008, "heads": 32, "images": 1},
    "small": {"layers": 8, "hidden": 1024, "mlp": 2752, "heads": 8, "images": 5},
}
FAMILIES: dict[str, tuple[float, float, float]] = {
    "uniform": (1.0, 1.0, 1.0),
    "tied attention, D_A = 3/4, D_P = 1/2": (0.75, 0.75, 0.5),
    "split, q = 1/4, kv = 3/4, mlp = 1/4": (0.25, 0.75, 0.25),
}
"""Depth ratios of q, kv and mlp; the number of visual tokens is solved for the budget."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.3, 0.14])
    parser.add_argument("--text-tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, inputs = build(SHAPES[args.shape], args.text_tokens, device, dtype)
    num_visual = SHAPES[args.shape]["images"] * TOKENS_PER_IMAGE
    cost = CostModel(adapter_for(model).dims, [TokenCounts(inputs["input_ids"].shape[1] - num_visual, num_visual)])
    strategies = {
        (name, ratio): fit(depths, ratio, cost, num_visual)
        for ratio in args.ratios
        for name, depths in FAMILIES.items()
    }
    rows = measure(model, inputs, strategies, args.rounds, device)
    full = rows.pop("full")
    result = {
        "shape": args.shape,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "full_ms": full,
        "rows": [
            {
                "strategy": strategy.describe(),
                "family": name,
                "budget": ratio,
                "flops_ratio": cost.ratio(strategy),
                "ms": rows[(name, ratio)],
                "time_ratio": rows[(name, ratio)] / full,
            }
            for (name, ratio), strategy in strategies.items()
            if strategy is not None
        ],
    }
    print(f"{result['device']}, {result['dtype']}, {args.shape}: full model {full:.2f} ms")
    for row in result["rows"]:
        print(f"  {row['flops_ratio']:.3f} FLOPs  {row['time_ratio']:.3f} time  {row['ms']:8.2f} ms  {row['strategy']}")
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def build(
    shape: dict[str, int], text_tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[LlavaForConditionalGeneration, dict[str, torch.Tensor]]:
    """A LLaVA with random weights whose vision tower is a stub, and one prompt of several images."""
    image_token = 31
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=shape["hidden"],
        intermediate_size=shape["mlp"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        max_position_embeddings=4096,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=image_token, image_token_index=image_token
    )
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlavaForConditionalGeneration(config).eval()
    torch.set_default_dtype(previous)
    half = text_tokens // 2
    ids = [*range(100, 100 + half), *[image_token] * (TOKENS_PER_IMAGE * shape["images"]), *range(200, 200 + half)]
    return model, {
        "input_ids": torch.tensor([ids], device=device),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long, device=device),
        "pixel_values": torch.zeros(shape["images"], 3, 336, 336, device=device, dtype=dtype),
    }


def fit(depths: tuple[float, float, float], ratio: float, cost: CostModel, num_visual: int) -> Strategy | None:
    """The strategy of these depth ratios with the most visual tokens within the budget."""
    layers = cost.dims.num_layers
    q, kv, mlp = (round(depth * layers) for depth in depths)

    def at(tokens: int) -> Strategy:
        return Strategy.depthwise(layers, q, kv, mlp, num_visual_tokens=tokens, selector="uniform_grid")

    low, high = 0, num_visual
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost.ratio(at(middle)) <= ratio else (low, middle - 1)
    return at(low) if low else None


@torch.inference_mode()
def measure(
    model: LlavaForConditionalGeneration,
    inputs: dict[str, torch.Tensor],
    strategies: dict[tuple[str, float], Strategy | None],
    rounds: int,
    device: torch.device,
) -> dict[object, float]:
    """Median milliseconds of a prefill per strategy, all timed in turn."""
    times: dict[object, list[float]] = {}
    for step in range(rounds + 2):  # two rounds of warm-up
        for key, strategy in [("full", Strategy.full(len(adapter_for(model).layers))), *strategies.items()]:
            if strategy is not None:
                with pruned(model, strategy):
                    elapsed = timed(lambda: model(**inputs, logits_to_keep=1), device)
                if step >= 2:
                    times.setdefault(key, []).append(elapsed)
    return {key: statistics.median(values) for key, values in times.items()}


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock milliseconds until the result is there."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
