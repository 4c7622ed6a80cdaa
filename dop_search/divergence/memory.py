"""How much memory there is, how samples are cut into chunks for it, and what to do when it was too little."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from dop_search.divergence.footprint import Footprint, SampleSize
from dop_search.models.adapter import ModelAdapter
from dop_search.models.quantization import stored_bytes
from dop_search.utils.errors import ConfigError

Memory = Literal["auto"] | float
"""Device memory for a search in GiB, weights included; ``auto``: most of what is free."""

GIB = 2**30
CPU_SHARE, ACCELERATOR_SHARE = 0.5, 0.9
"""Of free memory that ``auto`` takes."""
RESERVED_BYTES = 3 * GIB // 4
"""Of a limit on an accelerator: the driver's context, and what the allocator loses between blocks."""
WORK_SHARE = 0.45
"""Of what is free for chunks; the rest is for hidden states that are kept."""
HOST_SHARE = 0.5
"""Of free host memory for hidden states that do not fit the device."""
CPU_CHUNK_TOKENS, ACCELERATOR_CHUNK_TOKENS = 1536, 65536
"""Tokens that are computed together: what fits the caches of a CPU, what fills an accelerator."""


def check_memory(memory: Any) -> Memory:
    """``memory`` as it is configured; ConfigError if it is neither ``auto`` nor a positive number."""
    if memory == "auto":
        return "auto"
    if isinstance(memory, bool) or not isinstance(memory, (int, float)) or not memory > 0:
        raise ConfigError(f"`memory` must be auto or a number of GiB above 0, but got {memory!r}")
    return float(memory)


# -- what there is --------------------------------------------------------------------------------


class Holder(Protocol):
    """Something that keeps hidden states on a device for later calls."""

    reserved_bytes: int

    def release(self) -> None:
        """Give them up; they are computed again when they are needed."""


_holders: weakref.WeakSet[Any] = weakref.WeakSet()


def hold(holder: Holder) -> None:
    """Count what ``holder`` keeps, until it is gone."""
    _holders.add(holder)


def release_all() -> bool:
    """Give up all hidden states that are kept; whether there were any."""
    holders = [holder for holder in _holders if holder.reserved_bytes]
    for holder in holders:
        holder.release()
    return bool(holders)


_told: weakref.WeakSet[Any] = weakref.WeakSet()


def count_told(sample: Any) -> None:
    """Count ``nbytes`` of what the full model said about a sample, in host memory, until it is gone."""
    _told.add(sample)


def told_bytes() -> int:
    """Host memory that all answers and embeddings take."""
    return sum(sample.nbytes for sample in _told)


def free_bytes(adapter: ModelAdapter, memory: Memory) -> int:
    """What may be filled beside what is there, on the fullest device: weights, hidden states that are kept, and on a
    CPU what the full model said."""
    return min(_free_on(device, adapter.model, memory) for device in adapter.devices)


def _free_on(device: torch.device, model: nn.Module, memory: Memory) -> int:
    if memory == "auto":
        return int(available_bytes(device) * (CPU_SHARE if device.type == "cpu" else ACCELERATOR_SHARE))
    held = sum(holder.reserved_bytes for holder in _holders) + (told_bytes() if device.type == "cpu" else 0)
    return limit_bytes(memory, device.type) - weight_bytes(model, device) - held


def limit_bytes(memory: float, device_type: str) -> int:
    """What of ``memory`` GiB tensors can fill."""
    return int(memory * GIB) - (0 if device_type == "cpu" else RESERVED_BYTES)


def weight_bytes(model: nn.Module, device: torch.device | None = None) -> int:
    """Parameters and buffers (on ``device``), each counted once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(stored_bytes(tensor) for tensor in tensors.values() if device is None or tensor.device == device)


def available_bytes(device: torch.device) -> int:
    """Free memory of a device: the allocator's unused blocks included; of the host where it has none of its own."""
    module: Any = getattr(torch, device.type, None)
    if device.type == "cpu" or not hasattr(module, "mem_get_info"):
        return host_bytes()
    unused = module.memory_reserved(device) - module.memory_allocated(device)
    return int(module.mem_get_info(device)[0] + unused)


def host_bytes() -> int:
    """Memory of this machine that can be had without swapping, within the limit of its control group."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # no Linux: half of what is built in
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    limit, used, stat = group / "memory.max", group / "memory.current", group / "memory.stat"
    if all(path.exists() for path in (limit, used, stat)) and limit.read_text().strip() != "max":
        counts = dict(line.split() for line in stat.read_text().splitlines())
        cached = int(counts["active_file"]) + int(counts["inactive_file"])  # given back when others need it
        available = min(available, int(limit.read_text()) - int(used.read_text()) + cached)
    return max(available, 0)


# -- how it is cut --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Allowance:
    """Bytes on the device for computing a chunk and for keeping hidden states, and on the host for keeping them."""

    work: int
    keep: int
    host: int

    @classmethod
    def of(cls, free: int, device_type: str, host: int, least: int) -> Allowance:
        """Shares of what is free; ``least``: what one sample takes, whatever else is there."""
        work = max(least, int(free * WORK_SHARE))
        return cls(work, max(0, free - work), 0 if device_type == "cpu" else max(0, int(host * HOST_SHARE)))


def cut(
    sizes: Sequence[SampleSize], footprint: Footprint, work_bytes: int, max_tokens: int, max_samples: int | None = None
) -> list[list[int]]:
    """Indices in chunks of similar length, each within the bytes and tokens given; one sample at least."""
    order = sorted(range(len(sizes)), key=lambda index: (sizes[index].length, index))
    chunks: list[list[int]] = []
    for index in order:
        if chunks:
            members = [*chunks[-1], index]
            its = [sizes[member] for member in members]
            fits = len(its) * its[-1].length <= max_tokens and (max_samples is None or len(its) <= max_samples)
            if fits and footprint.chunk(its) <= work_bytes:
                chunks[-1].append(index)
                continue
        chunks.append([index])
    return chunks


def chunk_tokens(device_type: str) -> int:
    """Tokens that are computed together if memory does not forbid it."""
    return CPU_CHUNK_TOKENS if device_type == "cpu" else ACCELERATOR_CHUNK_TOKENS


# -- when it was too little -----------------------------------------------------------------------

_SIGNS = ("out of memory", "allocate memory", "not enough memory", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def empty_caches(device: torch.device) -> None:
    """Return the allocator's unused blocks, so that larger ones can be had."""
    module: Any = getattr(torch, device.type, None)
    if device.type != "cpu" and hasattr(module, "empty_cache"):
        module.empty_cache()


# -- moving ---------------------------------------------------------------------------------------


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, pinned where it comes from a GPU; nothing is copied that is there already."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)
