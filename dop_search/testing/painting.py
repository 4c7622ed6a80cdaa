"""Does an adapter know which visual token a patch of the vision tower ends in? The model itself shows it.

A patch is painted in the tower's output, and the visual tokens whose features change are those that it went to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dop_search.models import adapter_for
from dop_search.models.tower import METHODS, Modality
from dop_search.utils.errors import UnsupportedModelError

PATCHES_TRIED = 16
COLOUR = 5.0
PROJECTORS = ("multi_modal_projector", "connector", "aligner", "vision_projection")


@dataclass(frozen=True)
class Canvas:
    """Where the patches of a vision tower can be painted.

    Attributes:
        module: what it is given, or what it returns, has a row per patch: ``[tiles, patches, channels]`` or
            ``[patches, channels]``.
        of_output: paint what it returns.
        num_extra: rows of a tile in front of its patches (a CLS token).
    """

    module: nn.Module
    of_output: bool = False
    num_extra: int = 0


def canvas_of(model: PreTrainedModel, modality: Modality = "image") -> Canvas:
    """The input of the projector or merger; where that comes after patches are joined, what the tower returns.
    UnsupportedModelError if the projector has another name."""
    whole: Any = adapter_for(model).multimodal
    if hasattr(whole, "visual") and hasattr(whole.visual, "downsample"):  # GLM: joins squares in front of its merger
        return Canvas(whole.visual.post_layernorm, of_output=True)
    if hasattr(whole, "visual"):
        return Canvas(whole.visual.merger)
    if model.config.model_type in ("internvl", "qianfan_ocr"):  # their projector comes after the pixel shuffle
        tower = whole.vision_tower
        layers = tower.encoder.layer if hasattr(tower, "encoder") else tower.layers
        return Canvas(layers[-1], of_output=True, num_extra=1)
    if model.config.model_type in ("lfm2_vl", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr"):
        # what comes after is given one tile at a time
        return Canvas(whole.vision_tower.post_layernorm, of_output=True)
    if model.config.model_type == "gemma4":  # pools squares in the tower
        return Canvas(whole.vision_tower.encoder.layers[-1], of_output=True)
    if model.config.model_type == "video_llama_3":  # averages squares in the tower
        return Canvas(whole.vision_model.post_layernorm, of_output=True)
    if modality == "video" and hasattr(whole, "vision_resampler"):  # pools frames in front of the projector
        return Canvas(whole.vision_resampler)
    if model.config.model_type == "ovis2":
        return Canvas(whole.vision_tower.transformer.rms_norm, of_output=True)
    for name in PROJECTORS:
        if hasattr(whole, name):
            return Canvas(getattr(whole, name))
    raise UnsupportedModelError(
        f"{type(model).__name__} has no projector by the name of {', '.join(PROJECTORS)}; say by `canvas` where its "
        "tower's patches can be painted"
    )


def vision_arguments(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], modality: Modality = "image"
) -> dict[str, Any]:
    """What of ``inputs`` belongs to the images (or videos)."""
    known = inspect.signature(getattr(adapter_for(model).multimodal, METHODS[modality])).parameters
    return {name: value for name, value in inputs.items() if name in known}


def check_painted_patches(
    model: PreTrainedModel, canvas: Canvas, arguments: Mapping[str, Any], modality: Modality = "image", seed: int = 0
) -> int:
    """``ModelAdapter.to_token_order`` carries a patch's value where the patch's feature went, and nowhere else;
    AssertionError if a value arrives elsewhere.

    Tokens that are made of no patch (newlines) may get any mean of patches.

    Args:
        model: with an adapter.
        arguments: of ``get_image_features`` or ``get_video_features``.
        modality: which of the two.
        seed: of the patches that are tried.

    Returns:
        Visual tokens that are made of patches.
    """
    adapter = adapter_for(model)
    shapes: list[torch.Size] = []

    def features(paint: Callable[[Tensor], Tensor]) -> Tensor:
        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            shapes.append(args[0].shape)
            return (paint(args[0]), *args[1:])

        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            shapes.append(output.shape)
            return paint(output)

        module = canvas.module
        hook = module.register_forward_hook(after) if canvas.of_output else module.register_forward_pre_hook(before)
        try:
            with torch.no_grad():
                output = getattr(adapter_for(model).multimodal, METHODS[modality])(**arguments, return_dict=True)
        finally:
            hook.remove()
        return torch.cat([feature.reshape(-1, feature.shape[-1]) for feature in output.pooler_output])

    def painted(row: int) -> Callable[[Tensor], Tensor]:
        def paint(values: Tensor) -> Tensor:
            values = values.clone(memory_format=torch.contiguous_format)
            values.view(-1, values.shape[-1])[row, 0] += COLOUR  # one channel: a LayerNorm undoes a constant
            return values

        return paint

    adapter.vision_watch.open()
    try:
        plain = features(lambda values: values)
    finally:
        adapter.vision_watch.remove()
    *tiles, rows, _ = shapes[0]
    num_tiles, num_patches = (tiles[0] if tiles else 1), rows - canvas.num_extra
    noise = torch.randn(shapes[0], generator=torch.Generator().manual_seed(seed)).to(plain.dtype)
    of_patches = touched(features(lambda values: values + noise), plain)
    for patch in np.random.default_rng(seed).permutation(num_tiles * num_patches)[:PATCHES_TRIED].tolist():
        values = torch.zeros(num_tiles, num_patches, 2)
        values.view(-1, 2)[patch] = torch.tensor([1.0, 3.0])
        tokens = adapter.to_token_order(values)
        assert tokens.shape == (len(plain), 2), f"{tuple(tokens.shape)} for {len(plain)} visual tokens"
        torch.testing.assert_close(tokens[:, 1], 3 * tokens[:, 0])  # channels stay apart
        tile, place = divmod(patch, num_patches)
        expected = touched(features(painted(tile * rows + canvas.num_extra + place)), plain)
        arrived = tokens[:, 0].abs() > 1e-6
        assert torch.equal(arrived[of_patches], expected[of_patches]), f"patch {patch} went to other tokens"
    # A constant stays one everywhere, newline tokens included: every token is a weighted mean of patches.
    ones = adapter.to_token_order(torch.ones(num_tiles, num_patches, 1))
    torch.testing.assert_close(ones, torch.ones(len(plain), 1), atol=1e-5, rtol=0)
    return int(of_patches.sum())


def touched(features: Tensor, plain: Tensor) -> Tensor:
    """Which visual tokens have another feature now: ``[tokens]`` boolean."""
    return (features - plain).abs().amax(dim=-1) > 1e-6
