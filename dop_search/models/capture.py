"""What a CLIP- or SigLIP-style vision tower shows to a selector besides its attention: keys, features, states.

Nothing here needs eager attention: scores are computed from the input of the attention module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dop_search.models.tower import Read, TowerCapture
from dop_search.models.tower_attention import cls_attention, head_mean_keys, received_attention
from dop_search.utils.errors import UnsupportedModelError

if TYPE_CHECKING:
    from dop_search.models.adapter import ModelAdapter

TOWER_FIELDS = (
    "cls_attention",
    "received_attention",
    "global_attention",
    "keys",
    "last_cls_attention",
    "last_keys",
    "features",
    "cls_feature",
    "patch_states",
)
"""See ``dop_search.selectors.SelectorInputs`` for their meaning. The first three are had of any layer, and with the
keys from more towers than :class:`TowerView` covers; the others through one."""

_ATTENTION: dict[str, Read] = {
    "cls_attention": cls_attention,
    "received_attention": received_attention,
    "global_attention": partial(received_attention, cls_asks=True),
}
_CLS_FIELDS = frozenset({"last_cls_attention", "cls_feature", "patch_states"})

Layer = int | float | str
"""A layer of the tower: see ``dop_search.selectors.base.at_layer``."""


def field_and_layer(name: str) -> tuple[str, Layer | None]:
    """``cls_attention@5`` as ``("cls_attention", 5)``; without a layer ``None``, the one that feeds the projector."""
    kind, _, layer = name.partition("@")
    if not layer or layer == "middle":
        return kind, layer or None
    return kind, int(layer) if layer.lstrip("-").isdecimal() else float(layer)


INSIDE = "what selectors of this kind see inside a CLIP or SigLIP tower"
"""What a tower that :class:`TowerView` does not cover cannot give."""


@dataclass(frozen=True)
class TowerView:
    """A vision tower that selectors can look into.

    Attributes:
        module: its forward takes ``pixel_values`` and ``interpolate_pos_encoding``.
        layers: encoder layers with ``layer_norm1``, ``self_attn`` (``q_proj``, ``k_proj``), ``layer_norm2``, ``mlp``.
        feature_layer: index of the layer whose output the projector receives.
        has_cls: whether the first token is a CLS token, which the projector does not receive.
        patch_size: pixels per side of a patch.
        grid: rows and columns of the visual tokens of every image, where each image is one run of the tower and each
            patch one token; ``None`` otherwise (any-resolution tiles).
        final_norm: norm after the last layer; ``None`` if the tower has none.
        project: from projector inputs ``[n, width]`` to decoder inputs ``[n, hidden_size]``, token by token; ``None``
            where a visual token is not the projection of one patch.
    """

    module: Any
    layers: Sequence[Any]
    feature_layer: int
    has_cls: bool
    width: int
    patch_size: int
    grid: tuple[int, int] | None
    final_norm: Any | None
    project: Callable[[Tensor], Tensor] | None

    @property
    def num_extra(self) -> int:
        """Tokens in front of the patches."""
        return int(self.has_cls)


def refuse(wanted: str, why: str) -> UnsupportedModelError:
    """The error for a tower that cannot give what a selector needs."""
    return UnsupportedModelError(
        f"{why}, so that {wanted} cannot be had from it; selectors that work on every model are uniform_grid, random, "
        "divprune and cdpruner_llm"
    )


def capture_field(adapter: ModelAdapter, name: str, receive: Callable[[Tensor], None]) -> TowerCapture:
    """Capture one of :data:`TOWER_FIELDS`, or attention in another layer, as :class:`TowerCapture` does;
    UnsupportedModelError if the tower is not covered, or has no CLS token and the field needs one.

    Attention is averaged over heads. What each patch receives from all patches is what VisionZip (arXiv 2412.04467) and
    VisPruner (arXiv 2412.01818v2) use for towers without a CLS token.
    """
    kind, layer = field_and_layer(name)
    if kind == "cls_attention" and not adapter.has_cls:
        raise UnsupportedModelError(
            f"`cls_attention` is not available for {type(adapter.model).__name__}: its vision tower has no CLS token; "
            "where a selector has it use its option attention=received, or selector=received_attention, "
            "selector=uniform_grid or selector=random"
        )
    if kind in _ATTENTION:
        return TowerCapture(adapter, adapter.attention_module(layer), _ATTENTION[kind], receive)
    if name == "keys":
        return TowerCapture(adapter, adapter.received_attention_module(), head_mean_keys, receive)
    view = adapter.tower_view
    if not view.has_cls and name in _CLS_FIELDS:
        raise refuse(f"`{name}`", "the vision tower has no CLS token (try the selector's option attention=received)")
    extra, norm = view.num_extra, view.final_norm or nn.Identity()
    feature, last = view.layers[view.feature_layer], view.layers[-1]
    where: dict[str, tuple[Any, Read, bool]] = {
        "last_cls_attention": (last.self_attn, wide_cls_attention, False),
        "last_keys": (last.self_attn, lambda *call: _wide_keys(*call)[:, extra:], False),
        "features": (feature, lambda module, args, kwargs: args[0][:, extra:], True),
        "cls_feature": (feature, lambda module, args, kwargs: args[0][:, :1].expand_as(args[0][:, 1:]), True),
        "patch_states": (feature, lambda module, args, kwargs: norm(args[0][:, extra:]), True),
    }
    module, read, of_output = where[name]
    return TowerCapture(adapter, module, read, receive, of_output)


def wide_cls_attention(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The CLS row of an attention as if it had one head over its full width: ``[images, patches]`` float32."""
    hidden = args[0] if args else kwargs["hidden_states"]
    query, key = attention.q_proj(hidden[:, :1]).float(), _wide_keys(attention, args, kwargs)
    scores: Tensor = query @ key.transpose(1, 2) * key.shape[-1] ** -0.5
    return scores.softmax(dim=-1)[:, 0, 1:]


def _wide_keys(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Keys of all tokens, heads side by side, from the input of the module: ``[images, tokens, width]`` float32."""
    keys: Tensor = attention.k_proj(args[0] if args else kwargs["hidden_states"]).float()
    return keys


def attention_flops(view: TowerView, num_patches: int) -> int:
    """FLOPs of the attention of one of the tower's layers on one image."""
    count = num_patches + view.num_extra
    return 8 * count * view.width**2 + 4 * count**2 * view.width


def mlp_flops(view: TowerView, num_patches: int) -> int:
    """FLOPs of the MLP of one of the tower's layers on one image."""
    inner: int = view.layers[0].mlp.fc1.out_features
    return 4 * (num_patches + view.num_extra) * view.width * inner
