"""LLaVA-PruMerge+: outliers of the CLS attention, completed by strided tokens, each merged with its neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dop_search.selectors.attention_choice import attention_flops
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
class PruMergePlusSelector(PerImageSelector):
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

    Not reproduced: the paper chooses the number of tokens by itself (about 25 % for the + variant); a fixed number is
    how later papers compare it. Positions are not renumbered. The paper's LoRA variant is another model.
    """

    num_neighbors: int = 32
    iqr_factor: float = 1.5
    summary: bool = True

    name = "prumerge_plus"
    requires = frozenset({"last_cls_attention", "last_keys", "features"})
    merges = True

    def one_image(self, inputs: SelectorInputs, num_kept: int) -> Selection:
        """See base class."""
        attention = inputs.tensor("last_cls_attention")
        by_attention, count = descending(attention), inputs.num_visual_tokens
        if not 0 < num_kept < count:
            return Selection(by_attention)
        summary = int(self.summary and num_kept > 1)
        kept = self._kept(finite_array(attention), by_attention, num_kept - summary)
        dropped = np.setdiff1d(np.arange(count), kept)
        merged = self.merge(inputs, kept, dropped, bool(summary))
        order = slots = np.concatenate([kept, dropped[-1:]]) if summary else kept
        return Selection(with_rest(order, by_attention), slots, merged, "features")

    def merge(self, inputs: SelectorInputs, kept: np.ndarray, dropped: np.ndarray, summary: bool) -> Tensor:
        """Projector inputs of the ``kept`` tokens with their neighbours, and then of the summary of the ``dropped``."""
        features = inputs.tensor("features").float()
        weights = inputs.tensor("last_cls_attention").to(features.device).float()[:, None]
        index = torch.from_numpy(kept).to(features.device)
        similarity = cosine_matrix(inputs.tensor("last_keys")).to(features.device)[index]
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
        """Keys and the CLS row, key similarities, and the weighted sums."""
        attention = attention_flops("cls", sizes)
        similarities, means = sizes.num_visual * sizes.num_kept, sizes.num_kept * self.num_neighbors + sizes.num_visual
        return attention + 2 * sizes.width * (similarities + means)
