"""FitPrune (Ye et al., AAAI 2025, arXiv 2409.10197): per-layer token counts that lose at most alpha of the attention.

Offline, on validation samples of the full model: in each layer the attention that visual token ``i`` receives from
visual rows (``self_i``) and from text rows (``cross_i``), mean over rows, maximum over heads. For a given ``alpha`` a
layer can do without the lowest tokens, in the order of ``self_i * cross_i``, while the lost part of either sum stays
at or below ``alpha``; counts are averaged over the samples and never rise with depth. ``alpha`` is solved for FLOPs
by bisection. Online the tokens are ranked by the same product wherever tokens leave.

Not reproduced: the paper ranks anew after every layer. Here tokens leave at up to ``num_stages`` layers, evenly
spaced over the decoder, since a ranking computes queries and keys once more (the published code reads eager
attention's map instead); a stage keeps the count of its own layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dop_search.baselines.base import FitContext, FittedMethod, Method
from dop_search.baselines.equal_flops import nested_strategy, solve_real
from dop_search.divergence.encoding import EncodedSample, full_states, rotary
from dop_search.models.adapter import ModelAdapter
from dop_search.pruning.attention import signed
from dop_search.pruning.in_decoder import StageSample
from dop_search.pruning.in_decoder.fitprune import received_attention
from dop_search.strategy import Strategy

MAX_SAMPLES = 32
"""Validation samples that the statistics are taken from, at most."""


@dataclass(frozen=True, eq=False)
class AttentionProfile:
    """Per sample, for each number of tokens removed from a layer, the larger lost part of the two sums.

    Attributes:
        lost: one array ``[num_layers, num_visual + 1]`` per sample; rises from 0 to 1 along the second axis.
    """

    lost: tuple[np.ndarray, ...]

    @classmethod
    def from_received(cls, received: list[tuple[np.ndarray, np.ndarray]]) -> AttentionProfile:
        """From ``(self, cross)`` per sample, each ``[num_layers, num_visual]``."""
        lost = []
        for own, cross in received:
            order = np.argsort(own * cross, axis=1, kind="stable")
            parts = []
            for mass in (own, cross):
                ranked = np.take_along_axis(mass, order, axis=1).cumsum(axis=1)
                parts.append(ranked / ranked[:, -1:])
            lost.append(np.pad(np.maximum(*parts), ((0, 0), (1, 0))))
        return cls(tuple(lost))

    def counts(self, alpha: float, num_visual: int) -> np.ndarray:
        """Tokens (of ``num_visual``) that each layer keeps, never more than the layer before it."""
        kept = np.zeros(len(self.lost[0]))
        for lost in self.lost:
            removed = (lost <= alpha).sum(axis=1) - 1
            kept += 1.0 - removed / (lost.shape[1] - 1)
        return np.minimum.accumulate((kept / len(self.lost) * num_visual + 0.5).astype(np.int64))


@dataclass(frozen=True)
class FitPrune(Method):
    """Solved for ``alpha``.

    Args:
        num_stages: layers at which tokens may leave, at most.
        profile: measured statistics; ``None`` measures them on the context's samples.
    """

    name = "fitprune"
    num_stages: int = 6
    profile: AttentionProfile | None = None

    def strategy(self, counts: np.ndarray, num_visual: int) -> Strategy:
        """Tokens leave at the stages, down to each stage's count."""
        num_layers = len(counts)
        layers = sorted({1 + (num_layers - 1) * index // self.num_stages for index in range(self.num_stages)})
        stages, kept = [], [num_visual]
        for layer in layers:
            if counts[layer] < kept[-1]:
                stages.append(layer)
                kept.append(int(counts[layer]))
        return nested_strategy(
            num_layers,
            stages,
            kept,
            selector="fitprune",
            selector_options={"stages": stages},
        )

    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        """See base class."""
        profile = self.profile or measured_profile(context)
        visual = context.num_visual

        def strategy(alpha: float) -> Strategy:
            return self.strategy(profile.counts(alpha, visual), visual)

        # solve_real wants a cost that rises with its argument
        kept_part = solve_real(
            lambda part: context.pricing.ratio(strategy(1.0 - part)), 0.0, 1.0, flops_ratio, "FitPrune"
        )
        alpha = 1.0 - kept_part
        result = strategy(alpha)
        facts = {"alpha": alpha, "stages": list(result.stages), "counts": profile.counts(alpha, visual).tolist()}
        return self.fitted(context, flops_ratio, result, facts)


def measured_profile(context: FitContext) -> AttentionProfile:
    """The statistics of the context's samples, measured once."""
    if "fitprune" not in context.memo:
        loaded, teacher = context.needs_model("FitPrune")
        samples = [sample.encoded for sample in teacher.samples[:MAX_SAMPLES]]
        context.memo["fitprune"] = AttentionProfile.from_received(
            [layer_attention(loaded.adapter, sample) for sample in samples]
        )
    profile: AttentionProfile = context.memo["fitprune"]
    return profile


@torch.inference_mode()
def layer_attention(adapter: ModelAdapter, sample: EncodedSample) -> tuple[np.ndarray, np.ndarray]:
    """``(self, cross)`` of the full model in every layer, each ``[num_layers, num_visual]``, on the prompt alone."""
    received = [received_attention(view) for view in layer_inputs(adapter, sample)]
    own, cross = (np.stack([pair[side].double().cpu().numpy() for pair in received]) for side in range(2))
    return own, cross


@torch.inference_mode()
def layer_inputs(adapter: ModelAdapter, sample: EncodedSample) -> list[StageSample]:
    """What enters each layer of the full model, for the prompt of one sample."""
    length = sample.prompt_length
    cos, sin = (part[:length] for part in rotary(adapter, sample))
    visual = sample.visual[:length].to(adapter.device)
    seen: list[Tensor] = []

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"])[0])

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in adapter.layers]
    try:
        full_states(adapter, sample, length)
    finally:
        for handle in handles:
            handle.remove()
    text, candidates = (~visual).nonzero()[:, 0], visual.nonzero()[:, 0]
    return [
        StageSample(layer, hidden, cos, signed(sin), text, candidates)
        for layer, hidden in zip(adapter.layers, seen, strict=True)
    ]
