"""What the framework needs to know about a model family, and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoTokenizer, PreTrainedModel

from dop_search.errors import DopError, UnsupportedModelError
from dop_search.models.capture import VisionTower, attention_values, refuse
from dop_search.operations import ModelDims


class ModelAdapter(ABC):
    """One multimodal model: where its decoder is, where visual tokens stand, what its vision tower offers.

    Subclasses cover one family each and are found by the ``model_type`` of the configuration. The decoder layers
    must have the Llama layout: ``input_layernorm``, ``self_attn`` with ``q_proj``, ``k_proj``, ``v_proj``,
    ``o_proj``, ``post_attention_layernorm`` and ``mlp``.
    """

    model_types: ClassVar[tuple[str, ...]]

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        config = self.text_config
        if getattr(config, "use_sliding_window", False):
            raise UnsupportedModelError(
                f"{type(model).__name__} is configured with use_sliding_window=True, which pruning does not support; "
                "set use_sliding_window=False in its text configuration"
            )

    @property
    def text_config(self) -> Any:
        """Configuration of the decoder."""
        return self.model.config.get_text_config()

    @property
    @abstractmethod
    def multimodal(self) -> Any:
        """The module whose forward receives ``input_ids`` together with the images."""

    @property
    @abstractmethod
    def text_model(self) -> Any:
        """The decoder: has ``layers``, ``norm`` and ``rotary_emb``; receives ``inputs_embeds``."""

    @property
    def layers(self) -> Sequence[Any]:
        """The decoder layers."""
        layers: Sequence[Any] = self.text_model.layers
        return layers

    @property
    def lm_head(self) -> Any:
        """Maps the last hidden states to logits."""
        return self.model.get_output_embeddings()

    @property
    def device(self) -> torch.device:
        """Where the decoder computes."""
        return next(self.layers[0].parameters()).device

    @property
    def dims(self) -> ModelDims:
        """The decoder's sizes."""
        config = self.text_config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return ModelDims(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            gated_mlp=hasattr(self.layers[0].mlp, "gate_proj"),
            vocab_size=config.vocab_size,
        )

    @property
    def fingerprint(self) -> str:
        """Short name of the architecture, see :meth:`ModelDims.fingerprint`."""
        return self.dims.fingerprint(self.model.config.model_type)

    @abstractmethod
    def visual_token_mask(self, input_ids: Tensor) -> Tensor:
        """Which tokens are visual (``[batch, length]`` boolean)."""

    @property
    def tokens_per_image(self) -> int | None:
        """Visual tokens of one image where all images have equally many, else ``None``."""
        return None

    def image_grid(self, num_visual_tokens: int) -> tuple[int, int]:
        """Rows and columns of one image's visual tokens in reading order."""
        side = int(num_visual_tokens**0.5 + 0.5)
        return (side, side) if side * side == num_visual_tokens else (1, num_visual_tokens)

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

    @property
    def tower(self) -> VisionTower:
        """The vision tower for selectors that look into it or change it.

        Raises:
            UnsupportedModelError: if the tower is of another kind than CLIP's or SigLIP's; names selectors that work.
        """
        kind = getattr(getattr(self.model.config, "vision_config", None), "model_type", "unknown")
        raise refuse(["what it computes"], f"the vision tower {kind!r} of {type(self.model).__name__} is not covered")

    def to_token_order(self, values: Tensor) -> Tensor:
        """Per-patch values of the tower, ``[images or tiles, patches, channels]``, in the order of the visual tokens.

        Returns:
            ``[visual tokens of the encoded images, channels]``.
        """
        return values.flatten(0, 1)

    def token_tiles(self, num_visual: Sequence[int]) -> Sequence[tuple[Tensor, tuple[int, int]] | None]:
        """For any-resolution images: each sample's ``tiles`` and ``tile_grid`` of ``SelectorInputs``, else ``None``."""
        return [None] * len(num_visual)

    def decode_text(self, input_ids: Tensor) -> str:
        """The text of some tokens, by the tokenizer that the model was loaded with.

        Raises:
            DopError: if the model was not loaded from a checkpoint with a tokenizer.
        """
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

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Vision tower and projector: ``[visual tokens of the images, hidden_size]``."""
        model: Any = self.model
        return torch.cat(list(model.get_image_features(pixel_values=pixel_values).pooler_output))

    @abstractmethod
    def capture_cls_attention(self, receive: Callable[[Tensor], None]) -> RemovableHandle:
        """Hand ``receive`` the CLS token's attention whenever the vision tower runs.

        The tensor is ``[num_images, num_visual_tokens_per_image]``, averaged over heads, from the vision layer that
        feeds the projector, in the order of the visual tokens.

        Raises:
            UnsupportedModelError: if the vision tower has no CLS token; the message names selectors that work.
        """

    def capture_received_attention(self, receive: Callable[[Tensor], None]) -> RemovableHandle:
        """As :meth:`capture_cls_attention`, with the attention that each patch receives from all patches."""
        tower = self.tower
        attention = tower.layers[tower.feature_layer].self_attn

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = (args[0] if args else kwargs["hidden_states"]).detach()
            values = attention_values(attention, hidden, frozenset({"received_attention"}), tower.num_extra)
            receive(values["received_attention"][..., 0])

        handle: RemovableHandle = attention.register_forward_pre_hook(hook, with_kwargs=True)
        return handle


def cls_attention_hook(attention: Any, receive: Callable[[Tensor], None]) -> RemovableHandle:
    """Compute the CLS row of a CLIP-style attention from its input: one row of scores, with any backend."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        values = attention_values(attention, hidden.detach(), frozenset({"cls_attention"}), num_extra=1)
        receive(values["cls_attention"][..., 0])

    handle: RemovableHandle = attention.register_forward_pre_hook(hook, with_kwargs=True)
    return handle
