"""The key/value cache of a pruned model: its layers hold different tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from dop_search.pruning.recurrent import State
from dop_search.utils.errors import DopError

FOREIGN = (
    "this cache was filled by a pruned model, so that its layers hold different tokens; continue it inside "
    "`with pruned(model, strategy):`"
)


@dataclass
class CacheState:
    """What a pruned cache holds.

    Attributes:
        valid: per layer ``[batch, length]``, which cached keys are real; ``None`` where all are.
        lengths: cached keys per layer.
        num_seen: tokens that were fed so far, skipped ones and pads included; positions continue from here.
        real: ``[batch, num_seen]``, which of them are real; ``None`` where all are.
        open: whether a pruned model is running on the cache right now.
        places: per layer ``[batch, length]``, where cached keys stand among the tokens that were fed; only of layers
            with a window, which goes by them. Their keys all stay: those out of the window are masked.
    """

    valid: list[Tensor | None]
    lengths: list[int]
    num_seen: int
    real: Tensor | None = None
    open: bool = False
    places: dict[int, Tensor] = field(default_factory=dict)

    def new_tokens(self, attention_mask: Tensor | None, length: int, grown: bool = False) -> Tensor | None:
        """Which of ``length`` new tokens are real (``[batch, length]``), by a mask of all tokens; ``None``: all are.
        DopError if the mask says another thing about the earlier tokens than it did when they were fed.

        ``grown``: the mask is the one of the call before with ones after it, which need no wait for the device.
        """
        if attention_mask is None:
            return None
        if attention_mask.shape[1] != self.num_seen + length:
            raise DopError(
                f"`attention_mask` must cover the {self.num_seen} tokens in the cache and the {length} new ones, but "
                f"covers {attention_mask.shape[1]}"
            )
        if grown:
            return None
        mask = attention_mask.bool()
        earlier, new = mask[:, : self.num_seen], mask[:, self.num_seen :]
        same = earlier.all() if self.real is None else (earlier == self.real).all()
        is_same, is_full = torch.stack([same, new.all()]).tolist()  # one wait for the device
        if not is_same:
            raise DopError(
                "`attention_mask` hides or shows other tokens in the cache than when they were fed, but a pruned cache "
                "holds what was kept under that mask; keep the mask, or start again from an empty cache"
            )
        return None if is_full else new

    def add_tokens(self, new: Tensor | None, batch: int, length: int, device: torch.device) -> None:
        """Count tokens that were fed; ``new`` as :meth:`new_tokens` returns it."""
        if self.real is not None or new is not None:
            self.real = append_valid(self.real, self.num_seen, new, batch, length, device)
        self.num_seen += length


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
        """Add keys and values; DopError if the model that adds them is not pruned."""
        if not self.state.open:
            raise DopError(FOREIGN)
        return super().update(*args, **kwargs)

    def state_of(self, layer_idx: int) -> State | None:
        """The state of a recurrent layer; ``None``: it has seen nothing."""
        layer: Any = self.layers[layer_idx]
        if not layer.has_previous_state[0]:
            return None
        window, matrices = layer.conv_states[0], layer.recurrent_states[0]
        return window, window.new_zeros(len(window), 0) if matrices is None else matrices

    def keep_state(self, layer_idx: int, state: State) -> None:
        """Take the state of a recurrent layer, in the form that transformers gives it."""
        layer: Any = self.layers[layer_idx]
        if not layer.is_conv_states_initialized[0]:
            layer.lazy_initialization(conv_states=state[0])
            if state[1].numel():
                layer.lazy_initialization(recurrent_states=state[1])
        layer.conv_states[0] = state[0]
        if state[1].numel():
            layer.recurrent_states[0] = state[1]
        layer.has_previous_state[0] = True

    def get_conv_state(self, *args: Any, **kwargs: Any) -> Any:
        """Not for models that are not pruned, whose recurrent layers ask for it (always a ``DopError``)."""
        raise DopError(FOREIGN)

    update_conv_state = get_conv_state

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.state = CacheState([None] * len(self.state.valid), [0] * len(self.state.lengths), 0)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Not possible (always a ``DopError``)."""
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
        self._each_mask(lambda mask: mask.repeat_interleave(repeats, dim=0))

    def _index_batch(self, indices: Tensor) -> None:
        self._each_mask(lambda mask: mask.index_select(0, indices.to(mask.device)))

    def _each_mask(self, change: Callable[[Tensor], Tensor]) -> None:
        state = self.state
        changed = {id(valid): change(valid) for valid in state.valid if valid is not None}  # layers share them
        state.valid = [None if valid is None else changed[id(valid)] for valid in state.valid]
        state.real = None if state.real is None else change(state.real)
        state.places = {index: change(places) for index, places in state.places.items()}


