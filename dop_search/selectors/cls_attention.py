"""FasterVLM: rank visual tokens by how much the vision tower's CLS token attends to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dop_search.selectors.attention_choice import cls_flops
from dop_search.selectors.base import SelectionSizes, Selector, SelectorInputs, at_layer, descending


@dataclass(frozen=True)
class ClsAttentionSelector(Selector):
    """FasterVLM (arXiv 2412.01818): the first ``T`` by CLS attention ``a_i = mean_heads softmax(q_cls K^T / √d)_i``.

    The attention is that of the layer whose output the projector receives: layer −2 on LLaVA, which is what the paper
    reads; on a model that feeds another layer to its projector it is that layer's.

    Options:
        layer: another layer of the tower: its number from 0 (or from -1 backwards), or its depth in (0, 1].

    Not reproduced: the paper renumbers positions after dropping tokens, here kept tokens keep theirs.
    """

    layer: int | float | None = None

    name = "cls_attention"

    def needs(self) -> frozenset[str]:
        """See base class."""
        return frozenset({self._field})

    @property
    def _field(self) -> str:
        return at_layer("cls_attention", self.layer)

    def rank(self, inputs: SelectorInputs, num_kept: int | None = None) -> np.ndarray:
        """See base class."""
        return descending(inputs.tensor(self._field))

    def selection_flops(self, sizes: SelectionSizes) -> int:
        """The CLS row of scores; keys are projected once more, from the layer's input."""
        return cls_flops(sizes)
