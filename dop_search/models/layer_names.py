"""What the parts of a decoder layer are called: families that compute the same give them other names."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn


class LayerNames(NamedTuple):
    """Names of the modules of a layer.

    Attributes:
        norm, mlp_norm: before the attention (or what is in its place), and before the MLP.
        attended_norm, update_norm: after them, where a layer norms what they return as well.
        output: output projection of the attention.
        head_norms: of queries and of keys, where attention has them.
        in_pairs: whether positions rotate neighbouring features, instead of those of the two halves of a head.
    """

    norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attended_norm: str | None = None
    update_norm: str | None = None
    mlp: str = "mlp"
    output: str = "o_proj"
    head_norms: tuple[str, str] = ("q_norm", "k_norm")
    in_pairs: bool = False


LLAMA = LayerNames()
GEMMA = LayerNames(
    mlp_norm="pre_feedforward_layernorm",
    attended_norm="post_attention_layernorm",
    update_norm="post_feedforward_layernorm",
)
GLM = LayerNames(attended_norm="post_self_attn_layernorm", update_norm="post_mlp_layernorm", in_pairs=True)
LFM2 = LayerNames(
    norm="operator_norm",
    mlp_norm="ffn_norm",
    mlp="feed_forward",
    output="out_proj",
    head_norms=("q_layernorm", "k_layernorm"),
)


def names_of(layer: nn.Module) -> LayerNames:
    """The names in a decoder layer; by what it has, which ``torch.compile`` can trace."""
    parts = layer._modules
    if "pre_feedforward_layernorm" in parts:
        return GEMMA
    if "post_self_attn_layernorm" in parts:
        return GLM
    return LFM2 if "operator_norm" in parts else LLAMA


def mixer_of(layer: Any) -> Any:
    """The attention of a layer, or what carries a state from token to token in its place."""
    parts = layer._modules.get("_orig_mod", layer)._modules  # of one that was compiled by itself
    return parts.get("linear_attn") or parts.get("conv") or parts["self_attn"]


def is_recurrent(layer: nn.Module) -> bool:
    """Whether a layer carries a state instead of attending."""
    return "linear_attn" in layer._modules or "conv" in layer._modules
