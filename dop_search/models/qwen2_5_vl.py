"""Qwen2.5-VL: as Qwen2-VL, with a tower that attends within windows in most layers and orders its patches by window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

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
        return self._last_full(len(self.vision_tower.blocks))

    def middle_attention_module(self) -> Any:
        """See base class: the last block of the lower half with full attention, or the first one above."""
        blocks, full = self.vision_tower.blocks, self.vision_tower.fullatt_block_indexes
        return self._last_full(max(len(blocks) // 2, min(full, default=0) + 1))

    def _last_full(self, end: int) -> Any:
        """The attention of the last block below ``end`` that attends to whole images."""
        blocks, full = self.vision_tower.blocks[:end], self.vision_tower.fullatt_block_indexes
        within = [index for index in full if index < len(blocks)]
        if not within:
            raise UnsupportedModelError(
                f"no block of the vision tower attends to whole images (it has {len(blocks)} blocks and "
                f"fullatt_block_indexes={list(full)}); use selector=uniform_grid or selector=random"
            )
        return blocks[max(within)].attn
