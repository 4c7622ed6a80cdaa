"""DART (Wen et al., EMNLP 2025, arXiv 2502.11494): keep pivots and the tokens that duplicate them least, at layer K =
2.

Criterion: :class:`dop_search.pruning.in_decoder.DartSelector`. Policy as FastV's: the others leave at layer ``K``,
after having had all operations below it. Published: K = 2, 4 + 4 pivots, reduction .667 / .778 / .889 of 576 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dop_search.baselines.one_stage import OneStage


@dataclass(frozen=True)
class Dart(OneStage):
    """Ranks at the door of layer K."""

    name = "dart"
    title = "DART"
    num_pivots: int = 4
    num_text_pivots: int = 4

    def selector_options(self) -> Mapping[str, Any]:
        return {
            "stages": [self.layer],
            "num_pivots": self.num_pivots,
            "num_text_pivots": self.num_text_pivots,
        }
