"""How much memory there is, what scoring takes of it, and what to do when it was too little."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dop_search.models.adapter import ModelAdapter
from dop_search.models.quantization import stored_bytes
from dop_search.strategy.operations import ModelDims
from dop_search.utils.errors import ConfigError

Memory = Literal["auto"] | float
"""Device memory for a search in GiB, weights included; ``auto``: most of what is free."""

GIB = 2**30
AUTO_SHARE = {"cpu": 0.5}
"""Of free memory that ``auto`` takes; :data:`ACCELERATOR_SHARE` of an accelerator's."""
ACCELERATOR_SHARE = 0.9
RESERVED_BYTES = 3 * GIB // 4
"""Of a limit on an accelerator: the driver's context, and what the allocator loses between blocks."""
WORK_SHARE = 0.45
"""Of what is free for chunks; the rest is for hidden states that are kept."""
HOST_SHARE = 0.5
"""Of free host memory for hidden states that do not fit the device."""
CHUNK_TOKENS = {"cpu": 1536}
"""Tokens that are computed together: what fits the caches of a CPU, what fills an accelerator."""
ACCELERATOR_CHUNK_TOKENS = 65536
TOWER_LAYER = 12
"""Activations of a layer of a vision tower, in its widths: input, norm, MLP of four widths before and after its
non-linearity, and what is left of attention."""
TOGETHER = 64
"""Strategies that are walked together; ``log2`` of it is how many states wait at most, see ``walk``."""
WAITING_STATES = TOGETHER.bit_length() - 1


def check_memory(memory: Any) -> Memory:
    """``memory`` as it is configured.

    Raises:
        ConfigError: if it is neither ``auto`` nor a positive number.
    """
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
        return int(available_bytes(device) * AUTO_SHARE.get(device.type, ACCELERATOR_SHARE))
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


# -- what scoring takes ---------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleSize:
    """Tokens of one sample: text before the first image, text after it (with the answer), visual, and read ones."""

    prefix: int
    text: int
    visual: int
    answer: int

    @classmethod
    def of_prompt(cls, visual: Tensor, answer: int) -> SampleSize:
        """Of a prompt with visual tokens at ``visual`` (``[length]`` boolean) and an answer, the last token of which is
        not fed."""
        count, prefix = int(visual.sum()), min(int(visual.int().argmax()), len(visual) - 1)
        return cls(prefix, len(visual) - count - prefix + answer - 1, count, answer)

    @property
    def length(self) -> int:
        """Tokens in the decoder."""
        return self.prefix + self.text + self.visual


class Rows(NamedTuple):
    """Tokens of each sample that are in a layer's input, query, offer keys and go through the MLP."""

    present: Sequence[int]
    query: Sequence[int]
    keys: Sequence[int]
    mlp: Sequence[int]

    @classmethod
    def all(cls, lengths: Sequence[int]) -> Rows:
        """Every token does everything."""
        return cls(lengths, lengths, lengths, lengths)


