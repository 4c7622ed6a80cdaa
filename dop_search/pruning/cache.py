"""The key/value cache of a pruned model: its layers hold different tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from dop_search.utils.errors import DopError


@dataclass
class CacheState:
    """What a pruned cache holds.

    Attributes:
        valid: per layer ``[batch, length]``, which cached keys are real; ``None`` where all are.
        lengths: cached keys per layer.
        num_seen: tokens that were fed so far, skipped ones and pads included; positions continue from here.
        open: whether a pruned model is running on the cache right now.
    """

    valid: list[Tensor | None]
    lengths: list[int]
    num_seen: int
    open: bool = False


class PrunedCache(DynamicCache):
    """A ``DynamicCache`` that a pruned model has filled.

    ``get_seq_length()`` is the number of tokens that were fed, whatever the layers kept of them: that is what
    ``generate()`` goes by when a conversation continues. Only pruned models can add to it.
    """

    state: CacheState

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens fed so far."""
        return self.state.num_seen

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values.

        Raises:
            DopError: if the model that adds them is not pruned.
        """
        if not self.state.open:
            raise DopError(
                "this cache was filled by a pruned model, so that its layers hold different tokens; "
                "continue it inside `with pruned(model, strategy):`"
            )
        return super().update(*args, **kwargs)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.state = CacheState([None] * len(self.state.valid), [0] * len(self.state.lengths), 0)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Not possible.

        Raises:
            DopError: always.
        """
        raise DopError(
            "a pruned cache cannot be cropped, because its layers hold different tokens; "
            "assisted decoding and prompt lookup are not available on a pruned model"
        )

    def reorder_cache(self, beam_idx: Any) -> None:
        """Reorder the batch."""
        super().reorder_cache(beam_idx)
        self._index_batch(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples of the batch."""
        super().batch_select_indices(indices)
        self._index_batch(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        super().batch_repeat_interleave(repeats)
        state = self.state
        state.valid = [None if valid is None else valid.repeat_interleave(repeats, dim=0) for valid in state.valid]

    def _index_batch(self, indices: Tensor) -> None:
        state = self.state
        state.valid = [None if v is None else v.index_select(0, indices.to(v.device)) for v in state.valid]


def open_state(cache: Cache | None, num_layers: int, attention_mask: Tensor | None) -> CacheState:
    """The state of a cache that a pruned model is about to extend; a fresh or unpruned cache becomes a pruned one.

    Raises:
        DopError: if it is no dynamic cache, or was changed from outside.
    """
    if cache is None:
        return CacheState([None] * num_layers, [0] * num_layers, 0)
    if type(cache) not in (DynamicCache, PrunedCache):
        raise DopError(
            f"a pruned model needs a DynamicCache, because its layers hold different numbers of tokens, "
            f"but got {type(cache).__name__}; leave `cache_implementation` unset"
        )
    layers: Any = cache.layers
    held = [layers[index].get_seq_length() if index < len(layers) else 0 for index in range(num_layers)]
    if not isinstance(cache, PrunedCache):
        past = held[0]  # filled by the unpruned model: every layer holds every token
        valid = None
        if past and attention_mask is not None and not bool(attention_mask[:, :past].all()):
            valid = attention_mask[:, :past].bool()
        cache.__class__ = PrunedCache
        cache.state = CacheState([valid] * num_layers, held, past)  # type: ignore[attr-defined]
    assert isinstance(cache, PrunedCache)
    if cache.state.lengths != held:
        raise DopError(
            f"the cache holds {held} tokens per layer, but the pruned model left {cache.state.lengths} in it; "
            "a pruned cache can only be continued by pruned models"
        )
    return cache.state


def append_valid(
    past: Tensor | None, past_length: int, new: Tensor | None, batch: int, length: int, device: torch.device
) -> Tensor:
    """Which keys are real after ``length`` more: ``[batch, past_length + length]``; ``None`` stands for all."""
    if past is None:
        past = torch.ones(batch, past_length, dtype=torch.bool, device=device)
    if new is None:
        new = torch.ones(batch, length, dtype=torch.bool, device=device)
    return torch.cat([past, new], dim=1)
