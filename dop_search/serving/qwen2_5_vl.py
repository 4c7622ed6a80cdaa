"""Qwen2.5-VL in vLLM with the operations of a strategy: images of any size, multimodal RoPE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptReplacement

from dop_search.selectors import SelectorInputs
from dop_search.serving.model import PrunedDummies, PrunedInfo, PrunedModel, PrunedProcessor, strategy_of
from dop_search.serving.rows import BASE, NUM_MARKS, Rows


class Info(PrunedInfo, Qwen2_5_VLProcessingInfo):  # type: ignore[misc]
    """Qwen2.5-VL's, of images alone."""

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.get_max_image_tokens()}


class Dummies(PrunedDummies, Qwen2_5_VLDummyInputsBuilder):  # type: ignore[misc]
    """Qwen2.5-VL's."""


class Processor(PrunedProcessor, Qwen2_5_VLMultiModalProcessor):  # type: ignore[misc]
    """Qwen2.5-VL's; the grid that the processor has made says how many tokens an image has."""

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        strategy = strategy_of(self.info.get_hf_config())
        token = self.info.get_hf_config().image_token_id

        def replacement(index: int) -> list[int]:
            return [token] * strategy.num_kept(int(self._grid(out_mm_kwargs["image"][index]).prod()))

        return [PromptReplacement(modality="image", target=[token], replacement=replacement)]

    def _grid(self, item: Any) -> Tensor:
        """Frames, rows and columns of an image's tokens."""
        merge = self.info.get_hf_config().vision_config.spatial_merge_size
        grid: Tensor = item["image_grid_thw"].data // torch.tensor([1, merge, merge])
        return grid

    def further_positions(self, items: Sequence[Any], inputs: Any, kept: Sequence[int]) -> int:
        """See base class; an image takes as many positions as its longer side has tokens."""
        longest = [int(self._grid(item).max()) for item in items if item is not None]
        return sum(max(0, size - its) for size, its in zip(longest, kept, strict=False))


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Dummies)
class DopQwen2_5VLForConditionalGeneration(PrunedModel, Qwen2_5_VLForConditionalGeneration):  # type: ignore[misc]
    """Qwen2.5-VL: a kept token brings its row and its column along."""

    num_marks = NUM_MARKS + 4

    def check_tower(self) -> None:
        """See base class; only what the tower returns is shown, not what happens in it."""

    def shown(self, index: int, embeds: Tensor, image: Mapping[str, Any]) -> SelectorInputs:
        merge = self.config.vision_config.spatial_merge_size
        _, rows, columns = (int(size) for size in image["image_grid_thw"][index])
        return SelectorInputs(len(embeds), ((rows // merge, columns // merge),), embeds=embeds)

    def places(self, seen: SelectorInputs, kept: Tensor) -> Tensor:
        """See base class: row and column of each token, two digits of base 256 each."""
        place = torch.stack([kept // seen.image_grids[0][1], kept % seen.image_grids[0][1]], dim=1)
        return torch.stack([place // BASE, place % BASE], dim=2).flatten(1)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """See base class; placeholders of an image get its first position, to which a step adds row and column."""
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        positions, start, following = torch.zeros(len(input_tokens), dtype=torch.long), 0, 0
        for feature, (offset, *grid, _) in zip(features, self.iter_mm_grid_thw(features), strict=True):
            positions[start:offset] = following + torch.arange(offset - start)
            following += offset - start
            start = offset + feature.mm_position.length
            positions[offset:start] = following
            following += max(grid)
        positions[start:] = following + torch.arange(len(input_tokens) - start)
        return positions.expand(3, -1).clone(), following - start

    def positions(self, rows: Rows, given: Tensor) -> Tensor:
        steps = torch.cat([torch.zeros_like(rows.fed.further[:, :1]), rows.fed.further], dim=1)
        return given + steps.T
