"""Which token stands where: the packed rows of a batch, and the index sets of its token groups.

A decoder call on a batch is laid out as one sequence of *rows*, sample after sample, without padding and without
the visual tokens that never enter the decoder. Every set of rows that a layer needs is "the text tokens that are in
no group, and some groups", so the indices between any two such sets are computed once and kept. They depend on the
order of the groups alone, not on which image tokens were chosen: with one group, prompts of the same shape share them.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dop_search.pruning.plans import AttentionPlan, LayerPlan, RecurrentPlan, Segment
from dop_search.pruning.recurrent import plan_recurrence
from dop_search.pruning.sight import NO_IMAGE, Sight, within_window
from dop_search.strategy import Strategy
from dop_search.strategy.steps import Groups, LayerStep
from dop_search.utils.errors import DopError

TEXT = -1
DROPPED = -2
MAX_SEGMENTS = 4
LAST = np.iinfo(np.int64).max
"""Behind all rows."""


def ranked_tokens(visual: np.ndarray, valid: np.ndarray, read: np.ndarray | None = None) -> np.ndarray:
    """The visual tokens that a strategy decides about; each of the others is a pad, or runs every operation.

    The last real token of a sample always runs everything, also where it is visual: its logits are read.

    Args:
        visual, valid: ``[batch, length]`` boolean: which tokens are visual, which are real.
        read: ``[batch, length]`` further tokens whose logits are read.

    Returns:
        ``[batch, length]`` boolean.
    """
    ranked = visual & valid
    last = valid.shape[1] - 1 - valid[:, ::-1].argmax(axis=1)
    ranked[np.arange(len(ranked)), last] = False
    return ranked if read is None else ranked & ~read


def assign_groups(
    visual: np.ndarray,
    ranking: np.ndarray,
    strategy: Strategy,
    ranked: np.ndarray | None = None,
    images: Sequence[int] | None = None,
) -> np.ndarray:
    """The group of every token of one sample: ``TEXT``, ``DROPPED`` or ``0..G-1``; DopError if the ranking is not a
    permutation of the sample's visual tokens.

    Args:
        visual: ``[num_tokens]`` boolean.
        ranking: indices into the sample's visual tokens, best first (``[num_visual]``).
        strategy: says how many tokens are kept and how the ranks are cut.
        ranked: ``[num_tokens]`` the visual tokens that the strategy decides about (:func:`ranked_tokens`); all of them
            by default. The others are as text, and leave their rank to those after them.
        images: visual tokens of each image that is ranked by itself; all together by default.
    """
    positions = np.flatnonzero(visual)
    if len(ranking) != len(positions) or not np.array_equal(np.sort(ranking), np.arange(len(positions))):
        raise DopError(
            f"a ranking must be a permutation of the sample's {len(positions)} visual tokens, "
            f"but got {len(ranking)} entries"
        )
    groups = np.full(len(visual), TEXT, dtype=np.int64)
    sizes = strategy.parts((len(positions),) if images is None else images)
    image = np.repeat(np.arange(len(sizes)), sizes)[ranking]
    for part in range(len(sizes)):
        order = positions[ranking[image == part]]
        if ranked is not None:
            order = order[ranked[order]]
        groups[order] = DROPPED
        start = 0
        for group, size in enumerate(strategy.group_sizes(len(order))):
            groups[order[start : start + size]] = group
            start += size
    return groups


class Layout:
    """The packed rows of one batch and every index set that its layers need, made once and kept.

    Args:
        sample, group: per row: which sample, which group (``TEXT`` or ``0..G-1``). Rows are ordered by sample, and
            within a sample as the tokens are.
        read: per row: whether its output logits are needed (``None``: all). In the last layer only such rows
            issue queries and go through the MLP.
        num_past: keys of every sample that are already there and come before all rows.
        sight: per row where it stands, for decoders with windows, or that see images as a whole.
    """

    def __init__(
        self,
        sample: np.ndarray,
        group: np.ndarray,
        num_samples: int,
        device: torch.device,
        read: np.ndarray | None = None,
        num_past: int = 0,
        sight: Sight | None = None,
    ) -> None:
        self.sample, self.group = sample, group
        self.num_samples = num_samples
        self.device = device
        self.read = read
        self.num_past = num_past
        self.sight = sight
        self._rows: dict[tuple[Groups, bool], np.ndarray] = {}
        self._relative: dict[tuple[Groups, Groups, bool], Tensor | None] = {}
        self._attention: dict[tuple[Groups, Groups, bool, int | None], AttentionPlan] = {}
        self._layers: dict[tuple[Groups, LayerStep, bool, int | None, int], LayerPlan] = {}
        self._elsewhere: dict[torch.device, Layout] = {}

    def on(self, device: torch.device) -> Layout:
        """The same rows with index tensors on ``device``, for decoders whose layers are on several."""
        if device == self.device:
            return self
        if device not in self._elsewhere:
            there = Layout(self.sample, self.group, self.num_samples, device, self.read, self.num_past, self.sight)
            return self._elsewhere.setdefault(device, there)
        return self._elsewhere[device]

    def rows(self, groups: Groups, read_only: bool = False) -> np.ndarray:
        """Sorted rows of the text tokens and of ``groups``; with ``read_only`` the text rows that are read."""
        key = (groups, read_only)
        if key not in self._rows:
            member = (self.group == TEXT) | np.isin(self.group, list(groups))
            if read_only and self.read is not None:
                member &= self.read
            return self._rows.setdefault(key, np.flatnonzero(member))
        return self._rows[key]

    def relative(self, inner: Groups, outer: Groups, read_only: bool = False) -> Tensor | None:
        """Where the rows of ``inner`` stand among the rows of ``outer``; ``None`` when they are the same rows."""
        key = (inner, outer, read_only)
        if key not in self._relative:
            inside, around = self.rows(inner, read_only), self.rows(outer)
            same = len(inside) == len(around)
            self._relative.setdefault(key, None if same else self.tensor(np.searchsorted(around, inside)))
        return self._relative[key]

    def layer(
        self, before: Groups, step: LayerStep, read_only: bool = False, window: int | None = None, taps: int = 0
    ) -> LayerPlan:
        """The rows of one layer whose input holds the groups ``before``; ``taps``: of a recurrent layer."""
        key = (before, step, read_only, window, taps)
        if key not in self._layers:
            offered, mixing = self.relative(step.kv, step.alive), None
            if taps:
                offered, mixing = self._plan_recurrence(step, read_only, taps)
            plan = LayerPlan(
                keep=self.relative(step.alive, before),
                query=self.relative(step.q, step.alive, read_only),
                key=offered,
                mlp=self.relative(step.mlp, step.alive, read_only),
                attention=None if taps else self.attention(step.q, step.kv, read_only, window),
                recurrent=mixing,
            )
            return self._layers.setdefault(key, plan)
        return self._layers[key]

    def _plan_recurrence(self, step: LayerStep, read_only: bool, taps: int) -> tuple[Tensor | None, RecurrentPlan]:
        """Rows that update or read, among those that stay, and their arrangement."""
        reads, updates, around = self.rows(step.q, read_only), self.rows(step.kv), self.rows(step.alive)
        rows = np.union1d(reads, updates)
        plan = plan_recurrence(
            self.sample[rows], np.isin(rows, updates), np.isin(rows, reads), self.num_samples, taps, self.device
        )
        return None if len(rows) == len(around) else self.tensor(np.searchsorted(around, rows)), plan

    def attention(
        self, query_groups: Groups, key_groups: Groups, read_only: bool = False, window: int | None = None
    ) -> AttentionPlan:
        """The arrangement of one attention call between these queries and keys."""
        key = (query_groups, key_groups, read_only, window)
        if key not in self._attention:
            plan = self._plan_attention(self.rows(query_groups, read_only), self.rows(key_groups), window)
            return self._attention.setdefault(key, plan)  # one plan for all threads: tables go by its identity
        return self._attention[key]

    def tensor(self, array: np.ndarray) -> Tensor:
        """An index array on the layout's device."""
        return to_device(torch.from_numpy(np.ascontiguousarray(array)), self.device)

    def _plan_attention(self, query_rows: np.ndarray, key_rows: np.ndarray, window: int | None) -> AttentionPlan:
        query_place, num_queries, query_even = self._places(query_rows, align_right=False)
        key_place, num_keys, key_even = self._places(key_rows, align_right=True)
        sight = self.sight
        if sight is not None and sight.is_causal(query_rows, key_rows, window, self.num_past):
            sight = None
        even = query_even and key_even and sight is None
        segments = self._segments(query_rows, key_rows, num_queries, num_keys) if even else None
        places: tuple[Tensor | None, ...] = (None, None)
        if window is not None and self.sight is not None:
            places = (
                self._spread(self.sight.place[query_rows], query_place, num_queries, 0),
                self._spread(self.sight.place[key_rows], key_place, num_keys, 0),
            )
        mask = key_valid = None
        if not key_even:
            key_valid = self._spread(np.ones(len(key_rows), dtype=np.bool_), key_place, num_keys, False)
        if segments is None:
            # Rows of a sample are in the order of its tokens, so that comparing rows is comparing positions.
            queries = self._spread(query_rows, query_place, num_queries, LAST - 1)[:, None, :, None]
            mask = self._spread(key_rows, key_place, num_keys, LAST)[:, None, None, :] <= queries
            mask = nn.functional.pad(mask, (self.num_past, 0), value=True) if self.num_past else mask
            if sight is not None:
                images = (
                    self._spread(sight.image[query_rows], query_place, num_queries, NO_IMAGE),
                    self._spread(sight.image[key_rows], key_place, num_keys, NO_IMAGE),
                )
                mask = self._seen(mask, images, places, window)
        return AttentionPlan(
            num_samples=self.num_samples,
            num_queries=num_queries,
            num_keys=num_keys,
            num_past=self.num_past,
            query_pad=None if query_even else self._numbers(query_place, num_queries),
            key_pad=None if key_even else self._numbers(key_place, num_keys),
            query_unpad=None if query_even else self.tensor(query_place),
            key_valid=key_valid,
            mask=mask,
            segments=segments,
            query_rows=self.tensor(query_rows),
            key_rows=self.tensor(key_rows),
            window=window,
            query_places=places[0],
            key_places=places[1],
        )

    def _places(self, rows: np.ndarray, align_right: bool) -> tuple[np.ndarray, int, bool]:
        counts = np.bincount(self.sample[rows], minlength=self.num_samples)
        longest = int(counts.max(initial=0))
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        within = np.arange(len(rows)) - np.repeat(starts, counts)
        offset = np.repeat(longest - counts, counts) if align_right else 0
        places = self.sample[rows] * longest + within + offset
        return places, longest, bool((counts == longest).all())

    def _numbers(self, places: np.ndarray, length: int) -> Tensor:
        return self._spread(np.arange(len(places)), places, length, 0).flatten()

    def _segments(
        self, query_rows: np.ndarray, key_rows: np.ndarray, num_queries: int, num_keys: int
    ) -> tuple[Segment, ...] | None:
        """Cut the queries into runs without a key between them that is no query; ``None`` if they are many."""
        is_key = np.isin(query_rows, key_rows)
        if not is_key.all() or not len(query_rows):
            return None
        visible = np.searchsorted(key_rows, query_rows) + 1  # keys up to and including the query itself
        visible = visible.reshape(self.num_samples, num_queries) - np.arange(self.num_samples)[:, None] * num_keys
        if not (visible == visible[0]).all():
            return None
        cuts = [0, *(np.flatnonzero(np.diff(visible[0]) != 1) + 1).tolist(), num_queries]
        if len(cuts) - 1 > MAX_SEGMENTS:
            return None
        past = self.num_past
        return tuple(Segment(a, b, past + int(visible[0, b - 1])) for a, b in itertools.pairwise(cuts))

    def _spread(self, values: np.ndarray, places: np.ndarray, length: int, pad: int) -> Tensor:
        """A value per row as ``[num_samples, length]``."""
        spread = np.full(self.num_samples * length, pad, dtype=values.dtype)
        spread[places] = values
        return self.tensor(spread).view(self.num_samples, length)

    def _seen(
        self, mask: Tensor, images: tuple[Tensor, Tensor], places: Sequence[Tensor | None], window: int | None
    ) -> Tensor:
        """A causal mask that opens each image to itself, and closes what is out of the window."""
        query_image, key_image = (image[:, None] for image in images)
        same = (query_image[..., :, None] == key_image[..., None, :]) & (key_image != NO_IMAGE)[..., None, :]
        mask = mask | nn.functional.pad(same, (self.num_past, 0), value=False)
        query_places, key_places = places
        if window is None or query_places is None or key_places is None:
            return mask
        past = torch.arange(self.num_past, device=mask.device).expand(self.num_samples, -1)
        return mask & within_window(query_places, torch.cat([past, key_places], dim=1), window)[:, None]


