"""``dop-bench``: how long the full model and pruned ones take, in one run on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from dop_search.app.cli.entry import answer
from dop_search.evaluation.timing.comparison import Comparison, compare, environment
from dop_search.evaluation.timing.layer_times import measure_table
from dop_search.evaluation.timing.shapes import SHAPES, build, prompt, random_model
from dop_search.evaluation.timing.text import comparison_text
from dop_search.evaluation.timing.validation import random_strategies, summary, validate_table, validation_text
from dop_search.evaluation.timing.variants import DEPTH_RATIOS, Prompt, make_variants
from dop_search.models.families import adapter_for
from dop_search.models.loading import DTYPES, checkpoint_source, load, named_device
from dop_search.models.prompts import chat_prompt
from dop_search.strategy import Strategy
from dop_search.strategy.cost import LatencyTable
from dop_search.utils.errors import ConfigError
from dop_search.utils.extras import check_extras
from dop_search.utils.files import check_writable
from dop_search.utils.registry import import_modules
from dop_search.utils.versioned import Format, write_json

VALIDATION = Format("a latency validation", "dop_search.latency_validation", 1, "run dop-bench again")

DESCRIPTION = """\
Time the full model against pruned ones: vision tower, prefill, each decoded token, end to end; memory and KV cache.

Everything is timed in one process, in another order every round; ratios are paired by round. Beside the strategies
stand, at the same FLOPs, uniform token reduction in front of the plain decoder (the bound: nothing that keeps fewer
tokens can be faster) and a plain hook that drops tokens at layer 2. Needs torch and transformers only.
"""

EPILOG = """\
examples:
  dop-bench                                              the CPU target: --shape small, ratios 0.5 0.3 0.14
  dop-bench --shape llava_next_7b --out next.json        random weights at real sizes, on the GPU if there is one
  dop-bench --model pocket --strategy strategy-0.3.json  a checkpoint and strategies that a search has found
  dop-bench --model /models/llava-1.5-7b --weights random --ratio 0.3
  dop-bench --shape small --ratio --strategy a.json b.json                 only the given strategies
  dop-bench --shape small --table small.json --validate-table              how well a latency table predicts
  PYTHONPATH=. python -m dop_search.app.cli.bench --shape llava_next_7b         on a machine without this package
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="dop-bench", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = result.add_argument_group("what is timed")
    which = model.add_mutually_exclusive_group()
    which.add_argument(
        "--shape", choices=list(SHAPES), metavar="NAME", help=f"sizes of: {', '.join(SHAPES)} (default: small)"
    )
    which.add_argument("--model", metavar="NAME", help="a local folder, a hub id, or pocket")
    model.add_argument(
        "--weights",
        choices=["random", "pretrained"],
        help="random: build --model from its configuration alone (a --shape is always random)",
    )
    model.add_argument("--text-tokens", type=int, default=60, metavar="N", help="text tokens of a shape's prompt (60)")
    model.add_argument("--image-size", type=int, default=336, metavar="PIXELS", help="side of --model's image (336)")
    model.add_argument("--batch", type=int, default=1, metavar="N", help="equal prompts in a batch (1)")
    model.add_argument("--tokens", type=int, default=8, metavar="N", help="tokens to generate; 1: prefill only (8)")
    model.add_argument("--device", default="auto", help="auto (an accelerator if there is one), cpu, cuda, cuda:1 ...")
    model.add_argument("--dtype", choices=list(DTYPES), help="default: bfloat16 on an accelerator, float32 on a CPU")
    model.add_argument("--attn", default="sdpa", metavar="NAME", help="attention backend: sdpa, eager, ... (sdpa)")
    model.add_argument("--num-threads", type=int, metavar="N", help="CPU threads of torch (default: torch's)")
    model.add_argument(
        "--imports", nargs="+", default=[], metavar="MODULE", help="modules of your own with selectors or families"
    )
    against = result.add_argument_group("what it is compared with")
    against.add_argument("--strategy", nargs="+", default=[], metavar="FILE", help="strategy files")
    against.add_argument(
        "--ratio",
        nargs="*",
        type=float,
        default=None,
        metavar="R",
        help="FLOPs ratios for the built-in shapes of strategy and the baselines (default: 0.5 0.3 0.14)",
    )
    against.add_argument(
        "--depths", nargs="+", default=list(DEPTH_RATIOS), choices=list(DEPTH_RATIOS), help="built-in shapes (all)"
    )
    against.add_argument("--selector", default="uniform_grid", metavar="NAME", help="of the built-in shapes")
    against.add_argument("--compile", action="store_true", help="the pruned layers of ours through torch.compile")
    how = result.add_argument_group("how")
    how.add_argument("--rounds", type=int, default=9, metavar="N", help="measurements per variant (9)")
    how.add_argument("--warmup", type=int, default=1, metavar="N", help="rounds before that which do not count (1)")
    how.add_argument(
        "--passes", type=int, metavar="N", help="generations per measurement, the last counts (CPU 1, GPU 2)"
    )
    how.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: what this process computed; for one thread on a machine that others use too (wall)",
    )
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of the orders (0)")
    latency = result.add_argument_group("latency tables (budget={latency_ratio: ...} of dop-search)")
    latency.add_argument(
        "--table", type=Path, metavar="FILE", help="read this table, or measure and write it if there is no such file"
    )
    latency.add_argument(
        "--validate-table",
        nargs="?",
        type=int,
        const=24,
        metavar="N",
        help="instead of the comparison: predict N random strategies by a table and measure them (24)",
    )
    output = result.add_argument_group("where it goes")
    output.add_argument("--out", type=Path, metavar="FILE", help="all measurements as JSON")
    output.add_argument("--mlflow", metavar="URI", help="log to this MLflow store, e.g. sqlite:///mlflow.db")
    output.add_argument("--quiet", action="store_true", help="no progress on standard error")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return answer(parser(), arguments, _bench)


