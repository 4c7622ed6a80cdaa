"""VisionZip: the tokens that dominate attention, and the rest merged into a few contextual ones."""

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
    check_options,
    cosine_matrix,
    descending,
    group_sums,
    with_rest,
)
from dop_search.selectors.sharing import PerImageSelector


@dataclass(frozen=True)
class VisionZipSelector(AttentionSelector, PerImageSelector):
    """VisionZip (arXiv 2412.04467), without fine-tuning.

    With ``T`` tokens, ``C = round(contextual_share · T)`` are contextual and ``T − C`` dominant (192 = 162 + 30,
    128 = 108 + 20, 64 = 54 + 10, as published). Dominant: the CLS token and the patches with the highest attention.
    Of the other patches every ``⌊m / C⌋``-th is a target; each of the rest goes to the target with the most similar
    head-mean key (cosine), and a target becomes ``target + mean(assigned)`` in the projector's input. All of it is
    read from the layer that feeds the projector.

    Options:
        contextual_share: share of contextual tokens.
        cls_token: whether the CLS token is among the dominant ones, as in the paper (from ``T = 2`` on). It stands in
            the place of the first dropped token.
        attention: see :class:`AttentionSelector`; ``received`` has no CLS token among the dominant ones, and merges
            behind the projector.

    Every tile of an any-resolution image has its share of the tokens, of patches that are no padding, and its own CLS
    token.

    Not reproduced: the paper's fine-tuned projector; renumbered positions (kept tokens keep theirs); the padding of
    LLaVA-NeXT, of which the released code keeps tokens too.
    """

    contextual_share: float = 10 / 64
    cls_token: bool = True

    name = "visionzip"
    version = 2
    merges = True

    def __post_init__(self) -> None:
        super().__post_init__()
        share = self.contextual_share
        check_options(0.0 <= share < 1.0, "`0 <= contextual_share < 1`", contextual_share=share)

    @property
    def _takes_cls(self) -> bool:
        return self.cls_token and self.by_cls

    def needs(self) -> frozenset[str]:
        return super().needs() | {"keys"} | ({"cls_feature"} if self._takes_cls else set())

    def split(self, num_kept: int) -> tuple[int, int]:
        """Dominant (the CLS token included) and contextual tokens among ``num_kept``."""
        contextual = int(self.contextual_share * num_kept + 0.5)
        return num_kept - contextual, contextual

    def one_image(self, inputs: SelectorInputs, num_kept: int) -> Selection:
        by_attention = descending(self.scores(inputs))
        count = inputs.num_visual_tokens
        if not 0 < num_kept < count:
            return Selection(by_attention)
        dominant, contextual = self.split(num_kept)
        cls = int(self._takes_cls and dominant > 0 and num_kept > 1)
        chosen = by_attention[: dominant - cls]
        rest = np.setdiff1d(np.arange(count), chosen)
        targets, merged = merge_into_targets(inputs.tensor(self.space), inputs.tensor("keys"), rest, contextual)
        slots, features = [targets], [merged]
        if cls:
            free = np.setdiff1d(rest, targets)[:1]
            chosen = np.concatenate([free, chosen])
            slots.append(free)
            features.append(inputs.tensor("cls_feature")[:1].float())
        order = with_rest(np.concatenate([chosen, targets]), by_attention)
        return Selection(order, np.concatenate(slots), torch.cat(features), self.space)

    def selection_flops(self, sizes: SelectionSizes) -> int:
        """Attention, keys once more, similarities of the rest with the targets, and the means."""
        _, contextual = self.split(sizes.num_kept)
        similarities = 2 * sizes.num_visual * contextual * sizes.dims.head_dim
        means = sizes.num_visual * self.states_width(sizes)
        return self.attention_flops(sizes) + keys_flops(sizes) + similarities + means


def merge_into_targets(features: Tensor, keys: Tensor, rest: np.ndarray, count: int) -> tuple[np.ndarray, Tensor]:
    """Merge the tokens ``rest`` into ``count`` evenly strided ones among them.

    Returns the target tokens, and ``[count, width]`` float32 features ``target + mean(assigned)``.
    """
    if count == 0:
        return np.empty(0, dtype=np.int64), features.new_empty(0, features.shape[1], dtype=torch.float32)
    step = max(1, len(rest) // count)
    at = np.arange(0, len(rest), step)[:count]
    targets, others = rest[at], np.delete(rest, at)
    rows = features.float()
    index = torch.from_numpy(targets).to(rows.device)
    result = rows[index]
    if len(others) == 0:
        return targets, result
    other_index = torch.from_numpy(others).to(rows.device)
    nearest = cosine_matrix(keys[other_index], keys[index]).argmax(dim=1)
    number = nearest.bincount(minlength=count)[:, None]
    return targets, result + group_sums(rows[other_index], nearest, count) / number.clamp_min(1)