class LayoutCache:
    """The layouts of the latest prompts, so that prompts of the same shape do their index work once."""

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self._layouts: OrderedDict[tuple[bytes, ...], Layout] = OrderedDict()
        self._lock = threading.Lock()

    def pack(
        self, groups: Sequence[np.ndarray], device: torch.device, sights: Sequence[Sight] | None = None
    ) -> tuple[Layout, list[np.ndarray]]:
        """As :func:`pack`; the layout may be one that an earlier prompt of the same shape has used."""
        kept = [np.flatnonzero(group != DROPPED) for group in groups]
        mode = b"inference" if torch.is_inference_mode_enabled() else b""  # such tensors cannot be trained through
        key = (str(device).encode(), mode, *(group[keep].tobytes() for group, keep in zip(groups, kept, strict=True)))
        if sights is not None:
            key += tuple(sight.at(keep).key for sight, keep in zip(sights, kept, strict=True))
        with self._lock:
            layout = self._layouts.pop(key, None)
            if layout is None:
                layout, _ = pack(groups, device, sights=sights)
            self._layouts[key] = layout
            if len(self._layouts) > self.size:
                self._layouts.popitem(last=False)
        return layout, kept


def pack(
    groups: Sequence[np.ndarray],
    device: torch.device,
    read: Sequence[np.ndarray] | None = None,
    num_past: int = 0,
    sights: Sequence[Sight] | None = None,
) -> tuple[Layout, list[np.ndarray]]:
    """Lay out samples after each other without their dropped tokens.

    Args:
        groups: per sample the group of each of its tokens (see :func:`assign_groups`).
        read: per sample whether each token's logits are needed.
        num_past: keys of every sample that are already there.
        sights: per sample where its tokens stand; see :class:`Layout`.

    Returns:
        The layout, and per sample the tokens that entered it.
    """
    kept = [np.flatnonzero(group != DROPPED) for group in groups]
    layout = Layout(
        sample=np.concatenate([np.full(len(keep), index) for index, keep in enumerate(kept)]),
        group=np.concatenate([group[keep] for group, keep in zip(groups, kept, strict=True)]),
        num_samples=len(groups),
        device=device,
        read=None if read is None else np.concatenate([r[keep] for r, keep in zip(read, kept, strict=True)]),
        num_past=num_past,
        sight=None if sights is None else Sight.joined([s.at(keep) for s, keep in zip(sights, kept, strict=True)]),
    )
    return layout, kept


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move without waiting: through pinned memory where the device is a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
