"""FlowCut: patches leave the vision tower on the way, by a score that accumulates over its layers."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dop_search.selectors.base import Selector, SelectorInputs, TowerPatch, descending, with_rest
from dop_search.selectors.sharing import shares
from dop_search.selectors.tome import LayersPatch
from dop_search.utils.errors import DopError, UnsupportedModelError

if TYPE_CHECKING:
    from dop_search.models.adapter import ModelAdapter
    from dop_search.models.capture import TowerView

SMALLEST = 1e-7
"""What the released code for Qwen2-VL adds to shares before their logarithm."""


@dataclass(frozen=True)
class FlowCutSelector(Selector):
    """FlowCut (NeurIPS 2025, arXiv 2505.19536) inside the tower; the stage inside the decoder is ``flowcut_two_stage``.

    A layer's score of a patch is its share of the CLS token's attention, plus its share of the attention that the CLS
    token's value would pay to values, times the L1 norm of its value (mean over heads); it is averaged with the score
    of the layers before. After every second layer the patches with the lowest scores leave, the more the less spread
    the CLS attention is; the last layer that the projector's input goes through runs on ``T``.

    LLaVA-NeXT: of each tile as many patches leave at once as of the one of which most would. Its tiles share ``T`` in
    proportion to their patches without padding; padding, and newline tokens, are gone at last.

    Qwen2-VL: as CLS attention counts that of the mean query, the value term is left out, and patches leave after the
    last block as well. As released, each four patches that are left, wherever they stood, become a token, and the
    tokens stand in the first ``T`` places of the image.

    Not reproduced: ranking (survivors come in the order of the image); one number for all images of a batch, the
    largest of theirs: here a choice depends on its image alone; on LLaVA-NeXT, as many patches of every tile, padding
    included, so that the number of tokens varies. One image per sample.
    """

    name = "flowcut"
    requires = frozenset({"tiles"})
    nested = False
    changes_tower = True

    def rank(self, inputs: SelectorInputs, num_kept: int | None = None) -> np.ndarray:
        return inputs.survivors_first()

    def tower_grid(self, adapter: ModelAdapter) -> tuple[int, int] | None:
        """See base class; images may have any size on LLaVA-NeXT, and on Qwen2-VL, whose tower has no windows."""
        if adapter.model.config.model_type == "qwen2_vl":
            return None
        tower = adapter.tower_view
        if tower.grid is None and not adapter.sizes_name:
            raise UnsupportedModelError(
                f"{self.name!r} leaves as many patches of every tile of an image, but the parts of an input of "
                f"{type(adapter.model).__name__} are no tiles; use selector=vscan or another selector"
            )
        if not tower.has_cls or tower.feature_layer < 1:
            raise UnsupportedModelError(
                f"{self.name!r} scores patches by a CLS token in layers below the one that feeds the projector, "
                "which this vision tower lacks; use selector=resize or another selector"
            )
        return tower.grid

    def patch_tower(self, adapter: ModelAdapter, num_kept: int) -> TowerPatch:
        if adapter.model.config.model_type == "qwen2_vl":
            return PackedFlowCutPatch(adapter, num_kept)
        tower = adapter.tower_view
        return FlowCutPatch(tower, num_kept, adapter.packed_patches if tower.grid is None else None)


@dataclass
class _Part:
    """What is left of an image or a tile.

    Attributes:
        alive: tokens of the tower that are left, in the order of the image, a CLS token first.
        wanted: how many patches shall be left.
        real: ``[patches]`` which of those that are left become visual tokens.
        scores: ``[patches]`` of those that are left; ``None`` before the first layer.
        first: the first token of the image, where a row of the tower has several images.
    """

    alive: Tensor
    wanted: int
    real: Tensor
    scores: Tensor | None = None
    first: int = 0

    @property
    def num_patches(self) -> int:
        return len(self.real)

    @property
    def is_done(self) -> bool:
        """Whether nothing has to leave any more."""
        return self.num_patches <= self.wanted

    def add(self, scores: Tensor) -> None:
        """A layer's scores."""
        self.scores = scores if self.scores is None else 0.5 * self.scores + 0.5 * scores

    def leave(self, number: int) -> None:
        """Keep all but so many patches, the wanted ones always: the best of those that become visual tokens."""
        assert self.scores is not None
        order = descending(self.scores)
        best = order[self.real.cpu().numpy()[order]][: self.wanted]
        kept = np.sort(with_rest(best, order)[: max(self.num_patches - number, self.wanted)])
        stays = torch.from_numpy(kept).to(self.alive.device)
        extra = len(self.alive) - self.num_patches
        self.alive = torch.cat([self.alive[:extra], self.alive[extra:][stays]])
        self.scores, self.real = self.scores[stays], self.real[stays]


