"""Rank visual tokens by how much the vision tower's CLS token attends to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dop_search.selectors.base import Selector, SelectorInputs, descending


@dataclass(frozen=True)
class ClsAttentionSelector(Selector):
    """Head-mean CLS attention in the layer that feeds the projector (FasterVLM, arXiv 2412.01818)."""

    name = "cls_attention"
    requires = frozenset({"cls_attention"})

    def rank(self, inputs: SelectorInputs) -> np.ndarray:
        """See base class."""
        assert inputs.cls_attention is not None
        return descending(inputs.cls_attention)
