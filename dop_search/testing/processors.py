"""Drawn images and videos for a family's processor."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw


def drawn_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with a few coloured shapes on a gradient."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    ground = np.stack([rows * 255 // height, columns * 255 // width, np.full_like(rows, 96)], axis=-1)
    picture = Image.fromarray(ground.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(4):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        draw.ellipse([x - width // 6, y - height // 6, x + width // 6, y + height // 6], fill=colour)
    return picture


def drawn_video(num_frames: int, width: int, height: int, seed: int = 0) -> np.ndarray:
    """``[frames, height, width, 3]`` of :func:`drawn_image`."""
    return np.stack([np.asarray(drawn_image(width, height, 100 * seed + frame)) for frame in range(num_frames)])