class _Left(threading.local):
    """What this thread's run is at: the parts of each image."""

    def __init__(self) -> None:
        self.images: list[list[_Part]] = []


class FlowCutPatch(LayersPatch):
    """Takes patches out after the MLP of every second layer; tiles one by one, as they keep different patches.

    Args:
        num_kept: patches of an image that shall be left, all of its tiles together.
        real: gives, per image of the call, which patches of which tiles become visual tokens, ``[tiles, patches]``;
            ``None``: images have one tile, and all patches do.
    """

    def __init__(self, tower: TowerView, num_kept: int, real: Callable[[], Sequence[Tensor]] | None = None) -> None:
        super().__init__(tower)
        self.num_kept, self.real, self.at = num_kept, real, _Left()

    def _begin(self, images: int, length: int, device: torch.device) -> None:
        self.run.num_runs += 1
        patches = length - self.tower.num_extra
        kinds = [torch.ones(1, patches, dtype=torch.bool)] * images if self.real is None else self.real()
        self.at.images = []
        for real in kinds:
            counts = real.sum(dim=1).cpu().numpy()
            wanted = [patches] * len(real) if counts.sum() <= self.num_kept else shares(counts, counts, self.num_kept)
            self.at.images.append(
                [
                    _Part(torch.arange(length, device=device), int(number), its.to(device))
                    for number, its in zip(wanted, real, strict=True)
                ]
            )

    def layer(self, index: int, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        images, length, _ = hidden_states.shape
        if index == 0:
            self._begin(images, length, hidden_states.device)
        result, tiles = hidden_states.clone(), itertools.count()
        to_go = self.tower.feature_layer - 1 - index
        for parts in self.at.images:
            leaving = 0
            for part in parts:
                tile = next(tiles)
                # those that leave are written once more, and not read again
                rows, attention = self._one(index, hidden_states[tile : tile + 1, part.alive], part, kwargs)
                result[tile, part.alive] = rows[0]
                if attention is not None and to_go % 2 == 0:
                    leaving = max(leaving, num_leaving(attention, to_go, part.wanted))
            for part in parts:
                if leaving and not part.is_done:
                    part.leave(leaving)
        if index == self.tower.feature_layer:
            sizes = torch.zeros(images, length, 1, device=hidden_states.device)
            for tile, part in enumerate(part for parts in self.at.images for part in parts):
                sizes[tile, part.alive] = 1.0
            self.run.values["tower_sizes"] = sizes[:, self.tower.num_extra :]
        return result

    def _one(self, index: int, rows: Tensor, part: _Part, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        layer = self.tower.layers[index]
        normed = layer.layer_norm1(rows)
        rows = rows + layer.self_attn(hidden_states=normed, attention_mask=None, **kwargs)[0]
        rows = rows + layer.mlp(layer.layer_norm2(rows))
        if part.is_done:
            return rows, None
        attention = cls_row(layer.self_attn, normed)
        part.add(patch_scores(layer.self_attn, normed, attention))
        return rows, attention


class PackedFlowCutPatch(TowerPatch):
    """The same for the tower of Qwen2-VL, whose rows are the patches of all images; the merger makes four a token.

    ``num_kept``: tokens of an image that shall be left.
    """

    def __init__(self, adapter: ModelAdapter, num_kept: int) -> None:
        super().__init__()
        self.adapter, self.num_kept, self.at = adapter, num_kept * adapter.patches_per_token, _Left()
        self.blocks = adapter.vision_tower.blocks
        for index, block in enumerate(self.blocks):
            self.replace_forward(block, partial(self.block, index))

    def _begin(self, device: torch.device) -> None:
        self.run.num_runs += 1
        images = self.adapter.token_grids(self.adapter.vision_watch.current())
        frames = max(map(len, images))
        if frames > 1:
            raise DopError(f"'flowcut' needs one image per sample, but got a video of {frames} frames")
        counts = [rows * columns * self.adapter.patches_per_token for ((rows, columns),) in images]
        self.at.images = [
            [_Part(torch.arange(a, b, device=device), self.num_kept, torch.ones(b - a, device=device) > 0, first=a)]
            for a, b in itertools.pairwise(itertools.accumulate(counts, initial=0))
        ]

    def block(
        self,
        index: int,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        **kwargs: Any,
    ) -> Tensor:
        """One block on the patches that are left; after the last one these come first in the place of their image."""
        if index == 0:
            self._begin(hidden_states.device)
        block, result = self.blocks[index], hidden_states.clone()
        to_go = len(self.blocks) - 1 - index
        kwargs["max_seqlen"] = None
        for (part,) in self.at.images:
            positions = (position_embeddings[0][part.alive], position_embeddings[1][part.alive])
            rows, end = hidden_states[part.alive], cu_seqlens.new_tensor([0, part.num_patches])
            normed = block.norm1(rows)
            rows = rows + block.attn(normed, cu_seqlens=end, position_embeddings=positions, **kwargs)
            result[part.alive] = rows + block.mlp(block.norm2(rows))
            if not part.is_done:
                attention, scores = packed_scores(block.attn, normed, positions)
                part.add(scores)
                if to_go % 2 == 0:
                    part.leave(num_leaving(attention, to_go, part.wanted, SMALLEST))
            if to_go == 0:
                result[part.first : part.first + part.num_patches] = result[part.alive]
        return result


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
        normed: ``[1, tokens, width]`` its input.
        row: ``[patches]`` head-mean attention of the CLS token.
    """
    values = attention.v_proj(normed)[0].float().unflatten(-1, (attention.num_heads, -1))
    semantic = torch.einsum("hc,nhc->hn", values[0], values).softmax(dim=-1).mean(dim=0)[1:]
    return (row / row.sum() + semantic / semantic.sum()) * values.mean(dim=1)[1:].abs().sum(dim=-1)


def packed_scores(attention: Any, normed: Tensor, positions: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """``[patches]`` attention of the mean query, and scores, of one image without a CLS token.

    Args:
        normed: ``[patches, width]`` its input.
        positions: cosine and sine of the patches' rotation.
    """
    query, key, values = attention.qkv(normed).float().unflatten(-1, (3, attention.num_heads, -1)).unbind(dim=1)
    cos, sin = (part.float()[:, None] for part in positions)

    def rotated(heads: Tensor) -> Tensor:
        first, second = heads.chunk(2, dim=-1)
        return heads * cos + torch.cat([-second, first], dim=-1) * sin

    scores = torch.einsum("hc,nhc->hn", rotated(query).mean(dim=0), rotated(key)) * attention.scaling
    row = scores.softmax(dim=-1).mean(dim=0)
    return row, row * values.mean(dim=1).abs().sum(dim=-1)


def num_leaving(row: Tensor, to_go: int, num_kept: int, smallest: float = 0.0) -> int:
    """How many patches leave after a layer: ``(n - T) / √to_go · (1 - (entropy / log n)²)``, all but ``T`` at last."""
    count = len(row)
    if to_go == 0 or count < 2:
        return count - num_kept
    share = row / row.sum()
    entropy = -float(torch.xlogy(share, share + smallest).sum())
    return round((count - num_kept) / math.sqrt(to_go) * (1 - (entropy / math.log(count)) ** 2))
