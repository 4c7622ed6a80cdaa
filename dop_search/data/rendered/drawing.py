"""Drawing a scene. Only exactly rounded arithmetic is used, so that pixels are the same on every machine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dop_search.data.rendered.glyphs import glyph_mask
from dop_search.data.rendered.scenes import SIZE_PX, Item, Scene

_RGB: dict[str, tuple[int, int, int]] = {
    "red": (205, 30, 35),
    "orange": (245, 135, 20),
    "yellow": (240, 220, 40),
    "green": (40, 150, 55),
    "cyan": (50, 205, 215),
    "blue": (35, 65, 200),
    "purple": (125, 45, 160),
    "pink": (250, 140, 190),
}
_DARK = frozenset({"red", "green", "blue", "purple"})


def draw_scene(scene: Scene) -> NDArray[np.uint8]:
    """The image of a scene: uint8 RGB [96, 96, 3]."""
    return draw_scene_with_ids(scene)[0]


def draw_scene_with_ids(scene: Scene) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The image [96, 96, 3] and, per pixel [96, 96], 1 + the index of the item there (0: background)."""
    rng = np.random.Generator(np.random.PCG64(scene.style))
    canvas, dark = _background(rng)
    ids = np.zeros((SIZE_PX, SIZE_PX), dtype=np.uint8)
    ink = np.array([225.0, 225.0, 220.0]) if dark else np.array([30.0, 30.0, 35.0])
    if scene.kind == "chart":
        _draw_axes(canvas, scene, ink)
    else:
        _draw_clutter(canvas, rng, int(rng.integers(3, 9)))
    for index, item in enumerate(scene.items):
        if item.kind == "label" and scene.kind == "diagram":
            _draw_arrow(canvas, item, scene.items[item.target], ink)
        _draw_item(canvas, ids, item, index + 1, rng, ink)
    canvas += rng.integers(-7, 8, size=(SIZE_PX, SIZE_PX, 1))
    return np.clip(canvas, 0, 255).astype(np.uint8), ids


