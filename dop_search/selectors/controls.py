"""The controls that published criteria have to beat: a random order, tokens evenly spread, a little of every token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from dop_search.selectors.base import (
    Selection,
    SelectionSizes,
    Selector,
    SelectorInputs,
    check_options,
    group_sums,
    with_rest,
)
from dop_search.selectors.sharing import PerImageSelector, in_turns, shares


@dataclass(frozen=True)
class RandomSelector(Selector):
    """One random permutation per number of visual tokens, fixed by ``seed``, so that a batch changes nothing."""

    name = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self.seed >= 0, "`seed >= 0`", seed=self.seed)

    def rank(self, inputs: SelectorInputs, num_kept: int | None = None) -> np.ndarray:
        return np.random.default_rng([self.seed, inputs.num_visual_tokens]).permutation(inputs.num_visual_tokens)


@dataclass(frozen=True)
class UniformGridSelector(Selector):
    """Farthest-point order on the token grid, so that every prefix covers the image evenly.

    Several images are interleaved, each in its own order.
    """

    name = "uniform_grid"

    def rank(self, inputs: SelectorInputs, num_kept: int | None = None) -> np.ndarray:
        return in_turns(inputs, lambda tokens, grid: farthest_point_order(*grid))


@dataclass(frozen=True)
class AvgPoolSelector(PerImageSelector):
    """Cut the token grid into ``T`` boxes of nearly equal size; the token in the middle of each becomes the box's mean.

    Means are taken of the projected tokens. The boxes come in an order that spreads over the image.
    """

    name = "avg_pool"
    version = 2
    requires = frozenset({"embeds"})
    merges = True

    def one_image(self, inputs: SelectorInputs, num_kept: int) -> Selection:
        (rows, columns), count = inputs.image_grids[0], inputs.num_visual_tokens
        everything = np.arange(count)
        if num_kept == 0:
            return Selection(everything)
        cells, middles = balanced_cells(rows, columns, num_kept)
        points = np.stack(np.divmod(middles, columns), axis=1)
        order = with_rest(middles[spread_order(points, len(points) // 2)], everything)
        if num_kept == count:
            return Selection(order)
        embeds = inputs.tensor("embeds").float()
        index = torch.from_numpy(cells).to(embeds.device)
        return Selection(order, middles, group_sums(embeds, index, num_kept) / index.bincount()[:, None])

    def selection_flops(self, sizes: SelectionSizes) -> int:
        """The means."""
        return sizes.num_visual * sizes.dims.hidden_size


@lru_cache(maxsize=64)
def farthest_point_order(rows: int, columns: int) -> np.ndarray:
    """Visit a grid starting near its centre, each time the point farthest from all visited ones."""
    points = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1).reshape(-1, 2)
    result = spread_order(points, (rows // 2) * columns + columns // 2)
    result.setflags(write=False)
    return result


def spread_order(points: np.ndarray, first: int) -> np.ndarray:
    """Visit ``points`` (``[n, 2]``) from ``first`` on, each time the one farthest from all visited ones."""
    order = [first]
    distance = np.full(len(points), np.inf)
    while len(order) < len(points):
        distance = np.minimum(distance, ((points - points[order[-1]]) ** 2).sum(axis=1))
        distance[order[-1]] = -1.0
        order.append(int(distance.argmax()))
    return np.array(order)


def balanced_cells(rows: int, columns: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a grid into exactly ``count`` boxes of nearly the same shape, row band by row band.

    Returns the box of each token ``[rows * columns]``, and the token in the middle of each box ``[count]``.
    """
    bands = int(np.clip(round((count * rows / columns) ** 0.5), -(-count // columns), min(rows, count)))
    per_band = shares(np.ones(bands), np.full(bands, columns), count)
    cell = np.empty((rows, columns), dtype=np.int64)
    middles, first = [], 0
    for band, number in enumerate(per_band):
        top, bottom = band * rows // bands, (band + 1) * rows // bands
        for index in range(number):
            left, right = index * columns // number, (index + 1) * columns // number
            cell[top:bottom, left:right] = first + index
            middles.append((top + bottom) // 2 * columns + (left + right) // 2)
        first += number
    return cell.reshape(-1), np.array(middles, dtype=np.int64)
