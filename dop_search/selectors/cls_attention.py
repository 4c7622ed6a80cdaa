"""FasterVLM: rank visual tokens by how much the vision tower's CLS token attends to them."""

from __future__ import annotations

from dataclasses import dataclass

from dop_search.selectors.attention_choice import LayerAttentionSelector, cls_flops
from dop_search.selectors.base import SelectionSizes


@dataclass(frozen=True)
class ClsAttentionSelector(LayerAttentionSelector):
    """FasterVLM (arXiv 2412.01818): the first ``T`` by CLS attention ``a_i = mean_heads softmax(q_cls K^T / √d)_i``.

    The attention is that of the layer whose output the projector receives: layer −2 on LLaVA, which is what the paper
    reads; on a model that feeds another layer to its projector it is that layer's.

    Options:
        layer: see :class:`LayerAttentionSelector`.

    Not reproduced: the paper renumbers positions after dropping tokens, here kept tokens keep theirs.
    """

    name = "cls_attention"

    def selection_flops(self, sizes: SelectionSizes) -> int:
        """The CLS row of scores; keys are projected once more, from the layer's input."""
        return cls_flops(sizes)
