"""Methods that rank once inside the decoder, and from layer K on keep the best tokens only.

The others have all operations of the layers below ``K``. Papers say how many tokens are kept, or an average of ``T``,
from which the number ``n`` follows by ``T = (K N + (L - K) n) / L``; here ``n`` is solved for FLOPs. The released codes
drop once, in the prefill, and go on from the shorter cache, as here. Criteria: :mod:`dop_search.pruning.in_decoder`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from dop_search.baselines.base import FitContext, FittedMethod, Method
from dop_search.baselines.equal_flops import nested_strategy
from dop_search.strategy import Strategy

SMALLEST_SHARE = 0.1
"""Of all tokens, which IVC-Prune keeps at least before it moves ``K``."""


@dataclass(frozen=True)
class OneStage(Method):
    """Solved for the number of tokens kept from layer ``layer`` (the papers' K) on; the name is also the selector's."""

    title: ClassVar[str]
    layer: int = 2

    @abstractmethod
    def selector_options(self) -> Mapping[str, Any]:
        """Options of the criterion, ``stages`` among them."""

    def strategy(self, num_layers: int, num_visual: int, kept: int) -> Strategy:
        """Keep ``kept`` of ``num_visual`` tokens from layer ``K`` on."""
        ranked: dict[str, Any] = {"selector": self.name, "selector_options": dict(self.selector_options())}
        return nested_strategy(num_layers, [self.layer], [num_visual, kept], **ranked)

    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        make = partial(self.strategy, context.num_layers, context.num_visual)
        what = f"{self.title} with K={self.layer}"
        kept, strategy = context.solve(make, 0, context.num_visual, flops_ratio, what)
        return self.fitted(context, flops_ratio, strategy, {"K": self.layer, "kept_tokens": kept})


@dataclass(frozen=True)
class FastV(OneStage):
    """FastV (Chen et al., ECCV 2024, arXiv 2403.06764): by the attention of the prompt's last token in layer K - 1.

    Published: K = 2 or 3 with half of the tokens.
    """

    name = "fastv"
    title = "FastV"

    def selector_options(self) -> Mapping[str, Any]:
        return {"stages": [self.layer - 1]}


@dataclass(frozen=True)
class EntropyPrune(FastV):
    """EntropyPrune (Wang et al., arXiv 2602.17196): by the entropy of a token's queries; K = 2 on LLaVA."""

    name = "entropyprune"
    title = "EntropyPrune"


@dataclass(frozen=True)
class Dart(OneStage):
    """DART (Wen et al., EMNLP 2025, arXiv 2502.11494): pivots and the tokens that duplicate them least, at layer K.

    Published: K = 2, 4 + 4 pivots, reduction .667 / .778 / .889 of 576 tokens.
    """

    name = "dart"
    title = "DART"
    num_pivots: int = 4
    num_text_pivots: int = 4

    def selector_options(self) -> Mapping[str, Any]:
        pivots = {"num_pivots": self.num_pivots, "num_text_pivots": self.num_text_pivots}
        return {"stages": [self.layer], **pivots}


@dataclass(frozen=True)
class IvcPrune(FastV):
    """IVC-Prune (Sun et al., ICLR 2026, arXiv 2602.03060): by the values of layer K - 1, and by positions.

    Published: ``K`` is half of the decoder on LLaVA-1.5 and InternVL2.5 (16 of 32), 16 of 28 on Qwen2.5-VL-7B, with
    about 30 % of the tokens. A budget that needs more than that moves ``K`` forward, as far as a tenth of the tokens
    stays. ``layer`` 0: half of the decoder.
    """

    name = "ivc_prune"
    title = "IVC-Prune"
    layer: int = 0

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
