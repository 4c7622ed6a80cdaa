"""FlowCut: patches leave the vision tower on the way, by a score that accumulates over its layers."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dop_search.selectors.base import Selector, SelectorInputs, TowerPatch, descending
from dop_search.selectors.tome import LayersPatch
from dop_search.utils.errors import UnsupportedModelError

if TYPE_CHECKING:
    from dop_search.models.capture import TowerView


@dataclass(frozen=True)
class FlowCutSelector(Selector):
    """FlowCut (NeurIPS 2025, arXiv 2505.19536) inside the tower.

    A layer's score of a patch is its share of the CLS token's attention, plus its share of the attention that the CLS
    token's value would pay to values, times the L1 norm of its value (mean over heads); it is averaged with the score
    of the layers before. After every second layer the patches with the lowest scores leave, the more the less spread
    the CLS attention is; the last layer that the projector's input goes through runs on ``T``.

    Not reproduced: ranking (survivors come in the order of the image); the second selection in layer 1 of the decoder
    on LLaVA-NeXT; one number for all images of a batch, the largest of theirs: here a choice depends on its image
    alone. One image per sample.
    """

    name = "flowcut"
    nested = False
    changes_tower = True

    def rank(self, inputs: SelectorInputs, num_kept: int | None = None) -> np.ndarray:
        """See base class."""
        return inputs.survivors_first()

    def patch_tower(self, tower: TowerView, num_kept: int, grid: tuple[int, int]) -> TowerPatch:
        """See base class."""
        if not tower.has_cls or tower.feature_layer < 1:
            raise UnsupportedModelError(
                f"{self.name!r} scores patches by a CLS token in layers below the one that feeds the projector, "
                "which this vision tower lacks; use selector=resize or another selector"
            )
        return FlowCutPatch(tower, num_kept)


class _Left(threading.local):
    """The images that this thread's run is at: tokens that are left of each, CLS first, and scores of its patches."""

    def __init__(self) -> None:
        self.alive: list[Tensor] = []
        self.scores: list[Tensor | None] = []


class FlowCutPatch(LayersPatch):
    """Takes patches out after the MLP of every second layer; images one by one, as they keep different numbers."""

    def __init__(self, tower: TowerView, num_kept: int) -> None:
        super().__init__(tower)
        self.num_kept, self.at = num_kept, _Left()

    def layer(self, index: int, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """See base class."""
        images, length, _ = hidden_states.shape
        if index == 0:
            self.run.num_runs += 1
            self.at.alive = [torch.arange(length, device=hidden_states.device)] * images
            self.at.scores = [None] * images
        result = hidden_states.clone()
        for image in range(images):
            alive = self.at.alive[image]  # before some leave: their states are written once more, and not read again
            result[image, alive] = self._one(index, image, hidden_states[image : image + 1, alive], kwargs)[0]
        if index == self.tower.feature_layer:
            sizes = torch.zeros(images, length, 1, device=hidden_states.device)
            for image, alive in enumerate(self.at.alive):
                sizes[image, alive] = 1.0
            self.run.values["tower_sizes"] = sizes[:, 1:]
        return result

    def _one(self, index: int, image: int, rows: Tensor, kwargs: dict[str, Any]) -> Tensor:
        layer, patches = self.tower.layers[index], rows.shape[1] - 1
        normed = layer.layer_norm1(rows)
        rows = rows + layer.self_attn(hidden_states=normed, attention_mask=None, **kwargs)[0]
        rows = rows + layer.mlp(layer.layer_norm2(rows))
        if patches > self.num_kept:
            attention = cls_row(layer.self_attn, normed)
            scores, before = patch_scores(layer.self_attn, normed, attention), self.at.scores[image]
            scores = scores if before is None else 0.5 * before + 0.5 * scores
            to_go = self.tower.feature_layer - 1 - index
            if to_go % 2 == 0:
                kept = patches - num_leaving(attention, to_go, self.num_kept)
                stays = torch.from_numpy(np.sort(descending(scores)[: max(kept, self.num_kept)])).to(rows.device)
                alive, scores = self.at.alive[image], scores[stays]
                self.at.alive[image] = torch.cat([alive[:1], alive[1:][stays]])
            self.at.scores[image] = scores
        return rows


def cls_row(attention: Any, normed: Tensor) -> Tensor:
    """``[patches]`` head-mean attention of the CLS token, from the input ``[1, tokens, width]`` of the module."""
    query, keys = (
        projected[0].float().unflatten(-1, (attention.num_heads, -1))
        for projected in (attention.q_proj(normed[:, :1]), attention.k_proj(normed))
    )
    scores = torch.einsum("hc,nhc->hn", query[0], keys) * attention.scale
    return scores.softmax(dim=-1).mean(dim=0)[1:]


def patch_scores(attention: Any, normed: Tensor, row: Tensor) -> Tensor:
    """Scores of the patches of one image.

    Args:
        attention: the layer's attention module.
        normed: ``[1, tokens, width]`` its input.
        row: ``[patches]`` head-mean attention of the CLS token.
    """
    values = attention.v_proj(normed)[0].float().unflatten(-1, (attention.num_heads, -1))
    semantic = torch.einsum("hc,nhc->hn", values[0], values).softmax(dim=-1).mean(dim=0)[1:]
    return (row / row.sum() + semantic / semantic.sum()) * values.mean(dim=1)[1:].abs().sum(dim=-1)


def num_leaving(row: Tensor, to_go: int, num_kept: int) -> int:
    """How many patches leave after a layer: ``(n - T) / √to_go · (1 - (entropy / log n)²)``, all but ``T`` at last."""
    count = len(row)
    if to_go == 0:
        return count - num_kept
    share = row / row.sum()
    entropy = float(-(share * share.log()).sum())
    return round((count - num_kept) / math.sqrt(to_go) * (1 - (entropy / math.log(count)) ** 2))
