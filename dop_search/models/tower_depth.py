"""Attention and MLPs of a vision tower that end at a depth, as those of the decoder do. An extension of the paper."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from dop_search.models.capture import TowerView, attention_flops, mlp_flops
from dop_search.utils.attached import replace_attribute
from dop_search.utils.errors import StrategyError


@contextmanager
def tower_depths(view: TowerView, attention: int, mlp: int) -> Iterator[None]:
    """Within the context the tower's attention runs in the layers below one depth, its MLPs below another.

    What does not run is not computed: the residual stream passes by. Selectors that look into the attention of a
    layer that does not run have nothing to see.

    Args:
        view: the tower.
        attention: exit depth of attention, ``0..number of layers``.
        mlp: exit depth of the MLP.

    Raises:
        StrategyError: if a depth is outside that range.
    """
    num_layers = len(view.layers)
    for name, depth in (("attention", attention), ("mlp", mlp)):
        if not 0 <= depth <= num_layers:
            raise StrategyError(f"`0 <= {name} <= {num_layers}` must hold for the vision tower, but got {depth}")
    with ExitStack() as undo:
        for layer in view.layers[attention:]:
            replace_attribute(undo, layer.self_attn, "forward", _no_attention)
        for layer in view.layers[mlp:]:
            replace_attribute(undo, layer.mlp, "forward", torch.zeros_like)
        yield


def _no_attention(hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
    return torch.zeros_like(hidden_states), None


def tower_depth_flops(view: TowerView, attention: int, mlp: int, num_patches: int) -> int:
    """FLOPs of the encoder layers on one image with these exit depths (1 MAC = 2 FLOPs; norms left out)."""
    return attention * attention_flops(view, num_patches) + mlp * mlp_flops(view, num_patches)
