"""Mistral Small 3 and LightOnOCR: a Pixtral tower for images of any size, squares of patches merged into one token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import unfold

from dop_search.models.adapter import ModelAdapter
from dop_search.models.tower import Grids, VisionCall
from dop_search.utils.errors import UnsupportedModelError


class Mistral3Adapter(ModelAdapter):
    """``Mistral3ForConditionalGeneration``; the tokens at the ends of rows are text."""

    model_types = ("mistral3",)

    @property
    def vision_tower(self) -> Any:
        """See base class."""
        return self.model.model.vision_tower

    @property
    def patches_per_token(self) -> int:
        """See base class."""
        return int(self.model.config.spatial_merge_size**2)

    def _patch_grids(self, call: VisionCall) -> list[tuple[int, int]]:
        """Rows and columns of each image in patches."""
        patch = self.model.config.vision_config.patch_size
        return [(int(height) // patch, int(width) // patch) for height, width in call.arguments["image_sizes"]]

    def token_grids(self, call: VisionCall) -> list[Grids]:
        """See base class."""
        merge = self.model.config.spatial_merge_size
        return [((rows // merge, columns // merge),) for rows, columns in self._patch_grids(call)]

    def to_token_order(self, values: Tensor) -> Tensor:
        """See base class; the mean over each cell that the model's merger unfolds."""
        merge, channels, means = self.model.config.spatial_merge_size, values.shape[-1], []
        start = 0
        for rows, columns in self._patch_grids(self.vision_watch.current()):
            image = values[0, start : start + rows * columns].T.reshape(1, channels, rows, columns)
            start += rows * columns
            cells = unfold(image.float(), kernel_size=merge, stride=merge).view(channels, merge**2, -1)
            means.append(cells.mean(dim=1).T)
        return torch.cat(means)

    def received_attention_module(self) -> Any:
        """See base class."""
        layer = getattr(self.model.config, "vision_feature_layer", -1)
        if not isinstance(layer, int) or not layer:
            raise UnsupportedModelError(
                "attention of the vision tower is captured in the layer that feeds the projector, but this model has "
                f"vision_feature_layer={layer}; use selector=uniform_grid or selector=random"
            )
        layers = self.vision_tower.transformer.layers
        return layers[layer if layer < 0 else layer - 1].attention


class LightOnOcrAdapter(Mistral3Adapter):
    """``LightOnOcrForConditionalGeneration``: as Mistral Small 3, with a Qwen3 decoder."""

    model_types = ("lighton_ocr",)

    @property
    def vision_tower(self) -> Any:
        """See base class."""
        return self.model.model.vision_encoder
