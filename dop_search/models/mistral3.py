"""Mistral Small 3 and LightOnOCR: a Pixtral tower for images of any size, squares of patches merged into one token."""

from __future__ import annotations

import torch
from torch import Tensor

from dop_search.models.adapter import ModelAdapter
from dop_search.models.tower import Grids, VisionCall
from dop_search.models.vision import square_means


class Mistral3Adapter(ModelAdapter):
    """``Mistral3ForConditionalGeneration``; the tokens at the ends of rows are text."""

    tower_attention = "transformer.layers.{}.attention"
    merge_key = "spatial_merge_size"

    def token_grids(self, call: VisionCall) -> list[Grids]:
        side = self.model.config.vision_config.patch_size * self.merge_size
        return [((int(height) // side, int(width) // side),) for height, width in call.arguments["image_sizes"]]

    def to_token_order(self, values: Tensor) -> Tensor:
        """See base class; the mean over each square that the model's merger unfolds."""
        grids = [grid for (grid,) in self.token_grids(self.vision_watch.current())]
        counts = [rows * columns * self.patches_per_token for rows, columns in grids]
        parts = zip(values[0].split(counts), grids, strict=True)
        return torch.cat([square_means(part, *grid, self.merge_size) for part, grid in parts])


class LightOnOcrAdapter(Mistral3Adapter):
    """``LightOnOcrForConditionalGeneration``: as Mistral Small 3, with a Qwen3 decoder."""

    tower_name = "vision_encoder"
