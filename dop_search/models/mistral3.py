"""Mistral Small 3 and LightOnOCR: a Pixtral tower for images of any size, squares of patches merged into one token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import unfold

from dop_search.models.adapter import ModelAdapter
from dop_search.models.tower import Grids, VisionCall


class Mistral3Adapter(ModelAdapter):
    """``Mistral3ForConditionalGeneration``; the tokens at the ends of rows are text."""

    tower_attention = "transformer.layers.{}.attention"

    @property
    def merge_size(self) -> int:
        return int(self.model.config.spatial_merge_size)

    def _patch_grids(self, call: VisionCall) -> list[tuple[int, int]]:
        """Rows and columns of each image in patches."""
        patch = self.model.config.vision_config.patch_size
        return [(int(height) // patch, int(width) // patch) for height, width in call.arguments["image_sizes"]]

    def token_grids(self, call: VisionCall) -> list[Grids]:
        merge = self.merge_size
        return [((rows // merge, columns // merge),) for rows, columns in self._patch_grids(call)]

    def to_token_order(self, values: Tensor) -> Tensor:
        """See base class; the mean over each cell that the model's merger unfolds."""
        merge, channels, means = self.merge_size, values.shape[-1], []
        start = 0
        for rows, columns in self._patch_grids(self.vision_watch.current()):
            image = values[0, start : start + rows * columns].T.reshape(1, channels, rows, columns)
            start += rows * columns
            cells = unfold(image.float(), kernel_size=merge, stride=merge).view(channels, merge**2, -1)
            means.append(cells.mean(dim=1).T)
        return torch.cat(means)


class LightOnOcrAdapter(Mistral3Adapter):
    """``LightOnOcrForConditionalGeneration``: as Mistral Small 3, with a Qwen3 decoder."""

    tower_name = "vision_encoder"
