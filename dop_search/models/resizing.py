"""Fewer visual tokens from the processor: images at fewer pixels, or in fewer tiles.

Nothing is resized here: the model's own processor does it, under a lower limit of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers.image_utils import SizeDict

from dop_search.models.adapter import ModelAdapter


@dataclass(frozen=True)
class InputLimit:
    """A limit of a family's processor on the size of one image; one subclass per kind of limit.

    Attributes:
        adapter: the model that reads what the processor makes.
    """

    adapter: ModelAdapter
    name: ClassVar[str]

    def highest(self, images: Any, num_visual: int) -> int:
        """The limit at which nothing changes for samples of at most ``num_visual`` tokens."""
        raise NotImplementedError

    def limit(self, images: Any, limit: int) -> None:
        """Put an image processor under the limit."""
        raise NotImplementedError

    def facts(self, images: Any, limit: int) -> dict[str, int]:
        """The limit as the image processor's documentation calls it."""
        return {self.name: limit}

    def limited(self, processor: Any, limit: int) -> Any:
        """A copy of the processor under the limit."""
        limited = copy.copy(processor)
        limited.image_processor = copy.copy(processor.image_processor)
        self.limit(limited.image_processor, limit)
        return limited

    @contextmanager
    def reading(self, model: Any, limit: int) -> Iterator[None]:
        """Within the context the model reads what the limited processor makes; most need nothing."""
        yield


@dataclass(frozen=True)
class MaxPixels(InputLimit):
    """``max_pixels`` of Qwen's processors, in steps of the pixels of one visual token."""

    name = "max_pixels"

    def highest(self, images: Any, num_visual: int) -> int:
        """See base class: no image has more tokens than its sample."""
        return num_visual

    def facts(self, images: Any, limit: int) -> dict[str, int]:
        return {self.name: self._pixels(images, limit)}

    def limit(self, images: Any, limit: int) -> None:
        """See base class; a lower ``min_pixels`` goes with it, as otherwise small images would exceed the limit."""
        pixels = self._pixels(images, limit)
        images.size = SizeDict(shortest_edge=min(images.size["shortest_edge"], pixels), longest_edge=pixels)

    @staticmethod
    def _pixels(images: Any, limit: int) -> int:
        return int(min(images.size["longest_edge"], limit * (images.patch_size * images.merge_size) ** 2))


@dataclass(frozen=True)
class MaxCrops(InputLimit):
    """Only those ``image_grid_pinpoints`` of any-resolution models that make few crops, beside the whole image."""

    name = "max_crops"

    def highest(self, images: Any, num_visual: int) -> int:
        return max(self._crops(size) for size in images.image_grid_pinpoints)

    def limit(self, images: Any, limit: int) -> None:
        images.image_grid_pinpoints = self._pinpoints(images.image_grid_pinpoints, limit)

    @contextmanager
    def reading(self, model: Any, limit: int) -> Iterator[None]:
        """See base class: the model puts the crops together by its own list."""
        before = model.config.image_grid_pinpoints
        model.config.image_grid_pinpoints = self._pinpoints(before, limit)
        try:
            yield
        finally:
            model.config.image_grid_pinpoints = before

    def _crops(self, size: Any) -> int:
        return int(size[0] // self._side * (size[1] // self._side))

    def _pinpoints(self, pinpoints: Any, limit: int) -> list[list[int]]:
        few = [list(size) for size in pinpoints if self._crops(size) <= limit]
        return few or [[self._side, self._side]]

    @property
    def _side(self) -> int:
        return int(self.adapter.model.config.vision_config.image_size)


@dataclass(frozen=True)
class MaxTiles(InputLimit):
    """``max_patches`` of InternVL's processor: tiles of an image, beside a thumbnail where there are several."""

    name = "max_patches"

    def highest(self, images: Any, num_visual: int) -> int:
        return int(images.max_patches)

    def limit(self, images: Any, limit: int) -> None:
        images.min_patches, images.max_patches = min(images.min_patches, limit), limit


def input_limit(adapter: ModelAdapter) -> InputLimit | None:
    """How the processor of a model makes fewer tokens; ``None`` where every image has the same number."""
    kinds: dict[type[InputLimit], tuple[str, ...]] = {
        MaxPixels: ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
        MaxCrops: ("llava_next", "llava_next_video", "llava_onevision"),
        MaxTiles: ("internvl",),
    }
    model_type = adapter.model.config.model_type
    return next((kind(adapter) for kind, families in kinds.items() if model_type in families), None)
