"""VideoLLaMA 3: images of any size, squares of patches averaged into one token where the processor says so, Qwen2."""

from __future__ import annotations

import torch
from torch import Tensor

from dop_search.models.adapter import ModelAdapter
from dop_search.models.tower import Grids, VisionCall
from dop_search.utils.errors import UnsupportedModelError


class VideoLlama3Adapter(ModelAdapter):
    """``VideoLlama3ForConditionalGeneration`` (arXiv 2501.13106), images alone."""

    tower_name = "vision_model"

    def _sizes(self, call: VisionCall) -> list[tuple[int, int, int]]:
        """Rows and columns of each image in tokens, and the side of a token's square in patches."""
        if call.modality == "video":
            raise UnsupportedModelError(
                "tokens of a video have no grid in VideoLLaMA 3, whose processor leaves out what does not change; pass "
                "the frames as images"
            )
        grids, merges = call.arguments["image_grid_thw"].tolist(), call.arguments["image_merge_sizes"].tolist()
        return [(rows // side, columns // side, side) for (_, rows, columns), side in zip(grids, merges, strict=True)]

    def token_grids(self, call: VisionCall) -> list[Grids]:
        return [((rows, columns),) for rows, columns, _ in self._sizes(call)]

    def to_token_order(self, values: Tensor) -> Tensor:
        """See base class; the processor orders patches by the square that they are averaged in."""
        patches, means, start = values.flatten(0, -2), [], 0
        for rows, columns, side in self._sizes(self.vision_watch.current()):
            count = rows * columns * side**2
            means.append(patches[start : start + count].unflatten(0, (-1, side**2)).mean(dim=1))
            start += count
        return torch.cat(means)
