"""Idefics3 and SmolVLM: tiles of a SigLIP tower, a square of patches shuffled into one visual token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dop_search.models.adapter import ModelAdapter
from dop_search.models.tower import Grids, VisionCall


class Idefics3Adapter(ModelAdapter):
    """``Idefics3ForConditionalGeneration`` (arXiv 2408.12637) and ``SmolVLMForConditionalGeneration`` (2504.05299).

    Video frames come as tiles of an image.
    """

    model_types = ("idefics3", "smolvlm")

    @property
    def text_model(self) -> Any:
        """See base class."""
        return self.model.model.text_model

    @property
    def vision_tower(self) -> Any:
        """See base class."""
        return self.model.model.vision_model

    @property
    def patches_per_token(self) -> int:
        """See base class: pixel shuffling joins a square of patches."""
        return int(self.model.config.scale_factor**2)

    def token_grids(self, call: VisionCall) -> list[Grids]:
        """See base class; each tile is a grid, whichever image it belongs to. Tiles of zeros pad the batch."""
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size // self.model.config.scale_factor
        tiles = call.arguments["pixel_values"].flatten(0, 1).flatten(1)
        return [((side, side),)] * max(1, int(tiles.any(dim=1).sum()))

    def to_token_order(self, values: Tensor) -> Tensor:
        """See base class; the mean over each cell of the pixel shuffle."""
        cells = self.multimodal.connector.pixel_shuffle(values, self.model.config.scale_factor)
        mean: Tensor = cells.unflatten(-1, (self.patches_per_token, values.shape[-1])).mean(dim=2)
        return mean.flatten(0, 1)

    def received_attention_module(self) -> Any:
        """See base class."""
        return self.vision_tower.encoder.layers[-1].self_attn
