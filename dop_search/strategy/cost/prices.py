"""What a decoder layer costs by its token counts: the interface between a kind of cost and the solvers."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
Counts = NDArray[Any]


class LayerPrices(Protocol):
    """Integer prices, so that sums over layers and samples are exact in any order.

    A layer costs ``attention + mlp``, and a forward ``fixed`` beside its layers; only attention has kinds of layers.
    Arrays of counts broadcast; every count includes the text tokens.
    """

    def attention(self, text: Counts, queries: Counts, keys: Counts, either: Counts) -> IntArray:
        """Price of a layer's attention, and of all that belongs to neither module; ``either``: queries or keys."""

    def mlp_price(self, text: Counts, keys: Counts, mlps: Counts) -> IntArray:
        """Price of a layer's feed-forward block."""

    def fixed(self, total: Counts) -> IntArray:
        """Price of a forward beside its layers, by the length of the prompt."""

    def full(self, total: Counts, num_layers: int) -> IntArray:
        """Price of the unpruned model, by the length of the prompt."""
