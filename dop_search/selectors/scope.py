"""SCOPE: tokens that the CLS token attends to, and that show what the chosen ones do not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dop_search.selectors.attention_choice import AttentionSelector
from dop_search.selectors.base import SelectionSizes, SelectorInputs, cosine_matrix, finite_array, kept_count
from dop_search.selectors.sharing import in_turns, share_of


@dataclass(frozen=True)
class ScopeSelector(AttentionSelector):
    """SCOPE (NeurIPS 2025): saliency times coverage, greedily.

    A token ``j`` is covered by a set as far as ``c_j = max(0, max_i cos(x_i, x_j))``. The next token is the one with
    the greatest ``a_i^alpha · Σ_j max(0, cos(x_i, x_j) − c_j)``, with features ``x`` and the attention ``a`` in the
    layer that feeds the projector (the paper's sum over heads is its mean up to a factor, which changes nothing).

    Options:
        alpha: exponent of the attention.
        attention: see :class:`AttentionSelector`.

    Several images, and the tiles of LLaVA-NeXT, are covered each by itself, and take turns.

    Not reproduced: renumbered positions.
    """

    alpha: float = 1.0

    name = "scope"
    version = 2
    requires = frozenset({"tiles"})

    def rank(self, inputs: SelectorInputs, num_kept: int | None = None) -> np.ndarray:
        weights = finite_array(self.scores(inputs)) ** self.alpha
        total = kept_count(inputs, num_kept)

        def of_one_image(tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
            similarity = finite_array(cosine_matrix(inputs.tensor(self.space)[tokens.tolist()]))
            return coverage_order(similarity, weights[tokens], share_of(tokens, inputs, total))

        return in_turns(inputs, of_one_image)

    def selection_flops(self, sizes: SelectionSizes) -> int:
        """Attention with its keys, and all pairwise cosines."""
        return self.attention_flops(sizes) + 2 * sizes.num_visual**2 * self.states_width(sizes)


def coverage_order(similarity: np.ndarray, weights: np.ndarray, num_chosen: int) -> np.ndarray:
    """A permutation: the first ``num_chosen`` greedily by weighted gain in coverage, ties and the rest by index.

    Gains are kept up to date by the rows whose coverage grew, which become few.
    """
    count = len(weights)
    covered = np.zeros(count)
    gains = np.maximum(similarity, 0.0).sum(axis=0)
    free = np.ones(count, dtype=np.bool_)
    chosen: list[int] = []
    while len(chosen) < min(num_chosen, count):
        best = int(np.where(free, gains * weights, -np.inf).argmax())
        chosen.append(best)
        free[best] = False
        grown = np.flatnonzero(similarity[best] > covered)
        before, rows = covered[grown, None], similarity[grown]
        covered[grown] = similarity[best, grown]
        gains -= (np.maximum(rows - before, 0.0) - np.maximum(rows - covered[grown, None], 0.0)).sum(axis=0)
    return np.concatenate([chosen, np.flatnonzero(free)]).astype(np.int64)
