"""LLaVA-NeXT: a base view of the image and any-resolution tiles, unpadded, with a newline token after every row.

LLaVA-NeXT-Video and LLaVA-OneVision do the same to images, and pool the frames of videos. OneVision's tower is SigLIP,
and it resizes tiles when they are many.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, image_size_to_num_patches

from dop_search.models.adapter import ModelAdapter
from dop_search.models.llava import LlavaAdapter
from dop_search.models.tower import Grids, VisionCall, each_sample
from dop_search.utils.errors import DopError


class LlavaNextAdapter(LlavaAdapter):
    """``LlavaNextForConditionalGeneration`` (LLaVA-1.6)."""

    sizes_name = "image_sizes"

    def token_grids(self, call: VisionCall) -> list[Grids]:
        """See base class; the newline tokens are the last column of the tiles' grid."""
        tiles = self.tiles_per_image(call)
        ones = torch.ones(sum(tiles), self.patches_per_side**2, 1)
        packed = self._pack(ones, torch.zeros(1), call)
        side = self.patches_per_side
        return [anyres_grids(tokens[:, 0] < 0.5, count, side) for tokens, count in zip(packed, tiles, strict=True)]

    def image_grids(self, num_visual: Sequence[int]) -> list[tuple[Grids, ...]]:
        return ModelAdapter.image_grids(self, num_visual)

    def to_token_order(self, values: Tensor) -> Tensor:
        """See base class.

        The model's own packing arranges, unpads and resizes the values; newline tokens then get the mean of their row.
        """
        call = self.vision_watch.current()
        marked = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
        parts = []
        for tokens, tiles in zip(
            self._pack(marked, marked.new_zeros(marked.shape[-1]), call), self.tiles_per_image(call), strict=True
        ):
            start = self.patches_per_side**2 if tiles > 1 else 0
            parts.append(fill_newlines(tokens[:, :-1], tokens[:, -1] < 0.5, start))
        return torch.cat(parts)

    def token_tiles(self, num_visual: Sequence[int]) -> Sequence[tuple[Tensor, Sequence[tuple[int, int]]] | None]:
        """See base class; the tiles of several images of a sample are numbered through."""
        nothing = [None] * len(num_visual)
        if not any(num_visual) or (call := self.vision_watch.current()).modality != "image":
            return nothing
        images = list(zip(self._tiles_of_tokens(call), self._tile_grids(call), strict=True))
        *starts, total = itertools.accumulate((len(tiles) for tiles, _ in images), initial=0)
        result = []
        for part in each_sample(num_visual, total) or ():
            own: list[Tensor] = []
            grids, first = [], 0
            for (tiles, grid), start in zip(images, starts, strict=True):
                if part.start <= start < part.stop:
                    own.append(torch.where(tiles < 0, tiles, tiles + first))
                    grids.append(grid)
                    first += 1 + grid[0] * grid[1]
            result.append((torch.cat(own), grids) if own else None)
        return result or nothing

    def _tiles_of_tokens(self, call: VisionCall) -> list[Tensor]:
        """Per image which tile each token is from (0 the base view, then the crops), -1 for newline tokens."""
        counts, patches = self.tiles_per_image(call), self.patches_per_side**2
        marks = torch.cat([torch.arange(count) for count in counts])
        values = torch.nn.functional.one_hot(marks, max(counts)).float()[:, None].expand(-1, patches, -1)
        packed = self._pack(values, torch.zeros(max(counts)), call)
        return [torch.where(tokens.sum(dim=1) < 0.5, -1, tokens.argmax(dim=1)) for tokens in packed]

    def packed_patches(self) -> list[Tensor]:
        """See base class; DopError if a video is being encoded."""
        call = self.vision_watch.current()
        if call.modality != "image":
            raise DopError("what leaves out patches tile by tile needs images, but a video is being encoded")
        counts, patches = self.tiles_per_image(call), self.patches_per_side**2
        marks = torch.arange(1.0, 1 + sum(counts) * patches).view(-1, patches, 1)
        kept = torch.zeros(1 + marks.numel(), dtype=torch.bool)
        kept[torch.cat(self._pack(marks, torch.zeros(1), call))[:, 0].long()] = True  # newlines are 0
        return list(kept[1:].view(-1, patches).split(counts))

    def _tile_grids(self, call: VisionCall) -> list[tuple[int, int]]:
        """Rows and columns of the crops of each image; none for an image that has the base view alone."""
        config = self.model.config
        shapes = (
            get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
            for size in call.arguments["image_sizes"]
        )
        counts = self.tiles_per_image(call)
        return [(int(a), int(b)) if count > 1 else (0, 0) for (a, b), count in zip(shapes, counts, strict=True)]

    def tiles_per_image(self, call: VisionCall) -> list[int]:
        """How many tiles the tower sees of each image, the base view included."""
        config = self.model.config
        return [
            int(image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size))
            for size in call.arguments["image_sizes"]
        ]

    def _pack(self, values: Tensor, newline: Tensor, call: VisionCall) -> list[Tensor]:
        """The model's packing of ``[tiles, patches, channels]``; one ``[tokens, channels]`` per image."""
        tiles = torch.split(values, self.tiles_per_image(call))
        arguments = self.packing_arguments(call)
        packed: list[Tensor] = self.multimodal.pack_image_features(
            tiles, call.arguments["image_sizes"], image_newline=newline, **arguments
        )[0]
        return packed

    def packing_arguments(self, call: VisionCall) -> dict[str, Any]:
        """What ``pack_image_features`` of the family takes besides."""
        return {"vision_feature_select_strategy": self.model.config.vision_feature_select_strategy}


