"""SparseVLM (Zhang et al., ICML 2025, arXiv 2410.04417): keep lists at three layers, by the attention of relevant text.

Criterion and recycling: :class:`dop_search.pruning.in_decoder.SparseVlmSelector`. Policy: at layers 2, 6 and 15 of 32
(rounded to other depths) the keep list goes on. Published lists of 576 tokens by equivalent tokens ``T = sum (L_i -
L_{i-1}) T_i / L``: :data:`KEEP_LISTS`. Between them the lists are interpolated in ``T``, which is solved for FLOPs;
recycled tokens come on top of the lists, as in the paper, and are paid for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dop_search.baselines.base import FitContext, FittedMethod, Method
from dop_search.baselines.equal_flops import nested_strategy, solve_real
from dop_search.pruning.in_decoder.sparsevlm import with_recycled
from dop_search.strategy import Strategy

PUBLISHED_TOKENS = 576
PUBLISHED_LAYERS = 32
PUBLISHED_STAGES = (2, 6, 15)
KEEP_LISTS: dict[int, tuple[int, int, int]] = {
    64: (66, 34, 20),
    96: (246, 54, 28),
    128: (238, 108, 60),
    192: (300, 200, 118),
}
"""Equivalent tokens → tokens that go on at each stage (second version of the paper)."""
_SMALLEST = PUBLISHED_TOKENS * PUBLISHED_STAGES[0] / PUBLISHED_LAYERS
"""Equivalent tokens if nothing goes on after the first stage."""


@dataclass(frozen=True)
class SparseVlm(Method):
    """Solved for the equivalent tokens ``T`` (of 576)."""

    name = "sparsevlm"
    recycle: bool = True

    def keep_list(self, equivalent: float, num_visual: int) -> list[int]:
        """Tokens kept by score at each stage, recycled ones not counted; never more than at the stage before."""
        nodes = [_SMALLEST, *KEEP_LISTS, PUBLISHED_TOKENS]
        lists = [(0, 0, 0), *KEEP_LISTS.values(), (PUBLISHED_TOKENS,) * len(PUBLISHED_STAGES)]
        shares = [np.interp(equivalent, nodes, [item[i] for item in lists]) / PUBLISHED_TOKENS for i in range(3)]
        return np.minimum.accumulate([int(share * num_visual + 0.5) for share in shares]).tolist()

    def strategy(self, num_layers: int, num_visual: int, equivalent: float) -> Strategy:
        """The keep list of ``equivalent`` tokens on ``num_visual`` tokens."""
        scaled = [max(1, round(stage * num_layers / PUBLISHED_LAYERS)) for stage in PUBLISHED_STAGES]
        stages = sorted(set(scaled))
        keep = [self.keep_list(equivalent, num_visual)[scaled.index(stage)] for stage in stages]
        counts = [num_visual]
        for best in keep:
            best = min(best, counts[-1])
            counts.append(with_recycled(counts[-1], best) if self.recycle and best else best)
        return nested_strategy(
            num_layers,
            stages,
            counts,
            selector="sparsevlm",
            selector_options={"stages": stages, "recycle": self.recycle},
        )

    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        """See base class."""
        layers, visual = context.num_layers, context.num_visual
        equivalent = solve_real(
            lambda value: context.pricing.ratio(self.strategy(layers, visual, value)),
            _SMALLEST,
            PUBLISHED_TOKENS,
            flops_ratio,
            "SparseVLM with its published stages",
        )
        strategy = self.strategy(layers, visual, equivalent)
        facts = {
            "equivalent_tokens": equivalent,
            "keep_list": self.keep_list(equivalent, visual),
            "stages": list(strategy.stages),
        }
        return self.fitted(context, flops_ratio, strategy, facts)
