"""Vision features that some decoders add to their visual tokens after the first layers, on packed rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dop_search.pruning.layout import Layout
from dop_search.strategy.steps import Groups

NO_TOKEN = -1


class Deepstack:
    """Adds the features of tokens that are still in the sequence (deepstack, arXiv 2406.04334).

    Args:
        features: per layer from the first on ``[visual tokens of the batch, hidden_size]``.
        token_of_row: ``[rows]``: which of the batch's visual tokens a row holds; ``NO_TOKEN`` at text rows.
    """

    def __init__(self, features: Sequence[Tensor], layout: Layout, token_of_row: np.ndarray) -> None:
        self.features, self.layout, self.token_of_row = features, layout, token_of_row
        self._indices: dict[tuple[Groups, torch.device], tuple[Tensor, Tensor]] = {}

    def add(self, hidden: Tensor, layer: int, alive: Groups) -> Tensor:
        """What the decoder adds after ``layer``; ``hidden`` holds the rows of the text and of ``alive``."""
        if layer >= len(self.features):
            return hidden
        key, layout = (alive, hidden.device), self.layout.on(hidden.device)
        if key not in self._indices:
            rows = self.layout.rows(alive)
            places = np.flatnonzero(self.token_of_row[rows] != NO_TOKEN)
            tokens = self.token_of_row[rows[places]]
            self._indices[key] = layout.tensor(places), layout.tensor(tokens)
        places_of, tokens_of = self._indices[key]
        update = self.features[layer].to(hidden.device, hidden.dtype)
        return hidden.index_add(0, places_of, update.index_select(0, tokens_of))


def visual_numbers(visual: np.ndarray) -> np.ndarray:
    """Number of each visual token in the order of the sequence (``visual`` boolean, any shape, flattened); else
    ``NO_TOKEN``."""
    flat = visual.reshape(-1)
    return np.where(flat, np.cumsum(flat) - 1, NO_TOKEN)
