"""Ranking visual tokens inside the decoder: the extension point, and attention rows without an attention map."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dop_search.models.layer_names import names_of
from dop_search.pruning.layer import normalize, project_heads, rotate
from dop_search.strategy.operations import ModelDims


@dataclass(frozen=True)
class StageSample:
    """One sample at the door of a decoder layer; rows are in the order of the sequence.

    Attributes:
        layer: the decoder layer that comes next; its norm and projections may be used.
        hidden: ``[num_rows, hidden_size]``, what enters the layer.
        cos, sin: rotary embedding of each row, ``[num_rows, head_dim]``; ``sin`` is signed, see
            :func:`dop_search.pruning.layer.rotate`.
        text: rows that are text.
        candidates: rows of the visual tokens to rank.
    """

    layer: Any
    hidden: Tensor
    cos: Tensor
    sin: Tensor
    text: Tensor
    candidates: Tensor

    def text_after(self) -> Tensor:
        """``[num_text]`` which text rows come after the first candidate; all of them if none does."""
        after = self.text > self.candidates[0]
        return after if bool(after.any()) else torch.ones_like(after)

    def normed(self, rows: Tensor | None = None) -> Tensor:
        """Normalised hidden states as the layer's projections see them."""
        hidden = self.hidden if rows is None else self.hidden.index_select(0, rows)
        return normalize(getattr(self.layer, names_of(self.layer).norm), hidden)

    def queries(self, rows: Tensor) -> Tensor:
        """Rotated queries ``[heads, len(rows), head_dim]``."""
        return self._heads("q", rows)

    def keys(self, rows: Tensor | None = None) -> Tensor:
        """Rotated keys ``[kv_heads, len(rows), head_dim]``; of every row by default."""
        return self._heads("k", rows)

    def values(self, rows: Tensor | None = None) -> Tensor:
        """Values ``[kv_heads, len(rows), head_dim]``; of every row by default."""
        return self._heads("v", rows, rotated=False)

    def _heads(self, which: str, rows: Tensor | None, rotated: bool = True) -> Tensor:
        attention = self.layer.self_attn
        names = names_of(self.layer)
        norm = getattr(attention, names.head_norms[which == "k"], None)
        projection = getattr(attention, f"{which}_proj")
        heads = project_heads(projection, norm, self.normed(rows), attention.head_dim).transpose(0, 1)
        if not rotated:
            return heads
        cos, sin = (part if rows is None else part.index_select(0, rows) for part in (self.cos, self.sin))
        return rotate(heads, cos, sin, names.in_pairs)

    def attention(self, rows: Tensor, rotated: bool = True) -> Tensor:
        """Causal attention probabilities of some rows to every row: ``[heads, len(rows), num_rows]`` float32."""
        queries, keys = self._heads("q", rows, rotated), self._heads("k", None, rotated)
        return attention_probabilities(self.layer.self_attn, queries, keys, rows)


def attention_probabilities(attention: Any, queries: Tensor, keys: Tensor, rows: Tensor) -> Tensor:
    """Softmax of ``queries`` ``[heads, q, head_dim]`` over ``keys`` ``[kv_heads, n, head_dim]`` up to each own row."""
    keys = keys.repeat_interleave(len(queries) // len(keys), dim=0)
    scores = (queries @ keys.transpose(1, 2)).float() * attention.scaling
    hidden = torch.arange(keys.shape[1], device=rows.device)[None, :] > rows[:, None]
    return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)


@dataclass(frozen=True)
class StageRanking:
    """What a criterion decided for one sample.

    Attributes:
        order: places in ``StageSample.candidates``, best first; a permutation.
        merged: new hidden states of some candidates, ``(places, [len(places), hidden_size])``.
    """

    order: np.ndarray
    merged: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class StageSelector(ABC):
    """Ranks the visual tokens at the door of the layers ``stages``. A new criterion is one subclass in one file.

    The ranking of a sample depends on that sample alone.

    Attributes:
        version: raised whenever the same options rank otherwise than before, see ``dop_search.selectors.Selector``.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    stages: tuple[int, ...]

    def begin(self, sample: StageSample) -> Any:
        """Called once at the door of the first layer; what it returns is handed to every :meth:`rank`."""
        return None

    @abstractmethod
    def rank(self, sample: StageSample, num_kept: int, memory: Any) -> StageRanking:
        """Rank the candidates, of which ``num_kept`` go on together."""

    def begin_flops(self, dims: ModelDims, num_text: int, num_visual: int) -> int:
        """FLOPs of :meth:`begin` for one sample."""
        return 0

    @abstractmethod
    def rank_flops(self, dims: ModelDims, num_text: int, num_rows: int, num_candidates: int, num_kept: int) -> int:
        """FLOPs of :meth:`rank` for one sample with so many rows at the stage, text included."""

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        return tuple(item.name for item in fields(cls))


def attention_rows_flops(dims: ModelDims, num_queries: int, num_rows: int) -> int:
    """FLOPs of :meth:`StageSample.attention`: queries of some rows, keys of all, their products."""
    projections = 2 * dims.hidden_size * (num_queries * dims.query_width + num_rows * dims.kv_width)
    return projections + 2 * dims.query_width * num_queries * num_rows


def best_first(scores: Tensor) -> np.ndarray:
    """Places from the highest score to the lowest; ties keep the order of the tokens."""
    return np.argsort(-scores.detach().double().cpu().numpy(), kind="stable")
