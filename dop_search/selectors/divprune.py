"""DivPrune: the tokens that are farthest from each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dop_search.selectors.base import (
    SelectionSizes,
    Selector,
    SelectorInputs,
    cosine_matrix,
    finite_array,
    kept_count,
    with_rest,
)


@dataclass(frozen=True)
class DivPruneSelector(Selector):
    """DivPrune (arXiv 2503.02175): greedy max–min diversity of the projected tokens, with ``d_ij = 1 − cos(e_i, e_j)``.

    The first token is the one whose nearest neighbour is farthest; each further one maximises its distance to the
    nearest token chosen so far.

    Not reproduced: the paper renumbers positions after dropping tokens, here kept tokens keep theirs.
    """

    name = "divprune"
    requires = frozenset({"embeds"})

    def rank(self, inputs: SelectorInputs, num_kept: int | None = None) -> np.ndarray:
        """See base class."""
        count = inputs.num_visual_tokens
        return with_rest(self._greedy(inputs, max(1, kept_count(inputs, num_kept))), np.arange(count))

    def _greedy(self, inputs: SelectorInputs, num_chosen: int) -> np.ndarray:
        distance = 1.0 - finite_array(cosine_matrix(inputs.tensor("embeds")))
        np.fill_diagonal(distance, np.inf)
        chosen = [int(distance.min(axis=1).argmax())] if len(distance) > 1 else [0]
        nearest = distance[chosen[0]].copy()
        while len(chosen) < num_chosen:
            nearest[chosen[-1]] = -np.inf
            chosen.append(int(nearest.argmax()))
            nearest = np.minimum(nearest, distance[chosen[-1]])
        return np.array(chosen)

    def selection_flops(self, sizes: SelectionSizes) -> int:
        """All pairwise cosines."""
        return 2 * sizes.num_visual**2 * sizes.dims.hidden_size
