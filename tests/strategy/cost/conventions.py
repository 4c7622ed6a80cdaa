"""FLOPs as the literature counts them: our closed form has to give the numbers that papers publish.

For LLaVA-1.5-7B, unpruned, by number of tokens:

| name    | used by                                 | unit  | text | MLP | cost                           |
|---------|-----------------------------------------|-------|------|-----|--------------------------------|
| `pdrop` | PyramidDrop, CDPruner, VisionZip        | MAC   | no   | 3   | 3.817 T (576), 20.825 T (2880) |
| `fastv` | FastV, DivPrune: `4nd^2 + 2n^2d + 2ndm` | MAC   | no   | 2   | 2.99 T (576), 16.67 T (2880)   |
| `gsop`  | GSOP (arXiv 2507.02909v1), SPIDER       | 2 MAC | yes  | 3   | 9.474 T (711, text included)   |

("MLP": weight matrices that are counted.)

`gsop` equals :func:`dop_search.strategy.cost.flops.strategy_flops` on a model with a gated MLP. Grouped-query
attention, which the published formulas ignore, is counted with its real key/value width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dop_search.strategy import Strategy
from dop_search.strategy.cost.flops import full_flops, strategy_flops
from dop_search.strategy.operations import ModelDims, TokenCounts


@dataclass(frozen=True)
class Convention:
    """How a paper counts: multiply-accumulates or FLOPs, with or without text, which MLP."""

    counts_text: bool
    gated_mlp: bool
    units_per_mac: int

    def full(self, dims: ModelDims, counts: TokenCounts) -> float:
        """Cost of the unpruned prefill in the convention's unit."""
        return self._from_flops(full_flops(self._dims(dims), self._counts(counts)))

    def strategy(self, dims: ModelDims, strategy: Strategy, counts: TokenCounts) -> float:
        """Cost of the prefill under ``strategy`` in the convention's unit."""
        return self._from_flops(strategy_flops(self._dims(dims), strategy, self._counts(counts)))

    def _dims(self, dims: ModelDims) -> ModelDims:
        return replace(dims, gated_mlp=self.gated_mlp)

    def _counts(self, counts: TokenCounts) -> TokenCounts:
        return counts if self.counts_text else replace(counts, text=0)

    def _from_flops(self, flops: int) -> float:
        return flops * self.units_per_mac / 2


CONVENTIONS = {
    "pdrop": Convention(counts_text=False, gated_mlp=True, units_per_mac=1),
    "fastv": Convention(counts_text=False, gated_mlp=False, units_per_mac=1),
    "gsop": Convention(counts_text=True, gated_mlp=True, units_per_mac=2),
}
