"""What the framework needs to know about a model family, and nothing else."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import ModelOutput

from dop_search.models.decoder_checks import DECODER_LAYERS, check_attention, check_layer, check_placement, check_window
from dop_search.models.layer_names import names_of
from dop_search.models.tower import VisionWatch
from dop_search.models.vision import VisionAdapter
from dop_search.strategy.operations import ModelDims
from dop_search.utils.errors import DopError, UnsupportedModelError

UNKNOWN_TOKEN = -1
"""Stands for text of which only the embeddings are known."""


class ModelAdapter(VisionAdapter):
    """One multimodal model: where its decoder is, where visual tokens stand, what its vision tower offers.

    Subclasses cover one family each and are listed by the ``model_type`` of the configuration in ``families.py``; the
    README beside this file says how to add one. The decoder layers must have the Llama layout: ``input_layernorm``,
    ``self_attn`` with ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``, ``post_attention_layernorm`` and ``mlp``.
    """

    decoder_name: ClassVar[str] = "language_model"
    """What the decoder is called in the multimodal module."""
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
        """Refuse a configuration of the family that the adapter does not cover, before its weights are loaded;
        UnsupportedModelError naming what was found and what is covered."""
        return

    # -- the decoder ------------------------------------------------------------------------------

    @property
    def text_config(self) -> Any:
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
        layers: Sequence[Any] = self.text_model.layers
        return layers

    @property
    def final_norm(self) -> Any:
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
        """Refuse what can change after loading: weights that are offloaded, and the attention backend;
        UnsupportedModelError naming what was found and the remedy."""
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
        """Refuse what computes attention by itself where the decoder's is another; UnsupportedModelError naming what it
        is."""
        if self.layer_types or self.sees_images_whole:
            raise UnsupportedModelError(
                f"{what} goes by attention that is causal in every layer, but {type(self.model).__name__} attends "
                "within windows or to whole images, or has recurrent layers; use a selector or method that ranks "
                "before the decoder"
            )

    def pop_deepstack(self, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Take the features that the decoder adds to its visual tokens after its first layers out of its arguments.

        Returns one tensor ``[visual tokens of the batch, hidden_size]`` per layer from the first on, tokens in the
        order of the sequence; empty where the family adds nothing.
        """
        return ()

    def deepstack_arguments(self, visual: Tensor, features: Sequence[Tensor]) -> dict[str, Any]:
        """The inverse of :meth:`pop_deepstack`; ``visual`` is ``[batch, length]`` boolean."""
        return {}

    def decode_text(self, input_ids: Tensor) -> str:
        """The text of some tokens, by the tokenizer that the model was loaded with; DopError if the model was not
        loaded from a checkpoint with a tokenizer."""
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
