"""What the framework needs to know about a model family, and nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import ModelOutput

from dop_search.models.capture import INSIDE, Layer, TowerView, capture_field, refuse
from dop_search.models.decoder_checks import DECODER_LAYERS, check_attention, check_layer, check_placement, check_window
from dop_search.models.layer_names import names_of
from dop_search.models.tower import Grids, TowerCapture, VisionCall, VisionWatch
from dop_search.strategy.operations import ModelDims
from dop_search.utils.errors import DopError, UnsupportedModelError

UNKNOWN_TOKEN = -1
"""Stands for text of which only the embeddings are known."""


class ModelAdapter:
    """One multimodal model: where its decoder is, where visual tokens stand, what its vision tower offers.

    Subclasses cover one family each and are listed by the ``model_type`` of the configuration in ``families.py``; the
    README beside this file says how to add one. The decoder layers must have the Llama layout: ``input_layernorm``,
    ``self_attn`` with ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``, ``post_attention_layernorm`` and ``mlp``.
    """

    decoder_name: ClassVar[str] = "language_model"
    tower_name: ClassVar[str] = "vision_tower"
    """What decoder and image encoder are called in the multimodal module."""
    tower_attention: str = "encoder.layers.{}.self_attn"
    """Where the tower's layers have their attention."""
    has_cls: bool = False
    """Whether the tower has a CLS token."""
    sizes_name: ClassVar[str] = ""
    """What the model calls the sizes of images, where they may have any."""
    middle_depth: ClassVar[float] = 9 / 24
    """Which share of the tower's layers lies below the end of the ``middle`` one, by which HiPrune ranks."""
    has_tower: ClassVar[bool] = True
    """Whether there is a vision tower for selectors to look at."""
    casts_pixels: ClassVar[bool] = True
    """Whether the vision tower takes float32 pixels whatever its weights are."""
    knows_images: ClassVar[bool] = True
    """Whether the model is told which tiles are of one image."""
    input_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields of ``SelectorInputs`` that are computed from the decoder's input, instead of the vision tower."""
    has_deepstack: ClassVar[bool] = False
    """Whether the decoder adds vision features after its first layers, see :meth:`pop_deepstack`."""
    layer_types: ClassVar[frozenset[str]] = frozenset()
    """Types of layers that do not attend to everything: ``sliding_attention``, no further back than ``sliding_window``
    tokens; ``linear_attention`` and ``conv``, which carry a state."""
    sees_images_whole: bool = False
    """Whether the tokens of an image see each other in both directions, where :attr:`token_types` are given."""
    sees_images_in_windows: ClassVar[bool] = False
    """Whether they do so only in layers with a window."""
    token_types: ClassVar[str] = "token_type_ids"
    """By what name the model is told which tokens are of images."""
    decoder_output: ClassVar[type[ModelOutput]] = BaseModelOutputWithPast
    """What the decoder returns."""
    decoder_layers: ClassVar[frozenset[str]] = DECODER_LAYERS
    """Classes of decoder layers (or their bases, by name) that compute what pruned layers compute."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.check_config(model.config)
        self.vision_watch = VisionWatch(self)
        check_window(self.text_config, self.layer_types)
        for layer in self.layers:
            check_layer(layer, self.decoder_layers)

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Refuse a configuration of the family that the adapter does not cover, before its weights are loaded.

        Raises:
            UnsupportedModelError: naming what was found and what is covered.
        """
        return

    # -- the decoder ------------------------------------------------------------------------------

    @property
    def text_config(self) -> Any:
        """Configuration of the decoder."""
        return self.model.config.get_text_config()

    @property
    def layer_config(self) -> Any:
        """The same, for the sizes of the layers; where they differ, of those that are most."""
        return self.text_config

    @property
    def multimodal(self) -> Any:
        """The module whose forward receives ``input_ids`` together with the images."""
        return self.model.model

    @property
    def text_model(self) -> Any:
        """The decoder: has ``layers`` and ``rotary_emb``; receives ``inputs_embeds``."""
        return getattr(self.model.model, self.decoder_name)

    @property
    def layers(self) -> Sequence[Any]:
        """The decoder layers."""
        layers: Sequence[Any] = self.text_model.layers
        return layers

    @property
    def final_norm(self) -> Any:
        """The norm after the last layer."""
        return self.text_model.norm

    @property
    def lm_head(self) -> Any:
        """Maps the last hidden states to logits."""
        return self.model.get_output_embeddings()

    def logits(self, normed: Tensor) -> Tensor:
        """What the model makes of the decoder's output: ``[..., hidden_size]`` to ``[..., vocab_size]``."""
        logits: Tensor = self.lm_head(normed.to(self.lm_head.weight.device))
        cap = getattr(self.text_config, "final_logit_softcapping", None)
        return logits if cap is None else cap * (logits / cap).tanh()

    @property
    def device(self) -> torch.device:
        """Where the decoder receives its input."""
        return next(self.layers[0].parameters()).device

    @property
    def devices(self) -> list[torch.device]:
        """Where its layers are, in the order of the layers: several with a device map."""
        return list(dict.fromkeys(next(layer.parameters()).device for layer in self.layers))

    @property
    def dims(self) -> ModelDims:
        """The decoder's sizes."""
        config = self.layer_config
        mlp = getattr(self.layers[0], names_of(self.layers[0]).mlp)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return ModelDims(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            gated_mlp=any(hasattr(mlp, name) for name in ("gate_proj", "gate_up_proj", "w3")),
            vocab_size=config.vocab_size,
        )

    @property
    def fingerprint(self) -> str:
        """Short name of the architecture, see :meth:`ModelDims.fingerprint`."""
        return self.dims.fingerprint(self.model.config.model_type)

    def check_decoder(self) -> None:
        """Refuse what can change after loading: weights that are offloaded, and the attention backend.

        Raises:
            UnsupportedModelError: naming what was found and the remedy.
        """
        check_placement(type(self.model).__name__, [*self.layers, self.final_norm])
        check_attention(self.text_config._attn_implementation)

    # -- what the decoder is given ----------------------------------------------------------------

    @property
    def visual_token_ids(self) -> tuple[int, ...]:
        """The placeholders of images and, where the family has them, of videos."""
        video = getattr(self.model.config, "video_token_id", None)
        return (self.model.config.image_token_id, *(() if video is None else (video,)))

    def visual_token_mask(self, input_ids: Tensor) -> Tensor:
        """Which tokens are visual, of images and of videos (``[batch, length]`` boolean)."""
        return functools.reduce(torch.logical_or, [input_ids == token for token in self.visual_token_ids])

    def placeholder_ids(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor | None:
        """``input_ids``, or what embeddings tell of them: placeholders are known, the rest is ``UNKNOWN_TOKEN``.

        As in transformers, a placeholder is a token whose embedding is exactly that of the placeholder.
        """
        if input_ids is not None or inputs_embeds is None:
            return input_ids
        device = inputs_embeds.device
        ids = torch.full(inputs_embeds.shape[:2], UNKNOWN_TOKEN, dtype=torch.long, device=device)
        embedding = self.multimodal.get_input_embeddings()
        for token in self.visual_token_ids:
            vector = embedding(torch.tensor(token, device=embedding.weight.device)).to(device)
            ids[(inputs_embeds == vector).all(dim=-1)] = token
        return ids

    def text_positions(self, position_ids: Tensor) -> Tensor | None:
        """The positions ``[batch or 1, length]`` whose restarts mean packed sequences; ``None`` where none do."""
        return position_ids

    def rotary(self, embeds: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the positions that the decoder was given.

        Args:
            embeds: ``[batch, length, hidden_size]``; says dtype and device.
            position_ids: ``[batch or 1, length]``, or with a leading axis for multimodal RoPE.

        Returns:
            Two tensors ``[batch or 1, length, head_dim]``.
        """
        cos, sin = self.text_model.rotary_emb(embeds, position_ids=position_ids)
        return cos, sin

    def windowed_rotary(self, embeds: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        """As :meth:`rotary`, of layers with a window where these have another; empty where all have the same."""
        return ()

    def mask_arguments(self, embeds: Tensor, position_ids: Tensor, images: Tensor) -> dict[str, Any]:
        """What the decoder itself is given with one prompt, where its masks are drawn outside of it.

        Args:
            embeds: ``[1, length, hidden_size]``.
            position_ids: of the prompt.
            images: ``[1, length]`` which image each token is part of; -1: none.
        """
        return {}

    @property
    def has_sight(self) -> bool:
        """Whether what a token sees is another thing than all that came before it."""
        return "sliding_attention" in self.layer_types or self.sees_images_whole

    def check_plain_attention(self, what: str) -> None:
        """Refuse what computes attention by itself where the decoder's is another.

        Raises:
            UnsupportedModelError: naming what it is.
        """
        if self.layer_types or self.sees_images_whole:
            raise UnsupportedModelError(
                f"{what} goes by attention that is causal in every layer, but {type(self.model).__name__} attends "
                "within windows or to whole images, or has recurrent layers; use a selector or method that ranks "
                "before the decoder"
            )

    def pop_deepstack(self, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Take the features that the decoder adds to its visual tokens after its first layers out of its arguments.

        Returns:
            One tensor ``[visual tokens of the batch, hidden_size]`` per layer from the first on, tokens in the order
            of the sequence; empty where the family adds nothing.
        """
        return ()

    def deepstack_arguments(self, visual: Tensor, features: Sequence[Tensor]) -> dict[str, Any]:
        """The inverse of :meth:`pop_deepstack`; ``visual`` is ``[batch, length]`` boolean."""
        return {}

    def decode_text(self, input_ids: Tensor) -> str:
        """The text of some tokens, by the tokenizer that the model was loaded with.

        Raises:
            DopError: if the model was not loaded from a checkpoint with a tokenizer.
        """
        if bool((input_ids == UNKNOWN_TOKEN).any()):
            raise DopError(
                "the selector reads the prompt's text, of which `inputs_embeds` tell nothing; pass `input_ids`"
            )
        if not hasattr(self, "_tokenizer"):
            source = self.model.config._name_or_path
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(source) if source else None
            except OSError as error:
                raise DopError(f"cannot load the tokenizer of {source!r}: {error}") from error
        if self._tokenizer is None:
            raise DopError(
                "the selector reads the prompt's text, but the model was built without a checkpoint's tokenizer"
            )
        return str(self._tokenizer.decode(input_ids.tolist(), skip_special_tokens=True)).strip()

    # -- what the vision tower shows --------------------------------------------------------------

    @property
    def vision_tower(self) -> Any:
        """The image encoder."""
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
        return 1

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
        """The vision tower for selectors that look deeper into it than its attention, or change it.

        Raises:
            UnsupportedModelError: if the tower is of another kind than CLIP's or SigLIP's; names selectors that work.
        """
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
        """Hand ``receive`` a field of ``SelectorInputs`` by visual token, whenever the decoder is about to read images.

        Raises:
            UnsupportedModelError: if the vision tower cannot give it; the message names selectors that work.
        """
        return capture_field(self, name, receive)

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
        """Rows and columns of the visual tokens of each sample's images (and videos), each as in :meth:`token_grids`.

        Args:
            num_visual: visual tokens per sample of the batch.

        Raises:
            DopError: if the model has encoded other images since the watch was opened, or none.
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
