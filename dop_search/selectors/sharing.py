"""Methods that are defined on one image, applied to a sample with several: each image gets its share of the tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dop_search.selectors.base import Selection, Selector, SelectorInputs, kept_count

Ranked = tuple[np.ndarray, np.ndarray]
"""Tokens, and how far down their image's order each one stands."""

OneImage = Callable[[SelectorInputs, int], Selection]


def shares(weights: np.ndarray, capacities: np.ndarray, total: int) -> np.ndarray:
    """Cut ``total`` tokens by weight, at most ``capacities`` each; largest remainders first, ties by index.

    What a full part cannot take goes to the others by the same rule.
    """
    result = np.zeros(len(weights), dtype=np.int64)
    weights = np.asarray(weights, dtype=np.float64)
    while (left := min(total, int(capacities.sum())) - int(result.sum())) > 0:
        open_ = result < capacities
        part = np.where(open_, weights, 0.0)
        part = np.where(open_, 1.0, 0.0) if part.sum() <= 0 else part
        ideal = left * part / part.sum()
        whole = np.floor(ideal + 1e-9).astype(np.int64)
        for index in np.argsort(-(ideal - whole), kind="stable")[: left - int(whole.sum())]:
            whole[index] += 1
        result = np.minimum(result + whole, capacities)
    return result


def image_slices(inputs: SelectorInputs) -> Iterator[slice]:
    """The tokens of each image."""
    start = 0
    for rows, columns in inputs.image_grids:
        yield slice(start, start + rows * columns)
        start += rows * columns


def per_image(inputs: SelectorInputs, num_kept: int | None, choose: OneImage) -> Selection:
    """Run a method on every image and join the choices.

    The kept tokens are cut by the images' sizes. In the joint order the images take turns by relative rank, kept
    tokens before all others.
    """
    total = kept_count(inputs, num_kept)
    parts = list(image_slices(inputs))
    if len(parts) == 1:
        return choose(inputs, total)
    sizes = np.array([part.stop - part.start for part in parts])
    counts = shares(sizes, sizes, total)
    heads: list[Ranked] = []
    tails: list[Ranked] = []
    slots, features = [], []
    space = Selection(np.empty(0)).space
    for part, grid, count in zip(parts, inputs.image_grids, counts, strict=True):
        found = choose(_one_image(inputs, part, grid), int(count))
        for target, order in ((heads, found.order[:count]), (tails, found.order[count:])):
            target.append((order + part.start, np.arange(len(order)) / max(1, len(order))))
        if found.features is not None:
            slots.append(found.slots + part.start)
            features.append(found.features)
            space = found.space
    order = np.concatenate([_take_turns(heads), _take_turns(tails)])
    if not features:
        return Selection(order)
    return Selection(order, np.concatenate(slots), torch.cat(features), space)


def _take_turns(parts: list[Ranked]) -> np.ndarray:
    progress = np.concatenate([turn for _, turn in parts])
    return np.concatenate([order for order, _ in parts])[np.argsort(progress, kind="stable")].astype(np.int64)


def _one_image(inputs: SelectorInputs, part: slice, grid: tuple[int, int]) -> SelectorInputs:
    """The inputs of one image; text is shared, per-token tensors are cut."""
    whole = {"text_embeds", "pixel_values"}
    cut: dict[str, Any] = {
        item.name: value[part]
        for item in fields(inputs)
        if isinstance(value := getattr(inputs, item.name), Tensor) and item.name not in whole
    }
    return replace(inputs, num_visual_tokens=part.stop - part.start, image_grids=(grid,), **cut)


@dataclass(frozen=True)
class PerImageSelector(Selector):
    """A method that is defined on one image, for a given number of kept tokens; :meth:`one_image` is all it says."""

    nested = False

    @abstractmethod
    def one_image(self, inputs: SelectorInputs, num_kept: int) -> Selection:
        """The choice for an image of its own."""

    def rank(self, inputs: SelectorInputs, num_kept: int | None = None) -> np.ndarray:
        """See base class."""
        return self.select(inputs, num_kept).order

    def select(self, inputs: SelectorInputs, num_kept: int | None = None) -> Selection:
        """See base class."""
        return per_image(inputs, num_kept, self.one_image)
