"""LLaVA-1.5 and the models of its architecture: CLIP vision tower, two-layer projector, Llama decoder.

ViP-LLaVA, whose projector reads several layers of the tower; Video-LLaVA, whose videos have a tower of their own, and
bring their CLS tokens along.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from dop_search.models.adapter import ModelAdapter
from dop_search.models.capture import INSIDE, TowerView, refuse
from dop_search.models.tower import Grids, VisionCall, num_tokens
from dop_search.utils.errors import DopError, UnsupportedModelError


class LlavaAdapter(ModelAdapter):
    """``LlavaForConditionalGeneration`` (arXiv 2310.03744)."""

    vision_towers: ClassVar[tuple[str, ...]] = ("clip_vision_model", "siglip_vision_model", "dinov2")
    """Kinds of towers whose patches are the visual tokens: as many for every image, or for every tile."""

    @classmethod
    def check_config(cls, config: Any) -> None:
        """See base class: a tower decides how many visual tokens an image has, and where they stand."""
        kind = getattr(config.vision_config, "model_type", None)
        if kind not in cls.vision_towers:
            what = " (Pixtral: images of any size, with a token at the end of each row)" if kind == "pixtral" else ""
            raise UnsupportedModelError(
                f"the vision tower {kind!r}{what} of a model of type {config.model_type!r} is not covered; covered are "
                f"{', '.join(cls.vision_towers)}"
            )

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        kind = model.config.vision_config.model_type
        self.has_cls = kind in ("clip_vision_model", "dinov2")
        if kind == "dinov2":
            self.tower_attention = "encoder.layer.{}.attention"

    @property
    def select_strategy(self) -> str:
        """Whether the CLS token is left out (``"default"``) or not (``"full"``)."""
        return str(getattr(self.model.config, "vision_feature_select_strategy", "default"))

    @property
    def patches_per_side(self) -> int:
        """Patches of a tile in one direction."""
        vision = self.model.config.vision_config
        return int(vision.image_size // vision.patch_size)

    @property
    def tower_view(self) -> TowerView:
        """See base class; the any-resolution families pack their tiles after the projector.

        LLaVA-NeXT leaves out padding and adds newlines, so that its other tokens are projections of single patches;
        LLaVA-OneVision resizes large images there.
        """
        config, model = self.model.config, self.model.model
        layer, kind = config.vision_feature_layer, config.vision_config.model_type
        strategy = self.select_strategy
        if kind not in ("clip_vision_model", "siglip_vision_model") or not isinstance(layer, int) or not layer:
            raise refuse(INSIDE, f"the vision tower is {kind!r} with vision_feature_layer={layer}")
        if strategy != ("default" if self.has_cls else "full"):
            raise refuse(INSIDE, f"vision_feature_select_strategy={strategy!r} on {kind!r}")
        layers, side = self.vision_tower.encoder.layers, self.patches_per_side
        one_run_per_image = config.model_type == "llava"
        return TowerView(
            module=self.vision_tower,
            layers=layers,
            feature_layer=layer % len(layers) if layer < 0 else layer - 1,
            has_cls=self.has_cls,
            width=config.vision_config.hidden_size,
            patch_size=config.vision_config.patch_size,
            grid=(side, side) if one_run_per_image else None,
            final_norm=self.vision_tower.post_layernorm,
            project=model.multi_modal_projector if config.model_type in ("llava", "llava_next") else None,
        )

    def token_grids(self, call: VisionCall) -> list[Grids]:
        return [self._grids_of_one_image()] * len(call.arguments["pixel_values"])

    def to_token_order(self, values: Tensor) -> Tensor:
        self._check_only_patches()
        return values.flatten(0, 1)

    def image_grids(self, num_visual: Sequence[int]) -> list[tuple[Grids, ...]]:
        """See base class; all images have the same size, so that nothing has to be watched."""
        grids = self._grids_of_one_image()
        per_image = num_tokens(grids)
        for count in num_visual:
            if count % per_image:
                raise DopError(f"a prompt has {count} visual tokens, but each image has {per_image}")
        return [(grids,) * (count // per_image) for count in num_visual]

    @property
    def attention_modules(self) -> list[Any]:
        self._check_only_patches()
        return super().attention_modules

    def _grids_of_one_image(self) -> Grids:
        side = self.patches_per_side
        return ((side, side),) if self._only_patches() else ((1, 1), (side, side))

    def _only_patches(self) -> bool:
        """Whether no CLS token enters the decoder: it is cut off, or the tower has none."""
        return self.select_strategy == "default" or not self.has_cls

    def _check_only_patches(self) -> None:
        if not self._only_patches():
            raise UnsupportedModelError(
                "the CLS token is a visual token of this model (vision_feature_select_strategy='full'), and has no "
                "score among the patches; use selector=uniform_grid or selector=random"
            )


class VipLlavaAdapter(LlavaAdapter):
    """``VipLlavaForConditionalGeneration`` (arXiv 2312.00784)."""

    vision_towers = ("clip_vision_model",)

    @property
    def feature_layer(self) -> int:
        """See base class: the last of them."""
        config = self.model.config
        states = 1 + config.vision_config.num_hidden_layers
        layer = config.vision_feature_layer
        return max(index % states for index in ([layer] if isinstance(layer, int) else layer))


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
