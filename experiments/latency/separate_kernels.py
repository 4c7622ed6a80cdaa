"""Do kernels timed one by one add up to a prefill? The negative result behind measuring layers inside forwards.

    python experiments/latency/separate_kernels.py

Times projections, attention, MLP and norms of one layer of the `small` shape at the token counts of the strategies in
``small_validation.json``, sums them over the layers, and compares the sums with the prefills measured there.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dop_search.evaluation.timing.shapes import SHAPES, build
from dop_search.evaluation.timing.timing import now_ms
from dop_search.evaluation.timing.validation import random_strategies
from dop_search.models.families import adapter_for
from dop_search.strategy.cost import layer_counts
from dop_search.strategy.operations import TokenCounts

HERE = Path(__file__).parent
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--validation", type=Path, default=HERE / "small_validation.json")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    data = json.loads(options.validation.read_text())
    torch.set_num_threads(data["environment"]["num_threads"])
    clock, counts = data["environment"]["clock"], TokenCounts(data["text_tokens"], data["visual_tokens"])
    layer = adapter_for(build(SHAPES["small"], CPU, torch.float32)).layers[0]
    strategies = random_strategies(8, counts.visual, len(data["predictions"]), seed=0)
    errors = []
    known: dict[tuple[int, int, int], float] = {}
    for strategy, row in zip(strategies, data["predictions"], strict=True):
        assert strategy.describe() == row["strategy"]
        tokens = layer_counts(strategy, counts)
        triples = zip(tokens.q.tolist(), tokens.kv.tolist(), tokens.mlp.tolist(), strict=True)
        predicted = 0.0
        for triple in triples:
            if triple not in known:
                known[triple] = layer_ms(layer, *triple, clock)
            predicted += known[triple]
        errors.append(predicted / row["measured_ms"] - 1.0)
        print(
            f"{row['measured_ms']:8.0f} ms measured  {errors[-1]:+.1%}  {re.sub('≤', '<', row['strategy'])}", flush=True
        )
    result = {
        "median_absolute_error": float(np.median(np.abs(errors))),
        "median_error": float(np.median(errors)),
        "largest_absolute_error": float(np.abs(errors).max()),
    }
    print(json.dumps(result))
    if options.out is not None:
        options.out.write_text(json.dumps({**result, "errors": errors}, indent=1) + "\n")


@torch.inference_mode()
def layer_ms(layer: torch.nn.Module, queries: int, keys: int, mlps: int, clock: str) -> float:
    """The sum of a layer's kernels, each timed by itself (the second of two calls)."""
    attention, width = layer.self_attn, 1024
    rows_q, rows_kv, rows_mlp = (torch.randn(count, width) for count in (queries, keys, mlps))
    heads = [torch.randn(1, 8, count, 128) for count in (queries, keys, keys)]
    causal = queries == keys
    mask = None if causal else torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    kernels: list[Callable[[], object]] = [
        lambda: layer.input_layernorm(rows_kv),
        lambda: attention.q_proj(rows_q),
        lambda: attention.k_proj(rows_kv),
        lambda: attention.v_proj(rows_kv),
        lambda: torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, is_causal=causal),
        lambda: attention.o_proj(rows_q),
        lambda: layer.post_attention_layernorm(rows_mlp),
        lambda: layer.mlp(rows_mlp),
    ]
    total = 0.0
    for kernel in kernels:
        kernel()
        start = now_ms(CPU, clock)
        kernel()
        total += now_ms(CPU, clock) - start
    return total


if __name__ == "__main__":
    main()
