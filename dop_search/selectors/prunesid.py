"""PruneSID: groups of tokens by principal components, redundant ones last in each, and a share for every group."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dop_search.selectors.attention_choice import cls_flops
from dop_search.selectors.base import Selection, SelectionSizes, SelectorInputs, cosine_matrix, finite_array, with_rest
from dop_search.selectors.sharing import PerImageSelector
from dop_search.utils.errors import DopError


@dataclass(frozen=True)
class PruneSidSelector(PerImageSelector):
    """PruneSID (ICLR 2026, arXiv 2603.09480).

    The tokens' features, after a sigmoid, are cut into ``T / 4`` groups by the principal component on which each token
    loads most. In a group the best token goes first, then the best of those that are not too similar (cosine) to the
    chosen ones, then the others. Each group gives one token at least, and more by how many dissimilar ones it has.

    Options:
        score: ``cls``: CLS attention ranks, and the CLS token is one of the ``T``, in the place of a dropped one
            (LLaVA); ``loading``: the loading itself ranks, on the tokens that the decoder receives (Qwen-VL).

    Not reproduced: the random principal components (``torch.pca_lowrank``), which are exact here; renumbered positions;
    the padding of LLaVA-NeXT, of which the released code keeps tokens too.
    """

    score: str = "cls"

    name = "prunesid"
    merges = True

    def __post_init__(self) -> None:
        if self.score not in ("cls", "loading"):
            raise DopError(f"`score` must be cls or loading, but got {self.score!r}")

    def needs(self) -> frozenset[str]:
        cls = {"cls_attention", "features", "cls_feature"}
        return super().needs() | (cls if self.score == "cls" else {"embeds"})

    def one_image(self, inputs: SelectorInputs, num_kept: int) -> Selection:
        of_cls, count = self.score == "cls", inputs.num_visual_tokens
        states = inputs.tensor("features" if of_cls else "embeds")
        loadings = principal_loadings(states, max(1 if of_cls else 4, num_kept // 4))
        group = loadings.argmax(axis=1)
        scores = finite_array(inputs.tensor("cls_attention")) if of_cls else loadings.max(axis=1)
        by_score = np.argsort(-scores, kind="stable")
        if not 0 < num_kept < count:
            return Selection(by_score)
        similarity = cosine_matrix(states).double().cpu().numpy()
        cls = int(of_cls and num_kept > 1)
        orders, dissimilar = [], []
        for index in range(loadings.shape[1]):
            tokens = by_score[group[by_score] == index]
            first = suppressed(tokens, similarity, _threshold(similarity, num_kept, of_cls))
            dissimilar.append(len(first))
            orders.append(with_rest(first, tokens))
        sizes = np.array([len(order) for order in orders])
        quota = quotas(sizes, np.array(dissimilar), num_kept, num_kept - cls)
        chosen = np.concatenate([order[:number] for order, number in zip(orders, quota, strict=True)])
        chosen = with_rest(chosen[np.argsort(-scores[chosen], kind="stable")], by_score)[: num_kept - cls]
        if not cls:
            return Selection(with_rest(chosen, by_score))
        slot = np.setdiff1d(np.arange(count), chosen)[:1]
        order = with_rest(np.concatenate([slot, chosen]), by_score)
        return Selection(order, slot, inputs.tensor("cls_feature")[:1].float(), "features")

    def selection_flops(self, sizes: SelectionSizes) -> int:
        """Similarities and the Gram matrix of the principal components, about nine cubes for those, and attention."""
        width = sizes.width if self.score == "cls" else sizes.dims.hidden_size
        asked = cls_flops(sizes) if self.score == "cls" else 0
        return asked + 4 * sizes.num_visual**2 * width + 18 * sizes.num_visual**3


def principal_loadings(states: Tensor, number: int) -> np.ndarray:
    """How much each token loads on the first components: ``[tokens, number]``, never negative.

    Channels are the observations; each token's mean over them is taken off.
    """
    values = torch.sigmoid(states.detach().float()).double()
    values = values - values.mean(dim=1, keepdim=True)
    vectors = torch.linalg.eigh(values @ values.T)[1].flip(-1)
    return np.abs(finite_array(vectors[:, :number]))


def _threshold(similarity: np.ndarray, num_kept: int, of_cls: bool) -> float:
    """Tokens that are more similar than this are redundant; above 1 none is."""
    count = len(similarity)
    if of_cls:
        pairs = similarity[np.triu_indices(count, 1)]
        return num_kept / 32 * float(pairs.mean()) if len(pairs) else 1.0
    return max(18 * num_kept / count, 1.0) * float(np.triu(similarity).mean())


def suppressed(tokens: np.ndarray, similarity: np.ndarray, threshold: float) -> np.ndarray:
    """The first of some tokens, then the next one that is not more similar to a chosen one than the threshold, …"""
    chosen: list[int] = []
    free = np.ones(len(tokens), dtype=np.bool_)
    for place, token in enumerate(tokens):
        if free[place]:
            chosen.append(int(token))
            free &= similarity[token, tokens] <= threshold
    return np.array(chosen, dtype=np.int64)


def quotas(sizes: np.ndarray, dissimilar: np.ndarray, num_kept: int, total: int) -> np.ndarray:
    """How many tokens each group gives.

    Args:
        sizes: tokens of each group.
        dissimilar: how many of them are not redundant.
        num_kept: tokens that are kept of the image.
        total: tokens that the groups give together.
    """
    least = np.minimum(1, sizes)
    most = np.minimum(np.minimum(5 * math.ceil(num_kept / 64), sizes), dissimilar)
    while most.sum() < num_kept:
        most = np.minimum(most + 1, sizes)
    others = max(0, total - int(least.sum()))
    share = np.cumsum((dissimilar / dissimilar.sum()).astype(np.float32), dtype=np.float32)
    quota = np.minimum(np.diff(np.rint(share * np.float32(others)), prepend=0).astype(np.int64) + least, most)
    for group in np.argsort(-dissimilar, kind="stable"):
        quota[group] += min(most[group] - quota[group], others + int(least.sum()) - int(quota.sum()))
    return quota
