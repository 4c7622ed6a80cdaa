"""Spread the kept visual tokens evenly over the image: the second control."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dop_search.selectors.base import Selector, SelectorInputs
from dop_search.selectors.sharing import in_turns


@dataclass(frozen=True)
class UniformGridSelector(Selector):
    """Farthest-point order on the token grid, so that every prefix covers the image evenly.

    Several images are interleaved, each in its own order.
    """

    name = "uniform_grid"

    def rank(self, inputs: SelectorInputs, num_kept: int | None = None) -> np.ndarray:
        return in_turns(inputs, lambda tokens, grid: farthest_point_order(*grid))


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
