"""FitPrune (Ye et al., AAAI 2025, arXiv 2409.10197): per-layer token counts that lose at most alpha of the attention.

Offline, on validation samples: in each layer the attention that visual token ``i`` receives from visual rows
(``self_i``) and from text rows (``cross_i``), of every pair the maximum over heads, then the mean over rows. A layer
does without the tokens that are both among the lowest by ``self`` and among the lowest by ``cross``, each sorted by
itself and as far as what is left of the sum is at least ``1 - alpha`` of the full model's. They leave after the layer's
attention; the next layer is measured without them. The counts of the samples are averaged. ``alpha`` is solved for
FLOPs by bisection. Online as many tokens leave, those with the lowest ``self_i * cross_i``.

Not reproduced: the paper ranks anew in every layer. At equal FLOPs tokens leave at up to ``num_stages`` layers, evenly
spaced over the decoder, since a ranking computes queries and keys once more (the published code reads eager
attention's map instead); a stage keeps the count of its own layer. The released search stops pruning in the layer at
which the FLOPs are saved; here the two schemes next to the target are mixed instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dop_search.baselines.base import FitContext, FittedMethod, Method
from dop_search.baselines.equal_flops import check_reach, nested_strategy, solve_real
from dop_search.divergence.encoding import EncodedSample, full_states, rotary
from dop_search.models.adapter import ModelAdapter
from dop_search.pruning.attention import extension_mask, signed
from dop_search.pruning.in_decoder import StageSample
from dop_search.pruning.in_decoder.fitprune import received_attention
from dop_search.pruning.layer import EAGER_PARTS, Side, extend_layer
from dop_search.strategy import Strategy

PUBLISHED_TOKENS = 576

PUBLISHED_SCHEMES: dict[int, tuple[int, ...]] = {
    0: (0,) * 32,
    10: (0, 0, 1, 2, 1, 0, 1, 4, 5, 5, 11, 4, 2, 2, 0, 0, 1, 1, 2, 4, 2, 10, 1, 1, 1, 2, 1, 1, 0, 1, 0, 0),
    20: (0, 0, 3, 3, 1, 1, 4, 16, 14, 15, 24, 4, 2, 3, 2, 0, 6, 0, 5, 13, 4, 19, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0),
    30: (0, 0, 7, 6, 4, 5, 16, 40, 24, 21, 24, 4, 2, 3, 4, 0, 16, 0, 11, 26, 6, 32, 3, 1, 0, 1, 2, 2, 4, 0, 0, 0),
    40: (0, 1, 21, 13, 14, 11, 41, 53, 29, 15, 14, 5, 1, 4, 5, 1, 26, 1, 13, 28, 6, 27, 2, 1, 0, 0, 1, 1, 2, 0, 0, 0),
    50: (3, 7, 49, 24, 29, 17, 59, 41, 26, 8, 10, 6, 2, 5, 7, 2, 30, 3, 13, 27, 5, 23, 2, 1, 0, 0, 1, 1, 2, 0, 0, 0),
    55: (6, 17, 69, 31, 34, 19, 59, 30, 23, 6, 8, 7, 2, 5, 8, 2, 29, 4, 12, 25, 4, 19, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
    60: (14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2, 5, 7, 4, 26, 5, 11, 24, 4, 18, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
    70: (48, 79, 118, 41, 33, 17, 36, 9, 9, 2, 3, 2, 1, 3, 4, 8, 18, 7, 8, 20, 4, 13, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
    80: (128, 127, 118, 35, 26, 8, 13, 3, 2, 1, 0, 0, 0, 2, 1, 8, 7, 8, 5, 11, 2, 6, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0),
    90: (262, 153, 80, 19, 13, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 1, 2, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0),
}
"""FLOPs of LLaVA-1.5-7B to save, in per cent → tokens of 576 that leave in each layer, after its attention
(ywh187/FitPrune at d28e418)."""

MAX_SAMPLES = 32
"""Validation samples that the counts are fitted on, at most."""
NUM_BISECTIONS = 7
"""Of alpha, until its interval is below .01 wide, as released."""

Counts = Callable[[float], np.ndarray]
"""From alpha to the visual tokens that are left after each layer, ``[num_layers]``."""


@dataclass(frozen=True)
class FitPrune(Method):
    """Solved for ``alpha``.

    Args:
        num_stages: layers at which tokens may leave, at most; ``None``: all of them, as published.
        counts: what is left after each layer, as a function of alpha; ``None`` measures it on the context's samples.
    """

    name = "fitprune"
    num_stages: int | None = 6
    counts: Counts | None = None

    @classmethod
    def published(cls, saved_percent: int) -> Strategy:
        """The released scheme of LLaVA-1.5-7B that saves so much of the FLOPs: 0, 10, … 50, 55, 60, … 90."""
        scheme = PUBLISHED_SCHEMES[saved_percent]
        return cls(num_stages=None).strategy(PUBLISHED_TOKENS - np.cumsum(scheme), PUBLISHED_TOKENS)

    def strategy(self, counts: np.ndarray, num_visual: int) -> Strategy:
        """Tokens leave after the attention of the stages, down to each stage's count."""
        num_layers = len(counts)
        number = num_layers if self.num_stages is None else self.num_stages
        stages, kept = [], [num_visual]
        for layer in sorted({(num_layers - 1) * index // number for index in range(number)}):
            if counts[layer] < kept[-1]:
                stages.append(layer)
                kept.append(int(counts[layer]))
        return nested_strategy(
            num_layers, stages, kept, keys_stay=1, selector="fitprune", selector_options={"stages": stages}
        )

    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        counts, visual = self.counts or measured_counts(context), context.num_visual

        def ratio(kept: np.ndarray) -> float:
            return context.pricing.ratio(self.strategy(kept, visual))

        mild, strong = 0.0, 1.0
        check_reach(ratio(counts(strong)), ratio(counts(mild)), flops_ratio, "FitPrune")
        for _ in range(NUM_BISECTIONS):
            middle = (mild + strong) / 2
            if ratio(counts(middle)) > flops_ratio:
                mild = middle
            else:
                strong = middle

        def mixed(part: float) -> np.ndarray:
            return np.floor(part * counts(mild) + (1.0 - part) * counts(strong) + 0.5).astype(np.int64)

        part = solve_real(lambda part: ratio(mixed(part)), 0.0, 1.0, flops_ratio, "FitPrune")
        result = self.strategy(mixed(part), visual)
        alpha = part * mild + (1.0 - part) * strong
        facts = {"alpha": alpha, "stages": list(result.stages), "counts": mixed(part).tolist()}
        return self.fitted(context, flops_ratio, result, facts)


def measured_counts(context: FitContext) -> Counts:
    """What is left after each layer on the context's samples, measured once for each alpha."""
    loaded, teacher = context.needs_model("FitPrune")
    samples = [sample.encoded for sample in teacher.samples[:MAX_SAMPLES]]

    def counts(alpha: float) -> np.ndarray:
        sums = context.once("fitprune", lambda: [received_sums(loaded.adapter, sample) for sample in samples])
        fitted = partial(fitted_counts, loaded.adapter, samples, sums, alpha, context.num_visual)
        return context.once(("fitprune", alpha), fitted)

    return counts


def received_sums(adapter: ModelAdapter, sample: EncodedSample) -> np.ndarray:
    """``[num_layers, 2]``: all that visual tokens receive from visual and from text rows in the full model."""
    sums: list[list[float]] = []

    def note(layer: int, own: np.ndarray, cross: np.ndarray) -> np.ndarray:
        sums.append([_left(own)[0], _left(cross)[0]])
        return np.empty(0, dtype=np.int64)

    prune_layer_by_layer(adapter, sample, note)
    return np.array(sums)


def fitted_counts(
    adapter: ModelAdapter, samples: Sequence[EncodedSample], sums: Sequence[np.ndarray], alpha: float, num_visual: int
) -> np.ndarray:
    """Of ``num_visual`` tokens those left after each layer ``[num_layers]``; samples count by shares of their own."""
    leaving = np.zeros(len(sums[0]))
    for sample, full in zip(samples, sums, strict=True):

        def choose(layer: int, own: np.ndarray, cross: np.ndarray, full: np.ndarray = full) -> np.ndarray:
            return dispensable(own, cross, full[layer], alpha)

        gone = prune_layer_by_layer(adapter, sample, choose)
        leaving += np.array(gone) * num_visual / max(1, sample.num_visual)
    return num_visual - np.cumsum(np.floor(leaving / len(samples) + 1e-9).astype(np.int64))


def dispensable(own: np.ndarray, cross: np.ndarray, full: np.ndarray, alpha: float) -> np.ndarray:
    """Tokens that a layer can do without by ``own`` and by ``cross``, whose sums in the full model are ``full``."""
    lowest = []
    for mass, total in zip((own, cross), full, strict=True):
        number = int((_left(mass) >= (1.0 - alpha) * total).sum()) - 1
        lowest.append(np.argsort(mass, kind="stable")[: max(0, number)])
    return np.intersect1d(lowest[0], lowest[1])


def _left(mass: np.ndarray) -> np.ndarray:
    """``[n + 1]``: the sum of ``mass`` without its 0, 1, … n lowest."""
    return np.append(np.sort(mass)[::-1].cumsum()[::-1], 0.0)


@torch.inference_mode()
def prune_layer_by_layer(
    adapter: ModelAdapter, sample: EncodedSample, leaving: Callable[[int, np.ndarray, np.ndarray], np.ndarray]
) -> list[int]:
    """Run the decoder on one prompt; after each layer's attention the visual tokens ``leaving(layer, self, cross)`` go.

    Returns how many left in each layer.
    """
    length = sample.prompt_length
    adapter.check_plain_attention("`fitprune`")
    cos, sin = (part[:length] for part in rotary(adapter, sample))
    hidden, visual, number = sample.embeds[:length], sample.visual[:length], sample.visual.cumsum(0)[:length] - 1
    result = []
    for index, layer in enumerate(adapter.layers):
        view = _view(layer, hidden, cos, sin, visual)
        gone = np.empty(0, dtype=np.int64)
        if len(view.candidates):
            own, cross = (part.double().cpu().numpy() for part in received_attention(view))
            gone = leaving(index, own, cross)
        keep = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        keep[view.candidates[torch.from_numpy(gone).to(hidden.device)]] = False
        # a row's own output of the layer does not depend on which other rows are still wanted after its attention
        eager = layer.self_attn.config._attn_implementation == "eager"
        rows = Side(None, None, cos[None, None], signed(sin)[None, None])
        mask = extension_mask(hidden[None], 0, None, None, eager)
        hidden = extend_layer(layer, hidden, rows, 1, mask, None, EAGER_PARTS)[keep]
        cos, sin, visual, number = cos[keep], sin[keep], visual[keep], number[keep]
        if index < len(sample.deepstack):
            hidden[visual] += sample.deepstack[index][number[visual]]
        result.append(len(gone))
    return result


@torch.inference_mode()
def inputs_of(modules: Sequence[Any], adapter: ModelAdapter, sample: EncodedSample, length: int | None) -> list[Tensor]:
    """What enters some modules of the full model for one sample: ``[length, hidden_size]`` each."""
    seen: list[Tensor] = []

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"])[0])

    with ExitStack() as undo:
        for module in modules:
            undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        full_states(adapter, sample, length)
    return seen


def layer_views(adapter: ModelAdapter, sample: EncodedSample) -> tuple[list[StageSample], Tensor]:
    """What enters each layer of the full model for the prompt of one sample, and the final norm."""
    adapter.check_plain_attention("the method")
    length = sample.prompt_length
    cos, sin = (part[:length] for part in rotary(adapter, sample))
    visual = sample.visual[:length].to(adapter.device)
    *seen, last = inputs_of([*adapter.layers, adapter.final_norm], adapter, sample, length)
    return [_view(layer, hidden, cos, sin, visual) for layer, hidden in zip(adapter.layers, seen, strict=True)], last


def _view(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor, visual: Tensor) -> StageSample:
    text, candidates = (~visual).nonzero()[:, 0], visual.nonzero()[:, 0]
    return StageSample(layer, hidden, cos, signed(sin), text, candidates)
