"""LLaVA-PruMerge+: outliers of the CLS attention, completed by strided tokens, each merged with its neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dop_search.selectors.attention_choice import AttentionSelector, keys_flops
from dop_search.selectors.base import (
    Selection,
    SelectionSizes,
    SelectorInputs,
    cosine_matrix,
    descending,
    finite_array,
    with_rest,
)
from dop_search.selectors.sharing import PerImageSelector


@dataclass(frozen=True)
class PruMergePlusSelector(AttentionSelector, PerImageSelector):
    """LLaVA-PruMerge+ (arXiv 2403.15388), without fine-tuning, completed to a fixed number of tokens.

    With ``a = softmax(q_cls K^T / √C)`` over the full width of the tower's last layer, tokens above
    ``Q3 + iqr_factor · (Q3 − Q1)`` are outliers. Of ``T`` tokens one is the summary; the others are the outliers
    (the highest first, if they are too many) and evenly strided tokens among the remaining ones. In the projector's
    input each kept token becomes ``x_i + Σ a_j x_j`` over the ``num_neighbors`` other tokens whose keys are most
    similar (cosine), and the summary is ``Σ a_j x_j`` over all dropped ones, in the place of the last dropped token.

    Options:
        num_neighbors: tokens merged into each kept one.
        iqr_factor: how far above the third quartile an outlier is.
        summary: whether one token summarises the dropped ones (from ``T = 2`` on).
        attention: ``cls``: as published; ``received``: what a token receives in the layer that feeds the projector, and
            that layer's head-mean keys, merged behind the projector, as is done where a tower has no CLS token.

    Not reproduced: the paper chooses the number of tokens by itself (about 25 % for the + variant); a fixed number is
    how later papers compare it. Positions are not renumbered. The paper's LoRA variant is another model.
    """

    num_neighbors: int = 32
    iqr_factor: float = 1.5
    summary: bool = True

    name = "prumerge_plus"
    merges = True

    def needs(self) -> frozenset[str]:
        return self.requires | {self.space, "tiles", *self._attention_and_keys}

    @property
    def _attention_and_keys(self) -> tuple[str, str]:
        return ("last_cls_attention", "last_keys") if self.by_cls else ("received_attention", "keys")

    def scores(self, inputs: SelectorInputs) -> Tensor:
        return inputs.tensor(self._attention_and_keys[0])

    def one_image(self, inputs: SelectorInputs, num_kept: int) -> Selection:
        attention = self.scores(inputs)
        by_attention, count = descending(attention), inputs.num_visual_tokens
        if not 0 < num_kept < count:
            return Selection(by_attention)
        summary = int(self.summary and num_kept > 1)
        kept = self._kept(finite_array(attention), by_attention, num_kept - summary)
        dropped = np.setdiff1d(np.arange(count), kept)
        merged = self.merge(inputs, kept, dropped, bool(summary))
        order = slots = np.concatenate([kept, dropped[-1:]]) if summary else kept
        return Selection(with_rest(order, by_attention), slots, merged, self.space)

    def merge(self, inputs: SelectorInputs, kept: np.ndarray, dropped: np.ndarray, summary: bool) -> Tensor:
        """States of the ``kept`` tokens with their neighbours, and then of the summary of the ``dropped``."""
        features = inputs.tensor(self.space).float()
        weights = self.scores(inputs).to(features.device).float()[:, None]
        index = torch.from_numpy(kept).to(features.device)
        keys = inputs.tensor(self._attention_and_keys[1]).to(features.device)
        similarity = cosine_matrix(keys[index], keys)
        similarity[torch.arange(len(kept), device=features.device), index] = -torch.inf  # others only
        nearest = similarity.topk(min(self.num_neighbors, len(features) - 1), dim=1).indices
        merged = features[index] + (weights[nearest] * features[nearest]).sum(dim=1)
        if not summary:
            return merged
        gone = torch.from_numpy(dropped).to(features.device)
        return torch.cat([merged, (weights[gone] * features[gone]).sum(dim=0, keepdim=True)])

    def _kept(self, attention: np.ndarray, by_attention: np.ndarray, count: int) -> np.ndarray:
        low, high = np.quantile(attention, [0.25, 0.75])
        outliers = by_attention[attention[by_attention] > high + self.iqr_factor * (high - low)][:count]
        rest = np.setdiff1d(np.arange(len(attention)), outliers)
        missing = count - len(outliers)
        strided = rest[np.arange(missing) * len(rest) // max(1, missing)]
        return np.concatenate([outliers, strided])

    def selection_flops(self, sizes: SelectionSizes) -> int:
        """Attention, keys once more, their similarities, and the weighted sums."""
        similarities = sizes.num_visual * sizes.num_kept * (sizes.width if self.by_cls else sizes.dims.head_dim)
        sums = (sizes.num_kept * min(self.num_neighbors, sizes.num_visual) + sizes.num_visual) * self.states_width(
            sizes
        )
        return self.attention_flops(sizes) + keys_flops(sizes) + 2 * (similarities + sums)
