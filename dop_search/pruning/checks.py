"""What a pruned model would silently ignore is refused by name: hooks, outputs of layers, masks of another kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from dop_search.models.adapter import UNKNOWN_TOKEN
from dop_search.utils.errors import DopError, UnsupportedModelError

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
OUTPUTS = ("output_hidden_states", "output_attentions")
CAPTURING = "transformers.utils.output_capturing"
"""Its hooks stay on the layers of a model that was once asked for hidden states, and do nothing unless asked again."""


class UncalledModules:
    """Decoder layers and their attention: pruned layers use their parts, and never call the modules themselves.

    Args:
        layers: the decoder layers.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._modules = {f"decoder layer {index}": layer for index, layer in enumerate(layers)}
        for index, layer in enumerate(layers):
            self._modules[f"self_attn of decoder layer {index}"] = layer.get_submodule("self_attn")
        self._hooks = [(name, vars(module)[kind]) for name, module in self._modules.items() for kind in HOOKS]

    def check_hooks(self) -> None:
        """Refuse hooks that would not fire, also those that came after the context was entered.

        Raises:
            DopError: naming the first.
        """
        for name, hooks in self._hooks:
            if hooks and not all(getattr(hook, "__module__", None) == CAPTURING for hook in hooks.values()):
                raise DopError(
                    f"a hook on {name} would not fire on a pruned model, which computes the layer on the rows that are "
                    "left; remove it, or hook the layer's norms, projections or mlp, which are called on "
                    "`[rows, features]`"
                )

    def check_forwards(self) -> None:
        """Refuse forwards that somebody has replaced on the instance; accelerate's only move tensors.

        Raises:
            DopError: naming the first.
        """
        for name, module in self._modules.items():
            if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
                raise DopError(
                    f"the forward of {name} was replaced, which a pruned model would not notice; undo that first "
                    "(`del layer.forward`)"
                )


def check_outputs(configs: Iterable[Any], kwargs: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Refuse what asks for the outputs of every layer: arguments of a call, or configurations without an argument.

    Raises:
        DopError: naming the setting.
    """
    why = "is not available on a pruned model, whose layers see different tokens"
    for name in OUTPUTS:
        if kwargs.get(name):
            raise DopError(f"`{name}=True` {why}; leave it out")
        for config in configs:
            if getattr(config, name, False) and kwargs.get(name) is None:
                raise DopError(f"`{name}=True` in the {type(config).__name__} {why}; set it to False")


def check_arguments(kwargs: Mapping[str, Any], attention_mask: Any) -> None:
    """Refuse arguments of the decoder that pruned layers cannot respect.

    Raises:
        DopError: naming the argument.
    """
    for name in ("deepstack_visual_embeds", "visual_pos_masks"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"the decoder was given `{name}`, which this model's adapter does not handle")
    if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2):
        raise DopError(
            "a pruned model needs the two-dimensional attention mask of the tokenizer, but got "
            f"{type(attention_mask).__name__} (static caches and custom masks are not supported)"
        )


def check_embeds(input_ids: Tensor) -> None:
    """Refuse a prompt of embeddings in which nothing can be told apart.

    Raises:
        DopError: saying where the tokens can be given.
    """
    if bool((input_ids == UNKNOWN_TOKEN).any()):
        raise DopError(
            "a pruned model finds visual tokens in `inputs_embeds` by the embedding of their placeholder, and there is "
            "none; if image features stand there already, or there is only text, give `input_ids` beside them to "
            "`generate()`"
        )


def check_labels(visual: Tensor, read: Tensor | None) -> None:
    """Refuse a loss on visual tokens.

    Raises:
        DopError: if a visual token is to predict another.
    """
    if read is not None and bool((visual[:, :-1] & visual[:, 1:] & read[:, :-1]).any()):
        raise DopError("`labels` must be -100 at visual tokens: a pruned model defines no logits that predict them")
