"""What the call that runs in a thread has brought, and what a strategy makes of its prompt."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from transformers.cache_utils import Cache

from dop_search.pruning.layout import DROPPED, assign_groups, ranked_tokens
from dop_search.pruning.packed import Tokens
from dop_search.pruning.ranking import RankingSource
from dop_search.pruning.text_groups import TextGroups
from dop_search.strategy import Strategy


class Call(threading.local):
    """What was seen of the call that runs in this thread; calls in other threads run at the same time.

    Attributes:
        input_ids: tokens of the decoder's next call, ``[batch, length]``, as far as they are known.
        beside_embeds: ``input_ids`` that ``generate()`` was given beside ``inputs_embeds``, and does not pass on.
        read: ``[batch, length]`` tokens whose logits a loss reads; ``None``: no labels.
        prompt: the whole prompt, while ``generate()`` feeds it in chunks.
        generating: whether ``generate()`` is running, with its own loop.
        checked: the cache whose mask it was last checked with; in later steps it only grows.
    """

    def __init__(self) -> None:
        self.input_ids: Tensor | None = None
        self.beside_embeds: Tensor | None = None
        self.read: Tensor | None = None
        self.prompt: Prompt | None = None
        self.generating = False
        self.checked: Cache | None = None


@dataclass(frozen=True)
class Prompt:
    """Tokens of a batch with what a strategy says about each.

    Attributes:
        embeds: ``[batch, length, hidden_size]`` what enters the decoder, merged features included.
        groups: per sample ``[length]``, see :func:`dop_search.pruning.layout.assign_groups`; pads are ``DROPPED``.
        num_ranked: visual tokens of each sample that the strategy decides about.
        start: tokens that were fed before.
    """

    embeds: Tensor
    groups: Sequence[np.ndarray]
    num_ranked: list[int] = field(default_factory=list)
    start: int = 0

    def part(self, start: int, length: int) -> Prompt | None:
        """The chunk of ``length`` tokens after ``start`` ones; ``None`` where the prompt does not cover it."""
        first, end = start - self.start, start - self.start + length
        if first < 0 or end > self.embeds.shape[1]:
            return None
        return Prompt(self.embeds[:, first:end], [group[first:end] for group in self.groups], self.num_ranked, start)


def arrange(
    tokens: Tokens, strategy: Strategy, rankings: RankingSource, text: TextGroups | None, start: int = 0
) -> Prompt:
    """Rank the visual tokens of a batch and cut them into the strategy's groups.

    ``start``: tokens that were fed before.
    """
    is_visual = tokens.visual.cpu().numpy()
    is_valid = np.ones_like(is_visual) if tokens.valid is None else tokens.valid.cpu().numpy()
    ranked = ranked_tokens(is_visual, is_valid, None if tokens.read is None else tokens.read.cpu().numpy())
    counts, embeds = is_visual.sum(axis=1).tolist(), tokens.embeds
    orders = [np.arange(count) for count in counts]
    images: list[tuple[int, ...]] = [(count,) for count in counts]
    if any(counts) and rankings.ranks:
        embeds = rankings.prepare(tokens, strategy.num_kept)
        orders, images = rankings.rank(counts), rankings.images(counts)
    rankings.forget()
    groups = []
    for row, order in enumerate(orders):
        its = assign_groups(is_visual[row], order, strategy, ranked[row], images[row])
        if text is not None:
            place = np.flatnonzero(is_valid[row])
            its[place] = text.assign(its[place], is_visual[row, place], len(strategy.groups))
        its[~is_valid[row]] = DROPPED
        groups.append(its)
    return Prompt(embeds, groups, ranked.sum(axis=1).tolist(), start)
