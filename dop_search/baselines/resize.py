"""Input resizing, the control that beats many criteria (VTC-Bench, arXiv 2510.07143): the model reads a smaller image.

Where images have as many tokens as their size asks for, the model's own processor makes fewer of them: Qwen-VL by
``max_pixels``, LLaVA-NeXT and OneVision by grids of fewer crops, InternVL by fewer tiles. The image is read anew from
its pixels, the prompt is as short as it then is, and vision tower and decoder run on nothing else. Solved for that
limit, the same for all images; how many tokens result is up to their shapes, and what they cost is counted on the
prompts themselves. Prompts must come from the fitted method's processor, :meth:`FittedMethod.reading`.

Models with one size for all images have the selector ``resize`` (:mod:`dop_search.selectors.resize`) instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from dop_search.baselines.base import FitContext, FittedMethod
from dop_search.baselines.equal_flops import check_reach, solve_integer
from dop_search.baselines.pricing import Pricing
from dop_search.baselines.uniform import UniformReduction
from dop_search.models.prompts import model_inputs
from dop_search.models.resizing import InputLimit, MaxPixels, input_limit
from dop_search.strategy.cost import CostModel
from dop_search.strategy.operations import TokenCounts


@dataclass(frozen=True)
class InputResize(UniformReduction):
    """Solved for the processor's limit, or for the number of tokens where every image has the same size."""

    name: str = "resize"  # type: ignore[misc]

    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        limits = None if context.loaded is None else input_limit(context.loaded.adapter)
        if limits is None:
            return super().fit(context, flops_ratio)
        loaded, samples = context.needs_samples(self.name)
        processor = loaded.processor

        @cache
        def counts(limit: int) -> tuple[TokenCounts, ...]:
            limited = limits.limited(processor, limit)
            masks = (
                loaded.adapter.visual_token_mask(model_inputs(limited, [sample], loaded.adapter.device)["input_ids"])
                for sample in samples
            )
            return tuple(TokenCounts.of_prompt(mask[0].cpu().numpy()) for mask in masks)

        def ratio(limit: int) -> float:
            return CostModel(context.dims, counts(limit)).full_total / context.pricing.cost_model.full_total

        limit = _solve(limits, ratio, limits.highest(processor.image_processor, context.num_visual), flops_ratio)
        visual = [item.visual for item in counts(limit)]
        mean = round(float(np.mean(visual)), 2)
        facts = {**limits.facts(processor.image_processor, limit), "mean_visual_tokens": mean}
        notes = [f"{min(visual)} to {max(visual)} visual tokens per sample"]
        return FittedMethod(
            method=self.name,
            target_ratio=flops_ratio,
            flops_ratio=ratio(limit),
            hyperparameters=facts,
            notes=(*notes, *Pricing.distance_note(ratio(limit), flops_ratio)),
            runtime=lambda model: limits.reading(model, limit),
            processor=lambda whole: limits.limited(whole, limit),
        )


def _solve(limits: InputLimit, ratio: Callable[[int], float], highest: int, target: float) -> int:
    """The limit whose cost is nearest to the target; crops and tiles are few enough to try them all."""
    what = f"input resizing by {limits.name}"
    if isinstance(limits, MaxPixels):
        return solve_integer(ratio, 1, highest, target, what)
    everything = range(1, highest + 1)
    check_reach(min(map(ratio, everything)), max(map(ratio, everything)), target, what)
    return min(everything, key=lambda limit: abs(ratio(limit) - target))