def _bench(options: argparse.Namespace) -> None:
    _check(options)
    import_modules(options.imports)
    print(validate(options, *_subject(options)) if options.validate_table else comparison_text(run(options)))


def run(options: argparse.Namespace) -> Comparison:
    """Make the variants, time them, write what was asked for."""
    strategies = {Path(file).stem: Strategy.load(file) for file in options.strategy}
    if len(strategies) != len(options.strategy):
        raise ConfigError(f"the strategy files need different names, but got {options.strategy}")
    what, model, inputs = _subject(options)
    adapter = adapter_for(model)
    given = Prompt.of(adapter, inputs)
    variants, notes = make_variants(
        model,
        adapter,
        given,
        strategies,
        [0.5, 0.3, 0.14] if options.ratio is None else options.ratio,
        depths=options.depths,
        selector=options.selector,
        compile=options.compile,
    )
    rows = compare(
        model,
        adapter,
        inputs,
        variants,
        rounds=options.rounds,
        warmup=options.warmup,
        passes=options.passes or (2 if adapter.device.type == "cuda" else 1),
        num_tokens=options.tokens,
        clock=options.clock,
        seed=options.seed,
        on_progress=None if options.quiet else _show,
    )
    result = Comparison(
        what, environment(model, adapter, options.clock), given.counts, options.tokens, tuple(rows), tuple(notes)
    )
    if options.out is not None:
        write_json(options.out, result.to_json(), indent=1)
    if options.mlflow is not None:
        from dop_search.app.config import TrackingConfig
        from dop_search.app.tracking.store import log_benchmark

        log_benchmark(TrackingConfig(uri=options.mlflow), result.to_json())
    return result


