"""Methods that rank by attention of the tower: the CLS token's where there is one, what a token receives elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from dop_search.selectors.base import SelectionSizes, Selector, SelectorInputs, at_layer, descending
from dop_search.utils.errors import DopError


@dataclass(frozen=True)
class AttentionSelector(Selector):
    """A method with the option ``attention``.

    Options:
        attention: ``cls`` (the CLS token's row, head-mean, and the projector's inputs as features), or ``received``
            (head-mean over all patches that ask, for towers without a CLS token; features are the tokens as the decoder
            receives them, which every family has).
    """

    attention: str = "cls"

    def __post_init__(self) -> None:
        if self.attention not in ("cls", "received"):
            raise DopError(
                f"`attention` must be cls (the CLS token's row) or received (mean over all queries, for towers without "
                f"a CLS token), but got {self.attention!r}"
            )

    @property
    def by_cls(self) -> bool:
        """Whether the CLS token's row ranks."""
        return self.attention == "cls"

    @property
    def space(self) -> Literal["features", "embeds"]:
        """Which states are compared and merged."""
        return "features" if self.by_cls else "embeds"

    def needs(self) -> frozenset[str]:
        """See base class; the attention, and the states in :attr:`space`."""
        return super().needs() | {f"{self.attention}_attention", self.space}

    def scores(self, inputs: SelectorInputs) -> Tensor:
        """``[n]`` the chosen attention."""
        return inputs.tensor(f"{self.attention}_attention")

    def attention_flops(self, sizes: SelectionSizes) -> int:
        """What the chosen attention computes."""
        return cls_flops(sizes) if self.by_cls else received_flops(sizes)

    def states_width(self, sizes: SelectionSizes) -> int:
        """Channels of the states in :attr:`space`."""
        return sizes.width if self.by_cls else sizes.dims.hidden_size


@dataclass(frozen=True)
class LayerAttentionSelector(Selector):
    """Ranks by the attention whose name it has.

    Options:
        layer: another layer of the tower than the usual one: its number from 0 (or from -1 backwards), or its depth in
            (0, 1). It costs the same.
    """

    layer: int | float | None = None

    def needs(self) -> frozenset[str]:
        return frozenset({at_layer(self.name, self.layer)})

    def rank(self, inputs: SelectorInputs, num_kept: int | None = None) -> np.ndarray:
        return descending(inputs.tensor(at_layer(self.name, self.layer)))


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


def cls_flops(sizes: SelectionSizes) -> int:
    """FLOPs of one row of scores and all its keys, projected once more from the layer's input."""
    return 2 * sizes.num_patches * sizes.width * (sizes.width + 1)


def keys_flops(sizes: SelectionSizes) -> int:
    """FLOPs of projecting all keys once more, for what compares them."""
    return 2 * sizes.num_patches * sizes.width**2


def received_flops(sizes: SelectionSizes) -> int:
    """FLOPs of all scores; queries and keys are projected once more, from the layer's input."""
    patches, width = sizes.num_patches, sizes.width
    return 2 * patches * width * (2 * width + patches)
