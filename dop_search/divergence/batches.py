"""Validation samples in chunks that fit the memory, the full model's hidden states kept where there is room."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, get_args

from dop_search.divergence.chunks import PackedChunk, Place, PrefixKeys
from dop_search.divergence.footprint import Footprint, SampleSize
from dop_search.divergence.memory import (
    GIB,
    Allowance,
    Memory,
    check_memory,
    chunk_tokens,
    cut,
    empty_caches,
    free_bytes,
    host_bytes,
    is_out_of_memory,
    release_all,
)
from dop_search.divergence.teacher import Teacher
from dop_search.models.adapter import ModelAdapter
from dop_search.utils.errors import MemoryLimitError

log = logging.getLogger(__name__)
T = TypeVar("T")


class Batches:
    """Cuts a teacher's samples into chunks, and halves what does not fit after all.

    Arguments are those of ``DivergenceEngine``.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        teacher: Teacher,
        memory: Memory = "auto",
        keep_states: bool = True,
        batch_size: int | None = None,
        keep_prefix: bool = True,
    ) -> None:
        self.adapter, self.teacher, self.memory = adapter, teacher, check_memory(memory)
        self.keep_states, self.batch_size, self.keep_prefix = keep_states, batch_size, keep_prefix
        self.footprint = Footprint.of(adapter)
        self.max_tokens = chunk_tokens(adapter.device.type)
        self.num_failures = 0
        self._sizes = [
            SampleSize.of_prompt(sample.encoded.visual[: sample.encoded.prompt_length], len(sample.answer_ids))
            for sample in teacher.samples
        ]
        self._allowance: Allowance | None = None
        self._kept: dict[tuple[int, ...], PackedChunk] = {}
        self._prefix: PrefixKeys | None = None

    def run(self, indices: Sequence[int], work: Callable[[PackedChunk], T]) -> Iterator[tuple[list[int], T]]:
        """``work`` on chunks of these samples, with the indices of each chunk's samples; MemoryLimitError if not even
        one sample fits."""
        pending = deque(self._cut(indices))
        everything = len(indices) == len(self._sizes)
        if everything:  # chunks of another size, from before memory ran out, are of no use any more
            self._kept = {key: chunk for key, chunk in self._kept.items() if list(key) in pending}
        while pending:
            members = pending[0]
            try:
                chunk = self._chunk(members, everything)
                done = work(chunk)
                chunk.rewind()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                message = str(error).splitlines()[0]
            else:
                yield members, done
                pending.popleft()
                continue
            chunk = None  # type: ignore[assignment]  # what the attempt held must be gone before the next one
            self._make_room(members, message)
            pending = deque(self._cut([member for its in pending for member in its]))

    def _cut(self, indices: Sequence[int]) -> list[list[int]]:
        sizes = [self._sizes[index] for index in indices]
        chunks = cut(sizes, self.footprint, self._allowed().work, self.max_tokens, self.batch_size)
        return [[indices[position] for position in members] for members in chunks]

    def _make_room(self, members: list[int], message: str) -> None:
        """After memory ran out: smaller chunks, and for a single sample nothing that is kept beside it."""
        longest = max(self._sizes[member].length for member in members)
        self._kept.pop(tuple(members), None)
        self._prefix = None
        self.num_failures += 1
        if len(members) > 1:
            self.max_tokens = len(members) * longest // 2
        elif not release_all():
            needed = self.footprint.chunk([self._sizes[members[0]]]) / GIB
            raise MemoryLimitError(
                f"one sample of {longest} tokens does not fit the memory of {self.adapter.device}: it takes about "
                f"{needed:.1f} GiB beside the weights ({message}); load the model in half precision or with "
                "model.quantization, or use smaller images"
            )
        empty_caches(self.adapter.device)
        log.warning("memory ran out with %d samples of up to %d tokens; going on with fewer", len(members), longest)

    def _allowed(self) -> Allowance:
        """Shares of the memory that was free at the first call, so that later calls find the same chunks."""
        if self._allowance is None:
            device = self.adapter.device.type
            free = free_bytes(self.adapter, self.memory)
            self._allowance = Allowance.of(free, device, host_bytes(), self._check_longest(free))
            states = self.footprint.states(sum(size.length for size in self._sizes), self.adapter.dims.num_layers)
            log.info(
                "scoring %d samples in %.2f GiB of %s; the full model's hidden states would take %.2f GiB",
                len(self._sizes), free / GIB, self.adapter.device, states / GIB,
            )  # fmt: skip
        return self._allowance

    def _check_longest(self, free: int) -> int:
        """What the longest sample takes, to be scored or to be answered; MemoryLimitError if that is more than a limit
        allows."""
        longest = max(self._sizes, key=lambda size: (size.length, size.answer))
        needed = max(self.footprint.chunk([size]) for size in set(self._sizes))
        if self.memory != "auto" and needed > free:
            enough = math.ceil(100 * (self.memory + (needed - free) / GIB)) / 100
            raise MemoryLimitError(
                f"memory={self.memory:g} GiB leaves {max(free, 0) / GIB:.2f} GiB beside the weights, but a sample of "
                f"{longest.length} tokens takes {needed / GIB:.2f} GiB; set memory={enough:.2f} or more, or "
                "load the model in half precision or with model.quantization"
            )
        answering = self.footprint.generation(1, longest.length, longest.answer)
        return max(needed, min(answering, free))

    def _chunk(self, members: list[int], everything: bool) -> PackedChunk:
        key = tuple(members)
        if key in self._kept:
            return self._kept[key]
        samples = [self.teacher.samples[member] for member in members]
        place = self._place(sum(self._sizes[member].length for member in members)) if everything else "nowhere"
        chunk = PackedChunk(self.adapter, samples, place, self.keep_prefix, self._prefix)
        self._prefix = chunk.prefix
        if place != "nowhere":
            self._kept[key] = chunk
        return chunk

    def _place(self, num_tokens: int) -> Place:
        """Where there is still room for the hidden states of one more chunk."""
        needed = self.footprint.states(num_tokens, self.adapter.dims.num_layers)
        for place, room in zip(get_args(Place), (self._allowed().keep, self._allowed().host), strict=False):
            taken = sum(chunk.hidden_bytes() for chunk in self._kept.values() if chunk.place == place)
            if self.keep_states and taken + needed <= room:
                return place
        return "nowhere"
