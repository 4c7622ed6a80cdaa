"""Cutting a token grid into cells: what average pooling and a smaller image do to it."""

from __future__ import annotations

import numpy as np

from dop_search.selectors.sharing import shares

MAX_ASPECT_CHANGE = 2.0


def balanced_cells(rows: int, columns: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a grid into exactly ``count`` boxes of nearly the same shape, row band by row band.

    Returns:
        The box of each token ``[rows * columns]``, and the token in the middle of each box ``[count]``.
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


def smaller_grid(rows: int, columns: int, count: int) -> tuple[int, int]:
    """The largest grid of at most ``count`` cells whose aspect is within a factor of two of the original's."""
    candidates = []
    for a in range(1, min(rows, count) + 1):
        b = min(columns, count // a)
        change = max(a * columns / (b * rows), b * rows / (a * columns))
        candidates.append((change <= MAX_ASPECT_CHANGE, a * b, -change, a, b))
    return max(candidates)[3:]


def grid_cells(rows: int, columns: int, small: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Map a grid onto a smaller one.

    Returns:
        The cell of each token ``[rows * columns]``, and the token in the middle of each cell ``[a * b]``.
    """
    a, b = small
    cells = _nearest(rows, a)[:, None] * b + _nearest(columns, b)[None, :]
    middles = _nearest(a, rows)[:, None] * columns + _nearest(b, columns)[None, :]
    return cells.reshape(-1), middles.reshape(-1)


def _nearest(length: int, onto: int) -> np.ndarray:
    """For each of ``length`` places the one of ``onto`` places that its middle falls into."""
    return ((2 * np.arange(length) + 1) * onto) // (2 * length)
