"""What a fitted method costs when it runs: FLOPs as counted, prefill time as a ratio, the selection's own time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from transformers import PreTrainedModel

from dop_search.baselines import FittedMethod
from dop_search.data.samples import Sample
from dop_search.evaluation.runnable import Runnable, reading, running
from dop_search.evaluation.timing.counting import count_decoder_flops
from dop_search.evaluation.timing.timing import Clock, prefill_timer, selection_timer
from dop_search.models.loading import LoadedModel
from dop_search.models.prompts import model_inputs
from dop_search.pruning import pruned
from dop_search.pruning.stages import StagePlan
from dop_search.strategy import Strategy
from dop_search.strategy.cost.flops import strategy_flops
from dop_search.strategy.operations import TokenCounts


def counted_over_closed_form(loaded: LoadedModel, sample: Sample, method: FittedMethod) -> float | None:
    """FLOPs of the decoder's prefill of one sample as ``FlopCounterMode`` counts them, divided by their closed form.

    1 where both agree. Rankings inside the decoder are part of both; what a selector computes before the decoder is
    part of neither. ``None`` for methods that no strategy expresses.
    """
    strategy = method.strategy
    if strategy is None:
        return None
    inputs = model_inputs(loaded.processor, [sample], loaded.adapter.device)
    visual = loaded.adapter.visual_token_mask(inputs["input_ids"])[0].cpu().numpy()
    counts = TokenCounts.of_prompt(visual)
    closed = strategy_flops(loaded.adapter.dims, strategy, counts)
    if strategy.stages:
        closed += StagePlan(strategy).flops(loaded.adapter.dims, counts)
    rankings = None if strategy.stages else [np.arange(visual.sum())]
    with _eager_attention(loaded.model), pruned(loaded.model, strategy, rankings):
        return count_decoder_flops(loaded.model, inputs) / closed


def prefill_times(
    loaded: LoadedModel, samples: Sequence[Sample], method: Runnable, num_rounds: int = 5
) -> dict[str, float]:
    """Time of the prefill of one batch, in turns with the full model's.

    Returns:
        ``prefill_ms_ratio``: median of the paired ratios of the decoder's time, all rankings included;
        ``selection_ms``: per sample, the ranking of visual tokens before the decoder, of which that is a part.
        On one CPU thread it is the time that this process computed, else wall time.
    """
    adapter = loaded.adapter
    clock: Clock = "cpu" if adapter.device.type == "cpu" and torch.get_num_threads() == 1 else "wall"
    full = Strategy.full(adapter.dims.num_layers)

    def read(runnable: Runnable) -> tuple[float, float]:
        inputs = model_inputs(reading(loaded, runnable).processor, samples, adapter.device)
        with ExitStack() as stack:
            stack.enter_context(running(loaded.model, runnable))
            timer = stack.enter_context(prefill_timer(adapter, clock))
            selection = stack.enter_context(selection_timer(adapter.device, clock))
            stack.enter_context(torch.inference_mode())
            loaded.model(**inputs, use_cache=True, logits_to_keep=1)
        return timer.ms, sum(selection)

    read(method)  # warm
    ratios, selections = [], []
    for turn in range(num_rounds):
        if turn % 2:
            (pruned, selection), (whole, _) = read(method), read(full)
        else:
            (whole, _), (pruned, selection) = read(full), read(method)
        ratios.append(pruned / whole)
        selections.append(selection / len(samples))
    return {"prefill_ms_ratio": float(np.median(ratios)), "selection_ms": float(np.median(selections))}


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """With attention in single matrix products, which can be counted on every device."""
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
