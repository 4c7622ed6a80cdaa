"""Which rows of an engine's step take part in what, which keys they see, and where their keys are kept.

An engine feeds several requests at a time, each a piece of its prompt or its next token, as one flat sequence of
*rows*. Every row has a slot in a paged cache: ``table[request, place // block_size] * block_size + place %
block_size``. In a layer where some groups of visual tokens are no keys, the other rows close the gap: their places
count only the text and the groups that are keys there, in the same blocks. So a layer needs no more than how many rows
of each group stand before a row, which is remembered per slot from one step to the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dop_search.strategy import Strategy
from dop_search.strategy.steps import Groups

TEXT = -1
BASE = 256
"""Whole numbers up to here are exact in every floating-point type that models run in."""
NUM_MARKS = 5
"""Channels that :func:`marks` adds to a visual token's features."""


def marks(strategy: Strategy, ranking: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of an image that enter the decoder, and what later steps have to know of them.

    Args:
        strategy: says how many tokens are kept and how the ranks are cut into groups.
        ranking: ``[n]`` the image's tokens, best first.

    Returns:
        The kept tokens in the image's order, and per kept token ``[kept, NUM_MARKS]``: how many dropped tokens stand
        right before it, and right after it if it is the last (two digits of base 256 each), and its group.
    """
    group = np.full(len(ranking), TEXT)
    start = 0
    for index, size in enumerate(strategy.group_sizes(len(ranking))):
        group[ranking[start : start + size]] = index
        start += size
    kept = np.flatnonzero(group != TEXT)
    before = np.diff(kept, prepend=-1) - 1
    after = np.zeros_like(before)
    after[-1:] = len(ranking) - 1 - kept[-1:]
    return kept, np.stack([*np.divmod(before, BASE), *np.divmod(after, BASE), group[kept]], axis=1)


@dataclass(frozen=True)
class Fed:
    """What the rows of a step are.

    Attributes:
        group: ``[n]`` group of a row, ``TEXT`` for text.
        before: ``[n]`` dropped tokens right before a row.
        after: ``[n]`` dropped tokens right after it.
        further: ``[n, k]`` ``k`` more numbers that visual tokens bring along; 0 for text.
    """

    group: Tensor
    before: Tensor
    after: Tensor
    further: Tensor

    @classmethod
    def of(cls, visual: Tensor, channels: Tensor) -> Fed:
        """From which rows are visual (``[n]``), and the marks of these (``[visual, NUM_MARKS + 2 k]``)."""
        values = channels.round().long()
        digits = torch.cat([values[:, : NUM_MARKS - 1], values[:, NUM_MARKS:]], dim=1).unflatten(1, (-1, 2))
        numbers = digits[..., 0] * BASE + digits[..., 1]
        group = torch.full(visual.shape, TEXT, device=visual.device)
        known = torch.zeros(len(visual), numbers.shape[1], dtype=torch.long, device=visual.device)
        group[visual], known[visual] = values[:, NUM_MARKS - 1], numbers
        return cls(group, known[:, 0], known[:, 1], known[:, 2:])

    def counts(self, num_groups: int) -> Tensor:
        """Per row ``[n, 1 + num_groups]``: dropped tokens on both sides of it, and whether it is in each group."""
        member = self.group[:, None] == torch.arange(num_groups, device=self.group.device)
        return torch.cat([(self.before + self.after)[:, None], member.long()], dim=1)


@dataclass(frozen=True)
class Paging:
    """Where an engine keeps what.

    Attributes:
        starts: ``[requests + 1]`` where the rows of each request begin.
        lengths: ``[requests]`` rows of each request so far, those of this step included.
        table: ``[requests, blocks]`` the blocks of each request.
    """

    starts: Tensor
    lengths: Tensor
    table: Tensor
    block_size: int

    def slots(self, request: Tensor, place: Tensor) -> Tensor:
        """The slots of places of requests."""
        return self.table[request, place // self.block_size] * self.block_size + place % self.block_size

    def requests(self) -> Tensor:
        """The request of each row."""
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=self.starts.device), self.starts.diff())


class Tally:
    """Per slot of the cache, what has been counted up to the row that is kept there."""

    def __init__(self, num_slots: int, width: int, device: torch.device) -> None:
        self.values = torch.zeros(num_slots, width, dtype=torch.long, device=device)

    def advance(self, own: Tensor, paging: Paging) -> Tensor:
        """Count on from the step before: ``own`` is what each row adds (``[n, width]``); the result includes it.

        A request may begin with blocks that another one fills in this very step (prefix caching), and that one with
        blocks of a third: the counts settle along the chain.
        """
        request, done = paging.requests(), paging.lengths - paging.starts.diff()
        everyone = torch.arange(len(done), device=done.device)
        last = paging.slots(everyone, (done - 1).clamp(min=0))
        slots = paging.slots(
            request, done[request] + torch.arange(len(own), device=own.device) - paging.starts[request]
        )
        total = torch.nn.functional.pad(own.cumsum(0), (0, 0, 1, 0))
        within = total[1:] - total[paging.starts[:-1]][request]
        for _ in range(len(done) + 1):
            known = self.values[last] * (done > 0)[:, None]
            self.values[slots] = within + known[request]
            if torch.equal(self.values[last] * (done > 0)[:, None], known):
                break
        return within + known[request]


@dataclass(frozen=True)
class Runs:
    """Queries as pieces that see one more key with every row: each is to the engine a request of its own.

    Attributes:
        request: ``[runs]`` whose keys a run sees.
        sizes: ``[runs]`` its rows.
        lengths: ``[runs]`` the keys that its last row sees.
    """

    request: Tensor
    sizes: Tensor
    lengths: Tensor


class Rows:
    """The rows of one step, and the index sets that layers need, made once and kept.

    Args:
        fed: what the rows are.
        paging: where the engine keeps what.
        counted: ``[n, 1 + groups]`` of :meth:`Tally.advance`: dropped tokens and rows of each group up to a row.
    """

    def __init__(self, fed: Fed, paging: Paging, counted: Tensor) -> None:
        self.fed, self.paging, self.counted = fed, paging, counted
        self.request = paging.requests()
        within = torch.arange(len(self.request), device=counted.device) - paging.starts[self.request]
        self.place = (paging.lengths - paging.starts.diff())[self.request] + within
        self.positions = self.place + counted[:, 0] - fed.after
        self._members: dict[Groups, Tensor] = {}

    @property
    def any_visual(self) -> bool:
        """Whether there is more than text in this step."""
        return bool((self.fed.group != TEXT).any())

    def members(self, groups: Groups) -> Tensor:
        """The rows of text and of ``groups``."""
        if groups not in self._members:
            wanted = torch.tensor(sorted({TEXT, *groups}), device=self.fed.group.device)
            self._members[groups] = torch.isin(self.fed.group, wanted).nonzero()[:, 0]
        return self._members[groups]

    def within(self, inner: Groups, outer: Groups) -> Tensor | None:
        """Where the rows of ``inner`` stand among those of ``outer``; ``None`` where they are the same rows."""
        inside, around = self.members(inner), self.members(outer)
        return None if len(inside) == len(around) else torch.searchsorted(around, inside)

    def visible(self, keys: Groups) -> Tensor:
        """``[n]`` how many keys there are up to each row where text and ``keys`` are keys."""
        absent = [1 + group for group in range(self.counted.shape[1] - 1) if group not in keys]
        return self.place + 1 - self.counted[:, absent].sum(dim=1)

    def slots(self, keys: Groups) -> Tensor:
        """The slots of the rows that are keys."""
        rows = self.members(keys)
        return self.paging.slots(self.request[rows], self.visible(keys)[rows] - 1)

    def runs(self, queries: Groups, keys: Groups) -> Runs:
        """The attention of text and ``queries`` to the keys up to themselves."""
        rows = self.members(queries)
        request, visible = self.request[rows], self.visible(keys)[rows]
        new = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        new[1:] = (request.diff() != 0) | (visible.diff() != 1)
        first = new.nonzero()[:, 0]
        sizes = torch.nn.functional.pad(first, (0, 1), value=len(rows)).diff()
        return Runs(request[first], sizes, visible[first + sizes - 1])