def _background(rng: np.random.Generator) -> tuple[NDArray[np.float64], bool]:
    """A low-saturation texture [96, 96, 3], and whether it is dark."""
    dark = bool(rng.integers(0, 4) == 0)
    base = rng.integers(40, 80) if dark else rng.integers(165, 225)
    tint = rng.integers(-10, 11, size=3)
    y, x = np.mgrid[0:SIZE_PX, 0:SIZE_PX]
    pattern, period = int(rng.integers(0, 5)), int(rng.integers(5, 14))
    strength = float(rng.integers(6, 22))
    if pattern == 0:
        texture = (x * int(rng.integers(-2, 3)) + y * int(rng.integers(-2, 3))) / 192.0
    elif pattern == 1:
        texture = ((x + y * int(rng.integers(-1, 2))) // period % 2).astype(np.float64)
    elif pattern == 2:
        texture = ((x // period + y // period) % 2).astype(np.float64)
    elif pattern == 3:
        coarse = rng.integers(0, 101, size=(12, 12)) / 100.0
        texture = np.repeat(np.repeat(coarse, 8, axis=0), 8, axis=1)
    else:
        texture = ((y // period) % 2).astype(np.float64)
    canvas: NDArray[np.float64] = (base + tint)[None, None, :] + (strength * texture)[:, :, None]
    return canvas, dark


def _draw_clutter(canvas: NDArray[np.float64], rng: np.random.Generator, count: int) -> None:
    """Grey specks and short strokes that mean nothing."""
    for _ in range(count):
        x, y, length = (int(v) for v in rng.integers((0, 0, 3), (SIZE_PX, SIZE_PX, 14)))
        grey = float(rng.integers(60, 200))
        kind = int(rng.integers(0, 3))
        if kind == 0:
            canvas[y : y + 1, x : x + length] = grey
        elif kind == 1:
            canvas[y : y + length, x : x + 1] = grey
        else:
            canvas[y : y + 2, x : x + 2] = grey


def _draw_axes(canvas: NDArray[np.float64], scene: Scene, ink: NDArray[np.float64]) -> None:
    bar = scene.items[0]
    base, unit = bar.y + bar.height, bar.height // bar.value
    for value in range(1, 10):
        canvas[base - value * unit, 4:94] = 0.75 * canvas[base - value * unit, 4:94] + 0.25 * ink
    canvas[base, 3:94] = ink
    canvas[base - 9 * unit : base, 3] = ink


def _draw_arrow(canvas: NDArray[np.float64], label: Item, part: Item, ink: NDArray[np.float64]) -> None:
    """A line from the label to the centre of its part; the part's own pixels cover nothing of the label."""
    (x0, y0), (x1, y1) = label.center, part.center
    steps = 2 * int(max(abs(x1 - x0), abs(y1 - y0))) + 1
    start, stop = 0.0, 1.0 - 0.4 * part.width / max(abs(x1 - x0), abs(y1 - y0))
    for step in range(steps + 1):
        t = start + (stop - start) * step / steps
        x, y = int(x0 + (x1 - x0) * t), int(y0 + (y1 - y0) * t)
        if not (label.x - 1 <= x <= label.x + label.width and label.y - 1 <= y <= label.y + label.height):
            canvas[y, x] = ink
    canvas[y - 1 : y + 2, x - 1 : x + 2] = ink


def _draw_item(
    canvas: NDArray[np.float64],
    ids: NDArray[np.uint8],
    item: Item,
    item_id: int,
    rng: np.random.Generator,
    ink: NDArray[np.float64],
) -> None:
    rows, columns = slice(item.y, item.y + item.height), slice(item.x, item.x + item.width)
    color = ink if not item.color else np.array(_RGB[item.color]) + rng.integers(-14, 15, size=3)
    if item.kind == "shape":
        coverage = _shape_coverage(item.shape, item.width)
        patch = canvas[rows, columns]
        canvas[rows, columns] = patch + coverage[:, :, None] * (color - patch)
        ids[rows, columns][coverage > 0.5] = item_id
        return
    if item.kind != "label":
        canvas[rows, columns] = color
        ids[rows, columns] = item_id
    if item.kind == "sign":
        text_ink = np.array([245.0, 245.0, 245.0]) if item.color in _DARK else np.array([15.0, 15.0, 20.0])
        _draw_text(canvas, item, 3, text_ink)
    elif item.kind == "label":
        canvas[rows, columns][glyph_mask(item.text, item.width, item.height)] = ink
        ids[rows, columns] = item_id


def _draw_text(canvas: NDArray[np.float64], item: Item, padding: int, ink: NDArray[np.float64]) -> None:
    height = item.height - 2 * padding
    pitch = (item.width - 2 * padding) // len(item.text)
    for i, character in enumerate(item.text):
        x, y = item.x + padding + 1 + i * pitch, item.y + padding
        canvas[y : y + height, x : x + pitch - 2][glyph_mask(character, pitch - 2, height)] = ink


_COVERAGE: dict[tuple[str, int], NDArray[np.float64]] = {}


def _shape_coverage(shape: str, size: int) -> NDArray[np.float64]:
    """Share of each pixel [size, size] inside the shape, from 3×3 samples."""
    if (shape, size) not in _COVERAGE:
        grid = (2 * np.arange(3 * size) + 1) / (3 * size) - 1
        inside = _inside(shape, grid[None, :], grid[:, None])
        _COVERAGE[shape, size] = inside.reshape(size, 3, size, 3).mean(axis=(1, 3))
    return _COVERAGE[shape, size]


def _inside(shape: str, u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether points (u, v) in [-1, 1]², v downwards, lie inside the shape."""
    radius2 = u * u + v * v
    one = np.ones_like(radius2, dtype=bool)
    if shape == "circle":
        return radius2 <= 1
    if shape == "square":
        return one & (abs(u) <= 0.9) & (abs(v) <= 0.9)
    if shape == "triangle":
        return one & (2 * abs(u) <= v + 1)
    if shape == "diamond":
        return abs(u) + abs(v) <= 1
    if shape == "star":  # hexagram: two triangles
        up = (v <= 0.5) & (1.75 * abs(u) <= v + 1)
        down = (v >= -0.5) & (1.75 * abs(u) <= 1 - v)
        return up | down
    if shape == "cross":
        return one & ((abs(u) <= 0.3) | (abs(v) <= 0.3))
    if shape == "ring":
        return (radius2 <= 1) & (radius2 >= 0.3)
    if shape == "moon":
        return (radius2 <= 1) & ((u - 0.5) * (u - 0.5) + v * v >= 0.64)
    raise ValueError(f"shape must be one of the shapes of dop_search.data.rendered.scenes, but got {shape!r}")
