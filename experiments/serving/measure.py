"""Time to first token and tokens per second in vLLM, full against pruned: ``python experiments/serving/measure.py``.

A random model in the shape of LLaVA-1.5 (:mod:`experiments.serving.model`) in engines of one process, asked in turn,
each request with an image of its own. Needs the environment that ``tests/serving/environment.sh`` makes. Prints a table
and writes every reading to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import dop_search as dop
from dop_search.serving.servable import ARCHITECTURES
from dop_search.strategy.cost.flops import full_flops, strategy_flops
from dop_search.strategy.operations import TokenCounts
from dop_search.utils.progress import default_progress
from experiments.serving.model import IMAGE_SIZE, PATCH_SIZE, save_random_llava

HERE = Path(__file__).parent
NUM_VISUAL = (IMAGE_SIZE // PATCH_SIZE) ** 2
PROMPT = "USER: <image>\nWhat is this? ASSISTANT:"


def strategies(num_layers: int, ratio: Callable[[dop.Strategy], float]) -> dict[str, dop.Strategy | None]:
    """The full model (``None``), and at each budget one with operations skipped and one with fewer tokens only."""

    def made(q: int, kv: int, mlp: int, tokens: int) -> dop.Strategy:
        return dop.Strategy.depthwise(num_layers, q, kv, mlp, tokens, selector="uniform_grid")

    result: dict[str, dop.Strategy | None] = {"full": None}
    for share in (0.3, 0.15):
        ours = next(
            strategy
            for tokens in range(NUM_VISUAL, 0, -1)
            if ratio(strategy := made(num_layers // 2, num_layers, num_layers // 4, tokens)) <= share
        )
        fewer = next(
            strategy
            for tokens in range(NUM_VISUAL, 0, -1)
            if ratio(strategy := made(num_layers, num_layers, num_layers, tokens)) <= share
        )
        result |= {f"operations skipped, {share}": ours, f"fewer tokens, {share}": fewer}
    return result


def start(model: Path, strategy: dop.Strategy | None, file: Path) -> Any:
    """An engine; without a strategy vLLM's own model."""
    from vllm import LLM

    overrides: dict[str, Any] = {}
    if strategy is not None:
        strategy.save(file)
        overrides = {"architectures": [ARCHITECTURES["llava"]], "dop_strategy": str(file)}
    return LLM(
        str(model),
        hf_overrides=overrides,
        dtype="float32",
        max_model_len=1024,
        enforce_eager=True,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        limit_mm_per_prompt={"image": 1},
        disable_log_stats=True,
    )


def with_old_names(model: Path, folder: Path) -> Path:
    """The same checkpoint with the tower's weights named as vLLM 0.32's own LLaVA expects them."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    named = {re.sub(r"vision_tower\.", "vision_tower.vision_model.", name): w for name, w in load_file(file).items()}
    save_file(named, file, metadata={"format": "pt"})
    return folder


def seconds(llm: Any, images: list[Image.Image], num_tokens: int) -> float:
    """To answer all of them with so many tokens."""
    from vllm import SamplingParams

    prompts = [{"prompt": PROMPT, "multi_modal_data": {"image": [image]}} for image in images]
    begin = time.perf_counter()
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True), use_tqdm=False)
    return time.perf_counter() - begin


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7, help="each engine is asked once per round")
    parser.add_argument("--requests", type=int, default=8, help="at once, for tokens per second")
    parser.add_argument("--tokens", type=int, default=16, help="of each of these answers")
    parser.add_argument("--out", type=Path, default=None, help="JSON with every reading")
    options = parser.parse_args()
    progress, rng = default_progress(), np.random.default_rng(0)

    def pictures(count: int) -> list[Image.Image]:
        shape = (count, IMAGE_SIZE, IMAGE_SIZE, 3)
        return [Image.fromarray(pixels) for pixels in rng.integers(0, 256, shape, dtype=np.uint8)]

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "model").mkdir()
        heads = options.hidden // 64
        model = save_random_llava(folder / "model", options.layers, options.hidden, heads, heads)
        loaded = dop.load(str(model))
        num_text = len(loaded.processor(images=pictures(1), text=PROMPT)["input_ids"][0]) - NUM_VISUAL
        plain = with_old_names(model, folder / "plain")
        counts, dims = TokenCounts(num_text, NUM_VISUAL), loaded.adapter.dims

        def ratio(strategy: dop.Strategy) -> float:
            return strategy_flops(dims, strategy, counts) / full_flops(dims, counts)

        rows = [
            {"name": name, "flops_ratio": 1.0 if strategy is None else ratio(strategy), "strategy": strategy}
            for name, strategy in strategies(options.layers, ratio).items()
        ]
        with progress.task("engines", len(rows)) as advance:
            for row in rows:
                file = folder / f"{row['name'].replace(' ', '-')}.json"
                row["llm"] = start(plain if row["strategy"] is None else model, row["strategy"], file)
                row["first_token_s"], row["tokens_per_s"] = [], []
                advance()
        with progress.task("rounds, the first not counted", options.rounds + 1) as advance:
            for turn in range(options.rounds + 1):
                for row in rows:
                    first = seconds(row["llm"], pictures(1), 1)
                    whole = seconds(row["llm"], pictures(options.requests), options.tokens)
                    if turn:
                        row["first_token_s"].append(first)
                        row["tokens_per_s"].append(options.requests * options.tokens / whole)
                advance()

    full = rows[0]
    print("| | FLOPs | time to first token | tokens per second |\n|---|---|---|---|")
    for row in rows:
        row["strategy"] = "" if row["strategy"] is None else row["strategy"].describe()
        times = np.array(row["first_token_s"]) / np.array(full["first_token_s"])
        rates = np.array(row["tokens_per_s"]) / np.array(full["tokens_per_s"])
        print(f"| {row['name']} | {row['flops_ratio']:.3f} | {np.median(times):.2f} | {np.median(rates):.2f} |")
        del row["llm"]
    said = {"machine": platform.machine(), "num_threads": torch.get_num_threads(), "num_text": num_text}
    shape = {"layers": options.layers, "hidden": options.hidden, "visual": NUM_VISUAL, "requests": options.requests}
    if options.out is not None:
        options.out.write_text(json.dumps({"environment": said, "shape": shape, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
