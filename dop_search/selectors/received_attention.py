"""Rank visual tokens by how much the patches of the vision tower attend to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dop_search.operations import ModelDims
from dop_search.selectors.attention_choice import attention_flops
from dop_search.selectors.base import Selector, SelectorInputs, descending


@dataclass(frozen=True)
class ReceivedAttentionSelector(Selector):
    """Mean attention that a patch receives: the stand-in for CLS attention where a tower has no CLS token.

    VisionZip (arXiv 2412.04467) and VisPruner (arXiv 2412.01818v2) use it for SigLIP and Qwen towers.
    """

    name = "received_attention"
    requires = frozenset({"received_attention"})

    def selection_flops(
        self,
        num_visual: int,
        dims: ModelDims,
        num_kept: int | None = None,
        vision_width: int | None = None,
        num_patches: int | None = None,
    ) -> int:
        """The scores of all patches; queries and keys are projected once more, from the layer's input."""
        width = vision_width or dims.hidden_size
        return attention_flops("received", num_visual, num_patches, width)

    def rank(self, inputs: SelectorInputs, num_kept: int | None = None) -> np.ndarray:
        """See base class."""
        return descending(inputs.tensor("received_attention"))
