"""A random order of the visual tokens: the control that published criteria have to beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dop_search.selectors.base import Selector, SelectorInputs, check_options


@dataclass(frozen=True)
class RandomSelector(Selector):
    """One random permutation per number of visual tokens, fixed by ``seed``, so that a batch changes nothing."""

    name = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self.seed >= 0, "`seed >= 0`", seed=self.seed)

    def rank(self, inputs: SelectorInputs, num_kept: int | None = None) -> np.ndarray:
        return np.random.default_rng([self.seed, inputs.num_visual_tokens]).permutation(inputs.num_visual_tokens)
