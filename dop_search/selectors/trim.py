"""TRIM: the tokens that are related to the question, and one that stands for all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from dop_search.selectors.base import (
    Selection,
    SelectionSizes,
    Selector,
    SelectorInputs,
    cosine_matrix,
    descending,
    kept_count,
    with_rest,
)
from dop_search.selectors.clip_text import ClipSelector


@dataclass(frozen=True)
class _TrimBase(Selector):
    """The ``T − 1`` tokens with the highest relevance, and the mean of all others as one more token.

    ``space``: of what the mean is taken, the projector's inputs or the decoder's.
    """

    nested = False
    merges = True
    space: ClassVar[Literal["features", "embeds"]] = "embeds"
    mean_token: bool = True

    def relevance(self, inputs: SelectorInputs) -> Tensor:
        """``[n]`` relevance of each token to the text."""
        raise NotImplementedError

    def rank(self, inputs: SelectorInputs, num_kept: int | None = None) -> np.ndarray:
        return self.select(inputs, num_kept).order

    def select(self, inputs: SelectorInputs, num_kept: int | None = None) -> Selection:
        order, total = descending(self.relevance(inputs)), kept_count(inputs, num_kept)
        if not self.mean_token or not 1 < total < inputs.num_visual_tokens:
            return Selection(order)
        kept, dropped = order[: total - 1], np.sort(order[total - 1 :])
        states = inputs.tensor(self.space)
        mean = states[torch.from_numpy(dropped).to(states.device)].float().mean(dim=0, keepdim=True)
        return Selection(with_rest(np.concatenate([kept, dropped[-1:]]), order), dropped[-1:], mean, self.space)

    def selection_flops(self, sizes: SelectionSizes) -> int:
        """One similarity per token and the mean; the text encoder is left out."""
        return 3 * sizes.num_visual * sizes.dims.hidden_size


@dataclass(frozen=True)
class TrimSelector(ClipSelector, _TrimBase):
    """TRIM (arXiv 2409.10994) with a fixed number of tokens.

    Relevance is ``softmax_i(−t · p_i)`` with the pooled text ``t`` (cut at 77 tokens) and the patches ``p_i`` in CLIP's
    shared space, neither normalised (``p_i`` = CLIP's final norm and visual projection of what the projector receives;
    CLIP's patch–text similarity is inverted, hence the sign). The projection of the others' mean stands in the place of
    the last dropped token.

    Options:
        clip: see :class:`ClipSelector`.
        mean_token: whether the mean of the others is one of the ``T`` tokens (from ``T = 2`` on).

    Not reproduced: the paper chooses the number of tokens by an interquartile rule, here it is given; positions are not
    renumbered, the mean token is not the last one; no fine-tuning. The text is what is read after the image, the
    template's closing words included.
    """

    name = "trim"
    stand_in = "trim_llm"
    version = 2
    requires = frozenset({"patch_states", "text", "features"})
    space = "features"

    def relevance(self, inputs: SelectorInputs) -> Tensor:
        encoder = self.encoder()
        text = encoder.beginning(inputs.text or "")
        patches = encoder.project_patches(inputs.tensor("patch_states"))
        return -(patches @ text.T)[:, 0]  # the softmax keeps the order


@dataclass(frozen=True)
class TrimLlmSelector(_TrimBase):
    """TRIM's selection with relevance ``cos(mean of the text embeddings, e_i)`` in the decoder's input space.

    A stand-in of our own for models without CLIP's text encoder, not the paper's method (see :class:`TrimSelector`).

    Options:
        mean_token: whether the mean of the others is one of the ``T`` tokens (from ``T = 2`` on).
    """

    name = "trim_llm"
    requires = frozenset({"embeds", "text_embeds"})

    def relevance(self, inputs: SelectorInputs) -> Tensor:
        text = inputs.tensor("text_embeds").float().mean(dim=0, keepdim=True)
        return cosine_matrix(inputs.tensor("embeds"), text)[:, 0]
