"""A random order of the visual tokens: the control that published criteria have to beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dop_search.selectors.base import Selector, SelectorInputs
from dop_search.utils.errors import DopError


@dataclass(frozen=True)
class RandomSelector(Selector):
    """One random permutation per number of visual tokens, fixed by ``seed``, so that a batch changes nothing."""

    name = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise DopError(f"`seed >= 0` must hold, but got (seed={self.seed})")

    def rank(self, inputs: SelectorInputs, num_kept: int | None = None) -> np.ndarray:
        """See base class."""
        return np.random.default_rng([self.seed, inputs.num_visual_tokens]).permutation(inputs.num_visual_tokens)
