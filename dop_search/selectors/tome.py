"""ToMe: merge similar tokens inside the vision tower, so that the tower gets cheaper as well."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dop_search.selectors.base import Selector, SelectorInputs, TowerPatch
from dop_search.utils.errors import DopError, UnsupportedModelError

if TYPE_CHECKING:
    from dop_search.models.adapter import ModelAdapter
    from dop_search.models.capture import TowerView


@dataclass(frozen=True)
class ToMeSelector(Selector):
    """Token Merging (arXiv 2210.09461) in every layer of the tower up to the one that feeds the projector.

    Between attention and MLP of a layer the tokens are split into even and odd places; each even one is linked to the
    odd one with the most similar head-mean key (cosine), the ``r`` strongest links are merged by a size-weighted mean.
    Attention adds ``log(size)`` to the scores of a key. The CLS token is never merged.

    The paper fixes ``r``; here the smallest ``r`` is taken that leaves ``T`` patches, and the last merge takes only
    what is still needed. A layer can at most halve its patches, so that ``T`` has a floor; below it is an error.

    Options:
        proportional_attention: whether ``log(size)`` is added.

    Not reproduced: ranking (the survivors are not ordered; they come in the order of the image, so several token groups
    cut the image from top to bottom). The projector still runs on all tokens. One image per sample; not with
    flash-attention in the tower, which takes no scores to add.
    """

    proportional_attention: bool = True

    name = "tome"
    nested = False
    changes_tower = True

    def rank(self, inputs: SelectorInputs, num_kept: int | None = None) -> np.ndarray:
        return inputs.survivors_first()

    def patch_tower(self, adapter: ModelAdapter, num_kept: int) -> TowerPatch:
        tower, grid = adapter.tower_view, self.tower_grid(adapter)
        assert grid is not None
        schedule = merge_schedule(grid[0] * grid[1], num_kept, tower.feature_layer + 1)
        return ToMePatch(tower, schedule, self.proportional_attention)

    def fewest_tokens(self, num_visual: int, num_layers: int) -> int:
        """See base class: each layer at most halves the patches."""
        for _ in range(num_layers):
            num_visual -= num_visual // 2
        return num_visual


def merge_schedule(num_patches: int, num_kept: int, num_layers: int) -> tuple[int, ...]:
    """Patches to merge in each layer: the smallest constant ``r`` that leaves ``num_kept`` patches; DopError if halving
    in every layer leaves more."""
    for r in range((num_patches + 1) // 2 + 1):
        schedule, count = [], num_patches
        for _ in range(num_layers):
            merged = min(r, count // 2, count - num_kept)
            schedule.append(merged)
            count -= merged
        if count == num_kept:
            return tuple(schedule)
    raise DopError(
        f"ToMe at most halves the patches in each of the {num_layers} layers, so that {num_patches} cannot become "
        f"{num_kept}; at least {count} remain"
    )


class _Merging(threading.local):
    """The image that this thread's run is at: patches that are left, how many each stands for, keys of the layer."""

    def __init__(self) -> None:
        self.alive = self.size = self.keys = torch.empty(0)


