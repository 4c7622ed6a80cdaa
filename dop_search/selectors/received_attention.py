"""Rank visual tokens by how much the patches of the vision tower attend to them."""

from __future__ import annotations

from dataclasses import dataclass

from dop_search.selectors.attention_choice import LayerAttentionSelector, received_flops
from dop_search.selectors.base import SelectionSizes


@dataclass(frozen=True)
class ReceivedAttentionSelector(LayerAttentionSelector):
    """Mean attention that a patch receives: the stand-in for CLS attention where a tower has no CLS token.

    VisionZip (arXiv 2412.04467) and VisPruner (arXiv 2412.01818v2) use it for SigLIP and Qwen towers.

    Options:
        layer: see :class:`LayerAttentionSelector`; of a tower with windows a layer that attends to whole images.
    """

    name = "received_attention"

    def selection_flops(self, sizes: SelectionSizes) -> int:
        """The scores of all patches; queries and keys are projected once more, from the layer's input."""
        return received_flops(sizes)
