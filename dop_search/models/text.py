"""Decoders without a vision tower: a passage between ``<context>`` and ``</context>`` for visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dop_search.models.adapter import ModelAdapter
from dop_search.models.capture import refuse
from dop_search.models.tower import Grids
from dop_search.utils.errors import UnsupportedModelError

MARKERS_KEY = "context_markers"
"""Key of a model's configuration: the ids of the opening and of the closing marker."""


class TextAdapter(ModelAdapter):
    """``LlamaForCausalLM`` and what is built as it is: text alone.

    Operations are skipped for the tokens of the passages that the prompt marks as its context; the question, the chat
    template and the markers themselves are text, which is never pruned. An extension of the paper.
    """

    has_tower: ClassVar[bool] = False
    input_fields: ClassVar[frozenset[str]] = frozenset({"received_attention"})

    @property
    def text_model(self) -> Any:
        """See base class: the same module as :attr:`multimodal`."""
        return self.model.model

    @property
    def markers(self) -> tuple[list[int], list[int]]:
        """Ids of the opening and of the closing marker; UnsupportedModelError if the model was not loaded by
        ``dop.load``, which notes them in its configuration."""
        found = getattr(self.model.config, MARKERS_KEY, None)
        if found is None:
            raise UnsupportedModelError(
                f"which tokens of a prompt are its context, {type(self.model).__name__} cannot tell: load it by "
                f"dop.load(...), or set model.config.{MARKERS_KEY} to the token ids of '<context>' and '</context>'"
            )
        opening, closing = found
        return list(opening), list(closing)

    def check_decoder(self) -> None:
        """See base class; and whether the model knows its markers."""
        _ = self.markers
        super().check_decoder()

    @property
    def visual_token_ids(self) -> tuple[int, ...]:
        """See base class: the ids of the markers, by which contexts are known in embeddings."""
        opening, closing = self.markers
        return tuple(dict.fromkeys([*opening, *closing]))

    def visual_token_mask(self, input_ids: Tensor) -> Tensor:
        """See base class: which tokens stand between an opening marker and the next closing one."""
        return context_mask(input_ids, *self.markers)

    def image_grids(self, num_visual: Sequence[int]) -> list[tuple[Grids, ...]]:
        """See base class: the context tokens of a sample in one row."""
        return [(((1, count),),) if count else () for count in num_visual]

    @property
    def vision_tower(self) -> Any:
        """See base class: there is none; selectors that ask are refused before."""
        raise refuse("what a vision tower computes", f"{type(self.model).__name__} reads text alone")

    @property
    def tower_width(self) -> int:
        """See base class: what selectors look at has the decoder's own width."""
        return int(self.text_config.hidden_size)


def context_mask(input_ids: Tensor, opening: Sequence[int], closing: Sequence[int]) -> Tensor:
    """Which of ``[..., length]`` tokens stand between an opening marker and the next closing one; no marker does.

    An opening marker within a context is a part of it, and one that nothing closes opens nothing. No marker may begin
    with what the other ends with.
    """
    places = torch.arange(input_ids.shape[-1], device=input_ids.device).expand(input_ids.shape)
    nowhere = torch.full_like(places, -1)
    closes = _starts(input_ids, closing)
    opens = _starts(input_ids, opening).roll(len(opening) - 1, dims=-1)  # a marker that fits never wraps around
    opened = torch.where(opens, places, nowhere).cummax(dim=-1).values
    closed = torch.where(closes, places, nowhere).cummax(dim=-1).values
    open_here, closes_later = opened > closed, closes.flip(-1).cumsum(dim=-1).flip(-1) > 0
    open_before = torch.nn.functional.pad(open_here, (1, 0))[..., :-1]
    return open_here & (open_before | ~opens) & closes_later


def _starts(input_ids: Tensor, marker: Sequence[int]) -> Tensor:
    """Where a sequence of ids begins."""
    found = torch.zeros_like(input_ids, dtype=torch.bool)
    if input_ids.shape[-1] >= len(marker):
        windows = input_ids.unfold(-1, len(marker), 1)
        same = (windows == torch.tensor(list(marker), device=input_ids.device)).all(dim=-1)
        found[..., : same.shape[-1]] = same
    return found
