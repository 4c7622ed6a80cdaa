"""Ovis2: tiles of a tower whose features are mixtures of visual words, one per patch or per square of patches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dop_search.models.adapter import ModelAdapter
from dop_search.models.tower import Grids, VisionCall


class Ovis2Adapter(ModelAdapter):
    """``Ovis2ForConditionalGeneration`` (arXiv 2405.20797); the tokens around tiles are text."""

    model_types = ("ovis2",)

    @property
    def vision_tower(self) -> Any:
        """See base class."""
        return self.model.model.vision_tower

    @property
    def patches_per_token(self) -> int:
        """See base class."""
        return int(self.model.config.vision_config.hidden_stride**2)

    @property
    def _tokens_per_side(self) -> int:
        vision = self.model.config.vision_config
        return int(vision.image_size // vision.patch_size // vision.hidden_stride)

    def token_grids(self, call: VisionCall) -> list[Grids]:
        """See base class; each tile is a grid, whichever image it belongs to."""
        side = self._tokens_per_side
        return [((side, side),)] * len(call.arguments["pixel_values"])

    def to_token_order(self, values: Tensor) -> Tensor:
        """See base class; the mean over each square of patches."""
        side, stride = self._tokens_per_side, self.model.config.vision_config.hidden_stride
        mean: Tensor = values.unflatten(1, (side, stride, side, stride)).mean(dim=(2, 4))
        return mean.flatten(0, 2)

    def received_attention_module(self) -> Any:
        """See base class."""
        return self.vision_tower.transformer.encoder.layers[-1].attention