@dataclass(frozen=True)
class Footprint:
    """What the decoder's activations take, in bytes.

    Attributes:
        dims: sizes of the decoder.
        element: bytes of an activation.
        eager: whether attention scores are written out, as the ``eager`` backend does.
        masks: whether prompts after a shared prefix need a mask, as everywhere but on a GPU.
        unpacked: the largest weight that is unpacked to be multiplied, with quantised weights.
        deepstack: layers after which vision features are added.
        sighted: whether every layer needs a mask, see :attr:`ModelAdapter.has_sight`.
    """

    dims: ModelDims
    element: int
    eager: bool = False
    masks: bool = False
    unpacked: int = 0
    deepstack: int = 0
    sighted: bool = False

    @classmethod
    def of(cls, adapter: ModelAdapter) -> Footprint:
        """Of a loaded model."""
        dims, element = adapter.dims, adapter.model.dtype.itemsize
        packed = any(stored_bytes(part) < part.numel() * element for part in adapter.layers[0].parameters())
        vision = getattr(adapter.model.config, "vision_config", None)
        return cls(
            dims,
            element,
            eager=adapter.text_config._attn_implementation == "eager",
            masks=adapter.device.type != "cuda",
            unpacked=cls.largest_weight(dims, element) if packed else 0,
            deepstack=len(getattr(vision, "deepstack_visual_indexes", None) or ()) if adapter.has_deepstack else 0,
            sighted=adapter.has_sight,
        )

    @staticmethod
    def largest_weight(dims: ModelDims, element: int) -> int:
        """The largest weight of a layer, unpacked."""
        return dims.hidden_size * max(dims.intermediate_size, dims.query_width) * element

    def states(self, num_tokens: int, num_layers: int = 1) -> int:
        """Hidden states before so many layers."""
        return num_tokens * self.dims.hidden_size * num_layers * self.element

    def layer(self, rows: Rows, past: int = 0) -> int:
        """The most that one layer holds at a time, its input among it.

        Args:
            rows: tokens of each sample that take part.
            past: keys of every sample that are already there.
        """
        dims, present, places = self.dims, sum(rows.present), len(rows.query) * max(rows.query)
        hidden, query, keys = dims.hidden_size, dims.query_width, dims.kv_width
        offered = len(rows.keys) * max(rows.keys)
        uneven = min(rows.query) < max(rows.query) or min(rows.keys) < max(rows.keys)
        masked = uneven or self.eager or self.sighted or (self.masks and past > 0)
        given = present * (2 * hidden if sum(rows.query) == present else 3 * hidden)
        project = (
            given + sum(rows.query) * query + 2 * sum(rows.keys) * keys + max(places * 3 * query, offered * 3 * keys)
        )
        attend = present * hidden + 3 * places * query + 2 * (offered + len(rows.keys) * past) * keys
        if masked and keys < query:
            attend += 2 * (offered + len(rows.keys) * past) * query
        copied = 2 * places * query if uneven else 0
        mlp = 2 * present * hidden + places * query + copied + sum(rows.mlp) * (hidden + 3 * dims.mlp_width)
        attending = attend * self.element + self._scores(rows, past, masked)
        return max((project + copied) * self.element, attending, mlp * self.element) + self.unpacked

    def layer_of(self, lengths: Sequence[int]) -> int:
        """The most that one layer of the full model holds at a time for samples of these lengths."""
        return self.layer(Rows.all(lengths))

    def _scores(self, rows: Rows, past: int, masked: bool) -> int:
        """Scores where they are written out, and masks as they are added to them."""
        count, pairs = len(rows.query), max(rows.query) * (max(rows.keys) + past)
        if self.eager:
            return count * pairs * self.dims.num_heads * max(2 * self.element, self.element + 4)
        even = min(rows.query) == max(rows.query) and min(rows.keys) == max(rows.keys) and not self.sighted
        return pairs * self.element * (1 if even else count) if masked else 0

    def arranged(self, lengths: Sequence[int], past: int = 0) -> int:
        """Rotary embeddings and masks of a chunk, arranged for its attention calls."""
        longest, count = max(lengths), len(lengths)
        pairs = longest * (longest + past)
        kinds = 2 if self.sighted else 1  # of layers, with tables and masks of their own
        tables = kinds * 13 * sum(lengths) * self.dims.head_dim * self.element
        if self.eager:
            return tables + kinds * 2 * count * pairs * self.element
        if min(lengths) < longest or self.sighted:
            return tables + kinds * 2 * count * pairs
        return tables + (2 * pairs if self.masks and past else 0)

    def logits(self, num_answer_tokens: int) -> int:
        """Logits at the answers' positions with their logarithms in float32, or four float32 terms and a mask of KL."""
        return num_answer_tokens * self.dims.vocab_size * max(self.element + 8, 17)

    def standing(self, lengths: Sequence[int], num_answer_tokens: int, past: int = 0) -> int:
        """What a chunk holds as long as it is worked on: its input, the full model's state on the way, the prefix, what
        the full model said.

        Args:
            lengths: tokens of each sample, those of the prefix left out.
            num_answer_tokens: of all samples.
            past: tokens of the prefix, which is held once.
        """
        known = num_answer_tokens * self.dims.vocab_size * 4
        states = self.states(sum(lengths), 2 + self.deepstack)
        return states + self.arranged(lengths, past) + self.cache(past) + known

    def chunk(self, sizes: Sequence[SampleSize]) -> int:
        """The most that scoring a chunk can take beside the hidden states that are kept: see :meth:`standing`, the
        states that wait, and a layer in which every token does everything, or the logits; with the text before the
        images apart or, as while that is computed, not."""
        answers, past = sum(size.answer for size in sizes), min(size.prefix for size in sizes)
        return max(self._chunk([size.length - its for size in sizes], answers, its) for its in {past, 0})

    def _chunk(self, lengths: Sequence[int], num_answer_tokens: int, past: int) -> int:
        working = max(self.layer(Rows.all(lengths), past), self.logits(num_answer_tokens))
        waiting = self.states(sum(lengths), WAITING_STATES)
        return self.standing(lengths, num_answer_tokens, past) + waiting + working

    def cache(self, num_tokens: int) -> int:
        """Keys and values of all layers."""
        return num_tokens * 2 * self.dims.kv_width * self.dims.num_layers * self.element

    def generation(self, batch: int, length: int, max_new_tokens: int) -> int:
        """The most that ``generate()`` takes for prompts of one length."""
        logits = batch * self.dims.vocab_size * (self.element + 8)
        return (
            self.cache(batch * (length + max_new_tokens))
            + self.states(batch * length)
            + max(self.layer(Rows.all([length] * batch)), logits)
        )

    def generated_together(self, free: int, length: int, max_new_tokens: int, tower: int = 0) -> int:
        """How many prompts of a length ``free`` bytes are enough for in ``generate()``; one at least.

        ``tower``: what the vision tower takes for the images of one.
        """
        one, two = (self.generation(batch, length, max_new_tokens) for batch in (1, 2))
        answering = 1 + max(0, free - one) // (two - one)
        return max(1, min(answering, free // tower)) if tower else answering


def num_patches(num_values: int, vision_config: Any) -> int:
    """Patches that ``num_values`` pixel values are, as the vision tower receives them."""
    side = vision_config.patch_size
    side = side[0] if isinstance(side, (list, tuple)) else side
    return int(num_values // (3 * getattr(vision_config, "temporal_patch_size", 1) * side**2))


def tower_bytes(config: Any, width: int, patches: int, element: int) -> int:
    """Activations of a vision tower, with the states of all its layers where a family asks for one of them.

    Args:
        config: of the model.
        width: channels of the tower.
        patches: of all images.
        element: bytes of an activation.
    """
    vision = config.vision_config
    depth = getattr(vision, "num_hidden_layers", None) or vision.depth
    states = depth + 1 if hasattr(config, "vision_feature_layer") else 1
    return patches * width * (states + TOWER_LAYER) * element


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
    sizes: Sequence[SampleSize],
    footprint: Footprint,
    work_bytes: int,
    max_tokens: int,
    max_samples: int | None = None,
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
    return CHUNK_TOKENS.get(device_type, ACCELERATOR_CHUNK_TOKENS)


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


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move without waiting: through pinned memory where the device is a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, pinned where it comes from a GPU; nothing is copied that is there already."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)