class LlavaNextVideoAdapter(LlavaNextAdapter):
    """``LlavaNextVideoForConditionalGeneration``."""

    def token_grids(self, call: VisionCall) -> list[Grids]:
        """See base class; of a video, one grid per frame."""
        if call.modality == "image":
            return super().token_grids(call)
        videos, frames = call.arguments["pixel_values_videos"].shape[:2]
        side = self.patches_per_side // self.model.config.spatial_pool_stride
        return [((side, side),) * frames] * videos

    def to_token_order(self, values: Tensor) -> Tensor:
        """See base class; the mean of the patches that a frame's token is pooled from."""
        if self.vision_watch.current().modality == "image":
            return super().to_token_order(values)
        grid = values.unflatten(1, (self.patches_per_side, self.patches_per_side)).permute(0, 3, 1, 2)
        pooled = avg_pool2d(grid, self.model.config.spatial_pool_stride)
        return pooled.permute(0, 2, 3, 1).flatten(0, 2)


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """``LlavaOnevisionForConditionalGeneration`` (arXiv 2408.03326)."""

    def token_grids(self, call: VisionCall) -> list[Grids]:
        """See base class; of a video, one grid per frame and its newline token."""
        if call.modality == "image":
            return super().token_grids(call)
        videos, frames = call.arguments["pixel_values_videos"].shape[:2]
        side = -(-self.patches_per_side // 2)
        return [((side, side),) * frames + ((1, 1),)] * videos

    def to_token_order(self, values: Tensor) -> Tensor:
        """See base class; a video's newline token gets the mean of the video."""
        call = self.vision_watch.current()
        if call.modality == "image":
            return super().to_token_order(values)
        videos = call.arguments["pixel_values_videos"].shape[0]
        pooled = self.multimodal.apply_pooling(values).reshape(videos, -1, values.shape[-1])
        return torch.cat([pooled, pooled.mean(dim=1, keepdim=True)], dim=1).flatten(0, 1)

    def tiles_per_image(self, call: VisionCall) -> list[int]:
        """See base class; one tile for each of several images in a prompt."""
        tiles = super().tiles_per_image(call)
        per_prompt = call.arguments.get("batch_num_images")
        if per_prompt is None:
            return tiles
        alone = [int(number) == 1 for number in per_prompt for _ in range(int(number))]
        return [count if single else 1 for count, single in zip(tiles, alone, strict=True)]

    def packing_arguments(self, call: VisionCall) -> dict[str, Any]:
        given = call.arguments.get("vision_aspect_ratio")
        return {"vision_aspect_ratio": self.model.config.vision_aspect_ratio if given is None else given}


def anyres_grids(newline: Tensor, tiles: int, side: int) -> Grids:
    """Of an image the base view and the joined crops, newline tokens being their last column.

    Args:
        newline: ``[tokens]`` boolean.
        tiles: base view and crops.
        side: patches per side of a tile.
    """
    if tiles == 1:
        return ((side, side), (1, 1))
    rows = int(newline.sum())
    if not rows:  # of a very long or very wide image unpadding leaves nothing but the base view
        return ((side, side),)
    return ((side, side), (rows, (len(newline) - side * side) // rows))


def fill_newlines(values: Tensor, newline: Tensor, start: int) -> Tensor:
    """Give each newline token the mean of its row; that of all rows where unpadding has left nothing else of its own.

    Args:
        values: ``[tokens, channels]``.
        newline: ``[tokens]`` boolean.
        start: where the first row begins.
    """
    filled = values.clone()
    for end in newline.nonzero()[:, 0].tolist():
        filled[end] = (values[start:end] if start < end else values[~newline]).mean(dim=0)
        start = end + 1
    return filled