class LayersPatch(TowerPatch, ABC):
    """Replaces the forwards of a tower's layers; states keep their full shape, patches that left are never computed."""

    def __init__(self, tower: TowerView) -> None:
        super().__init__()
        self.tower = tower
        for index, layer in enumerate(tower.layers):
            self.replace_forward(layer, partial(self.layer, index))

    @abstractmethod
    def layer(self, index: int, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """One encoder layer on the patches that are left; ``hidden_states`` has all of them."""


class ToMePatch(LayersPatch):
    """Merges patches between attention and MLP of every layer."""

    def __init__(self, tower: TowerView, schedule: tuple[int, ...], proportional_attention: bool) -> None:
        if "flash" in str(tower.layers[0].self_attn.config._attn_implementation):
            raise UnsupportedModelError(
                "ToMe adds log(size) to attention scores, which flash-attention cannot; "
                "load the vision tower with attn_implementation=sdpa"
            )
        super().__init__(tower)
        self.proportional_attention = proportional_attention
        self.schedule = [*schedule, *[0] * (len(tower.layers) - len(schedule))]
        self.at = _Merging()
        for layer in tower.layers:
            self.undo.callback(layer.self_attn.k_proj.register_forward_hook(self._keep_keys).remove)

    def _keep_keys(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.at.keys = output

    def layer(self, index: int, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        images, length, width = hidden_states.shape
        layer = self.tower.layers[index]
        if index == 0:
            self.run.num_runs += 1
            self.at.alive = torch.arange(length, device=hidden_states.device).expand(images, -1)
            self.at.size = torch.ones(images, length, 1, device=hidden_states.device)
        rows = hidden_states.gather(1, self.at.alive[..., None].expand(-1, -1, width))
        bias = attention_mask
        if self.proportional_attention and self.at.alive.shape[1] < length:
            bias = self.at.size[..., 0].log().to(rows.dtype)[:, None, None, :]
        attended, _ = layer.self_attn(hidden_states=layer.layer_norm1(rows), attention_mask=bias, **kwargs)
        rows = rows + attended
        if self.schedule[index]:
            rows = self._merge(rows, layer.self_attn, self.schedule[index])
        rows = rows + layer.mlp(layer.layer_norm2(rows))
        if index == self.tower.feature_layer:
            sizes = torch.zeros(images, length, 1, device=rows.device).scatter(
                1, self.at.alive[..., None], self.at.size
            )
            self.run.values["tower_sizes"] = sizes[:, self.tower.num_extra :]
        return hidden_states.scatter(1, self.at.alive[..., None].expand(-1, -1, width), rows)

    def _merge(self, rows: Tensor, attention: Any, count: int) -> Tensor:
        metric = self.at.keys.float().unflatten(2, (attention.num_heads, attention.head_dim)).mean(dim=2)
        merged, self.at.size, stays = merge_most_similar(rows, metric, self.at.size, count, self.tower.has_cls)
        self.at.alive = torch.cat([self.at.alive[:, ::2].gather(1, stays), self.at.alive[:, 1::2]], dim=1)
        return merged


def merge_most_similar(
    rows: Tensor, metric: Tensor, size: Tensor, count: int, protect_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge ``count`` even tokens into odd ones, by size-weighted means.

    Args:
        rows: ``[images, tokens, width]``.
        metric: ``[images, tokens, channels]``, whose cosines say which tokens are similar.
        size: ``[images, tokens, 1]``, patches that each token stands for.
        protect_first: never merge the first token.

    Returns:
        What is left of ``rows`` and of ``size`` (the even tokens that stay, then the odd ones), and the places of the
        former among the even tokens.
    """
    source, target, stays = match(metric, count, protect_first)
    links = nn.functional.one_hot(target, rows.shape[1] // 2).transpose(1, 2).float()  # a product adds in a fixed order

    def fold(values: Tensor) -> Tensor:
        channels = values.shape[2]
        even, odd = values[:, ::2], values[:, 1::2]
        merged = odd + links @ even.gather(1, source[..., None].expand(-1, -1, channels))
        return torch.cat([even.gather(1, stays[..., None].expand(-1, -1, channels)), merged], dim=1)

    total, size = fold(rows.float() * size), fold(size)
    return (total / size).to(rows.dtype), size, stays


def match(metric: Tensor, count: int, protect_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Link even tokens to odd ones.

    Args:
        metric: ``[images, tokens, channels]``.
        protect_first: never link the first token.

    Returns:
        Places among the even tokens that are merged ``[images, count]``, the odd place of each, and the places
        among the even tokens that stay, in order.
    """
    metric = nn.functional.normalize(metric, dim=-1)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    if protect_first:
        scores[:, 0] = -torch.inf
    best, partner = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    source = order[:, :count]
    return source, partner.gather(1, source), order[:, count:].sort(dim=-1).values
