"""CDPruner: a determinantal point process over visual tokens, conditioned on the question."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dop_search.selectors.base import (
    SelectionSizes,
    Selector,
    SelectorInputs,
    check_options,
    cosine_matrix,
    finite_array,
    kept_count,
    mean_cosine,
    with_rest,
)
from dop_search.selectors.clip_text import ClipSelector
from dop_search.selectors.sharing import in_turns, share_of

EXHAUSTED = 1e-10
"""Conditional variance, relative to the largest, below which a kernel has no more directions to offer."""


@dataclass(frozen=True)
class _CdprunerBase(Selector):
    """Greedy MAP of the DPP with kernel ``diag(r) S diag(r)``; subclasses say what relevance is.

    Every image, and every tile of LLaVA-NeXT, is a process of its own, and they take turns.
    """

    theta: float | None = None

    def __post_init__(self) -> None:
        check_options(self.theta is None or 0.0 <= self.theta < 1.0, "`0 <= theta < 1`", theta=self.theta)

    def similarity_to_text(self, inputs: SelectorInputs) -> Tensor:
        """``[n]`` higher for tokens that matter more to the text."""
        raise NotImplementedError

    def rank(self, inputs: SelectorInputs, num_kept: int | None = None) -> np.ndarray:
        to_text, total = finite_array(self.similarity_to_text(inputs)), kept_count(inputs, num_kept)

        def of_one_image(tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
            relevance = normalised(to_text[tokens])
            if self.theta is not None:
                relevance = np.exp(self.theta / (2.0 * (1.0 - self.theta)) * relevance)
            similarity = finite_array(cosine_matrix(inputs.tensor("embeds")[tokens.tolist()]))
            kernel = relevance[:, None] * similarity * relevance[None, :]
            chosen = greedy_map(kernel, share_of(tokens, inputs, total))
            return with_rest(chosen, np.argsort(-relevance, kind="stable"))

        return in_turns(inputs, of_one_image)

    def selection_flops(self, sizes: SelectionSizes) -> int:
        """Cosines with the text and of all pairs, and the incremental Cholesky factor; the text encoder is left out."""
        cosines = 2 * sizes.num_visual * (sizes.num_visual + 1) * sizes.dims.hidden_size
        return cosines + sizes.num_visual * sizes.num_kept**2


@dataclass(frozen=True)
class CdprunerSelector(ClipSelector, _CdprunerBase):
    """CDPruner (arXiv 2506.10967).

    ``S`` is the cosine similarity of the projected tokens. Relevance is ``−mean_k cos(p_i, t_k)`` in CLIP's shared
    space, scaled to [0, 1], with patches ``p_i`` (CLIP's final norm and visual projection of what the projector
    receives) and text pieces ``t_k`` of at most 77 tokens; the sign is the paper's, since CLIP's patch–text similarity
    is inverted. Tokens are taken greedily to maximise ``det`` of the kernel's submatrix (incremental Cholesky factor).

    Options:
        clip: see :class:`ClipSelector`.
        theta: weight of relevance in [0, 1), ``r ← exp(θ / (2 (1 − θ)) · r)``; ``None``: ``r`` as it is (the default of
            the paper's released code).

    Not reproduced: renumbered positions. The text is what is read after the image, the template's closing words
    included.
    """

    name = "cdpruner"
    stand_in = "cdpruner_llm"
    version = 2
    requires = frozenset({"patch_states", "text", "embeds", "tiles"})

    def similarity_to_text(self, inputs: SelectorInputs) -> Tensor:
        encoder = self.encoder()
        patches = encoder.project_patches(inputs.tensor("patch_states"))
        return -mean_cosine(patches, encoder.pieces(inputs.text or ""))


@dataclass(frozen=True)
class CdprunerLlmSelector(_CdprunerBase):
    """CDPruner with relevance from the decoder's embedding space: ``mean_k cos(e_i, t_k)`` over the text's tokens.

    What the paper describes for models without CLIP's text encoder (Qwen2.5-VL, InternVL3; no code was released).

    Options:
        theta: weight of relevance, see :class:`CdprunerSelector`.
        negate: turn the sign round, as CLIP's space needs it.
    """

    negate: bool = False

    name = "cdpruner_llm"
    version = 2
    requires = frozenset({"embeds", "text_embeds", "tiles"})

    def similarity_to_text(self, inputs: SelectorInputs) -> Tensor:
        similarity = mean_cosine(inputs.tensor("embeds"), inputs.tensor("text_embeds"))
        return -similarity if self.negate else similarity


def normalised(values: np.ndarray) -> np.ndarray:
    """Scaled to about (0, 1]; the least relevant token keeps a trace, so that it can still be chosen."""
    span = values.max() - values.min()
    return np.ones_like(values) if span == 0 else (values - values.min() + 1e-6) / span


def greedy_map(kernel: np.ndarray, num_chosen: int) -> np.ndarray:
    """Indices that greedily maximise ``log det kernel[chosen, chosen]``, in the order in which they are taken.

    Stops early when the kernel has no more directions to offer (its rank is reached).
    """
    variance = kernel.diagonal().copy()
    limit = EXHAUSTED * variance.max()
    factor = np.zeros((num_chosen, len(kernel)))
    chosen: list[int] = []
    for step in range(num_chosen):
        best = int(variance.argmax())
        if variance[best] <= limit:
            break
        row = (kernel[best] - factor[:step, best] @ factor[:step]) / np.sqrt(variance[best])
        factor[step] = row
        variance = variance - row**2
        chosen.append(best)
        variance[chosen] = -np.inf
    return np.array(chosen, dtype=np.int64)
