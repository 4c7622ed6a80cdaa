"""SparseVLM (Zhang et al., ICML 2025, arXiv 2410.04417) and AdaptInfer (2508.06084): keep lists, by relevant text.

Criteria and recycling: :mod:`dop_search.pruning.in_decoder.sparsevlm`. Policy: at three layers of 32
(:data:`PUBLISHED_STAGES`, rounded to other depths) the keep list goes on. SparseVLM's two published versions and
AdaptInfer have their own lists of 576 tokens (:data:`KEEP_LISTS`), by equivalent tokens ``T = sum (L_i - L_{i-1}) T_i /
L``. Between them the lists are interpolated in ``T``, which is solved for FLOPs. SparseVLM's version 1 recycles: those
tokens come on top of the lists, as in the paper, and are paid for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from dop_search.baselines.base import FitContext, FittedMethod, Method
from dop_search.baselines.equal_flops import nested_strategy, solve_real
from dop_search.pruning.in_decoder.sparsevlm import with_recycled
from dop_search.strategy import Strategy

PUBLISHED_TOKENS = 576
PUBLISHED_LAYERS = 32
PUBLISHED_STAGES = {"sparsevlm": (2, 6, 15), "sparsevlm_v2": (2, 6, 15), "adaptinfer": (1, 10, 20)}
KEEP_LISTS: dict[str, dict[int, tuple[int, int, int]]] = {
    "sparsevlm": {64: (66, 30, 17), 96: (238, 48, 26), 128: (303, 110, 36), 192: (300, 200, 110)},
    "sparsevlm_v2": {64: (66, 34, 20), 96: (246, 54, 28), 128: (238, 108, 60), 192: (300, 200, 118)},
    "adaptinfer": {32: (40, 12, 0), 48: (80, 24, 2), 64: (133, 27, 3), 128: (290, 72, 18)},
}
"""Per version: equivalent tokens → tokens that are kept by score at each stage."""


@dataclass(frozen=True)
class SparseVlm(Method):
    """Solved for the equivalent tokens ``T`` (of 576).

    ``name``: ``sparsevlm`` (version 1), ``sparsevlm_v2`` or ``adaptinfer``; also the criterion's.
    """

    name: str = "sparsevlm"  # type: ignore[misc]

    @property
    def smallest(self) -> float:
        """Equivalent tokens if nothing goes on after the first stage."""
        return PUBLISHED_TOKENS * PUBLISHED_STAGES[self.name][0] / PUBLISHED_LAYERS

    def keep_list(self, equivalent: float, num_visual: int) -> list[int]:
        """Tokens kept by score at each stage, recycled ones not counted; never more than at the stage before."""
        published = KEEP_LISTS[self.name]
        nodes = [self.smallest, *published, PUBLISHED_TOKENS]
        lists = [(0, 0, 0), *published.values(), (PUBLISHED_TOKENS,) * 3]
        shares = [np.interp(equivalent, nodes, [item[i] for item in lists]) / PUBLISHED_TOKENS for i in range(3)]
        return np.minimum.accumulate([int(share * num_visual + 0.5) for share in shares]).tolist()

    def strategy(self, num_layers: int, num_visual: int, equivalent: float) -> Strategy:
        """The keep list of ``equivalent`` tokens on ``num_visual`` tokens."""
        scaled = [max(1, round(stage * num_layers / PUBLISHED_LAYERS)) for stage in PUBLISHED_STAGES[self.name]]
        stages = sorted(set(scaled))
        keep = [self.keep_list(equivalent, num_visual)[scaled.index(stage)] for stage in stages]
        counts = [num_visual]
        for best in keep:
            best = min(best, counts[-1])
            counts.append(with_recycled(counts[-1], best) if self.name == "sparsevlm" and best else best)
        return nested_strategy(num_layers, stages, counts, selector=self.name, selector_options={"stages": stages})

    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        make = partial(self.strategy, context.num_layers, context.num_visual)
        what = f"{self.name} with its published stages"
        equivalent, strategy = context.solve(make, self.smallest, PUBLISHED_TOKENS, flops_ratio, what, solve_real)
        facts = {
            "equivalent_tokens": equivalent,
            "keep_list": self.keep_list(equivalent, context.num_visual),
            "stages": list(strategy.stages),
        }
        return self.fitted(context, flops_ratio, strategy, facts)
