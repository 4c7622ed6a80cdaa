"""Packed (padding-free) rows: several sequences in one row, separated by positions that restart.

transformers builds a block-diagonal mask for them where it is given neither a mask nor a cache. A pruned model takes
each sequence as a sample of its own, which is the same and needs no mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import find_packed_sequence_indices

from dop_search.models.decoder_checks import is_flash
from dop_search.utils.errors import DopError


@dataclass(frozen=True)
class Packing:
    """Where the tokens of each sequence stand in the flattened batch.

    Attributes:
        index: ``[sequences, longest]``; pads on the right point anywhere.
        valid: ``[sequences, longest]`` which are no pads.
        shape: batch and length of the packed rows.
    """

    index: Tensor
    valid: Tensor
    shape: tuple[int, int]

    def spread(self, packed: Tensor) -> Tensor:
        """``[batch or 1, length, ...]`` to ``[sequences, longest, ...]``."""
        return packed.expand(self.shape[0], *packed.shape[1:]).flatten(0, 1)[self.index]

    def gather(self, spread: Tensor) -> Tensor:
        """``[sequences, longest, ...]`` back to ``[batch, length, ...]``."""
        index, valid = self.index.to(spread.device), self.valid.to(spread.device)
        flat = spread.new_zeros(self.shape[0] * self.shape[1], *spread.shape[2:])
        return flat.index_copy(0, index[valid], spread[valid]).unflatten(0, self.shape)


@dataclass(frozen=True)
class Tokens:
    """The tokens of one call of the decoder.

    Attributes:
        embeds: ``[batch, length, hidden_size]``.
        input_ids: ``[batch, length]``.
        visual: ``[batch, length]`` which tokens are visual.
        rope: cosine and sine, each ``[batch or 1, length, head_dim]``; empty until they are needed.
        valid: ``[batch, length]`` which tokens are real; ``None``: all.
        read: ``[batch, length]`` whose logits a loss reads; ``None``: no labels.
        whole: ``[batch, length]`` which are parts of images whose tokens see each other; ``None``: none.
    """

    embeds: Tensor
    input_ids: Tensor
    visual: Tensor
    rope: tuple[Tensor, ...] = ()
    valid: Tensor | None = None
    read: Tensor | None = None
    whole: Tensor | None = None

    def unpacked(self, packing: Packing) -> Tokens:
        """Each sequence of packed rows as a sample of its own."""
        return Tokens(
            packing.spread(self.embeds),
            packing.spread(self.input_ids),
            packing.spread(self.visual) & packing.valid,
            tuple(packing.spread(part) for part in self.rope),
            packing.valid,
            None if self.read is None else packing.spread(self.read),
            None if self.whole is None else packing.spread(self.whole) & packing.valid,
        )


def find_packing(
    positions: Tensor | None, shape: tuple[int, int], cached: bool, backend: str, kwargs: Mapping[str, Any]
) -> Packing | None:
    """The sequences of packed rows as transformers finds them; ``None`` if each row is one sequence. DopError if rows
    are packed in a way that would not be respected.

    Args:
        positions: ``[batch or 1, length]`` of a call without an attention mask.
        shape: batch and length.
        cached: whether the call fills a cache, with which transformers takes a row as one sequence.
        backend: name of the attention backend.
        kwargs: further arguments of the decoder, among them the lengths that packing collators make.
    """
    sequence = None
    if positions is not None and shape[1] > 1:  # a row of one token is one sequence: no wait for the device
        sequence = find_packed_sequence_indices(positions.expand(shape))
    if cached and sequence is not None and is_flash(backend):
        raise DopError("packed rows (`position_ids` that restart) fill no cache; pass `use_cache=False`")
    if sequence is None or cached:
        _check_lengths(kwargs, torch.arange(0, shape[0] * shape[1] + 1, shape[1]))
        return None
    batch, length = shape
    number = (sequence + torch.arange(batch, device=sequence.device)[:, None] * length).flatten()
    _, counts = number.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0)
    _check_lengths(kwargs, torch.nn.functional.pad(ends, (1, 0)))
    within = torch.arange(int(counts.max()), device=number.device)
    valid = within < counts[:, None]
    return Packing(((ends - counts)[:, None] + within).where(valid, 0), valid, shape)


def _check_lengths(kwargs: Mapping[str, Any], ends: Tensor) -> None:
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        given = kwargs.get(name)
        if given is not None and given.tolist() != ends.tolist():
            raise DopError(
                f"`{name}` says that sequences end at {given.tolist()[1:]}, but the positions say {ends.tolist()[1:]}; "
                "a pruned model goes by `position_ids` that restart, without `attention_mask` and with "
                "`use_cache=False`"
            )
