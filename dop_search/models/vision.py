"""The half of an adapter that is about the vision tower: what it shows, and which patches a visual token is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dop_search.models.capture import INSIDE, Layer, TowerView, capture_field, refuse
from dop_search.models.tower import Grids, TowerCapture, VisionCall, VisionWatch
from dop_search.utils.errors import DopError, UnsupportedModelError

if TYPE_CHECKING:
    from dop_search.models.adapter import ModelAdapter


class VisionAdapter:
    """What a model's vision tower offers; the base of :class:`dop_search.models.adapter.ModelAdapter`."""

    model: PreTrainedModel
    vision_watch: VisionWatch
    tower_name: ClassVar[str] = "vision_tower"
    """What the image encoder is called in the multimodal module."""
    tower_attention: str = "encoder.layers.{}.self_attn"
    """Where the tower's layers have their attention."""
    has_cls: bool = False
    """Whether the tower has a CLS token."""
    sizes_name: ClassVar[str] = ""
    """What the model calls the sizes of images, where they may have any."""
    merge_key: ClassVar[str] = ""
    """Where the configuration says how many patches per side are one visual token; empty: each is one."""
    middle_depth: ClassVar[float] = 9 / 24
    """Which share of the tower's layers lies below the end of the ``middle`` one, by which HiPrune ranks."""
    has_tower: ClassVar[bool] = True
    """Whether there is a vision tower for selectors to look at."""
    casts_pixels: ClassVar[bool] = True
    """Whether the vision tower takes float32 pixels whatever its weights are."""
    knows_images: ClassVar[bool] = True
    """Whether the model is told which tiles are of one image."""

    @property
    def vision_tower(self) -> Any:
        return getattr(self.model.model, self.tower_name)

    @property
    def tower_width(self) -> int:
        """Channels of the vision tower."""
        vision = self.model.config.vision_config
        return int(getattr(vision, "embed_dim", None) or vision.hidden_size)

    @property
    def patch_size(self) -> int:
        """Pixels per side of what the tower first makes one vector of."""
        side = self.model.config.vision_config.patch_size
        return int(side[0] if isinstance(side, (list, tuple)) else side)

    @property
    def merge_size(self) -> int:
        """Patches per side of the square that one visual token is made of."""
        return int(attrgetter(self.merge_key)(self.model.config)) if self.merge_key else 1

    @property
    def patches_per_token(self) -> int:
        """Patches of the vision tower that one visual token is made of."""
        return self.merge_size**2

    @property
    def tile_grid(self) -> tuple[int, int]:
        """Rows and columns of the visual tokens of an image (or tile), where all have one size."""
        vision = self.model.config.vision_config
        size, patch = (
            (value, value) if isinstance(value, int) else value for value in (vision.image_size, vision.patch_size)
        )
        return size[0] // patch[0] // self.merge_size, size[1] // patch[1] // self.merge_size

    @property
    def tower_view(self) -> TowerView:
        """The vision tower for selectors that look deeper into it than its attention, or change it;
        UnsupportedModelError if the tower is of another kind than CLIP's or SigLIP's; names selectors that work."""
        kind = getattr(getattr(self.model.config, "vision_config", None), "model_type", "unknown")
        raise refuse(INSIDE, f"the vision tower {kind!r} of {type(self.model).__name__} is not covered")

    def encode_images(self, pixel_values: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Vision tower and projector: ``[visual tokens of the images, hidden_size]``; ``sizes``: the images' own."""
        model, given = self.model, {} if sizes is None else {self.sizes_name: sizes}
        return torch.cat(list(cast(Any, model).get_image_features(pixel_values=pixel_values, **given).pooler_output))

    def packed_patches(self) -> list[Tensor]:
        """Which patches become visual tokens, ``[tiles, patches]`` boolean of each image whose encoding is under way.

        Of families that cut images into tiles and leave out padding.
        """
        raise NotImplementedError

    def token_grids(self, call: VisionCall) -> list[Grids]:
        """Where the visual tokens of each image (or video) of a call stand: rows and columns, part after part.

        The sizes of an image's grids add up to its visual tokens. Newline tokens are a column of their grid, or a
        ``(1, 1)`` grid where they stand alone. By default each image, or each tile, is a grid of its own.
        """
        return [(self.tile_grid,)] * len(call.arguments["pixel_values"])

    def to_token_order(self, values: Tensor) -> Tensor:
        """Carry values of the vision tower's patches to the visual tokens that are made of them.

        Args:
            values: ``[tiles or images, patches, channels]`` in the order in which the tower computes; packed towers
                (Qwen) have one row for all images. For the images whose encoding is under way (see ``VisionWatch``).

        Returns:
            ``[visual tokens, channels]`` in the order of the placeholder tokens of images, or of videos. Tokens made
            of several patches get their mean, tokens made of none (newlines) the mean of their row. By default a
            token is made of a square of patches, row by row.
        """
        merge = self.merge_size
        if merge == 1:
            return values.flatten(0, 1)
        rows, columns = self.tile_grid
        return torch.cat([square_means(tile, rows, columns, merge) for tile in values])

    def token_tiles(self, num_visual: Sequence[int]) -> Sequence[tuple[Tensor, Sequence[tuple[int, int]]] | None]:
        """``tiles`` of ``SelectorInputs`` for each sample, and ``tile_grid`` of each of its images.

        ``None`` where images are not cut.
        """
        return [None] * len(num_visual)

    def capture(self, name: str, receive: Callable[[Tensor], None]) -> TowerCapture:
        """Hand ``receive`` a field of ``SelectorInputs`` by visual token, whenever the decoder is about to read images;
        UnsupportedModelError if the vision tower cannot give it; the message names selectors that work."""
        return capture_field(cast("ModelAdapter", self), name, receive)

    @property
    def feature_layer(self) -> Any:
        """The hidden states of the tower that feed the projector: ``0`` would enter the first layer."""
        return getattr(self.model.config, "vision_feature_layer", -1)

    def received_attention_module(self) -> Any:
        """The tower's attention module that is looked into: of the layer that feeds the projector.

        Where layers see parts of images alone, the last one before that which attends to whole images.
        """
        layer = self.feature_layer
        if not isinstance(layer, int) or not layer:
            raise UnsupportedModelError(
                "attention of the vision tower is captured in the layer that feeds the projector, but this model has "
                f"vision_feature_layer={layer}; use selector=uniform_grid or selector=random"
            )
        return self.attention_modules[layer - (layer > 0)]

    def attention_module(self, layer: Layer | None) -> Any:
        """The attention of any layer of the tower; ``None``: :meth:`received_attention_module`.

        Raises:
            DopError: if the tower has no such layer.
            UnsupportedModelError: if it sees a part of the image alone.
        """
        return self.received_attention_module() if layer is None else self.attention_modules[self.tower_layer(layer)]

    @property
    def attention_modules(self) -> list[Any]:
        """The attention of each layer of the tower."""
        layers, name = self.tower_attention.split(".{}.")
        return [layer.get_submodule(name) for layer in self.vision_tower.get_submodule(layers)]

    def tower_layer(self, layer: Layer) -> int:
        """The number of a layer from 0, or its depth as a share, see ``dop_search.selectors.base.at_layer``."""
        count = len(self.attention_modules)
        if not isinstance(layer, int):
            return max(1, round((self.middle_depth if isinstance(layer, str) else layer) * count)) - 1
        if not -count <= layer < count:
            raise DopError(
                f"`{-count} <= layer < {count}` must hold for the {count} layers of the vision tower, but got {layer}"
            )
        return layer % count

    def image_grids(self, num_visual: Sequence[int]) -> list[tuple[Grids, ...]]:
        """Rows and columns of the visual tokens of each sample's images (and videos), each as in :meth:`token_grids`;
        DopError if the model has encoded other images since the watch was opened, or none.

        ``num_visual``: visual tokens per sample of the batch.
        """
        if not any(num_visual):
            return [()] * len(num_visual)
        grids = self.vision_watch.grids_of(num_visual)
        if grids is None:
            raise DopError(
                f"{sum(num_visual)} visual tokens in the batch do not match the images that were encoded: pass the "
                "images to the pruned model, or give `rankings=` with a strategy that does not count per image"
            )
        return grids


def square_means(values: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """Means over squares of patches: ``[rows * side * columns * side, channels]`` to ``[rows * columns, channels]``."""
    return values.unflatten(0, (rows, side, columns, side)).mean(dim=(1, 3)).flatten(0, 1)


def padded_square_means(tiles: Tensor, grids: Sequence[Grids], side: int) -> Tensor:
    """As :func:`square_means` of tiles ``[tiles, patches, channels]`` padded to the largest, one after the other.

    ``grids``: of each tile, in tokens.
    """
    parts = zip(tiles, grids, strict=True)
    return torch.cat([square_means(tile[: its[0][0] * its[0][1] * side**2], *its[0], side) for tile, its in parts])
