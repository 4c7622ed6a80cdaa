"""Video-LLaVA: LLaVA-1.5 for images; for videos a tower of its own, whose frames bring their CLS tokens along."""

from __future__ import annotations

from torch import Tensor

from dop_search.models.llava import LlavaAdapter
from dop_search.models.tower import Grids, VisionCall
from dop_search.utils.errors import UnsupportedModelError


class VideoLlavaAdapter(LlavaAdapter):
    """``VideoLlavaForConditionalGeneration`` (arXiv 2311.10122), with selectors for images alone."""

    vision_towers = ("clip_vision_model",)
    tower_name = "image_tower"

    def token_grids(self, call: VisionCall) -> list[Grids]:
        _check_image(call)
        return super().token_grids(call)

    def to_token_order(self, values: Tensor) -> Tensor:
        _check_image(self.vision_watch.current())
        return super().to_token_order(values)


def _check_image(call: VisionCall) -> None:
    if call.modality == "video":
        raise UnsupportedModelError(
            "frames of a video bring their CLS tokens into the decoder of Video-LLaVA, which have no place in a grid; "
            "give `rankings=`, or pass the frames as images"
        )
