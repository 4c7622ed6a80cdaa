"""LLaVA and LLaVA-NeXT in vLLM with the operations of a strategy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.config import VllmConfig
from vllm.model_executor.models.clip import CLIPVisionModel
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from dop_search.models.llava_next import anyres_grids, fill_newlines
from dop_search.selectors import SelectorInputs
from dop_search.serving.model import PrunedDummies, PrunedInfo, PrunedModel, PrunedProcessor
from dop_search.utils.errors import UnsupportedModelError

TOWER_NAMES = WeightsMapper(
    orig_to_new_regex={re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)"): "vision_tower.vision_model."}
)
"""Names in checkpoints of newer transformers."""


def _received(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention that keys receive, mean over heads and queries: ``[…, heads, queries or keys, dim]``, ``[…, keys]``."""
    return (query @ key.mT * scale).float().softmax(dim=-1).mean(dim=(-3, -2))


class _ClipModel(PrunedModel):
    """With a CLIP tower; remembers what the selector needs of its last run."""

    vision_tower: Any
    multi_modal_projector: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._heads: tuple[Tensor, Tensor] | None = None
        self._patches: Tensor | None = None
        self._attention().qkv_proj.register_forward_hook(self._see_heads)
        self.multi_modal_projector.register_forward_pre_hook(self._see_patches)

    def check_tower(self) -> None:
        strategy = getattr(self.config, "vision_feature_select_strategy", None)
        if not isinstance(self.vision_tower, CLIPVisionModel) or strategy != "default":
            raise UnsupportedModelError(
                f"only a CLIP tower without its CLS token is served, but got {type(self.vision_tower).__name__} with "
                f"vision_feature_select_strategy={strategy!r}; use `dop.pruned` of Hugging Face's model"
            )
        if not isinstance(self.config.vision_feature_layer, int):
            raise UnsupportedModelError(
                "features of one tower layer are served, but got vision_feature_layer="
                f"{self.config.vision_feature_layer}"
            )

    def _attention(self) -> Any:
        """Of the layer that feeds the projector, the last that vLLM builds."""
        return self.vision_tower.vision_model.encoder.layers[-1].self_attn

    def _see_heads(self, module: Any, args: Any, output: Any) -> None:
        query, key, _ = output[0].chunk(3, dim=-1)
        shape = (self._attention().num_heads_per_partition, self._attention().head_dim)
        self._heads = query.unflatten(-1, shape).transpose(1, 2), key.unflatten(-1, shape).transpose(1, 2)

    def _see_patches(self, module: Any, args: tuple[Tensor, ...]) -> None:
        self._patches = args[0]

    @property
    def side(self) -> int:
        """Patches per side of a tile."""
        return int(self.config.vision_config.image_size // self.config.vision_config.patch_size)

    def of_tiles(self, tiles: slice) -> dict[str, Tensor]:
        """What the selector needs of the tower, ``[tiles, patches]`` or with a last axis of channels."""
        assert self._heads is not None
        assert self._patches is not None
        query, key = (heads[tiles] for heads in self._heads)
        asking = {"cls_attention": slice(0, 1), "received_attention": slice(1, None), "global_attention": slice(None)}
        scores = {
            name: _received(query[..., who, :], key, self._attention().scale)[:, 1:]
            for name, who in asking.items()
            if name in self.selector.needs()
        }
        return {**scores, "features": self._patches[tiles]}


class LlavaInfo(PrunedInfo, LlavaProcessingInfo):  # type: ignore[misc]
    """LLaVA's."""


class LlavaDummies(PrunedDummies, LlavaDummyInputsBuilder[Any]):  # type: ignore[misc]
    """LLaVA's and LLaVA-NeXT's."""


class LlavaProcessor(PrunedProcessor, LlavaMultiModalProcessor):  # type: ignore[misc]
    """LLaVA's."""


@MULTIMODAL_REGISTRY.register_processor(LlavaProcessor, info=LlavaInfo, dummy_inputs=LlavaDummies)
class DopLlavaForConditionalGeneration(_ClipModel, LlavaForConditionalGeneration):  # type: ignore[misc]
    """LLaVA: an image is a tile."""

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES

    def shown(self, index: int, embeds: Tensor, image: Mapping[str, Any]) -> SelectorInputs:
        values: dict[str, Any] = {name: its[0] for name, its in self.of_tiles(slice(index, index + 1)).items()}
        return SelectorInputs(len(embeds), ((self.side, self.side),), embeds=embeds, **values)


class LlavaNextInfo(PrunedInfo, LlavaNextProcessingInfo):  # type: ignore[misc]
    """LLaVA-NeXT's."""


class LlavaNextProcessor(PrunedProcessor, LlavaNextMultiModalProcessor):  # type: ignore[misc]
    """LLaVA-NeXT's."""


@MULTIMODAL_REGISTRY.register_processor(LlavaNextProcessor, info=LlavaNextInfo, dummy_inputs=LlavaDummies)
class DopLlavaNextForConditionalGeneration(_ClipModel, LlavaNextForConditionalGeneration):  # type: ignore[misc]
    """LLaVA-NeXT: a base view, unpadded tiles, and a newline token after every row."""

    hf_to_vllm_mapper = LlavaNextForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES

    def shown(self, index: int, embeds: Tensor, image: Mapping[str, Any]) -> SelectorInputs:
        """See base class; newline tokens are shown the mean of their row."""
        counts = [len(tiles) for tiles in image["pixel_values"]]
        first, size = sum(counts[:index]), image["image_sizes"][index]
        base = self.side**2
        newline = self._packed(torch.ones(counts[index], base, 1), size)[:, 0] < 0.5
        values: dict[str, Any] = {}
        for name, its in self.of_tiles(slice(first, first + counts[index])).items():
            tokens = self._packed(its if its.ndim == 3 else its[..., None], size)
            tokens = fill_newlines(tokens, newline, base if counts[index] > 1 else 0)
            values[name] = tokens if its.ndim == 3 else tokens[:, 0]
        if "tiles" in self.selector.needs():
            marked = torch.eye(counts[index])[:, None].expand(-1, base, -1)
            values["tiles"] = torch.where(newline, -1, self._packed(marked, size).argmax(dim=1))
            values["tile_grid"] = self._tile_grid(size) if counts[index] > 1 else (0, 0)
        grids = anyres_grids(newline, counts[index], self.side)
        return SelectorInputs(len(embeds), grids, embeds=embeds, **values)

    def _tile_grid(self, size: Sequence[int] | Tensor) -> tuple[int, int]:
        """Rows and columns of the crops."""
        config = self.config
        height, width = (int(side) for side in size)
        rows, columns = get_anyres_image_grid_shape(
            (height, width), config.image_grid_pinpoints, config.vision_config.image_size
        )
        return int(rows), int(columns)

    def _packed(self, values: Tensor, size: Tensor) -> Tensor:
        """vLLM's own packing of ``[tiles, patches, channels]`` to ``[tokens, channels]``; newline tokens are zero."""
        model = SimpleNamespace(config=self.config, image_newline=values.new_zeros(values.shape[-1]))
        pack = LlavaNextForConditionalGeneration._merge_image_patch_embeddings
        tokens: Tensor = pack(model, size, values, strategy="spatial_unpad")
        return tokens
