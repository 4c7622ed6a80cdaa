"""Which visual tokens come first: the extension point of every selection criterion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
from torch import Tensor

from dop_search.errors import DopError


@dataclass(frozen=True)
class SelectorInputs:
    """What a criterion may look at, for one sample.

    Attributes:
        num_visual_tokens: tokens to rank.
        image_grids: rows and columns of each image, in the order of the tokens.
        cls_attention: attention of the vision tower's CLS token (``[num_visual_tokens]``), if asked for.
        received_attention: mean attention that patches of the vision tower receive (``[num_visual_tokens]``), likewise.
    """

    num_visual_tokens: int
    image_grids: tuple[tuple[int, int], ...]
    cls_attention: Tensor | None = None
    received_attention: Tensor | None = None


@dataclass(frozen=True)
class Selector(ABC):
    """Ranks the visual tokens of a sample. A new criterion is one subclass in one file, listed in ``SELECTORS``.

    Options are dataclass fields. ``requires`` names the fields of :class:`SelectorInputs` that have to be captured.
    A ranking depends on the sample alone, never on the rest of the batch.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def rank(self, inputs: SelectorInputs) -> np.ndarray:
        """Indices of the visual tokens, best first: a permutation of ``0 .. num_visual_tokens - 1``."""

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """Names of the options."""
        return tuple(item.name for item in fields(cls))


def descending(scores: Tensor) -> np.ndarray:
    """Indices from the highest score to the lowest; ties keep the order of the tokens.

    Raises:
        DopError: if a score is not finite.
    """
    values = scores.detach().float().cpu().numpy()
    if not np.isfinite(values).all():
        raise DopError("selection scores contain NaN or infinite values; check the model's dtype and the image")
    return np.argsort(-values, kind="stable")