def validate(options: argparse.Namespace, what: str, model: PreTrainedModel, inputs: dict[str, Tensor]) -> str:
    """Read or measure the latency table, and compare what it predicts with what random strategies take; in words."""
    adapter = adapter_for(model)
    counts, where = Prompt.of(adapter, inputs).counts, environment(model, adapter, options.clock)
    how: Any = {"clock": options.clock, "seed": options.seed, "on_progress": None if options.quiet else _show}
    if options.table is not None and options.table.is_file():
        table = LatencyTable.load(options.table, where)
    else:
        table = measure_table(model, [counts], rounds=options.rounds, **how)
        if options.table is not None:
            table.save(options.table)
    strategies = random_strategies(adapter.dims.num_layers, counts.visual, options.validate_table, options.seed)
    predictions = validate_table(model, table, counts, strategies, rounds=max(2, options.rounds // 2), **how)
    if options.out is not None:
        data = {
            **VALIDATION.stamp,
            "what": what,
            "environment": where,
            "text_tokens": counts.text,
            "visual_tokens": counts.visual,
            "summary": summary(predictions),
            "predictions": [item.to_json() for item in predictions],
        }
        write_json(options.out, data, indent=1)
    return validation_text(predictions)


def _check(options: argparse.Namespace) -> None:
    """Refuse values out of range, a missing extra and a folder that cannot be written; set the threads."""
    if options.mlflow is not None:
        check_extras("--mlflow", "search")
    for name in ("rounds", "tokens", "batch", "passes", "image_size", "num_threads", "validate_table"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"`--{name.replace('_', '-')} >= 1` must hold, but got {value}")
    if options.warmup < 0:
        raise ConfigError(f"`--warmup >= 0` must hold, but got {options.warmup}")
    for ratio in options.ratio or ():
        if not 0.0 < ratio <= 1.0:
            raise ConfigError(f"`0 < ratio <= 1` must hold, but got --ratio {ratio:g}")
    if options.table is not None and options.validate_table is None:
        raise ConfigError("--table needs --validate-table, e.g. `--table small.json --validate-table 24`")
    if options.shape is not None and options.weights == "pretrained":
        raise ConfigError("a --shape has no pretrained weights; give a checkpoint with --model")
    if options.out is not None:
        check_writable(options.out.parent, "--out")
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)


def _subject(options: argparse.Namespace) -> tuple[str, PreTrainedModel, dict[str, Tensor]]:
    name = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = named_device(name, "`--device` must be auto, cpu or cuda[:index]")
    dtype = options.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    if options.model is None:
        shape = SHAPES[options.shape or "small"]
        model = build(shape, device, DTYPES[dtype], options.attn)
        words = f"{shape.name} ({shape.source}), random weights"
        return words, model, prompt(shape, model, options.text_tokens, options.batch)
    if options.weights == "random":
        model, processor = _without_weights(options.model, device, DTYPES[dtype], options.attn)
    else:
        loaded = load(options.model, device=str(device), dtype=dtype, attn_implementation=options.attn)
        model, processor = loaded.model, loaded.processor
    image = Image.new("RGB", (options.image_size, options.image_size), (127, 127, 127))
    batch: Any = processor(
        images=[image] * options.batch,
        text=[chat_prompt(processor, "Describe the image.")] * options.batch,
        return_tensors="pt",
    )
    inputs = {key: value.to(device, model.dtype if value.is_floating_point() else None) for key, value in batch.items()}
    return f"{options.model}, {'random' if options.weights == 'random' else 'its'} weights", model, inputs


def _without_weights(name: str, device: torch.device, dtype: torch.dtype, attn: str) -> tuple[PreTrainedModel, Any]:
    """A model from its configuration, and its processor; its weights need not be there."""
    source = checkpoint_source(name)
    try:
        config, processor = AutoConfig.from_pretrained(source), AutoProcessor.from_pretrained(source)
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration of {name!r}: {str(error).splitlines()[0]}; point to a local folder"
        ) from error
    return random_model(config, device, dtype, attn), processor


def _show(done: int, total: int, what: str) -> None:
    end = "\n" if done == total else ""
    if sys.stderr.isatty():
        print(f"\r\033[K{done}/{total} {what}", end=end, file=sys.stderr, flush=True)
    elif done % max(1, total // 20) == 0 or done == total:
        print(f"{done}/{total}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
