"""FastV (Chen et al., ECCV 2024, arXiv 2403.06764) and EntropyPrune: drop tokens at layer K by what layer K - 1 shows.

FastV: the attention of the prompt's last token (:class:`dop_search.pruning.in_decoder.FastVSelector`). EntropyPrune
(Wang et al., arXiv 2602.17196): the entropy of a token's queries (:mod:`dop_search.pruning.in_decoder.entropyprune`).
Policy of both: the kept ``n`` tokens have all operations, the others those of layers below ``K``. Published: FastV
K = 2 or 3 with half of the tokens, EntropyPrune K = 2 on LLaVA; for an average of ``T`` tokens ``n`` follows from
``T = (K N + (L - K) n) / L``. Here ``n`` is solved for FLOPs and ``K`` stays 2.

The released codes drop once, in the prefill, and go on from the shorter cache, as here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dop_search.baselines.one_stage import OneStage


@dataclass(frozen=True)
class FastV(OneStage):
    """The criterion's stage is the layer below K, whose attention ranks."""

    name = "fastv"
    title = "FastV"

    def selector_options(self) -> Mapping[str, Any]:
        return {"stages": [self.layer - 1]}


@dataclass(frozen=True)
class EntropyPrune(FastV):
    """Ranks by queries instead of attention."""

    name = "entropyprune"
    title = "EntropyPrune"
