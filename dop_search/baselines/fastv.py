"""FastV (Chen et al., ECCV 2024, arXiv 2403.06764): drop tokens at layer K by the last token's attention in layer K -
1.

Criterion: :class:`dop_search.pruning.in_decoder.FastVSelector`. Policy: the kept ``n`` tokens have all operations, the
others those of layers below ``K``. Published: K = 2 or 3 with half of the tokens; for an average of ``T`` tokens
``n`` follows from ``T = (K N + (L - K) n) / L``. Here ``n`` is solved for FLOPs and ``K`` stays 2.

The released code drops once, in the prefill, and goes on from the shorter cache, as here.
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
        """See base class."""
        return {"stages": [self.layer - 1]}
