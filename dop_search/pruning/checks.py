"""What a pruned model would silently ignore is refused by name: hooks, outputs of layers, masks of another kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from dop_search.models.adapter import UNKNOWN_TOKEN, ModelAdapter
from dop_search.models.decoder_checks import check_layer
from dop_search.models.layer_names import mixer_of
from dop_search.utils.errors import DopError, UnsupportedModelError

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
CAPTURING = "transformers.utils.output_capturing"
"""Its hooks stay on the layers of a model that was once asked for hidden states, and do nothing unless asked again."""


class UncalledModules:
    """Decoder layers and their attention: pruned layers use their parts, and never call the modules themselves."""

    def __init__(self, adapter: ModelAdapter) -> None:
        self._adapter = adapter
        self._modules: list[nn.Module] = []
        self._forwards: dict[type[nn.Module], Any] = {}
        self.check()

    def check(self) -> None:
        """Refuse what would not be noticed, also where it came after the context was entered.

        Raises:
            DopError: naming the first hook that would not fire, or forward that would not run; accelerate's only move
                tensors.
            UnsupportedModelError: for a class that computes something else.
        """
        modules = [part for layer in self._adapter.layers for part in (layer, mixer_of(layer))]
        if modules != self._modules or any(cls.forward is not known for cls, known in self._forwards.items()):
            for layer in self._adapter.layers:
                check_layer(layer, self._adapter.decoder_layers)
            parts = [part for layer in self._adapter.layers for part in layer.modules()]
            self._modules, self._forwards = modules, {type(part): type(part).forward for part in parts}
        for number, module in enumerate(modules):
            own = module.__dict__
            if "forward" in own and "_hf_hook" not in own:
                raise DopError(
                    f"the forward of {_name(number)} was replaced, which a pruned model would not notice; undo that "
                    "first (`del layer.forward`)"
                )
            for kind in HOOKS:
                if own[kind] and not all(getattr(hook, "__module__", None) == CAPTURING for hook in own[kind].values()):
                    raise DopError(
                        f"a hook on {_name(number)} would not fire on a pruned model, which computes the layer on the "
                        "rows that are left; remove it, or hook the layer's norms, projections or mlp, which are "
                        "called on `[rows, features]`"
                    )


def _name(number: int) -> str:
    index, is_attention = divmod(number, 2)
    return f"the attention of decoder layer {index}" if is_attention else f"decoder layer {index}"


def check_outputs(configs: Iterable[Any], kwargs: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Refuse what asks for the outputs of every layer: arguments of a call, or configurations without an argument;
    DopError naming the setting."""
    why = "is not available on a pruned model, whose layers see different tokens"
    for name in OUTPUTS:
        if kwargs.get(name):
            raise DopError(f"`{name}=True` {why}; leave it out")
        for config in configs:
            if getattr(config, name, False) and kwargs.get(name) is None:
                raise DopError(f"`{name}=True` in the {type(config).__name__} {why}; set it to False")


def check_arguments(kwargs: Mapping[str, Any], attention_mask: Any) -> None:
    """Refuse arguments of the decoder that pruned layers cannot respect; DopError naming the argument."""
    for name in ("deepstack_visual_embeds", "visual_pos_masks"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"the decoder was given `{name}`, which this model's adapter does not handle")
    if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2):
        raise DopError(
            "a pruned model needs the two-dimensional attention mask of the tokenizer, but got "
            f"{type(attention_mask).__name__} (static caches and custom masks are not supported)"
        )


def check_embeds(input_ids: Tensor) -> None:
    """Refuse a prompt of embeddings in which nothing can be distinguished; DopError saying where the tokens can be
    given."""
    if bool((input_ids == UNKNOWN_TOKEN).any()):
        raise DopError(
            "a pruned model finds visual tokens in `inputs_embeds` by the embedding of their placeholder, and there is "
            "none; if image features stand there already, or there is only text, give `input_ids` beside them to "
            "`generate()`"
        )


def check_labels(visual: Tensor, read: Tensor | None) -> None:
    """Refuse a loss on visual tokens; DopError if a visual token is to predict another."""
    if read is not None and bool((visual[:, :-1] & visual[:, 1:] & read[:, :-1]).any()):
        raise DopError("`labels` must be -100 at visual tokens: a pruned model defines no logits that predict them")
