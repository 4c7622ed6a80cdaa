"""LFM2-VL: tiles of any size in a SigLIP 2 tower, squares of patches joined; most layers are short convolutions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from dop_search.models.adapter import ModelAdapter
from dop_search.models.tower import Grids, VisionCall
from dop_search.models.vision import padded_square_means
from dop_search.strategy.operations import ModelDims, RecurrentDims


class Lfm2VlAdapter(ModelAdapter):
    """``Lfm2VlForConditionalGeneration`` (arXiv 2511.23404)."""

    layer_types = frozenset({"conv"})
    knows_images = False
    merge_key = "downsample_factor"

    @property
    def final_norm(self) -> Any:
        return self.text_model.embedding_norm

    @property
    def dims(self) -> ModelDims:
        """See base class; a token of a short convolution makes two gates and features, all of the hidden size."""
        text: Any = self.text_config
        recurrent = RecurrentDims(
            layers=tuple(index for index, kind in enumerate(text.layer_types) if kind == "conv"),
            in_width=3 * text.hidden_size,
            out_width=text.hidden_size,
            state_size=0,
            window_size=text.hidden_size * text.conv_L_cache,
            working_size=3 * text.hidden_size,
        )
        return replace(
            super().dims,
            intermediate_size=self.layers[0].feed_forward.w1.out_features,
            recurrent=recurrent if recurrent.layers else None,
        )

    def token_grids(self, call: VisionCall) -> list[Grids]:
        """See base class; each tile is a grid, and so is the whole image after them."""
        merge = self.merge_size
        return [((rows // merge, columns // merge),) for rows, columns in call.arguments["spatial_shapes"].tolist()]

    def to_token_order(self, values: Tensor) -> Tensor:
        """See base class; tiles are padded to the largest."""
        return padded_square_means(values, self.token_grids(self.vision_watch.current()), self.merge_size)