def open_state(
    cache: Cache | None, windows: Sequence[int | None], taps: Sequence[int], attention_mask: Tensor | None
) -> CacheState:
    """The state of a cache that a pruned model is about to extend; a fresh or unpruned cache becomes a pruned one.
    DopError if it is no dynamic cache, or was changed from outside.

    ``windows``: of each layer; ``None``: it sees everything. ``taps``: 0 of a layer that attends. Recurrent layers hold
    no keys, and a state that is none of the tokens'.
    """
    num_layers = len(windows)
    if cache is None:
        return CacheState([None] * num_layers, [0] * num_layers, 0)
    if type(cache) not in (DynamicCache, PrunedCache):
        raise DopError(
            f"a pruned model needs a DynamicCache, because its layers hold different numbers of tokens, "
            f"but got {type(cache).__name__}; leave `cache_implementation` unset"
        )
    layers: Any = cache.layers
    past = cache.get_seq_length()
    layers[:] = [kept_whole(layer) for layer in layers]
    if any(taps) and len(layers) < num_layers:
        raise DopError("a model with recurrent layers needs `DynamicCache(config=model.config)`, which knows them")
    held = [
        layers[index].get_seq_length() if index < len(layers) and not taps[index] else 0 for index in range(num_layers)
    ]
    if not isinstance(cache, PrunedCache):
        # filled by the unpruned model: every layer holds every token, or the last ones that its window reaches
        valid = None
        if past and attention_mask is not None and not bool(attention_mask[:, :past].all()):
            valid = attention_mask[:, :past].bool()
        masks = [None if valid is None or not length else valid[:, past - length :] for length in held]
        cache.__class__ = PrunedCache
        cache.state = CacheState(masks, held, past, valid)  # type: ignore[attr-defined]
        for index, window in enumerate(windows):
            if past and window is not None:
                keys = layers[index].keys
                place = torch.arange(past - held[index], past, device=keys.device)
                cache.state.places[index] = place.repeat(len(keys), 1)  # type: ignore[attr-defined]
    assert isinstance(cache, PrunedCache)
    if cache.state.lengths != held:
        raise DopError(
            f"the cache holds {held} tokens per layer, but the pruned model left {cache.state.lengths} in it; "
            "a pruned cache can only be continued by pruned models"
        )
    return cache.state


def kept_whole(layer: Any) -> Any:
    """A cache layer that keeps what it is given: a sliding one counts keys, which is no window where tokens left."""
    if type(layer) is not DynamicSlidingWindowLayer:
        return layer
    whole = DynamicLayer()
    if layer.keys is not None and layer.values is not None:
        whole.lazy_initialization(layer.keys, layer.values)
        whole.keys, whole.values = layer.keys, layer.values
    return whole


def append_valid(
    past: Tensor | None, past_length: int, new: Tensor | None, batch: int, length: int, device: torch.device
) -> Tensor:
    """Which keys are real after ``length`` more: ``[batch, past_length + length]``; ``None`` stands for all."""
    if past is None:
        past = torch.ones(batch, past_length, dtype=torch.bool, device=device)
    if new is None:
        new = torch.ones(batch, length, dtype=torch.bool, device=device)
    return torch.cat([past, new], dim=1)
