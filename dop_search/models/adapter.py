"""What the framework needs to know about a model family, and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from dop_search.errors import UnsupportedModelError
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

    @abstractmethod
    def capture_cls_attention(self, receive: Callable[[Tensor], None]) -> RemovableHandle:
        """Hand ``receive`` the CLS token's attention whenever the vision tower runs.

        The tensor is ``[num_images, num_visual_tokens_per_image]``, averaged over heads, from the vision layer that
        feeds the projector, in the order of the visual tokens.

        Raises:
            UnsupportedModelError: if the vision tower has no CLS token; the message names selectors that work.
        """


def cls_attention_hook(attention: Any, receive: Callable[[Tensor], None]) -> RemovableHandle:
    """Compute the CLS row of a CLIP-style attention from its input: one row of scores, with any backend."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        batch, _length, _ = hidden.shape
        shape = (batch, -1, attention.num_heads, attention.head_dim)
        query = attention.q_proj(hidden[:, :1]).view(shape).transpose(1, 2)
        keys = attention.k_proj(hidden).view(shape).transpose(1, 2)
        scores = (query @ keys.transpose(2, 3)).squeeze(2) * attention.head_dim**-0.5
        receive(scores.float().softmax(dim=-1).mean(dim=1)[:, 1:].detach())

    handle: RemovableHandle = attention.register_forward_pre_hook(hook, with_kwargs=True)
    return handle
