"""DivPrune: the tokens that are farthest from each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dop_search.selectors.base import (
    SelectionSizes,
    Selector,
    SelectorInputs,
    cosine_matrix,
    finite_array,
    kept_count,
    with_rest,
)

Row = Callable[[int], np.ndarray]
"""Distances of one token to all tokens."""


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
        distance = 1.0 - finite_array(cosine_matrix(inputs.tensor("embeds")))
        chosen = max_min_order(distance.__getitem__, most_isolated(distance), kept_count(inputs, num_kept))
        return with_rest(chosen, np.arange(inputs.num_visual_tokens))

    def selection_flops(self, sizes: SelectionSizes) -> int:
        """All pairwise cosines."""
        return 2 * sizes.num_visual**2 * sizes.dims.hidden_size


@dataclass(frozen=True)
class LazyDivPruneSelector(Selector):
    """DivPrune's greedy from a start that needs no pairs: ours, not the paper's.

    Only the first token of :class:`DivPruneSelector` takes all pairwise distances. Here it is the token that is on
    average farthest from all others, by its cosine with the mean of the normalised tokens. The rest of the greedy is
    the same, and needs one row of distances per chosen token but the last: ``T`` rows in all instead of ``n``.
    """

    name = "divprune_lazy"
    requires = frozenset({"embeds"})

    def rank(self, inputs: SelectorInputs, num_kept: int | None = None) -> np.ndarray:
        units = torch.nn.functional.normalize(inputs.tensor("embeds").detach().float(), dim=-1)

        def row(unit: Tensor) -> np.ndarray:
            return 1.0 - finite_array(units @ unit[:, None])[:, 0]

        first = int(row(torch.nn.functional.normalize(units.mean(dim=0), dim=0)).argmax())
        chosen = max_min_order(lambda token: row(units[token]), first, kept_count(inputs, num_kept))
        return with_rest(chosen, np.arange(inputs.num_visual_tokens))

    def selection_flops(self, sizes: SelectionSizes) -> int:
        """A row of cosines for the mean and for each kept token but the last."""
        return 2 * max(1, sizes.num_kept) * sizes.num_visual * sizes.dims.hidden_size


def most_isolated(distance: np.ndarray) -> int:
    """The token whose nearest neighbour is farthest, of all pairs ``[n, n]``."""
    others = distance + np.diag(np.full(len(distance), np.inf))
    return int(others.min(axis=1).argmax()) if len(distance) > 1 else 0


def max_min_order(row: Row, first: int, num_chosen: int) -> np.ndarray:
    """Tokens from ``first`` on, each the one farthest from its nearest chosen token; asks for the chosen tokens' rows.

    Ties go to the earlier token.
    """
    chosen, nearest = [first], np.array(np.inf)
    while len(chosen) < num_chosen:
        nearest = np.minimum(nearest, row(chosen[-1]))
        nearest[chosen] = -np.inf
        chosen.append(int(nearest.argmax()))
    return np.array(chosen)
