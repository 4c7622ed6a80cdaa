"""Qwen2.5-VL: as Qwen2-VL, with a tower that attends within windows in most layers and orders its patches by window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from dop_search.models.capture import Layer
from dop_search.models.qwen2_vl import Qwen2VLAdapter, grid_thw
from dop_search.utils.errors import UnsupportedModelError


class Qwen2_5VLAdapter(Qwen2VLAdapter):
    """``Qwen2_5_VLForConditionalGeneration`` (arXiv 2502.13923)."""

    def to_token_order(self, values: Tensor) -> Tensor:
        """See base class; the order by windows is undone as the model undoes it."""
        tower = self.vision_tower
        window_index, _ = get_vision_window_index(
            grid_thw(self.vision_watch.current()),
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        return super().to_token_order(values)[torch.argsort(window_index).to(values.device)]

    def received_attention_module(self) -> Any:
        """See base class: windows hide most patches, so it is the last block with full attention."""
        return self.attention_module(1.0)

    def tower_layer(self, layer: Layer) -> int:
        """See base class; by depth, the last block up to there with full attention, or the first one above."""
        found, count = super().tower_layer(layer), len(self.vision_tower.blocks)
        full = [index for index in self.vision_tower.fullatt_block_indexes if index < count]
        if not full or (isinstance(layer, int) and found not in full):
            raise UnsupportedModelError(
                f"{f'block {found}' if full else 'no block'} of the vision tower attends to whole images (it has "
                f"{count} blocks and fullatt_block_indexes={list(self.vision_tower.fullatt_block_indexes)}); use "
                + (f"a layer of {full}" if full else "selector=uniform_grid or selector=random")
            )
        return max((index for index in full if index <= found), default=min(full))
