"""One timed ``generate()``: vision tower, prefill, each decoded token, end to end, memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from dop_search.models.adapter import ModelAdapter
from dop_search.pruning.ranking import selection_span
from dop_search.utils.errors import DopError

Clock = Literal["wall", "cpu"]
OnProgress = Callable[[int, int, str], None]
T = TypeVar("T")


def now_ms(device: torch.device, clock: Clock = "wall") -> float:
    """Milliseconds on a clock, once everything that was launched on ``device`` is done.

    ``cpu`` counts what this process computed, on all of its threads: on a machine that other processes use too, with
    one thread, it is the wall clock without their share.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000.0 * (time.perf_counter() if clock == "wall" else time.process_time())


@dataclass
class PrefillTimer:
    """Sees the decoder's calls: when the first one began and ended, and what it left in the cache."""

    device: torch.device
    clock: Clock = "wall"
    kv_bytes: int | None = None
    _entered: float = 0.0
    _entries: int = 0
    _first_call: tuple[float, float] | None = None

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of the decoder."""
        self._entries += 1
        if self._entries == 1:
            self._entered = now_ms(self.device, self.clock)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook of the decoder."""
        if self._first_call is None:
            self._first_call = (self._entered, now_ms(self.device, self.clock))
            self.kv_bytes = cache_bytes(getattr(output, "past_key_values", None))

    @property
    def first_call(self) -> tuple[float, float]:
        """When the first call began and ended, in milliseconds; DopError if the decoder was not called."""
        if self._first_call is None:
            raise DopError("the decoder did not run while it was timed; time a forward of the model itself")
        return self._first_call

    @property
    def ms(self) -> float:
        """Milliseconds of the first call."""
        return self.first_call[1] - self.first_call[0]


@contextmanager
def prefill_timer(adapter: ModelAdapter, clock: Clock = "wall") -> Iterator[PrefillTimer]:
    """Time the decoder's first call inside the context; index work of a pruned decoder is part of it."""
    timer = PrefillTimer(adapter.device, clock)
    handles = [
        adapter.text_model.register_forward_pre_hook(timer.enter, with_kwargs=True, prepend=True),
        adapter.text_model.register_forward_hook(timer.leave, with_kwargs=True),
    ]
    try:
        yield timer
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def selection_timer(device: torch.device, clock: Clock = "wall") -> Iterator[list[float]]:
    """Milliseconds of each call inside the context that ranks or merges visual tokens before the decoder."""
    spent: list[float] = []

    @contextmanager
    def timed() -> Iterator[None]:
        start = now_ms(device, clock)
        yield
        spent.append(now_ms(device, clock) - start)

    with selection_span(timed):
        yield spent


class _TokenClock(StoppingCriteria):
    """Never stops; notes when each new token was there."""

    def __init__(self, device: torch.device, clock: Clock) -> None:
        self.device, self.clock = device, clock
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.times.append(now_ms(self.device, self.clock))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@dataclass(frozen=True)
class Reading:
    """One timed generation. All times in milliseconds, the device's queue drained at both ends.

    Attributes:
        vision_ms: from the call to the decoder's start: vision tower, projector, embeddings.
        prefill_ms: the decoder's first call.
        decode_ms: per token after the first, median over the tokens; ``None`` if there was only one.
        first_token_ms: from the call to the first token.
        end_to_end_ms: from the call to the last token.
        peak_bytes: most device memory in use; ``None`` on a CPU.
        kv_bytes: keys and values in the cache after prefill.
    """

    vision_ms: float
    prefill_ms: float
    decode_ms: float | None
    first_token_ms: float
    end_to_end_ms: float
    peak_bytes: int | None
    kv_bytes: int | None


def read_generation(
    model: PreTrainedModel, adapter: ModelAdapter, inputs: dict[str, Tensor], num_tokens: int, clock: Clock = "wall"
) -> Reading:
    """Generate ``num_tokens`` greedily and time it."""
    device = adapter.device
    tokens = _TokenClock(device, clock)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    generate: Any = model.generate
    with prefill_timer(adapter, clock) as timer, torch.inference_mode():
        start = now_ms(device, clock)
        generate(
            **inputs,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([tokens]),
        )
    steps = [after - before for before, after in pairwise(tokens.times)]
    return Reading(
        vision_ms=timer.first_call[0] - start,
        prefill_ms=timer.ms,
        decode_ms=sorted(steps)[len(steps) // 2] if steps else None,
        first_token_ms=tokens.times[0] - start,
        end_to_end_ms=tokens.times[-1] - start,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        kv_bytes=timer.kv_bytes,
    )


def read_prefill(
    model: Callable[..., Any], adapter: ModelAdapter, inputs: dict[str, Tensor], clock: Clock = "wall"
) -> float:
    """Milliseconds of the decoder in one forward of ``model`` with a cache and the last token's logits."""
    with prefill_timer(adapter, clock) as timer, torch.inference_mode():
        model(**inputs, use_cache=True, logits_to_keep=1)
    return timer.ms


def cache_bytes(cache: Any) -> int | None:
    """Bytes of all keys and values, and of the states of recurrent layers, of a transformers cache."""
    layers = getattr(cache, "layers", None)
    return None if layers is None else sum(int(part.nbytes) for layer in layers for part in _held(layer))


def _held(layer: Any) -> Iterator[Any]:
    if hasattr(layer, "recurrent_states"):
        yield from (
            part for its in (layer.conv_states, layer.recurrent_states) for part in its.values() if part is not None
        )
    else:
        yield from (layer.keys, layer.values)


def interleaved(
    measure: Callable[[int, list[T]], T | None],
    names: Sequence[str],
    *,
    rounds: int,
    warmup: int = 0,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> list[list[T]]:
    """Each thing once a round, in another order every round; ``warmup``: rounds before that which do not count.

    ``measure`` is called with the number of a thing and its measurements so far; ``None``: there are enough.
    """
    order = np.random.default_rng(seed)
    readings: list[list[T]] = [[] for _ in names]
    done, total = 0, (rounds + warmup) * len(names)
    for step in range(rounds + warmup):
        for index in order.permutation(len(names)):
            reading = measure(index, readings[index])
            if reading is not None and step >= warmup:
                readings[index].append(reading)
            done += 1
            if on_progress is not None:
                on_progress(done, total, names[index])
    return readings
