"""G-Prune: tokens to which the information of all others flows along their similarities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dop_search.selectors.base import SelectionSizes, Selector, SelectorInputs, check_options, cosine_matrix, descending
from dop_search.selectors.sharing import in_turns


@dataclass(frozen=True)
class GPruneSelector(Selector):
    """G-Prune (AAAI 2025, arXiv 2501.02268) on the tokens as the decoder receives them.

    Tokens are nodes of a graph with an edge where their cosine is at least ``threshold``; a token passes on what it has
    by ``softmax(cosine / temperature)`` over its edges. It starts with its L2 norm; kept are those that have the most
    per edge of theirs after ``num_steps`` steps. The whole image and all crops of a tiled one are a graph each.

    Options:
        threshold: smallest cosine of an edge, in (0, 1).
        temperature: of the softmax.
        num_steps: how often everything is passed on.

    Not reproduced: newline tokens, which the released code keeps; renumbered positions.
    """

    threshold: float = 0.5
    temperature: float = 0.03
    num_steps: int = 5

    name = "gprune"
    requires = frozenset({"embeds", "tiles"})

    def __post_init__(self) -> None:
        holds = 0.0 < self.threshold < 1.0 and self.temperature > 0.0 and self.num_steps >= 1
        check_options(holds, "`0 < threshold < 1`, `temperature > 0` and `num_steps >= 1`", **self.options())

    def rank(self, inputs: SelectorInputs, num_kept: int | None = None) -> np.ndarray:
        embeds = inputs.tensor("embeds").detach().float()
        return in_turns(
            inputs, lambda tokens, _: descending(self.information(embeds[tokens.tolist()])), join_crops=True
        )

    def information(self, embeds: Tensor) -> Tensor:
        """``[n]`` what each of ``[n, hidden_size]`` tokens has in the end, per edge."""
        cosines = cosine_matrix(embeds)
        weights = (cosines / self.temperature).masked_fill(cosines < self.threshold, -torch.inf).softmax(dim=1)
        has = embeds.norm(dim=1)
        for _ in range(self.num_steps):
            has = has @ weights
        return has / (weights > 0).sum(dim=1)

    def selection_flops(self, sizes: SelectionSizes) -> int:
        """All pairwise cosines, and the steps."""
        return 2 * sizes.num_visual**2 * (sizes.dims.hidden_size + self.num_steps)
