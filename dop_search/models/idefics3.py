"""Idefics3 and SmolVLM: tiles of a SigLIP tower, a square of patches shuffled into one visual token."""

from __future__ import annotations

from dop_search.models.adapter import ModelAdapter
from dop_search.models.tower import Grids, VisionCall


class Idefics3Adapter(ModelAdapter):
    """``Idefics3ForConditionalGeneration`` (arXiv 2408.12637) and ``SmolVLMForConditionalGeneration`` (2504.05299).

    Video frames come as tiles of an image.
    """

    decoder_name, tower_name = "text_model", "vision_model"
    knows_images = False
    merge_key = "scale_factor"

    def token_grids(self, call: VisionCall) -> list[Grids]:
        """See base class; each tile is a grid, whichever image it belongs to. Tiles of zeros pad the batch."""
        tiles = call.arguments["pixel_values"].flatten(0, 1).flatten(1)
        return [(self.tile_grid,)] * max(1, int(tiles.any(dim=1).sum()))
