"""IVC-Prune (Sun et al., ICLR 2026, arXiv 2602.03060): one selection by values and positions at a middle layer.

Criterion: :class:`dop_search.pruning.in_decoder.IvcPruneSelector`. Policy as FastV's: the others leave at layer ``K``.
Published: ``K`` is half of the decoder on LLaVA-1.5 and InternVL2.5 (16 of 32), 16 of 28 on Qwen2.5-VL-7B, with about
30 % of the tokens. A budget that needs more than that moves ``K`` forward, as far as a tenth of the tokens stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dop_search.baselines.base import FitContext, FittedMethod
from dop_search.baselines.one_stage import OneStage

SMALLEST_SHARE = 0.1


@dataclass(frozen=True)
class IvcPrune(OneStage):
    """The criterion's stage is the layer below K, whose values rank; ``layer`` 0: half of the decoder."""

    name = "ivc_prune"
    title = "IVC-Prune"
    layer: int = 0

    def selector_options(self) -> Mapping[str, Any]:
        return {"stages": [self.layer - 1]}

    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        if self.layer:
            return super().fit(context, flops_ratio)
        layers, visual = context.num_layers, context.num_visual
        few = max(1, round(SMALLEST_SHARE * visual))
        published = max(1, layers // 2)
        fits = (
            layer
            for layer in range(published, 1, -1)
            if context.pricing.ratio(replace(self, layer=layer).strategy(layers, visual, few)) <= flops_ratio
        )
        chosen = replace(self, layer=next(fits, 1))
        fitted = chosen.fit(context, flops_ratio)
        if chosen.layer == published:
            return fitted
        return replace(fitted, notes=(*fitted.notes, f"K={chosen.layer} instead of {published}"))
