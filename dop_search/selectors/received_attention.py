"""Rank visual tokens by how much the patches of the vision tower attend to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dop_search.selectors.attention_choice import received_flops
from dop_search.selectors.base import SelectionSizes, Selector, SelectorInputs, at_layer, descending


@dataclass(frozen=True)
class ReceivedAttentionSelector(Selector):
    """Mean attention that a patch receives: the stand-in for CLS attention where a tower has no CLS token.

    VisionZip (arXiv 2412.04467) and VisPruner (arXiv 2412.01818v2) use it for SigLIP and Qwen towers.

    Options:
        layer: another layer of the tower: its number from 0 (or from -1 backwards), or its depth in (0, 1]; in towers
            with windows one that attends to whole images.
    """

    layer: int | float | None = None

    name = "received_attention"

    def needs(self) -> frozenset[str]:
        """See base class."""
        return frozenset({self._field})

    @property
    def _field(self) -> str:
        return at_layer("received_attention", self.layer)

    def selection_flops(self, sizes: SelectionSizes) -> int:
        """The scores of all patches; queries and keys are projected once more, from the layer's input."""
        return received_flops(sizes)

    def rank(self, inputs: SelectorInputs, num_kept: int | None = None) -> np.ndarray:
        """See base class."""
        return descending(inputs.tensor(self._field))
