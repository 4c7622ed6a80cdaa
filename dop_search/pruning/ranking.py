"""Rankings of the visual tokens of a batch, from what the vision tower showed while it encoded the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dop_search.errors import DopError
from dop_search.models.adapter import ModelAdapter
from dop_search.models.tower import TowerCapture, VisionWatch
from dop_search.selectors import Selector, SelectorInputs


class RankingSource:
    """Watches the vision tower for what a selector needs, and ranks each sample's visual tokens.

    Args:
        adapter: the model.
        selector: the criterion; ``None`` if rankings are given.
        rankings: fixed rankings, one per sample of the batch, instead of a selector.
    """

    def __init__(
        self, adapter: ModelAdapter, selector: Selector | None, rankings: Sequence[np.ndarray] | None = None
    ) -> None:
        self.adapter, self.selector, self.rankings = adapter, selector, rankings
        self.handles: list[RemovableHandle | TowerCapture | VisionWatch] = []
        self._scores: Tensor | None = None
        self._captured: str | None = None
        if rankings is None and selector is not None:
            for name in ("cls_attention", "received_attention"):
                if name in selector.requires:
                    self._captured = name
                    self.handles.append(getattr(adapter, f"capture_{name}")(self._receive))
            self.handles.append(adapter.vision_watch.open())

    def _receive(self, scores: Tensor) -> None:
        self._scores = scores

    def close(self) -> None:
        """Stop watching."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def rank(self, num_visual: Sequence[int]) -> list[np.ndarray]:
        """One ranking per sample.

        Args:
            num_visual: visual tokens per sample.

        Raises:
            DopError: if the given rankings or the encoded images do not fit the batch.
        """
        if self.rankings is not None:
            return self._given(len(num_visual))
        assert self.selector is not None
        name = self._captured
        scores = None if name is None else self._split_scores(num_visual)
        grids = self.adapter.image_grids(num_visual)
        result = []
        for index, count in enumerate(num_visual):
            inputs = SelectorInputs(num_visual_tokens=count, image_grids=grids[index])
            if scores is not None and name is not None:
                captured: dict[str, Any] = {name: scores[index]}
                inputs = replace(inputs, **captured)
            result.append(self.selector.rank(inputs))
        return result

    def _given(self, batch: int) -> list[np.ndarray]:
        assert self.rankings is not None
        if batch % len(self.rankings):
            raise DopError(f"`rankings` has {len(self.rankings)} entries, which do not fit a batch of {batch}")
        repeats = batch // len(self.rankings)  # beams and returned sequences repeat each sample
        return [np.asarray(ranking) for ranking in self.rankings for _ in range(repeats)]

    def _split_scores(self, num_visual: Sequence[int]) -> list[Tensor]:
        attention = self._scores
        if attention is None:
            raise DopError(
                f"the selector needs `{self._captured}` of the vision tower, which has not run inside this context: "
                "pass `pixel_values` to the pruned model, or give `rankings=`"
            )
        available, wanted = attention.numel(), sum(num_visual)
        if available == 0 or wanted % available:
            raise DopError(f"{wanted} visual tokens in the batch do not match {available} tokens encoded by the tower")
        repeats = wanted // available  # generate() encodes an image once for all of its beams
        flat, scores, start = attention.reshape(-1), [], 0
        for index, count in enumerate(num_visual):
            scores.append(flat[start : start + count])
            if (index + 1) % repeats == 0:
                start += count
        return scores


def visual_counts(visual: Tensor) -> list[int]:
    """Visual tokens per sample of a ``[batch, length]`` mask."""
    return [int(count) for count in torch.sum(visual, dim=1).tolist()]
