"""Families whose vision towers show selectors no attention: towers of timm, and Aria, whose tokens have no place.

Selectors that look at the visual tokens themselves work: ``divprune``, ``divprune_lazy``, ``uniform_grid``, ``random``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, NoReturn

from torch import Tensor
from torch.nn import Conv2d
from transformers.modeling_outputs import MoeModelOutputWithPast

from dop_search.models.adapter import ModelAdapter
from dop_search.models.capture import refuse
from dop_search.models.tower import Grids, VisionCall
from dop_search.strategy.operations import ModelDims


class ClosedTowerAdapter(ModelAdapter):
    """What these families have in common."""

    tower_kind: ClassVar[str]

    def received_attention_module(self) -> NoReturn:
        """See base class; there is none that can be looked into."""
        raise refuse("its attention", f"the vision tower of {type(self.model).__name__} is {self.tower_kind}")

    @property
    def attention_modules(self) -> list[Any]:
        self.received_attention_module()


class TimmAdapter(ClosedTowerAdapter):
    """A tower of timm, whose configuration says neither width nor patches: they are those of its first convolution."""

    @property
    def _first(self) -> Conv2d:
        return next(part for part in self.vision_tower.modules() if isinstance(part, Conv2d))

    @property
    def patch_size(self) -> int:
        return int(self._first.stride[0])

    @property
    def tower_width(self) -> int:
        return int(self._first.out_channels)


class FastVlmAdapter(TimmAdapter):
    """``FastVlmForConditionalGeneration`` (arXiv 2412.13303): the last, coarsest map of a convolutional tower."""

    tower_kind = "convolutional (FastViT)"

    @property
    def tile_grid(self) -> tuple[int, int]:
        """See base class; images of one size."""
        side = round(self.model.config.image_seq_length**0.5)
        return side, side


class PerceptionLMAdapter(TimmAdapter):
    """``PerceptionLMForConditionalGeneration`` (arXiv 2504.13180): tiles of one size, squares of patches averaged.

    A video is encoded by the method for images, frame after frame.
    """

    tower_kind = "of timm"
    knows_images = False
    merge_key = "projector_pooling_ratio"

    @property
    def tile_grid(self) -> tuple[int, int]:
        rows, columns = self.vision_tower.timm_model.patch_embed.grid_size
        return rows // self.merge_size, columns // self.merge_size

    def token_grids(self, call: VisionCall) -> list[Grids]:
        """See base class; tiles are of images, the whole image first."""
        return [(self.tile_grid,)] * len(call.arguments["pixel_values"].flatten(0, 1))


class AriaAdapter(ClosedTowerAdapter):
    """``AriaForConditionalGeneration`` (arXiv 2410.05993): experts in every layer, beside some that are shared.

    Visual tokens are learned queries, which attend to all patches of an image: a row, not a grid.
    """

    tower_kind = "read by queries that attend to all of its patches (its tokens have no place in the image)"
    decoder_output = MoeModelOutputWithPast
    casts_pixels = False

    def token_grids(self, call: VisionCall) -> list[Grids]:
        """See base class; as many queries as the projector has for images of that size."""
        tiles, side = call.arguments["pixel_values"], self.model.config.vision_config.patch_size
        patches = (tiles.shape[-2] // side) * (tiles.shape[-1] // side)
        return [((1, self.model.config.projector_patch_to_query_dict[patches]),)] * len(tiles)

    def to_token_order(self, values: Tensor) -> NoReturn:
        self.received_attention_module()

    @property
    def dims(self) -> ModelDims:
        """See base class; what is shared has no gate."""
        text: Any = self.text_config
        return replace(
            super().dims,
            gated_mlp=True,
            num_experts=text.moe_num_experts,
            active_experts=text.moe_topk,
            shared_expert_size=text.intermediate_size * text.moe_num_shared_experts,
            shared_expert_gate=False,
        )
